"""Int4 layers, and Int8 layers with 16-bit activations, lowered to ONNX, against the formulas in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the extra pycompress[onnx] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra pycompress[onnx] is not installed")

from onnx.reference import ReferenceEvaluator  # noqa: E402

from pycompress.nn.int4 import Int4Linear  # noqa: E402
from pycompress.nn.int8 import Int8Linear  # noqa: E402
from pycompress.onnx import BLOCKS_OPSET, OPSET, lower, session  # noqa: E402
from pycompress.onnx.graph import Graph  # noqa: E402
from pycompress.weights import Int4Weight, Int8Weight  # noqa: E402
from pycompress.weights.int4 import pack_nibbles  # noqa: E402

Array = npt.NDArray[Any]
F32 = np.float32
EPS = 2.0**-23
ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu6", "hardswish"]
# (k, n, group): one short group, whole groups, a short last one, odd numbers of integers, groups and both.
SHAPES = [
    (1, 1, 32), (31, 3, 32), (32, 16, 32), (33, 5, 32), (65, 17, 32), (64, 8, 64), (127, 4, 64), (129, 3, 128), (1025, 33, 128),
]  # fmt: skip


def make_int4(
    k: int,
    n: int,
    group: int = 32,
    *,
    activation_bits: int = 8,
    symmetric: bool = False,
    bias: bool = True,
    activation: str = "none",
) -> Int4Linear:
    """All integers, zero points and scales over twelve powers of two."""
    generator = torch.Generator().manual_seed(1000 * k + n)
    groups = -(-k // group)
    values = torch.randint(16, (n, k), generator=generator, dtype=torch.uint8)
    zero_points = torch.randint(16, (n, groups), generator=generator, dtype=torch.uint8)
    scale = torch.exp2(torch.rand(n, groups, generator=generator) * 12 - 14).bfloat16()
    packed = None if symmetric else pack_nibbles(zero_points)
    weight = Int4Weight(pack_nibbles(values), scale, packed, k, group, activation_bits)
    offset = torch.randn(n, generator=generator) if bias else None
    return Int4Linear.from_weight(weight, offset, activation)


def make_int8(k: int, n: int, *, bias: bool = True, activation: str = "none") -> Int8Linear:
    generator = torch.Generator().manual_seed(1000 * k + n)
    values = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.exp2(torch.rand(n, generator=generator) * 12 - 14)
    offset = torch.randn(n, generator=generator) if bias else None
    return Int8Linear.from_weight(Int8Weight(values, scale, 16, 8), offset, activation)


def rows(m: int, k: int, mean: float = 0.0) -> Array:
    """Rows of sizes from 1e-3 to 1e3, around a mean, which shows who adds up integers with and without their zero points."""
    x = np.random.default_rng(m).standard_normal((m, k)) + mean
    return (x * np.logspace(-3, 3, m)[:, None]).astype(F32)


def ordinary(k: int) -> list[Array]:
    return [rows(17, k), rows(17, k, mean=100), rows(1, k), np.empty((0, k), F32)]


def extreme_rows(k: int) -> Array:
    """Constants, ties, denormals, the 2^-100 threshold, the ends of float32, NaN and Inf."""
    random = np.random.default_rng(k).standard_normal((3, k))
    sign = np.where(np.arange(k) % 2, -1.0, 1.0)
    tiny = np.full(k, 2.0**-99)
    steps = (np.arange(k) % 255 - 127) / 2  # with k >= 255 every second product with 1/scale is a tie
    found = [
        *random, np.zeros(k), np.full(k, -0.0), np.full(k, 1.0), np.full(k, -3.5), sign, sign * 1e-40,
        sign * 1e30, sign * 3e38, sign * float(np.finfo(F32).max), tiny, np.nextafter(tiny.astype(F32), F32(0)), -tiny, steps,
    ]  # fmt: skip
    broken = np.tile(random[0], (4, 1))
    broken[0, 0], broken[1, k - 1], broken[2, k // 2], broken[3] = np.nan, np.inf, -np.inf, np.nan
    return np.concatenate([np.stack(found), broken]).astype(F32)


def quantized(x: Array) -> tuple[Array, Array, Array]:
    """q int64 [m, k], scale and zero point float32 [m, 1] as csrc/int8/gemm.h has them; zeros and NaN for rows with NaN or Inf."""
    q, scales, zero_points = np.zeros(x.shape, np.int64), np.zeros((len(x), 1), F32), np.zeros((len(x), 1), F32)
    for row, values in enumerate(x):
        if not np.isfinite(values).all():
            scales[row] = np.nan
            continue
        low, high = min(values.min(), F32(0)), max(values.max(), F32(0))
        half = F32(0.5) * high - F32(0.5) * low
        if half >= F32(2.0**-100):
            scales[row], inverse = half / F32(127.5), F32(127.5) / half
            zero_points[row] = np.clip(np.rint(-low * inverse), 0, 255)
            q[row] = np.clip(np.rint(values * inverse) + zero_points[row], 0, 255).astype(np.int64)
    return q, scales, zero_points


def weight64(layer: Int4Linear | Int8Linear) -> Array:
    """float64 [n, k], position by position."""
    weight = layer.canonical()
    if isinstance(weight, Int8Weight):
        return weight.values.numpy() * weight.scale.double().numpy()[:, None]
    found = np.empty(weight.shape)
    values, zero_points, scale = weight.values.numpy(), weight.zero_point, weight.scale.double().numpy()
    for column in range(layer.k):
        g = column // weight.group
        value = values[:, column // 2] >> (4 * (column % 2)) & 15
        zero = 8 if zero_points is None else zero_points.numpy()[:, g // 2] >> (4 * (g % 2)) & 15
        found[:, column] = (value.astype(int) - zero) * scale[:, g]
    return found


def bias64(layer: Int4Linear | Int8Linear) -> Array:
    return np.zeros(layer.n) if layer.bias is None else layer.bias.double().numpy()


def activate64(v: Array, activation: str) -> Array:
    functional: Any = torch.nn.functional
    t = torch.from_numpy(v)
    if activation == "quick_gelu":
        return (t * torch.sigmoid(1.702 * t)).numpy()
    name, options = {"gelu_tanh": ("gelu", {"approximate": "tanh"})}.get(activation, (activation, {}))
    return v if activation == "none" else getattr(functional, name)(t, **options).numpy()


def bound(v: Array, size: Array, roundings: int, activation: str) -> Array:
    """``roundings`` of half EPS each on the way of a product, doubled for their compounding; then the activation's (8 half EPS)."""
    smooth = 8 * 2.0**-24 * np.abs(v) + 2.0**-126 if activation not in ("none", "relu", "relu6") else 0.0
    slope = 1.5 if activation == "hardswish" else 1.13
    return slope * (EPS * roundings * size + EPS * np.abs(v) + roundings * 2.0**-149) + smooth


