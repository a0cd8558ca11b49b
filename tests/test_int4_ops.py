"""The int4 ops and weight-only int8, on the native kernels and on their twin: to the bit where the contract leaves one order,
inside the derived bound where it does not, and as torch sees them."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pycompress import ops, reference

Same = Callable[[Tensor, Tensor], bool]
Forked = Callable[..., Any]
Python = Callable[..., subprocess.CompletedProcess[str]]
Array = np.ndarray[Any, Any]

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EPS = float(torch.finfo(torch.float32).eps)
# Around the tile: 4 rows x 16 channels, units of 32 positions, groups of 32, 64 and 128, blocks of 1024.
NS = [1, 15, 16, 17, 35]
KS = [1, 31, 32, 33, 65, 127, 128, 129, 1023, 1024, 1025, 2051]
ROWS = [0, 1, 2, 3, 4, 5, 9, 67]
SCHEMES = [(group, symmetric) for group in (32, 64, 128) for symmetric in (False, True)]
EVERY = pytest.mark.parametrize(("group", "symmetric"), SCHEMES)
BITS = pytest.mark.parametrize("bits", [8, 16])


@pytest.fixture(params=["native", "twin"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and ops.extension_error() is not None:
        pytest.skip("no extension was built")
    if request.param == "twin":
        for module in (ops.native, ops.int8, ops.int4, ops.sparse, ops.low_rank):
            monkeypatch.setattr(module, "_C", reference.extension)
            monkeypatch.setattr(module, "reads_tensors", False, raising=False)
    return request.param


class Weight(NamedTuple):
    values: Array  # uint8 [n, k], one integer each
    scale: Tensor  # bfloat16 [n, groups]
    zero_point: Array | None  # uint8 [n, groups]
    group: int
    bits: int  # of the activations

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `int4_pack` takes them."""
        return nibbles(self.values), self.scale, None if self.zero_point is None else nibbles(self.zero_point)

    def arguments(self) -> tuple[Any, ...]:
        return (*self.parts(), self.shape[1], self.group, self.bits)

    def pack(self) -> Tensor:
        return ops.int4_pack(*self.arguments())

    def centred(self) -> Array:
        """value - zero point, int64 [n, groups, group]; zeros behind k."""
        n, k = self.shape
        groups = self.scale.shape[1]
        zero = np.full((n, groups), 8) if self.zero_point is None else self.zero_point.astype(np.int64)
        difference = np.zeros((n, groups * self.group), np.int64)
        difference[:, :k] = self.values.astype(np.int64) - np.repeat(zero, self.group, 1)[:, :k]
        return difference.reshape(n, groups, self.group)

    def dense(self) -> Tensor:
        """float64 [n, k]."""
        steps = torch.from_numpy(self.centred()).double() * self.scale.double()[:, :, None]
        return steps.flatten(1)[:, : self.shape[1]]


def nibbles(values: Array) -> Tensor:
    """uint8 [n, k] -> [n, ceil(k / 2)]: position 2j in the low half of byte j."""
    even = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    return torch.from_numpy(even[:, ::2] | even[:, 1::2] << 4)


