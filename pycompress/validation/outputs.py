"""The outputs of the whole model: how they are collected and compared."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pycompress.calls import Inputs, call_model, evaluating, tensors_in
from pycompress.validation.report import ModelRecord

# A last-bit difference after gelu, silu or a float32 sum flips a rounding in a later layer, that flips more of them,
# and after a few layers the outputs differ by as much as compression itself cost. So no bound can be derived for the
# outputs; they are held against what the native model does to itself when the results of those layers move by
# PERTURBATION.
SMALLEST_COSINE = 0.999  # always good enough
SMALLEST_COSINE_OF_FILES = (
    1 - 1e-5
)  # where the rest of the model, which is no compressed layer, has to be right as well
PERTURBATION_FACTOR = 4.0  # on 1 - cosine
LOWEST_LIMIT = 0.9  # for what that would allow less, the outputs say nothing any more: no verdict


def outputs_of(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Runs the model, and leaves all as it was. Its floating-point outputs as float64 copies."""
    with evaluating(model, inputs):
        result = call_model(model, inputs)
        outputs = {
            path: tensor.detach().to("cpu", torch.float64, copy=True)
            for path, tensor in tensors_in(result)
            if tensor.is_floating_point()
        }
    if not outputs:
        kind = type(result).__name__
        raise TypeError(f"validate: the model returned {kind}, expected at least one floating-point tensor in it")
    return outputs


def compare_outputs(
    expected: dict[str, Tensor],
    actual: dict[str, Tensor],
    perturbed: dict[str, Tensor] | None,
    again: dict[str, Tensor] | None = None,
    smallest_cosine: float = SMALLEST_COSINE,
) -> ModelRecord:
    """perturbed: the outputs of the third run; None where the outputs must be equal. again: those of the last, native as the first
    was: where they are others, the model keeps something between runs, and nothing that differs tells of its layers."""
    reasons, undecided, max_difference, smallest, perturbed_smallest = [], [], 0.0, 1.0, 1.0
    for path, a in expected.items():
        b = actual.get(path)
        if b is None or a.shape != b.shape:
            shape = "absent" if b is None else list(b.shape)
            reasons.append(f"{path} is {list(a.shape)} with native layers, {shape} with ONNX Runtime's")
            continue
        difference, cosine = _largest_difference(a, b), _cosine(a, b)
        max_difference, smallest = max(max_difference, difference), min(smallest, cosine)
        if perturbed is None:
            if difference > 0:
                reasons.append(f"{path} differs by {difference:.3g}, expected 0")
            continue
        c = perturbed.get(path)
        own = _cosine(a, c) if c is not None and c.shape == a.shape else 0.0
        perturbed_smallest = min(perturbed_smallest, own)
        limit = min(smallest_cosine, 1 - PERTURBATION_FACTOR * (1 - own))
        if difference != np.inf and limit < LOWEST_LIMIT:
            undecided.append(
                f"{path} amplifies last bits: the native model moves to cosine {own:.6f} by itself, expected at least "
                f"{1 - (1 - LOWEST_LIMIT) / PERTURBATION_FACTOR:.6f}; ONNX Runtime's is {cosine:.6f}"
            )
        elif difference == np.inf or cosine < limit:
            reasons.append(f"{path} differs by {difference:.3g}, cosine {cosine:.6f}, expected at least {limit:.6f}")
    if again is not None and (found := _first_difference(expected, again)):
        undecided, reasons = [f"the model is not steady: run twice with the same inputs, {found}"], []
    return ModelRecord(
        tensors=len(expected),
        max_difference=max_difference,
        cosine=smallest,
        perturbed_cosine=None if perturbed is None else perturbed_smallest,
        status="undecided" if undecided else "diverged" if reasons else "ok",
        reason="\n".join([*undecided, *reasons]),
    )


def _first_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """What two runs do not agree in, or ''."""
    if a.keys() != b.keys():
        return f"it returns {', '.join(a)} and {', '.join(b)}"
    for path, one in a.items():
        if one.shape != b[path].shape:
            return f"{path} is {list(one.shape)} and {list(b[path].shape)}"
        if difference := _largest_difference(one, b[path]):
            return f"{path} differs by {difference:.3g}, cosine {_cosine(one, b[path]):.6f}"
    return ""


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Of two float64 tensors; Inf where one holds NaN or Inf and the other does not hold the same."""
    if a.numel() == 0:
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=torch.inf)).max())


def _cosine(a: Tensor, b: Tensor) -> float:
    """Of two float64 tensors, over the elements that are finite in both; 1 where these are equal."""
    finite = a.isfinite() & b.isfinite()
    a, b = a[finite], b[finite]
    if torch.equal(a, b):
        return 1.0
    return float(torch.dot(a, b) / (a.norm() * b.norm())) if a.any() and b.any() else 0.0
