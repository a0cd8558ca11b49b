"""The int8 ops: the integers against NumPy, the formula to the bit; and forms, which are read as they are written.

What every op promises is in contract/test_ops.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from isa import isa  # noqa: F401
from packing import Packed, pack_int8
from torch import Tensor, nn

from pycompress import ops

pytestmark = pytest.mark.usefixtures("isa")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
Same = Callable[[Tensor, Tensor], bool]
SMOOTH = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
    "silu": nn.functional.silu,
    "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
}


def weights(n: int, k: int, bits: int = 8) -> tuple[Tensor, Packed, Tensor, Tensor]:
    """Random values int8 [n, k], what they are packed into with their scale, the scale, and a bias."""
    values, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) / 127 + 1e-3
    return values, pack_int8(values, bits, scale), scale, torch.randn(n)


# --- the formula, in NumPy --------------------------------------------------------------------------------------------


def quantized(x: Tensor, bits: int) -> tuple[Any, Any, Any]:
    """q, scale and zero point of float rows, as the contract in csrc/int8/gemm.h states them, float32 step by step."""
    f32, amax = np.float32, 2**bits - 1
    rows = x.float().numpy()
    finite = np.isfinite(rows).all(1)
    rows = np.where(finite[:, None], rows, f32(0))
    low, high = rows.min(1, initial=0), rows.max(1, initial=0)
    half, half_max = f32(0.5) * high - f32(0.5) * low, f32(amax) / f32(2)
    usable = half >= f32(2.0**-100)
    inverse = np.where(usable, half_max / np.where(usable, half, f32(1)), f32(0))
    zero = np.clip(np.rint(-low * inverse), 0, amax).astype(np.int32)
    q = np.clip(np.rint(rows * inverse[:, None]) + zero[:, None], 0, amax).astype(np.uint8)
    scale = np.where(finite, np.where(usable, half / half_max, f32(0)), f32(np.nan))
    return q, scale, zero


def adversarial(k: int) -> Tensor:
    """Rows that meet the corners of the quantizer."""
    biggest = torch.finfo(torch.float32).max
    alternating = torch.tensor([1.0, -1.0]).repeat(k // 2 + 1)[:k]
    rows = [
        torch.randn(k),
        torch.zeros(k),
        -torch.zeros(k),
        torch.full((k,), 3.0),
        torch.full((k,), -3.0),
        torch.rand(k) + 5,
        -torch.rand(k) - 5,
        alternating,
        alternating * biggest,
        torch.full((k,), biggest),
        torch.full((k,), -biggest),
        torch.randn(k) * 2.0**-99,
        torch.full((k,), 2.0**-99),
        torch.full((k,), 2.0**-100),
        torch.full((k,), 2.0**-126),
        torch.full((k,), 1e-45),
        torch.randn(k) * 1e-42,
        torch.randn(k) * 1e30,
        torch.arange(k) - k / 2,
        (torch.arange(k) % 256) / 2,
        torch.where(torch.arange(k) == k - 1, 1e6, 1e-6 * torch.ones(k)),
        torch.where(torch.arange(k) == 0, -3e38, 3e38 * torch.ones(k)),
        torch.randn(k) * 1e-38,
        torch.randn(k) * 1e-20,
        torch.linspace(-1, 1, k),
        torch.full((k,), 7.25),
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("k", [1, 7, 32, 100, 1025])
def test_quantize_equals_numpy(bits: int, k: int) -> None:
    x = adversarial(k)
    got = ops.int8_quantize(x, bits)
    assert [t.dtype for t in got] == [torch.uint8, torch.float32, torch.int32]
    for tensor, expected in zip(got, quantized(x, bits), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [7, 8])
def test_quantize_of_half_precision(bits: int, dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(5, 77), torch.randn(5, 77) * 1e-7, torch.randn(5, 77) * 1e4]).to(dtype)
    for tensor, expected in zip(ops.int8_quantize(x, bits), quantized(x, bits), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), expected)


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("k", [1, 7, 100, 1025, 2100])
def test_accumulate_equals_int64(bits: int, k: int) -> None:
    x = adversarial(k)
    extremes = torch.tensor([[127], [-127]], dtype=torch.int8).expand(2, k)
    values = torch.cat([extremes, torch.randint(-127, 128, (35, k), dtype=torch.int8)])
    acc, scale, zero = ops.int8_accumulate(x, *pack_int8(values, bits))
    q, expected_scale, expected_zero = quantized(x, bits)
    expected = (q.astype(np.int64) - expected_zero[:, None]) @ values.numpy().astype(np.int64).T
    assert acc.dtype == torch.int32
    np.testing.assert_array_equal(acc.numpy(), expected)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(zero.numpy(), expected_zero)


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("with_bias", [False, True])
def test_result_equals_the_formula_to_the_bit(bits: int, with_bias: bool) -> None:
    values, packed, scale, bias = weights(37, 130, bits)
    x = torch.randn(9, 130) * torch.logspace(-20, 20, 9)[:, None]
    q, row_scale, zero = quantized(x, bits)
    acc = (q.astype(np.int64) - zero[:, None]) @ values.numpy().astype(np.int64).T
    expected = acc.astype(np.float32) * row_scale[:, None] * scale.numpy()
    if with_bias:
        expected = expected + bias.numpy()
    y = ops.int8_linear(x, *packed, bias if with_bias else None)
    np.testing.assert_array_equal(y.numpy(), expected)
    np.testing.assert_array_equal(
        ops.int8_linear(x, *packed, bias if with_bias else None, "relu").numpy(), np.maximum(expected, 0)
    )


def test_non_contiguous_weights_are_packed_as_they_read() -> None:
    values = torch.randint(-127, 128, (24, 20), dtype=torch.int8)
    scale = torch.rand(20, 2)[:, 0]
    for own in (values.T, values[::2, 3:]):
        parts = ops.unpack("int8", *pack_int8(own, 8, scale[: len(own)]))
        assert torch.equal(parts["values"], own)
        assert torch.equal(parts["scale"], scale[: len(own)])


# --- numbers and activations ------------------------------------------------------------------------------------------


def test_every_float16_and_bfloat16_is_read_and_written() -> None:
    """With k = 1 and w = 1 the result is nearly x; with zero weights it is the bias, rounded."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)[:, None]
        for got, expected in zip(ops.int8_quantize(x, 8), quantized(x, 8), strict=True):
            np.testing.assert_array_equal(got.numpy(), expected)
        ties = bits.view(dtype).float()
        ties = ties[torch.isfinite(ties)]
        bias = torch.cat([ties, (ties[:-1] + ties[1:]) / 2, torch.nextafter(ties, torch.tensor(1e38))])
        packed = pack_int8(torch.zeros(len(bias), 1, dtype=torch.int8))
        y = ops.int8_linear(torch.zeros(1, 1, dtype=dtype), *packed, bias)
        assert torch.equal(y[0], bias.to(dtype))


