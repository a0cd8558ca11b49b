"""A layer into which a batch norm is folded.

In evaluation a norm multiplies each channel by a gain and adds a shift, which a weight and a bias can do as well.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, nn

from pycompress.kinds.pruned import pruned_names

LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_FOLDED = (
    "_pycompress_folded"  # of a layer: the names of the norms in it; of the Identity in a norm's place: its channels
)


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Gain and shift of a norm in evaluation, float64 [channels]."""
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, variance, weight, bias = (None if tensor is None else tensor.detach().double() for tensor in tensors)  # type: ignore[operator]
    assert mean is not None
    assert variance is not None
    gain = (variance + norm.eps).rsqrt()  # type: ignore[operator]
    gain = gain if weight is None else gain * weight
    shift = -mean * gain
    return gain, shift if bias is None else shift + bias


@torch.inference_mode(False)  # so that what is made can be trained
@torch.no_grad()
def folded(layer: nn.Module, norm: nn.Module, *, behind: bool = True) -> nn.Module:
    """A layer like this one that computes what it and a norm compute together. Both stay as they are.

    Args:
        layer: one of :data:`LAYERS`, not pruned.
        norm: one of :data:`NORMS` with running statistics, over the channels of the layer's results.
        behind: whether it takes the layer's results; else it gives its inputs, which may not be padded with zeros, and the layer is
            not transposed.
    """
    gain, shift = affine(norm)
    weight, bias = (None if one is None else one.detach().double() for one in (layer.weight, layer.bias))  # type: ignore[operator]
    assert weight is not None
    grouped = by_group(layer, weight)
    if behind:
        grouped = grouped * gain.view(len(grouped), -1, 1, 1)
        bias = shift if bias is None else bias * gain + shift
    else:
        gained = (grouped * shift.view(len(grouped), 1, -1, 1)).sum((2, 3)).flatten()
        grouped = grouped * gain.view(len(grouped), 1, -1, 1)
        bias = gained if bias is None else bias + gained
    fresh = copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # tables of parameters, hooks and so on, each with its own
            vars(fresh)[name] = copy(value)
    for name, tensor in (("weight", as_weight(layer, grouped)), ("bias", bias)):
        own = tensor.to(layer.weight.dtype)  # type: ignore[arg-type]
        fresh._parameters[name] = nn.Parameter(own.contiguous(), layer.weight.requires_grad)  # type: ignore[arg-type]
    return fresh


def channels_of(layer: nn.Module) -> tuple[int, int]:
    """Of the inputs and the results of a layer, as its weight has them."""
    first, second, *_ = getattr(layer, "weight_orig" if "weight" in pruned_names(layer) else "weight").shape
    groups: int = getattr(layer, "groups", 1)
    return (first, second * groups) if getattr(layer, "transposed", False) else (second * groups, first)


def by_group(layer: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as [groups, outputs of a group, inputs of a group, taps]."""
    groups = getattr(layer, "groups", 1)
    split = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return split.transpose(1, 2) if getattr(layer, "transposed", False) else split


def as_weight(layer: nn.Module, grouped: Tensor) -> Tensor:
    """The inverse of :func:`by_group`."""
    split = grouped.transpose(1, 2) if getattr(layer, "transposed", False) else grouped
    return split.reshape(layer.weight.shape)  # type: ignore[arg-type]


def items(layer: nn.Module, x: Tensor) -> Tensor:
    """An input of a layer, or a result, with its leading dimensions as one, as a norm takes them: [items, channels, ...]."""
    dims = layer.weight.dim() - 1  # type: ignore[operator]
    return x.reshape(-1, *x.shape[x.dim() - dims :])


# --- what tells them from others ------------------------------------------------------------------------------------------


def mark_folded(layer: nn.Module, norms: str) -> None:
    """Has a layer say that the norms of these names are folded in."""
    vars(layer)[_FOLDED] = norms


def folded_into(layer: nn.Module) -> str:
    """The names of the norms that are folded into a layer, or ''."""
    found = vars(layer).get(_FOLDED, "")
    return found if isinstance(found, str) else ""


def emptied(channels: int) -> nn.Identity:
    """What stands in the place of a norm that is folded into a layer."""
    place = nn.Identity()
    vars(place)[_FOLDED] = channels
    return place


def channels_emptied(module: nn.Module) -> int | None:
    """Of the norm whose place an Identity has; None for any other module."""
    found = vars(module).get(_FOLDED) if type(module) is nn.Identity else None
    return found if isinstance(found, int) else None
