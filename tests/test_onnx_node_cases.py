"""ONNX's own cases for its quantized operators: what our kernels can say, they say to the bit; the rest is named, with the reason.

A case is run by the kernels alone, of the product, the convolution and the quantizer; nothing is lowered here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from packing import pack_int4
from torch import Tensor

onnx = pytest.importorskip("onnx", reason="the extra pycompress[onnx] is not installed")

from onnx import numpy_helper  # noqa: E402

from pycompress import ops  # noqa: E402
from pycompress.ops.cpu import int8_conv  # noqa: E402

Array = npt.NDArray[Any]
OPERATORS = (
    "ConvInteger", "QLinearConv", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear",
)  # fmt: skip

FLOAT8 = "float8: no kernel of ours reads or writes it"
FLOAT4 = "float4: no kernel of ours reads or writes it"
SIXTEEN = "integers of 16 bits: ours have 8"
TWO = "integers of 2 bits: ours have 4 or 8"
FOUR = "to 4 bits: inputs are quantized to 7 or 8, weights of 4 by a scale that a method chooses"
WIDE = "its weights, less their zero point, do not fit int8"  # (:func:`test_what_is_too_wide` looks)
# (:func:`test_a_number_in_the_middle_of_two_steps` looks.) That the scale and the zero point have the same bits is kept.
MIDDLE = "the quantizer multiplies by the reciprocal of the scale, so -127.49999 steps are -127.5 of its own"
REASONS = {
    **dict.fromkeys(("test_dynamicquantizelinear", "test_dynamicquantizelinear_expanded"), MIDDLE),
    **dict.fromkeys((
        "test_dequantizelinear_e4m3fn", "test_dequantizelinear_e4m3fn_float16", "test_dequantizelinear_e4m3fn_zero_point",
        "test_dequantizelinear_e5m2", "test_quantizelinear_e4m3fn", "test_quantizelinear_e5m2",
    ), FLOAT8),
    **dict.fromkeys(("test_dequantizelinear_float4e2m1", "test_quantizelinear_float4e2m1"), FLOAT4),
    **dict.fromkeys((
        "test_dequantizelinear_uint16", "test_dequantizelinear_int16", "test_quantizelinear_uint16", "test_quantizelinear_int16",
        "test_quantizelinear_blocked_symmetric",
    ), SIXTEEN),
    **dict.fromkeys((
        "test_dequantizelinear_uint2", "test_dequantizelinear_int2", "test_quantizelinear_uint2", "test_quantizelinear_int2",
    ), TWO),
    **dict.fromkeys(("test_quantizelinear_uint4", "test_quantizelinear_int4"), FOUR),
    **dict.fromkeys((
        "test_qlinearconv", "test_qlinearmatmul_2D_uint8_float32", "test_qlinearmatmul_3D_uint8_float32",
        "test_qlinearmatmul_2D_uint8_float16", "test_qlinearmatmul_3D_uint8_float16", "test_qlinearmatmul_2D_int8_float32",
        "test_qlinearmatmul_3D_int8_float32", "test_qlinearmatmul_2D_int8_float16", "test_qlinearmatmul_3D_int8_float16",
    ), WIDE),
}  # fmt: skip


@cache
def collected() -> dict[str, Any]:
    """ONNX's cases for these operators, as nodes and as functions of other nodes, by name."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the arithmetic of others
        cases = collect_testcases()
    starts = tuple(f"test_{name.lower()}" for name in OPERATORS)
    return {case.name: case for case in cases if case.name.startswith(starts)}


def operands(name: str) -> tuple[list[Array], list[Array], dict[str, Any]]:
    """Inputs, expected outputs, and the attributes of the first node."""
    case = collected()[name]
    ((inputs, outputs),) = case.data_sets
    arrays = [
        [a if isinstance(a, np.ndarray | np.generic) else numpy_helper.to_array(a) for a in side]
        for side in (inputs, outputs)
    ]
    attributes = {one.name: onnx.helper.get_attribute_value(one) for one in case.model.graph.node[0].attribute}
    return [np.asarray(a) for a in arrays[0]], [np.asarray(a) for a in arrays[1]], attributes


