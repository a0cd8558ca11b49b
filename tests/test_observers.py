"""Observers: which range each of them takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress import Entropy, Int8, Known, MeanSquaredError, MinMax, MovingAverage, Percentile
from pycompress.methods import InputStatistics, Observer
from pycompress.methods.method import needs_of

OBSERVERS: list[Any] = [MinMax(), MovingAverage(), Percentile(), MeanSquaredError(), Entropy()]
EACH = pytest.mark.parametrize("observer", OBSERVERS, ids=repr)
NORMAL = torch.randn(300_000, generator=torch.Generator().manual_seed(0))


def seen(*batches: Tensor) -> InputStatistics:
    """Of a layer with one feature that met these values."""
    parts = ["ranges", "histograms", "extremes"]
    return pc.calibrate(nn.Linear(1, 1), [batch.view(-1, 1) for batch in batches], gather=parts)[""]


def ends(observer: Any, *batches: Tensor, levels: int = 256) -> tuple[float, float]:
    found: tuple[float, float] = observer.ends(seen(*batches), levels)
    return found


def error(values: Tensor, low: float, high: float, levels: int = 256) -> float:
    """The mean squared error of quantizing values as the kernels do it."""
    step = (high - low) / (levels - 1)
    zero_point = min(max(round(-low / step), 0), levels - 1)
    q = (values.double() / step).round().add(zero_point).clamp(0, levels - 1)
    return float(((q - zero_point) * step - values).square().mean())


def test_min_max() -> None:
    assert ends(MinMax(), torch.tensor([1.0, -3.0]), torch.tensor([2.5, 0.0])) == (-3.0, 2.5)


def test_moving_average() -> None:
    batches = [torch.tensor([-low, high]) for low, high in ((1.0, 2.0), (3.0, 4.0), (0.5, 100.0))]
    assert ends(MovingAverage(0.9), *batches) == pytest.approx((-1.13, 11.98))
    assert ends(MovingAverage(0), *batches) == (-0.5, 100.0), "the last batch alone"
    assert ends(MovingAverage(0.9), batches[1]) == (-3.0, 4.0), "the only batch"
    for momentum in (-0.1, 0.995, 1, math.nan):
        with pytest.raises(ValueError, match=r"momentum is .*, expected 0 to 0\.99"):
            MovingAverage(momentum)


@pytest.mark.parametrize("percent", [99.99, 99.0, 90.0])
def test_percentile(percent: float) -> None:
    low, high = ends(Percentile(percent), NORMAL)
    ranks, cut = NORMAL.sort().values, int(len(NORMAL) * (100 - percent) / 200)
    width = 16 / 8192  # of a bin
    assert ranks[cut] - width <= low <= ranks[cut] and ranks[-cut - 1] <= high <= ranks[-cut - 1] + width
    assert ends(Percentile(100), NORMAL) == ends(MinMax(), NORMAL)


@pytest.mark.parametrize("count", range(1, 10))
def test_percentile_of_few_values_cuts_none(count: int) -> None:
    values = torch.randn(count) * 5
    assert ends(Percentile(), values) == ends(MinMax(), values)
    assert ends(Percentile(90), values) == ends(MinMax(), values)


def test_percentages_that_are_none() -> None:
    for percent in (50, 0, -1, 100.1, math.nan):
        with pytest.raises(ValueError, match=r"percent is .*, expected above 50 up to 100"):
            Percentile(percent)


@pytest.mark.parametrize("levels", [128, 256])
@pytest.mark.parametrize(
    "values",
    [NORMAL, NORMAL.abs(), torch.cat([NORMAL, torch.tensor([-60.0, 90.0])]), NORMAL.sign() * NORMAL**4],
    ids=["normal", "positive", "outliers", "heavy tails"],
)
def test_mean_squared_error_is_the_smallest(values: Tensor, levels: int) -> None:
    """Of all observers', and near that of a fine search over both ends."""
    low, high = ends(MeanSquaredError(), values, levels=levels)
    own = error(values, low, high, levels)
    for other in OBSERVERS:
        assert own <= 1.02 * error(values, *ends(other, values, levels=levels), levels), other
    tried = [
        error(values, a * float(values.min()), b * float(values.max()), levels)
        for a in torch.linspace(0.05, 1, 8).tolist()
        for b in torch.linspace(0.05, 1, 8).tolist()
        if a * float(values.min()) < b * float(values.max()) and float(values.min()) < 0
    ]
    assert own <= 1.02 * min(tried, default=math.inf)


