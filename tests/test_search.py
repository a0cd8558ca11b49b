"""Plans on the front of time, bytes and quality: the solver against all plans, the search against compress, and what goes wrong."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.plan_file import WrittenPlan
from pycompress.search import Cost, Front, Point
from pycompress.search.cache import Cache
from pycompress.search.correction import Correction
from pycompress.search.quality import Quality
from pycompress.search.shapes import smaller
from pycompress.search.solver import BYTES, LOSS, TIME, best, hull, least, not_dominated, total

CANDIDATES = {"int8": pc.Int8(), "int4": pc.Int4(), "thin": pc.LowRank(12, rank_guard=False), "sparse": pc.Sparse(0.5)}
US = {"dense": 8.0, "int8": 4.0, "int4": 6.0, "thin": 1.0, "sparse": 5.0}  # of 1,000 weights of a layer


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12)).eval()


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(64, 48)]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes times what US says, and 20 us besides the layers. Returns what was measured."""
    log: list[str] = []

    def kind(module: Any) -> str:
        name = type(module).__name__
        return {"Int8Linear": "int8", "Int4Linear": "int4", "LowRankLinear": "thin", "SparseLinear": "sparse"}.get(
            name, "dense"
        )

    def layer_us(target: Any, layer: Any, shapes: Any, clock: Any) -> tuple[float, float]:
        log.append(f"layer {kind(layer)} {layer.n}x{layer.k}")
        return tuple(US[one] * layer.n * layer.k / 1000 for one in ("dense", kind(layer)))  # type: ignore[return-value]

    def model_us(dense: nn.Module, other: nn.Module, inputs: Any) -> tuple[float, float]:
        log.append("model")

        def us(model: nn.Module) -> float:
            layers = [m for m in model.modules() if hasattr(m, "out_features")]
            return 20 + sum(US[kind(m)] * m.out_features * m.in_features / 1000 for m in layers)

        return us(dense), us(other) / us(dense)

    monkeypatch.setattr(import_module("pycompress.search.timing"), "layer_us", layer_us)
    monkeypatch.setattr(import_module("pycompress.search.plans"), "model_us", model_us)
    return log


# --- the solver -----------------------------------------------------------------------------------------------------------


def test_the_solver_against_all_plans() -> None:
    """Within the limits wherever a plan is, and nearly always the best one."""
    draw = np.random.default_rng(0)
    gaps = []
    for _ in range(20):
        items = [draw.random((4, 3)) for _ in range(5)]
        sums = np.array([total(items, picked) for picked in itertools.product(range(4), repeat=5)])
        limits = {BYTES: float(np.quantile(sums[:, BYTES], 0.3)), LOSS: float(np.quantile(sums[:, LOSS], 0.3))}
        fitting = sums[(sums[:, BYTES] <= limits[BYTES]) & (sums[:, LOSS] <= limits[LOSS])]
        found = total(items, best(items, TIME, limits))
        assert len(fitting) and found[BYTES] <= limits[BYTES] and found[LOSS] <= limits[LOSS]
        gaps.append(float(found[TIME] / fitting[:, TIME].min()) - 1)
    assert max(gaps) < 0.05 and sorted(gaps)[-3] < 1e-9


def test_the_nearest_plan_where_none_fits() -> None:
    items = [np.array([[1.0, 5.0, 0.0], [2.0, 3.0, 0.1]]), np.array([[1.0, 5.0, 0.0], [2.0, 4.0, 0.1]])]
    assert best(items, TIME, {BYTES: 6.0}) == (1, 1)
    assert best(items, TIME, {BYTES: 8.0}) == (1, 0)
    assert best(items, TIME, {BYTES: 100.0}) == (0, 0)


def test_no_plan_is_below_the_bound() -> None:
    draw = np.random.default_rng(2)
    gaps = []
    for _ in range(20):
        items = [draw.random((4, 3)) for _ in range(6)]
        sums = np.array([total(items, picked) for picked in itertools.product(range(4), repeat=6)])
        limits = {BYTES: float(np.quantile(sums[:, BYTES], 0.2)), LOSS: float(np.quantile(sums[:, LOSS], 0.3))}
        fitting = sums[(sums[:, BYTES] <= limits[BYTES]) & (sums[:, LOSS] <= limits[LOSS])]
        bound = least(items, TIME, limits)
        assert bound <= fitting[:, TIME].min() + 1e-12
        gaps.append(fitting[:, TIME].min() / bound - 1)
        assert least(items, TIME, {}) == pytest.approx(sums[:, TIME].min())
        assert least(items, TIME, {BYTES: sums[:, BYTES].min() - 0.01}) == np.inf
    assert np.median(gaps) < 0.15


