"""validate(): it passes what is right, names what is wrong, and leaves the model alone."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import time
from collections import UserDict
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing import alter
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="the extra pycompress[onnx] is not installed")
pytest.importorskip("onnxruntime", reason="the extra pycompress[onnx] is not installed")

from compiled import EACH_WAY, compiled  # noqa: E402
from lowered import corrupt  # noqa: E402

import pycompress as pc  # noqa: E402
import pycompress.onnx  # noqa: E402
from pycompress import ops  # noqa: E402
from pycompress.methods.int8 import Int8  # noqa: E402
from pycompress.methods.sparse import Sparse  # noqa: E402
from pycompress.nn.int4 import Int4Linear  # noqa: E402
from pycompress.nn.int8 import Int8Linear  # noqa: E402
from pycompress.nn.sparse import SparseLinear  # noqa: E402
from pycompress.validation import WHOLE_MODEL, ModelRecord, checks, outputs, run, validate  # noqa: E402
from pycompress.validation.checks import ulp_distance  # noqa: E402
from pycompress.validation.formulas import (  # noqa: E402
    _fma,
    activation_bound,
    numpy_sparse_linear,
    numpy_steps,
    numpy_weight_only,
)
from pycompress.weights import Int4Weight, SparseWeight  # noqa: E402
from pycompress.weights.int4 import pack_nibbles  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMOOTH = ["gelu", "gelu_tanh", "silu", "quick_gelu"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def int8(k: int, n: int, activation: str = "none", bits: int = 7) -> Int8Linear:
    return Int8Linear.from_dense(nn.Linear(k, n), Int8(activation_bits=bits), activation=activation)


def network(activation: str = "relu", bits: int = 7) -> nn.Sequential:
    """Compressed layers "0", "1" and "3"."""
    return nn.Sequential(
        int8(48, 96, activation, bits),
        int8(96, 33, "none", bits),
        nn.LayerNorm(33),
        int8(33, 10, activation, bits),
    )


def one_weight_off(array: Any) -> None:
    array[0, 0] += 1 if array[0, 0] < 127 else -1


def one_ulp_up(array: Any) -> None:
    array[...] = np.nextafter(array, np.float32(np.inf))


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_model_passes_with_no_difference(dtype: torch.dtype, bits: int) -> None:
    model = network(bits=bits)
    model[2].to(dtype)
    report = validate(model, torch.randn(5, 7, 48).to(dtype))
    assert report.ok, str(report)
    assert report.first_divergence is None
    assert [record.name for record in report.layers] == ["0", "1", "3"]
    for record in report.layers:
        assert (record.rows, record.rows_seen, record.status, record.reason) == (35, 35, "ok", "")
        assert (record.integers_equal, record.max_ulp, record.relative_error) == (True, 0, 0.0)
    assert (report.model.tensors, report.model.max_difference, report.model.cosine) == (1, 0.0, 1.0)
    assert report.model.perturbed_cosine is None


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_activations_pass_within_the_bound(activation: str, dtype: torch.dtype, bits: int) -> None:
    model = network(activation, bits)
    model[2].to(dtype)
    report = validate(model, torch.randn(35, 48).to(dtype))
    assert report.ok, str(report)
    assert all(record.integers_equal for record in report.layers)
    assert [record.max_ulp for record in report.layers] == [None, 0, None]  # "1" has no activation
    assert report.layers[1].share_of_bound is None
    for record in [report.layers[0], report.layers[2]]:
        assert record.share_of_bound is not None
        assert record.share_of_bound <= 1
        assert record.relative_error is not None
        assert record.relative_error < {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert report.model.cosine > 0.9999


def test_a_chain_that_amplifies_last_bits_is_held_against_itself() -> None:
    chain = [module for _ in range(12) for module in (int8(64, 64, "gelu"), nn.LayerNorm(64))]
    report = validate(nn.Sequential(*chain), torch.randn(256, 64))
    assert report.ok, str(report)
    assert report.model.perturbed_cosine is not None
    assert 0.9 < report.model.perturbed_cosine < 1
    assert f"cosine {report.model.perturbed_cosine:.9f} to itself" in str(report)


def compare(expected: Tensor, actual: Tensor, perturbed: Tensor | None) -> ModelRecord:
    third = None if perturbed is None else {"y": perturbed}
    return outputs.compare_outputs({"y": expected}, {"y": actual}, third)


def test_whole_model_limits() -> None:
    def at(cosine: float) -> Tensor:
        return torch.tensor([cosine, (1 - cosine**2) ** 0.5], dtype=torch.float64)

    one = at(1.0)
    assert compare(one, one.clone(), None).status == "ok"
    assert compare(one, one + 1e-15, None).status == "diverged"
    assert compare(one, at(0.9991), one).status == "ok"  # SMALLEST_COSINE
    assert compare(one, at(0.9989), one).status == "diverged"
    assert compare(one, at(0.9989), at(0.9995)).status == "ok"  # the native model moves as much by itself
    assert compare(one, at(0.97), at(0.99)).status == "ok"
    assert compare(one, at(0.95), at(0.99)).status == "diverged"
    assert "expected at least 0.960000" in compare(one, at(0.95), at(0.99)).reason
    assert compare(one, at(0.97), at(0.99)).perturbed_cosine == pytest.approx(0.99)
    broken = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    assert compare(one, broken, one).status == "diverged"
    assert compare(broken, broken.clone(), broken).status == "ok"
    assert compare(one, torch.zeros(3, dtype=torch.float64), None).reason == (
        "y is [2] with native layers, [3] with ONNX Runtime's"
    )
    assert outputs.compare_outputs({"y": one}, {}, None).reason.endswith("absent with ONNX Runtime's")


def test_rows_at_the_limits_of_float32_pass() -> None:
    x = torch.randn(9, 48)
    x[1, 3], x[2, 0], x[3, 47], x[4] = torch.nan, torch.inf, -torch.inf, 0
    x[5] *= 1e38
    x[6], x[7], x[8] = 2.0**-99, 2.0**-99 * (1 - 2.0**-24), 1e-40  # the first has half its range at 2^-100
    for activation in ops.ACTIVATIONS:
        model = nn.Sequential(int8(48, 33, activation))
        alter(model[0], "int8_scale", lambda scale: scale * 1e3)
        with torch.no_grad():
            assert model(x)[1:4].isnan().all()
            assert model(x)[5].isinf().any() or activation == "relu6"
        report = validate(model, x)
        assert report.ok, str(report)


@pytest.mark.parametrize("name", ["0", "1", "3"])
def test_a_changed_weight_is_found_and_its_layer_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    corrupt(monkeypatch, model.get_submodule(name), "weight", one_weight_off)
    report = validate(model, torch.randn(64, 48))
    assert not report.ok
    assert report.first_divergence == name
    assert [record.name for record in report.layers if record.status == "diverged"] == [name]
    (record,) = [record for record in report.layers if record.name == name]
    assert record.integers_equal is False
    assert "acc: native and ONNX Runtime differ in " in record.reason
    assert "acc: ONNX Runtime and NumPy differ in " in record.reason
    assert "native and NumPy" not in record.reason  # so the reader sees who is alone
    assert report.model.status == "diverged"
    assert str(report).splitlines()[-1] == f"DIVERGED: first at {name}"


def test_a_scale_one_ulp_off_is_found_though_all_integers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    corrupt(monkeypatch, model[1], "weight_scale", one_ulp_up)
    report = validate(model, torch.randn(64, 48))
    record = report.layers[1]
    assert report.first_divergence == "1"
    assert (record.integers_equal, record.status) == (True, "diverged")
    assert record.max_ulp is not None
    assert record.max_ulp >= 1
    assert record.reason.startswith("y: native and ONNX Runtime differ in ")


@pytest.mark.parametrize("activation", SMOOTH)
def test_a_scale_far_off_is_found_behind_a_smooth_activation(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(activation)

    def slightly_larger(array: Any) -> None:
        array *= np.float32(1 + 1e-5)

    corrupt(monkeypatch, model[0], "weight_scale", slightly_larger)
    report = validate(model, torch.randn(64, 48))
    assert report.first_divergence == "0"
    assert report.layers[0].integers_equal
    assert report.layers[0].share_of_bound is not None
    assert report.layers[0].share_of_bound > 1


@pytest.mark.parametrize("bits", [4, 8])
def test_a_wrong_quantizer_is_found(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = ops.int8_quantize

    def wrong(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, scale, zero_point = quantize(x, *rest)
        q[2, 3] ^= 1
        return q, scale, zero_point

    monkeypatch.setattr(ops, "int8_quantize", wrong)
    report = validate(network() if bits == 8 else nn.Sequential(int4(48, 16)), torch.randn(4, 48))
    assert report.first_divergence == "0"
    assert "q: native and ONNX Runtime differ in 1 of 192, first [2, 3]: " in report.layers[0].reason


class Backwards(nn.Module):
    """Registers its layers in the opposite order of their calls; `unused` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.last = int8(16, 4)
        self.first = int8(48, 16)
        self.unused = int8(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(input=x) if False else self.first(x))
        return result