def test_entropy_cuts_outliers_and_keeps_the_rest() -> None:
    low, high = ends(Entropy(), torch.cat([NORMAL, torch.tensor([-80.0, 80.0])]))
    assert -8 < low < -2 and 2 < high < 8
    uniform = torch.rand(300_000)
    assert ends(Entropy(), uniform) == pytest.approx((float(uniform.min()), 1), abs=0.1), "of which nothing is rare"


# --- what every one of them does --------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("value", [3.0, -0.2, 0.0, 1e-30, -1e30])
def test_of_a_constant(observer: Any, value: float) -> None:
    """It is quantized to itself, up to a step; zeros to zeros."""
    method = Int8(activation="static", observer=observer, inputs=seen(torch.full((50,), value)))
    assert method.input_range is not None
    scale, zero_point = method.input_range
    q = min(max(round(value / scale) + zero_point, 0), 255)
    assert abs((q - zero_point) * scale - value) <= max(abs(value), 1e-36) * 2**-7
    if value == 0:
        assert method.input_range == (1.0, 0)


@EACH
@pytest.mark.parametrize("sign", [1, -1])
def test_of_values_of_one_sign_zero_is_an_end(observer: Any, sign: int) -> None:
    values = sign * (torch.rand(4000) + 2)
    method = Int8(activation="static", observer=observer, inputs=seen(values))
    assert method.input_range is not None
    scale, zero_point = method.input_range
    assert zero_point == (0 if sign > 0 else 255)
    assert 255 * scale == pytest.approx(3, rel=0.1)


@EACH
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_of_few_values(observer: Any, count: int) -> None:
    """None is clipped by more than a hundredth of the range."""
    values = torch.linspace(-2, 5, count) if count > 1 else torch.tensor([5.0])
    low, high = ends(observer, values)
    assert low <= max(float(values.min()), -2) + 0.07 and high >= 4.93


@EACH
@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e20, 1e36])
def test_of_any_size(observer: Any, size: float) -> None:
    method = Int8(activation="static", observer=observer, inputs=seen(NORMAL[:2000] * size))
    assert method.input_range is not None
    weight = method.compress(torch.randn(4, 1))
    assert weight.input_range == method.input_range
    reach = float(NORMAL[:2000].abs().max()) * size
    assert 0.2 * reach <= 128 * method.input_range[0] <= 1.1 * reach


@EACH
def test_it_is_a_small_value_that_says_what_it_needs(observer: Any) -> None:
    assert isinstance(observer, Observer) and hash(observer) == hash(type(observer)())
    assert needs_of(Int8(activation="static", observer=observer)) == {"moments", *observer.needs}
    assert needs_of(Int8()) == {"moments"}, "a dynamic one needs none"
    lean = pc.calibrate(nn.Linear(3, 2), [torch.randn(5, 3)], gather="diagonals")[""]
    with pytest.raises(
        ValueError, match=r"of the inputs diagonals were gathered, expected (ranges|histograms|extremes)"
    ):
        observer.ends(lean, 256)


@EACH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_errors_of_the_calibration(observer: Any, bad: float) -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="the input of 0 holds NaN or Inf, expected finite values"):
        pc.calibrate(model, [x], plan=Int8(activation="static", observer=observer))


@EACH
def test_empty_batches_count_nothing(observer: Any) -> None:
    model, x = nn.Linear(3, 2), torch.randn(40, 3)
    plan = Int8(activation="static", observer=observer)
    found = [pc.calibrate(model, batches, plan=plan)[""] for batches in ([x], [x[:0], x, x[:0]])]
    assert observer.ends(found[0], 256) == observer.ends(found[1], 256)


def test_known_needs_no_calibration() -> None:
    layer = pc.compress(nn.Linear(4, 3), Int8(activation="static", observer=Known(0.0, 1.0)))
    assert layer.canonical().input_range == (pytest.approx(1 / 255), 0)
    above = Int8(activation="static", observer=Known(2.0, 4.0)).input_range
    assert above == (pytest.approx(4 / 255), 0), "zero is in every range"
    for low, high in ((1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match=r"Known: low is .*, expected finite numbers"):
            Known(low, high)


def test_one_of_your_own() -> None:
    class Half:
        needs = ("ranges",)

        def ends(self, inputs: InputStatistics | None, levels: int) -> tuple[float, float]:
            assert inputs is not None and inputs.low is not None and inputs.high is not None
            return 0.5 * float(inputs.low.min()), 0.5 * float(inputs.high.max())

    method, x = Int8(activation="static", observer=Half()), torch.tensor([[-2.0, 4.0]])  # type: ignore[arg-type]
    linear = nn.Linear(2, 2)
    found = pc.compress(linear, method, calibration=pc.calibrate(linear, [x], plan=method))
    assert found.canonical().input_range == (pytest.approx(3 / 255), 85)
