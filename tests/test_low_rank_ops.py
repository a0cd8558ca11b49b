"""The low-rank ops, on the native kernels and on their twin: against float64, and against two int8 linears.

What every op promises is in contract/test_ops.py; there a weight is made, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from contract.packed import CASES, EPS, FLOATS, RANKS, RESIDUALS, Case, gamma, ideal, low_rank, over, quantizes
from packing import Packed, backend, integers, pack_low_rank  # noqa: F401
from torch import Tensor

from pycompress import ops, reference
from pycompress.ops.form import written
from pycompress.ops.registry import define
from pycompress.weights import DenseWeight, Int4Weight, Int8Weight, LowRankWeight, SparseWeight

pytestmark = pytest.mark.usefixtures("backend")
Same = Callable[[Tensor, Tensor], bool]
EVERY = over([case for case in CASES if case.name == "low_rank"])
SIZES = [size for size in RANKS if size[0] < 200]
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 13, 64, 130]


def case_of(bits: int, residual: str = "", activation_bits: int = 7) -> Case:
    layout = residual if residual in ops.SPARSE_FORMATS else ""
    return Case("low_rank", residual, lambda n, k: low_rank(n, k, bits, residual, activation_bits), layout)


def int8_part(x: Tensor, w: LowRankWeight, bias: Tensor | None) -> Tensor:
    """The low-rank part of int8 factors, to the bit: two linears of the int8 formula."""
    rows, linear, bits = x.float().contiguous().numpy(), reference.int8.linear, w.activation_bits
    assert w.down_scale is not None and w.up_scale is not None
    t = linear(rows, w.down.numpy(), w.down_scale.numpy(), activation_bits=bits)
    offset = None if bias is None else bias.numpy()
    return torch.from_numpy(linear(t, w.up.numpy(), w.up_scale.numpy(), offset, activation_bits=bits))


def integer_residual(x: Tensor, w: Any) -> Tensor:
    """What an int8 or int4 residual adds, to the bit."""
    rows = x.float().contiguous().numpy()
    if isinstance(w, Int4Weight):
        steps = w.scale.float().numpy(), w.zero_points().numpy()
        return torch.from_numpy(reference.int4.linear(rows, w.integers().numpy(), *steps, w.group))
    values = w.values if isinstance(w, Int8Weight) else integers(w)
    return torch.from_numpy(
        reference.int8.linear(rows, values.numpy(), w.scale.numpy(), activation_bits=w.activation_bits)
    )


def check_result(y: Tensor, x: Tensor, w: LowRankWeight, bias: Tensor | None, message: object = None) -> None:
    """y, float32 without activation, is what the contract says.

    A product of float32 factors meets at most k roundings by 1 + u in t, then r, then one for each product of a float32 residual
    and two more where partial sums are joined; the bias meets those behind t. Subnormal results are off by 2^-150 each.
    """
    k, beside = w.shape[1], w.residual
    whole = beside is not None and quantizes(beside)
    if w.bits == 8:
        low = int8_part(x, w, bias)
        if beside is None or whole:
            assert torch.equal(y, low if beside is None else integer_residual(x, beside) + low), message
            return
        matrix, size = ideal(beside)
        bound = gamma(k + 4) * (x.double().abs() @ size.T + low.abs()) + k * 2.0**-149
        assert ((y - (x.double() @ matrix.T + low)).abs() <= bound).all(), message
        return
    matrix, size = ideal(replace(w, residual=None) if whole else w)
    start = torch.zeros(1, dtype=torch.float64) if bias is None else bias.double()
    exact, steps = x.double() @ matrix.T + start, k + w.rank + 4 + (k if beside is not None and not whole else 0)
    tiny = 2.0**-149 * (k * (1 + w.up.double().abs().sum(1)) + w.rank + k)
    bound = gamma(steps) * (x.double().abs() @ size.T + start.abs()) + tiny
    if whole:
        exact = exact + integer_residual(x, beside)
        bound = bound + EPS * (exact.abs() + bound)
    assert ((y - exact).abs() <= bound).all(), message


# --- what it computes ---------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("size", SIZES)
def test_result(case: Case, size: tuple[int, int]) -> None:
    n, k = size
    w, bias = case.weight(n, k), torch.randn(n)
    packed = case.pack(w)
    for m in ROWS:
        x, offset = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None], bias if m % 2 else None
        y = ops.low_rank_linear(x, *packed, offset)
        assert y.shape == (m, n) and y.dtype == torch.float32
        check_result(y, x, w, offset, (m, size))  # type: ignore[arg-type]


def small(w: LowRankWeight) -> LowRankWeight:
    """Of integers so small that no order of a float32 sum rounds; a quantized residual stays."""
    beside = w.residual
    if beside is not None and not quantizes(beside):
        values = beside.decompress().sign() * beside.decompress().abs().ceil()
        beside = DenseWeight(values) if isinstance(beside, DenseWeight) else SparseWeight.from_dense(values)
    down, up = (torch.randint(-3, 4, t.shape).float() for t in (w.down, w.up))
    return replace(w, down=down, up=up, residual=beside)


@pytest.mark.parametrize("residual", ["", *RESIDUALS])
def test_float32_is_exact_where_it_can_be(residual: str) -> None:
    """A product that was left out or taken twice shows."""
    case = case_of(32, residual)
    for n, k in SIZES:
        w, bias = small(low_rank(n, k, 32, residual)), torch.randint(-9, 9, (n,)).float()
        packed, beside = case.pack(w), w.residual
        for m in ROWS:
            x = torch.randint(-4, 5, (m, k)).float()
            expected = x @ w.down.T @ w.up.T + bias
            if beside is not None:
                expected += integer_residual(x, beside) if quantizes(beside) else x @ beside.decompress().T
            assert torch.equal(ops.low_rank_linear(x, *packed, bias), expected), (m, n, k)


@EVERY
def test_long_rows_and_extreme_values(case: Case) -> None:
    n, k, rank = 40, 2100, 40
    w: Any = case.weight(n, k)
    down, up = (torch.randn(rank, k), torch.randn(n, rank)) if w.bits == 32 else (
        torch.randint(-127, 128, (rank, k)).to(torch.int8), torch.randint(-127, 128, (n, rank)).to(torch.int8)
    )  # fmt: skip
    w = replace(w, down=down, up=up, down_scale=None if w.bits == 32 else torch.rand(rank) / 127 + 1e-3)
    half = torch.tensor([1e6, -1e6])
    rows = [torch.randn(k), half.repeat(k // 2), half.repeat_interleave(k // 2), torch.full((k,), 1e30)]
    x = torch.stack([*rows, torch.randn(k) * 1e-30, torch.full((k,), 1e-44), torch.zeros(k)])
    check_result(ops.low_rank_linear(x, *case.pack(w)), x, w, None)


@pytest.mark.parametrize("activation_bits", [7, 8])
@pytest.mark.parametrize("residual", ["", "int8", "quads", "int4", "int4 symmetric"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_factors_are_two_int8_linears(activation_bits: int, residual: str, dtype: torch.dtype, same: Same) -> None:
    """To the bit, with the activation and the rounding to x's dtype."""
    case = case_of(8, residual, activation_bits)
    w, bias = low_rank(37, 130, 8, residual, activation_bits), torch.randn(37)
    x = (torch.randn(9, 130) * torch.logspace(-20, 3, 9)[:, None]).to(dtype)
    x[3] = 0
    v = int8_part(x, w, bias) + (integer_residual(x, w.residual) if residual else 0)
    assert same(ops.low_rank_linear(x, *case.pack(w), bias), v.to(dtype))
    assert same(ops.low_rank_linear(x, *case.pack(w), bias, "relu"), v.clamp(min=0).to(dtype))