def weight(n: int, k: int, group: int = 32, symmetric: bool = False, bits: int = 8) -> Weight:
    rng = np.random.default_rng([n, k, group, symmetric])
    groups = -(-k // group)
    values = rng.integers(0, 16, (n, k), np.uint8)
    scale = torch.from_numpy(rng.random((n, groups), np.float32) * 0.02 + 1e-3).bfloat16()
    return Weight(values, scale, None if symmetric else rng.integers(0, 16, (n, groups), np.uint8), group, bits)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 arrays, rounded once: exact product in float64, the sum rounded to odd there."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    rest = (product - (total - part)) + (addend - part)
    even = (rest != 0) & np.isfinite(rest) & (total.view(np.int64) & 1 == 0)
    return np.where(even, np.nextafter(total, np.where(rest > 0, np.inf, -np.inf)), total).astype(np.float32)


def chain(q: Array, w: Weight) -> Array:
    """v[m, n] of csrc/int4/gemm.h, for q int64 [m, k]."""
    (n, k), groups = w.shape, w.scale.shape[1]
    padded = np.zeros((len(q), groups * w.group), np.int64)
    padded[:, :k] = q
    by_group = padded.reshape(len(q), groups, w.group).transpose(1, 0, 2)
    dot = by_group @ w.centred().transpose(1, 2, 0)  # int64 [groups, m, n]
    assert np.abs(dot).max(initial=0) < 2**24
    v, scale = np.zeros((len(q), n), np.float32), w.scale.float().numpy()
    for g in range(groups):
        v = fma(dot[g].astype(np.float32), scale[:, g], v)
    return v


def formula(x: Tensor, w: Weight, bias: Tensor | None = None) -> Tensor:
    """What 8-bit activations give before the activation, to the bit."""
    q, s, zero_point = (t.numpy() for t in ops.int8_quantize(x, 8))
    with np.errstate(all="ignore"):
        offset = chain(np.ones((1, w.shape[1]), np.int64), w)
        u = fma(-zero_point.astype(np.float32)[:, None], offset, chain(q.astype(np.int64), w))
        y = u * s[:, None]
        return torch.from_numpy(y if bias is None else y + bias.numpy())


def gamma(count: int) -> float:
    return count * EPS / 2 / (1 - count * EPS / 2)


def check_close(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, message: object = None) -> None:
    """y float32, of activations in floating point and without activation, is near x w^T + bias, w float64 [n, k].

    Each product meets at most k roundings of a chain by 1 + u, and 4 where chains are joined and scaled; then the bias is added
    and the result rounded. Below the normal numbers each step is off by 2^-149 at most.
    """
    exact = x.double() @ w.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ w.abs().T
    rounding = EPS * (y.double().abs() + (0 if bias is None else bias.double().abs()))
    bound = gamma(w.shape[1] + 4) * size + rounding + (w.shape[1] + 4) * 2.0**-149
    assert y.dtype == torch.float32 and ((y - exact).abs() <= bound).all(), message


def same_but_nan(got: Tensor, expected: Tensor) -> bool:
    """Equal values, and NaN where NaN is expected: its sign is left to the processor."""
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


# --- pack and unpack ----------------------------------------------------------------------------------------------------


@EVERY
@BITS
def test_unpack_is_the_inverse_of_pack(group: int, symmetric: bool, bits: int, same: Same) -> None:
    for n, k in itertools.product(NS, KS):
        w = weight(n, k, group, symmetric, bits)
        packed = w.pack()
        assert packed.dtype == torch.uint8 and packed.dim() == 1
        header = {"n": n, "k": k, "group": group, "symmetric": symmetric, "activation_bits": bits}
        assert ops.int4_header(packed) == header
        found = ops.int4_unpack(packed, n, k, group, symmetric)
        for got, given in zip(found, w.parts(), strict=True):
            assert got is None and given is None if given is None or got is None else same(got, given)
        assert same(ops.int4_dense(packed, n, k), w.dense().float())


def test_the_dense_weight_is_exact() -> None:
    """All of value, zero point and scale's end points: no product of 4 and 8 bits is rounded."""
    values, zeros = (
        np.repeat(a, 32, 1) for a in np.meshgrid(np.arange(16, dtype=np.uint8), np.arange(16, dtype=np.uint8))
    )
    for power in (-126, 0, 124):
        scale = torch.full((16, 16), 2.0**power * (1.9921875 if power < 124 else 1)).bfloat16()
        w = Weight(values, scale, zeros[:, ::32].copy(), 32, 16)
        dense = ops.int4_dense(w.pack(), 16, 512)
        assert dense.isfinite().all() and torch.equal(dense.double(), w.dense())


@BITS
def test_operands_that_are_not_contiguous(bits: int) -> None:
    w = weight(20, 300, 64, bits=bits)
    values, scale, zero_point = w.parts()
    assert zero_point is not None
    turned = [part.T.contiguous().T for part in (values, scale, zero_point)]
    assert not turned[0].is_contiguous()
    assert torch.equal(ops.int4_pack(*turned, 300, 64, bits), w.pack())


# --- activations of 8 bits: to the bit ----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("k", KS)
def test_result_equals_the_formula(group: int, symmetric: bool, k: int, same: Same) -> None:
    for n in NS:
        w, bias = weight(n, k, group, symmetric), torch.randn(n)
        packed, x = w.pack(), torch.randn(ROWS[-1], k) * torch.logspace(-20, 20, ROWS[-1])[:, None]
        plain, biased = formula(x, w), formula(x, w, bias)
        for m in ROWS:
            offset, expected = (bias, biased) if m % 2 else (None, plain)
            assert same(ops.int4_linear(x[:m], packed, n, offset), expected[:m]), (n, m)


SIGNS = [
    torch.tensor([1.0, -1.0]).repeat_interleave(size).repeat(1057)[:1057] for size in (1, 2, 4, 8, 16, 32, 128, 1057)
]
EXTREME = torch.stack([sign * signs for signs in SIGNS for sign in (1, -1)])  # every activation is 0 or 255


@EVERY
@pytest.mark.parametrize("value", [0, 15])
@pytest.mark.parametrize("zero_point", [0, 15])
def test_no_lane_overflows(group: int, symmetric: bool, value: int, zero_point: int, same: Same) -> None:
    """Activations at both ends, in runs and in turns, on the largest and the smallest weights."""
    w = weight(35, 1057, group, symmetric)
    w = w._replace(values=np.full_like(w.values, value))
    if not symmetric:
        w = w._replace(zero_point=np.full(w.scale.shape, zero_point, np.uint8))
    assert set(ops.int8_quantize(EXTREME, 8)[0].flatten().tolist()) == {0, 255}
    packed, expected = w.pack(), formula(EXTREME, w)
    for m in (1, 2, 4, len(EXTREME)):
        assert same(ops.int4_linear(EXTREME[:m], packed, 35), expected[:m])


@pytest.mark.parametrize("top", [7, 8, -8, -9])
@pytest.mark.parametrize("one_more", [0, 1, -1])
def test_weights_around_the_lane_budget(top: int, one_more: int, same: Same) -> None:
    """16 weights whose sum is 128 are the most that a lane has room for beside 255; one of the 35 x 64 is one more or less."""
    n, k = 35, 64
    for position in range(32):
        centred = np.full((n, k), top)
        centred[position, position] += one_more
        w = weight(n, k)
        zero = np.uint8(0 if top > 0 else 15)
        w = w._replace(values=(centred + zero).astype(np.uint8), zero_point=np.full(w.scale.shape, zero))
        x, packed = EXTREME[:, :k], w.pack()
        for m in (1, len(x)):
            assert same(ops.int4_linear(x[:m], packed, n), formula(x[:m], w))


@EVERY
def test_the_integers_are_those_of_int64(group: int, symmetric: bool) -> None:
    """Rows of integers of which the ends lie 255 apart are their own q, with a scale of 1; a weight's scale of 1 then leaves
    the sums as they are, below 2^24."""
    for (n, k), low in itertools.product([(1, 33), (17, 1025), (35, 4100)], (0, -100, -255)):
        w = weight(n, k, group, symmetric)
        w = w._replace(scale=torch.ones_like(w.scale))
        x = torch.randint(low, low + 256, (9, k))
        x[:, 0], x[:, -1] = low, low + 255
        expected = x.numpy() @ w.centred().reshape(n, -1)[:, :k].T
        assert np.abs(expected).max() < 2**24
        packed = w.pack()
        for m in (1, 9):
            assert np.array_equal(ops.int4_linear(x[:m].float(), packed, n), expected[:m])


def test_sums_are_added_in_the_order_of_the_contract(same: Same) -> None:
    """Scales far apart, so that every other order, or a product that was rounded first, gives other bits."""
    n, k = 17, 1120
    w = weight(n, k)
    powers = np.random.default_rng(0).integers(-12, 12, w.scale.shape)
    w = w._replace(scale=(torch.rand(w.scale.shape) + 1).bfloat16() * torch.from_numpy(2.0**powers).bfloat16())
    x = torch.randn(9, k)
    expected = formula(x, w)
    turned = w._replace(values=w.values[:, ::-1], scale=w.scale.flip(1), zero_point=w.zero_point[:, ::-1])  # type: ignore[index]
    assert not torch.equal(formula(x.flip(1), turned), expected)
    for m in (1, 4, 9):
        assert same(ops.int4_linear(x[:m], w.pack(), n), expected[:m])


def extreme_rows(k: int) -> Tensor:
    biggest = torch.finfo(torch.float32).max
    rows = [
        torch.randn(k), torch.zeros(k), -torch.zeros(k), torch.full((k,), 3.0), torch.rand(k) + 5, -torch.rand(k) - 5,
        torch.full((k,), biggest), torch.full((k,), -biggest), torch.randn(k) * 2.0**-99, torch.full((k,), 2.0**-100),
        torch.full((k,), 2.0**-99), torch.full((k,), (1 - 2.0**-24) * 2.0**-99), torch.full((k,), 1e-45), torch.randn(k) * 1e-42,
        torch.randn(k) * 1e30, (torch.arange(k) % 255 - 127) + 0.5, torch.where(torch.arange(k) == k - 1, 1e6, 1e-6),
    ]  # fmt: skip
    return torch.stack(rows)


@EVERY
def test_extreme_rows_and_scales(group: int, symmetric: bool) -> None:
    for k in (5, 160, 1057):
        w, x = weight(20, k, group, symmetric), extreme_rows(k)
        ends = torch.tensor([2.0**-126, 2.0**124, 1.0])[torch.randint(3, w.scale.shape)].bfloat16()
        for one in (w, w._replace(scale=ends)):
            assert same_but_nan(ops.int4_linear(x, one.pack(), 20), formula(x, one))


def test_close_to_the_float_product() -> None:
    w, bias, x = weight(64, 256), torch.randn(64), torch.randn(32, 256)
    exact = x.double() @ w.dense().T + bias.double()
    step = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)).double() / 255
    # Each quantized activation is off by half a step, by one where the zero point is rounded the other way.
    bound = step[:, None] * w.dense().abs().sum(1) + 1e-4
    assert ((ops.int4_linear(x, w.pack(), 64, bias) - exact).abs() <= bound).all()