@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_activations(activation: str) -> None:
    """Against float64; the values come in as the bias of a product that is zero, so they arrive exactly.

    The bound: erf's polynomial is within 1.5e-7 (so half of it on Phi), exp within 2 ulp; a handful of roundings, and the
    error of exp's argument is damped by exp itself (u exp(-u) <= 0.37). All in all below 8 ulp of the input.
    """
    bias = torch.cat([torch.linspace(-100, 100, 20001), torch.logspace(-44, 38, 300), -torch.logspace(-44, 38, 300)])
    packed = pack_int8(torch.zeros(len(bias), 4, dtype=torch.int8))
    y = ops.int8_linear(torch.zeros(1, 4), *packed, bias, activation)[0]
    exact = SMOOTH[activation](bias.double())
    bound = bias.double().abs() * 8 * 2**-23 + 1e-44
    assert ((y.double() - exact).abs() <= bound).all()
    assert not torch.isnan(y).any()


@pytest.mark.parametrize("activation", ["relu6", "hardswish"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_relu6_and_hardswish_have_the_bits_of_torch(activation: str, dtype: torch.dtype, same: Same) -> None:
    """The numbers around their ends among them; of float16 and bfloat16 the float32 result, rounded, as torch has it."""
    ends = torch.tensor([-6.0, -3.0, -0.0, 0.0, 3.0, 6.0])
    around = torch.cat([torch.nextafter(ends, torch.tensor(side)) for side in (-math.inf, math.inf)])
    large = torch.logspace(-44, 38, 5000)
    bias = torch.cat([ends, around, torch.linspace(-8, 8, 100_003), large, -large])
    packed = pack_int8(torch.zeros(len(bias), 4, dtype=torch.int8))
    y = ops.int8_linear(torch.zeros(1, 4, dtype=dtype), *packed, bias, activation)[0]
    assert same(y, getattr(nn.functional, activation)(0 + bias).to(dtype)), "a sum of 0 and -0 is 0"
    broken = ops.int8_linear(torch.full((1, 4), math.nan), *packed, bias, activation)
    assert broken.isnan().all()


def test_smooth_activations_of_infinite_sums() -> None:
    """A sum beyond float32 is infinite; its activation is what torch gives."""
    packed = pack_int8(torch.tensor([[127], [-127]], dtype=torch.int8))
    x = torch.full((1, 1), 3e38)
    assert ops.int8_linear(x, *packed)[0].tolist() == [math.inf, -math.inf]
    assert ops.int8_linear(x, *packed, None, "relu")[0].tolist() == [math.inf, 0.0]
    assert ops.int8_linear(x, *packed, None, "relu6")[0].tolist() == [6.0, 0.0]


def test_integers_of_a_row_with_nan() -> None:
    _, packed, *_ = weights(20, 33)
    x = torch.randn(3, 33)
    x[1, 32] = math.nan
    q, scale, zero = ops.int8_quantize(x, 8)
    assert not q[1].any()
    assert zero[1] == 0
    assert torch.isnan(scale).tolist() == [False, True, False]
    acc, scale, zero = ops.int8_accumulate(x, *packed)
    assert not acc[1].any()
    assert torch.isnan(scale).tolist() == [False, True, False]
    assert zero[1] == 0


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 6, 9, -1])
def test_activation_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"activation_bits is {bits}, expected 7 or 8"):
        ops.int8_quantize(torch.ones(2, 3), bits)
    with pytest.raises(ValueError, match=f"activation_bits is {bits}, expected 7, 8 or 16"):
        pack_int8(torch.ones(2, 3, dtype=torch.int8), bits)