@pytest.mark.parametrize("residual", ["int4", "int4 symmetric"])
@pytest.mark.parametrize("activation_bits", [7, 8])
def test_beside_int4_int8_factors_are_the_sum_of_two_ops(activation_bits: int, residual: str) -> None:
    """Whether both quantize x alike (8 bits), which is then done once, or not."""
    case = case_of(8, residual, activation_bits)
    for n, k in [*SIZES, (20, 300)]:
        w, bias = low_rank(n, k, 8, residual, activation_bits), torch.randn(n)
        packed, factors = case.pack(w), case.pack(replace(w, residual=None))
        beside = ops.low_rank_residual(*packed)
        for m in ROWS:
            x = torch.randn(m, k) + 3
            both = ops.int4_linear(x, *beside) + ops.low_rank_linear(x, *factors, bias)
            assert torch.equal(ops.low_rank_linear(x, *packed, bias), both), (m, n, k)


@pytest.mark.parametrize("bits", [32, 8])
def test_intermediate(bits: int) -> None:
    for n, k in SIZES:
        w = low_rank(n, k, bits, "int8")
        packed = case_of(bits, "int8").pack(w)
        for m, dtype in itertools.product((0, 1, 7, 64), FLOATS):
            x = torch.randn(m, k).to(dtype)
            t = ops.low_rank_intermediate(x, *packed)
            assert t.shape == (m, w.rank) and t.dtype == torch.float32
            if w.down_scale is not None:
                rows, scale = x.float().numpy(), w.down_scale.numpy()
                assert np.array_equal(t, reference.int8.linear(rows, w.down.numpy(), scale, activation_bits=7))
            else:
                exact, size = x.double() @ w.down.double().T, x.double().abs() @ w.down.double().T.abs()
                assert ((t - exact).abs() <= gamma(k + 2) * size).all()


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_an_intermediate_of_another_rank_is_refused() -> None:
    packed, form = case_of(32).pack(low_rank(24, 20))
    with pytest.raises(ValueError, match=r"low_rank_intermediate: the packed weight has .*'rank': 7"):
        ops.low_rank_intermediate(torch.randn(3, 20), packed, form.replace("rank=7", "rank=6"))
    with pytest.raises(
        ValueError, match=r"low_rank_unpack: the packed weight has .*'rank': 7.* its form says .*'rank': 6"
    ):
        ops.unpack("low_rank", packed, form.replace("rank=7", "rank=6"))


