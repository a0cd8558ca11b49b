"""What compress(), validate() and calibrate() run, they leave as it was; names of modules; geometry of convolutions in groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.calls import call_model, evaluating
from pycompress.kinds import CONV2D, Conv2dGeometry
from pycompress.surgery import names_of

Run = Callable[["Stateful", Any], object]


class Cache:
    """An object of its own class, as transformers' caches are."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.length = 0


class Stateful(nn.Module):
    """Counts its calls, writes into what it is given, keeps caches, draws random numbers, and can fail half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.cache, self.recent, self.kept = Cache(), deque([torch.zeros(1)], maxlen=2), torch.zeros(3, 8)
        self.by_length: dict[int, Tensor] = {}
        self.training_runs, self.fail = 0, False

    def forward(self, x: Tensor, more: dict[str, list[Tensor]] | None = None) -> Tensor:
        self.calls += 1
        self.cache.keys.append(x.clone())
        self.cache.length += len(x)
        self.recent.append(x)
        self.by_length[len(x)] = x
        self.kept.add_(1)
        self.extra = x.sum()
        self.training_runs += self.training
        self.norm.momentum = 0.9
        self.norm.weight.requires_grad_(False)
        y: Tensor = self.norm(self.inner(x)) + torch.rand(8) + len(self.cache.keys) * float(self.calls)
        if more is not None:
            more["rows"][0].zero_()
            more["rows"].append(y)
            y = y + 1
        x.zero_()
        if self.fail:
            raise RuntimeError("half-way")
        return y


def compressed(model: Stateful, inputs: Any) -> object:
    return pc.compress(model, {"inner": pc.Int8()}, example_inputs=inputs, only_if_faster=True)


def calibrated(model: Stateful, inputs: Any) -> object:
    calibration = pc.calibrate(model, [inputs, inputs])
    assert calibration["inner"].rows == 6
    return calibration


def validated(model: Stateful, inputs: Any) -> object:
    model.inner = pc.compress(model.inner, pc.Int8())
    watched = look(model)
    report = pc.validate(model, inputs)
    assert report.ok, str(report)  # in each of its runs the model began with the same
    assert look(model) == watched
    return report


def look(model: Stateful) -> list[Any]:
    """All that a run changes, by value, and the objects that hold it, by identity."""
    return [
        int(model.calls), len(model.cache.keys), model.cache.length, [t.tolist() for t in model.recent],
        model.kept.tolist(), list(model.by_length), hasattr(model, "extra"), model.training_runs, model.norm.momentum,
        model.norm.weight.requires_grad, model.norm.running_mean.tolist(), int(model.norm.num_batches_tracked),
        [module.training for module in model.modules()], torch.get_rng_state().tolist(),
        id(model.cache), id(model.cache.keys), id(model.calls), id(model.kept), id(model.recent), id(model.by_length),
    ]  # fmt: skip


def inputs_of(kind: str) -> Any:
    x = torch.randn(3, 8)
    more = {"rows": [torch.ones(2), torch.ones(1)]}
    return {"tensor": x, "tuple": (x, more), "list": [x, more], "mapping": {"x": x, "more": more}}[kind]


def values(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.tolist()
    if isinstance(inputs, dict):
        return {name: values(value) for name, value in inputs.items()}
    return [values(value) for value in inputs]


@pytest.mark.parametrize("inputs", ["tensor", "tuple", "list", "mapping"])
@pytest.mark.parametrize("run", [compressed, calibrated, validated])
def test_everything_is_left_as_it_was(run: Run, inputs: str) -> None:
    if run is validated:
        pytest.importorskip("onnxruntime", reason="the extra pycompress[onnx] is not installed")
    model, given = Stateful().train(), inputs_of(inputs)
    model.norm.eval()
    if run is validated:
        model.inner.eval()
    before, as_given = look(model), values(given)
    run(model, given)
    assert look(model) == before
    assert values(given) == as_given


def test_also_after_an_error() -> None:
    model, given = Stateful().train(), inputs_of("mapping")
    model.fail = True
    before, as_given = look(model), values(given)
    for run in (compressed, calibrated):
        with pytest.raises(RuntimeError, match="half-way"):
            run(model, given)
        assert look(model) == before
        assert values(given) == as_given
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_a_run_gave_away_can_be_trained_on() -> None:
    model, x = Stateful(), torch.randn(3, 8)
    with evaluating(model, x):
        y = call_model(model, x)
    assert not y.is_inference() and not y.requires_grad and torch.is_grad_enabled()
    assert (y * nn.Parameter(torch.ones(8))).sum().requires_grad


def test_all_names_of_a_module() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(names_of(model).items()) == [(model, [""]), (shared, ["0", "2"]), (model[1], ["1"])]


def test_one_input_is_not_taken_for_several() -> None:
    for wrong in (torch.randn(3, 8), {"x": torch.randn(3, 8)}, "text"):
        with pytest.raises(TypeError, match=f"batches is {type(wrong).__name__}, expected several inputs"):
            pc.calibrate(nn.Linear(8, 8), wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inputs is int, expected a tensor, a sequence of arguments or a mapping"):
        pc.calibrate(nn.Linear(8, 8), [3])  # type: ignore[list-item]


def test_a_calibration_serves_one_block() -> None:
    with pc.calibrate(nn.Linear(8, 8)) as calibration:
        pass
    with pytest.raises(RuntimeError, match="has begun already"), calibration:
        pass


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_geometry_of_groups(groups: int) -> None:
    module = nn.Conv2d(6, 12, (3, 2), stride=(1, 2), padding=1, groups=groups)
    geometry = CONV2D.geometry(module)
    assert (geometry.groups, geometry.in_channels, geometry.in_features) == (groups, 6, 36 // groups)
    assert CONV2D.weight_shape(12, geometry.in_features, geometry) == tuple(module.weight.shape)
    assert ("groups" in geometry.settings()) is ("groups" in str(geometry)) is (groups > 1)
    assert Conv2dGeometry.from_settings(geometry.in_features, geometry.settings()) == geometry
    assert CONV2D.has_rows(module) is (groups == 1)
    with pytest.raises(ValueError, match="groups is 5, expected a divisor of in_channels = 6"):
        Conv2dGeometry(6, (3, 3), groups=5)
