"""Static int8: the input is quantized with one range for all rows, which was known before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from packing import backend  # noqa: F401
from torch import Tensor

from pycompress import ops

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = [one["name"] for one in ops.kernels() if one["op"] == "int8" and one["available"]]
RANGES = [(0.02, 0), (0.05, 128), (1.0, 127), (2.0**-126, 3), (2.0**126, 90), (1 / 3, 63)]
Range = tuple[float, int]


@pytest.fixture(params=["", *KERNELS])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.forced("int8", request.param) if request.param else nullcontext():
        yield request.param


# --- the formula, in NumPy --------------------------------------------------------------------------------------------


def quantized(x: Tensor, bits: int, of: Range) -> tuple[Any, Any, Any]:
    """q, scale and zero point as csrc/int8/gemm.h states them, float32 step by step."""
    f32, rows = np.float32, x.float().numpy()
    finite = np.isfinite(rows).all(1)
    rows = np.where(finite[:, None], rows, f32(0))
    with np.errstate(over="ignore", under="ignore"):
        steps = np.clip(rows * (f32(1) / f32(of[0])), f32(-1024), f32(1024))
    q = np.clip(np.rint(steps) + of[1], 0, 2**bits - 1)
    return q.astype(np.uint8), np.where(finite, f32(of[0]), f32(np.nan)), np.full(len(q), of[1], np.int32)


def rows_of(k: int) -> Tensor:
    """Rows inside, at and far beyond the ends of ranges; and broken ones."""
    biggest, tiny = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    rows = [
        torch.randn(k),
        torch.randn(k) * 100,
        torch.zeros(k),
        -torch.rand(k) * 5,
        (torch.arange(k) - k / 2) * 0.025,  # ties
        torch.full((k,), biggest),
        torch.full((k,), -biggest),
        torch.randn(k) * 1e30,
        torch.randn(k) * tiny,
        torch.full((k,), 1e-45),
    ]
    for bad in (math.nan, math.inf, -math.inf):
        for place in {0, k // 2, k - 1}:
            rows.append(torch.randn(k))
            rows[-1][place] = bad
    return torch.stack(rows)


def packed(values: Tensor, scale: Tensor, bits: int, of: Range) -> tuple[Tensor, str]:
    parts = {
        "values": values, "scale": scale, "input_scale": torch.tensor([of[0]]),
        "input_zero_point": torch.tensor([of[1]], dtype=torch.uint8),
    }  # fmt: skip
    shape = (values.shape[0], values.shape[1])
    return ops.pack("int8", parts, shape, {"activation_bits": bits, "static": True})


# --- the op -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("k", [1, 7, 32, 100, 1025])
@pytest.mark.parametrize("of", RANGES)
def test_quantize_equals_numpy_on_every_kernel(k: int, of: Range) -> None:
    x, bits = rows_of(k), 7 if of[1] < 128 and k % 2 else 8
    for dtype in FLOATS:
        for got, expected in zip(
            ops.int8_quantize(x.to(dtype), bits, of), quantized(x.to(dtype), bits, of), strict=True
        ):
            np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (37, 130), (16, 1025), (33, 2100)])
def test_sums_equal_int64_on_every_kernel(bits: int, n: int, k: int) -> None:
    x, of = rows_of(k), (0.03, 2 ** (bits - 1) - 5)
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    acc, scale, zero_point = ops.int8_accumulate(x, *packed(values, torch.ones(n), bits, of))
    q, expected_scale, expected_zero = quantized(x, bits, of)
    expected = (q.astype(np.int64) - expected_zero[:, None]) @ values.numpy().astype(np.int64).T
    np.testing.assert_array_equal(acc.numpy(), expected)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(zero_point.numpy(), expected_zero)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("m", [1, 3, 64, 200])
def test_result_equals_the_formula_to_the_bit(m: int) -> None:
    n, k, of = 37, 130, (0.04, 77)
    values, scale, bias = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) / 127 + 1e-3, torch.randn(n)
    x = torch.randn(m, k) * 2
    q, row_scale, zero_point = quantized(x, 8, of)
    acc = (q.astype(np.int64) - zero_point[:, None]) @ values.numpy().astype(np.int64).T
    expected = acc.astype(np.float32) * row_scale[:, None] * scale.numpy() + bias.numpy()
    y = ops.int8_linear(x, *packed(values, scale, 8, of), bias)
    np.testing.assert_array_equal(y.numpy(), expected)
    np.testing.assert_array_equal(
        ops.int8_round(x, 8, of).numpy(), (q - zero_point[:, None].astype(np.float32)) * of[0]
    )


@pytest.mark.usefixtures("backend")
def test_broken_rows_are_nan_and_no_other() -> None:
    x = rows_of(50)
    y = ops.int8_linear(x, *packed(torch.ones(5, 50, dtype=torch.int8), torch.ones(5), 8, (0.1, 100)))
    broken = ~x.isfinite().all(1)
    assert torch.equal(y.isnan(), broken[:, None].expand_as(y))


@pytest.mark.usefixtures("backend")
def test_what_was_packed_comes_back() -> None:
    values, scale = torch.randint(-127, 128, (24, 71), dtype=torch.int8), torch.rand(24)
    for of in RANGES:
        p, form = packed(values, scale, 8, of)
        parts = ops.unpack("int8", p, form)
        assert torch.equal(parts["values"], values)
        assert torch.equal(parts["scale"], scale)
        assert torch.equal(parts["input_scale"], torch.tensor([of[0]]))
        assert torch.equal(parts["input_zero_point"], torch.tensor([of[1]], dtype=torch.uint8))
        with pytest.raises(ValueError, match="the packed weight is static, its form is"):
            ops.unpack("int8", p, form.replace(" static=1", ""))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("of", "bits", "text"),
    [
        ((math.nan, 0), 8, "input_scale is nan"),
        ((math.inf, 0), 8, "input_scale is inf"),
        ((-1.0, 0), 8, "input_scale is -1"),
        ((2.0**-127, 0), 8, "input_scale is 5.87"),
        ((0.1, 128), 7, "input_zero_point is 128, expected 0 to 127"),
    ],
)
def test_ranges_that_are_none(of: Range, bits: int, text: str) -> None:
    x = torch.randn(2, 8)
    for call in (
        lambda: packed(torch.ones(4, 8, dtype=torch.int8), torch.ones(4), bits, of),
        lambda: ops.int8_quantize(x, bits, of),
        lambda: ops.int8_round(x, bits, of),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_a_packed_weight_needs_its_range_and_integers() -> None:
    parts = {"values": torch.ones(4, 8, dtype=torch.int8), "scale": torch.ones(4)}
    with pytest.raises(ValueError, match=r"input_scale.* is missing"):
        ops.pack("int8", parts, (4, 8), {"activation_bits": 8, "static": True})
    with pytest.raises(ValueError, match="expected none where it stays in floating point"):
        packed(parts["values"], parts["scale"], 16, (0.1, 0))
    given = {**parts, "input_scale": torch.ones(1), "input_zero_point": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"input_zero_point is torch.int64 \[1\], expected torch.uint8 \[1\]"):
        ops.pack("int8", given, (4, 8), {"activation_bits": 8, "static": True})
