"""The zeros that a padding module puts around images go into the own padding of the convolution behind it.

Networks that come from TensorFlow have such modules: its "same" pads one more behind than before, which ``nn.Conv2d`` cannot say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from pycompress.calls import Inputs
from pycompress.kinds import has_foreign_hooks, replaced_code, zeros_around
from pycompress.nn.layers import layer_for
from pycompress.passes.activations import read_pairs
from pycompress.passes.edit import TakePadding
from pycompress.plan import Target


def take_in(model: nn.Module, targets: Sequence[Target], _: Inputs | None = None) -> list[TakePadding]:
    """A padding module that gives a convolution its input, wherever either is used, leaves its place; the compressed convolution
    pads. With what is read and left out as :func:`activations.take_over` has it."""
    layers = {target.module: target for target in targets if target.kind.pads}
    parents = [
        module
        for module in model.modules()
        if any(child in layers for child in module.children()) and any(map(zeros_around, module.children()))
    ]
    return [
        TakePadding(layers[layer], pad)
        for pad, layer in read_pairs(model, parents)
        if layer in layers and _fits(layers[layer], pad) and not has_foreign_hooks(pad) and not replaced_code(pad)
    ]


def _fits(target: Target, pad: nn.Module) -> bool:
    """Whether the compressed layer can have these zeros around its input."""
    sides = zeros_around(pad)
    if not sides or target.method is None:
        return False
    layer = layer_for(target.kind, target.method.name)
    try:
        geometry = replace(target.kind.geometry(target.module), around=sides)
    except ValueError:
        return False
    return layer is not None and not layer.misfit(geometry)
