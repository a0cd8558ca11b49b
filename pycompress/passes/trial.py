"""Edits tried out on example inputs, with dense weights: the model has to compute what it did before."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pycompress.calls import Inputs, call_model, evaluating
from pycompress.references import tensors_in
from pycompress.surgery import Swap

_ROUNDING = 1e-4  # of the largest number of an output
ChangeT = TypeVar("ChangeT", bound="Change")
Outputs = list[list[Tensor]]  # of one call without gradients and one with


class Change(Protocol):
    """What can be tried: an :class:`~pycompress.passes.edit.Edit`, or another frozen dataclass.

    Attributes:
        emptied: the module that does nothing where it stands then; None where there is none.
        reason: why it is not to be, or ''; ``done``: what that reason says was done.
    """

    @property
    def emptied(self) -> nn.Module | None: ...

    @property
    def reason(self) -> str: ...

    @property
    def done(self) -> str: ...

    def hooks(self) -> list[RemovableHandle]:
        """Has layers do in their calls what the change is."""
        ...


def tried(model: nn.Module, edits: Sequence[ChangeT], inputs: Inputs | None) -> list[ChangeT]:
    """The edits; those after which the model does not compute on ``inputs``, in evaluation, with and without gradients, what it did
    before, have the reason to be left out. Without inputs none has."""
    left = [edit for edit in edits if edit.reason]
    wanted = [edit for edit in edits if not edit.reason]
    if inputs is None or not wanted:
        return [*edits]
    before = _outputs(model, inputs, [])
    if not _alike(before, _outputs(model, inputs, [])):
        return left + _without(
            wanted, "two equal calls of the model give different outputs: that it can be {} was not checked"
        )
    if _agree(model, wanted, inputs, before):
        return [*edits]
    alone = [edit for edit in wanted if _agree(model, [edit], inputs, before)]
    reason = "with it {}, the model computes something else on example_inputs"
    others = left + _without([edit for edit in wanted if edit not in alone], reason)
    return others + (alone if _agree(model, alone, inputs, before) else _without(alone, reason))


def _without(edits: Sequence[ChangeT], reason: str) -> list[ChangeT]:
    return [replace(edit, reason=reason.format(edit.done)) for edit in edits]  # type: ignore[type-var]


def _agree(model: nn.Module, edits: Sequence[Change], inputs: Inputs, before: Outputs) -> bool:
    try:
        return _alike(before, _outputs(model, inputs, edits))
    except Exception:  # something looks at what was changed
        return False


def _outputs(model: nn.Module, inputs: Inputs, edits: Sequence[Change]) -> Outputs:
    """What the model computes where the layers do themselves what the emptied modules do, and these do nothing where they stand."""
    outputs = []
    with ExitStack() as stack:
        change = Swap(model, {edit.emptied: nn.Identity() for edit in edits if edit.emptied is not None})
        change.do()
        stack.callback(change.undo)
        for edit in edits:  # whose hooks hold what was emptied, and so come after it
            for hook in edit.hooks():
                stack.callback(hook.remove)
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