DOWN, UP = torch.randn(6, 20), torch.randn(24, 6)
INT8 = {
    "down": torch.ones(6, 20).to(torch.int8), "up": torch.ones(24, 6).to(torch.int8), "down_scale": torch.ones(6),
    "up_scale": torch.ones(24), "bits": 7,
}  # fmt: skip
Refusal = tuple[dict[str, Any], str]
BROKEN: dict[str, Refusal] = {
    "down in float64": ({"down": DOWN.double()}, r"down is torch.float64 \[6, 20\], expected a float32 or int8 matrix"),
    "up a vector": ({"up": UP[0]}, r"up is torch.float32 \[6\], expected a float32 or int8 matrix"),
    "up in int8": ({"up": INT8["up"]}, r"up is torch.int8 \[24, 6\], expected torch.float32 \[24, 6\] as down is \[6, 20\]"),
    "another rank": ({"up": UP[:, :5]}, r"up is torch.float32 \[24, 5\], expected torch.float32 \[24, 6\]"),
    "rank above k": ({"down": torch.ones(21, 20), "up": torch.ones(24, 21)}, "the rank is 21, expected 1 to 20 for"),
    "rank above n": ({"up": UP[:5]}, "the rank is 6, expected 1 to 5"),
    "rank 0": ({"down": DOWN[:0], "up": UP[:, :0]}, "the rank is 0, expected 1 to 20"),
    "too many inputs": ({"down": torch.ones(6, 65537)}, "in_features is 65537, expected 1 to 65536"),
    "NaN": ({"down": DOWN * math.nan}, "down holds NaN or Inf, expected finite values"),
    "Inf": ({"up": UP * math.inf}, "up holds NaN or Inf, expected finite values"),
    "-128": ({**INT8, "up": INT8["up"] * 0 - 128}, "up holds -128, expected integers from -127 to 127"),
    "a scale of floats": ({"down_scale": torch.ones(6)}, r"down_scale is torch.float32 \[6\], expected None without int8"),
    "no scale": ({**INT8, "up_scale": None}, r"up_scale is None, expected float32 \[24\] for int8 factors"),
    "a short scale": ({**INT8, "up_scale": torch.ones(23)}, r"up_scale is \[23\], expected \[24\]"),
    "bits of floats": ({"bits": 7}, "activation_bits is 7, expected 7 or 8 for int8 factors, 0 for float32"),
    "6 bits": ({**INT8, "bits": 6}, "activation_bits is 6, expected 7 or 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_pack_refuses(case: str) -> None:
    change, message = BROKEN[case]
    with pytest.raises(ValueError, match=f"low_rank_pack: {message}"):
        pack_low_rank(**{"down": DOWN, "up": UP, **change})


RESIDUAL_REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown one": ("", {"residual": "low_rnak"}, "low_rank_pack: the residual is 'low_rnak', expected one of .*dense"),
    "a name alone": ("", {"residual": "dense"}, "dense_pack: 'weight' is missing"),
    "parts alone": ("dense", {"residual": ""}, "low_rank_pack: parts are down, up, residual_weight, expected no residual's"),
    "another shape": ("dense", {"weight": torch.ones(20, 24)}, r"dense_pack: weight is .* \[20, 24\], expected .*24, 20"),
    "NaN": ("dense", {"weight": torch.full((24, 20), math.nan)}, "dense_pack: weight holds NaN or Inf"),
    "no scale": ("int8", {"scale": None}, "int8_pack: 'scale' is missing"),
    "a short scale": ("int8", {"scale": torch.ones(20)}, r"int8_pack: scale is \[20\], expected \[24\]"),
    "another int8": ("int8", {"values": torch.ones(24, 21).to(torch.int8)}, r"values is torch.int8 \[24, 21\], expected .*24, 20"),
    "floats for int8": ("int8", {"values": torch.ones(24, 20)}, r"int8_pack: values is torch.float32"),
    "16 bits": ("int8", {"settings": {"activation_bits": 16}}, "the residual's activation_bits is 16, expected 7 or 8"),
    "int4 of 16 bits": ("int4", {"settings": {"group": 32, "activation_bits": 16}}, "activation_bits is 16, expected 8"),
    "a scale of floats": ("rows", {"scale": torch.ones(24)}, "sparse_pack: scale is .*, expected None for float32 values"),
}  # fmt: skip


@pytest.mark.parametrize("case", RESIDUAL_REFUSALS)
def test_residuals_that_pack_refuses(case: str) -> None:
    residual, changes, message = RESIDUAL_REFUSALS[case]
    given: dict[str, Any] = {}
    if residual:
        weight = RESIDUALS[residual](24, 20)
        given = {"residual": weight.name, "settings": weight.settings(), **weight.parts()}
    with pytest.raises(ValueError, match=message):
        pack_low_rank(DOWN, UP, **{**given, **changes})


# --- a residual that the kernel does not know ---------------------------------------------------------------------------


class Halves:
    """A toy weight: float16 [n, k], packed as it is."""

    @staticmethod
    def sizes(form: Any) -> dict[str, Any]:
        return {"half": ((form.n, form.k), torch.float16)}

    @staticmethod
    def pack(parts: Any, shape: tuple[int, int], settings: Any, layout: str = "") -> Packed:
        half = parts["half"].contiguous()
        return half.view(torch.uint8).flatten().clone(), written("halves", *shape, factor=settings["factor"])

    @staticmethod
    def _half(packed: Tensor, form: str) -> Tensor:
        own = ops.parse(form)
        return packed.view(torch.float16).view(own.n, own.k).clone()

    @staticmethod
    def unpack(packed: Tensor, form: str) -> dict[str, Tensor]:
        return {"half": Halves._half(packed, form)}

    @staticmethod
    def dense(packed: Tensor, form: str) -> Tensor:
        return Halves._half(packed, form).float() * ops.parse(form).factor

    @staticmethod
    def linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None, activation: str) -> Tensor:
        assert bias is None and activation == "none" and x.dtype == torch.float32
        return x @ Halves.dense(packed, form).T


