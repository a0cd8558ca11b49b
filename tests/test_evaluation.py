"""``pc.evaluate``: metrics by their library, intervals that hold the truth, sizes, times and worse inputs; what is refused."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torchmetrics import classification

import pycompress as pc
from pycompress.evaluation import Evaluation, Interval, Pair, Robustness, latency
from pycompress.evaluation.bootstrap import Bootstrap, Sample
from pycompress.evaluation.outputs import resized
from pycompress.evaluation.robustness import Worse
from pycompress.measure import in_turns

ROWS, CLASSES = 60, 4


class Given(nn.Module):
    """Gives what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def judged(outputs: Tensor, targets: Tensor | None, *metrics: str, **options: Any) -> Evaluation:
    """As two batches of other sizes."""
    cut = len(outputs) // 3
    parts = [slice(None, cut), slice(cut, None)]
    data = [(outputs[part], None if targets is None else targets[part]) for part in parts]
    return pc.evaluate(Given(), data, metrics, **{"resamples": 20, **options})


# --- metrics ----------------------------------------------------------------------------------------------------------

OF_CLASSES = {
    "accuracy": lambda classes: classification.MulticlassAccuracy(classes, average="micro"),
    "top-2": lambda classes: classification.MulticlassAccuracy(classes, average="micro", top_k=2),
    "precision": classification.MulticlassPrecision,
    "recall": classification.MulticlassRecall,
    "f1": classification.MulticlassF1Score,
    "auc": classification.MulticlassAUROC,
}


@pytest.mark.parametrize("name", OF_CLASSES)
def test_decisions_of_several_classes(name: str) -> None:
    logits, labels = torch.randn(ROWS, CLASSES), torch.randint(CLASSES, (ROWS,))
    expected = OF_CLASSES[name](CLASSES)(logits, labels)
    assert judged(logits, labels, name)[name].model.value == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("name", ["accuracy", "precision", "recall", "f1", "auc"])
@pytest.mark.parametrize("columns", [0, 1, 2])
def test_decisions_of_two_classes(name: str, columns: int) -> None:
    logit, labels = torch.randn(ROWS), torch.randint(2, (ROWS,))
    kind = {"accuracy": "Accuracy", "f1": "F1Score", "auc": "AUROC"}.get(name, name.capitalize())
    expected = getattr(classification, f"Binary{kind}")()(logit.sigmoid(), labels)
    outputs = [logit, logit[:, None], torch.stack([torch.ones(ROWS), logit + 1], 1)][columns]
    assert judged(outputs, labels, name)[name].model.value == pytest.approx(float(expected), abs=1e-6)


def test_auc_goes_by_the_order_where_float32_probabilities_are_all_one() -> None:
    logits = torch.arange(100.0, 110.0)
    assert judged(logits, torch.tensor([0] * 5 + [1] * 5), "auc")["auc"].model.value == 1.0


def test_squared_errors_perplexity_and_rank_correlation() -> None:
    x, y = torch.randn(ROWS, 3), torch.randn(ROWS, 3)
    assert judged(x, y, "mse")["mse"].model.value == pytest.approx(
        float(torchmetrics.MeanSquaredError()(x, y)), rel=1e-6
    )

    logits, tokens = torch.randn(ROWS, 5, 9), torch.randint(9, (ROWS, 5))
    tokens[3, 2:] = -100
    expected = torchmetrics.text.Perplexity(ignore_index=-100)(logits, tokens)
    assert judged(logits, tokens, "perplexity")["perplexity"].model.value == pytest.approx(float(expected), rel=1e-5)

    first, second, scores = torch.randn(ROWS, 7), torch.randn(ROWS, 7), torch.randint(6, (ROWS,))
    cosines = torch.nn.functional.cosine_similarity(first, second)
    found = pc.evaluate(Given(), [(Pair(first, second), scores)], "sts", resamples=20)
    expected = torchmetrics.functional.spearman_corrcoef(cosines, scores.float())
    assert found["sts"].model.value == pytest.approx(float(expected), abs=1e-6)


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def test_beside_a_baseline() -> None:
    x = torch.randn(ROWS, CLASSES)
    found = judged(x, None, "cosine", "neighbours", "agreement", baseline=Turned())
    assert found["cosine"].model.value == pytest.approx(-1.0)
    assert found["neighbours"].model.value == 1.0  # all turned alike
    assert found["agreement"].model.value == pytest.approx(float((x.argmax(1) == x.argmin(1)).double().mean()))
    assert found["cosine"].baseline is None is found["cosine"].difference
    few = judged(torch.eye(3), None, "neighbours", baseline=Turned())
    assert few["neighbours"].model.value == 1.0  # both others, of 3 rows


