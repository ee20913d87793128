"""Writes docs/configuration.md from the fields and docstrings of sparsight/config.py: `make docs`.

`render` gives the page as text; a shape test compares it with the file. It describes, and checks nothing.
"""

import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sparsight.config import RunConfig

OPENING = """# Configuration

One YAML file describes a run (`configs/`), and `--set a.b=value` changes single keys of it on the command line.
Unknown keys are refused. `--dry-run` prints the resolved file and what would run.

This page is written by `make docs` from `sparsight/config.py`.
"""


def render() -> str:
    """The whole page: one table for the run and one for every group of settings, in the order they are met."""
    found: list[type[BaseModel]] = [RunConfig]
    for model in found:  # grows while it is walked
        for field in model.model_fields.values():
            found.extend(group for group in groups_in(field.annotation) if group not in found)
    return "\n".join([OPENING, *(section(model) for model in found)])


def groups_in(annotation: Any) -> list[type[BaseModel]]:
    """Every group of settings that a field's type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [group for part in typing.get_args(annotation) for group in groups_in(part)]


def section(model: type[BaseModel]) -> str:
    about = f"{model.__doc__.strip()}\n\n" if model.__doc__ else ""
    rows = [row(name, field) for name, field in model.model_fields.items()]
    table = "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])
    return f"## {model.__name__}\n\n{about}{table}\n"


def row(name: str, field: FieldInfo) -> str:
    cells = [f"`{name}`", kind(field.annotation), default(field), meaning(name, field)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def meaning(name: str, field: FieldInfo) -> str:
    """A field's docstring, or its group's. Raises `ValueError` for a field that has neither."""
    groups = groups_in(field.annotation)
    text = field.description or (groups[0].__doc__ if len(groups) == 1 else None)
    if name == "kind":
        text = text or "Says which of the groups this is."
    if not text:
        raise ValueError(f"the setting '{name}' has no docstring")
    return " ".join(text.split())


def kind(annotation: Any) -> str:
    """A type as a reader of YAML would say it; groups are links to their table."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return kind(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple):
        return "list of " + " / ".join(dict.fromkeys(kind(part) for part in arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("nothing" if part is type(None) else kind(part) for part in arguments)
    return {"str": "text", "int": "whole number", "float": "number", "bool": "yes/no"}[annotation.__name__]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = value.model_dump(exclude_defaults=True)
        return f"`{changed}`" if changed else "its defaults"
    shown = list(value) if isinstance(value, tuple) else value
    return "none" if value is None else f"`{shown}`"


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(render())