def test_the_layer_that_ran_first_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Backwards()
    corrupt(monkeypatch, model.first, "weight", one_weight_off)
    corrupt(monkeypatch, model.last, "weight", one_weight_off)
    report = validate(model, torch.randn(8, 48))
    assert [record.name for record in report.layers] == ["first", "last", "unused"]
    assert report.first_divergence == "first"


def test_layers_that_were_not_called_are_listed() -> None:
    report = validate(Backwards(), torch.randn(8, 48))
    assert report.ok
    assert report.not_called == ["unused"]
    assert report.layers[-1].status == "not called"
    assert (report.layers[-1].rows, report.layers[-1].integers_equal, report.layers[-1].max_ulp) == (
        0,
        None,
        None,
    )
    assert str(report).splitlines()[-1].endswith("NOT CALLED and so not compared: unused")


def test_a_run_that_compares_nothing_is_not_ok() -> None:
    report = validate(Backwards(), torch.randn(8, 48), layers=["unused"])
    assert not report.ok
    assert report.first_divergence is None
    assert report.verdict == "NOTHING COMPARED; NOT CALLED and so not compared: unused"
    assert not validate(Backwards(), torch.randn(0, 48)).ok  # called, with no rows


def test_a_shared_layer_is_compared_once_over_all_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = int8(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    # Whether the list names an alias or not makes no difference.
    for layers in [{"0": shared}, {"0": shared, "2": shared}]:
        monkeypatch.setattr(run, "compressed_layers", lambda _model, layers=layers: layers)
        report = validate(model, torch.randn(5, 32))
        assert report.ok
        assert [(record.name, record.rows, record.rows_seen) for record in report.layers] == [("0", 10, 10)]


def test_rows_beyond_the_limit_are_reported_and_still_pass_through_the_whole_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "MAX_ROWS", 10)
    model, x = nn.Sequential(int8(48, 16)), torch.randn(35, 48)
    report = validate(model, x)
    assert report.ok
    assert (report.layers[0].rows, report.layers[0].rows_seen) == (10, 35)
    assert "10 of 35" in str(report)
    assert report.verdict.endswith("; 1 layer(s) only in the first 10 rows")

    # Row by row 0 times anything is 0, so a wrong weight shows only behind the limit.
    corrupt(monkeypatch, model[0], "weight", one_weight_off)
    x[:10] = 0
    report = validate(model, x)
    assert report.layers[0].status == "ok"
    assert report.first_divergence == WHOLE_MODEL
    assert not report.ok
    assert "output differs by" in report.model.reason


