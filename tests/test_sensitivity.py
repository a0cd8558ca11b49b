"""What a model loses where one layer is compressed: the scores against their definitions, and what goes wrong on the way."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.calls import call_model
from pycompress.search.cache import Cache, digest
from pycompress.search.score import output_error

CANDIDATES = {"int8": pc.Int8(), "int4": pc.Int4(), "thin": pc.LowRank(16, rank_guard=False), "sparse": pc.Sparse(0.3)}


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 12)
    ).eval()


def batches(count: int = 2) -> list[Tensor]:
    return [torch.randn(64, 48) for _ in range(count)]


# --- scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gather", ["moments", "diagonals"])
def test_the_error_is_the_share_of_the_outputs(gather: str) -> None:
    layer, x = nn.Linear(24, 16, bias=False), torch.randn(200, 24) * torch.rand(24)
    calibration = pc.calibrate(nn.Sequential(layer), [x], gather=gather)
    other = layer.weight + 0.1 * torch.randn(16, 24)
    found = output_error(layer.weight, other, calibration["0"])
    w, rows = layer.weight.detach().double(), x.double()
    d = w - other.detach().double()
    if gather == "moments":
        expected = float((rows @ d.T).square().sum() / (rows @ w.T).square().sum())
    else:
        squares = rows.square().mean(dim=0)
        expected = float((d.square() * squares).sum() / (w.square() * squares).sum())
    assert found == pytest.approx(expected, rel=1e-6)
    assert output_error(layer.weight, layer.weight, calibration["0"]) == 0
    assert output_error(torch.zeros(2, 3), torch.zeros(2, 3), None) == 0


def test_the_error_of_an_embedding_goes_by_its_tokens() -> None:
    table, other = torch.randn(5, 8), torch.randn(5, 8)
    tokens = torch.tensor([[0, 0, 3, 4]])
    seen = pc.calibrate(nn.Sequential(nn.Embedding.from_pretrained(table)), [tokens])["0"]
    met, lost = table[tokens[0]].double(), (table - other)[tokens[0]].double()
    assert output_error(table, other, seen) == pytest.approx(float(lost.square().sum() / met.square().sum()), rel=1e-6)


def test_the_change_is_that_of_the_results() -> None:
    """Of a linear model the first order is all there is: ||J d||^2 / ||y||^2, which many items estimate well."""
    model, xs = nn.Sequential(nn.Linear(32, 40), nn.Linear(40, 24)).eval(), [torch.randn(2048, 32)]
    found = pc.sensitivity(model, {"thin": pc.LowRank(12, rank_guard=False)}, xs, metric="cosine")
    for name in ("0", "1"):
        small = pc.compress(model, {name: pc.LowRank(12, rank_guard=False)}, calibration=pc.calibrate(model, xs))
        with torch.no_grad():
            expected = float((small(xs[0]) - model(xs[0])).square().sum() / model(xs[0]).square().sum())
        assert found[name, "thin"].change == pytest.approx(expected, rel=0.1)


def test_cheap_and_exact_agree_in_order_and_a_cosine_loses_half_the_change() -> None:
    found = pc.sensitivity(chain(), CANDIDATES, batches(), exact=True)
    losses = [loss for (_, name), loss in found.items() if name in ("int8", "int4") and not loss.reason]
    assert len(losses) == 6
    for loss in losses:
        assert loss.exact == pytest.approx((loss.change or 0) / 2, rel=0.5)
    by_exact = sorted(found, key=lambda key: found[key].exact or 0)
    by_change = sorted(found, key=lambda key: found[key].cheap or 0)
    ranks = {key: i for i, key in enumerate(by_change)}
    assert sum(abs(i - ranks[key]) for i, key in enumerate(by_exact)) <= len(found)  # a random order has n^2 / 3


def test_exact_is_what_compress_makes_of_that_layer_alone() -> None:
    model, xs = chain(), batches(1)
    seen = pc.calibrate(model, xs)
    found = pc.sensitivity(model, CANDIDATES, xs, exact=True, calibration=seen)
    for name, candidate in (("0", "int4"), ("2", "sparse"), ("4", "int8")):
        small = pc.compress(model, {name: CANDIDATES[candidate]}, calibration=seen)
        cosine = torch.cosine_similarity(small(xs[0]).double(), model(xs[0]).double()).mean()
        assert found[name, candidate].exact == pytest.approx(found.quality - float(cosine.detach()), abs=1e-9)


def test_kl_is_that_of_the_softmax() -> None:
    model, xs = chain(), batches(1)
    found = pc.sensitivity(model, {"thin": CANDIDATES["thin"]}, xs, metric="kl", exact=True)
    small = pc.compress(model, {"2": CANDIDATES["thin"]}, calibration=pc.calibrate(model, xs))
    p, q = model(xs[0]).double().log_softmax(1), small(xs[0]).double().log_softmax(1)
    expected = nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").detach()
    assert found["2", "thin"].exact == pytest.approx(float(expected), rel=1e-4)
    assert found.quality == 0


def test_what_a_mask_of_tokens_hides_does_not_count() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(16, 16)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.dense(x)  # type: ignore[no-any-return]

    model, x = Tokens().eval(), torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    seen = pc.calibrate(model, [{"x": x, "attention_mask": mask}])
    found = []
    for hidden in (1.0, 100.0):
        other = torch.where(mask[..., None] > 0, x, hidden * torch.randn_like(x))
        batch = {"x": other, "attention_mask": mask}
        losses = pc.sensitivity(model, {"thin": pc.LowRank(4, rank_guard=False)}, [batch], exact=True, calibration=seen)
        found.append(losses["dense", "thin"])
    assert found[0].exact == pytest.approx(found[1].exact, abs=1e-9)
    assert found[0].change == pytest.approx(found[1].change, rel=1e-4)


def test_convolutions_norms_and_a_model_that_is_given_as_it_was() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 10)
    )
    model[1].running_mean = torch.randn(8)
    model.eval()
    before = digest(model)
    x = torch.randn(16, 3, 8, 8)
    found = pc.sensitivity(model, {"int8": pc.Int8(), "thin": pc.LowRank(4, rank_guard=False)}, [x], exact=True)
    assert digest(model) == before
    for loss in found.values():
        assert (
            loss.exact is not None
            and loss.change is not None
            and loss.exact == pytest.approx(loss.change / 2, rel=0.9, abs=1e-4)
        )


# --- what goes wrong ------------------------------------------------------------------------------------------------------


def test_a_candidate_that_refuses_a_layer_is_on_record() -> None:
    found = pc.sensitivity(chain(), {"thin": pc.LowRank(16, rank_guard=False), "int8": pc.Int8()}, batches(1))
    reason = "4: LowRank: rank is 16, expected at most 12 for a weight [12, 64]"
    assert found["4", "thin"].reason == reason
    assert found["4", "thin"].cheap is None and found["0", "thin"].cheap and found["4", "int8"].cheap
    assert "4, thin: 4: LowRank: rank is 16" in str(found)
    guarded = pc.sensitivity(chain(), [pc.LowRank(40)], batches(1))
    assert all("40" in loss.reason for loss in guarded.values())


def test_a_metric_that_gives_no_number_for_one_layer() -> None:
    class Rating:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, _: nn.Module) -> float:
            self.calls += 1
            return math.nan if self.calls == 3 else 0.5

    found = pc.sensitivity(chain(), {"int8": pc.Int8()}, batches(1), metric=Rating(), exact=True)
    assert [loss.reason for loss in found.values()] == ["", "the metric Rating gives nan", ""]
    assert found["2", "int8"].exact is None and found["0", "int8"].exact == 0


def test_a_metric_that_fails_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    calls: list[bool] = []
    broken = True

    def rate(model: nn.Module) -> float:
        calls.append(broken)
        if broken and len(calls) == 3:
            raise KeyError("labels")
        return 0.5

    model, xs = chain(), batches(1)
    holder["rate"] = rate
    with pytest.raises(RuntimeError, match=r"sensitivity: the metric rated failed for 2 as int8: KeyError: 'labels'"):
        pc.sensitivity(model, {"int8": pc.Int8()}, xs, metric=rated, exact=True, cache=tmp_path / "c")
    broken = False
    found = pc.sensitivity(model, {"int8": pc.Int8()}, xs, metric=rated, exact=True, cache=tmp_path / "c")
    assert [loss.exact for loss in found.values()] == [0, 0, 0]
    assert len(calls) == 3 + 3  # the original again, then the two layers that were missing


holder: dict[str, Any] = {}  # (a global of the metric, whose content is the same in both runs)


def rated(model: nn.Module) -> float:
    return float(holder["rate"](model))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": torch.ones(2, 48)}, TypeError, "batches is Tensor, expected several inputs"),
        ({"candidates": []}, ValueError, "candidates is empty"),
        ({"candidates": [pc.Int8]}, TypeError, "expected a method such as"),
        ({"candidates": 3}, TypeError, "candidates is int"),
        ({"candidates": [pc.Int8(), pc.Int8()]}, ValueError, "two candidates are called Int8"),
        ({"candidates": [pc.Sparse(0.5, scope="model")]}, ValueError, "looks at all its layers together"),
        ({"candidates": [pc.LowRank("break-even")]}, ValueError, "a rank that is measured"),
        ({"metric": "accuracy"}, ValueError, "metric is 'accuracy', expected one of cosine, kl"),
        ({"metric": lambda _: math.nan}, ValueError, "gives nan for the original, expected a finite number"),
        ({"metric": lambda _: 1 / 0}, RuntimeError, "failed for the original: ZeroDivisionError"),
        ({"model": nn.Sequential(nn.ReLU())}, ValueError, "no layer can be watched"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "model": chain(),
        "candidates": [pc.Int8()],
        "batches": batches(1),
        "metric": "cosine",
    } | change
    with pytest.raises(error, match=message):
        pc.sensitivity(given["model"], given["candidates"], given["batches"], metric=given["metric"])


# --- the cache ------------------------------------------------------------------------------------------------------------


def test_a_second_time_nothing_is_compressed_or_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, xs = chain(), batches()
    first = pc.sensitivity(model, CANDIDATES, xs, exact=True, cache=tmp_path / "c")

    def no(*_: Any, **__: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr(import_module("pycompress.search.choices"), "layers_of", no)
    again = pc.sensitivity(model, CANDIDATES, xs, exact=True, cache=tmp_path / "c")
    assert dict(again) == dict(first) and str(again) == str(first)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(AssertionError, match="made again"):
        pc.sensitivity(model, CANDIDATES, xs, cache=tmp_path / "c")


def test_a_line_that_was_not_finished_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "c"
    cache = Cache(path)
    cache.put("a", 1.5)
    cache.put("b", [1, "x"])
    with open(path, "ab") as file:
        file.write(b'["c", 2')
    again = Cache(path)
    assert (again.get("a"), again.get("b"), again.get("c")) == (1.5, [1, "x"], None)
    again.put("c", 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [["a", 1.5], ["b", [1, "x"]], ["c", 3]]
    path.write_text("no cache\n")
    with pytest.raises(ValueError, match=r"line 1 is b'no cache', expected \[key, value\]"):
        Cache(path)


def test_digests_go_by_content() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert digest(x) == digest(x.clone()) == digest(x.T.contiguous().T)
    others = [x, x.double(), x.reshape(3, 2), x + 1, x.tolist(), {"x": x}, (x,), None, 1, 1.0, True, "1", x.numpy()]
    others += [pc.Int8(), pc.Int8(7), nn.Linear(2, 2), nn.Linear(2, 2), call_model, lambda a: a + 1, lambda a: a + 2]
    assert len({digest(one) for one in others}) == len(others)
    scale = 2.0
    first = digest(lambda a: a * scale)
    scale = 3.0
    assert first != digest(lambda a: a * scale)
    loop: list[Any] = [1]
    loop.append(loop)
    assert digest(loop) == digest(loop)
