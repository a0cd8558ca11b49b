"""Histograms and the ends of calls: what calibration gathers for the observers of static ranges."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import pycompress as pc
from pycompress.calibration import Calibration
from pycompress.methods.histogram import BINS, Histogram
from pycompress.methods.inputs import LAST_CALLS, InputStatistics, kept

PARTS = ["histograms", "extremes"]


def of(*batches: Tensor) -> Histogram:
    found = Histogram.empty()
    for batch in batches:
        found = found.with_values(batch, float(batch.abs().max()) if batch.numel() else 0.0)
    return found


def same(a: Histogram, b: Histogram) -> bool:
    return a.exponent == b.exponent and torch.equal(a.counts, b.counts)


VALUES = {
    "normal": torch.randn(5000),
    "positive": torch.rand(5000) * 7,
    "negative": -torch.rand(5000) - 3,
    "of many sizes": torch.randn(5000) * torch.logspace(-30, 30, 5000),
    "powers of two": 2.0 ** torch.randint(-20, 20, (5000,)) * (torch.randint(2, (5000,)) * 2 - 1),
    "a constant": torch.full((100,), 0.3),
    "zeros": torch.zeros(100),
    "few": torch.tensor([3.0, -1.0, 0.0]),
    "float64": torch.randn(500, dtype=torch.float64) * 1e140,
}


@pytest.mark.parametrize("values", VALUES.values(), ids=list(VALUES))
def test_the_counts_are_those_of_all_values_at_once(values: Tensor) -> None:
    """However they come: the limit doubles meanwhile."""
    whole = of(values)
    for size in (1, 7, 100, 4999):
        shuffled = values[torch.randperm(len(values))][: 400 * size]
        batches = shuffled.split(size)
        assert same(of(*batches), of(shuffled)), size
    half = len(values) // 2
    assert same(of(values[:half]).merged(of(values[half:])), whole)
    assert same(of(values[half:]).merged(of(values[:half])), whole)


@pytest.mark.parametrize("values", VALUES.values(), ids=list(VALUES))
def test_the_bins_are_what_their_edges_say(values: Tensor) -> None:
    found = of(values)
    assert found.counts.dtype == torch.int64 and int(found.counts.sum()) == values.numel()
    expected = np.histogram(values.double().numpy(), found.edges().numpy())[0]
    np.testing.assert_array_equal(found.counts.numpy(), expected)
    reach = float(values.abs().max())
    limit = math.ldexp(1.0, found.exponent)
    assert reach < limit and (limit <= 2 * reach or reach < 2.0**-126), "the next power of two"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8)).eval()


def test_what_a_layer_met_is_counted() -> None:
    net, batches = model(), [torch.randn(5, 3, 24) * size for size in (1, 4, 0.1, 30)]
    found = pc.calibrate(net, batches, gather=PARTS)
    assert found["0"].gathered == ("ranges", "histograms", "extremes")
    assert same(found["0"].distribution("test"), of(torch.cat(batches)))
    assert same(found["2"].distribution("test"), of(*(net[:2](batch).detach() for batch in batches)))  # type: ignore[index]
    expected = torch.tensor([[float(b.min()), float(b.max())] for b in batches], dtype=torch.float64)
    assert torch.equal(found["0"].extremes_of("test"), expected)


def test_padding_is_left_out() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Any:
            return self.layer(x)

    x, mask = torch.randn(3, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    x[mask == 0] = 1e6
    found = pc.calibrate(Masked().eval(), [{"x": x, "attention_mask": mask}] * 2, gather=PARTS)["layer"]
    kept_rows = x[mask == 1]
    assert same(found.distribution("test"), of(kept_rows, kept_rows))
    assert torch.equal(found.extremes_of("test"), torch.stack([*torch.aminmax(kept_rows)]).double().expand(2, 2))


def held() -> int:
    """Bytes of all tensors that there are."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}
    return sum(storages.values())


def _tensors() -> list[Tensor]:
    return [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]


def test_memory_does_not_grow_with_batches() -> None:
    net, after = model(), {}
    with pc.calibrate(net, gather=["moments", *PARTS]):
        for call in range(101):
            net(torch.randn(40, 24) * (1 + call))
            if call in (1, 10, 100):
                after[call] = held()
    assert after[1] == after[10] == after[100]