def assert_close(y: Array, x: Array, weight: Array, bias: Array, roundings: int) -> None:
    """y [m, n] against float64, but where sums may overflow."""
    exact, size = x @ weight.T + bias, np.abs(x) @ np.abs(weight).T + np.abs(bias)
    certain = size < np.finfo(F32).max
    assert certain[:3].all()
    assert (np.abs(y[certain] - exact[certain]) <= bound(exact, size, roundings, "none")[certain]).all()


# --- int4 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("k", "n", "group"), SHAPES)
def test_quantized_rows_are_equal_and_y_is_within_the_bound(k: int, n: int, group: int, symmetric: bool) -> None:
    layer = make_int4(k, n, group, symmetric=symmetric)
    runtime, weight = session(lower(layer)), weight64(layer)
    for x in (extreme_rows(k), *ordinary(k)):
        y, q = runtime.run(["y", "q"], {"x": x})
        expected_q, scale, zero_point = quantized(x)
        assert (y.dtype, q.dtype, y.shape) == (np.float32, np.uint8, (len(x), n))
        np.testing.assert_array_equal(q, expected_q)
        broken = np.isnan(scale[:, 0])
        assert np.isnan(y[broken]).all()
        x64 = (expected_q - zero_point) * scale.astype(float)
        assert_close(y[~broken], x64[~broken], weight, bias64(layer), k + 3)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, bits: int) -> None:
    layer, x = make_int4(96, 33, activation=activation, activation_bits=bits), rows(16, 96)
    (y,) = session(lower(layer)).run(["y"], {"x": x})
    q, scale, zero_point = quantized(x)
    x64, weight = ((q - zero_point) * scale.astype(float) if bits == 8 else x.astype(float)), weight64(layer)
    v, size = x64 @ weight.T + bias64(layer), np.abs(x64) @ np.abs(weight).T + np.abs(bias64(layer))
    assert np.abs(v).min() < 0.1 and np.abs(v).max() > 100
    assert (np.abs(y - activate64(v, activation)) <= bound(v, size, 96 + 3, activation)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("k", "n", "group"), SHAPES)
def test_sixteen_bit_activations(k: int, n: int, group: int, symmetric: bool) -> None:
    layer = make_int4(k, n, group, symmetric=symmetric, activation_bits=16)
    assert [value.name for value in lower(layer).graph.output] == ["y"]
    assert_weight_only(layer)


def assert_weight_only(layer: Int4Linear | Int8Linear) -> None:
    runtime, weight, bias = session(lower(layer)), weight64(layer), bias64(layer)
    for x in (extreme_rows(layer.k), *ordinary(layer.k)):
        (y,) = runtime.run(["y"], {"x": x})
        assert y.shape == (len(x), layer.n)
        finite, x64 = np.isfinite(x).all(axis=1), x.astype(float)
        assert_close(y[finite], x64[finite], weight, bias, layer.k + 4)
        with np.errstate(invalid="ignore"):
            spread = x64[~finite] @ weight.T + bias
        np.testing.assert_array_equal(np.isnan(y[~finite]), np.isnan(spread))
        np.testing.assert_array_equal(np.isinf(y[~finite]) * np.sign(y[~finite]), np.isinf(spread) * np.sign(spread))


