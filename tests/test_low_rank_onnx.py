"""Low-rank layers lowered to ONNX, and validate() of them, on the native kernels and on their twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="the extra pycompress[onnx] is not installed")
pytest.importorskip("onnxruntime", reason="the extra pycompress[onnx] is not installed")

from lowered import corrupt  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from packing import backends, pack_int8  # noqa: E402

import pycompress as pc  # noqa: E402
import pycompress.onnx  # noqa: E402
from pycompress import ops  # noqa: E402
from pycompress.methods import Dense, Int4, Int8, LowRank, Method, Sparse  # noqa: E402
from pycompress.nn import CompressedLayer, LowRankConv2d, LowRankEmbedding, LowRankLinear  # noqa: E402
from pycompress.onnx import lower, session  # noqa: E402
from pycompress.onnx.graph import Graph  # noqa: E402
from pycompress.validation.table import check_of  # noqa: E402
from pycompress.weights.low_rank_conv import DECOMPOSITIONS, composed  # noqa: E402

Array = npt.NDArray[Any]
EPS = 2.0**-23
SMOOTH = ["gelu", "gelu_tanh", "silu", "quick_gelu"]
RESIDUALS: dict[str, Method | None] = {
    "none": None,
    "int8": Int8(7),
    "int8 8-bit": Int8(8),
    "sparse": Sparse(0.3),
    "sparse int8": Sparse(0.3, bits=8),
    "dense": Dense(),
    "int4": Int4(),
    "int4 symmetric": Int4(128, symmetric=True),
}
INTEGERS = {"int8": ("residual_q", "residual_acc"), "int8 8-bit": ("residual_q", "residual_acc")}
INTEGERS["sparse int8"] = INTEGERS["int8"]
INT4 = ["int4", "int4 symmetric"]
FACTORS = ("t", "down_q", "down_acc", "up_q", "up_acc")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
EACH = pytest.mark.parametrize("residual", RESIDUALS)


@pytest.fixture(params=["native", "twin"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backends(request.param):
        yield request.param


def linear(
    residual: str = "none",
    bits: int = 32,
    activation: str = "none",
    *,
    k: int = 48,
    n: int = 33,
    bias: bool = True,
    **options: Any,
) -> LowRankLinear:
    how = LowRank(5, bits=bits, residual=RESIDUALS[residual], rank_guard=False, **options)
    return LowRankLinear.from_dense(nn.Linear(k, n, bias=bias), how, activation)


def conv(decomposition: str = "channel", activation: str = "none", **arguments: Any) -> LowRankConv2d:
    how = LowRank(3, decomposition=decomposition, rank_guard=False)
    return LowRankConv2d.from_dense(
        nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, **arguments}), how, activation
    )


def embedding(dtype: torch.dtype = torch.float32) -> LowRankEmbedding:
    return LowRankEmbedding.from_dense(nn.Embedding(30, 16).to(dtype), LowRank(5, embeddings=True, rank_guard=False))


def hard_rows(k: int) -> Tensor:
    """Ordinary rows, constants, zeros, tiny and large ones, NaN and Inf."""
    x = torch.randn(12, k)
    x[2], x[3], x[4] = 0, 1.5, -2
    x[5] *= 1e-30
    x[6] *= 1e15
    x[7, 0], x[8, k - 1], x[9, k // 2] = torch.nan, torch.inf, -torch.inf
    return x


def run(layer: CompressedLayer, x: Tensor) -> dict[str, Array]:
    opened = session(lower(layer))
    names = [value.name for value in opened.get_outputs()]
    return dict(zip(names, opened.run(names, {"x": x.numpy()}), strict=True))


def equal(a: Array, b: Tensor) -> bool:
    return np.array_equal(a, b.numpy(), equal_nan=True)


# --- lowering -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 8])
@EACH
def test_outputs(residual: str, bits: int) -> None:
    own = ("residual_q",) if residual in INT4 else INTEGERS.get(residual, ())
    expected = ["y", *(FACTORS if bits == 8 else ()), *own]
    assert [value.name for value in lower(linear(residual, bits)).graph.output] == expected


def checked_product(
    found: dict[str, Array], name: str, x: Tensor, values: Tensor, scale: Tensor | None, activation_bits: int
) -> Tensor:
    """An int8 product by the ops of the int8 layer, whose integers those that were found must equal."""
    packed = pack_int8(values, activation_bits, scale)
    finite = torch.where(x.isfinite().all(1, keepdim=True), x, 0.0)
    assert equal(found[f"{name}_q"], ops.int8_quantize(finite, activation_bits)[0])
    assert equal(found[f"{name}_acc"], ops.int8_accumulate(finite, *packed)[0])
    assert scale is not None
    return ops.int8_linear(x, *packed)


@pytest.mark.parametrize("activation_bits", [7, 8])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("residual", ["none", *INTEGERS])
def test_all_int8_is_the_composition_of_int8_products_to_the_bit(
    residual: str, activation: str, activation_bits: int
) -> None:
    layer = linear(residual, 8, activation, activation_bits=activation_bits)
    weight, x = layer.canonical(), hard_rows(48)
    found = run(layer, x)
    t = checked_product(found, "down", x, weight.down, weight.down_scale, activation_bits)
    v = checked_product(found, "up", t, weight.up, weight.up_scale, activation_bits)
    v = v if layer.bias is None else v + layer.bias
    assert equal(found["t"], t)
    if weight.residual is not None:
        v = pc.nn.LAYERS["linear", weight.residual.name].from_weight(weight.residual)(x) + v
    v = torch.relu(v) if activation == "relu" else v
    assert equal(found["y"], v)
    assert equal(found["y"], layer(x))
    assert np.isnan(found["y"][7:10]).all()


@pytest.mark.parametrize("bias", [True, False])
@EACH
def test_float32_factors_within_the_bound(residual: str, bias: bool) -> None:
    layer = linear(residual, k=257, n=19, bias=bias)
    weight, x = layer.canonical(), torch.randn(17, 257) * torch.logspace(-3, 3, 17)[:, None]
    y, x64 = run(layer, x)["y"], x.double()
    down, up = weight.down.double(), weight.up.double()
    exact, size = x64 @ down.T @ up.T, x64.abs() @ down.abs().T @ up.abs().T
    exact = exact if layer.bias is None else exact + layer.bias.double()
    roundings = 257 + 5 + 4
    if weight.residual is not None:
        if residual in INTEGERS:
            beside = pc.nn.LAYERS["linear", weight.residual.name].from_weight(weight.residual)(x).double()
            size, roundings = size + beside.abs(), roundings + 2
        else:
            if residual in INT4:
                q, scale, zero_point = ops.int8_quantize(x, 8)
                x64, roundings = (q.double() - zero_point[:, None]) * scale.double()[:, None], roundings + 2
            dense = weight.residual.decompress().double()
            beside, roundings = x64 @ dense.T, roundings + 257
            size = size + x64.abs() @ dense.abs().T
        exact = exact + beside
    bound = EPS * roundings * size + EPS * exact.abs()
    assert y.dtype == np.float32
    assert (np.abs(y - exact.numpy()) <= bound.numpy()).all()


def test_weights_are_stored_once_in_their_own_dtype() -> None:
    layer = linear("int8", 8)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in lower(layer).graph.initializer}
    weight = layer.canonical()
    for name, values in (
        ("down_weight", weight.down),
        ("up_weight", weight.up),
        ("residual_weight", layer._tensors()["low_rank_residual_int8_values"]),
    ):
        assert stored[name].dtype == np.int8
        np.testing.assert_array_equal(stored[name], values.numpy().T)
    assert sum(array.nbytes for array in stored.values()) < 48 * 33 + 5 * (48 + 33) + 4 * (4 * 33 + 4 * 33 + 2 * 5 + 33)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2},
        {"padding": "same", "dilation": (1, 3), "kernel_size": (4, 2)},
        {"bias": False, "padding": (0, 2)},
        {"kernel_size": 1},
    ],
)
def test_convolutions(decomposition: str, arguments: dict[str, Any]) -> None:
    layer = conv(decomposition, "relu", **arguments)
    x = torch.randn(2, 4, 9, 10)
    found = run(layer, x)["y"]
    factors = layer.canonical().factors()
    paths = composed(tuple(factor.abs() for factor in factors)).sum(dim=(1, 2, 3))
    atol = EPS * sum(factor[0].numel() + 2 for factor in factors) * float(paths.max() * x.abs().max() + 1)
    np.testing.assert_allclose(found, layer(x).numpy(), rtol=0, atol=2 * atol)
    (reference_y,) = ReferenceEvaluator(lower(layer)).run(["y"], {"x": x.numpy()})
    np.testing.assert_allclose(reference_y, found, rtol=0, atol=2 * atol)
    assert [node.op_type for node in lower(layer).graph.node].count("Conv") == len(factors)


def test_embeddings() -> None:
    layer, tokens = embedding(), torch.tensor([3, 0, 29, 3])
    found = run(layer, tokens)["y"]
    torch.testing.assert_close(torch.from_numpy(found), layer(tokens), atol=1e-5, rtol=1e-5)
    (reference_y,) = ReferenceEvaluator(lower(layer)).run(["y"], {"x": tokens.numpy()})
    np.testing.assert_allclose(reference_y, found, atol=1e-5)
    assert [node.op_type for node in lower(layer).graph.node] == ["Gather", "MatMul", "Identity"]


def test_the_reference_evaluator_agrees() -> None:
    layer, x = linear("sparse int8", 8, "relu"), torch.randn(5, 48)
    names = ["y", *FACTORS, "residual_q", "residual_acc"]
    with np.errstate(all="ignore"):
        found = ReferenceEvaluator(lower(layer)).run(names, {"x": x.numpy()})
    runtime = run(layer, x)
    assert all(np.array_equal(a, runtime[name]) for a, name in zip(found, names, strict=True))


def test_weights_beyond_two_gibibytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycompress.onnx.graph.MAX_WEIGHT_BYTES", 32)
    for layer in (linear(), linear(bits=8), conv(), embedding()):
        with pytest.raises(ValueError, match=r"lower: the weight \[.*expected at most 32"):
            lower(layer)


def test_a_graph_keeps_its_constants_apart() -> None:
    graph = Graph()
    assert graph.constant("a", 1.0) == graph.constant("a", 1.0) == "a"
    assert len(graph.initializers) == 1
    with pytest.raises(ValueError, match="the graph has another constant a"):
        graph.constant("a", 2.0)


# --- validate -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_convolutions_pass(decomposition: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(
        conv(decomposition, "silu", stride=2), conv(decomposition, kernel_size=(2, 4), padding="same", in_channels=6)
    )
    x = torch.randn(3, 4, 9, 11).to(dtype)
    for images in (x, x[0]):
        report = pc.validate(model, images)
        assert report.ok, str(report)
        for record in report.layers:
            assert (record.rows, record.integers_equal, record.max_ulp) == (record.rows_seen, None, None)
            assert record.share_of_bound is not None and record.share_of_bound <= 1
    x[1, 2, 3, 4], x[2, 0, 0, 0] = torch.nan, torch.inf
    assert pc.validate(model, x).ok


def one_off(array: Array) -> None:
    flat = array.reshape(-1)
    flat[0] += 1 if flat[0] < 127 else -1


def slightly_larger(array: Array) -> None:
    array *= np.float32(1.001)


CORRUPTED: dict[str, tuple[Callable[[], CompressedLayer], str, str]] = {
    "down": (linear, "down", "y: native and ONNX Runtime differ"),
    "up": (linear, "up", "y: ONNX Runtime and NumPy differ"),
    "bias": (linear, "bias", "y: native and ONNX Runtime differ"),
    "int8 down": (lambda: linear(bits=8), "down_weight", "down_acc: ONNX Runtime and NumPy differ"),
    "int8 down's t": (lambda: linear(bits=8), "down_weight", "t: native and ONNX Runtime differ"),
    "int8 down's scale": (lambda: linear(bits=8), "down_weight_scale", "t: native and ONNX Runtime differ"),
    "int8 up": (lambda: linear(bits=8), "up_weight", "up_acc: ONNX Runtime and NumPy differ"),
    "int8 up's scale": (lambda: linear(bits=8), "up_weight_scale", "y: native and ONNX Runtime differ"),
    "int8 residual": (lambda: linear("int8"), "residual_weight", "residual_acc: native and ONNX Runtime differ"),
    "its scale": (lambda: linear("int8"), "residual_weight_scale", "y: native and ONNX Runtime differ"),
    "its scale behind gelu": (lambda: linear("int8", 8, "gelu"), "residual_weight_scale", "y: native and ONNX"),
    "sparse residual": (lambda: linear("sparse"), "residual_values", "y: native and ONNX Runtime differ"),
    "int4 residual's scale": (lambda: linear("int4", 8), "residual_weight_scale", "y: native and ONNX Runtime differ"),
    "int4 residual's rows": (lambda: linear("int4"), "half_amax_255", "residual_q: native and ONNX Runtime differ"),
    "dense residual": (lambda: linear("dense", 8), "residual", "y: native and ONNX Runtime differ"),
    "convolution": (lambda: conv("spatial"), "down", "y: native and ONNX Runtime differ"),
    "core": (lambda: conv("tucker"), "core", "y: ONNX Runtime and NumPy differ"),
    "table": (embedding, "up", "y: native and ONNX Runtime differ"),
    "basis": (embedding, "down", "y: ONNX Runtime and NumPy differ"),
}  # fmt: skip


def inputs_of(layer: CompressedLayer) -> Tensor:
    if isinstance(layer, LowRankEmbedding):
        return torch.arange(30)
    return torch.randn(2, 4, 8, 8) if isinstance(layer, LowRankConv2d) else torch.randn(40, 48)


@pytest.mark.parametrize("case", CORRUPTED)
def test_a_changed_constant_is_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, initializer, reason = CORRUPTED[case]
    layer = make()
    corrupt(monkeypatch, layer, initializer, one_off if initializer.endswith("_weight") else slightly_larger)
    report = pc.validate(nn.Sequential(layer), inputs_of(layer))
    assert report.first_divergence == "0"
    assert reason in report.layers[0].reason
    assert "native and NumPy" not in report.layers[0].reason


@pytest.mark.parametrize("residual", INT4)
def test_beside_int4_int8_factors_must_equal_numpy_to_the_bit(residual: str) -> None:
    """ONNX Runtime's y may lie further off: it adds up in another order."""
    layer, x = linear(residual, 8, "relu"), torch.randn(9, 48)
    y = layer(x)
    reasons = []
    for wrong in (False, True):
        check = check_of("layer", layer, session(lower(layer)))
        largest = (y == y.max()) & wrong
        check(x, torch.where(largest, torch.nextafter(y, torch.tensor(torch.inf)), y))
        reasons.append(check.record().reason)
    assert reasons[0] == ""
    assert reasons[1].startswith("y: native and NumPy differ in 1 of 297") and "\n" not in reasons[1]


def test_a_model_of_all_of_them() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.conv, self.head = embedding(), conv("channel", "relu"), linear("int8", k=96, n=7)

        def forward(self, tokens: Tensor) -> Tensor:
            images = self.tokens(tokens).reshape(-1, 4, 4, 4)
            result: Tensor = self.head(self.conv(images).flatten(1))
            return result

    report = pc.validate(Model(), torch.randint(30, (3, 4)))
    assert report.ok, str(report)
    assert [record.name for record in report.layers] == ["tokens", "conv", "head"]
    assert "OK: 3 layer(s)" in str(report)