def test_the_ends_of_the_last_calls_are_kept() -> None:
    net = nn.Sequential(nn.Linear(4, 2)).eval()
    with pc.calibrate(net, gather="extremes") as found:
        for call in range(LAST_CALLS + 6):
            net(torch.full((1, 4), float(call)))
    expected = torch.arange(6, LAST_CALLS + 6, dtype=torch.float64)[:, None].expand(-1, 2)
    assert torch.equal(found["0"].extremes_of("test"), expected)


def test_layers_that_part_have_their_own() -> None:
    """Two that met one input, and then others."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)  # type: ignore[no-any-return]

    x, y = torch.randn(4, 6), torch.randn(4, 6) * 9
    found = pc.calibrate(Two().eval(), [(x, x), (x, y)], gather=PARTS)
    assert same(found["a"].distribution("test"), of(x, x))
    assert same(found["b"].distribution("test"), of(x, y))
    assert len(found["a"].extremes_of("test")) == len(found["b"].extremes_of("test")) == 2
    assert not torch.equal(found["a"].extremes_of("test"), found["b"].extremes_of("test"))


def test_joined_is_of_all_values() -> None:
    batches = [torch.randn(7, 24) * size for size in (1, 20)]
    parts = [pc.calibrate(model(), [batch], gather=PARTS)["0"] for batch in batches]
    joined = InputStatistics.joined(parts)
    assert same(joined.distribution("test"), of(*batches)) and len(joined.extremes_of("test")) == 2
    lacking = pc.calibrate(model(), batches, gather="ranges")["0"]
    assert InputStatistics.joined([parts[0], lacking]).gathered == ("ranges",)
    with pytest.raises(ValueError, match=r"of the inputs ranges were gathered, expected histograms"):
        lacking.distribution("test")
    with pytest.raises(ValueError, match=r"of the inputs ranges were gathered, expected extremes"):
        lacking.extremes_of("test")


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    found = pc.calibrate(model(), [torch.randn(9, 24)] * 3, gather=["diagonals", *PARTS])
    found.save(path)
    again = Calibration.load(path)
    for name, own in found.items():
        tensors = again[name].tensors()
        assert tensors.keys() == own.tensors().keys()
        assert all(torch.equal(tensors[kind], tensor) for kind, tensor in own.tensors().items())
    assert str(again.describe())
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    bad: list[tuple[dict[str, Any], str]] = [
        ({"0.histogram": torch.zeros(BINS, dtype=torch.int64)}, "histogram has no values"),
        ({"0.histogram": -tensors["0.histogram"]}, "histogram has no values or fewer"),
        ({"0.histogram": tensors["0.histogram"][1:].clone()}, "histogram is"),
        ({"0.limit": torch.tensor([3.0], dtype=torch.float64)}, "limit is 3.0, expected a power of two"),
        ({"0.limit": torch.tensor([torch.inf], dtype=torch.float64)}, "limit"),
        ({"0.extremes": torch.full((3, 2), torch.nan, dtype=torch.float64)}, "extremes holds NaN"),
        ({"0.extremes": torch.zeros(LAST_CALLS + 1, 2, dtype=torch.float64)}, "extremes is"),
        ({"0.extremes": torch.zeros(0, 2, dtype=torch.float64)}, "extremes"),
    ]
    for change, message in bad:
        save_file({**tensors, **change}, path, metadata)
        with pytest.raises(ValueError, match=message):
            Calibration.load(path)


def test_statistics_need_ranges_beside_them() -> None:
    ends = torch.zeros(4, dtype=torch.float64)
    assert InputStatistics(3, low=ends, high=ends, **kept(of(torch.zeros(4)))).features == 4
    squares = {"mean": ends, "mean_square": ends}
    with pytest.raises(ValueError, match="there is histogram without low and high"):
        InputStatistics(3, **squares, **kept(of(torch.zeros(4))))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit is None"):
        InputStatistics(3, low=ends, high=ends, histogram=of(torch.zeros(4)).counts)
