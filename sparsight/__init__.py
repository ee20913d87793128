"""sparsight: what is computed. Distils vision-language teachers into sparse students and answers about streams.

Nothing here imports ray: `actors/`, `pipelines/` and `serve_apps/` put this library on a cluster.

Imports go down only:
    evaluate | teacher | distill | kv  →  model  →  data  →  media | artifacts  →  storage | observe
    →  config | records | errors  (these three import neither torch nor transformers)

Dimension letters in tensor names: B batch · T text positions · P patches · F frames · D width · H heads ·
G key/value heads · C head width · V vocabulary · K kept targets · E experts · A active experts · N blocks ·
R retrieved blocks · L layers · S tokens per block. `logits_BTV` is a [batch, position, vocabulary] tensor.
"""

__version__ = "0.1.0"