def test_functions_of_ones_own() -> None:
    x, y = torch.randn(ROWS, 3), torch.randn(ROWS)
    found = judged(x, y, metrics=()) if False else pc.evaluate(
        Given(), [(x, y)], {"mean": lambda out, _: out.mean(), "targets": lambda _, targets: float(targets.sum())}, resamples=20
    )  # fmt: skip
    assert found["mean"].model.value == pytest.approx(float(x.mean()))
    assert found["targets"].model.value == pytest.approx(float(y.sum()), rel=1e-5)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 120 samples of a coin and of two coins that fall alike mostly: binomial, 114 expected, 3 standard deviations are 7.2."""
    generator = torch.Generator().manual_seed(1)
    bootstrap = Bootstrap(resamples=100)
    held = both = 0
    narrower = 0.0
    for _ in range(120):
        easy = torch.rand(120, generator=generator)
        first, second = (easy < 0.7).double(), (easy + 0.02 * torch.randn(120, generator=generator) < 0.6).double()
        one, _, difference = bootstrap.intervals(
            *(Sample((rows,), lambda drawn: float(drawn.mean())) for rows in (first, second))
        )
        held += one.low <= 0.7 <= one.high
        both += difference.low <= 0.1 <= difference.high
        assert difference.value == pytest.approx(float(first.mean() - second.mean()))
        narrower += (one.high - one.low) - (difference.high - difference.low)
    assert held > 106
    assert both > 106
    assert narrower > 0  # what is hard for both moves neither


def test_differences_are_paired_and_say_what_they_show() -> None:
    labels = torch.randint(2, (400,))
    good = torch.where(torch.rand(400) < 0.9, labels, 1 - labels) - 0.5

    class Worse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(torch.arange(len(x)) % 5 == 0, -x, x)

    found = pc.evaluate(Worse(), [(good, labels)], "accuracy", baseline=Given(), resamples=100)["accuracy"]
    assert found.verdict == "loss"
    assert found.difference.high < 0
    same = pc.evaluate(Given(), [(good, labels)], "accuracy", baseline=Given(), resamples=100)["accuracy"]
    assert same.difference == Interval(0.0, 0.0, 0.0)
    assert same.verdict == "no loss shown"
    error = pc.evaluate(Given(), [(good, good + 1)], "mse", baseline=Turned(), resamples=100)["mse"]
    assert error.verdict in ("loss", "gain", "no loss shown")


def test_draws_without_a_figure_are_left_out() -> None:
    found = judged(torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([0, 0, 0, 1]), "auc", resamples=50)["auc"]
    assert found.model == Interval(1.0, 1.0, 1.0)  # a third of the draws has one class alone
    one = pc.evaluate(Given(), [(torch.randn(1), torch.ones(1))], "mse")["mse"]
    assert one.model.low is None
    assert one.verdict == ""


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_metric_that_fails_loses_no_other() -> None:
    def broken(outputs: Tensor, _: Tensor) -> float:
        raise KeyError("nothing here")

    x, y = torch.randn(ROWS, 3), torch.randint(3, (ROWS,))
    found = pc.evaluate(
        Given(), [(x, y)], {"broken": broken, "nan": lambda *_: math.nan, "one": lambda *_: 1.0}, resamples=20
    )
    assert found["one"].model.value == 1.0
    assert found.failed == {"broken": "'nothing here'", "nan": "it is nan, expected a finite number"}
    assert "nothing here" in str(found)
    mixed = pc.evaluate(Given(), [(x, y)], ["accuracy", "perplexity", "top-9"], resamples=20)
    assert mixed["accuracy"].model is not None
    assert "expected logits [rows, length, tokens]" in mixed.failed["perplexity"]
    assert "there are 3 classes, expected at least 9" in mixed.failed["top-9"]
    logits, tokens = torch.randn(2, 3, 5), torch.full((2, 3), 7)
    assert "out of bounds" in pc.evaluate(Given(), [(logits, tokens)], "perplexity", resamples=20).failed["perplexity"]
    assert "expected 0 to 2" in pc.evaluate(Given(), [(x, y + 1)], "f1", resamples=20).failed["f1"]
    assert "expected whole numbers" in pc.evaluate(Given(), [(x, y / 2)], "auc", resamples=20).failed["auc"]


def test_nan_is_named_with_its_rows() -> None:
    x, y = torch.randn(ROWS, 3), torch.randint(3, (ROWS,))
    x[[17, 40], 1] = math.nan
    assert judged(x, y, "accuracy").failed == {
        "accuracy": "the outputs of the model hold NaN in 2 of 60 rows, first in row 17"
    }


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no data": (lambda: pc.evaluate(Given(), [], "mse"), "the data are empty"),
    "an unknown metric": (lambda: pc.evaluate(Given(), [], "f2"), "no metric 'f2', expected one of accuracy, precision"),
    "no metric": (lambda: pc.evaluate(Given(), [], []), "there are no metrics"),
    "no function": (lambda: pc.evaluate(Given(), [], {"a": 3}), "'a' is 3, expected a function"),
    "no baseline": (lambda: pc.evaluate(Given(), [], "cosine"), "cosine needs a baseline"),
    "no targets": (lambda: judged(torch.randn(6, 2), None, "f1"), "batch 0 has no targets, which f1 needs"),
    "targets at times": (
        lambda: pc.evaluate(Given(), [(torch.ones(2), None), (torch.ones(2), torch.ones(2))], "cosine", baseline=Given()),
        "batch 1 has targets, unlike those before it"),
    "a tensor as data": (lambda: pc.evaluate(Given(), torch.randn(3), "mse"), "expected an iterable of (inputs, targets)"),
    "inputs alone": (lambda: pc.evaluate(Given(), [torch.randn(3, 2)], "mse"), "batch 0 of the data is a Tensor"),
    "other rows": (lambda: judged(torch.randn(6, 2), torch.zeros(5), "mse"), "has 4 rows of outputs and targets [3]"),
    "a batch of nothing": (lambda: judged(torch.randn(1), torch.zeros(1), "mse"), "batch 0 gives outputs [0], expected at"),
    "no rows of calls": (lambda: judged(torch.randn(6), torch.zeros(6), "mse", latency=[0]), "latency is [0]"),
    "few resamples": (lambda: judged(torch.randn(6), torch.zeros(6), "mse", resamples=3), "resamples is 3"),
    "no module": (lambda: pc.evaluate(print, [], "mse"), "the model is builtin_function_or_method"),
    "an output that is not clear": (
        lambda: pc.evaluate(Two(), [(torch.randn(3), torch.zeros(3))], "mse"), "output[0], output[1], expected one tensor"),
    "strengths": (lambda: Robustness(noise=(0.0,)), "noise is (0.0,), expected several numbers above 0"),
}  # fmt: skip


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert message in str(error.value)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r'pip install "pycompress\[evaluate\]"'):
        pc.evaluate(Given(), [], "mse")


# --- sizes, times, worse inputs ----------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.act(self.first(x)))
        return y


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """Learned from rows that lie around one centre for each class."""
    torch.manual_seed(0)
    centres = torch.randn(CLASSES, 40)
    labels = torch.randint(CLASSES, (160,))
    x = centres[labels] + 1.5 * torch.randn(160, 40)
    model = Small()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval(), x, labels


WEIGHTS, BIASES = 40 * 64 + 64 * CLASSES, 64 + CLASSES


def test_sizes_are_those_counted_by_hand(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    dense, x, labels = trained
    model = pc.compress(
        dense, {"first": pc.Sparse(0.25), "last": pc.LowRank(2, residual=pc.Sparse(0.5), rank_guard=False)}
    )
    found = pc.evaluate(model, [(x, labels)], "accuracy", baseline=dense, resamples=20)
    before, after = found.baseline_sizes, found.sizes
    assert before.parameters == before.nonzeros == WEIGHTS + BIASES
    assert (before.macs, before.flops) == (160 * WEIGHTS, 2 * 160 * WEIGHTS)
    assert before.memory_bytes == 4 * (WEIGHTS + BIASES)
    factors = 2 * (64 + CLASSES)
    assert after.parameters == 40 * 64 + factors + 64 * CLASSES + BIASES
    assert after.nonzeros == 40 * 64 // 4 + factors + 64 * CLASSES // 2 + BIASES
    assert after.macs == 160 * (40 * 64 // 4 + factors + 64 * CLASSES // 2)
    assert found.compression_ratio == before.disk_bytes / after.disk_bytes
    assert after.disk_bytes > 0
    assert "FLOPs a row" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["sizes"]["macs"] == after.macs


def test_attention_and_lstms_are_counted_though_torch_runs_them_in_one_operator() -> None:
    d, length, wide = 16, 5, 24
    attention = nn.TransformerEncoderLayer(d, 2, wide, dropout=0.0, batch_first=True).eval()
    found = pc.evaluate(attention, [(torch.randn(3, length, d), torch.zeros(3, length, d))], "mse", resamples=20)
    products = 4 * d * d + 2 * d * wide
    assert found.sizes.macs == 3 * (length * products + 2 * length * length * d)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(d, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.rnn(x)[0][:, -1]
            return y

    x = torch.randn(3, length, d)
    rnn = Last().eval()
    for model in (rnn, pc.compress(rnn, pc.Int8())):
        found = pc.evaluate(model, [(x, torch.zeros(3, 8))], "mse", resamples=20)
        assert found.sizes.macs == 3 * length * 4 * 8 * (d + 8)
    assert found.sizes.parameters == 4 * 8 * (d + 8) + 2 * 4 * 8


def test_times_are_those_of_rounds(trained: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that says what each call took."""
    dense, x, labels = trained
    met: list[int] = []

    def in_turns(calls: Any, fewest: int, seconds: float) -> list[list[float]]:
        for call in calls:
            call()
        met.append(len(calls))
        return [[0.001 * (1 + i / 100), 0.002 * (1 + i / 100)] for i in range(100)]

    monkeypatch.setattr(latency, "in_turns", in_turns)
    model = pc.compress(dense, pc.Int8())
    found = pc.evaluate(model, [(x, labels)], "accuracy", baseline=dense, latency=(1, 200), resamples=20)
    assert met == [2, 2]
    one = found.latencies[1]
    assert one.rows == 200
    assert one.times.p50_ms == pytest.approx(1.495)
    assert one.times.p95_ms == pytest.approx(1.9405)
    assert one.baseline.p50_ms == pytest.approx(2.99)
    assert one.times.rows_per_s == pytest.approx(200 / 1.495e-3)
    assert one.speedup == pytest.approx((2.0, 2.0, 2.0))
    assert "2.00 (2.00 to 2.00)" in str(found)