# --- activations in floating point --------------------------------------------------------------------------------------


class WeightOnly(NamedTuple):
    """A weight whose activations stay floating point, of either op."""

    dense: Tensor  # float64 [n, k]
    linear: Callable[..., Tensor]  # (x, bias=None, activation="none")


def weight_only(kind: str, n: int, k: int, *, exact: bool = False) -> WeightOnly:
    """kind: ``int8``, or the group of int4, negative where symmetric; `exact`: scales of 1."""
    if kind == "int8":
        values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        scale = torch.ones(n) if exact else torch.rand(n) / 127 + 1e-3
        packed = ops.int8_pack(values, 16)
        return WeightOnly(
            values.double() * scale.double()[:, None], lambda x, *rest: ops.int8_linear(x, packed, scale, *rest)
        )
    w = weight(n, k, abs(int(kind)), int(kind) < 0, 16)
    w = w._replace(scale=torch.ones_like(w.scale)) if exact else w
    packed4 = w.pack()
    return WeightOnly(w.dense(), lambda x, *rest: ops.int4_linear(x, packed4, n, *rest))


KINDS = pytest.mark.parametrize("kind", ["int8", "32", "-64", "128"])


@KINDS
@pytest.mark.parametrize("k", [1, 33, 128, 1025, 2051])
def test_weight_only_is_inside_the_bound(kind: str, k: int) -> None:
    for n in (1, 16, 35):
        w, bias = weight_only(kind, n, k), torch.randn(n)
        for m in ROWS:
            x = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]
            y = w.linear(x)
            assert y.shape == (m, n)
            check_close(y, x, w.dense, None, (n, m))
            check_close(w.linear(x, bias), x, w.dense, bias, (n, m))


