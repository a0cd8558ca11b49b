"""Layers that passes change: what stands against it, and how a changed one is compared with what it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycompress.kinds import alteration, has_foreign_hooks, replaced_code, without_pruning
from pycompress.kinds.folded import LAYERS, NORMS, channels_of
from pycompress.surgery import held_elsewhere, shared_parameters

_OF_A_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


class Obstacles:
    """Why a norm or a layer has to stay as it is, apart from what stands beside it; '' where nothing is against it."""

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self._model = model
        self._held = held_elsewhere(model, modules)
        self._shared = shared_parameters(model)

    def of_norm(self, norm: Any) -> str:
        """Of a batch norm."""
        if type(norm) not in NORMS:
            return f"{type(norm).__name__} is a subclass of a norm, which may do something else"
        if norm.training or self._model.training:
            return "it is in training mode, where norms use the statistics of each batch: model.eval() before"
        if norm.running_mean is None or norm.running_var is None:
            return "it keeps no running statistics"
        if has_foreign_hooks(norm):
            return "it has hooks, which would be lost"
        if others := {*norm._parameters, *norm._buffers} - _OF_A_NORM:
            return f"it has a {min(others)} besides, which would be lost"
        return replaced_code(norm) or self._of_tensors(norm) or self._of_place(norm)

    def of_layer(self, layer: nn.Module, *, pruned: bool = False) -> str:
        """Of what stands beside; ``pruned``: whether torch.nn.utils.prune may have masked it."""
        if type(layer) not in LAYERS:
            return f"{type(layer).__name__} is no layer that is known here"
        if not pruned and without_pruning(layer) is not layer:
            return "the layer is pruned by torch.nn.utils.prune, expected prune.remove() before"
        if reason := alteration(layer):
            return f"of the layer: {reason}"
        if any(id(one) in self._shared for one in layer.parameters()):
            return "the layer shares its weight or bias with another one"
        return self._of_tensors(layer) or self._of_place(layer)

    def _of_tensors(self, module: nn.Module) -> str:
        for tensor in (*module.parameters(), *module.buffers()):
            if is_lazy(tensor) or tensor.is_meta:
                return "it has tensors without numbers"
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_complex():
                return f"it has no plain tensor: a {type(tensor).__name__}, {tensor.dtype}, {tensor.layout}"
        return ""

    def _of_place(self, module: nn.Module) -> str:
        if module is self._model:
            return "it is the model itself"
        return f"{self._held[module][0]} holds it, where it cannot be replaced" if module in self._held else ""


# --- compared -------------------------------------------------------------------------------------------------------------


def random_input(layer: Any) -> Tensor:
    """An input of a layer, float64, with two positions in each direction where nothing is padded."""
    weight = layer.weight
    if type(layer) is nn.Linear:
        shape = [4, weight.shape[1]]
    else:
        sizes = zip(layer.dilation, weight.shape[2:], layer.stride, strict=True)
        reach = [3 if layer.transposed else dilation * (size - 1) + 1 + stride for dilation, size, stride in sizes]
        pad = max(layer._reversed_padding_repeated_twice)  # less than an input that is padded with itself
        shape = [2, channels_of(layer)[0], *(size + pad for size in reach)]
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(weight.device)


def rounding(weight: Tensor, largest: Tensor, x: Tensor) -> Tensor:
    """By how much the results of a layer may be off in float64 whose numbers were rounded once: ``eps * (|W| |x| + |b|)``.

    Args:
        weight: of the layer, in the dtype to which it was rounded.
        largest: the results with magnitudes in place of all numbers that the layer's are made of, and of its input x.
    """
    limits, terms = torch.finfo(weight.dtype), weight.numel()
    lost = limits.smallest_normal * limits.eps  # what a number loses that is too small for the dtype
    return (limits.eps + terms * torch.finfo(torch.float64).eps) * largest + terms * lost * float(x.abs().amax())
