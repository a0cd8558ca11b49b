"""The lowered layer, run by ONNX Runtime and by the ONNX reference evaluator, against the formulas in NumPy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from packing import alter
from packing import integers as dense_integers

onnx = pytest.importorskip("onnx", reason="the extra pycompress[onnx] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra pycompress[onnx] is not installed")

from onnx.reference import ReferenceEvaluator  # noqa: E402

import pycompress.nn  # noqa: E402
from pycompress.methods import Int8, LowRank  # noqa: E402
from pycompress.nn.int8 import Int8Linear  # noqa: E402
from pycompress.nn.low_rank import LowRankLinear  # noqa: E402
from pycompress.nn.sparse import SparseLinear  # noqa: E402
from pycompress.nn.sparse_conv import SparseConv2d  # noqa: E402
from pycompress.onnx import DENSE, LOWERINGS, lower, session  # noqa: E402
from pycompress.weights import Int8Weight, SparseWeight  # noqa: E402

Array = npt.NDArray[np.generic]
F32 = np.float32
BITS = [(7, 8), (8, 8), (8, 7), (7, 7)]  # activation_bits, weight_bits
ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu6", "hardswish"]
SLOPE = {"hardswish": 1.5}  # the steepest; of the others 1.13


def formula(x: Array, layer: Int8Linear | SparseLinear) -> tuple[Array, Array, Array]:
    """q uint8 [m, k], acc int64 [m, n], and float32 [m, n], what goes into the activation."""
    weight = layer.canonical()
    integers = weight.values if isinstance(layer, Int8Linear) else dense_integers(weight)
    amax = F32(2**weight.activation_bits - 1)
    finite = np.isfinite(x).all(axis=1, keepdims=True)
    x = np.where(finite, x, F32(0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        low = np.minimum(x.min(axis=1, keepdims=True), F32(0))
        high = np.maximum(x.max(axis=1, keepdims=True), F32(0))
        half = F32(0.5) * high - F32(0.5) * low
        flat = half < F32(2.0**-100)
        scale = np.where(flat, F32(0), half / (amax / F32(2)))
        inverse = np.where(flat, F32(0), (amax / F32(2)) / half)
        zero_point = np.clip(np.rint(-low * inverse), F32(0), amax)
        q = np.clip(np.rint(x * inverse) + zero_point, F32(0), amax).astype(np.uint8)
        values = integers.numpy().astype(np.int64)
        acc = (q.astype(np.int64) - zero_point.astype(np.int64)) @ values.T
        v = (acc.astype(F32) * scale) * weight.scale.numpy()
        if layer.bias is not None:
            v = v + layer.bias.numpy()
    assert v.dtype == np.float32
    return q, acc, np.where(finite, v, F32(np.nan))


def activate64(v: Array, activation: str) -> Array:
    """The activation in float64, by torch: shares no code with either side under test."""
    t = torch.from_numpy(v.astype(np.float64))
    functional = torch.nn.functional
    result = {
        "none": lambda: t,
        "relu": lambda: functional.relu(t),
        "gelu": lambda: functional.gelu(t),
        "gelu_tanh": lambda: functional.gelu(t, approximate="tanh"),
        "silu": lambda: functional.silu(t),
        "quick_gelu": lambda: t * torch.sigmoid(1.702 * t),
        "relu6": lambda: functional.relu6(t),
        "hardswish": lambda: t * (t + 3).clamp(0, 6) / 6,
    }[activation]()
    return result.numpy()


def bits(y: Array) -> Array:
    """The bits of float32 values, with one zero and one NaN."""
    y = np.where(np.isnan(y), F32(np.nan), y + F32(0))
    return y.view(np.uint32)


def assert_bitwise(outputs: list[Array], x: Array, layer: Int8Linear | SparseLinear) -> None:
    y, q, acc = outputs
    expected_q, expected_acc, v = formula(x, layer)
    assert (y.dtype, q.dtype, acc.dtype) == (np.float32, np.uint8, np.int32)
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(acc, expected_acc)
    np.testing.assert_array_equal(bits(y), bits(np.maximum(v, F32(0)) if layer.activation == "relu" else v))


def make_layer(
    k: int,
    n: int,
    activation_bits: int = 7,
    weight_bits: int = 8,
    bias: bool = True,
    activation: str = "none",
    fill: int | None = None,
) -> Int8Linear:
    """Random weights over the whole range, or all of them the largest (fill 1) or the smallest (fill -1)."""
    generator = torch.Generator().manual_seed(1000 * k + n)
    largest = 2 ** (weight_bits - 1) - 1
    values = torch.randint(-largest, largest + 1, (n, k), generator=generator, dtype=torch.int8)
    if fill is not None:
        values = torch.full_like(values, fill * largest)
    scale = torch.rand(n, generator=generator) * 0.01 + 1e-4
    offset = torch.randn(n, generator=generator) if bias else None
    return Int8Linear.from_weight(Int8Weight(values, scale, activation_bits, weight_bits), offset, activation)


def extreme_rows(k: int) -> Array:
    """Constants, ties, denormals, the 2^-100 threshold, ranges that float32 cannot hold, NaN and Inf."""
    random = np.random.default_rng(k).standard_normal((3, k)).astype(F32)
    sign = np.where(np.arange(k) % 2, F32(-1), F32(1))
    largest = np.finfo(F32).max
    rows = [
        *random,
        np.zeros(k), np.full(k, -0.0), np.full(k, 1.0), np.full(k, -3.5),
        sign, sign * 1e-40, np.full(k, 1e-40),
        sign * 1e30, random[0] * 1e30, sign * 3e38, sign * largest, np.full(k, -3e38),
        np.full(k, 2.0**-99), np.full(k, np.nextafter(F32(2.0**-99), F32(0))), sign * 2.0**-100,
        (np.arange(k) % 255 - 127) / 2,  # with k >= 255 every second product with 1/scale is a tie
        sign * np.array([np.nan] + [1.0] * (k - 1)),
        sign * np.array([1.0] * (k - 1) + [np.inf]),
        sign * np.array([-np.inf] + [3e38] * (k - 1)),
        np.array([np.inf, -np.inf] * k)[:k],
        np.full(k, np.nan),
    ]  # fmt: skip
    return np.stack(rows).astype(F32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("activation_bits", "weight_bits"), BITS)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 17), (3, 16), (16, 3), (17, 17), (64, 64), (257, 33)])
def test_equals_the_formula_to_the_bit(k: int, n: int, activation_bits: int, weight_bits: int, bias: bool) -> None:
    layer = make_layer(k, n, activation_bits, weight_bits, bias)
    runtime = session(lower(layer))
    extremes = extreme_rows(k)
    random = np.random.default_rng(n).standard_normal((64, k)).astype(F32)
    for x in [extremes, random, random[:1], random[:3], random[:16], random[:17]]:
        assert_bitwise(runtime.run(["y", "q", "acc"], {"x": x}), x, layer)


@pytest.mark.parametrize("fill", [1, -1])
@pytest.mark.parametrize(("activation_bits", "weight_bits"), BITS)
def test_runs_of_extremes_do_not_saturate(activation_bits: int, weight_bits: int, fill: int) -> None:
    layer = make_layer(64, 16, activation_bits, weight_bits, fill=fill)
    x = np.stack([np.full(64, 2.0), np.full(64, -2.0), np.where(np.arange(64) < 32, 2.0, -2.0)]).astype(F32)
    outputs = session(lower(layer)).run(["y", "q", "acc"], {"x": x})
    assert_bitwise(outputs, x, layer)
    largest = (2**activation_bits - 1) * (2 ** (weight_bits - 1) - 1) * 64
    assert outputs[2][:2, 0].tolist() == [fill * largest, -fill * largest]


@pytest.mark.parametrize(("activation_bits", "weight_bits"), [(7, 8), (8, 7), (7, 7)])
def test_seven_bits_on_either_side_need_no_session_settings(activation_bits: int, weight_bits: int) -> None:
    layer = make_layer(64, 16, activation_bits, weight_bits, fill=1)
    x = np.full((2, 64), 2.0, F32)
    for level in [
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ]:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        runtime = onnxruntime.InferenceSession(
            lower(layer).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        assert_bitwise(runtime.run(["y", "q", "acc"], {"x": x}), x, layer)


def test_the_longest_row_reaches_but_does_not_pass_int32() -> None:
    layer = make_layer(65536, 2, activation_bits=8, fill=1)
    x = np.stack([np.full(65536, 1.0), np.full(65536, -1.0)]).astype(F32)
    outputs = session(lower(layer)).run(["y", "q", "acc"], {"x": x})
    assert outputs[2].tolist() == [[255 * 127 * 65536] * 2, [-255 * 127 * 65536] * 2]
    assert_bitwise(outputs, x, layer)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("activation_bits", [7, 8])
def test_activations(activation: str, activation_bits: int) -> None:
    layer = make_layer(64, 33, activation_bits, activation=activation)
    alter(layer, "int8_scale", lambda scale: scale * 0.2)  # values before the activation of about 1 for ordinary rows
    x = extreme_rows(64)
    y, q, acc = session(lower(layer)).run(["y", "q", "acc"], {"x": x})
    expected_q, expected_acc, v = formula(x, layer)
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(acc, expected_acc)
    if activation == "hardswish":  # torch's float32 steps, to the bit, also where v times 6 overflows
        np.testing.assert_array_equal(bits(y), bits(torch.nn.functional.hardswish(torch.from_numpy(v)).numpy()))
    finite = np.isfinite(v) & (np.isfinite(y) | (activation != "hardswish"))
    assert 0.5 < np.abs(v[:3]).mean() < 5  # the curve is tested,
    assert np.abs(v[finite]).max() > 1e30  # and so are its ends
    error = np.abs(y[finite].astype(np.float64) - activate64(v[finite], activation))
    allowed = 8 * 2.0**-24 * np.abs(v[finite].astype(np.float64)) + 2.0**-126  # see validation.activation_bound
    if activation in ("none", "relu", "relu6"):
        allowed = np.zeros_like(error)
    assert (error <= allowed).all(), f"worst excess {np.max(error - allowed)}"
    assert np.isnan(y[~np.isfinite(x).all(axis=1)]).all()


@pytest.mark.parametrize(("k", "n", "activation_bits", "bias"), [(17, 5, 7, True), (64, 3, 8, False)])
def test_reference_evaluator_agrees(k: int, n: int, activation_bits: int, bias: bool) -> None:
    layer = make_layer(k, n, activation_bits, bias=bias)
    x = extreme_rows(k)
    with np.errstate(all="ignore"):
        outputs = ReferenceEvaluator(lower(layer)).run(["y", "q", "acc"], {"x": x})
    assert_bitwise(outputs, x, layer)


def test_the_weight_is_stored_once_as_int8() -> None:
    layer = make_layer(96, 48)
    model = lower(layer)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert (stored["weight"].dtype, stored["column_sum"].dtype) == (np.int8, np.int32)
    np.testing.assert_array_equal(stored["weight"], layer.canonical().values.numpy().T)
    np.testing.assert_array_equal(stored["column_sum"][0], stored["weight"].sum(axis=0))
    assert sum(array.size for array in stored.values()) < 96 * 48 + 4 * 48


def test_session_is_set_for_exact_integers() -> None:
    options = session(lower(make_layer(4, 4))).get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == 1
    # The entry above is read by a transformation of this level; see session().
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED


def test_a_layer_without_a_lowering_is_named() -> None:
    with pytest.raises(TypeError, match=r"lower: the layer is Linear, expected one of: Int8Linear"):
        lower(torch.nn.Linear(4, 4))


def test_a_weight_beyond_two_gibibytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycompress.onnx.graph.MAX_WEIGHT_BYTES", 63)
    with pytest.raises(ValueError, match=r"the weight \[8, 8\] has 64 bytes, expected at most 63"):
        lower(make_layer(8, 8))
    monkeypatch.setattr("pycompress.onnx.graph.MAX_WEIGHT_BYTES", 255)
    with pytest.raises(ValueError, match=r"the weight \[8, 8\] has 256 bytes, expected at most 255"):
        lower(make_sparse(8, 8))
    lower(make_sparse(8, 8, 7))
    with pytest.raises(ValueError, match=r"the weight \[4, 4, 2, 2\] has 256 bytes, expected at most 255"):
        lower(SparseConv2d.from_dense(torch.nn.Conv2d(4, 4, 2)))


def test_weights_that_only_together_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A low-rank layer beside a residual has three, each of which would fit."""
    layer = LowRankLinear.from_dense(torch.nn.Linear(32, 32), LowRank(4, residual=Int8(), rank_guard=False))
    sizes = [len(constant.raw_data) for constant in lower(layer).graph.initializer]
    monkeypatch.setattr("pycompress.onnx.graph.MAX_WEIGHT_BYTES", sum(sizes))
    lower(layer)
    monkeypatch.setattr("pycompress.onnx.graph.MAX_WEIGHT_BYTES", sum(sizes) - 1)
    assert max(sizes) < sum(sizes) - 1
    with pytest.raises(
        ValueError, match=rf"constants have together {sum(sizes)} bytes, expected at most {sum(sizes) - 1}"
    ):
        lower(layer)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_dependency_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pycompress.onnx")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'{missing}.*pip install "pycompress\[onnx\]"'):
        import pycompress.onnx  # noqa: F401


