"""How far a layer may lie from what its weight says in exact numbers: by rounding, and by a step of what it quantizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from contract.cases import Case
from pycompress.weights import LowRankConv2dWeight, LowRankWeight, Weight
from pycompress.weights.low_rank_conv import composed

EPS = 2.0**-23


def step(rows: Tensor, bits: int | None) -> Tensor:
    """By how much a quantized row may lie beside itself: half of it by rounding, half by the zero point. float64 [m, 1]."""
    if bits not in (7, 8):
        return torch.zeros(len(rows), 1, dtype=torch.float64)
    span = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
    return (span / (2**bits - 1)).double()[:, None]


def clipped(weight: Weight, rows: Tensor) -> Tensor:
    """The rows within the range of a static weight: float64 [m, k]."""
    found = getattr(weight, "input_range", None)
    if found is None:
        return rows.double()
    (scale, zero_point), top = found, 2 ** weight.settings()["activation_bits"] - 1
    return rows.double().clamp(-scale * zero_point, scale * (top - zero_point))


def slack(weight: Weight, rows: Tensor) -> Tensor:
    """How far ``rows W^T`` may lie from what it is in exact numbers: float64 [m, n]."""
    size, bits = rows.double().abs(), weight.settings().get("activation_bits")
    if isinstance(weight, LowRankConv2dWeight):
        paths = composed(tuple(factor.double().abs() for factor in weight.factors())).flatten(1)
        return EPS * (sum(factor[0].numel() for factor in weight.factors()) + 3) * (size @ paths.T)
    if isinstance(weight, LowRankWeight):
        down, up = (factor.double() for factor in weight.factors())
        first = step(rows, bits) * down.abs().sum(1)
        second = step((rows.double() @ down.T), bits) + (2 * first.amax(1, keepdim=True) if bits else 0)
        found = first @ up.abs().T + second * up.abs().sum(1)
        found += EPS * (len(down.T) + len(down) + 8) * (size @ down.abs().T @ up.abs().T)
        return found if weight.residual is None else found + slack(weight.residual, rows)
    values = weight.decompress().double().abs()
    count = values.count_nonzero(1).double() + 8
    found = getattr(weight, "input_range", None)
    steps = step(rows, bits) if found is None else torch.tensor(found[0], dtype=torch.float64)
    return EPS * count * (size @ values.T) + steps * values.sum(1)


def within(case: Case, layer: Any, x: Tensor, y: Tensor) -> bool:
    """Whether a layer without an activation, or with GELU, computes what its weight says."""
    weight, rows = layer.canonical(), case.kind.rows(case.kind.items(x), layer.geometry)
    if case.kind.tokens and not isinstance(weight, LowRankWeight):
        exact = weight.decompress().double()[rows]
        bound = torch.zeros_like(exact)
    elif case.kind.tokens:
        down, up = (factor.double() for factor in weight.factors())
        exact = (up @ down)[rows]
        bound = EPS * (len(down) + 2) * (up.abs() @ down.abs())[rows]
    else:
        exact, bound = clipped(weight, rows) @ weight.decompress().double().T, slack(weight, rows)
        if case.kind.dims > 1:  # not the rows are quantized, but what lies together in an item
            items = case.kind.quantized_together(case.kind.items(x))
            own = step(items, weight.settings().get("activation_bits")).repeat_interleave(
                len(rows) // max(1, len(items)), 0
            )
            bound = bound + own * weight.decompress().double().abs().sum(1)
    if layer.bias is not None:
        exact, bound = exact + layer.bias.double(), bound + EPS * layer.bias.double().abs()
    bound += EPS * exact.abs() + 2.0**-126
    if layer.activation == "gelu":  # its slope is at most 1.13
        exact, bound = gelu(exact), 1.13 * bound + 4 * EPS * exact.abs()
    return bool(((case.kind.results(y).double() - exact).abs() <= bound).all())
