"""The int4 ops and weight-only int8, on the native kernels and on their twin: to the bit where the contract leaves one order,
inside the derived bound where it does not. (What every op promises is in contract/test_ops.py.)"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from contract.packed import EPS, gamma
from packing import Packed, backend, pack_int4, pack_int8, pack_low_rank  # noqa: F401
from torch import Tensor

from pycompress import ops

pytestmark = pytest.mark.usefixtures("backend")
Same = Callable[[Tensor, Tensor], bool]
Sample = Callable[[Sequence[Any], int], Sequence[Any]]
Array = np.ndarray[Any, Any]

# Around the tile: 4 rows x 16 channels, units of 32 positions, groups of 32, 64 and 128, blocks of 1024.
NS = [1, 15, 16, 17, 35]
KS = [1, 31, 32, 33, 65, 127, 128, 129, 1023, 1024, 1025, 2051]
ROWS = [0, 1, 2, 3, 4, 5, 9, 67]
SCHEMES = [(group, symmetric) for group in (32, 64, 128) for symmetric in (False, True)]
EVERY = pytest.mark.parametrize(("group", "symmetric"), SCHEMES)


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
        """As `pack_int4` takes them."""
        return nibbles(self.values), self.scale, None if self.zero_point is None else nibbles(self.zero_point)

    def pack(self) -> Packed:
        return pack_int4(*self.parts(), self.shape[1], self.group, self.bits)

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


def test_the_dense_weight_is_exact() -> None:
    """All of value, zero point and scale's end points: no product of 4 and 8 bits is rounded."""
    values, zeros = (
        np.repeat(a, 32, 1) for a in np.meshgrid(np.arange(16, dtype=np.uint8), np.arange(16, dtype=np.uint8))
    )
    for power in (-126, 0, 124):
        scale = torch.full((16, 16), 2.0**power * (1.9921875 if power < 124 else 1)).bfloat16()
        w = Weight(values, scale, zeros[:, ::32].copy(), 32, 16)
        dense = ops.dense("int4", *w.pack())
        assert dense.isfinite().all() and torch.equal(dense.double(), w.dense())


# --- activations of 8 bits: to the bit ----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("k", KS)
def test_result_equals_the_formula(group: int, symmetric: bool, k: int, same: Same, sample: Sample) -> None:
    for n in sample(NS, 3):
        w, bias = weight(n, k, group, symmetric), torch.randn(n)
        packed, x = w.pack(), torch.randn(ROWS[-1], k) * torch.logspace(-20, 20, ROWS[-1])[:, None]
        plain, biased = formula(x, w), formula(x, w, bias)
        for m in ROWS:
            offset, expected = (bias, biased) if m % 2 else (None, plain)
            assert same(ops.int4_linear(x[:m], *packed, offset), expected[:m]), (n, m)


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
        assert same(ops.int4_linear(EXTREME[:m], *packed), expected[:m])


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
            assert same(ops.int4_linear(x[:m], *packed), formula(x[:m], w))


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
            assert np.array_equal(ops.int4_linear(x[:m].float(), *packed), expected[:m])


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
        assert same(ops.int4_linear(x[:m], *w.pack()), expected[:m])


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
            assert same_but_nan(ops.int4_linear(x, *one.pack()), formula(x, one))


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
        packed = pack_int8(values, 16, scale)
        return WeightOnly(
            values.double() * scale.double()[:, None], lambda x, *rest: ops.int8_linear(x, *packed, *rest)
        )
    w = weight(n, k, abs(int(kind)), int(kind) < 0, 16)
    w = w._replace(scale=torch.ones_like(w.scale)) if exact else w
    packed4 = w.pack()
    return WeightOnly(w.dense(), lambda x, *rest: ops.int4_linear(x, *packed4, *rest))


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
    values, scale = torch.randint(-127, 128, (35, 130), dtype=torch.int8), torch.ones(35)
    packed = pack_int8(values, 16)
    assert ops.int8_depths(*packed) == {"n": 35, "k": 130, "activation_bits": 16, "groups": 0, "items": (0, 0, 0)}
    with pytest.raises(ValueError, match="int8_accumulate: the packed weight's activation_bits is 16, expected 7 or 8"):
        ops.int8_accumulate(torch.ones(2, 130), *packed)
    with pytest.raises(ValueError, match="int8_quantize: activation_bits is 16, expected 7 or 8"):
        ops.int8_quantize(torch.ones(2, 3), 16)
    down, up, beside = torch.ones(3, 130), torch.ones(35, 3), {"values": values, "scale": scale}
    with pytest.raises(ValueError, match="low_rank_pack: the residual's activation_bits is 16, expected 7 or 8"):
        pack_low_rank(down, up, residual="int8", settings={"activation_bits": 16}, **beside)


def test_other_kernels_give_the_same_bits(backend: str) -> None:  # noqa: F811
    if backend == "twin":
        pytest.skip("the twin has one kernel")
    for (group, symmetric), (n, k) in itertools.product(SCHEMES, [(5, 3), (35, 1057), (48, 130)]):
        w, x, bias = weight(n, k, group, symmetric), torch.cat([extreme_rows(k), torch.randn(6, k)]), torch.randn(n)
        results = []
        for name in dict.fromkeys(row["name"] for row in ops.kernels() if row["op"] == "int4" and row["available"]):
            with ops.forced("int4", name):
                packed = w.pack()
                results.append(
                    {
                        (code, m): ops.int4_linear(x[:m], *packed, bias, code)
                        for code in ops.ACTIVATIONS
                        for m in (1, len(x))
                    }
                )
        for found, case in itertools.product(results[1:], results[0]):
            y, expected = found[case], results[0][case]
            nan = expected.isnan()  # the sign of a NaN is left to the processor
            assert torch.equal(y.isnan(), nan), case
            assert torch.equal(y[~nan].view(torch.int32), expected[~nan].view(torch.int32)), case


@pytest.mark.parametrize("change", [("k=20", "k=21"), ("group=32", "group=64"), ("symmetric=0", "symmetric=1")])
def test_a_form_that_is_not_the_buffers(change: tuple[str, str]) -> None:
    packed, form = weight(24, 20).pack()
    name, now = change[1].split("=")
    said = rf"int4_unpack: the packed weight has .*'{name}': .* its form says .*'{name}': {now}"
    for use in (ops.unpack, ops.dense):
        with pytest.raises(ValueError, match=said):
            use("int4", packed, form.replace(*change))


# --- bad input ----------------------------------------------------------------------------------------------------------


V, S, Z = weight(24, 37).parts()
assert Z is not None
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "values in int8": ({"values": V.to(torch.int8)}, r"values is torch.int8 \[24, 19\], expected uint8 \[24, 19\]"),
    "values for another k": ({"values": V[:, 1:]}, r"values is torch.uint8 \[24, 18\], expected uint8 \[24, 19\]"),
    "a vector": ({"values": V[0]}, r"values is torch.uint8 \[19\], expected uint8 \[19, 19\]"),
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
    "7 bits": ({"bits": 7}, "activation_bits is 7, expected 8 or 16"),
    **{
        f"a scale of {scale}": ({"scale": torch.full_like(S, scale)}, "a scale is not between 2.-126 and 2.124")
        for scale in (0.0, -1.0, math.nan, math.inf, 2.0**-127, 2.0**125)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_pack_refuses(case: str) -> None:
    change, message = BROKEN[case]
    given = {"values": V, "scale": S, "zero_point": Z, "k": 37, "group": 32, "bits": 8, **change}
    with pytest.raises(ValueError, match=f"int4_pack: {message}"):
        pack_int4(**given)
