"""only_if_faster: the whole model is raced against the dense one, and layers with which it loses go back."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress import race
from pycompress.model import compressed_layers
from pycompress.nn import CompressedLayer

Snapshot = Callable[[nn.Module], Callable[[], bool]]


@pytest.fixture(autouse=True)
def every_layer_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it is measured alone."""
    monkeypatch.setattr(race, "interleaved_us", lambda *_, **__: (10.0, 5.0))


def chain(depth: int = 6) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)))


def costs(monkeypatch: pytest.MonkeyPatch, cost: Callable[[set[str]], float]) -> list[set[str]]:
    """Makes a model with these compressed layers take 100 us plus ``cost``. Returns what was raced."""
    raced: list[set[str]] = []

    def model_us(_: nn.Module, targets: Any, *__: Any) -> tuple[float, float]:
        raced.append({target.name for target in targets})
        return 100.0, 100.0 + cost(raced[-1])

    monkeypatch.setattr(race, "model_us", model_us)
    return raced


def compressed(model: nn.Module, **arguments: Any) -> tuple[set[str], dict[str, str]]:
    result = pc.compress(model, pc.Int8(), example_inputs=torch.randn(2, 8), only_if_faster=True, **arguments)
    return set(compressed_layers(result)), {record.name: record.reason for record in pc.summary(result).layers}


def test_a_model_that_is_faster_keeps_all_after_one_race(monkeypatch: pytest.MonkeyPatch) -> None:
    raced = costs(monkeypatch, lambda names: -len(names))
    assert compressed(chain())[0] == set("012345")
    assert raced == [set("012345")]


@pytest.mark.parametrize("slow", [{"0"}, {"5"}, {"2", "3"}, {"0", "2", "4"}])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_layers_that_make_it_slower_go_back(slow: set[str], inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    costs(monkeypatch, lambda names: 20.0 * len(names & slow) - len(names - slow))
    kept, reasons = compressed(chain(), inplace=inplace)
    assert kept == set("012345") - slow
    for name in slow:
        assert reasons[name] == "the model is slower with it: 120 us against 100 us"


def test_a_model_that_is_slower_with_any_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    costs(monkeypatch, lambda names: float(len(names)))
    kept, reasons = compressed(chain())
    assert not kept
    assert all("the model is slower with it" in reason for reason in reasons.values())


def test_no_difference_is_no_win(monkeypatch: pytest.MonkeyPatch) -> None:
    costs(monkeypatch, lambda _: 0.0)
    assert not compressed(chain())[0]


def test_halves_that_win_alone_and_lose_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The better one stays."""
    gains = {"0": 1.0, "1": 3.0}
    costs(monkeypatch, lambda names: 50.0 if len(names) > 1 else -sum(gains[name] for name in names))
    kept, reasons = compressed(chain(2))
    assert kept == {"1"}
    assert reasons["0"] == "the model is slower with it: 150 us against 100 us"


# --- the clock itself -------------------------------------------------------------------------------------------------


NOW = [0.0]  # seconds, which pass in the models below only


class Asking(nn.Module):
    """A layer, and code beside it that is slow where the layer is compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        NOW.append(NOW.pop() + 0.001)
        if isinstance(self.fc, CompressedLayer):
            NOW.append(NOW.pop() + 0.002)
        if not isinstance(self.last, CompressedLayer):
            NOW.append(NOW.pop() + 0.001)
        y: Tensor = self.last(self.fc(x))
        return y


@pytest.mark.parametrize("inplace", [False, True])
def test_what_a_layer_does_to_the_model_is_timed(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "time", SimpleNamespace(perf_counter=lambda: NOW[0]))
    kept, reasons = compressed(Asking(), inplace=inplace)
    assert kept == {"last"}
    assert reasons["fc"] == "the model is slower with it: 4000 us against 2000 us"


class Remembering(nn.Module):
    """Counts its calls, keeps a tensor, fills a cache of two places, draws numbers and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.calls, self.kept, self.places = 0, None, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        assert len(self.places) < 2, "called twice without being put back"
        self.places.append(x)
        self.calls += 1
        self.count += 1
        x.add_(torch.rand(()))
        self.kept = self.fc(x)
        return self.kept


@pytest.mark.parametrize("inplace", [False, True])
def test_a_race_leaves_no_trace(inplace: bool, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot) -> None:
    monkeypatch.setattr(race, "_SECONDS", 0.0)
    model, x = Remembering(), torch.randn(2, 8)
    unchanged, before, state = snapshot(model), x.clone(), torch.get_rng_state()
    result: Any = pc.compress(model, pc.Int8(), example_inputs=x, only_if_faster=True, inplace=inplace)
    assert inplace or unchanged()
    for one in (model, result):
        assert (one.calls, one.kept, one.places, float(one.count)) == (0, None, [], 0)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in result.modules())


class FailsCompressed(Asking):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.fc, CompressedLayer):
            raise ZeroDivisionError
        return self.fc(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_failure_in_the_race_leaves_the_model_whole(inplace: bool, snapshot: Snapshot) -> None:
    model = FailsCompressed()
    unchanged = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        pc.compress(model, {"fc": pc.Int8()}, example_inputs=torch.randn(2, 8), only_if_faster=True, inplace=inplace)
    assert unchanged()


class Caching(nn.Module):
    """Keeps what it computed in its first call: under inference_mode, it could never be trained again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.first = nn.Linear(8, 8), None

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_inference_mode_enabled()
        return self.fc(x)  # type: ignore[no-any-return]


def test_never_under_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_SECONDS", 0.0)
    result = pc.compress(Caching(), pc.Int8(), example_inputs=torch.randn(2, 8), only_if_faster=True)
    result(torch.randn(2, 8, requires_grad=True)).sum().backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_padded_transformer_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fast path would hide the layers, and give them nested tensors."""
    monkeypatch.setattr(race, "_SECONDS", 0.0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padded = torch.randn(2, 5, 16), torch.arange(5)[None] >= torch.tensor([5, 3])[:, None]
    inputs = {"src": x, "src_key_padding_mask": padded}
    result = pc.compress(model, pc.Int8(), example_inputs=inputs, only_if_faster=True)
    assert all(record.us for record in pc.summary(result).layers if "MultiheadAttention" not in record.reason)
    with torch.no_grad():
        y, expected = (one(**inputs)[~padded] for one in (result, model))
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