def test_calls_take_turns() -> None:
    met: list[str] = []
    rounds = in_turns([lambda: met.append("a"), lambda: met.append("b")], 3, 0.0)
    assert met == ["a", "b"] * 4  # the first one warms up
    assert len(rounds) == 3
    assert all(len(one) == 2 and min(one) >= 0 for one in rounds)


def test_the_rows_of_a_batch_are_repeated_or_left_out() -> None:
    x = torch.arange(3.0)
    assert resized(x, 3, 5).tolist() == [0, 1, 2, 0, 1]
    assert resized((["a", "b", "c"], x, 7), 3, 2)[0] == ["a", "b"]
    assert resized({"x": x, "scale": torch.ones(2)}, 3, 1)["scale"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="nothing in the inputs has 4 rows"):
        resized(x, 4, 2)


def test_worse_inputs(trained: tuple[nn.Module, Tensor, Tensor], snapshot: Any) -> None:
    dense, x, labels = trained
    model = pc.compress(dense, pc.Int8())
    unchanged = snapshot(dense)
    settings = Robustness(noise=(0.01, 3.0), fgsm=(0.3,), pgd=(0.3,))
    data = [(x[:100], labels[:100]), (x[100:], labels[100:])]
    found = pc.evaluate(model, data, "accuracy", baseline=dense, robustness=settings, resamples=20)
    assert unchanged()
    worse = {figure.worse: figure for figure in found.figures}
    assert list(worse) == ["", "noise 0.01", "noise 3", "fgsm 0.3", "pgd 0.3"]
    for which in ("model", "baseline"):
        value = {way: getattr(figure, which).value for way, figure in worse.items()}
        assert value["noise 0.01"] >= 0.95
        assert value["noise 3"] < value["noise 0.01"]
        assert value["pgd 0.3"] <= value["fgsm 0.3"] + 0.02 < value[""]
    assert found.failed == {}
    beside = pc.evaluate(model, [(x, labels)], ["agreement", "accuracy"], baseline=dense, robustness=Robustness((0.1,), (0.1,)),
                         resamples=20)  # fmt: skip
    assert [(one.name, one.worse) for one in beside.figures] == [
        ("agreement", ""), ("accuracy", ""), ("agreement", "noise 0.1"), ("accuracy", "noise 0.1"), ("accuracy", "fgsm 0.1"),
    ]  # fmt: skip


