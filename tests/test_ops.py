"""The ops as torch sees them: opcheck, compile, export, every kind of input; and the integers against NumPy."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.methods.int8 import Int8
from pycompress.nn import Int8Linear

Forked = Callable[..., Any]
Same = Callable[[Tensor, Tensor], bool]
Python = Callable[..., subprocess.CompletedProcess[str]]

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SMOOTH = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
    "silu": nn.functional.silu,
}
INT8_LINEAR = torch.ops.pycompress.int8_linear.default
INT8_PACK = torch.ops.pycompress.int8_pack.default


def weights(n: int, k: int, bits: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random values int8 [n, k], their packed form, scale and bias."""
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return values, ops.int8_pack(values, bits), torch.rand(n) / 127 + 1e-3, torch.randn(n)


# --- the formula, in NumPy ----------------------------------------------------------------------------------------------


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
    acc, scale, zero = ops.int8_accumulate(x, ops.int8_pack(values, bits))
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
    y = ops.int8_linear(x, packed, scale, bias if with_bias else None)
    np.testing.assert_array_equal(y.numpy(), expected)
    np.testing.assert_array_equal(
        ops.int8_linear(x, packed, scale, bias if with_bias else None, "relu").numpy(), np.maximum(expected, 0)
    )


def test_close_to_the_float_product() -> None:
    values, packed, scale, bias = weights(64, 256)
    x = torch.randn(32, 256)
    exact = x.double() @ (values.double() * scale.double()[:, None]).T + bias.double()
    step = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)).double() / 255
    # Each quantized activation is off by half a step, by one where the zero point is rounded the other way.
    bound = step[:, None] * (values.double().abs().sum(1) * scale.double()) + 1e-4
    assert ((ops.int8_linear(x, packed, scale, bias).double() - exact).abs() <= bound).all()