def test_layers_can_be_chosen_by_name_or_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), torch.randn(8, 48)
    assert [record.name for record in validate(model, x, layers=["3"]).layers] == ["3"]
    assert [record.name for record in validate(model, x, layers=["[01]"]).layers] == ["0", "1"]
    corrupt(monkeypatch, model[0], "weight", one_weight_off)
    assert validate(model, x, layers=["1", "3"]).ok
    assert not validate(model, x).ok
    with pytest.raises(ValueError, match=r"no compressed layer fits 'encoder\.\*', there are: 0, 1, 3"):
        validate(model, x, layers=["0", "encoder.*"])
    with pytest.raises(TypeError, match="layers is the string '0', expected a list"):
        validate(model, x, layers="0")


class Nested(nn.Module):
    @dataclasses.dataclass
    class Output:
        logits: Tensor
        ids: Tensor
        states: tuple[Tensor, ...]
        extra: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.layer = int8(16, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Output:
        y = self.layer(x) * scale
        return self.Output(y, y.argmax(dim=-1), (y + 1, y[..., :2]), {"mean": y.mean(), "none": None, "name": "y"})


def test_inputs_and_outputs_may_be_nested() -> None:
    model, x = Nested(), torch.randn(3, 16)
    for inputs in [x, (x,), [x], (x, 2.0), {"x": x, "scale": 2.0}]:
        report = validate(model, inputs)
        assert report.ok, str(report)
        assert report.model.tensors == 4  # not the integers of `ids`
    with pytest.raises(TypeError, match="inputs is float, expected a tensor, a sequence of arguments or a mapping"):
        validate(model, 2.0)


class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.layer, self.value = int8(16, 4), value

    def forward(self, x: Tensor) -> Any:
        self.layer(x)
        return self.value


@pytest.mark.parametrize("value", [None, "text", (), {"ids": torch.arange(3)}])
def test_an_output_without_floating_point_tensors_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=f"the model returned {type(value).__name__}, expected at least one"):
        validate(Returns(value), torch.randn(3, 16))


