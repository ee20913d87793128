"""The teacher on our own `VisionLanguageModel`: a stock LLaVA-OneVision checkpoint that reads pictures as clips.

Its prompt, tokens and visual positions are those of a student trained beside it. A picture is encoded once, for
answering and for the forced pass; answers of a batch are written together over one cache. Used through `load.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsight.media.chat import ChatEncoder
from sparsight.media.pixels import to_pixels
from sparsight.model.answer_scores import score_answers
from sparsight.model.decode import BatchDecoder
from sparsight.model.packing import pack
from sparsight.model.sampling import SamplingSettings
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Quarantined, Sample, TeacherSignal
from sparsight.teacher.answering import DrawSettings, ScoredAnswers
from sparsight.teacher.flow import EncodedSample, OpenSample, label_samples, questions_apart
from sparsight.teacher.protocol import SignalSettings, TeacherIdentity
from sparsight.teacher.visual import TeacherForward


class VisionLanguageTeacher:
    """Labels with a LLaVA-OneVision model (dense or sparse text model)."""

    def __init__(self, model: VisionLanguageModel, identity: TeacherIdentity, settings: SignalSettings) -> None:
        self.identity = identity
        self.settings = settings
        self._model = OneVisionModel(model)

    @classmethod
    def load(
        cls,
        directory: Path,
        identity: TeacherIdentity,
        settings: SignalSettings,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        device: str = "cpu",
    ) -> "VisionLanguageTeacher":
        """Read a checkpoint. Raises `CheckpointError` if it is not a complete LLaVA-OneVision model."""
        model = VisionLanguageModel.load(directory, dtype=dtype, attention=attention, device=device)
        return cls(model, identity, settings)

    def label(self, samples: Sequence[Sample]) -> list[TeacherSignal | Quarantined]:
        return label_samples(self._model, self.settings, samples)


class OneVisionModel:
    """`VisionLanguageModel` as labelling and pair making want it (`flow.TeacherModel`, `answering.AnswerModel`)."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        text: Any = model.model.config.text_config
        self.max_positions = int(text.max_position_embeddings)
        self.vocabulary = int(model.head_VD.shape[0])

    @property
    def chat(self) -> ChatEncoder:
        return self.model.chat

    def look(self, rows: Sequence[OpenSample]) -> list[torch.Tensor]:
        """Each row's visual tokens [frames * S + 1, D], none [0, D] for text alone; equal pictures go through the tower
        once."""
        clips = {row.sample.frames: row.pictures for row in rows if row.pictures}
        newline_1D = self.model.newline_D[None]
        seen: dict[tuple[bytes, ...], torch.Tensor] = {(): newline_1D[:0]}
        if clips:
            pixels_NCHW = to_pixels([picture for clip in clips.values() for picture in clip], self.model.pixels)
            frames_NSD = self.model.frame_embeds(self.model.features(pixels_NCHW))
            parts = frames_NSD.split([len(clip) for clip in clips.values()])
            tokens = [torch.cat([part_FSD.flatten(0, 1), newline_1D]) for part_FSD in parts]
            seen |= dict(zip(clips, tokens, strict=True))
        return [seen[row.sample.frames] for row in rows]

    def answer(
        self, rows: Sequence[OpenSample], seen: Sequence[torch.Tensor], max_tokens: int
    ) -> list[tuple[str, ...]]:
        """Conversations advance together, turn by turn; every independent question is a conversation of its own."""
        apart = [apart_row for row in rows for apart_row in questions_apart(row)]
        tokens = [view for row, view in zip(rows, seen, strict=True) for _ in questions_apart(row)]
        texts = iter(self._converse(apart, tokens, max_tokens))
        return [tuple(text for _ in questions_apart(row) for text in next(texts)) for row in rows]

    def _converse(
        self, rows: Sequence[OpenSample], seen: Sequence[torch.Tensor], max_tokens: int
    ) -> list[tuple[str, ...]]:
        """Feed a question, write the answer or feed the given one; then the next turn."""
        decoder = BatchDecoder(self.model, len(rows))
        prompts = [
            self.chat.turn_prompts(row.sample.turns, len(tokens)) for row, tokens in zip(rows, seen, strict=True)
        ]
        answers: list[list[str]] = [[] for _ in rows]
        unfed: list[list[int]] = [[] for _ in rows]
        for turn in range(max(len(prompt) for prompt in prompts)):
            present = [turn < len(prompt) for prompt in prompts]
            feeds = [unfed[index] + prompts[index][turn] if here else [] for index, here in enumerate(present)]
            decoder.feed(feeds, torch.cat(list(seen)) if turn == 0 else None)
            given = [row.sample.turns[turn].answer if here else None for row, here in zip(rows, present, strict=True)]
            limits = [max_tokens if here and text is None else 0 for here, text in zip(present, given, strict=True)]
            written = decoder.decode(limits, feed_end=turn + 1 < max(map(len, prompts)))
            for index, (text, ids) in enumerate(zip(given, written, strict=True)):
                if not present[index]:
                    continue
                answers[index].append(self.chat.decode(ids) if text is None else text)
                unfed[index] = self._unfed(rows[index], turn, ids)
        return [tuple(texts) for texts in answers]

    def prompt_tokens(self, row: OpenSample, seen: torch.Tensor) -> int:
        return len(self.chat.turn_prompts(row.sample.turns, len(seen))[0])

    def answer_tokens(self, text: str) -> int:
        return len(self.chat.encode_answers("?", [text], 1).answer_ids(0))

    def draw(
        self,
        rows: Sequence[OpenSample],
        seen: Sequence[torch.Tensor],
        seeds: Sequence[Sequence[int]],
        settings: DrawSettings,
    ) -> list[list[str]]:
        """The prompts are computed once; all answers of a prompt are drawn side by side from its cache."""
        times = len(seeds[0])
        decoder = BatchDecoder(self.model, len(rows))
        prompts = [
            self.chat.turn_prompts(row.sample.turns, len(tokens))[0] for row, tokens in zip(rows, seen, strict=True)
        ]
        decoder.feed(prompts, torch.cat(list(seen)))
        decoder.repeat(times)
        streams = [SamplingSettings(settings.temperature, settings.top_p, seed) for row in seeds for seed in row]
        texts = [self.chat.decode(ids) for ids in decoder.decode([settings.max_tokens] * len(streams), streams)]
        return [texts[start : start + times] for start in range(0, len(texts), times)]

    def score(
        self, rows: Sequence[OpenSample], seen: Sequence[torch.Tensor], answers: Sequence[Sequence[str]]
    ) -> list[ScoredAnswers]:
        """One forward pass, in which a row's answers share its picture and question (`model.answer_scores`)."""
        encoded = [
            self.chat.encode_answers(row.sample.turns[0].question, texts, len(tokens))
            for row, texts, tokens in zip(rows, answers, seen, strict=True)
        ]
        scores = score_answers(self.model, encoded, torch.cat(list(seen)))
        return [
            ScoredAnswers(
                tuple(score_A.tolist()), tuple(chat.answer_ids(index) for index in range(len(score_A))), len(tokens)
            )
            for chat, score_A, tokens in zip(encoded, scores, seen, strict=True)
        ]

    def _unfed(self, row: OpenSample, turn: int, written: list[int]) -> list[int]:
        """What must still follow in the cache before the next question: a given answer, or a missing end token."""
        asked = row.sample.turns[turn]
        if asked.answer is not None:
            chat = self.chat.encode([asked], visual_tokens=1)
            return chat.response_ids_n.tolist()
        return [] if written[-1:] == [self.chat.end_id] else [self.chat.end_id]

    def encode(self, row: OpenSample, seen: torch.Tensor) -> EncodedSample:
        encode = self.chat.encode_independent if row.sample.independent else self.chat.encode
        chat = encode(row.sample.turns, len(seen))
        lengths = tuple(end - start for start, end in chat.answer_spans)
        positions_n = chat.response_positions_n
        return EncodedSample(row.place, chat.input_ids, positions_n, lengths, len(seen), seen, chat.starts)

    def forward(self, rows: Sequence[EncodedSample], attention: bool = False) -> TeacherForward:
        ids_BT, mask_BT = self.model.pad([row.input_ids for row in rows])
        packing = pack([row.starts for row in rows], ids_BT.shape[1])
        return TeacherForward(
            *self.model.forward_text(ids_BT, mask_BT, torch.cat([row.inputs for row in rows]), packing, attention)
        )

    @property
    def head_VD(self) -> torch.Tensor:
        return self.model.head_VD

    def head(self, hidden_nD: torch.Tensor) -> torch.Tensor:
        return hidden_nD @ self.model.head_VD.T