# --- torch's own checks -------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "rows of a wider matrix": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize(
    ("dtype", "shape", "with_bias", "activation", "layout"),
    [
        (torch.float32, (3, 20), True, "none", "contiguous"),
        (torch.bfloat16, (2, 3, 20), False, "relu", "contiguous"),
        (torch.float16, (20,), True, "gelu", "contiguous"),
        (torch.float32, (0, 20), False, "silu", "contiguous"),
        (torch.float32, (5, 20), True, "gelu_tanh", "transposed"),
        (torch.bfloat16, (2, 5, 20), True, "none", "transposed"),
        (torch.float32, (5, 20), True, "none", "rows of a wider matrix"),
    ],
)
def test_opcheck_linear(
    dtype: torch.dtype, shape: tuple[int, ...], with_bias: bool, activation: str, layout: str
) -> None:
    _, packed, scale, bias = weights(24, 20)
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    torch.library.opcheck(INT8_LINEAR, (x, packed, scale, bias if with_bias else None, activation))


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_pack(transposed: bool) -> None:
    values = torch.randint(-127, 128, (20, 24), dtype=torch.int8)
    torch.library.opcheck(INT8_PACK, (values.T if transposed else values, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_has_the_strides_of_the_real_result(layout: str) -> None:
    _, packed, scale, bias = weights(24, 20)
    x = LAYOUTS[layout](torch.randn(2, 5, 20))
    real = ops.int8_linear(x, packed, scale, bias)
    fake = ops.int8_linear(x.to("meta"), packed.to("meta"), scale.to("meta"), bias.to("meta"))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert fake.is_meta
    assert real.is_contiguous()


# --- torch.compile and torch.export -------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(
        Int8Linear.from_dense(nn.Linear(32, 64), activation="gelu"),
        nn.LayerNorm(64),
        Int8Linear.from_dense(nn.Linear(64, 24, bias=False), Int8(activation_bits=7)),
    ).eval()


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", FLOATS)
def test_compile_fullgraph(dtype: torch.dtype, same: Same, fresh_dynamo: None) -> None:
    model = network().to(dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 32).to(dtype)
    with torch.no_grad():
        assert same(compiled(x), model(x))
        assert same(compiled(x.transpose(0, 1)), model(x.transpose(0, 1)))


def test_compile_once_for_every_batch_size(same: Same, fresh_dynamo: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = nn.Sequential(Int8Linear.from_dense(nn.Linear(32, 64)), Int8Linear.from_dense(nn.Linear(64, 24)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 7, 33):
            x = torch.randn(batch, 32)
            assert same(compiled(x), model(x))
    assert counter.frame_count == 1


def test_compile_with_a_gradient(fresh_dynamo: None) -> None:
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 32, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor(same: Same, fresh_dynamo: None) -> None:
    model = Int8Linear.from_dense(nn.Linear(32, 24), activation="relu").eval()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert same(compiled(x), model(x))
        assert same(compiled(x.T.contiguous().T), model(x)), "strides that only the op knows how to walk"


def test_export_save_and_load_elsewhere(tmp_path: Path, python: Python) -> None:
    model, x = network(), torch.randn(3, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert any(node.target is INT8_LINEAR for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "model.pt2")
    x = torch.randn(9, 32)
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    code = """
import sys, torch, pycompress
x, expected = torch.load(sys.argv[2])
y = torch.export.load(sys.argv[1]).module()(x)
assert torch.equal(y, expected), (y - expected).abs().max()
"""
    result = python(code, tmp_path / "model.pt2", tmp_path / "expected.pt")
    assert result.returncode == 0, result.stderr


# --- shapes and strides -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (1, 1, 1, 4), (2, 0, 3), (0,), (70, 3)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_leading_dimensions(lead: tuple[int, ...], dtype: torch.dtype, same: Same) -> None:
    _, packed, scale, bias = weights(24, 20)
    x = torch.randn(*lead, 20).to(dtype)
    y = ops.int8_linear(x, packed, scale, bias)
    assert y.shape == (*lead, 24)
    assert y.dtype == dtype
    assert same(y, ops.int8_linear(x.reshape(-1, 20), packed, scale, bias).reshape(*lead, 24))
    for row, out in itertools.islice(zip(x.reshape(-1, 20), y.reshape(-1, 24), strict=True), 8):
        assert same(ops.int8_linear(row, packed, scale, bias), out), "a row does not depend on the rows beside it"


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
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
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(layout: str, dtype: torch.dtype, same: Same) -> None:
    _, packed, scale, bias = weights(40, 36)
    x = STRIDED[layout](torch.randn(12, 36).to(dtype))
    dense = x.clone(memory_format=torch.contiguous_format)
    before = dense.clone()
    assert same(ops.int8_linear(x, packed, scale, bias), ops.int8_linear(dense, packed, scale, bias))
    assert same(x, before), "the op does not write to its input"
    if x.dim() == 2:
        for got, expected in zip(ops.int8_quantize(x, 8), ops.int8_quantize(dense, 8), strict=True):
            assert torch.equal(got, expected)
        assert torch.equal(ops.int8_accumulate(x, packed)[0], ops.int8_accumulate(dense, packed)[0])


@pytest.mark.parametrize("k", [1, 3])
def test_narrow_strides(k: int, same: Same) -> None:
    _, packed, scale, bias = weights(5, k)
    x = torch.randn(6, 2 * k)[:, :k]
    assert same(ops.int8_linear(x, packed, scale, bias), ops.int8_linear(x.contiguous(), packed, scale, bias))


def test_non_contiguous_weights_are_packed_as_they_read() -> None:
    values = torch.randint(-127, 128, (24, 20), dtype=torch.int8)
    assert torch.equal(ops.int8_unpack(ops.int8_pack(values.T, 8)), values.T)
    assert torch.equal(ops.int8_unpack(ops.int8_pack(values[::2, 3:], 8)), values[::2, 3:])


# --- half precision and activations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("bits", [7, 8])
def test_half_precision_is_the_rounded_float32_result(
    dtype: torch.dtype, activation: str, bits: int, same: Same
) -> None:
    _, packed, scale, bias = weights(45, 50, bits)
    x = (torch.randn(13, 50) * torch.logspace(-5, 4, 13)[:, None]).to(dtype)
    y = ops.int8_linear(x, packed, scale, bias, activation)
    assert same(y, ops.int8_linear(x.float(), packed, scale, bias, activation).to(dtype))


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
        packed = ops.int8_pack(torch.zeros(len(bias), 1, dtype=torch.int8), 8)
        y = ops.int8_linear(torch.zeros(1, 1, dtype=dtype), packed, torch.ones(len(bias)), bias)
        assert torch.equal(y[0], bias.to(dtype))


@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_activations(activation: str) -> None:
    """Against float64; the values come in as the bias of a product that is zero, so they arrive exactly.

    The bound: erf's polynomial is within 1.5e-7 (so half of it on Phi), exp within 2 ulp; a handful of roundings, and the
    error of exp's argument is damped by exp itself (u exp(-u) <= 0.37). All in all below 8 ulp of the input.
    """
    bias = torch.cat([torch.linspace(-100, 100, 20001), torch.logspace(-44, 38, 300), -torch.logspace(-44, 38, 300)])
    packed = ops.int8_pack(torch.zeros(len(bias), 4, dtype=torch.int8), 8)
    y = ops.int8_linear(torch.zeros(1, 4), packed, torch.ones(len(bias)), bias, activation)[0]
    exact = SMOOTH[activation](bias.double())
    bound = bias.double().abs() * 8 * 2**-23 + 1e-44
    assert ((y.double() - exact).abs() <= bound).all()
    assert not torch.isnan(y).any()


def test_smooth_activations_of_infinite_sums() -> None:
    """A sum beyond float32 is infinite; its activation is what torch gives."""
    packed = ops.int8_pack(torch.tensor([[127], [-127]], dtype=torch.int8), 8)
    x = torch.full((1, 1), 3e38)
    assert ops.int8_linear(x, packed, torch.ones(2))[0].tolist() == [math.inf, -math.inf]
    assert ops.int8_linear(x, packed, torch.ones(2), None, "relu")[0].tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_with_nan_or_inf_are_nan_and_leave_the_others_alone(
    dtype: torch.dtype, activation: str, value: float, same: Same
) -> None:
    _, packed, scale, bias = weights(37, 70)
    good = torch.randn(11, 70).to(dtype)
    expected = ops.int8_linear(good, packed, scale, bias, activation)
    bad = good.clone()
    rows = {0: 0, 4: 35, 5: 69, 10: 64}  # row: position; 64 to 69 are the tail of the vector loops
    for row, position in rows.items():
        bad[row, position] = value
    y = ops.int8_linear(bad, packed, scale, bias, activation)
    others = [row for row in range(11) if row not in rows]
    assert torch.isnan(y[list(rows)]).all()
    assert same(y[others], expected[others])


def test_integers_of_a_row_with_nan() -> None:
    _, packed, *_ = weights(20, 33)
    x = torch.randn(3, 33)
    x[1, 32] = math.nan
    q, scale, zero = ops.int8_quantize(x, 8)
    assert not q[1].any()
    assert zero[1] == 0
    assert torch.isnan(scale).tolist() == [False, True, False]
    acc, scale, zero = ops.int8_accumulate(x, packed)
    assert not acc[1].any()
    assert torch.isnan(scale).tolist() == [False, True, False]
    assert zero[1] == 0


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_wrong_width_names_both() -> None:
    _, packed, scale, _ = weights(24, 96)
    with pytest.raises(ValueError, match=r"int8_linear: x is \[3, 100\], the packed weight expects k = 96"):
        ops.int8_linear(torch.randn(3, 100), packed, scale)
    with pytest.raises(ValueError, match="expects k = 96"):
        ops.int8_linear(torch.randn(0, 100), packed, scale)
    with pytest.raises(ValueError, match="expects k = 96"):
        ops.int8_linear(torch.randn(3, 0), packed, scale)
    with pytest.raises(ValueError, match="expects k = 96"):
        ops.int8_accumulate(torch.randn(3, 100), packed)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool, torch.float64, torch.complex64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_dtype(dtype: torch.dtype, device: str) -> None:
    _, packed, scale, _ = weights(24, 20)
    x = torch.ones(3, 20, dtype=dtype, device=device)
    with pytest.raises(TypeError, match=f"int8_linear: x is {dtype}, expected float32, bfloat16 or float16"):
        ops.int8_linear(x, packed.to(device), scale.to(device))
    if device == "cpu":
        with pytest.raises(TypeError, match="int8_quantize: x is"):
            ops.int8_quantize(x, 8)
        with pytest.raises(TypeError, match="int8_accumulate: x is"):
            ops.int8_accumulate(x, packed)


def test_a_scalar_is_refused() -> None:
    _, packed, scale, _ = weights(4, 1)
    with pytest.raises(ValueError, match="x is a scalar"):
        ops.int8_linear(torch.tensor(1.0), packed, scale)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_integers_alone_need_a_matrix(shape: tuple[int, ...]) -> None:
    _, packed, *_ = weights(5, 4)
    with pytest.raises(ValueError, match="int8_quantize: x is"):
        ops.int8_quantize(torch.ones(shape), 8)
    with pytest.raises(ValueError, match="int8_accumulate: x is"):
        ops.int8_accumulate(torch.ones(shape), packed)


@pytest.mark.parametrize("bits", [0, 6, 9, -1])
def test_activation_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"activation_bits is {bits}, expected 7 or 8"):
        ops.int8_quantize(torch.ones(2, 3), bits)
    with pytest.raises(ValueError, match=f"activation_bits is {bits}, expected 7, 8 or 16"):
        ops.int8_pack(torch.ones(2, 3, dtype=torch.int8), bits)


def test_quantize_without_columns_or_rows() -> None:
    with pytest.raises(ValueError, match="0 columns"):
        ops.int8_quantize(torch.ones(2, 0), 8)
    assert [t.shape for t in ops.int8_quantize(torch.ones(0, 5), 8)] == [(0, 5), (0,), (0,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:-1], "23 channels, the packed weight 24"),
        (lambda s: torch.cat([s, s]), "48 channels, the packed weight 24"),
        (lambda s: s[:0], "0 channels, the packed weight 24"),
        (lambda s: s[:, None], r"scale is torch.float32 \[24, 1\]"),
        (lambda s: s.sum(), r"scale is torch.float32 \[\]"),
        (lambda s: s.double(), "scale is torch.float64"),
        (lambda s: s.bfloat16(), "scale is torch.bfloat16"),
        (lambda s: torch.stack([s, s], 1)[:, 0], r"scale is torch.float32 \[24\]"),
    ],
)
def test_wrong_scale(change: Callable[[Tensor], Tensor], message: str) -> None:
    _, packed, scale, _ = weights(24, 20)
    with pytest.raises(ValueError, match=message):
        ops.int8_linear(torch.randn(3, 20), packed, change(scale))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b[:-1],
        lambda b: b[:0],
        lambda b: b[:, None],
        lambda b: b.sum(),
        lambda b: b.double(),
        lambda b: b.half(),
        lambda b: torch.stack([b, b], 1)[:, 0],
    ],
)
def test_wrong_bias(change: Callable[[Tensor], Tensor]) -> None:
    _, packed, scale, bias = weights(24, 20)
    with pytest.raises(ValueError, match=r"int8_linear: bias is .*expected"):
        ops.int8_linear(torch.randn(3, 20), packed, scale, change(bias))


