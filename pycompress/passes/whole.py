"""Parts of a model that run as one op each: transformer blocks, the embeddings in front of them, the means of sentence encoders
behind, and encoders that are made of nothing else; and convolutions that hand on bytes, and add what is added behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pycompress.nn.assigned import assign, assigned, restore
from pycompress.nn.trained import is_trained
from pycompress.passes import blocks, embeddings, encoders, handing, pooling


def check(blocks: bool, skip_padding: bool, caller: str) -> None:
    """Raises ValueError where padding is to be skipped, and nothing is there that could."""
    if skip_padding and not blocks:
        raise ValueError(f"{caller}: skip_padding=True and blocks=False, expected blocks: it is they that skip padding")


def install(model: nn.Module, *, skip_padding: bool = False) -> None:
    """Has what can be read run as one op, where it then gives what it gave before; but for padding, where blocks are to skip it."""
    blocks.install(model, skip_padding=skip_padding)
    embeddings.install(model)
    pooling.install(model)
    encoders.install(model)
    handing.install(model)


def remove(model: nn.Module) -> None:
    """Has everything run as it did before."""
    blocks.remove(model)
    for module in model.modules():
        if not is_trained(module):
            restore(module)


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """Within, every module is of its own class: for whoever reads the model, or copies it."""
    with blocks.without_blocks(model):
        before = {m: call for m in model.modules() if (call := assigned(m)) is not None and not is_trained(m)}
        for module in before:
            restore(module)
        try:
            yield
        finally:
            for module, call in before.items():
                assign(module, call)
