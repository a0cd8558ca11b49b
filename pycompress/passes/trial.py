"""Edits tried out on example inputs, with dense weights: the model has to compute what it did before."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calls import Inputs, call_model, evaluating
from pycompress.passes.edit import Edit
from pycompress.references import tensors_in
from pycompress.surgery import Swap

_ROUNDING = 1e-4  # of the largest number of an output
Outputs = list[list[Tensor]]  # of one call without gradients and one with


def agreeing(model: nn.Module, edits: Sequence[Edit], inputs: Inputs) -> list[Edit]:
    """Those edits after which the model computes on ``inputs``, in evaluation, with and without gradients, what it did before. The
    records of the others say why they are left out."""
    before = _outputs(model, inputs, [])
    if not _alike(before, _outputs(model, inputs, [])):
        return _without(
            edits, "two equal calls of the model give different outputs, so that fusing could not be checked"
        )
    if _agree(model, edits, inputs, before):
        return list(edits)
    alone = [edit for edit in edits if _agree(model, [edit], inputs, before)]
    reason = "with it fused, the model computes something else on example_inputs"
    _without([edit for edit in edits if edit not in alone], reason)
    return alone if _agree(model, alone, inputs, before) else _without(alone, reason)


def _without(edits: Sequence[Edit], reason: str) -> list[Edit]:
    for edit in edits:
        edit.target.record.note = f"{edit.activation} stays beside it: {reason}"
    return []


def _agree(model: nn.Module, edits: Sequence[Edit], inputs: Inputs, before: Outputs) -> bool:
    try:
        return _alike(before, _outputs(model, inputs, edits))
    except Exception:  # something looks at what was changed
        return False


def _outputs(model: nn.Module, inputs: Inputs, edits: Sequence[Edit]) -> Outputs:
    """What the model computes where the layers apply the activations themselves, and these do nothing where they stand."""
    outputs = []
    with ExitStack() as stack:
        activations = {edit.target.module: edit.emptied for edit in edits if edit.emptied is not None}
        change = Swap(model, {activation: nn.Identity() for activation in activations.values()})
        change.do()
        stack.callback(change.undo)
        for layer, activation in activations.items():
            stack.callback(layer.register_forward_hook(partial(_activated, activation)).remove)
        for gradients in (False, True):
            with evaluating(model, inputs), torch.set_grad_enabled(gradients):
                try:
                    found = call_model(model, inputs)
                except Exception:
                    if not gradients:
                        raise
                    continue  # it is not made to be called so
                outputs.append([tensor.detach().clone() for tensor in tensors_in(found)])
    return outputs


def _activated(activation: nn.Module, _: nn.Module, __: Any, y: Tensor) -> Any:
    return type(activation).forward(activation, y)


def _alike(a: Outputs, b: Outputs) -> bool:
    return [len(one) for one in a] == [len(one) for one in b] and all(
        _are_close(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


def _are_close(x: Tensor, y: Tensor) -> bool:
    if (x.shape, x.dtype, x.layout) != (y.shape, y.dtype, y.layout):
        return False
    if not x.is_floating_point():
        return torch.equal(x, y)
    size = x.abs().nan_to_num(posinf=0).amax() if x.numel() else 0.0
    return torch.allclose(x.double(), y.double(), rtol=0, atol=_ROUNDING * float(size), equal_nan=True)