def test_every_compressed_module_has_a_lowering() -> None:
    assert all(key in LOWERINGS or key[0] in DENSE for key in pycompress.nn.LAYERS)
    assert set(LOWERINGS) <= set(pycompress.nn.LAYERS)


# --- sparse -------------------------------------------------------------------------------------------------------------


def make_sparse(
    k: int,
    n: int,
    activation_bits: int | None = None,
    bias: bool = True,
    activation: str = "none",
    density: float = 0.3,
) -> SparseLinear:
    """Random weights: float32, or int8 where activation_bits are given."""
    generator = torch.Generator().manual_seed(1000 * k + n)
    keep = torch.rand(n, k, generator=generator) < density
    offset = torch.randn(n, generator=generator) if bias else None
    if activation_bits is None:
        weight = SparseWeight.from_dense(torch.randn(n, k, generator=generator) * keep)
    else:
        values = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8) * keep
        weight = SparseWeight.from_dense(values, torch.rand(n, generator=generator) * 0.01 + 1e-4, activation_bits)
    return SparseLinear.from_weight(weight, offset, activation)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation_bits", [7, 8])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 16), (17, 17), (257, 33)])
def test_sparse_int8_equals_the_formula_to_the_bit(k: int, n: int, activation_bits: int, density: float) -> None:
    layer = make_sparse(k, n, activation_bits, density=density)
    runtime = session(lower(layer))
    for x in [extreme_rows(k), np.random.default_rng(n).standard_normal((17, k)).astype(F32)]:
        assert_bitwise(runtime.run(["y", "q", "acc"], {"x": x}), x, layer)