def same(found: Tensor, expected: Array) -> bool:
    """To the bit, dtype and shape included."""
    array = found.numpy()
    return array.dtype == expected.dtype and array.shape == expected.shape and array.tobytes() == expected.tobytes()


# --- what is expressible --------------------------------------------------------------------------------------------------


def conv_integer(name: str) -> bool:
    """By the accumulators of a static convolution whose step is 1: it quantizes the bytes, as floats, to themselves."""
    (x, w, zero, *weight_zero), (expected,), attributes = operands(name)
    centred = w.astype(int) - (weight_zero[0].astype(int).reshape(-1, 1, 1, 1) if weight_zero else 0)
    n, own, height, width = centred.shape
    parts = {
        "values": torch.from_numpy(centred.reshape(n, -1).astype(np.int8)), "scale": torch.ones(n),
        "input_scale": torch.ones(1), "input_zero_point": torch.tensor([int(zero)], dtype=torch.uint8),
    }  # fmt: skip
    settings = {"activation_bits": 8, "static": True, "convolution": (height, width, 1)}
    packed, form = ops.pack("int8", parts, (n, own * height * width), settings)
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    given = torch.from_numpy(x.astype(np.float32) - np.float32(zero))
    acc, scale, point = ops.int8_conv2d_accumulate(
        given, packed, form, (height, width), padding=(top, bottom, left, right)
    )
    assert scale.tolist() == [1.0] and point.tolist() == [int(zero)]
    return same(acc, expected)


def matmul_integer(name: str) -> bool:
    """By the accumulators of a static product, as :func:`conv_integer`."""
    (a, b, a_zero, b_zero), (expected,), _ = operands(name)
    centred = torch.from_numpy((b.astype(int) - b_zero.astype(int)).T.astype(np.int8).copy())
    parts = {
        "values": centred, "scale": torch.ones(len(centred)), "input_scale": torch.ones(1),
        "input_zero_point": torch.tensor([int(a_zero[0])], dtype=torch.uint8),
    }  # fmt: skip
    packed, form = ops.pack("int8", parts, tuple(centred.shape), {"activation_bits": 8, "static": True})
    acc, *_ = ops.int8_accumulate(torch.from_numpy(a.astype(np.float32) - np.float32(a_zero)), packed, form)
    return same(acc, expected)


def dynamic_quantize(name: str) -> bool:
    """The quantizer of a row that is all of x: q, scale and zero point."""
    (x,), (q, scale, zero), _ = operands(name)
    found = ops.int8_quantize(torch.from_numpy(x.reshape(1, -1)), 8)
    return same(found[0].view(x.shape), q) and same(found[1][0], scale) and same(found[2][0].to(torch.uint8), zero)


def by_ranges(
    x: Array, scale: Array, zero: Array, attributes: dict[str, Any], run: Callable[[Array, float, int], Tensor]
) -> Tensor:
    """A kernel's results for all numbers that have one range, range by range: one for the tensor, the axis, or its blocks."""
    places = np.arange(scale.size).reshape(scale.shape)
    if scale.ndim:
        axis = attributes.get("axis", 1) % x.ndim
        if block := attributes.get("block_size", 0):
            places = places.repeat(block, axis)
        else:
            places = places.reshape([-1 if at == axis else 1 for at in range(x.ndim)])
    places = np.broadcast_to(places, x.shape)
    found: Tensor | None = None
    for i in range(scale.size):
        y = run(x[places == i], float(scale.flat[i]), int(zero.flat[i]))
        found = torch.empty(x.shape, dtype=y.dtype) if found is None else found
        found[torch.from_numpy(places == i)] = y
    assert found is not None
    return found


def quantize(name: str) -> bool:
    """The quantizer of static ranges."""
    (x, scale, zero), (expected,), attributes = operands(name)
    return same(
        by_ranges(
            x,
            scale,
            zero,
            attributes,
            lambda own, s, z: ops.int8_quantize(torch.from_numpy(own)[None], 8, (s, z))[0][0],
        ),
        expected,
    )


