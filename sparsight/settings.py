"""What all settings have in common: frozen groups, and a YAML file with overrides checked against them.

It knows the form and no setting of its own. Used by `config` and `stages`, which list the settings.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sparsight.errors import ConfigError


class Slice(BaseModel):
    """A frozen group of settings; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Settings = TypeVar("Settings", bound=Slice)


def read_settings(kind: type[Settings], path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings in a YAML file; `overrides` are `a.b=value` strings (value in YAML).

    Raises `ConfigError` that names the file, the key and the fault.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read config '{path}': {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config '{path}' is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config '{path}' must be a mapping of settings, not a {type(values).__name__}")
    for override in overrides:
        _apply(values, override)  # pyright: ignore[reportUnknownArgumentType]
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_where(item['loc'])}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"config '{path}' cannot be used:\n" + "\n".join(lines)) from error


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override '{override}' must look like a.b=value")
    *parents, last = path.split(".")
    node: Any = values
    for key in parents:
        node = _step(node, key, override)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': the value is not valid YAML") from error
    if isinstance(node, list):
        node[_index(node, last, override)] = value  # pyright: ignore[reportUnknownArgumentType]
    else:
        node[last] = value


def _step(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]  # pyright: ignore[reportUnknownArgumentType]
    child = node.setdefault(key, {}) if isinstance(node, dict) else None  # pyright: ignore
    if not isinstance(child, dict | list):
        raise ConfigError(f"override '{override}': '{key}' is not a group of settings")
    return child  # pyright: ignore[reportUnknownVariableType]


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"override '{override}': '{key}' is not an index into a list of {len(node)}")
    return int(key)


def _where(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "(top)"