define("halves", Halves)


@pytest.mark.parametrize("bits", [32, 8])
def test_any_other_weight_is_a_residual_as_a_second_call(bits: int, same: Same) -> None:
    n, k, rank = 37, 50, 7
    w, bias, half = low_rank(n, k, bits), torch.randn(n), torch.randn(n, k).half()
    own = {**w.parts(), "bits": w.activation_bits or 0}
    packed, form = pack_low_rank(**own, residual="halves", settings={"factor": 3}, half=half)
    factors = pack_low_rank(**own)
    assert packed.dtype == torch.uint8 and packed.dim() == 1
    assert form.startswith(f"beside n={n} k={k} rank={rank} bits={bits} ")
    assert form.endswith(f" + halves n={n} k={k} factor=3")
    found = ops.unpack("low_rank", packed, form)
    assert same(found["down"], w.down) and same(found["up"], w.up) and same(found["residual_half"], half)
    assert same(ops.dense("low_rank", packed, form), ops.dense("low_rank", *factors) + half.float() * 3)
    residual, residual_form = ops.low_rank_residual(packed, form)
    assert residual_form == f"halves n={n} k={k} factor=3"
    assert same(ops.dense("halves", residual, residual_form), half.float() * 3)
    for m, dtype, activation in itertools.product((0, 1, 7), FLOATS, ops.ACTIVATIONS):
        x = torch.randn(m, k).to(dtype)
        v = ops.low_rank_linear(x.float(), *factors, bias) + x.float() @ (half.float() * 3).T
        expected = ops.DIFFERENTIABLE[activation](v).to(dtype)
        assert same(ops.low_rank_linear(x, packed, form, bias, activation), expected), "added before the activation"
        assert same(ops.low_rank_intermediate(x, packed, form), ops.low_rank_intermediate(x, *factors))
    x = torch.randn(2, 3, k)
    torch.library.opcheck(torch.ops.pycompress.low_rank_linear.default, (x, packed, form, bias, "gelu"))
    torch.library.opcheck(torch.ops.pycompress.low_rank_unpack.default, (packed, form))
    with pytest.raises(ValueError, match="low_rank_linear: activation is 'tanh'"):
        ops.low_rank_linear(x, packed, form, bias, "tanh")
    with pytest.raises(TypeError, match=r"low_rank_linear: x is torch\.float64"):
        ops.low_rank_linear(x.double(), packed, form)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="a weight named 'halves' is registered already"):
        define("halves", Halves)