@pytest.mark.parametrize("activation", ["", "RELU", "tanh", "none "])
def test_unknown_activation(activation: str) -> None:
    _, packed, scale, _ = weights(24, 20)
    with pytest.raises(ValueError, match="expected one of none, relu, gelu, gelu_tanh, silu"):
        ops.int8_linear(torch.randn(3, 20), packed, scale, None, activation)


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
    with pytest.raises(ValueError, match=message):
        ops.int8_pack(values, 8)


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="no int8 kernel is named 'avx9'"):
        ops.int8_pack(torch.ones(2, 3, dtype=torch.int8), 8, "avx9")


@pytest.mark.skipif(ops.extension_error() is not None, reason="no native kernels were built")
def test_kernels_that_cannot_run_here_are_refused_by_name() -> None:
    values = torch.ones(2, 3, dtype=torch.int8)
    for kernel in (kernel for kernel in ops.kernels() if kernel["op"] == "int8"):
        if kernel["available"]:
            assert torch.equal(ops.int8_unpack(ops.int8_pack(values, 8, kernel["name"])), values)
        else:
            with pytest.raises(ValueError, match=f"kernel {kernel['name']} needs {kernel['isa']}"):
                ops.int8_pack(values, 8, kernel["name"])


# --- tensors that are not what they seem: each has to see the dispatcher ------------------------------------------------


