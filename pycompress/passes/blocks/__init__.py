"""Transformer blocks that run as one op: found by their classes, read, and tried beside the original before they are put in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from pycompress.nn import CompressedLayer
from pycompress.nn.block import LEFT, Block, Unfit, become_block, become_original, block_of, classes_of
from pycompress.passes.blocks.albert import ALBERT
from pycompress.passes.blocks.bert import BERT
from pycompress.passes.blocks.clip import CLIP
from pycompress.passes.blocks.distilbert import DISTILBERT
from pycompress.passes.blocks.encoder_layer import ENCODER_LAYER
from pycompress.passes.blocks.mpnet import MPNET
from pycompress.passes.blocks.reading import Family, class_name
from pycompress.passes.blocks.t5 import T5
from pycompress.passes.blocks.trial import tried
from pycompress.passes.blocks.vit import VIT
from pycompress.passes.blocks.whisper import WHISPER

FAMILIES = [
    ENCODER_LAYER,
    BERT,
    DISTILBERT,
    MPNET,
    ALBERT,
    VIT,
    CLIP,
    WHISPER,
    T5,
]  # open: what is listed here is found

__all__ = ["FAMILIES", "Family", "blocks_of", "find", "install", "remove", "without_blocks"]


def find(model: nn.Module) -> dict[nn.Module, Family]:
    """The modules that may run as one op, by their classes, with a compressed layer inside."""
    families = {name: family for family in FAMILIES for name in family.classes}
    return {
        module: family
        for module in model.modules()
        if (family := families.get(class_name(module))) is not None
        and any(isinstance(inner, CompressedLayer) for inner in module.modules())
    }


def install(model: nn.Module, *, skip_padding: bool = False) -> None:
    """Has every block run as one op that can be read, and that computes what it did; the others keep a text that says why not.

    Args:
        skip_padding: afterwards, have them leave out what the mask hides as keys.
    """
    for module, family in find(model).items():
        vars(module).pop(LEFT, None)
        become_original(module)
        try:
            description = tried(module, family.read(module), family.calls)
        except Unfit as unfit:
            vars(module)[LEFT] = str(unfit)
        else:
            own = replace(description, read=family.read, classes=classes_of(module), skip_padding=skip_padding)
            become_block(module, own)


def blocks_of(model: nn.Module) -> dict[nn.Module, Block]:
    """The blocks of a model that run as one op."""
    return {module: block for module in model.modules() if (block := block_of(module)) is not None}


def remove(model: nn.Module) -> None:
    """Has every block run as it did before."""
    for module in model.modules():
        vars(module).pop(LEFT, None)
        if block_of(module) is not None:
            become_original(module)


@contextmanager
def without_blocks(model: nn.Module) -> Iterator[None]:
    """Within, every module is of its own class: for whoever reads the model, or copies it."""
    before = blocks_of(model)
    left = {module: vars(module).pop(LEFT) for module in model.modules() if LEFT in vars(module)}
    for module in before:
        become_original(module)
    try:
        yield
    finally:
        for module, block in before.items():
            become_block(module, block.description)
        for module, reason in left.items():
            vars(module)[LEFT] = reason