@KINDS
def test_weight_only_is_exact_where_it_can_be(kind: str) -> None:
    """Small integers: no order of the sums rounds, so a product that was left out or taken twice shows."""
    for n, k in itertools.product((1, 17, 35), (1, 32, 65, 129, 1024, 2051)):
        w, bias = weight_only(kind, n, k, exact=True), torch.randint(-9, 9, (n,)).float()
        for m in (1, 2, 3, 4, 5, 7, 13):
            x = torch.randint(-4, 5, (m, k)).float()
            expected = x.double() @ w.dense.T + bias
            assert torch.equal(w.linear(x, bias).double(), expected), (n, k, m)


@KINDS
def test_weight_only_of_extreme_rows(kind: str) -> None:
    n, k = 40, 2100
    half = torch.tensor([1e6, -1e6])
    rows = [torch.randn(k), half.repeat(k // 2), half.repeat_interleave(k // 2), torch.full((k,), 1e30)]
    x = torch.stack([*rows, torch.randn(k) * 1e-30, torch.full((k,), 1e-44), torch.zeros(k)])
    w = weight_only(kind, n, k)
    check_close(w.linear(x), x, w.dense, None)
    for row in x:
        check_close(w.linear(row[None]), row[None], w.dense, None)


@KINDS
@pytest.mark.parametrize("m", [3, 4, 20])
def test_weight_only_rows_with_nan_or_inf_touch_no_other(kind: str, m: int) -> None:
    n, k = 37, 70
    w, x, bad = weight_only(kind, n, k), torch.randn(m, k), [0, 2, *([5] if m > 5 else [])]
    clean = w.linear(x)
    x[bad, 67] = torch.tensor([math.nan, math.inf, -math.inf])[: len(bad)]
    y = w.linear(x)
    others = [row for row in range(m) if row not in bad]
    assert torch.equal(y[others], clean[others])
    assert y[0].isnan().all()
    for row in bad[1:]:
        expected = x[row, 67] * w.dense[:, 67].sign().float()  # NaN where the weight is 0
        assert same_but_nan(y[row], expected)


def test_int8_packed_for_16_bits() -> None:
    for n, k in itertools.product(NS, (1, 31, 33, 130)):
        values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        packed = ops.int8_pack(values, 16)
        assert torch.equal(ops.int8_unpack(packed), values)
        header = ops.int8_depths(packed)
        assert header == {"n": n, "k": k, "activation_bits": 16, "groups": 0, "items": (0, 0, 0)}
    with pytest.raises(ValueError, match="int8_accumulate: the packed weight's activation_bits is 16, expected 7 or 8"):
        ops.int8_accumulate(torch.ones(2, 130), packed)
    with pytest.raises(ValueError, match="int8_quantize: activation_bits is 16, expected 7 or 8"):
        ops.int8_quantize(torch.ones(2, 3), 16)
    down, up = torch.ones(3, 130), torch.ones(35, 3)
    with pytest.raises(ValueError, match="low_rank_pack: the residual's activation_bits is 16, expected 7 or 8"):
        ops.low_rank_pack(down, up, None, None, 0, "int8", packed, torch.ones(35))
    with pytest.raises(ValueError, match="sparse_pack: activation_bits is 16, expected 7 or 8"):
        ops.sparse_pack(torch.full((3, 1), 15).byte(), torch.ones(12, dtype=torch.int8), 4, 16)


def test_weight_only_int8_refuses_what_int8_does() -> None:
    packed, scale, linear = ops.int8_pack(torch.ones(24, 20, dtype=torch.int8), 16), torch.ones(24), ops.int8_linear
    for call, message in (
        (
            lambda: linear(torch.ones(3, 100), packed, scale),
            r"int8_linear: x is \[3, 100\], the packed weight expects k = 20",
        ),
        (
            lambda: linear(torch.ones(3, 20), packed, scale[1:]),
            "int8_linear: .* 23.* 24",
        ),
        (lambda: ops.int8_pack(torch.full((2, 3), -128).to(torch.int8), 16), "int8_pack: a weight is -128"),
        (lambda: ops.int8_unpack(packed[:-1].clone()), "packed int8 weight"),
        (lambda: linear(torch.ones(3, 20), packed[:-1].clone(), scale), "packed int8 weight"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- shapes, strides, dtypes, threads -----------------------------------------------------------------------------------


@BITS
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 0, 3), (0,), (70, 3)])
def test_leading_dimensions(bits: int, lead: tuple[int, ...], same: Same) -> None:
    w, bias = weight(24, 36, bits=bits), torch.randn(24)
    packed, x = w.pack(), torch.randn(*lead, 36)
    y = ops.int4_linear(x, packed, 24, bias)
    assert y.shape == (*lead, 24)
    assert same(y, ops.int4_linear(x.reshape(-1, 36), packed, 24, bias).reshape(*lead, 24))
    for row, out in itertools.islice(zip(x.reshape(-1, 36), y.reshape(-1, 24), strict=True), 8):
        if bits == 8:
            assert same(ops.int4_linear(row, packed, 24, bias), out), "a row does not depend on the rows beside it"
        else:
            check_close(out[None], row[None], w.dense(), bias)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "left half of wider rows": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]],
    "every second row": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2],
    "every second column": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 2).flatten(1)[:, ::2],
    "odd offset": lambda x: torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view_as(x),
    "one row repeated": lambda x: x[:1].expand(x.shape),
    "overlapping rows": lambda x: x.flatten().as_strided(x.shape, (1, 1)),
    "permuted": lambda x: x.view(3, 4, -1).permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "negated": torch._neg_view,
}