def test_the_hull_is_on_the_front() -> None:
    draw = np.random.default_rng(1)
    items = [draw.random((4, 3)) for _ in range(4)]
    sums = np.array([total(items, picked) for picked in itertools.product(range(4), repeat=4)])
    plans = hull(items)
    assert len(plans) == len(set(plans)) > 10
    for picked in plans:
        own = total(items, picked)
        assert not ((sums <= own).all(axis=1) & (sums < own - 1e-12).any(axis=1)).any()


def test_not_dominated() -> None:
    rows = np.array([[1, 2, 3], [1, 2, 3], [2, 2, 3], [0, 9, 9], [1, 1, 4.0]])
    assert not_dominated(rows) == [0, 3, 4]
    assert not_dominated(np.zeros((0, 3))) == []


def test_a_correction_finds_factors_and_offset() -> None:
    truth = {"a": 0.7, "b": 1.4}
    plans = [{"a": 10.0}, {"b": 10.0}, {"a": 4.0, "b": 3.0}, {"a": 1.0, "b": 8.0}]
    values = [5.0 + sum(truth[name] * part for name, part in plan.items()) for plan in plans]
    first = Correction(["a", "b", "c"], 1.0, 4.0)
    assert first.of({"a": 2.0, "c": 1.0}) == 7.0
    found = first.fitted(plans, values, [0.001] * 4)
    assert (found.factor("a"), found.factor("b"), found.offset) == pytest.approx((0.7, 1.4, 5.0), rel=0.01)
    assert found.factor("c") == 1.0  # of which nothing is known
    assert first.of({"a": 2.0}) == 6.0  # as it was
    scaled = first.scaled_to([({"a": 2.0}, 1.0), ({"b": 2.0}, 1.0), ({"b": 0.0}, 3.0)])
    assert scaled.factor("c") == 0.5


# --- the search -----------------------------------------------------------------------------------------------------------


def test_the_front_is_measured_and_none_is_dominated(measured: list[str]) -> None:
    model, xs = chain(), batches()
    front = pc.search(model, CANDIDATES, xs, {"quality": 0.99, "mb": 0.03}, example_inputs=xs[0], points=5)
    assert len(front) >= 4 and [*front] == [front[i] for i in range(len(front))] and front[:2] == [*front][:2]
    costs = np.array([[p.measured.ms, p.measured.mb, -p.measured.quality] for p in front])
    assert not_dominated(costs) == [*range(len(front))]
    assert front.missed == {} and front.best.measured.quality >= 0.99 and front.best.measured.mb <= 0.03
    seen = pc.calibrate(model, xs)
    for point in front:
        small = pc.compress(model, point.plan, calibration=seen)
        cosine = torch.cosine_similarity(small(xs[0]).double(), model(xs[0]).double()).mean()
        assert point.measured.quality == pytest.approx(float(cosine.detach()), abs=1e-6)
        assert point.measured.mb * 1e6 == pytest.approx(pc.summary(small).bytes, abs=0.5)
        assert point.predicted.mb == pytest.approx(point.measured.mb)
        us = 20 + sum(US[name_of(m)] * a * b / 1000 for m, (a, b) in zip(point.plan.values(), SHAPES, strict=True))
        assert point.measured.ms == pytest.approx(us / 1000, rel=1e-6)
    # What was made up is additive, so that nothing is left to correct.
    assert front.bound is not None and 0.02 < front.bound <= front.best.measured.ms * (1 + 1e-6)
    assert front.errors("additive").ms < 1e-6 and front.errors().ms < 0.05
    assert front.errors().quality < 0.03


SHAPES = [(64, 48), (64, 64), (12, 64)]


def name_of(method: Any) -> str:
    return next((name for name, one in CANDIDATES.items() if one == method), "dense")