def test_sparse_int8_is_the_graph_of_the_dense_int8_layer() -> None:
    sparse = make_sparse(64, 33, 7, activation="gelu")  # (so small that its zeros stay)
    values, scale = dense_integers(sparse.canonical()), sparse.canonical().scale
    dense = Int8Linear.from_weight(Int8Weight(values, scale, 7, 8), sparse.bias, "gelu")
    assert lower(sparse) == lower(dense)


def sum_bound(x: Array, layer: SparseLinear, v: Array) -> Array:
    """How far any order of all k products may lie from the exact v: see validation.formulas."""
    k = layer.in_features
    size = np.abs(x.astype(np.float64)) @ np.abs(layer.weight.double().numpy()).T
    return 2.0**-23 * ((k + 2) * size + np.abs(v)) + (k + 2) * 2.0**-149


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 16), (17, 17), (1025, 33)])
def test_sparse_float32_within_the_bound(k: int, n: int, activation: str, bias: bool) -> None:
    layer = make_sparse(k, n, bias=bias, activation=activation)
    x = (np.random.default_rng(n).standard_normal((17, k)) * np.logspace(-3, 3, 17)[:, None]).astype(F32)
    (y,) = session(lower(layer)).run(["y"], {"x": x})
    v = x.astype(np.float64) @ layer.weight.double().numpy().T
    v = v if layer.bias is None else v + layer.bias.double().numpy()
    smooth = 8 * 2.0**-24 * np.abs(v) if activation not in ("none", "relu", "relu6") else 0
    assert y.dtype == np.float32
    assert (
        np.abs(y - activate64(v, activation)) <= SLOPE.get(activation, 1.13) * sum_bound(x, layer, v) + smooth
    ).all()


