"""What every op promises of its results, on the native kernels, on the scalar ones and on the numba twin."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from packing import backend, backends  # noqa: F401
from torch import Tensor

from contract.bounds import clipped
from contract.packed import (
    CASES,
    EPS,
    FLOATS,
    FURTHER,
    RANKS,
    Case,
    K,
    everywhere,
    gamma,
    gathered,
    ideal,
    over,
    quantizes,
    quantizes_some,
)
from pycompress import ops
from pycompress.weights import LowRankWeight, Weight

Same = Callable[[Tensor, Tensor], bool]
Sample = Callable[[Sequence[Any], int], Sequence[Any]]
Change = Callable[[Tensor], Tensor]

ACTIVATION = pytest.mark.parametrize("activation", ops.ACTIVATIONS)


def check_alike(case: Case, w: Weight, x: Tensor, y: Tensor, other: Tensor, bias: Tensor, what: object = None) -> None:
    """Two results of the same rows x [..., k]: of the same bits; of sums in floating point, whose order may differ, close."""
    if quantizes(w):
        assert torch.equal(y.view(torch.uint8), other.view(torch.uint8)), what
        return
    size = x.double().abs() @ ideal(w)[1].T + bias.double().abs()
    slack = gamma(6 * w.shape[1] + 16) * size + torch.finfo(y.dtype).eps * y.double().abs() + 1e-38
    assert ((y.double() - other.double()).abs() <= slack).all(), what


# --- pack and unpack ----------------------------------------------------------------------------------------------------

# Around the kernels' tiles and blocks. A low-rank weight has the sizes that its ranks are said of.
SHAPES: dict[str, list[tuple[int, int]]] = {
    "int4": list(itertools.product([1, 15, 16, 17, 35], [1, 31, 32, 33, 65, 127, 128, 129, 1023, 1024, 1025, 2051])),
    "sparse": list(itertools.product([1, 3, 7, 8, 9, 16, 17, 35], [1, 3, 4, 8, 15, 33, 64, 131])),
    "low_rank": list(RANKS),
}


def written(case: Case, w: Any) -> str:
    """The form, without what says how a residual lies, as far as it is the same on every machine."""
    sizes, bits = "n={} k={}".format(*w.shape), getattr(w, "activation_bits", None) or 0
    if case.name == "int8":
        return f"weight_only {sizes} activation_bits=16" if bits == 16 else ""
    if case.name == "int4":
        return f"groups {sizes} group={w.group} symmetric={int(w.symmetric)} activation_bits={bits}"
    if case.name == "sparse":
        return f"{case.layout} {sizes} nnz={len(w.values)} bits={w.bits} activation_bits={bits}"
    if case.name == "low_rank":
        beside = "" if w.residual is None else f" residual={w.residual.name}"
        return f"factors {sizes} rank={w.rank} bits={w.bits} activation_bits={bits}{beside}"
    return ""


@pytest.mark.usefixtures("backend")
@over([*CASES, *FURTHER])
def test_unpack_is_the_inverse_of_pack(case: Case, same: Same, sample: Sample) -> None:
    shapes = SHAPES.get(case.name, list(itertools.product([1, 16, 17, 35], [1, 31, 33, 130])))
    for n, k in sample(shapes, 8):
        w = case.weight(n, k)
        packed, form = case.pack(w)
        assert packed.dtype == torch.uint8 and packed.dim() == 1
        own, _, beside = form.partition(" + ")
        assert own == (written(case, w) or own)
        assert str(ops.parse(form)) == form and (ops.parse(form).n, ops.parse(form).k) == (n, k)
        assert (f"n={n} k={k}" in beside) if "residual" in own else not beside
        found = ops.unpack(case.name, packed, form)
        assert list(found) == list(case.op.sizes(ops.parse(form))) and found.keys() == w.parts().keys()
        for name, part in w.parts().items():
            assert same(found[name], part), (n, k, name)
        dense, (exact, size) = ops.dense(case.name, packed, form), ideal(w)
        assert dense.shape == (n, k) and dense.dtype == torch.float32
        if isinstance(w, LowRankWeight):
            assert ((dense - exact).abs() <= gamma(w.rank + 4) * size).all()
        else:
            assert same(dense, w.decompress())


@everywhere
def test_parts_that_are_not_contiguous(case: Case) -> None:
    w = case.weight(20, 30)
    expected = case.pack(w)
    turned = {name: part.T.contiguous().T if part.dim() == 2 else part for name, part in w.parts().items()}
    spread = {  # every second element, between others that are junk
        name: torch.stack([part, torch.zeros_like(part)], -1).flatten(-2)[..., ::2] for name, part in w.parts().items()
    }
    assert not any(part.is_contiguous() for part in spread.values() if part.numel() > 1)
    for parts in (turned, spread):
        packed, form = case.pack(w, **parts)
        assert torch.equal(packed, expected[0]) and form == expected[1]


# --- shapes and strides -------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", FLOATS)
def test_leading_dimensions(case: Case, dtype: torch.dtype, same: Same) -> None:
    w, bias = case.weight(24, 20), torch.randn(24)
    linear, packed = case.op.linear, case.pack(w)
    for lead in [(), (1,), (5,), (2, 3), (1, 1, 1, 4), (2, 0, 3), (0,), (70, 3)]:
        x = torch.randn(*lead, 20).to(dtype)
        y = linear(x, *packed, bias)
        assert y.shape == (*lead, 24) and y.dtype == dtype and y.is_contiguous()
        rows, results = x.reshape(-1, 20), y.reshape(-1, 24)
        assert same(results, linear(rows, *packed, bias))
        for row, out in itertools.islice(zip(rows, results, strict=True), 8):
            check_alike(case, w, row, out, linear(row, *packed, bias), bias, "a row does not depend on those beside it")


STRIDED: dict[str, Change] = {
    "transposed": lambda x: x.T.contiguous().T,
    "left half of wider rows": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]],
    "right half of wider rows": lambda x: torch.cat([torch.full_like(x, torch.nan), x], 1)[:, x.shape[1] :],
    "every second row": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2],
    "every second column": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 2).flatten(1)[:, ::2],
    "odd offset": lambda x: torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view_as(x),
    "one row repeated": lambda x: x[:1].expand(x.shape),
    "one value repeated": lambda x: x[:1, :1].expand(x.shape),
    "overlapping rows": lambda x: x.flatten().as_strided(x.shape, (1, 1)),
    "three dimensions": lambda x: x.view(x.shape[0], 1, -1).expand(-1, 3, -1).permute(1, 0, 2),
    "permuted": lambda x: x.view(3, 4, -1).permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "negated": torch._neg_view,
    "the imaginary part of a conjugate": lambda x: torch.view_as_complex(torch.stack([x, x], -1).float()).conj().imag,
}


@everywhere
@pytest.mark.parametrize("strides", STRIDED)
def test_strides(strides: str, case: Case, same: Same) -> None:
    for k in (K, 1, 3):
        w = case.weight(40, k)
        (packed, form), bias = case.pack(w), torch.randn(40)
        for dtype in FLOATS:
            x = STRIDED[strides](torch.randn(12, k).to(dtype))
            dense = x.resolve_neg().clone(memory_format=torch.contiguous_format)
            before, y = dense.clone(), case.op.linear(x, packed, form, bias)
            if case.in_torch:
                check_alike(case, w, dense, y, case.op.linear(dense, packed, form, bias), bias)
            else:
                assert same(y, case.op.linear(dense, packed, form, bias))
            assert same(x.resolve_neg(), before), "the op does not write to its input"
            for name, function in case.others(form).items() if x.dim() == 2 else ():
                results = (gathered(function(one, packed, form)) for one in (x, dense))
                assert all(itertools.starmap(same, zip(*results, strict=True))), name


# --- numbers ------------------------------------------------------------------------------------------------------------

SMOOTH: dict[str, Change] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
}


@everywhere
def test_close_to_the_float_product(case: Case) -> None:
    """With activations quantized once, each is off by half a step, by one where the zero point is rounded the other way."""
    w, x, bias = case.weight(64, 256), torch.randn(32, 256), torch.randn(64)
    matrix, size = ideal(w)
    exact = clipped(w, x) @ matrix.T + bias.double()
    step = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)).double() / 127
    bound = gamma(2 * 256 + 16) * (x.double().abs() @ size.T + bias.abs()) + 1e-6 * exact.abs()
    if quantizes_some(w):
        bound += step[:, None] / (2 if getattr(w, "activation_bits", 7) == 8 else 1) * size.sum(1) + 1e-4
    if case.name != "low_rank" or not quantizes_some(w):  # those quantize twice; their own tests have the formula
        assert ((case.op.linear(x, *case.pack(w), bias) - exact).abs() <= bound).all()


@everywhere
@ACTIVATION
def test_activations_and_half_precision(case: Case, activation: str, same: Same) -> None:
    """Smooth ones within 8 ulp of their argument (test_int8_ops), others as torch; half precision is that, rounded."""
    linear, (packed, form, bias) = case.op.linear, case.made(45, 50)
    for m in (1, 4, 7, 13):
        x = torch.randn(m, 50) * torch.logspace(-5, 4, m)[:, None]
        v, y = linear(x, packed, form, bias), linear(x, packed, form, bias, activation)
        if activation in SMOOTH:
            v = v.double()
            assert ((y - SMOOTH[activation](v)).abs() <= 8 * EPS * v.abs() + 1e-44).all()
        else:
            assert same(y, ops.DIFFERENTIABLE[activation](v))
        for dtype in (torch.bfloat16, torch.float16):
            half = x.to(dtype)
            expected = linear(half.float(), packed, form, bias, activation).to(dtype)
            assert same(linear(half, packed, form, bias, activation), expected)


@everywhere
@ACTIVATION
def test_a_row_with_nan_or_inf_touches_no_other(case: Case, activation: str, same: Same) -> None:
    w, bias = case.weight(37, 70), torch.randn(37)
    linear, packed, whole = case.op.linear, case.pack(w), quantizes_some(w)
    bad = {0: 0, 2: 67, 4: 35, 5: 69, 10: 64}  # row: position; 64 to 69 are the tail of the vector loops
    for m, dtype, turn in itertools.product((1, 3, 4, 6, 11, 20), FLOATS, range(3)):
        good = torch.randn(m, 70).to(dtype)
        x, rows = good.clone(), [row for row in bad if row < m]
        for i, row in enumerate(rows, turn):
            x[row, bad[row]] = (math.nan, math.inf, -math.inf)[i % 3]
        y, others = linear(x, *packed, bias, activation), [row for row in range(m) if row not in bad]
        assert same(y[others], linear(good, *packed, bias, activation)[others]), (m, dtype)
        if whole:
            assert y[rows].isnan().all(), (m, dtype)
        elif activation == "none":  # it shows where a weight meets it: of a sparse one where it is not zero
            touched = w.decompress()[:, [bad[row] for row in rows]].T != 0
            assert not y[rows][touched | (case.name != "sparse")].isfinite().any(), (m, dtype)


@over([case for case in CASES if not case.in_torch])
def test_every_thread_count_gives_the_same_bits(case: Case, sample: Sample, same: Same) -> None:
    n, k = (200, 1300) if case.name in {"int8", "int4"} else (200, 300)
    w, bias, before = case.weight(n, k), torch.randn(n), torch.get_num_threads()

    def run(threads: int, rows: Sequence[int]) -> list[Tensor]:
        torch.set_num_threads(threads)
        packed, _ = made = case.pack(w)
        return [packed, *(case.op.linear(inputs[m], *made, bias) for m in rows)]

    inputs = {m: torch.randn(m, k) for m in (1, 130, 2, 4, 5, 7, 64)}
    try:
        for name in sample(case.backends, 2):
            with backends(name):
                rows = list(inputs) if name == "native" else sample(list(inputs), 3)
                expected = run(1, rows)
                for threads in (2, 3, 5) if name == "native" else sample((2, 3, 5), 2):
                    assert all(itertools.starmap(same, zip(run(threads, rows), expected, strict=True))), (name, threads)
    finally:
        torch.set_num_threads(before)
