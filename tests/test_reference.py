"""The numba twin: the same bits as the native kernels, and a full stand-in where no extension was built."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing import backends, pack_int4, pack_int8, pack_low_rank
from torch import Tensor

import pycompress
from pycompress import ops, reference

Same = Callable[[Tensor, Tensor], bool]
Python = Callable[..., subprocess.CompletedProcess[str]]

native = pytest.mark.skipif(ops.extension_error() is not None, reason="no extension was built to compare with")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def twin() -> Callable[..., Any]:
    """``twin(call)``: the result of ``call()`` with the ops on the numba twin."""

    def run(call: Callable[[], Any]) -> Any:
        with backends("twin"):
            return call()

    return run


def rows(k: int) -> Tensor:
    """Ordinary rows, extreme rows, rows with NaN and Inf."""
    biggest = torch.finfo(torch.float32).max
    x = torch.randn(14, k) * torch.logspace(-30, 30, 14)[:, None]
    x[1], x[2], x[3] = 0, 1e-45, 2.0**-100
    x[4], x[5] = biggest, -biggest
    x[6, 0], x[7, -1], x[8, k // 2] = math.nan, math.inf, -math.inf
    x[9] = torch.rand(k) + 3
    x[10] = -torch.rand(k) - 3
    x[11] = torch.arange(k) / 2
    return x


@native
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("k", [1, 4, 33, 130])
@pytest.mark.parametrize("dtype", FLOATS)
def test_same_integers(bits: int, k: int, dtype: torch.dtype, twin: Callable[..., Any]) -> None:
    values = torch.randint(-127, 128, (21, k), dtype=torch.int8)
    x = rows(k).to(dtype)

    def run() -> tuple[Tensor, ...]:
        packed = pack_int8(values, bits)
        integers = (
            *ops.int8_quantize(x, bits),
            *ops.int8_accumulate(x, *packed),
            ops.unpack("int8", *packed)["values"],
        )
        return (*integers, ops.int8_round(x, bits))

    for got, expected in zip(twin(run), run(), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got.numpy(), expected.numpy())


@native
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "hardswish"])
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_same_bits_of_y(
    activation: str, bits: int, dtype: torch.dtype, with_bias: bool, twin: Callable[..., Any], same: Same
) -> None:
    values = torch.randint(-127, 128, (21, 70), dtype=torch.int8)
    scale, bias = torch.rand(21) / 100 + 1e-4, torch.randn(21) if with_bias else None
    x = rows(70).to(dtype)

    def run() -> Tensor:
        return ops.int8_linear(x, *pack_int8(values, bits, scale), bias, activation)

    got, expected = twin(run), run()
    nan = torch.isnan(expected)  # the sign of a NaN is left to the processor
    assert torch.equal(torch.isnan(got), nan)
    assert same(got[~nan], expected[~nan])


@native
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "quick_gelu"])
def test_smooth_activations_within_their_bound(activation: str, twin: Callable[..., Any]) -> None:
    """The twin has the exact functions; the kernels stay within 8 ulp of their argument (test_int8_ops derives it)."""
    values = torch.zeros(4001, 3, dtype=torch.int8)
    bias = torch.linspace(-40, 40, 4001)

    def run() -> Tensor:
        return ops.int8_linear(torch.zeros(1, 3), *pack_int8(values), bias, activation)[0]

    assert ((twin(run) - run()).abs() <= bias.abs() * 8 * 2**-23 + 1e-44).all()


@native
def test_same_errors(twin: Callable[..., Any]) -> None:
    values = torch.ones(3, 4, dtype=torch.int8)

    def message(call: Callable[[], object]) -> str:
        with pytest.raises(ValueError) as error:
            call()
        return str(error.value)

    def messages() -> list[str]:
        packed = pack_int8(values)
        return [
            message(lambda: ops.int8_linear(torch.ones(2, 5), *packed)),
            message(lambda: pack_int8(values, 8, torch.ones(2))),
            message(lambda: pack_int8(values, 6)),
            message(lambda: pack_int8(-127 - values)),
            message(lambda: ops.int8_quantize(torch.ones(2, 3), 9)),
            message(lambda: ops.int8_round(torch.ones(2, 3), 9)),
            message(lambda: pack_int8(values, kernel="avx9")),
            *low_rank_messages(),
            *int4_messages(),
        ]

    def low_rank_messages() -> list[str]:
        down, up, scale = torch.ones(2, 4), torch.ones(3, 2), torch.ones(3)
        packed, form = pack_low_rank(down, up)
        linear, sparse = ops.low_rank_linear, {"mask": torch.full((3, 1), 15).byte(), "values": torch.ones(12)}
        return [
            message(lambda: linear(torch.ones(2, 5), packed, form)),
            message(lambda: linear(torch.ones(2, 4), packed, form.replace("n=3", "n=4"))),
            message(lambda: pack_low_rank(down, up, None, None, 8)),
            message(lambda: pack_low_rank(values.new_ones(2, 4), values.new_ones(3, 2), scale[:2], scale, 9)),
            message(lambda: pack_low_rank(torch.ones(4, 4), torch.ones(3, 4))),
            message(lambda: pack_low_rank(torch.ones(2, 65537), up)),
            message(lambda: pack_low_rank(down, up, residual="sparse", scale=scale, **sparse)),
        ]

    def int4_messages() -> list[str]:
        packed, form = pack_int4(torch.zeros(3, 2).byte(), torch.ones(3, 1).bfloat16(), None, 4, 32, 8)
        none = torch.zeros(0, 2).byte(), torch.ones(0, 1).bfloat16(), None, 4, 32, 8
        return [
            message(lambda: ops.int4_linear(torch.ones(2, 5), packed, form)),
            message(lambda: ops.int4_linear(torch.ones(2, 4), packed, form.replace("n=3", "n=4"))),
            message(lambda: pack_int4(torch.zeros(3, 2).byte(), torch.ones(3, 1).bfloat16(), None, 4, 32, 7)),
            message(lambda: pack_int4(*none)),
            message(lambda: ops.unpack("int4", packed[1:].clone(), form)),
            message(lambda: ops.int8_linear(torch.ones(2, 5), *pack_int8(values, 16))),
            message(lambda: pack_low_rank(
                torch.ones(2, 4), torch.ones(3, 2), residual="int8", settings={"activation_bits": 16}, values=values,
                scale=torch.ones(3),
            )),
        ]  # fmt: skip

    assert twin(messages) == messages()


def test_truncated_and_random_buffers(twin: Callable[..., Any]) -> None:
    def run() -> None:
        packed, form = pack_int8(torch.ones(3, 4, dtype=torch.int8))
        for broken in (packed[:0], packed[:10], packed[:-1], torch.zeros_like(packed), torch.cat([packed, packed])):
            what = "unknown format" if broken.numel() < 12 else "packed int8 weight"
            for use in (ops.int8.OP.unpack, ops.int8_depths, lambda *own: ops.int8_linear(torch.ones(2, 4), *own)):
                with pytest.raises(ValueError, match=what):
                    use(broken.clone(), form)

    twin(run)


def test_strides(twin: Callable[..., Any], same: Same) -> None:
    def run() -> None:
        packed = pack_int8(torch.randint(-127, 128, (5, 6), dtype=torch.int8))
        wide = torch.randn(4, 9)
        for x in (wide[:, :6], wide[:, 3:], wide[::2, :6], wide.T[:6].T):
            expected = ops.int8_linear(x.contiguous(), *packed)
            assert same(ops.int8_linear(x, *packed), expected)

    twin(run)


def test_no_rows(twin: Callable[..., Any]) -> None:
    def run() -> None:
        packed = pack_int8(torch.ones(5, 6, dtype=torch.int8))
        assert ops.int8_accumulate(torch.ones(0, 6), *packed)[0].shape == (0, 5)
        assert ops.int8_linear(torch.ones(0, 6), *packed).shape == (0, 5)
        assert [t.shape for t in ops.int8_quantize(torch.ones(0, 6), 8)] == [(0, 6), (0,), (0,)]

    twin(run)


def test_linear_is_the_composition_of_its_parts() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 12), np.float32)
    w = rng.integers(-127, 128, (7, 12), np.int8)
    scale, bias = rng.random(7, np.float32), rng.standard_normal(7, np.float32)
    for bits in (7, 8):
        q, row_scale, zero = reference.int8.quantize(x, 2**bits - 1)
        acc = reference.int8.accumulate(q, zero, w)
        np.testing.assert_array_equal(acc, (q.astype(np.int64) - zero[:, None]) @ w.astype(np.int64).T)
        expected = acc.astype(np.float32) * row_scale[:, None] * scale
        np.testing.assert_array_equal(reference.int8.linear(x, w, scale, activation_bits=bits), expected)
        np.testing.assert_array_equal(reference.int8.linear(x, w, scale, bias, activation_bits=bits), expected + bias)
        relu = reference.int8.linear(x, w, scale, bias, activation_bits=bits, code=ops.ACTIVATIONS["relu"])
        np.testing.assert_array_equal(relu, np.maximum(expected + bias, 0))


@pytest.mark.parametrize("code", ops.ACTIVATIONS.values())
def test_activations_keep_nan_and_end_in_zero(code: int) -> None:
    activate, relu6, hardswish = reference.activation.activate, ops.ACTIVATIONS["relu6"], ops.ACTIVATIONS["hardswish"]
    assert math.isnan(activate(code, math.nan))
    largest = {relu6: 6.0, hardswish: math.inf}.get(code, 3e38)  # 6 times as much is no float32 number
    assert activate(code, 3e38) == pytest.approx(largest)
    assert activate(code, -3e38) == (0 if code else -3e38)
    assert activate(code, math.inf) == (6 if code == relu6 else math.inf)
    assert math.isnan(activate(code, -math.inf)) or code < 2 or code == relu6, "-Inf times 0, as the kernels have it"


# --- sparse -------------------------------------------------------------------------------------------------------------


def rounded(exact: Fraction) -> np.float32:
    """The float32 number next to a fraction, ties to even. float(Fraction) is correctly rounded, and close enough to start."""
    start = np.float32(float(exact))
    around = [np.nextafter(start, np.float32(-np.inf)), start, np.nextafter(start, np.float32(np.inf))]
    return min(around, key=lambda number: (abs(Fraction(float(number)) - exact), int(number.view(np.int32)) & 1))


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    cases = rng.standard_normal((2000, 3)).astype(np.float32)
    cases[:500, 2] *= np.float32(2.0) ** rng.integers(-60, 60, 500, dtype=np.int32)
    cases[500:1000, :2] *= np.float32(1e-21)  # subnormal products
    cases[1000:1500, 2] = -(cases[1000:1500, 0] * cases[1000:1500, 1])  # what one rounding left over
    cases[1500:1600] *= np.float32(1e-30)  # subnormal sums
    for a, b, c in cases:
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        assert reference.chain.fma(a, b, c) == rounded(exact), (a, b, c)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tail", [2.0**-60, -(2.0**-60)])
def test_fma_where_two_roundings_differ_from_one(sign: int, tail: float) -> None:
    """The sum lies beside the middle of two float32 numbers, by less than float64 can say."""
    one = np.float32(1 + 2.0**-12)
    middle = Fraction(float(one)) ** 2  # 1 + 2^-11 + 2^-24
    addend = np.float32(tail)
    expected = rounded(sign * (middle + Fraction(float(addend))))
    assert reference.chain.fma(one * sign, one, addend * sign) == expected
    naive = np.float32(np.float64(one * sign) * np.float64(one) + np.float64(addend * sign))
    assert (naive != expected) == (tail > 0), "the case is one that float64 alone gets wrong"


def test_fma_of_zeros_infinities_and_nan() -> None:
    f32, fma = np.float32, reference.chain.fma
    big, zero = np.finfo(np.float32).max, f32(0)
    assert fma(big, big, zero) == math.inf and fma(big, -big, zero) == -math.inf
    assert fma(big, f32(1), big * f32(2.0**-25)) == big, "half a step is not reached"
    assert fma(big, f32(2), -big) == big
    assert fma(f32(math.inf), f32(2), big) == math.inf
    for a, b, c in [(math.inf, 0, 1), (math.inf, 1, -math.inf), (math.nan, 1, 1), (1, 1, math.nan)]:
        assert math.isnan(fma(f32(a), f32(b), f32(c)))
    assert math.copysign(1, fma(f32(-1), zero, -zero)) == -1 and math.copysign(1, fma(f32(1), f32(1), f32(-1))) == 1


def sparse_weight(n: int, k: int, dtype: Any) -> tuple[Any, Any, Any]:
    """A random weight [n, k] with zeros, its mask and its values."""
    rng = np.random.default_rng(n * k)
    dense = (rng.standard_normal((n, k)) * 40 * (rng.random((n, k)) < 0.4)).astype(dtype)
    return dense, np.packbits(dense != 0, axis=1, bitorder="little"), dense[dense != 0]


@pytest.mark.parametrize("k", [1, 7, 8, 9, 64, 131])
def test_sparse_accumulate_is_the_chain(k: int) -> None:
    dense, mask, values = sparse_weight(11, k, np.float32)
    x = np.random.default_rng(1).standard_normal((4, k)).astype(np.float32)
    expected = np.zeros((4, 11), np.float32)
    for i in range(4):
        for j in range(11):
            for p in np.flatnonzero(dense[j]):
                expected[i, j] = reference.chain.fma(x[i, p], dense[j, p], expected[i, j])
    acc = reference.sparse.accumulate(x, mask, values)
    np.testing.assert_array_equal(acc, expected)
    bias = np.arange(11, dtype=np.float32)
    np.testing.assert_array_equal(reference.sparse.linear(x, mask, values), expected)
    np.testing.assert_array_equal(
        reference.sparse.linear(x, mask, values, bias, code=1), np.maximum(expected + bias, 0)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
@pytest.mark.parametrize("k", [1, 7, 8, 9, 64, 131])
def test_sparse_decompress_and_count(dtype: Any, k: int) -> None:
    dense, mask, values = sparse_weight(11, k, dtype)
    assert reference.sparse.count(mask) == len(values)
    np.testing.assert_array_equal(reference.sparse.decompress(mask, values, k), dense)


# --- low rank -----------------------------------------------------------------------------------------------------------


def test_low_rank_product_is_the_chain() -> None:
    """From its start on, in ascending k; so two chains one behind the other are one."""
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal((4, 19), np.float32), rng.standard_normal((7, 19), np.float32)
    weight[2, 3:9] = 0  # multiplied like any other
    start = rng.standard_normal((4, 7), np.float32)
    expected = start.copy()
    for i in range(4):
        for j in range(7):
            for p in range(19):
                expected[i, j] = reference.chain.fma(x[i, p], weight[j, p], expected[i, j])
    product = reference.chain.product
    np.testing.assert_array_equal(product(x, weight, start), expected)
    half = product(x[:, :8].copy(), weight[:, :8].copy(), start)
    np.testing.assert_array_equal(product(x[:, 8:].copy(), weight[:, 8:].copy(), half), expected)
    x[1, 4] = np.inf
    assert np.isnan(product(x, weight, start)[1, 2]) and np.isfinite(product(x, weight, start)[[0, 2, 3]]).all()


@pytest.mark.parametrize("with_bias", [False, True])
def test_low_rank_steps(with_bias: bool) -> None:
    rng = np.random.default_rng(3)
    x, nothing = rng.standard_normal((5, 12), np.float32), np.empty(0, np.float32)
    bias = rng.standard_normal(7, np.float32) if with_bias else None
    first = np.zeros((5, 7), np.float32) if bias is None else np.tile(bias, (5, 1))
    low_rank = reference.low_rank
    down, up = rng.standard_normal((3, 12), np.float32), rng.standard_normal((7, 3), np.float32)
    t = low_rank.intermediate(x, down, nothing)
    np.testing.assert_array_equal(t, reference.chain.product(x, down, np.zeros((5, 3), np.float32)))
    np.testing.assert_array_equal(low_rank.expand(t, up, nothing, bias), reference.chain.product(t, up, first))
    for bits in (7, 8):
        down, up = (rng.integers(-127, 128, shape, np.int8) for shape in ((3, 12), (7, 3)))
        scales = rng.random(3, np.float32), rng.random(7, np.float32)
        t = low_rank.intermediate(x, down, scales[0], activation_bits=bits)
        np.testing.assert_array_equal(t, reference.int8.linear(x, down, scales[0], activation_bits=bits))
        y = low_rank.expand(t, up, scales[1], bias, activation_bits=bits)
        np.testing.assert_array_equal(y, reference.int8.linear(t, up, scales[1], bias, activation_bits=bits))


@native
@pytest.mark.parametrize("rows_of_x", [4, 6, 30])
def test_many_rows_have_the_bits_of_the_chains(rows_of_x: int, twin: Callable[..., Any], same: Same) -> None:
    """The contract leaves one order for more rows than three: float32, with and without a dense residual."""
    down, up, residual, bias = torch.randn(9, 200), torch.randn(21, 9), torch.randn(21, 200), torch.randn(21)
    x = torch.randn(rows_of_x, 200)

    def run() -> list[Tensor]:
        packed = pack_low_rank(down, up), pack_low_rank(down, up, residual="dense", weight=residual)
        return [ops.low_rank_linear(x, *one, bias) for one in packed]

    assert all(same(got, expected) for got, expected in zip(twin(run), run(), strict=True))


# --- int4 and weight-only -----------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("k", [1, 33, 128, 1057])
@pytest.mark.parametrize("dtype", FLOATS)
def test_int4_has_the_bits_of_the_kernels(k: int, dtype: torch.dtype, twin: Callable[..., Any], same: Same) -> None:
    groups, x = -(-k // 64), rows(k).to(dtype)
    values = torch.randint(0, 256, (21, -(-k // 2)), dtype=torch.uint8)
    values[:, -1] &= 0x0F if k % 2 else 0xFF
    scale, zeros = (torch.rand(21, groups) + 0.01).bfloat16(), torch.randint(0, 256, (21, -(-groups // 2))).byte()
    zeros[:, -1] &= 0x0F if groups % 2 else 0xFF
    bias = torch.randn(21)

    def run() -> list[Tensor]:
        packed = pack_int4(values, scale, zeros, k, 64, 8)
        linears = [ops.int4_linear(x[:m], *packed, bias, "relu") for m in (1, len(x))]
        return [ops.dense("int4", *packed), *linears]

    for got, expected in zip(twin(run), run(), strict=True):
        nan = expected.isnan()  # the sign of a NaN is left to the processor
        assert torch.equal(got.isnan(), nan)
        assert same(got[~nan], expected[~nan])


def test_int4_nibbles_and_zero_points() -> None:
    packed = np.array([[0x21, 0x43], [0x65, 0x07]], np.uint8)
    np.testing.assert_array_equal(reference.int4.unpack_nibbles(packed, 4), [[1, 2, 3, 4], [5, 6, 7, 0]])
    np.testing.assert_array_equal(reference.int4.unpack_nibbles(packed, 3), [[1, 2, 3], [5, 6, 7]])
    np.testing.assert_array_equal(reference.int4.zero_points(packed, 2, 3), [[1, 2, 3], [5, 6, 7]])
    np.testing.assert_array_equal(reference.int4.zero_points(None, 2, 3), np.full((2, 3), 8))


def test_int4_steps() -> None:
    """Each against one line of NumPy; the fused multiply-adds against fma, which the fractions have proven."""
    rng = np.random.default_rng(4)
    m, n, k, group = 3, 5, 70, 32
    x, values = rng.standard_normal((m, k), np.float32), rng.integers(0, 16, (n, k), np.uint8)
    scale, zeros = rng.random((n, 3), np.float32), rng.integers(0, 16, (n, 3), np.uint8)
    q, row_scale, row_zero = reference.int8.quantize(x, 255)
    v = reference.int4.accumulate(q, values, scale, zeros, group)
    for i in range(m):
        for j in range(n):
            expected = np.float32(0)
            for g in range(3):
                here = slice(g * group, (g + 1) * group)
                t = (q[i, here].astype(np.int64) * (values[j, here].astype(np.int64) - int(zeros[j, g]))).sum()
                assert reference.int4.dots(q, values[j], zeros[j], group)[i, g] == t
                expected = reference.chain.fma(np.float32(t), scale[j, g], expected)
            assert v[i, j] == expected
    bias, linear = rng.standard_normal(n, np.float32), reference.int4.linear
    offset = reference.int4.accumulate(np.ones((1, k), np.uint8), values, scale, zeros, group)[0]
    u = [[reference.chain.fma(-np.float32(row_zero[i]), offset[j], v[i, j]) for j in range(n)] for i in range(m)]
    expected = np.array(u, np.float32) * row_scale[:, None] + bias
    np.testing.assert_array_equal(linear(x, values, scale, zeros, group, bias), expected)
    dense = reference.int4.decompress(values, scale, zeros, group)
    spread = np.repeat(np.arange(3), group)[:k]
    np.testing.assert_array_equal(dense, (values - zeros[:, spread].astype(np.float32)) * scale[:, spread])
    np.testing.assert_array_equal(
        linear(x, values, scale, zeros, group, bias, activation_bits=16, code=1),
        np.maximum(reference.chain.product(x, dense, np.zeros((m, n), np.float32)) + bias, 0),
    )


def test_weight_only_steps() -> None:
    rng = np.random.default_rng(5)
    x, values = rng.standard_normal((4, 9), np.float32), rng.integers(-127, 128, (6, 9)).astype(np.float32)
    scale, bias = rng.random(6, np.float32), rng.standard_normal(6, np.float32)
    sums, linear = reference.chain.product(x, values, np.zeros((4, 6), np.float32)), reference.weight_only.linear
    np.testing.assert_array_equal(linear(x, values), sums)
    np.testing.assert_array_equal(linear(x, values, bias, scale=scale), sums * scale + bias)


# The kernels against the twin, and both against float64 and int64: test_sparse_ops, test_low_rank_ops and test_int4_ops.


# --- without the extension ----------------------------------------------------------------------------------------------

WITHOUT = """
import torch
from torch import nn
import pycompress as pc
from pycompress import ops
from pycompress.methods.low_rank import LowRank
from pycompress.nn import Int4Linear, Int8Linear, LowRankLinear, SparseLinear

