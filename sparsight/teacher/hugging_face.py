"""The teacher on any transformers image-text-to-text directory: its own processor, prompt and generation.

Pictures go in as images. The conversation is rendered once by the model's chat template with marks where answers
stand, and the text between marks is tokenized piece by piece, so that an answer's tokens are those its text gives
on its own: what a student's tokenizer must agree with. Hidden states come from the model under the head, logits from
its output embeddings on chosen positions. Used through `load.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from sparsight.errors import CheckpointError, DataError
from sparsight.media.chat import TEXT_MARK, ChatEncoder
from sparsight.model.sampling import SamplingSettings, TokenChooser
from sparsight.records import Quarantined, Sample, TeacherSignal, Turn
from sparsight.teacher.answering import DrawSettings, ScoredAnswers
from sparsight.teacher.flow import EncodedSample, OpenSample, label_questions_apart, response_hidden
from sparsight.teacher.protocol import SignalSettings, TeacherIdentity
from sparsight.teacher.targets import CHUNK_ELEMENTS
from sparsight.teacher.visual import TeacherForward

_TOLERANCE = 1e-2


class HfTeacher:
    """Labels with a stock image-text-to-text model."""

    def __init__(self, model: "ImageTextModel", identity: TeacherIdentity, settings: SignalSettings) -> None:
        self.identity = identity
        self.settings = settings
        self._model = model

    @classmethod
    def load(
        cls,
        directory: Path,
        identity: TeacherIdentity,
        settings: SignalSettings,
        dtype: str = "auto",
        attention: str | None = None,
        device: str = "cpu",
    ) -> "HfTeacher":
        """Read a model directory. Raises `CheckpointError` if it is incomplete or cannot be labelled with."""
        return cls(ImageTextModel.load(directory, dtype, attention, device), identity, settings)

    def label(self, samples: Sequence[Sample]) -> list[TeacherSignal | Quarantined]:
        return label_questions_apart(self._model, self.settings, samples)


def visual_token_of(config: Any, tokenizer: Any) -> str:
    """The token that stands for one visual position of an image. Raises `CheckpointError` if the config names none."""
    for name in ("image_token_id", "image_token_index"):
        token_id = getattr(config, name, None)
        if token_id is not None:
            return str(tokenizer.convert_ids_to_tokens(int(token_id)))
    raise CheckpointError(f"the config of a '{config.model_type}' model names no image token: it cannot be a teacher")


@dataclass(frozen=True)
class View:
    """A row as the processor sees it: ids up to the first answer, the later pieces of text, and the picture tensors,
    none for text alone.

    `extras` are further inputs with one value a token (such as token types); they are 0 for text that follows.
    """

    prefix_ids: list[int]
    extras: dict[str, list[int]]
    tensors: dict[str, torch.Tensor]
    ends: tuple[str, ...]
    rests: tuple[str, ...]


class ImageTextModel:
    """A transformers model and its processor as labelling and pair making want them (`flow.TeacherModel`,
    `answering.AnswerModel`)."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.chat = ChatEncoder(processor.tokenizer, visual_token_of(model.config, processor.tokenizer))
        text = model.config.get_text_config()
        self.max_positions = int(text.max_position_embeddings)
        self._head = model.get_output_embeddings()
        self.vocabulary = int(self._head.weight.shape[0])
        self._generation = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            suppress_tokens=[self.chat.visual_id],  # nobody can write a picture
            pad_token_id=self.chat.pad_id,
            eos_token_id=model.generation_config.eos_token_id or self.chat.end_id,
        )
        self._check()

    @classmethod
    def load(
        cls, directory: Path, dtype: str = "auto", attention: str | None = None, device: str = "cpu"
    ) -> "ImageTextModel":
        """Read a model directory. Raises `CheckpointError` if it is incomplete or cannot be used as a teacher."""
        kernels = {"attn_implementation": attention} if attention else {}
        try:
            processor: Any = AutoProcessor.from_pretrained(directory)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                directory, dtype=dtype, output_loading_info=True, **kernels
            )
        except ImportError as error:
            raise CheckpointError(
                f"the processor of '{directory}' needs a package that is not installed: install torchvision "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"cannot load an image-text-to-text model from '{directory}': {error}") from error
        model, info = loaded
        if info["missing_keys"]:
            raise CheckpointError(f"'{directory}' lacks weights: {sorted(info['missing_keys'])[:5]}")
        return cls(model.to(device).eval(), processor)

    def look(self, rows: Sequence[OpenSample]) -> list[View]:
        return [self._view(row) for row in rows]

    def answer(self, rows: Sequence[OpenSample], seen: Sequence[View], max_tokens: int) -> list[tuple[str, ...]]:
        """Turn by turn: the rows whose answer is withheld generate together, the others go on with what is given."""
        ids = [list(view.prefix_ids) for view in seen]
        answers: list[list[str]] = [[] for _ in rows]
        for turn in range(max(len(row.sample.turns) for row in rows)):
            here = [index for index, row in enumerate(rows) if turn < len(row.sample.turns)]
            withheld = [index for index in here if rows[index].sample.turns[turn].answer is None]
            written = self._generate(
                [ids[index] for index in withheld], [seen[index] for index in withheld], max_tokens
            )
            texts = dict(zip(withheld, written, strict=True))
            for index in here:
                text = texts.get(index) or rows[index].sample.turns[turn].answer or ""
                answers[index].append(text)
                ids[index] += self._tokenize(self.chat.plain(text) + seen[index].ends[turn])
                ids[index] += self._tokenize(seen[index].rests[turn])
        return [tuple(texts) for texts in answers]

    def encode(self, row: OpenSample, seen: View) -> EncodedSample:
        ids = list(seen.prefix_ids)
        spans: list[tuple[int, int]] = []
        for turn, end, rest in zip(row.sample.turns, seen.ends, seen.rests, strict=True):
            assert turn.answer is not None
            answer_ids = self._tokenize(self.chat.plain(turn.answer) + end)
            spans.append((len(ids), len(ids) + len(answer_ids)))
            ids += answer_ids + self._tokenize(rest)
        positions_n = np.concatenate([np.arange(start, end) for start, end in spans])
        lengths = tuple(end - start for start, end in spans)
        return EncodedSample(row.place, ids, positions_n, lengths, ids.count(self.chat.visual_id), seen)

    def prompt_tokens(self, row: OpenSample, seen: View) -> int:
        return len(seen.prefix_ids)

    def answer_tokens(self, text: str) -> int:
        return len(self._tokenize(self.chat.plain(text))) + 1

    def draw(
        self, rows: Sequence[OpenSample], seen: Sequence[View], seeds: Sequence[Sequence[int]], settings: DrawSettings
    ) -> list[list[str]]:
        """Every answer is a row of its own from the start: generation of any model cannot share a prompt's cache."""
        views = [view for view, row in zip(seen, seeds, strict=True) for _ in row]
        streams = [SamplingSettings(settings.temperature, settings.top_p, seed) for row in seeds for seed in row]
        drawn = LogitsProcessorList([_Chosen(TokenChooser(streams))])
        texts = self._generate([list(view.prefix_ids) for view in views], views, settings.max_tokens, drawn)
        times = len(seeds[0])
        return [texts[start : start + times] for start in range(0, len(texts), times)]

    def score(
        self, rows: Sequence[OpenSample], seen: Sequence[View], answers: Sequence[Sequence[str]]
    ) -> list[ScoredAnswers]:
        """One forward pass in which every answer is a row of its own: not every model's attention can be packed."""
        given = [
            (replace(row, sample=replace(row.sample, turns=(replace(row.sample.turns[0], answer=text),))), view)
            for row, view, texts in zip(rows, seen, answers, strict=True)
            for text in texts
        ]
        encoded = [self.encode(row, view) for row, view in given]
        ids = [np.asarray(row.input_ids, dtype=np.int32)[row.response_positions_n] for row in encoded]
        hidden_nD = response_hidden(self.forward(encoded), encoded)
        labels_n = torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(hidden_nD.device)
        chunk = max(16, CHUNK_ELEMENTS // self.vocabulary)
        losses = [
            torch.nn.functional.cross_entropy(self.head(part_nD).float(), labels, reduction="none")
            for part_nD, labels in zip(hidden_nD.split(chunk), labels_n.split(chunk), strict=True)
        ]
        sums = iter([-float(part_n.sum()) for part_n in torch.cat(losses).split([len(answer) for answer in ids])])
        parts = iter(ids)
        return [
            ScoredAnswers(
                tuple(next(sums) for _ in texts),
                tuple(next(parts) for _ in texts),
                view.prefix_ids.count(self.chat.visual_id),
            )
            for texts, view in zip(answers, seen, strict=True)
        ]

    def forward(self, rows: Sequence[EncodedSample], attention: bool = False) -> TeacherForward:
        assert not attention, "about pictures, teachers that read clips are asked"
        views: list[View] = [row.inputs for row in rows]
        return TeacherForward(self._hidden(self._inputs([row.input_ids for row in rows], views, left=False)))

    @property
    def head_VD(self) -> torch.Tensor:
        return self._head.weight

    def head(self, hidden_nD: torch.Tensor) -> torch.Tensor:
        return self._head(hidden_nD)

    def _hidden(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state

    def _view(self, row: OpenSample) -> View:
        first, ends, rests = self._render(row.sample.turns, len(row.pictures))
        tokenizer = self.processor.tokenizer
        starts = tokenizer.bos_token is not None and first.startswith(tokenizer.bos_token)
        encoded: dict[str, torch.Tensor] = dict(
            self.processor(
                text=[first],
                images=[list(row.pictures)] if row.pictures else None,
                return_tensors="pt",
                add_special_tokens=not starts,
            )
        )
        shape = encoded["input_ids"].shape
        prefix_ids: list[int] = encoded.pop("input_ids")[0].tolist()
        encoded.pop("attention_mask", None)
        names = [name for name, tensor in encoded.items() if tensor.shape == shape and not tensor.is_floating_point()]
        extras: dict[str, list[int]] = {name: encoded.pop(name)[0].tolist() for name in names}
        return View(prefix_ids, extras, encoded, ends, rests)

    def _render(self, turns: Sequence[Turn], pictures: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """The text before the first answer, and for each answer its end-of-turn token and the text after that."""
        messages: list[dict[str, Any]] = []
        for index, turn in enumerate(turns):
            content: list[dict[str, str]] = [{"type": "image"}] * (0 if index else pictures)
            content.append({"type": "text", "text": self.chat.plain(turn.question)})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": TEXT_MARK}]})
        text = str(self.processor.apply_chat_template(messages, tokenize=False))
        first, *pieces = text.split(TEXT_MARK)
        if len(pieces) != len(turns):
            raise DataError("the teacher's chat template drops or repeats answers: it cannot be labelled with")
        cut = [self.chat.split_end(piece) for piece in pieces]
        return first, tuple(end for end, _ in cut), tuple(rest for _, rest in cut)

    def _tokenize(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _generate(
        self,
        ids: Sequence[list[int]],
        views: Sequence[View],
        max_tokens: int,
        chosen: LogitsProcessorList | None = None,
    ) -> list[str]:
        if not ids:
            return []
        inputs = self._inputs(ids, views, left=True)
        written_BT = self.model.generate(
            **inputs, generation_config=self._generation, max_new_tokens=max_tokens, logits_processor=chosen
        )
        return [self.chat.decode(row) for row in written_BT[:, inputs["input_ids"].shape[1] :].tolist()]

    def _inputs(self, ids: Sequence[list[int]], views: Sequence[View], left: bool) -> dict[str, torch.Tensor]:
        """Padded ids, mask and further inputs of a batch, on the model's device; a row may lack what others have."""
        rows = {"input_ids": list(ids), "attention_mask": [[1] * len(row) for row in ids]}
        for name in dict.fromkeys(name for view in views for name in view.extras):
            known = [view.extras.get(name, []) for view in views]
            rows[name] = [first + [0] * (len(row) - len(first)) for row, first in zip(ids, known, strict=True)]
        inputs = {
            name: _pad(values, self.chat.pad_id if name == "input_ids" else 0, left) for name, values in rows.items()
        }
        for name in dict.fromkeys(name for view in views for name in view.tensors):
            inputs[name] = _join([view.tensors[name] for view in views if name in view.tensors])
            if inputs[name].is_floating_point():
                inputs[name] = inputs[name].to(self.model.dtype)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    @torch.inference_mode()
    def _check(self) -> None:
        """The prompt can be cut, and output embeddings on hidden states give the model's own logits."""
        try:
            self._render([Turn("?", None), Turn("?", None)], pictures=1)
        except DataError as error:
            raise CheckpointError(str(error)) from error
        ids = torch.tensor([self._tokenize("one two three") or [0]], device=self.model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        own = self.model(**inputs).logits[0].float().log_softmax(dim=-1)
        ours = self.head(self._hidden(inputs)[0]).float().log_softmax(dim=-1)
        if not torch.allclose(own, ours, atol=_TOLERANCE, rtol=_TOLERANCE):
            raise CheckpointError(
                f"a '{self.model.config.model_type}' model changes its logits after the head: it cannot be a teacher"
            )


class _Chosen(LogitsProcessor):
    """Leaves greedy search nothing but the tokens that a chooser draws."""

    def __init__(self, choose: TokenChooser) -> None:
        self._choose = choose

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        chosen_B1 = torch.tensor(self._choose(scores), device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B1, 0.0)


def _pad(rows: Sequence[list[int]], value: int, left: bool) -> torch.Tensor:
    length = max(map(len, rows))
    fills = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([fill + row if left else row + fill for fill, row in zip(fills, rows, strict=True)])


def _join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows' tensors one after the other; other dimensions are filled with zeros where they differ."""
    shapes = [tensor.shape[1:] for tensor in tensors]
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    filled: list[torch.Tensor] = []
    for tensor in tensors:
        missing = [(0, size - have) for size, have in zip(largest, tensor.shape[1:], strict=True)]
        padding = [amount for pair in reversed(missing) for amount in pair]
        filled.append(torch.nn.functional.pad(tensor, padding) if any(padding) else tensor)
    return torch.cat(filled)