@pytest.mark.slow
def test_the_best_plan_is_the_best_of_all(measured: list[str]) -> None:
    """Of all 125 plans of a small model, each compressed and rated, none within the limits is faster."""
    model, xs = chain(), batches()
    front = pc.search(model, CANDIDATES, xs, {"quality": 0.98}, example_inputs=xs[0], exact=True)
    seen, names = pc.calibrate(model, xs), [None, *CANDIDATES]
    found = {}
    uniform = {name: pc.compress(model, method, calibration=seen) for name, method in CANDIDATES.items()}
    for plan in itertools.product(names, repeat=3):
        layers = [model[i] if name is None else uniform[name][i] for i, name in zip((0, 2, 4), plan, strict=True)]
        y = xs[0]
        for i, layer in enumerate(layers):
            y = layer(y)
            if i < 2 and layer is model[2 * i]:
                y = model[2 * i + 1](y)
        quality = float(torch.cosine_similarity(y.double(), model(xs[0]).double()).mean().detach())
        us = 20 + sum(US[name or "dense"] * a * b / 1000 for name, (a, b) in zip(plan, SHAPES, strict=True))
        found[plan] = us, quality
    fastest = min(us for us, quality in found.values() if quality >= 0.98)
    assert front.best.measured.ms * 1000 <= 1.02 * fastest


def test_limits_that_cannot_be_met(measured: list[str]) -> None:
    xs = batches()
    front = pc.search(chain(), CANDIDATES, xs, {"ms": 0.03, "quality": 0.9999}, example_inputs=xs[0], points=4)
    assert set(front.missed) <= {"ms", "quality"} and front.missed
    lacking = front.best.measured.missed(front.limits)
    assert lacking == front.missed
    (name, value), *_ = front.missed.items()
    assert f"no plan keeps to {name} = {front.limits[name]:g}: the nearest misses it by {value:.4g}" in str(front)
    assert all(front.distance(point) >= front.distance(front.best) > 0 for point in front)


def test_what_is_best_depends_on_what_has_no_limit() -> None:
    plan = WrittenPlan(pc.Int8())
    costs = [Cost(1, 9, 9, 0.9), Cost(2, 5, 5, 0.95), Cost(3, 6, 6, 0.99), Cost(4, 4, 4, 0.92)]
    points = [Point(plan, cost, cost, cost, f"{i}") for i, cost in enumerate(costs)]
    for limits, expected in (
        ({"ms": 3.5, "mb": 8}, 2), ({"quality": 0.91, "mb": 8}, 1), ({"quality": 0.91, "ms": 9}, 3), ({"quality": 0.9}, 0),
        ({"ms": 2.5, "mb": 8, "quality": 0.9}, 1), ({"layer_mb": 4.5}, 3), ({"ms": 0.5}, 0), ({"ms": 1.5, "quality": 0.93}, 1),
    ):  # fmt: skip
        front = Front(points, limits)
        assert front.best is points[expected], limits
        assert front.best_uniform is (None if front.missed else points[expected])
    assert Front(points, {"ms": 0.5}).missed == {"ms": 0.5}


def test_tied_layers_have_one_candidate(measured: list[str]) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    model[2].weight = model[0].weight
    x = torch.randn(64, 32)
    front = pc.search(
        model, {"int8": pc.Int8(), "sparse": pc.Sparse(0.5)}, [x], {"quality": 0.9}, example_inputs=x, points=3
    )
    for point in front:
        assert point.plan["0"] == point.plan["2"]
        assert point.predicted.mb == pytest.approx(point.measured.mb)


def test_a_convolutional_model_under_an_accuracy_limit(measured: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x = torch.randn(128, 1, 8, 8)
    labels = model(x).argmax(1)

    def accuracy(model: nn.Module) -> float:
        return float((model(x).argmax(1) == labels).float().mean())

    choices = {"int8": pc.Int8(), "sparse": pc.Sparse(0.4), "thin": pc.LowRank(2, rank_guard=False)}
    front = pc.search(model, choices, [x], {"quality": 0.95}, example_inputs=x, metric=accuracy, points=4)
    assert front.best.measured.quality >= 0.95
    small = pc.compress(model, front.best.plan, calibration=pc.calibrate(model, [x]), example_inputs=x)
    assert accuracy(small) == pytest.approx(front.best.measured.quality)


def test_a_layer_that_nobody_takes_stays_dense(measured: list[str]) -> None:
    xs = batches()
    front = pc.search(
        chain(), {"thin": pc.LowRank(16, rank_guard=False)}, xs, {"ms": 1}, example_inputs=xs[0], points=3
    )
    assert all(point.plan["4"] is None for point in front)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"limits": {}}, TypeError, "limits is {}, expected numbers for some of ms, mb, layer_mb, quality"),
        ({"limits": 3}, TypeError, "limits is 3"),
        ({"limits": {"us": 3}}, ValueError, "limits has 'us': 3"),
        ({"limits": {"ms": float("nan")}}, ValueError, "limits has 'ms': nan"),
        ({"limits": {"ms": True}}, ValueError, "limits has 'ms': True"),
        ({"candidates": {"dense": pc.Int8()}}, ValueError, "a candidate is called 'dense'"),
        ({"batches": []}, ValueError, "search: batches is empty"),
    ],
    ids=str,
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"candidates": [pc.Int8()], "batches": batches(), "limits": {"ms": 1}} | change
    with pytest.raises(error, match=message):
        pc.search(chain(), given["candidates"], given["batches"], given["limits"], example_inputs=batches()[0])


