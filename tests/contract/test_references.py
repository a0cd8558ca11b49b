"""Every row beside its references: lowered to ONNX and run by ONNX Runtime, computed in NumPy; whoever is wrong is found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from packing import backends
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="the extra pycompress[onnx] is not installed")
pytest.importorskip("onnxruntime", reason="the extra pycompress[onnx] is not installed")

from lowered import constants, corrupt, one_off  # noqa: E402

import pycompress as pc  # noqa: E402
from contract.cases import EACH_ROW, EVERY, EVERY_FLOAT, Case  # noqa: E402
from pycompress import ops  # noqa: E402
from pycompress.nn import CompressedLayer  # noqa: E402
from pycompress.onnx import BLOCKS_OPSET, OPSET, lower, session  # noqa: E402
from pycompress.validation.formulas import EXACT_ACTIVATIONS, STEEPEST, STEEPEST_SMOOTH  # noqa: E402
from pycompress.weights import Weight  # noqa: E402

EPS = 2.0**-23
LEAST = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # one step of each, and sums of float32
ACTIVATIONS = pytest.mark.parametrize("activation", ops.ACTIVATIONS)
# (y is rounded to a dtype when all else is done, whatever the activation)
FINISHES = pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        *((name, torch.float32) for name in ops.ACTIVATIONS),
        *((name, dtype) for name in ("relu", "gelu") for dtype in [*LEAST][1:]),
    ],
)


@pytest.fixture(params=["native", "twin"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backends(request.param):
        yield request.param


def quantizes(settings: dict[str, Any]) -> bool:
    """Whether what a weight with these settings meets is made integers."""
    return settings.get("activation_bits", 16) < 16


def shows_integers(layer: CompressedLayer) -> bool:
    return quantizes(layer.settings) or quantizes(layer.settings.get("residual", {}))


def is_exact(layer: CompressedLayer) -> bool:
    """Whether every product is one of integers, over a whole row: y is the same to the bit in whatever order they are added."""
    inner = layer.settings.get("residual")
    if "group" in layer.settings or not quantizes(layer.settings):
        return False
    return inner is None or ("group" not in inner and quantizes(inner))


def reach(layer: CompressedLayer) -> Tensor:
    """float64 [n]: by how much an input of one in each place could move an output, over all paths through the layer."""
    weight = layer.canonical()
    if not hasattr(weight, "factors"):
        return weight.decompress().double().abs().sum(1)
    factors = [factor.double().abs() for factor in weight.factors()]
    if isinstance(weight, pc.weights.LowRankConv2dWeight):
        paths = pc.weights.low_rank_conv.composed(tuple(factors)).flatten(1)
    else:
        paths = factors[1] @ factors[0]
    if getattr(weight, "residual", None) is not None:
        paths = paths + weight.residual.decompress().double().abs()
    return paths.sum(1)


def run(layer: CompressedLayer, x: Tensor) -> dict[str, Any]:
    opened = session(lower(layer))
    names = [value.name for value in opened.get_outputs()]
    return dict(zip(names, opened.run(names, {"x": x.numpy()}), strict=True))


# --- ONNX ---------------------------------------------------------------------------------------------------------------


@EVERY
def test_the_model_is_standard_onnx(case: Case) -> None:
    for activation in ops.ACTIVATIONS:
        layer = case.layer(activation)
        model = lower(layer)
        onnx.checker.check_model(model, full_check=True)
        opset = BLOCKS_OPSET if "group" in str(layer.settings) else OPSET
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
        assert {node.domain for node in model.graph.node} == {""}
        assert len(model.functions) == 0
        assert not any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute)
        assert [value.name for value in model.graph.input] == ["x"]
        outputs = [value.name for value in model.graph.output]
        assert outputs[0] == "y" and bool(outputs[1:]) == shows_integers(layer)
        if "rank" not in layer.settings and quantizes(layer.settings):
            assert outputs == ["y", "q", "acc"][: 2 if "group" in layer.settings else 3]


@EVERY
@ACTIVATIONS
@pytest.mark.parametrize("bias", [True, False])
def test_onnx_runtime_is_within_the_bound(case: Case, activation: str, bias: bool) -> None:
    """Of the layer: both meet a rounding for each product, and one for each further sum, that leads to an output."""
    layer, x = case.layer(activation, bias=bias), case.x(17)
    if not case.kind.tokens:
        x = x * torch.logspace(-3, 3, 17).view(-1, *[1] * (x.dim() - 1))
    found, y = run(layer, x)["y"], layer(x)
    assert (found.dtype, found.shape) == (np.float32, y.shape)
    size = reach(layer).view(-1, *[1] * max(0, case.kind.dims - 1))
    if case.kind.tokens:
        size = layer.canonical().decompress().double().abs().sum(1).max()
    else:
        size = size * x.double().flatten(1).abs().amax(1).view(-1, *[1] * (y.dim() - 1)) * 1.01
    size = size + (0 if layer.bias is None else float(layer.bias.abs().max()))
    roundings = layer.k + sum(layer.settings.get("ranks", [layer.settings.get("rank", 0)])) * 6 + 8
    bound = 2 * EPS * roundings * STEEPEST.get(activation, STEEPEST_SMOOTH) * size
    if is_exact(layer) and activation in EXACT_ACTIVATIONS:
        bound = torch.zeros(())
    assert bool(((torch.from_numpy(found).double() - y.double()).abs() <= bound).all())


@EVERY
def test_no_rows_and_any_number_of_rows(case: Case) -> None:
    layer, x = case.layer(), case.x(9)
    opened = session(lower(layer))
    whole = opened.run(["y"], {"x": x.numpy()})[0]
    for empty, full in zip(*(opened.run(None, {"x": given.numpy()}) for given in (x[:0], x)), strict=True):
        assert (empty.shape, empty.dtype) == ((0, *full.shape[1:]), full.dtype)
    by_row = np.concatenate([opened.run(["y"], {"x": x[i : i + 1].numpy()})[0] for i in range(9)])
    if is_exact(layer):
        np.testing.assert_array_equal(whole, by_row)
    np.testing.assert_allclose(whole, by_row, rtol=1e-4, atol=1e-5)


# --- validate -----------------------------------------------------------------------------------------------------------


@EVERY
@FINISHES
def test_passes(case: Case, activation: str, dtype: torch.dtype, backend: str) -> None:
    activation = activation if case.kind.epilogue else "none"
    layer, x = case.layer_type.from_dense(case.dense().to(dtype), case.method, activation), case.x(5)
    model = nn.Sequential(layer)
    x = x if case.kind.tokens else x.to(dtype)
    report = pc.validate(model, x)
    assert report.ok and report.first_divergence is None, str(report)
    (record,) = report.layers
    rows = len(case.kind.results(layer(x)))
    assert (record.rows, record.rows_seen, record.status, record.reason) == (rows, rows, "ok", "")
    assert record.integers_equal is (True if shows_integers(layer) else None)
    if is_exact(layer) and layer.activation in EXACT_ACTIVATIONS:
        assert (record.max_ulp, record.share_of_bound, record.relative_error) == (0, None, 0.0)
        assert (report.model.tensors, report.model.max_difference, report.model.cosine) == (1, 0.0, 1.0)
        assert report.model.perturbed_cosine is None
        return
    assert record.max_ulp is None
    assert record.share_of_bound is not None and 0 <= record.share_of_bound <= 1
    one_product = case.kind.tokens and not hasattr(layer.canonical(), "factors")  # all have its bits
    some = record.share_of_bound > 0 or one_product
    assert some or dtype != torch.float32 or shows_integers(layer) or not layer.weight.any()
    assert record.relative_error is not None and record.relative_error < LEAST[dtype]
    assert report.model.cosine > 0.999
    assert report.model.perturbed_cosine is not None, "the outputs need not be equal"
    assert "last bits of gelu, silu and float32 sums are amplified" in str(report)


def hard_items(case: Case) -> Tensor:
    """Ordinary items, constants, zeros, large and tiny ones to both sides of what is quantized as zeros, NaN and Inf."""
    x = case.x(18)
    rows = x.view(len(x), -1)
    for row, value in enumerate((0.0, 1.5, -2.0, 2.0**-99, 2.0**-99 * (1 - 2.0**-24), 1e-40)):
        rows[row + 2] = value
    rows[8] *= 1e-30
    rows[9] *= 1e15
    rows[15] = 1e30
    for row, place in ((10, 0), (11, rows.shape[1] // 2), (12, rows.shape[1] - 1)):
        rows[row, place] = (torch.nan, torch.inf, -torch.inf)[row - 10]
    rows[13, :2] = torch.tensor([torch.inf, -torch.inf])
    rows[14] = torch.nan
    return x


@EVERY_FLOAT
@FINISHES
def test_hard_items_pass(case: Case, activation: str, dtype: torch.dtype, backend: str) -> None:
    layer, x = case.layer(activation), hard_items(case).to(dtype)
    report = pc.validate(nn.Sequential(layer), x)
    assert report.ok, str(report)
    assert report.layers[0].rows == len(case.kind.results(layer(x)))
    y = layer(x).flatten(1)
    assert not y[14].isfinite().any() or layer.settings.get("nnz", 1) < layer.n * layer.k
    assert y[[0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 17]].isfinite().all()
    if quantizes(layer.settings):
        assert y[10:15].isnan().all(), "a row that cannot be quantized"


@EACH_ROW
def test_inputs_of_any_shape_pass(case: Case, backend: str) -> None:
    layer = case.layer("relu")
    for lead in case.leads:
        x = case.given(lead)
        report = pc.validate(nn.Sequential(layer), x)
        assert report.ok, str(report)
        assert report.layers[0].rows == len(case.kind.results(layer(x)))
        if case.kind.tokens:
            assert pc.validate(nn.Sequential(layer), x.int()).ok
    if () in case.leads and not case.kind.tokens:
        assert pc.validate(nn.Sequential(layer), hard_items(case)[11]).ok
    report = pc.validate(nn.Sequential(layer), case.x(3)[:0])
    assert (report.layers[0].rows, report.ok) == (0, False)
    assert "NOTHING COMPARED" in str(report)


# --- what is wrong is found ---------------------------------------------------------------------------------------------


def all_inputs(case: Case) -> Tensor:
    """So many that every weight meets one that is not zero."""
    return torch.arange(case.kind.shape(case.dense())[0]) if case.kind.tokens else case.x(40)


def nearly(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor with one number changed: which one, and how, a weight takes differs."""
    largest = int(tensor.double().abs().argmax()) if tensor.numel() else 0
    for place in [largest, tensor.numel() // 2, 0] if tensor.numel() else ():
        changed = tensor.clone()
        flat = changed.view(-1)
        if tensor.is_floating_point():
            flat[place] *= 1.02
        else:
            flat[place] = flat[place] ^ 1 if tensor.dtype == torch.uint8 else flat[place] - flat[place].sign()
        if not torch.equal(changed, tensor):
            yield changed


def neighbours(layer: CompressedLayer) -> Iterator[tuple[str, CompressedLayer]]:
    """By the name of a tensor: the same layer with one number of that changed."""
    weight = layer.canonical()
    own = weight.tensors()
    for name, tensor in own.items():
        for changed in nearly(tensor):
            try:
                other = type(weight).from_tensors(weight.shape, {**own, name: changed}, weight.settings())
            except ValueError:
                continue  # a value that is zero now, or a mask of another number of weights
            if "_input_" in name or not torch.equal(other.decompress(), weight.decompress()):
                yield name, type(layer).build(other, layer.geometry, layer.bias, layer.activation)
                break


def matters(weight: Weight, name: str, tensor: Tensor) -> bool:
    """Whether other numbers in a tensor of the weight make other products: not the scales of no integers."""
    if "_input_" in name:
        return True
    if not tensor.is_floating_point():
        return tensor.numel() > 0 and "mask" not in name
    other = type(weight).from_tensors(weight.shape, {**weight.tensors(), name: tensor * 2}, weight.settings())
    return not torch.equal(other.decompress(), weight.decompress())


@EVERY
def test_a_wrong_packed_buffer_is_found_against_both_references(case: Case) -> None:
    layer, x = case.layer(), all_inputs(case)
    weight = layer.canonical()
    layer.canonical = lambda: weight  # what is saved and lowered
    right = layer.packed, layer.form
    model, found = nn.Sequential(layer), set()
    for name, other in neighbours(layer):
        layer.packed, layer.form = other.packed, other.form
        report = pc.validate(model, x)
        layer.packed, layer.form = right
        assert report.first_divergence == "0", name
        reason = report.layers[0].reason
        what = "acc: " if is_exact(layer) and name.endswith("_values") else ""
        assert f"{what}native and ONNX Runtime differ" in reason, name
        of_y_alone = is_exact(layer) and (
            name == "low_rank_up" or name.endswith("scale")
        )  # which is compared with one of the two then
        assert f"{what}native and NumPy differ" in reason or of_y_alone, name
        assert "ONNX Runtime and NumPy" not in reason, name
        found.add(name)
    assert found == {name for name, tensor in weight.tensors().items() if matters(weight, name, tensor)}


@EVERY
def test_a_wrong_constant_is_found(case: Case) -> None:
    """Of ONNX Runtime's: the weights, the scales, the bias, each."""
    layer, x = case.layer(), all_inputs(case)
    model = nn.Sequential(layer)
    stored = constants(lower(layer))
    for name, array in stored.items():
        if (
            array.size == 1
            or array.dtype == np.int64
            or name == "bits"
            or not stored.get(name.removesuffix("_scale"), array).any()
        ):
            continue  # a step of the formula, or the scales of no integers
        if name.endswith("_mask") and array.max() % 2 == 0:
            continue  # one less has more bits than there are values, which ONNX Runtime says itself
        with pytest.MonkeyPatch.context() as patch:
            corrupt(patch, layer, name, one_off)
            report = pc.validate(model, x)
        assert report.first_divergence == "0", name
        reason = report.layers[0].reason
        what = "acc: " if is_exact(layer) and name == "weight" else ""
        of_y_alone = is_exact(layer) and ("scale" in name or name == "bias")
        assert f"{what}native and ONNX Runtime differ in " in reason, name
        assert f"{what}ONNX Runtime and NumPy differ in " in reason or of_y_alone, name
        assert "native and NumPy" not in reason, name  # so the reader sees who is alone


@EVERY
def test_a_wrong_result_is_found(case: Case) -> None:
    layer, x = case.layer(), all_inputs(case)
    native = layer.forward

    def one_number_off(x: Tensor) -> Tensor:
        y: Tensor = native(x)
        flat = y.view(-1)
        flat[int(flat.abs().argmax())] *= 1 + 1e-3
        return y

    layer.forward = one_number_off
    report = pc.validate(nn.Sequential(layer), x)
    assert report.first_divergence == "0"
    reason = report.layers[0].reason
    assert "y: native and ONNX Runtime differ in 1 of" in reason
    assert "ONNX Runtime and NumPy" not in reason