def test_negated_view(same: Same) -> None:
    """The imaginary part of a conjugate is a view whose sign is still to be changed."""
    _, packed, scale, bias = weights(24, 20)
    x = torch.view_as_complex(torch.randn(3, 20, 2)).conj().imag
    assert x.is_neg()
    assert same(ops.int8_linear(x, packed, scale, bias), ops.int8_linear(x.resolve_neg().clone(), packed, scale, bias))
    x = torch._neg_view(torch.randn(3, 20))
    assert same(ops.int8_linear(x, packed, scale, bias), ops.int8_linear(x.resolve_neg(), packed, scale, bias))
    for got, expected in zip(ops.int8_quantize(x, 8), ops.int8_quantize(x.resolve_neg(), 8), strict=True):
        assert torch.equal(got, expected)


def test_vmap(same: Same) -> None:
    _, packed, scale, bias = weights(24, 20)
    x = torch.randn(4, 3, 20)
    y = torch.func.vmap(lambda row: ops.int8_linear(row, packed, scale, bias))(x)
    assert same(y, ops.int8_linear(x, packed, scale, bias))


def test_dispatch_modes_and_subclasses_see_the_op() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    _, packed, scale, _ = weights(24, 20)
    with Spy():
        ops.int8_linear(torch.randn(3, 20), packed, scale)
    assert INT8_LINEAR in seen