def test_sparse_float32_in_the_reference_evaluator() -> None:
    layer = make_sparse(64, 5, activation="relu")
    x = np.random.default_rng(0).standard_normal((9, 64)).astype(F32)
    (y,) = ReferenceEvaluator(lower(layer)).run(["y"], {"x": x})
    v = x.astype(np.float64) @ layer.weight.double().numpy().T + layer.bias.double().numpy()
    assert (np.abs(y - np.maximum(v, 0)) <= sum_bound(x, layer, v)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_sparse_float32_multiplies_the_zeros_too(bad: float) -> None:
    """The layer does not; validate() leaves such rows to NumPy."""
    layer = make_sparse(16, 24)
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(F32)
    x[1, 5] = bad
    (y,) = session(lower(layer)).run(["y"], {"x": x})
    assert np.isfinite(y[[0, 2]]).all()
    assert not np.isfinite(y[1]).any()
    own = layer(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(np.isfinite(own[1]), layer.weight.numpy()[:, 5] == 0)


@pytest.mark.parametrize("k", [96, 99])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_the_sparse_weight_is_stored_without_its_zeros(k: int, activation_bits: int | None) -> None:
    layer = make_sparse(k, 148, activation_bits)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in lower(layer).graph.initializer}
    weight = layer.canonical()
    assert "weight" not in stored
    np.testing.assert_array_equal(stored["weight_mask"][:, :, 0], weight.mask.numpy())
    assert stored["weight_values"].dtype == (np.float32 if activation_bits is None else np.int8)
    np.testing.assert_array_equal(stored["weight_values"], [0, *weight.values.numpy()])


def test_a_sparse_weight_that_would_save_nothing_keeps_its_zeros() -> None:
    for layer in (make_sparse(40, 20), make_sparse(96, 148, density=0.98), make_sparse(96, 148, 8, density=0.9)):
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in lower(layer).graph.initializer}
        values = layer.canonical().decompress() if layer.bits == 32 else dense_integers(layer.canonical())
        np.testing.assert_array_equal(stored["weight"], values.numpy().T)


def test_a_runtime_makes_the_sparse_weight_once(tmp_path: Path) -> None:
    """When it loads the model: what is left to run is the product."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    model = lower(make_sparse(99, 148)).SerializeToString()
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert left <= {"MatMul", "Add", "Gemm"}


def test_sparse_without_weights() -> None:
    layer, x = make_sparse(16, 5, density=0.0), np.ones((3, 16), F32)
    (y,) = session(lower(layer)).run(["y"], {"x": x})
    np.testing.assert_array_equal(y, np.tile(layer.bias.numpy(), (3, 1)))