reason = ops.extension_error()
assert reason and "_C" in reason, reason
found = {kernel["op"]: kernel["name"] for kernel in ops.kernels() if kernel["available"]}
expected = ("dense", "embed", "int4", "int8", "int8_conv2d", "pool", "recurrent", "sparse", "weight_only")
assert found == dict.fromkeys(expected, "numba"), found
case = torch.load(sys.argv[1])
parts = {"values": case["values"], "scale": torch.ones(24)}
packed = ops.pack("int8", parts, (24, 40), {"activation_bits": 8})
assert torch.equal(ops.unpack("int8", *packed)["values"], case["values"])
got = (*ops.int8_quantize(case["x"], 8), ops.int8_accumulate(case["x"], *packed)[0])
assert all(torch.equal(a, b) for a, b in zip(got, case["integers"]))
layer = Int8Linear.from_dense(nn.Linear(40, 24), pc.Int8(activation_bits=7), "gelu")
assert layer(torch.randn(2, 3, 40)).shape == (2, 3, 24)
assert layer(torch.randn(2, 40).bfloat16()).dtype == torch.bfloat16
target = Int8Linear.from_dense(nn.Linear(40, 24), pc.Int8(activation_bits=7), "gelu")
target.load_state_dict(layer.state_dict())
x = torch.randn(2, 40)
assert torch.equal(target(x), layer(x))
model = pc.compress(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)), pc.Int8())
assert model(x).shape == (2, 5)
thin = {"rank": 4, "rank_guard": False}
for kind, method in (
    (SparseLinear, pc.Sparse(density=0.3)), (SparseLinear, pc.Sparse(density=0.3, bits=8)),
    (SparseLinear, pc.Sparse(pattern="2:4", bits=8, activation_bits=8)), (LowRankLinear, LowRank(**thin)),
    (LowRankLinear, LowRank(**thin, residual=pc.Int8())), (LowRankLinear, LowRank(**thin, bits=8, residual=pc.Sparse(0.3))),
    (Int4Linear, pc.Int4()), (Int4Linear, pc.Int4(64, symmetric=True, activation_bits=16)),
    (Int8Linear, pc.Int8(activation_bits=16)),
):
    layer = kind.from_dense(nn.Linear(40, 24), method, "relu")
    y = layer(torch.randn(2, 3, 40))
    assert y.shape == (2, 3, 24) and y.isfinite().all()
    target = kind.from_dense(nn.Linear(40, 24), method, "relu")
    target.load_state_dict(layer.state_dict())
    assert torch.equal(target(x), layer(x))