def test_jit_trace_records_the_op(same: Same) -> None:
    _, packed, scale, bias = weights(24, 20)
    traced = torch.jit.trace(lambda x: ops.int8_linear(x, packed, scale, bias), torch.randn(3, 20))
    x = torch.randn(7, 20)
    assert same(traced(x), ops.int8_linear(x, packed, scale, bias))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: x.to_mkldnn() if torch.backends.mkldnn.is_available() else x.to_sparse(),
        lambda x: torch.nested.nested_tensor([x, x[:1]]),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_other_layouts_are_refused(change: Callable[[Tensor], Tensor], forked: Forked) -> None:
    _, packed, scale, bias = weights(24, 20)
    x = change(torch.randn(3, 20))

    def run() -> str:
        try:
            return str(ops.int8_linear(x, packed, scale, bias).shape)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            return f"refused: {type(error).__name__}"

    assert forked(run).startswith("refused")


def test_an_input_without_memory_of_its_own(forked: Forked) -> None:
    """torch's lazy zeros, as autograd makes them, have no data to point to."""
    _, packed, scale, bias = weights(24, 20)

    def run() -> bool:
        y = ops.int8_linear(torch._efficientzerotensor((3, 20)), packed, scale, bias)
        return torch.equal(y, bias.expand(3, 24))

    assert forked(run)


# --- packed buffers that no int8_pack made ------------------------------------------------------------------------------


def uses(packed: Tensor, n: int, k: int) -> dict[str, Callable[[], object]]:
    return {
        "int8_linear": lambda: ops.int8_linear(torch.ones(3, k), packed, torch.ones(n)),
        "int8_unpack": lambda: ops.int8_unpack(packed),
        "int8_accumulate": lambda: ops.int8_accumulate(torch.ones(3, k), packed),
        "int8_depths": lambda: ops.int8_depths(packed),
    }


def outcomes(packed: Tensor, n: int, k: int) -> dict[str, str]:
    """What each use of the buffer did: the name of its exception, or 'result'."""
    found = {}
    for name, use in uses(packed, n, k).items():
        try:
            use()
            found[name] = "result"
        except Exception as error:
            found[name] = type(error).__name__
    return found


REFUSED = dict.fromkeys(uses(torch.empty(0), 1, 1), "ValueError")