# --- smaller models -------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner, self.outer, self.scale = nn.Linear(32, 24), nn.Linear(24, 32), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.outer(torch.relu(self.inner(x)))


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(*map(Residual, (3.0, 0.1, 2.0))), nn.Linear(32, 12)).eval()


def deep_batches(seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(32, 32) for _ in range(2)]


FEWER_BLOCKS = {"2": {"blocks": {"0.*": 2 / 3}}, "1": {"blocks": {"0.*": 1 / 3}}}


def deep_search(limits: dict[str, float], **options: Any) -> Front:
    xs = deep_batches(1)
    given: dict[str, Any] = {"calibration": deep_batches(2), "shapes": FEWER_BLOCKS, "points": 1} | options
    return pc.search(deep(), {"int8": pc.Int8()}, xs, limits, example_inputs=xs[0], **given)


def cosine(found: nn.Module, expected: nn.Module, xs: list[Tensor]) -> float:
    with torch.no_grad():
        rows = [torch.cosine_similarity(found(x).double(), expected(x).double()) for x in xs]
    return float(torch.cat(rows).mean())


def test_plans_of_smaller_models_on_the_same_front(measured: list[str], tmp_path: Path) -> None:
    """Each with what it lacks, by the metric; rated beside the whole model; and made again from its file."""
    model, xs = deep(), deep_batches(1)
    front = deep_search({"quality": 0.97, "mb": 0.012}, cache=tmp_path / "c")
    lines, count = (tmp_path / "c").read_text(), len(measured)
    assert str(deep_search({"quality": 0.97, "mb": 0.012}, cache=tmp_path / "c")) == str(front)
    assert len(measured) == count and (tmp_path / "c").read_text() == lines
    assert [one.shrink for one in front.shapes.values()] == [({"blocks": ["0.1"]},), ({"blocks": ["0.1", "0.2"]},)]
    assert {point.shape for point in front.measured} == {"", "2"} and front.best.shape == "2" and not front.missed
    assert "1: dense" in str(front) and "not searched: it misses 0.97 before any layer is compressed" in str(front)
    assert "\n2: dense" in str(front) and "2: int8 everywhere" in str(front)
    for name, shape in front.shapes.items():
        small = pc.Cut.without(*shape.shrink[0]["blocks"]).apply(deep())
        assert shape.measured is not None and bool(shape.reason) == (name == "1")
        assert shape.measured.quality == pytest.approx(cosine(small, model, xs), abs=1e-6)
        size = sum(p.numel() for p in small.parameters()) * 4e-6
        assert (shape.measured.mb, shape.measured.layer_mb) == pytest.approx((size, size))
        assert [(r.kind, r.before, r.after) for r in shape.cut.records] == [("blocks", 3, int(name))]
    for i, point in enumerate([front.best, front[-1]]):
        point.plan.save(tmp_path / f"{i}")
        plan = WrittenPlan.load(tmp_path / f"{i}")
        assert (plan.shrink, dict(plan)) == (point.plan.shrink, dict(point.plan))
        small = pc.shrunk(model, plan.shrink, deep_batches(2), example_inputs=xs[0])
        small = pc.compress(small, plan, calibration=pc.calibrate(small, deep_batches(2), plan=plan))
        assert point.measured.quality == pytest.approx(cosine(small, model, xs), abs=1e-6)
        assert point.measured.mb * 1e6 == pytest.approx(pc.summary(small).bytes, abs=0.5)
        assert point.predicted.mb == pytest.approx(point.measured.mb)
        if plan.shrink:
            with pytest.raises(ValueError, match=r"the plan is for a smaller model.*\{'blocks': \['0.1'"):
                pc.compress(model, plan)
    assert front.errors().quality < 0.02