@pytest.mark.parametrize("strides", STRIDED)
@pytest.mark.parametrize("kind", ["int4", "16 bits", "int8"])
def test_strides(strides: str, kind: str, same: Same) -> None:
    linear = weight_only("int8" if kind == "int8" else "32", 40, 36).linear
    if kind == "int4":
        packed = weight(40, 36).pack()

        def linear(x: Tensor) -> Tensor:
            return ops.int4_linear(x, packed, 40)

    for rows, dtype in itertools.product((12, 24), FLOATS):
        x = STRIDED[strides](torch.randn(rows, 36)[:12].to(dtype))
        dense = x.resolve_neg().clone(memory_format=torch.contiguous_format)
        before = dense.clone()
        assert same(linear(x), linear(dense))
        assert same(x.resolve_neg(), before), "the op does not write to its input"


@BITS
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations_and_half_precision(bits: int, activation: str, same: Same) -> None:
    w, bias = weight(40, 100, bits=bits), torch.randn(40)
    packed = w.pack()
    functions = {
        "none": torch.clone, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    }  # fmt: skip
    for m in (1, 4, 7):
        x = torch.randn(m, 100) * 3
        v = ops.int4_linear(x, packed, 40, bias).double()
        y = ops.int4_linear(x, packed, 40, bias, activation)
        slack = 0 if activation in {"none", "relu"} else 8 * EPS
        assert ((y - functions[activation](v)).abs() <= slack * v.abs()).all()
        for dtype in (torch.bfloat16, torch.float16):
            half = x.to(dtype)
            expected = ops.int4_linear(half.float(), packed, 40, bias, activation).to(dtype)
            assert same(ops.int4_linear(half, packed, 40, bias, activation), expected)