def test_truncated_and_random_buffers_are_refused(forked: Forked) -> None:
    _, packed, *_ = weights(24, 40)

    def run() -> list[tuple[str, dict[str, str]]]:
        found = []
        for size in [0, 1, 7, 8, 63, 64, 65, len(packed) // 2, len(packed) - 1]:
            found.append((f"the first {size} bytes", outcomes(packed[:size].clone(), 24, 40)))
        found.append(("one byte more", outcomes(torch.cat([packed, packed[:1]]), 24, 40)))
        for size in [16, 64, 1000, len(packed)]:
            found.append((f"{size} zeros", outcomes(torch.zeros(size, dtype=torch.uint8), 24, 40)))
            noise = torch.randint(0, 256, (size,), dtype=torch.uint8)
            found.append((f"{size} random bytes", outcomes(noise, 24, 40)))
        return found

    for what, found in forked(run):
        assert found == REFUSED, what


def test_buffers_of_another_dtype_or_shape_are_refused(forked: Forked) -> None:
    _, packed, *_ = weights(24, 40)

    def run() -> list[tuple[str, dict[str, str]]]:
        return [
            ("float32", outcomes(packed.float(), 24, 40)),
            ("int32 view", outcomes(packed[: len(packed) // 4 * 4].view(torch.int32), 24, 40)),
            ("every second byte", outcomes(torch.stack([packed, packed], 1).flatten()[::2], 24, 40)),
            ("two dimensions", outcomes(torch.stack([packed, packed], 1), 24, 40)),
        ]

    for what, found in forked(run):
        assert found == REFUSED, what


def test_a_buffer_on_the_meta_device_is_refused(forked: Forked) -> None:
    """It has no memory, so reading it would be a crash. (An op whose tensors are all on meta has a fake result.)"""
    _, packed, *_ = weights(24, 40)
    found = forked(lambda: outcomes(packed.to("meta"), 24, 40))
    assert "result" not in found.values(), found


def test_no_corrupted_header_crashes(forked: Forked) -> None:
    """A packed buffer is made by this process, but an exported program may carry one in a file."""
    _, packed, *_ = weights(24, 40)

    def run() -> int:
        for position in range(64):
            for value in (0, 1, 0x7F, 0x80, 0xFF):
                broken = packed.clone()
                broken[position] = value
                outcomes(broken, 24, 40)
        return 0

    assert forked(run) == 0


# --- instruction sets ---------------------------------------------------------------------------------------------------


def test_unknown_instruction_set_fails_at_import(python: Python) -> None:
    if ops.extension_error() is not None:
        pytest.skip("no native kernels were built, so there is none to choose")
    result = python("import pycompress", PYCOMPRESS_ISA="avx1024")
    assert result.returncode != 0
    assert "PYCOMPRESS_ISA is 'avx1024', expected scalar, avx2, avx_vnni or avx512_vnni" in result.stderr


def test_scalar_kernels_give_the_same_bits(tmp_path: Path, python: Python) -> None:
    """The other of PYCOMPRESS_ISA=scalar and the default than the one that runs here, in a fresh interpreter."""
    if ops.extension_error() is not None:
        pytest.skip("no native kernels were built")
    cases = []
    for n, k, bits in ((5, 3, 8), (48, 100, 7), (37, 1030, 8), (64, 1024, 7)):
        values, packed, scale, bias = weights(n, k, bits)
        x = torch.cat([adversarial(k), torch.randn(6, k)])
        x[-1, 0] = math.nan
        y = {
            (activation, dtype): ops.int8_linear(x.to(dtype), packed, scale, bias, activation)
            for activation in ops.ACTIVATIONS
            for dtype in FLOATS
        }
        integers = (*ops.int8_quantize(x, bits), ops.int8_accumulate(x, packed)[0])
        cases.append({"values": values, "bits": bits, "scale": scale, "bias": bias, "x": x, "y": y, "ints": integers})
    torch.save(cases, tmp_path / "cases.pt")
    code = """
import sys, torch
from pycompress import ops
names = [kernel["name"] for kernel in ops.kernels() if kernel["op"] == "int8" and kernel["available"]]
for case in torch.load(sys.argv[1], weights_only=False):
    packed = ops.int8_pack(case["values"], case["bits"])
    x = case["x"]
    for (activation, dtype), expected in case["y"].items():
        y = ops.int8_linear(x.to(dtype), packed, case["scale"], case["bias"], activation)
        nan = expected.isnan()  # the sign of a NaN is left to the processor
        assert torch.equal(y.isnan(), nan), (activation, dtype)
        assert torch.equal(y[~nan].view(torch.uint8), expected[~nan].view(torch.uint8)), (activation, dtype)
    for got, expected in zip((*ops.int8_quantize(x, case["bits"]), ops.int8_accumulate(x, packed)[0]), case["ints"]):
        assert torch.equal(got.nan_to_num(-1), expected.nan_to_num(-1))
print(*names)
"""
    other = "" if os.environ.get("PYCOMPRESS_ISA") == "scalar" else "scalar"
    result = python(code, tmp_path / "cases.pt", PYCOMPRESS_ISA=other)
    assert result.returncode == 0, result.stderr
    if other:
        assert result.stdout.split() == ["scalar_4x8"]