def test_blocks_and_channels_one_after_the_other() -> None:
    xs, data = deep_batches(1), deep_batches(2)
    calls: list[dict[str, Any]] = [{"blocks": {"0.*": 2 / 3}}, {"channels": 0.75, "fisher": True}]
    quality = Quality(deep(), xs, "cosine", "test")
    small, done = smaller(deep(), calls, data, xs[0], quality, Cache(None), "test")
    assert done == ({"blocks": ["0.1"]}, {"channels": 0.75, "fisher": True})
    assert [record.kind for record in pc.Cut.of(small).records] == ["blocks", "channels", "channels"]
    assert sum(small.get_submodule(f"0.{i}.inner").out_features for i in range(2)) == 36
    again = pc.shrunk(deep(), done, data, example_inputs=xs[0])
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        ({"a": 3}, TypeError, "shape 'a' is 3, expected settings of shrink"),
        ({"": {"blocks": 0.5}}, ValueError, "a shape is called ''"),
        ({"a": {"speedup": 2}}, ValueError, "shape 'a' has 'speedup', expected some of neurons, heads"),
        ({"a": {"channels": True}}, ValueError, "shape 'a': channels is True, expected a share"),
        ({"a": {"blocks": {"0.*": 1.5}}}, ValueError, "shape 'a': blocks is 1.5, expected a share"),
        ({"a": {"blocks": {"7.*": 0.5}}}, ValueError, "shape 'a': shrink: blocks: '7.*' matches no block"),
        ({"a": {"blocks": ["0"] * 2}}, ValueError, "shape 'a': shrink: blocks has '0', expected different members"),
        ({"a": {"heads": 0.5}}, ValueError, "shape 'a': shrink: no heads that can go"),
    ],
    ids=str,
)
def test_shapes_that_are_none(shapes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        deep_search({"quality": 0.9}, shapes=shapes)


def test_shapes_are_calibrated_anew() -> None:
    with pytest.raises(ValueError, match="calibration is of the whole model, expected batches"):
        deep_search({"quality": 0.9}, calibration=pc.calibrate(deep(), deep_batches(2)))


# --- the cache ------------------------------------------------------------------------------------------------------------


def test_made_again_nothing_is_measured(measured: list[str], tmp_path: Path) -> None:
    xs = batches()

    def find(limits: dict[str, float]) -> Front:
        return pc.search(chain(), CANDIDATES, xs, limits, example_inputs=xs[0], points=3, cache=tmp_path / "c")

    first = find({"quality": 0.99})
    count = len(measured)
    assert str(find({"quality": 0.99})) == str(first) and len(measured) == count
    find({"quality": 0.98})
    assert len(measured) > count and not any(one.startswith("layer") for one in measured[count:])
    layers = [one for one in measured if one.startswith("layer")]
    assert len(layers) == len(set(layers)) == 3 * len(CANDIDATES)


KILLED = """
    import os, signal, sys, torch
    from torch import nn
    import pycompress as pc
    sys.path.insert(0, {tests!r})
    from test_search import CANDIDATES, batches, chain
    from pycompress.search.cache import Cache
    put, count = Cache.put, []
    def counted(self, key, value):
        put(self, key, value)
        count.append(key)
        if len(count) == {lines}:
            os.kill(os.getpid(), signal.SIGKILL)
        return value
    Cache.put = counted
    torch.set_num_threads(1)
    pc.search(chain(), CANDIDATES, batches(), {{"quality": 0.99}}, example_inputs=batches()[0], points=2, cache={path!r})
    print(len(count))
"""


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path) -> None:
    path = tmp_path / "c"

    def run(lines: int) -> subprocess.CompletedProcess[str]:
        code = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), lines=lines, path=str(path))
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    before: list[str] = []
    for lines in (3, 15):
        assert run(lines).returncode == -signal.SIGKILL
        now = path.read_text().splitlines()
        assert len(now) == len(before) + lines and now[: len(before)] == before
        before = now
    done = run(-1)
    assert done.returncode == 0, done.stderr
    after = path.read_text().splitlines()
    assert after[: len(before)] == before and len(after) == len(before) + int(done.stdout)
    keys = [line.split(",")[0] for line in after]
    assert len(keys) == len(set(keys))
    assert run(-1).stdout.strip() == "0"
