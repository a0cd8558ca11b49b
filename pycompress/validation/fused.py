"""What a layer means in a file of the form ``fused``: products in floating point, of an input that is rounded where its range is
static."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear, pad

from pycompress import ops
from pycompress.nn.int8_conv import Int8Conv2d
from pycompress.nn.layer import CompressedLayer
from pycompress.validation import formulas
from pycompress.validation.checks import FloatCheck

FusedCheck = partial(FloatCheck, formula=formulas.numpy_fused)


def differs(layer: CompressedLayer) -> bool:
    """Whether a layer computes something else in such a file than by itself: it quantizes its input, or what is inside it does,
    and that form has a lowering of its own for it."""
    from pycompress.onnx import FUSED

    inside = layer.settings.get("residual", {})
    quantizes = any(settings.get("activation_bits") in (7, 8) for settings in (layer.settings, inside))
    return quantizes and (layer.kind.name, layer.weight_type.name) in FUSED


def as_fused(layer: CompressedLayer, _native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A forward that does what the file says, by torch."""
    weight = layer.canonical()
    chains = [[torch.from_numpy(matrix).float() for matrix in chain] for chain in formulas.fused_chains(weight)]

    def forward(input: Tensor) -> Tensor:  # noqa: A002 - the name that the layers give it
        x = torch.from_numpy(formulas.in_static_range(formulas.float32(input), weight))
        parts = []
        for chain in chains:
            v = x
            for matrix in chain:
                v = _convolved(layer, v, matrix) if isinstance(layer, Int8Conv2d) else linear(v, matrix)
            parts.append(v)
        y = sum(parts[1:], parts[0])
        if layer.bias32 is not None:
            y = y + layer.bias32.cpu().view(-1, *[1] * (layer.kind.dims - 1))
        return ops.DIFFERENTIABLE[layer.activation](y).to(input.device, input.dtype)

    return forward


def _convolved(layer: Int8Conv2d, x: Tensor, matrix: Tensor) -> Tensor:
    geometry = layer.geometry
    size, stride, (top, bottom, left, right), dilation = geometry.plane
    wide = pad(geometry.as_image(geometry.filled(x)), (left, right, top, bottom))
    kernels = matrix.view(layer.n, -1, *size)
    return geometry.from_image(conv2d(wide, kernels, None, stride, 0, dilation, geometry.groups))