def test_a_model_without_compressed_layers_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="the model has no compressed layer"):
        validate(nn.Linear(4, 4), torch.randn(3, 4))


class Noisy(nn.Module):
    """Random even in evaluation, drops in training, keeps what it computed, and can fail half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.last = int8(16, 16), nn.Dropout(0.5), int8(16, 4)
        self.failing, self.kept = False, torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.dropout(self.first(x)) + torch.randn(16)
        if self.failing:
            raise RuntimeError("half-way")
        result: Tensor = self.last(self.kept)
        return result


def state(model: nn.Module) -> list[Any]:
    return [
        (
            name,
            module.training,
            "forward" in vars(module),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(failing: bool) -> None:
    model = Noisy()
    model.train()
    model.last.eval()
    model.failing = failing
    before, random_state, x = state(model), torch.get_rng_state(), torch.randn(3, 16)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.set_rng_state(random_state)
    if failing:
        with pytest.raises(RuntimeError, match="half-way"):
            validate(model, x)
    else:
        report = validate(model, x)
        assert report.ok, str(report)
        assert report.model.max_difference == 0  # both runs drew the same noise
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert not model.kept.is_inference()
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_an_exception_in_the_second_run_restores_the_model_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no session")

    monkeypatch.setattr(run, "_run_session", fail)
    before = state(model)
    with pytest.raises(RuntimeError, match="no session"):
        validate(model, torch.randn(3, 48))
    assert state(model) == before


def test_a_forward_of_the_instance_is_called_and_kept() -> None:
    model = nn.Sequential(int8(16, 4))
    calls = []
    original = model[0].forward

    def forward(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return original(x)

    model[0].forward = forward
    assert validate(model, torch.randn(3, 16)).ok
    assert calls == [(3, 16)]  # natively once, then ONNX Runtime takes its place
    assert model[0].forward is forward


def test_hooks_of_the_model_do_not_disturb() -> None:
    model = nn.Sequential(int8(16, 4), int8(4, 4))
    model[0].register_forward_hook(lambda _module, _args, y: y + 1)
    model[1].register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
    report = validate(model, torch.randn(3, 16))
    assert report.ok, str(report)


def test_the_table_is_aligned_and_ends_in_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    corrupt(monkeypatch, model[1], "weight", one_weight_off)
    lines = str(validate(model, torch.randn(5, 48))).splitlines()
    column = lines[0].index("status")
    rows = [line for line in lines if line[:1] in {"0", "1", "3"}]
    assert [line[column:] for line in rows] == ["ok", "diverged", "ok"]
    assert lines[0].split("  ")[0] == "layer"
    assert lines[-1].startswith("DIVERGED: first at 1")
    assert (
        str(validate(network(), torch.randn(5, 48))).splitlines()[-1].startswith("OK: 3 layer(s) and the whole model")
    )


def test_ulp_distance() -> None:
    one = torch.tensor([1.0, -1.0, 0.0, -0.0, torch.nan, torch.nan, torch.inf])
    two = torch.tensor([1 + 2.0**-23, -1 - 2.0**-22, -0.0, 2.0**-149, torch.nan, 1.0, torch.finfo(torch.float32).max])
    assert ulp_distance(one, two).tolist() == [1, 2, 0, 1, 0, 2**32, 1]
    assert ulp_distance(two, one).tolist() == [1, 2, 0, 1, 0, 2**32, 1]
    assert ulp_distance(torch.tensor([1.0, -2.0]).bfloat16(), torch.tensor([1.0078125, 2.0]).bfloat16()).tolist() == [
        1,
        32768,
    ]
    assert ulp_distance(torch.tensor([1.0]).half(), torch.tensor([1.0 - 2**-11]).half()).tolist() == [1]


def test_activation_bound_is_zero_where_the_result_is_exact() -> None:
    v = np.array([[1.0, -3.0, np.nan, np.inf]], np.float32)
    for activation in ("none", "relu", "relu6", "hardswish"):
        assert activation_bound(v, activation).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("activation", SMOOTH)
def test_activation_bound_holds_for_torch_and_is_not_loose(activation: str) -> None:
    v = torch.cat([torch.linspace(-20, 20, 100_001), torch.logspace(-30, 30, 2001), -torch.logspace(-30, 30, 2001)])
    function = {
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda t: nn.functional.gelu(t, approximate="tanh"),
        "silu": nn.functional.silu,
        "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
    }[activation]
    error = (function(v).double() - function(v.double())).abs()
    half_bound = torch.from_numpy(activation_bound(v.numpy(), activation)) / 2
    assert bool((error <= half_bound).all())
    assert float((error / half_bound).max()) > 0.05


def test_the_module_imports_without_the_extra_and_validate_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pycompress.onnx")
    monkeypatch.delattr(pycompress, "onnx")
    monkeypatch.delitem(sys.modules, "pycompress.validation")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    import pycompress.validation as fresh

    with pytest.raises(ImportError, match=r'pip install "pycompress\[onnx\]"'):
        fresh.validate(network(), torch.randn(3, 48))


# --- sparse -------------------------------------------------------------------------------------------------------------


def sparse(k: int, n: int, activation: str = "none", bits: int = 32, density: float = 0.3) -> SparseLinear:
    """Random weights; bits are those of the weights, or 7 for int8 weights with 7-bit activations."""
    keep = torch.rand(n, k) < density
    if bits == 32:
        weight = SparseWeight.from_dense(torch.randn(n, k) / k**0.5 * keep)
    else:
        values = torch.randint(-127, 128, (n, k), dtype=torch.int8) * keep
        weight = SparseWeight.from_dense(values, torch.rand(n) / 127 / k**0.5 + 1e-4, bits)
    return SparseLinear.from_weight(weight, torch.randn(n), activation)


def test_a_model_of_every_kind_of_layer() -> None:
    model = nn.Sequential(int8(48, 64, "gelu"), sparse(64, 40, "relu"), nn.LayerNorm(40), sparse(40, 20, "silu", 7))
    report = validate(model, torch.randn(64, 48))
    assert report.ok, str(report)
    assert [record.integers_equal for record in report.layers] == [True, None, True]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("pattern", ["16x16", "32x32", "64x64", "2:4"])
def test_square_blocks_and_two_of_four_pass(pattern: str, bits: int) -> None:
    method = Sparse(0.5, pattern, bits=bits)
    model = pc.compress(nn.Sequential(nn.Linear(130, 200), nn.ReLU(), nn.Linear(200, 65)), method)
    report = validate(model, torch.randn(9, 130))
    assert report.ok, str(report)
    assert [record.integers_equal for record in report.layers] == [None if bits == 32 else True] * 2


def test_a_float32_weight_a_few_last_bits_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(sparse(4, 8, density=1.0))

    def change(array: Any) -> None:
        array[1, 3] *= np.float32(1 + 2.0**-18)

    corrupt(monkeypatch, model[0], "weight", change)
    x = torch.zeros(3, 4)
    x[:, 1] = torch.tensor([1.0, 2.0, 3.0])
    report = validate(model, x)
    assert report.first_divergence == "0"
    assert report.layers[0].share_of_bound is not None
    assert report.layers[0].share_of_bound > 1


def with_nonfinite_rows(m: int, k: int) -> Tensor:
    x = torch.randn(m, k)
    x[1, 0], x[2, k // 2], x[3, k - 1] = torch.nan, torch.inf, -torch.inf
    x[4, :2] = torch.tensor([torch.inf, -torch.inf])
    x[5] = torch.nan
    return x


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_nan_and_inf_are_compared_where_a_weight_meets_them(activation: str) -> None:
    model, x = nn.Sequential(sparse(48, 33, activation)), with_nonfinite_rows(9, 48)
    y = model(x)
    assert y[1:5].isfinite().any(), "NaN does not reach columns without a weight for it,"
    assert not y[5].isfinite().any(), "and ONNX Runtime would have NaN in all of them"
    for dtype in DTYPES:
        report = validate(model, x.to(dtype))
        assert report.ok, str(report)
        assert report.layers[0].rows == 9


def test_nan_where_no_weight_meets_it_is_found() -> None:
    """A kernel that multiplies the zeros: the same for finite rows, wrong for others."""
    model, x = nn.Sequential(sparse(48, 33)), with_nonfinite_rows(9, 48)
    weight, bias = model[0].weight, model[0].bias
    model[0].forward = lambda x: x @ weight.T + bias
    assert validate(model, x[6:]).ok
    report = validate(model, x)
    assert report.first_divergence == "0"
    assert "y: native and NumPy differ in " in report.layers[0].reason
    assert "ONNX Runtime" not in report.layers[0].reason


def test_nan_that_is_lost_is_found() -> None:
    model, x = nn.Sequential(sparse(48, 33)), with_nonfinite_rows(9, 48)
    native = model[0].forward
    model[0].forward = lambda x: native(x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    report = validate(model, x)
    assert "y: native and NumPy differ in " in report.layers[0].reason


def test_sums_that_overflow_leave_the_result_open() -> None:
    model = nn.Sequential(sparse(64, 33, density=1.0))
    x = torch.randn(9, 64)
    x[3] *= 3e38
    x[4] = 3e38
    assert not model(x)[3:5].isfinite().all()
    report = validate(model, x)
    assert report.layers[0].status == "ok", str(report)


def test_the_float32_bounds_hold_and_are_not_loose() -> None:
    layer = sparse(1024, 64, density=0.3)
    x = np.abs(np.random.default_rng(0).standard_normal((16, 1024))).astype(np.float32)
    y, own, runtime = numpy_sparse_linear(x, layer)
    exact = torch.from_numpy(x).double() @ layer.weight.double().T + layer.bias.double()
    np.testing.assert_allclose(y, exact.numpy(), rtol=1e-12)
    error = np.abs(layer(torch.from_numpy(x)).double().numpy() - y)
    assert (error <= own).all()
    assert (own < runtime).all()
    assert own.max() < 1e-3 * np.abs(y).max() and error.max() > 1e-3 * own.max()


# --- int4, and int8 with 16-bit activations ---------------------------------------------------------------------------------


def int4(
    k: int,
    n: int,
    activation: str = "none",
    *,
    group: int = 32,
    symmetric: bool = False,
    activation_bits: int = 8,
) -> Int4Linear:
    """Random integers and zero points; weights of about 1 / sqrt(k)."""
    groups = -(-k // group)
    values, zero_points = (torch.randint(16, (n, size), dtype=torch.uint8) for size in (k, groups))
    scale = (torch.rand(n, groups) + 0.5) / 5 / k**0.5
    packed = None if symmetric else pack_nibbles(zero_points)
    weight = Int4Weight(pack_nibbles(values), scale.bfloat16(), packed, k, group, activation_bits)
    return Int4Linear.from_weight(weight, torch.randn(n), activation)


def int8_a16(k: int, n: int, activation: str = "none") -> Int8Linear:
    return int8(k, n, activation, 16)


def int4_a16(k: int, n: int, activation: str = "none", **options: Any) -> Int4Linear:
    return int4(k, n, activation, activation_bits=16, **options)


WEIGHT_ONLY = pytest.mark.parametrize("make", [int4_a16, int8_a16])
EACH_INT4 = pytest.mark.parametrize("make", [int4, int4_a16, int8_a16])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("k", "group"), [(1, 32), (33, 32), (64, 64), (130, 64), (129, 128), (384, 128)])
def test_every_kind_of_int4_weight_passes(k: int, group: int, symmetric: bool) -> None:
    for make in (int4, int4_a16):
        report = validate(nn.Sequential(make(k, 9, group=group, symmetric=symmetric)), torch.randn(12, k))
        assert report.ok, str(report)


@WEIGHT_ONLY
def test_nan_that_a_weight_only_layer_loses_is_found(make: Callable[..., Any]) -> None:
    model, x = nn.Sequential(make(48, 33)), with_nonfinite_rows(9, 48)
    native = model[0].forward
    model[0].forward = lambda x: native(x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    report = validate(model, x)
    assert "y: native and NumPy differ in " in report.layers[0].reason
    assert "y: ONNX Runtime and NumPy" not in report.layers[0].reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_an_int4_result_one_step_off_is_found(activation: str, dtype: torch.dtype) -> None:
    """NumPy computes the layer to the bit, though ONNX Runtime does not."""
    model, x = nn.Sequential(int4(96, 33, activation)), torch.randn(64, 96).to(dtype)
    native = model[0].forward

    def one_step_up(x: Tensor) -> Tensor:
        y = native(x)
        y[3, int(y[3].argmax())] *= 1 + torch.finfo(dtype).eps
        return y

    model[0].forward = one_step_up
    report = validate(model, x)
    assert report.layers[0].reason.startswith("y: native and NumPy differ in 1 of 2112, worst [3, ")
    assert "ONNX Runtime" not in report.layers[0].reason
    assert report.layers[0].integers_equal
    assert report.layers[0].share_of_bound == np.inf


def test_the_fused_product_and_sum_is_rounded_once() -> None:
    generator = np.random.default_rng(0)
    a = generator.integers(-(2**18), 2**18, 4000).astype(np.float32)
    b = np.float32(generator.integers(128, 256, 4000)) * np.exp2(generator.integers(-40, 3, 4000)).astype(np.float32)
    c = (generator.standard_normal(4000) * np.exp2(generator.integers(-20, 20, 4000))).astype(np.float32)
    # 1 + 2^-24 + 2^-54 lies above the middle of two float32 neighbours, and at it once it is rounded to float64.
    a[0], b[0], c[0] = 5237765 * 2.0**-54, 205, 1
    found = _fma(a, b, c)
    assert found[0] == 1 + 2.0**-23
    naive = (a.astype(np.float64) * b + c).astype(np.float32)
    assert naive[0] == 1
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        neighbours = [np.nextafter(result, np.float32(side)) for side in (-np.inf, np.inf)]
        assert all(abs(Fraction(float(result)) - exact) <= abs(Fraction(float(other)) - exact) for other in neighbours)
    infinite = _fma(np.float32([1e30, 1, 0]), np.float32([1e30, 1, 1]), np.float32([0, np.inf, np.nan]))
    np.testing.assert_array_equal(infinite, np.float32([np.inf, np.inf, np.nan]))


def test_the_int4_bounds_hold_and_are_not_loose() -> None:
    x = np.abs(np.random.default_rng(0).standard_normal((16, 1024))).astype(np.float32)
    for layer in (int4(1024, 64), int4_a16(1024, 64), int8_a16(1024, 64)):
        weight, rows_of_x, scale = layer.canonical().decompress().numpy(), x, np.float32(1)
        if layer.settings["activation_bits"] == 8:
            result = numpy_steps(x, layer)
            # Of rows without negative numbers, whose zero point is 0.
            rows_of_x, scale = result.exact["q"], x.max(axis=1, keepdims=True) / 2 / np.float32(127.5)
            y, bound = result.y, result.bound
        else:
            y, bound = numpy_weight_only(x, layer)
        products = rows_of_x[:, None, :].astype(np.float32) * weight
        one_by_one = np.cumsum(products, axis=2, dtype=np.float32)[:, :, -1] * scale + layer.bias.numpy()
        error = np.abs(one_by_one - y)
        assert (error <= bound).all()
        assert error.max() > 1e-4 * bound.max()
        assert bound.max() < 1e-3 * np.abs(y).max()


# --- models of which nothing can be said ----------------------------------------------------------------------------------


class Unsteady(nn.Module):
    """Adds what each call draws from a place that nobody can put back."""

    def __init__(self, draw: Callable[[], float], activation: str = "gelu") -> None:
        super().__init__()
        self.layer, self.draw = int8(16, 4, activation), draw

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + self.draw()


def file_of_numbers(path: Path) -> Callable[[], float]:
    path.write_text("".join(f"{i}\n" for i in range(100)))
    file = path.open()
    return lambda: float(file.readline())


UNSTEADY: dict[str, Callable[[Path], Callable[[], float]]] = {
    "a counter": lambda _: itertools.count().__next__,
    "a counter in a partial": lambda _: partial(next, itertools.count()),
    "a generator": lambda _: (i * 10.0 for i in range(100)).__next__,
    "every third call": lambda _: itertools.cycle([0.0, 0.0, 30.0]).__next__,
    "only the first": lambda _: itertools.chain([9.0], itertools.repeat(0.0)).__next__,
    "a file": file_of_numbers,
    "the clock": lambda _: lambda: time.perf_counter_ns() % 1_000_003 / 1e3,  # float32 tells two calls apart
    "random bytes": lambda _: lambda: float(os.urandom(1)[0]),
}


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("kind", UNSTEADY)
def test_a_model_that_keeps_what_cannot_be_put_back_is_never_ok(kind: str, activation: str, tmp_path: Path) -> None:
    report = validate(Unsteady(UNSTEADY[kind](tmp_path / "numbers"), activation), torch.randn(8, 16))
    assert not report.ok
    assert report.layers[0].status == "ok", "which its layer is all the same"
    assert report.model.status in {"undecided", "diverged"}
    if kind != "every third call":
        assert report.first_divergence is None
        assert report.verdict.startswith("UNDECIDED: the model is not steady: run twice with the same inputs, output ")
        assert "not steady" in str(report).splitlines()[-2]


def test_state_that_is_put_back_costs_no_verdict() -> None:
    counts = [0]

    def count() -> float:
        counts[0] += 1
        return 30.0 * counts[0]

    report = validate(Unsteady(count), torch.randn(8, 16))
    assert report.ok, str(report)
    assert report.model.cosine > 0.9999
    assert counts == [0]


def test_an_output_of_another_shape_or_name_each_time() -> None:
    class Grows(nn.Module):
        def __init__(self, by_name: bool) -> None:
            super().__init__()
            self.layer, self.counter, self.by_name = int8(16, 4), itertools.count(1), by_name

        def forward(self, x: Tensor) -> Any:
            y, count = self.layer(x), next(self.counter)
            return {str(count): y} if self.by_name else y.repeat(count, 1)

    for by_name, reason in ((False, r"output is [8, 4] and [24, 4]"), (True, "it returns output['1'] and output['3']")):
        report = validate(Grows(by_name), torch.randn(8, 16))
        assert report.model.status == "undecided" and reason in report.verdict


class Chaotic(nn.Module):
    """Its last bits decide."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.layer, self.times = int8(16, 64, "gelu"), times

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.layer(x).double() * self.times)


