"""Streaming memory: a running video becomes blocks of keys and values, questions are answered from the best of them.

After ReKV (arXiv 2503.00540): `block` what one frame leaves behind, `page` its bytes, `bank` where it is kept, in main
memory, or in `tiers` with `disk`, `segments` (their `header` and `records`) and `archive` below, blocks `waiting` for
them and a `row_cache` above; `attention` how a stock text model is made to attend to it, `encoder` frames → blocks, of
one stream or several at once; `retrieve` a question → the blocks that matter, `recall` what it then attends to,
`answerer` one question or several → answers, with their `evidence`. Blocks may be found from outside, too: `embedding`
puts frames and questions into one space with a CLIP or SigLIP checkpoint, `retrieval_head` with a small head over the
host, which `head_training` trains. `reference` is the slow oracle.
Encoder and answerer know nothing of each other: they share a bank only, and can run in different processes.
"""
