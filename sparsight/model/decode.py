"""Batched generation that can go on: feed token rows, decode, feed more, over one growing key-value cache.

Rows may have different lengths: shorter ones are padded on the left and the padding is masked out for good, so a
row's logits do not depend on its neighbours. One chat turn or many, batch evaluation, labelling and serving all
use it. It knows nothing of chat formats.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from sparsight.model.sampling import SamplingSettings, TokenChooser
from sparsight.model.vision_language import VisionLanguageModel


class BatchDecoder:
    """B sequences in step. `feed` extends them, `decode` writes answers; both continue what is cached."""

    def __init__(self, model: VisionLanguageModel, batch: int) -> None:
        self.model = model
        self.batch = batch
        self._cache = DynamicCache()
        self._mask_BT = torch.zeros((batch, 0), dtype=torch.long, device=model.device)
        self.logits_BV = torch.zeros(0)

    @torch.inference_mode()
    def feed(self, rows: Sequence[Sequence[int]], visual_ND: torch.Tensor | None = None) -> None:
        """Append each row's ids (an empty row stays where it is); `logits_BV` then predicts what follows.

        `visual_ND` are the embeddings of all placeholders in reading order. A row that was fed nothing keeps its
        earlier logits. The placeholder itself is never predicted.
        """
        length = max(len(row) for row in rows)
        if length == 0:
            return
        pad = self.model.chat.pad_id
        ids_BT = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=self.model.device)
        new_mask_BT = torch.tensor(
            [[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.model.device
        )
        self._mask_BT = torch.cat([self._mask_BT, new_mask_BT], dim=1)
        positions_BT = (self._mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        outputs = self.model.text_model(
            inputs_embeds=self.model.embed(ids_BT, visual_ND),
            attention_mask=self._mask_BT,
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits_BV = outputs.last_hidden_state[:, -1] @ self.model.head_VD.T
        logits_BV[:, self.model.chat.visual_id] = -torch.inf  # nobody can write a picture
        fed_B = new_mask_BT.any(dim=1)
        same = self.logits_BV.shape == logits_BV.shape
        self.logits_BV = torch.where(fed_B[:, None], logits_BV, self.logits_BV) if same else logits_BV

    def repeat(self, times: int) -> None:
        """Every row becomes `times` rows beside each other that share its past: what was fed is computed once."""
        self._cache.batch_repeat_interleave(times)
        self._mask_BT = self._mask_BT.repeat_interleave(times, dim=0)
        self.logits_BV = self.logits_BV.repeat_interleave(times, dim=0)
        self.batch *= times

    def decode(
        self, limits: Sequence[int], sampling: Sequence[SamplingSettings] | None = None, feed_end: bool = False
    ) -> list[list[int]]:
        """Write at most `limits[row]` tokens per row, stopping at the end-of-turn token (kept in the output).

        With `feed_end`, the last token written is fed as well, so that a further turn can follow.
        """
        written: list[list[int]] = [[] for _ in range(self.batch)]
        end_id = self.model.chat.end_id
        choose = TokenChooser(sampling or [SamplingSettings()] * self.batch)
        active = [limit > 0 for limit in limits]
        while any(active):
            chosen = choose(self.logits_BV)
            step: list[list[int]] = []
            for row in range(self.batch):
                token = [chosen[row]] if active[row] else []
                written[row] += token
                done = token == [end_id] or len(written[row]) >= limits[row]
                step.append(token if feed_end or not done else [])
                active[row] = active[row] and not done
            self.feed(step)
        return written