def test_quantize_without_columns_or_rows() -> None:
    with pytest.raises(ValueError, match="0 columns"):
        ops.int8_quantize(torch.ones(2, 0), 8)
    assert [t.shape for t in ops.int8_quantize(torch.ones(0, 5), 8)] == [(0, 5), (0,), (0,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:-1], r"scale is \[23\], expected \[24\]"),
        (lambda s: torch.cat([s, s]), r"scale is \[48\], expected \[24\]"),
        (lambda s: s[:0], r"scale is \[0\], expected \[24\]"),
        (lambda s: s[:, None], r"scale is torch.float32 \[24, 1\]"),
        (lambda s: s.sum(), r"scale is torch.float32 \[\]"),
        (lambda s: s.double(), "scale is torch.float64"),
        (lambda s: s.bfloat16(), "scale is torch.bfloat16"),
    ],
)
def test_wrong_scale(change: Callable[[Tensor], Tensor], message: str) -> None:
    values, _, scale, _ = weights(24, 20)
    for bits in (8, 16):
        with pytest.raises(ValueError, match=message):
            pack_int8(values, bits, change(scale))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(3, 4), r"torch.float32 \[3, 4\], expected int8"),
        (torch.ones(3, 4, dtype=torch.uint8), "torch.uint8"),
        (torch.ones(4, dtype=torch.int8), r"\[4\], expected int8 \[n, k\]"),
        (torch.ones(1, 3, 4, dtype=torch.int8), r"\[1, 3, 4\], expected int8 \[n, k\]"),
        (torch.ones(0, 4, dtype=torch.int8), "expected"),
        (torch.ones(4, 0, dtype=torch.int8), "expected"),
        (torch.ones(1, 65537, dtype=torch.int8), "65537.*65536"),
        (torch.tensor([[1, -128]], dtype=torch.int8), "-128"),
    ],
)
def test_what_cannot_be_packed(values: Tensor, message: str) -> None:
    for bits in (8, 16):
        with pytest.raises(ValueError, match=message):
            pack_int8(values, bits)


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="no int8 kernel is named 'avx9'"):
        pack_int8(torch.ones(2, 3, dtype=torch.int8), kernel="avx9")