def test_int8_for_16_bits_has_activations_and_half_precision(same: Same) -> None:
    linear, bias = weight_only("int8", 40, 100).linear, torch.randn(40)
    for m, dtype in itertools.product((1, 4, 7), FLOATS):
        x = torch.randn(m, 100).to(dtype)
        assert same(linear(x, bias, "relu"), linear(x.float(), bias).clamp(min=0).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_with_nan_or_inf_are_nan_and_touch_no_other(dtype: torch.dtype, same: Same) -> None:
    packed, bad = weight(37, 70).pack(), {0: (0, math.nan), 4: (35, math.inf), 5: (69, -math.inf), 10: (64, math.nan)}
    for m in (1, 4, 11):
        good = torch.randn(m, 70).to(dtype)
        x = good.clone()
        broken = [row for row in bad if row < m]
        for row in broken:
            x[row, bad[row][0]] = bad[row][1]
        y, others = ops.int4_linear(x, packed, 37), [row for row in range(m) if row not in bad]
        assert y[broken].isnan().all()
        assert same(y[others], ops.int4_linear(good, packed, 37)[others])


@pytest.mark.parametrize("kind", ["int4", "16 bits", "int8"])
def test_every_thread_count_gives_the_same_bits(kind: str, same: Same) -> None:
    n, k, before = 200, 1300, torch.get_num_threads()
    inputs, bias = [torch.randn(m, k) for m in (1, 2, 4, 5, 7, 64, 130)], torch.randn(n)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        if kind == "int8":
            linear = weight_only("int8", n, k).linear
            return [linear(x, bias) for x in inputs]
        packed = weight(n, k, bits=8 if kind == "int4" else 16).pack()
        return [packed, *(ops.int4_linear(x, packed, n, bias) for x in inputs)]

    try:
        expected = run(1)
        for threads in (2, 3):
            for got, one in zip(run(threads), expected, strict=True):
                assert same(got, one)
    finally:
        torch.set_num_threads(before)


def test_other_kernels_give_the_same_bits(backend: str, tmp_path: Path, python: Python) -> None:
    """Those of PYCOMPRESS_ISA=scalar, or of the default where that is set, in a fresh interpreter."""
    if backend == "twin":
        pytest.skip("the twin has one kernel")
    cases = []
    for (group, symmetric), (n, k) in itertools.product(SCHEMES, [(5, 3), (35, 1057), (48, 130)]):
        w, x, bias = weight(n, k, group, symmetric), torch.cat([extreme_rows(k), torch.randn(6, k)]), torch.randn(n)
        y = {
            (code, m): ops.int4_linear(x[:m], w.pack(), n, bias, code) for code in ops.ACTIVATIONS for m in (1, len(x))
        }
        cases.append({"pack": w.arguments(), "n": n, "x": x, "bias": bias, "y": y})
    torch.save(cases, tmp_path / "cases.pt")
    code = """
import sys, torch
from pycompress import ops
for case in torch.load(sys.argv[1]):
    packed, x = ops.int4_pack(*case["pack"]), case["x"]
    for (activation, m), expected in case["y"].items():
        y = ops.int4_linear(x[:m], packed, case["n"], case["bias"], activation)
        nan = expected.isnan()  # the sign of a NaN is left to the processor
        assert torch.equal(y.isnan(), nan), (activation, m)
        assert torch.equal(y[~nan].view(torch.int32), expected[~nan].view(torch.int32)), (activation, m)
print(next(kernel["name"] for kernel in ops.kernels() if kernel["op"] == "int4" and kernel["available"]))
"""
    other = "" if os.environ.get("PYCOMPRESS_ISA") == "scalar" else "scalar"
    result = python(code, tmp_path / "cases.pt", PYCOMPRESS_ISA=other)
    assert result.returncode == 0, result.stderr
    if other:
        assert result.stdout.split() == ["scalar_4x16"]


# --- torch's own checks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "symmetric", "bits"), [(32, False, 8), (64, True, 8), (128, False, 16)])
def test_opcheck(group: int, symmetric: bool, bits: int) -> None:
    w, bias, found = weight(24, 70, group, symmetric, bits), torch.randn(24), torch.ops.pycompress
    packed = w.pack()
    torch.library.opcheck(found.int4_linear.default, (torch.randn(2, 3, 70), packed, 24, bias, "gelu"))
    torch.library.opcheck(found.int4_linear.default, (torch.randn(70, 5).half().T, packed, 24, None, "none"))
    torch.library.opcheck(found.int4_linear.default, (torch.randn(0, 70).bfloat16(), packed, 24, bias, "relu"))
    torch.library.opcheck(found.int4_pack.default, w.arguments())
    torch.library.opcheck(found.int4_unpack.default, (packed, 24, 70, group, symmetric))
    torch.library.opcheck(found.int4_dense.default, (packed, 24, 70))


def test_opcheck_of_int8_for_16_bits() -> None:
    values, found = torch.randint(-127, 128, (24, 20), dtype=torch.int8), torch.ops.pycompress
    torch.library.opcheck(found.int8_pack.default, (values, 16))
    packed = ops.int8_pack(values, 16)
    torch.library.opcheck(
        found.int8_linear.default, (torch.randn(3, 20), packed, torch.rand(24), torch.randn(24), "silu")
    )


def test_fake_has_the_strides_of_the_real_result() -> None:
    packed, x = weight(24, 20).pack(), torch.randn(2, 20, 5).transpose(1, 2)
    real, fake = ops.int4_linear(x, packed, 24), ops.int4_linear(x.to("meta"), packed.to("meta"), 24)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert fake.is_meta and real.is_contiguous()


@BITS
def test_compile_fullgraph_vmap_and_modes(bits: int, same: Same) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    packed, bias, x = weight(24, 20, bits=bits).pack(), torch.randn(24), torch.randn(4, 5, 20)

    def call(x: Tensor) -> Tensor:
        values, scale, zero_point = ops.int4_unpack(packed, 24, 20, 32, False)
        assert zero_point is not None
        again = ops.int4_pack(values, scale, zero_point, 20, 32, bits)
        return ops.int4_linear(x, again, 24, bias, "gelu") @ ops.int4_dense(packed, 24, 20)

    torch._dynamo.reset()
    assert same(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
    torch._dynamo.reset()
    y = torch.func.vmap(lambda row: ops.int4_linear(row, packed, 24, bias))(x)
    assert same(y, ops.int4_linear(x, packed, 24, bias))
    with pytest.raises(NotImplementedError, match="vmap over the weights"):
        torch.func.vmap(lambda b: ops.int4_linear(x[0], packed, 24, b))(bias.expand(2, 24).contiguous())
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Spy():
        ops.int4_linear(x, packed, 24)
    assert torch.ops.pycompress.int4_linear.default in seen


# --- bad input ----------------------------------------------------------------------------------------------------------


@BITS
def test_sizes_that_do_not_fit(bits: int) -> None:
    packed, x, linear = weight(24, 20, bits=bits).pack(), torch.randn(3, 20), ops.int4_linear
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: linear(torch.ones(3, 100), packed, 24), r"linear: x is \[3, 100\], the packed weight expects k = 20"),
        (lambda: linear(torch.ones(0, 100), packed, 24), r"linear: x is \[0, 100\], the packed weight expects k = 20"),
        (lambda: linear(torch.ones(3, 0), packed, 24), "linear: x is .*, the packed weight expects k = 20"),
        (lambda: linear(x, packed, 25), "linear: n is 25, the packed weight has 24 channels"),
        (lambda: linear(x, packed, 24, torch.ones(25)), r"linear: bias is \[25\], expected \[24\]"),
        (lambda: linear(x, packed, 24, torch.ones(24).double()), r"linear: bias is torch.float64 \[24\] on cpu"),
        (lambda: linear(torch.tensor(1.0), packed, 24), "linear: x is a scalar"),
        (lambda: linear(x.double(), packed, 24), r"linear: x is torch.float64, expected float32, bfloat16 or float16"),
        (lambda: linear(x, packed, 24, None, "tanh"), "linear: activation is 'tanh', expected one of none, relu"),
        (lambda: linear(x, packed.float(), 24), r"linear: packed is torch.float32 .* on the CPU from int4_pack"),
        (lambda: ops.int4_dense(packed, 24, 21), "dense: the packed weight is 24x20, not 24x21"),
        (lambda: ops.int4_unpack(packed, 24, 20, 64, False), r"unpack: .* are \(24, 20, 32, False\), not \(24, 20, 64, False\)"),
        (lambda: ops.int4_unpack(packed, 24, 20, 32, True), r"unpack: .* not \(24, 20, 32, True\)"),
    ]  # fmt: skip
    for call, message in calls:
        with pytest.raises(TypeError if "float64, expected" in message else ValueError, match=f"int4_{message}"):
            call()