def test_a_model_that_amplifies_last_bits_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 16)
    assert validate(Chaotic(10), x).ok
    report = validate(Chaotic(1e9), x)
    assert not report.ok
    assert report.first_divergence is None
    assert report.model.perturbed_cosine is not None
    assert report.model.perturbed_cosine < 0.5
    assert "UNDECIDED: output amplifies last bits: the native model moves to cosine" in report.verdict
    assert "expected at least 0.975" in report.verdict
    model = Chaotic(1e9)
    corrupt(monkeypatch, model.layer, "weight", one_weight_off)
    assert validate(model, x).first_divergence == "layer", "a layer that is wrong is named all the same"


def test_the_limit_has_a_floor() -> None:
    def at(cosine: float) -> Tensor:
        return torch.tensor([cosine, (1 - cosine**2) ** 0.5], dtype=torch.float64)

    assert compare(at(1.0), at(0.91), at(0.976)).status == "ok"
    assert compare(at(1.0), at(0.5), at(0.976)).status == "diverged"
    assert compare(at(1.0), at(0.91), at(0.97)).status == "undecided"
    assert compare(at(1.0), at(0.5), at(0.5)).status == "undecided"
    assert compare(at(1.0), at(0.9995), at(0.5)).status == "undecided", "it may be so by chance"
    assert compare(at(1.0), torch.tensor([torch.nan, 0]).double(), at(0.5)).status == "diverged"


