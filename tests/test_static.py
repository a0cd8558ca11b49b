"""Static int8: the input is quantized with one range for all rows, which was known before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing import backend  # noqa: F401
from torch import Tensor, nn

import pycompress as pc
from pycompress import Entropy, Int8, Known, LowRank, MeanSquaredError, MinMax, MovingAverage, Percentile, ops
from pycompress.nn.rounded import rounded_rows
from pycompress.weights import LowRankWeight

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


# --- layers -----------------------------------------------------------------------------------------------------------

KNOWN = Int8(activation="static", observer=Known(-4.0, 4.0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 24)).eval()


def calibrated(model: nn.Module, batches: list[Tensor], method: Int8) -> Any:
    return pc.compress(model, method, calibration=pc.calibrate(model, batches, plan=method))


def test_a_layer_has_the_range_that_was_seen() -> None:
    model, batches = mlp(), [torch.randn(9, 48) * size for size in (1, 3)]
    found = calibrated(model, batches, Int8(activation="static"))
    seen = torch.cat(batches)
    scale, zero_point = found[0].canonical().input_range
    assert scale == pytest.approx(float(seen.max() - seen.min()) / 255, rel=1e-6)
    assert zero_point == round(-float(seen.min()) / scale)
    assert found[2].canonical().input_range[1] == round(0.16997 / found[2].canonical().input_range[0]), "of GELU"
    assert [row.label for row in pc.summary(found).layers] == ["int8 static", "int8 static"]
    assert (found(seen) - model(seen)).norm() / model(seen).norm() < 0.02


def test_it_equals_dynamic_where_every_row_has_the_range() -> None:
    """Rows with the same ends: the formulas meet."""
    x = torch.randn(20, 48).clamp(-2, 3)
    x[:, 0], x[:, 1] = -2, 3
    linear = nn.Linear(48, 24)
    static = pc.compress(linear, Int8(activation="static", observer=Known(-2.0, 3.0)))
    dynamic = pc.compress(linear, Int8())
    torch.testing.assert_close(static(x), dynamic(x), rtol=1e-5, atol=1e-6)


def test_without_a_calibration_it_is_an_error_that_names_the_layer() -> None:
    model, static = mlp(), Int8(activation="static")
    for call in (lambda: pc.compress(model, static), lambda: pc.prepare(model, static, steps=1)):
        with pytest.raises(ValueError, match=r"compress: 0: Int8\(.*expected calibration=pc.calibrate"):
            call()
    with pytest.raises(ValueError, match=r"2: Int8"):
        pc.compress(model, {"2": static, "*": None})
    moments = pc.calibrate(model, [torch.randn(4, 48)])
    with pytest.raises(ValueError, match="compress: 0: Int8: of the inputs moments were gathered, expected ranges"):
        pc.compress(model, static, calibration=moments)
    with pytest.raises(ValueError, match="Int8: the activation is static, and nothing is known of the inputs"):
        static.compress(torch.randn(4, 48))
    empty = pc.calibrate(model, [torch.randn(0, 48)], plan=static)
    with pytest.raises(ValueError, match="the calibration never saw 0"):
        pc.compress(model, static, calibration=empty)
    assert all(type(layer) is nn.Linear for layer in (model[0], model[2])), "the model is as it was"


def test_methods_that_are_none() -> None:
    for options, error, message in (
        ({"activation": "sometimes"}, ValueError, "activation is 'sometimes', expected one of dynamic, static"),
        ({"activation_bits": 16, "activation": "static"}, ValueError, "activation is 'static' with activation_bits 16"),
        ({"observer": MinMax}, TypeError, "observer is .*, expected one such as"),
        ({"observer": None}, TypeError, "observer is None"),
    ):
        with pytest.raises(error, match=message):
            Int8(**options)  # type: ignore[arg-type]
    for residual in (KNOWN, Int8(activation="static")):
        with pytest.raises(ValueError, match="expected a dynamic one: it shares quantized rows"):
            LowRank(4, residual=residual)
    weight = KNOWN.compress(torch.randn(8, 16))
    with pytest.raises(ValueError, match="the residual is static, expected a dynamic one"):
        LowRankWeight(torch.randn(2, 16), torch.randn(8, 2), residual=weight)
    assert repr(KNOWN).endswith("activation='static', observer=Known(low=-4.0, high=4.0))")
    assert Int8(activation="static", observer=Known(-4.0, 4.0)) == KNOWN and hash(KNOWN) != hash(Int8())


def test_weights_are_rounded_by_moments_where_there_are_any() -> None:
    linear, batches = nn.Linear(32, 16), [torch.randn(200, 32) @ torch.randn(32, 32)]
    static = Int8(activation="static")
    whole, lean = pc.calibrate(linear, batches, plan=static), pc.calibrate(linear, batches, gather="ranges")
    found = [pc.compress(linear, method, calibration=seen).canonical() for method, seen in (
        (static, whole), (static, lean), (Int8(), whole)
    )]  # fmt: skip
    assert torch.equal(found[0].values, found[2].values) and not torch.equal(found[0].values, found[1].values)
    assert found[0].input_range == found[1].input_range


def test_embeddings_go_without() -> None:
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 8)).eval()
    static = Int8(activation="static", embeddings=True)
    found = calibrated(model, [torch.arange(20)], static)
    assert [row.label for row in pc.summary(found).layers] == ["int8", "int8 static"]
    alone = pc.compress(model, {"0": static, "*": None})
    assert alone[0].canonical().static is None


def test_tied_layers_share_the_range_of_all_their_inputs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(10 * self.a(x))  # type: ignore[no-any-return]

    model = Tied().eval()
    for observer in (MinMax(), MovingAverage(), Percentile(), MeanSquaredError(), Entropy()):
        found = calibrated(model, [torch.randn(8, 16)] * 2, Int8(activation="static", observer=observer))
        assert found.a.packed is found.b.packed
        assert found.a.canonical().input_range == found.b.canonical().input_range


@pytest.mark.parametrize("activation_bits", [7, 8])
def test_validated_against_onnx_runtime(activation_bits: int) -> None:
    model = mlp()
    x = torch.cat([torch.randn(40, 48) * 3, torch.full((1, 48), 1e38), torch.full((1, 48), -1e38)])
    x[3, 5], x[4, 6] = math.nan, math.inf
    found = pc.compress(model, replace(KNOWN, activation_bits=activation_bits))
    report = pc.validate(found, x)
    assert report.ok, str(report)
    assert all(row.integers_equal for row in report.layers)


def test_saved_and_loaded_and_what_a_dynamic_layer_says_of_it(tmp_path: Path) -> None:
    model, x, path = mlp(), torch.randn(5, 48), tmp_path / "m.safetensors"
    found = pc.compress(model, KNOWN)
    pc.save(found, path)
    again = pc.load(mlp(), path)
    assert torch.equal(again(x), found(x)) and again[0].canonical().input_range == found[0].canonical().input_range
    dynamic = pc.compress(model, Int8())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0.int8_input_scale"):
        dynamic.load_state_dict(found.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*0.int8_input_scale"):
        found.load_state_dict(dynamic.state_dict())
    assert dynamic[0].settings == {"activation_bits": 8, "weight_bits": 8}, "files of dynamic layers are as they were"


def test_another_range_needs_no_new_graph() -> None:
    """It lies in the tensor, not in the form."""
    one = pc.compress(nn.Linear(16, 8), KNOWN)
    other = pc.compress(nn.Linear(16, 8), Int8(activation="static", observer=Known(-1.0, 2.0)))
    assert one.form == other.form and not torch.equal(one.packed, other.packed)


def test_prepared_it_trains_as_it_is_deployed() -> None:
    model, batches = mlp(), [torch.randn(40, 48)]
    static = Int8(activation="static", observer=Percentile(99.0))
    seen, x = pc.calibrate(model, batches, plan=static), torch.randn(30, 48) * 2
    training = pc.prepare(model, static, steps=4, calibration=seen)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
        training.step()
    simulated, evaluated = model.train()(x), model.eval()(x)
    frozen = pc.compress(model)
    assert torch.equal(evaluated, frozen(x)) and frozen[0].static
    torch.testing.assert_close(simulated, evaluated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("of", RANGES)
def test_the_simulation_rounds_as_the_kernels(of: Range) -> None:
    for x in (rows_of(33)[:10], torch.randn(7, 33).bfloat16()):
        with np.errstate(over="ignore"):
            expected = ops.int8_round(x, 8, of).to(x.dtype)
        assert torch.equal(rounded_rows(x, 8, of), expected)
        assert torch.equal(torch.compile(rounded_rows, backend="eager")(x, 8, of), expected)


def test_reconstructed_it_keeps_its_range() -> None:
    model, batches = mlp(), [torch.randn(16, 48) for _ in range(4)]
    found, again = pc.compress(model, KNOWN), pc.reconstruct(model, KNOWN, batches, steps=2)
    assert again[0].canonical().input_range == found[0].canonical().input_range  # type: ignore[index, operator]


def test_blocks_multiply_static_layers() -> None:
    """Query, key and value of one range share their quantized rows, those of others have their own."""
    config = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **config)).eval()
    tokens = torch.randint(50, (3, 11))
    static = Int8(activation="static")
    seen = pc.calibrate(model, [{"input_ids": tokens}], plan=static)
    plans: list[Any] = [static, {"*.value": KNOWN, "*": static}, {"*.key": Int8(), "*": static}]
    for plan in plans:
        blocks, layers = (pc.compress(model, plan, calibration=seen, blocks=blocks) for blocks in (True, False))
        assert [block.reason for block in pc.summary(blocks).blocks if "Layer" in block.kind] == [""]
        with torch.no_grad():
            found, expected = blocks(tokens)[0], layers(tokens)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    query, value = (blocks.get_submodule(f"encoder.layer.0.attention.self.{name}") for name in ("query", "value"))
    assert query.canonical().input_range == value.canonical().input_range, "what they meet is the same"


def test_summary_warns_of_outlier_features() -> None:
    model, x = nn.Linear(32, 8), torch.randn(100, 32)
    static = Int8(activation="static")
    (calm,) = pc.summary(calibrated(model, [x], static)).layers
    x[:, 3] *= 40
    (wild,) = pc.summary(calibrated(model, [x], static)).layers
    assert calm.note == ""
    assert "outliers decide it, dynamic is safer" in wild.note and wild.note in str(wild.note)
    clipping = Int8(activation="static", observer=Percentile(95.0))
    (cut,) = pc.summary(calibrated(model, [x], clipping)).layers
    assert cut.note == "", "they are clipped"


def test_cuda_has_no_kernel_for_a_range() -> None:
    weight = KNOWN.compress(torch.randn(8, 16))
    with pytest.raises(ValueError, match="the weight is static, expected a dynamic one on CUDA"):
        import_module("pycompress.ops.cuda.int8").pack(weight.parts(), weight.shape, weight.settings())


def test_what_stands_in_front_of_a_layer_is_computed_first() -> None:
    layer, x = pc.compress(nn.Linear(16, 8), KNOWN), torch.randn(5, 16)
    weight = torch.rand(16)
    expected = layer(nn.functional.rms_norm(x, (16,), weight, 1e-5))
    found = ops.int8_fused_linear(x, "rms_norm", layer.packed, layer.form, layer.bias32, weight=weight, eps=1e-5)
    assert torch.equal(found, expected)
