"""Watching modules of a stock model while it runs, without changing it. Used by `routing` and `projections`."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def watched(watchers: Iterable[tuple[nn.Module, Callable[[Any], None]]]) -> Generator[None]:
    """Gives each module's output, of every forward pass inside the context, to the function beside it."""

    def hook(watch: Callable[[Any], None]) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: watch(output)

    handles = [module.register_forward_hook(hook(watch)) for module, watch in watchers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