# --- how it is called ---------------------------------------------------------------------------------------------------


@EACH_WAY
def test_a_compiled_model_is_seen_layer_by_layer(how: str) -> None:
    model, x = network(), torch.randn(5, 48)
    made = compiled(model, how)
    y = made(x)
    report = validate(made, x)
    assert report.ok, str(report)
    prefix = "0._orig_mod." if how == "inside" else ""
    assert [(record.name, record.rows) for record in report.layers] == [(f"{prefix}{i}", 5) for i in (0, 1, 3)]
    assert torch.equal(made(x), y)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([[1.0] * 48, [2.0] * 48], r"inputs is list, of list, without a tensor in it: expected a tensor, a sequence"),
        (["a sentence"], r"inputs is list, of str, without a tensor in it"),
        ([np.zeros((2, 48), np.float32)], r"inputs is list, of ndarray, without a tensor in it"),
        ({"input": np.zeros((2, 48), np.float32)}, r"inputs is dict, of ndarray, without a tensor in it"),
        ([torch.zeros(48), torch.zeros(48)], r"inputs is list, which are not the arguments of Sequential.forward \(too many"),
        ({"x": torch.zeros(48)}, r"inputs is dict, which are not the arguments of Sequential.forward \(missing a required"),
        (np.zeros((2, 48), np.float32), r"inputs is ndarray, expected a tensor, a sequence of arguments or a mapping"),
        ("text", r"inputs is str, expected a tensor, a sequence of arguments or a mapping"),
        (b"text", r"inputs is bytes, expected a tensor, a sequence of arguments or a mapping"),
    ],
)  # fmt: skip
def test_inputs_that_are_none_are_named(inputs: Any, message: str) -> None:
    dense = nn.Sequential(nn.Linear(48, 96))
    for run_it in (
        lambda: validate(network(), inputs),
        lambda: pc.calibrate(dense, [inputs]),
        lambda: pc.compress(dense, pc.Int8(), example_inputs=inputs, only_if_faster=True),
    ):
        with pytest.raises(TypeError, match=message):
            run_it()


def test_an_error_of_the_model_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match=r"x is \[2, 47\], the packed weight expects k = 48"):
        validate(network(), torch.zeros(2, 47))


def test_a_models_own_kind_of_inputs() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = int8(16, 4)

        def forward(self, rows: Any) -> Tensor:
            y: Tensor = self.layer(torch.as_tensor(rows))
            return y

    for inputs in ([np.zeros((2, 16), np.float32)], [[[0.0] * 16]], UserDict(rows=torch.zeros(2, 16))):
        assert validate(Own(), inputs).ok