def test_the_weight_is_stored_as_it_is() -> None:
    for symmetric in (False, True):
        layer = make_int4(65, 7, symmetric=symmetric)
        model, weight = lower(layer), layer.canonical()
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        for name, integers in (("weight", weight.integers()), ("weight_zero_point", weight.zero_points())):
            assert stored[name].data_type == onnx.TensorProto.UINT4
            assert len(stored[name].raw_data) == -(-integers.numel() // 2)
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored[name]).astype(int), integers.numpy().T)
        scale = onnx.numpy_helper.to_array(stored["weight_scale"])
        np.testing.assert_array_equal(scale, weight.scale.float().numpy().T)


@pytest.mark.parametrize("bits", [8, 16])
def test_blocks_are_the_operators_own(bits: int) -> None:
    model = lower(make_int4(40, 5, activation_bits=bits))
    (node,) = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert {one.name: one.i for one in node.attribute} == {"axis": 0, "block_size": 32}


def test_only_int4_needs_the_newer_opset() -> None:
    assert OPSET < BLOCKS_OPSET
    assert [entry.version for entry in lower(make_int8(8, 8)).opset_import] == [OPSET]


@pytest.mark.parametrize("bits", [8, 16])
def test_the_reference_evaluator_agrees(bits: int) -> None:
    """It takes whole blocks only."""
    layer, x = make_int4(96, 5, activation_bits=bits), rows(7, 96)
    names = ["y", "q"] if bits == 8 else ["y"]
    found = ReferenceEvaluator(lower(layer)).run(names, {"x": x})
    for a, b in zip(found, session(lower(layer)).run(names, {"x": x}), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4) if a.dtype == F32 else np.testing.assert_array_equal(
            a, b
        )


@pytest.mark.parametrize("make", [make_int4, make_int8])
def test_a_fused_product_does_not_round_x(make: Any) -> None:
    """ONNX Runtime makes one operator of DequantizeLinear and MatMul, which rounds x to 8 bits unless told not to."""
    layer = make(128, 8, activation_bits=16) if make is make_int4 else make(128, 8)
    opened, x = session(lower(layer)), np.random.default_rng(0).standard_normal((4, 128)).astype(F32)
    assert_close(opened.run(["y"], {"x": x})[0], x.astype(float), weight64(layer), bias64(layer), 128 + 4)
    assert opened.get_session_options().get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == "1"


def test_a_graph_keeps_uint4_constants_apart() -> None:
    graph, odd = Graph(), np.array([[1, 15, 3]], np.uint8)
    assert graph.nibbles("a", odd) == graph.nibbles("a", odd) == "a"
    (tensor,) = graph.initializers
    assert graph.opset == BLOCKS_OPSET
    assert tensor.raw_data == bytes([0xF1, 0x03])
    with pytest.raises(ValueError, match="the graph has another constant a"):
        graph.nibbles("a", odd.T)


def test_a_weight_beyond_two_gibibytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycompress.onnx.graph.MAX_WEIGHT_BYTES", 16)
    graph = Graph()
    graph.nibbles("a", np.ones((4, 8), np.uint8))
    with pytest.raises(ValueError, match=r"the weight \[3, 11\] has 17 bytes, expected at most 16"):
        graph.nibbles("b", np.ones((3, 11), np.uint8))


# --- int8 with 16-bit activations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 16), (17, 17), (257, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_with_sixteen_bit_activations(k: int, n: int, bias: bool) -> None:
    assert_weight_only(make_int8(k, n, bias=bias))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_activations(activation: str) -> None:
    layer, x = make_int8(64, 33, activation=activation), rows(16, 64)
    (y,) = session(lower(layer)).run(["y"], {"x": x})
    x64, weight = x.astype(float), weight64(layer)
    v, size = x64 @ weight.T + bias64(layer), np.abs(x64) @ np.abs(weight).T + np.abs(bias64(layer))
    assert (np.abs(y - activate64(v, activation)) <= bound(v, size, 64 + 4, activation)).all()
    with np.errstate(over="ignore"):
        (other,) = ReferenceEvaluator(lower(layer)).run(["y"], {"x": x})
    assert (np.abs(other - activate64(v, activation)) <= bound(v, size, 64 + 4, activation)).all()


def test_int8_weights_stay_int8() -> None:
    layer = make_int8(96, 48)
    model = lower(layer)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert stored["weight"].dtype == np.int8
    np.testing.assert_array_equal(stored["weight"], layer.canonical().values.numpy().T)
    assert [value.name for value in model.graph.output] == ["y"]
    assert "MatMulInteger" not in {node.op_type for node in model.graph.node}