@pytest.mark.skipif(ops.extension_error() is not None, reason="no native kernels were built")
def test_kernels_that_cannot_run_here_are_refused_by_name() -> None:
    values = torch.ones(2, 3, dtype=torch.int8)
    for kernel in (kernel for kernel in ops.kernels() if kernel["op"] == "int8"):
        if kernel["available"]:
            assert torch.equal(ops.unpack("int8", *pack_int8(values, kernel=kernel["name"]))["values"], values)
        else:
            with pytest.raises(ValueError, match=f"kernel {kernel['name']} needs {kernel['isa']}"):
                pack_int8(values, kernel=kernel["name"])


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["", "rows", "rows n=1", "rows n=0 k=1", "rows n=1 k=1 bits", "rows n=1 k=1 n=2", "n=1 k=1 x"]
)
def test_what_is_no_form(form: str) -> None:
    with pytest.raises(ValueError, match=r"the form of the packed weight is .*, expected 'layout n=\.\.\. k="):
        ops.parse(form)


def test_forms_are_read_as_they_are_written() -> None:
    text = "factors n=4 k=8 rank=2 residual=int8 + dot4 n=4 k=8 activation_bits=7"
    form = ops.parse(text)
    assert str(form) == text
    assert (form.layout, form.n, form.k, form.rank, form.residual_name) == ("factors", 4, 8, 2, "int8")
    assert form.residual is not None
    assert (form.residual.layout, form.residual.activation_bits) == ("dot4", 7)
    with pytest.raises(AttributeError, match="no key 'group'"):
        form.group  # noqa: B018


# --- instruction sets -------------------------------------------------------------------------------------------------


def test_all_kernels_give_the_same_bits() -> None:
    for n, k, bits in ((5, 3, 8), (48, 100, 7), (37, 1030, 8), (64, 1024, 7)):
        values, _, scale, bias = weights(n, k, bits)
        x = torch.cat([adversarial(k), torch.randn(6, k)])
        x[-1, 0] = math.nan
        results = []
        for name in [row["name"] for row in ops.kernels() if row["op"] == "int8" and row["available"]]:
            with ops.forced("int8", name):
                packed = pack_int8(values, bits, scale)
                y = [ops.int8_linear(x.to(d), *packed, bias, act) for act in ops.ACTIVATIONS for d in FLOATS]
                results.append([*y, *ops.int8_quantize(x, bits), ops.int8_accumulate(x, *packed)[0]])
        for found, expected in ((f, e) for result in results[1:] for f, e in zip(result, results[0], strict=True)):
            nan = expected.isnan()  # the sign of a NaN is left to the processor
            assert torch.equal(found.isnan(), nan)
            assert torch.equal(found[~nan].view(torch.uint8), expected[~nan].view(torch.uint8))