def test_fgsm_moves_along_the_sign_of_the_gradient() -> None:
    """Of the cross entropy of a linear model, known in closed form; and not beyond what inputs may be."""
    model = nn.Linear(3, 2)
    x, labels = torch.rand(8, 3), torch.randint(2, (8,))
    settings = Robustness(fgsm=(0.1,), low=0.0, high=1.0)
    way = Worse("fgsm", 0.1, settings, torch.Generator())
    (found,) = way.inputs([model], x, labels, lambda y: y)
    slope = (model(x).softmax(1) - nn.functional.one_hot(labels, 2)) @ model.weight
    assert torch.equal(found, (x + 0.1 * slope.sign()).clamp(0, 1))


def test_inputs_that_cannot_be_made_worse_say_so(lookup: Any) -> None:
    tokens, model = torch.randint(50, (4, 6)), lookup()
    found = pc.evaluate(model, [(tokens, tokens)], "perplexity", robustness=Robustness(noise=(0.1,)), resamples=20)
    assert found["perplexity"].model is not None
    assert "torch.int64, expected one floating-point tensor" in found.failed["perplexity noise 0.1"]


def test_models_inputs_and_random_state_are_left_as_they_were(trained: Any, snapshot: Any) -> None:
    dense, x, labels = trained
    dense.train()
    unchanged, state, before = snapshot(dense), torch.get_rng_state(), x.clone()
    pc.evaluate(dense, [(x, labels)], "accuracy", baseline=pc.compress(dense, pc.Int8()), resamples=20)
    assert unchanged()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    dense.eval()


def test_a_dictionary_of_inputs_and_outputs_is_read() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
            return {"logits": x * mask, "hidden": x}

    x, labels = torch.randn(9, 3), torch.randint(3, (9,))
    data = [({"x": x, "mask": torch.ones(9, 1, dtype=torch.int64)}, labels.tolist())]
    found = pc.evaluate(Named(), data, "accuracy", resamples=20, robustness=Robustness(noise=(0.1,)))
    assert found["accuracy"].model.value == pytest.approx(float((x.argmax(1) == labels).double().mean()))
    assert found.failed == {}
    other = pc.evaluate(Named(), data, "mse", resamples=20, output=lambda result: result["hidden"][:, 0])
    assert other["mse"].model.value == pytest.approx(float(((x[:, 0] - labels) ** 2).mean()))