V, S, Z = weight(24, 37).parts()
assert Z is not None
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "values in int8": ({"values": V.to(torch.int8)}, r"values is torch.int8 \[24, 19\], expected uint8 \[24, 19\]"),
    "values for another k": ({"values": V[:, 1:]}, r"values is torch.uint8 \[24, 18\], expected uint8 \[24, 19\]"),
    "a vector": ({"values": V[0]}, r"values is torch.uint8 \[19\], expected uint8 \[1, 19\]"),
    "no rows": ({"values": V[:0], "scale": S[:0], "zero_point": Z[:0]}, r"the weight is \[0, 37\], expected at least one row"),
    "a 38th integer": ({"values": V | 0x10}, "values has bits set behind the last of 37 integers, expected zeros"),
    "a third zero point": ({"k": 38, "group": 64, "scale": S[:, :1], "zero_point": Z | 0x10}, "zero_point has bits set behind"),
    "float32 scales": ({"scale": S.float()}, r"scale is torch.float32 \[24, 2\], expected bfloat16 \[24, 2\]"),
    "too few scales": ({"scale": S[:, :1]}, r"scale is torch.bfloat16 \[24, 1\], expected bfloat16 \[24, 2\]"),
    "too many zero points": ({"zero_point": Z.repeat(1, 2)}, r"zero_point is torch.uint8 \[24, 2\], expected uint8 \[24, 1\]"),
    "signed zero points": ({"zero_point": Z.short()}, r"zero_point is torch.int16 \[24, 1\]"),
    "k 0": ({"k": 0}, "in_features is 0, expected 1 to 65536"),
    "k 65537": ({"k": 65537}, "in_features is 65537, expected 1 to 65536"),
    "group 16": ({"group": 16}, "group is 16, expected 32, 64 or 128"),
    "group 0": ({"group": 0}, "group is 0, expected 32, 64 or 128"),
    "7 bits": ({"activation_bits": 7}, "activation_bits is 7, expected 8 or 16"),
    **{
        f"a scale of {scale}": ({"scale": torch.full_like(S, scale)}, "a scale is not between 2.-126 and 2.124")
        for scale in (0.0, -1.0, math.nan, math.inf, 2.0**-127, 2.0**125)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_pack_refuses(case: str) -> None:
    change, message = BROKEN[case]
    given = {"values": V, "scale": S, "zero_point": Z, "k": 37, "group": 32, "activation_bits": 8, **change}
    with pytest.raises(ValueError, match=f"int4_pack: {message}"):
        ops.int4_pack(**given)


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return type(error).__name__
    return "result"


def outcomes(packed: Tensor) -> set[str]:
    """What the ops make of a packed buffer of a weight [24, 40]."""
    x = torch.ones(5, 40)
    calls: list[Callable[[], object]] = [
        lambda: ops.int4_linear(x, packed, 24),
        lambda: ops.int4_linear(x[:1], packed, 24),
        lambda: ops.int4_unpack(packed, 24, 40, 32, False),
        lambda: ops.int4_dense(packed, 24, 40),
        lambda: ops.int4_header(packed),
    ]
    return {outcome(call) for call in calls}


@BITS
def test_buffers_that_no_pack_made(bits: int, forked: Forked) -> None:
    """A packed buffer is made by this process, but an exported program may carry one in a file: an error, never a crash."""
    packed = weight(24, 40, bits=bits).pack()
    broken = {
        "empty": packed[:0], "header only": packed[:40], "truncated": packed[:-1], "zeros": torch.zeros_like(packed),
        "too long": torch.cat([packed, packed]), "float32": packed.float(), "two dimensions": packed[None],
        "every second byte": torch.stack([packed, packed], 1).flatten()[::2],
        "of the int8 op": ops.int8_pack(torch.ones(24, 40, dtype=torch.int8), 16),
    }  # fmt: skip

    def run() -> dict[str, set[str]]:
        for position, value in itertools.product(range(80), (0, 1, 0x7F, 0x80, 0xFF)):
            edited = packed.clone()
            edited[position] = value
            outcomes(edited)
        return {name: outcomes(buffer) for name, buffer in broken.items()}

    for name, found in forked(run).items():
        assert found == {"ValueError"}, name


def test_int8_buffers_for_16_bits_that_no_pack_made(forked: Forked) -> None:
    packed = ops.int8_pack(torch.ones(24, 40, dtype=torch.int8), 16)

    def run() -> int:
        x, scale = torch.ones(5, 40), torch.ones(24)
        for position, value in itertools.product(range(80), (0, 1, 0x7F, 0x80, 0xFF)):
            edited = packed.clone()
            edited[position] = value
            outcome(lambda: ops.int8_linear(x, edited, scale))  # noqa: B023
            outcome(lambda: ops.int8_linear(x[:1], edited, scale))  # noqa: B023
            outcome(lambda: ops.int8_unpack(edited))  # noqa: B023
            outcome(lambda: ops.int8_accumulate(x, edited))  # noqa: B023
        return 0

    assert forked(run) == 0


def test_a_buffer_on_another_device_is_refused(forked: Forked) -> None:
    """A meta tensor has no memory, so reading it would be a crash. (All of them on meta have a fake result.)"""
    packed, x = weight(24, 40).pack(), torch.ones(3, 40)
    calls: list[Callable[[], object]] = [
        lambda: ops.int4_linear(x, packed.to("meta"), 24),
        lambda: ops.int4_linear(x, packed, 24, torch.ones(24, device="meta")),
        lambda: ops.int4_header(packed.to("meta")),
    ]
    assert "result" not in forked(lambda: [outcome(call) for call in calls])