print(reason)
"""
ABSENT = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
sys.path.insert(0, sys.argv[2])
import pycompress
assert pycompress.__file__.startswith(sys.argv[2]), pycompress.__file__
"""


@pytest.fixture
def case(tmp_path: Path) -> Path:
    values = torch.randint(-127, 128, (24, 40), dtype=torch.int8)
    x = torch.randn(6, 40)
    integers = (*ops.int8_quantize(x, 8), ops.int8_accumulate(x, *pack_int8(values))[0])
    torch.save({"values": values, "x": x, "integers": integers}, tmp_path / "case.pt")
    return tmp_path / "case.pt"


@pytest.mark.slow
def test_import_without_a_place_for_the_cache_of_numba(python: Python) -> None:
    """An unprivileged user, a package that is not theirs and no home: nothing can be cached, and nothing need be."""
    result = python(
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import numpy\n"
        "from pycompress import reference\n"
        "reference.int8.quantize(numpy.zeros((1, 4), numpy.float32), 255)",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_with_the_extension_absent(case: Path, tmp_path: Path, python: Python) -> None:
    """The package as it is where no compiler was found: no file of that name at all."""
    source = Path(pycompress.__file__).parent
    shutil.copytree(
        source, tmp_path / "site" / "pycompress", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    )
    result = python(ABSENT + WITHOUT, case, tmp_path / "site")
    assert result.returncode == 0, result.stderr
