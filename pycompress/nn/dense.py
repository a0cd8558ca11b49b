"""The dense layers that a compressed one can replace: what their weight is, and where it is kept.

A layer that torch.nn.utils.prune has pruned keeps ``weight_orig`` and ``weight_mask``, and a hook sets ``weight`` to their product
before each call; what ``weight`` holds between two calls may be out of date.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from copy import copy

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from pycompress.methods.weight import ConvolutionMethod, Method
from pycompress.nn.geometry import Conv2dGeometry

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """A linear layer, as far as its class says."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_convolution(module: nn.Module) -> bool:
    """A convolution, as far as its class says. Of these, only a Conv2d can be compressed."""
    return isinstance(module, _CONVOLUTIONS)


def is_candidate(module: nn.Module) -> bool:
    """A layer of which a summary says what became of it."""
    return is_linear(module) or is_convolution(module)


def geometry_of(module: nn.Module) -> Conv2dGeometry | None:
    """Of a Conv2d; None for a linear layer. Raises ValueError for what no compressed convolution does."""
    if not isinstance(module, nn.Conv2d):
        return None
    if module.groups != 1:
        raise ValueError(f"groups is {module.groups}, expected 1: convolutions in groups have no kernel yet")
    if module.padding_mode != "zeros":
        raise ValueError(f"padding_mode is {module.padding_mode!r}, expected 'zeros'")
    _, in_channels, height, width = dense_shape(module)  # as torch computes: the attributes may be out of date
    padding = module.padding if isinstance(module.padding, str) else _pair(module.padding)
    return Conv2dGeometry(in_channels, (height, width), _pair(module.stride), padding, _pair(module.dilation))


def padding_idx_of(module: nn.Module) -> int | None:
    """Of an Embedding. Raises ValueError for what no compressed embedding does."""
    if not isinstance(module, nn.Embedding):
        return None
    if module.max_norm is not None:
        raise ValueError(
            f"max_norm is {module.max_norm}, expected None: it rescales the rows of its weight as they are used"
        )
    return module.padding_idx


def fitted(method: Method, module: nn.Module) -> Method:
    """The method for this layer: one that takes convolutions apart is told what theirs is."""
    geometry = geometry_of(module) if isinstance(method, ConvolutionMethod) else None
    if geometry is None or not isinstance(method, ConvolutionMethod):
        return method
    n, c, height, width = dense_shape(module)
    return method.for_convolution((n, c, height, width), geometry.stride)


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    height, width = sizes
    return int(height), int(width)


def pruned_names(module: nn.Module) -> set[str]:
    """The names of the tensors that torch.nn.utils.prune masks before each call of this module."""
    return {hook._tensor_name for hook in module._forward_pre_hooks.values() if isinstance(hook, BasePruningMethod)}


def has_foreign_hooks(module: nn.Module) -> bool:
    """Somebody else than torch.nn.utils.prune, pruning weight or bias, watches the calls or the gradients of this module."""
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    pruning = all(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())
    return not pruning or not pruned_names(module) <= {"weight", "bias"}


def weight_parameter(module: nn.Module) -> nn.Parameter | None:
    """The parameter that keeps the weight of a candidate; None where it is no parameter, but a buffer or computed."""
    return module._parameters.get("weight_orig" if "weight" in pruned_names(module) else "weight")


def stored_weight(module: nn.Module) -> Tensor:
    """The parameter (or buffer) of a candidate that keeps its weight: unmasked where pruned, [k, n] in a Conv1D.

    In a convolution it is [out_channels, in_channels, height, width].
    """
    weight = module.weight_orig if "weight" in pruned_names(module) else module.weight
    assert isinstance(weight, Tensor)
    return weight


def dense_shape(module: nn.Module) -> tuple[int, ...]:
    """(n, k) of a linear layer, of a convolution the shape of its weight."""
    shape = tuple(stored_weight(module).shape)
    return shape[::-1] if is_conv1d(module) else shape


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(n, k) of a candidate; k of a Conv2d is in_channels * height * width."""
    n, *rest = dense_shape(module)
    return n, math.prod(rest)


def _current(module: nn.Module, name: str) -> Tensor | None:
    if name not in pruned_names(module):
        tensor = getattr(module, name)
        assert tensor is None or isinstance(tensor, Tensor)
        return tensor
    stored, mask = getattr(module, f"{name}_orig"), getattr(module, f"{name}_mask")
    product: Tensor = stored.detach() * mask.to(stored.dtype)
    return product


def dense_weight(module: nn.Module) -> Tensor:
    """The [n, k] weight with which a candidate computes: the parameter itself (of a Conv2d a view where it is contiguous), or a
    masked copy of it where it is pruned."""
    weight = _current(module, "weight")
    assert weight is not None
    if is_convolution(module):
        return weight.reshape(weight_shape(module))
    return weight.T if is_conv1d(module) else weight


def dense_bias(module: nn.Module) -> Tensor | None:
    """The [n] bias with which a candidate computes, or None."""
    return None if isinstance(module, nn.Embedding) else _current(module, "bias")


def without_pruning(module: nn.Module) -> nn.Module:
    """A pruned candidate as ``torch.nn.utils.prune.remove`` would leave it, masked once and for all; others as they are."""
    names = pruned_names(module)
    if not names:
        return module
    plain = copy(module)
    plain._forward_pre_hooks = OrderedDict()
    plain._parameters, plain._buffers = dict(module._parameters), dict(module._buffers)
    for name in names:
        plain.__dict__.pop(name, None)
        del plain._parameters[f"{name}_orig"], plain._buffers[f"{name}_mask"]
        tensor = _current(module, name)
        assert tensor is not None
        plain._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return plain