def dequantize(name: str) -> bool:
    """A convolution of bytes with one weight of 1: acc times the scale of its input."""
    (x, scale, zero), (expected,), attributes = operands(name)

    def run(own: Array, s: float, z: int) -> Tensor:
        parts = {
            "values": torch.ones(1, 1, dtype=torch.int8), "scale": torch.ones(1), "input_scale": torch.tensor([s]),
            "input_zero_point": torch.tensor([z], dtype=torch.uint8),
        }  # fmt: skip
        settings = {"activation_bits": 8, "static": True, "convolution": (1, 1, 1)}
        packed, form = ops.pack("int8", parts, (1, 1), settings)
        image = torch.from_numpy(own).view(1, 1, 1, -1)
        y = int8_conv.hand_on(image, packed, form, None, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, "none", None, False)
        assert y is not None
        return y.flatten()

    return same(by_ranges(x, scale, zero, attributes, run), expected)


def dequantize_nibbles(name: str) -> bool:
    """The decompressed weight of int4, whose integers are 0 to 15: signed ones and their zero point lie 8 higher."""
    (x, scale, zero), (expected,), _ = operands(name)
    higher = 8 if "_int4" in name else 0
    q = np.pad(x.astype(int) + higher, (0, x.size % 2)).reshape(-1, 2)
    values = torch.from_numpy((q[:, 0] | q[:, 1] << 4).astype(np.uint8))[None]
    point = torch.tensor([[int(zero.reshape(-1)[0]) + higher]], dtype=torch.uint8)
    packed, form = pack_int4(values, torch.from_numpy(scale.reshape(1, 1)).bfloat16(), point, x.size, 32, 8)
    return same(ops.dense("int4", packed, form)[0], expected)


EXPRESSIBLE: dict[str, Callable[[str], bool]] = {
    "test_convinteger_without_padding": conv_integer,
    "test_convinteger_with_padding": conv_integer,
    "test_matmulinteger": matmul_integer,
    "test_dynamicquantizelinear_max_adjusted": dynamic_quantize,
    "test_dynamicquantizelinear_max_adjusted_expanded": dynamic_quantize,
    "test_dynamicquantizelinear_min_adjusted": dynamic_quantize,
    "test_dynamicquantizelinear_min_adjusted_expanded": dynamic_quantize,
    "test_quantizelinear": quantize,
    "test_quantizelinear_axis": quantize,
    "test_quantizelinear_blocked_asymmetric": quantize,
    "test_dequantizelinear": dequantize,
    "test_dequantizelinear_axis": dequantize,
    "test_dequantizelinear_blocked": dequantize,
    "test_dequantizelinear_uint4": dequantize_nibbles,
    "test_dequantizelinear_int4": dequantize_nibbles,
}


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_equal_to_the_bit(name: str) -> None:
    if name not in collected():
        pytest.skip(f"this version of ONNX has no {name}")
    assert EXPRESSIBLE[name](name)


def test_every_case_is_in_one_of_the_lists() -> None:
    assert not EXPRESSIBLE.keys() & REASONS.keys()
    unknown = collected().keys() - EXPRESSIBLE.keys() - REASONS.keys()
    assert not unknown, f"run by the kernels, or name with the reason: {sorted(unknown)}"
    for operator in OPERATORS:
        assert any(name.startswith(f"test_{operator.lower()}") for name in collected()), operator


@pytest.mark.parametrize("name", [name for name, reason in REASONS.items() if reason == MIDDLE])
def test_a_number_in_the_middle_of_two_steps(name: str) -> None:
    """All else of the case is equal, and that one number goes to the other step."""
    (x,), (q, scale, zero), _ = operands(name)
    found = ops.int8_quantize(torch.from_numpy(x.reshape(1, -1)), 8)
    assert same(found[1][0], scale) and same(found[2][0].to(torch.uint8), zero)
    other = found[0].view(x.shape).numpy().astype(int) - q
    steps = np.abs(x[other != 0].astype(np.float64) / scale)
    assert np.abs(other).tolist() == [0, 0, 0, 1, 0, 0]
    assert np.abs(steps % 1 - 0.5).max() <= steps.max() * 2.0**-23


@pytest.mark.parametrize("name", [name for name, reason in REASONS.items() if reason == WIDE])
def test_what_is_too_wide(name: str) -> None:
    if name not in collected():
        pytest.skip(f"this version of ONNX has no {name}")
    (_, _, _, w, _, zero, *_), _, _ = operands(name)
    centred = w.astype(int) - int(zero.reshape(-1)[0])
    assert int(np.abs(centred).max()) > 127
