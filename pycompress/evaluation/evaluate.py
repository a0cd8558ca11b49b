"""``evaluate``: how good, how large and how fast a model is, beside another."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.evaluation import metrics as known
from pycompress.evaluation import outputs as of_models
from pycompress.evaluation.bootstrap import Bootstrap, Interval
from pycompress.evaluation.latency import Latency, latencies
from pycompress.evaluation.metrics import Metric
from pycompress.evaluation.outputs import Output, Pair
from pycompress.evaluation.records import Evaluation, Figure
from pycompress.evaluation.robustness import Robustness, Worse
from pycompress.evaluation.sizes import Sizes, sizes_of

Kept = dict[tuple[int, known.Reduce], list[Tensor]]  # of each model (0: the one that is judged), batch after batch


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    metrics: str | Sequence[str] | Mapping[str, known.Own],
    *,
    baseline: nn.Module | None = None,
    output: Output | None = None,
    latency: Sequence[int] = (),
    robustness: Robustness | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Judges a model on labelled data, and beside it the one that it was compressed from: quality, with intervals by bootstrap,
    size, operations, time, and what worse inputs do. Both are left as they were.

    Args:
        model: any ``nn.Module``, compressed or not.
        data: batches of (inputs, targets): a list, a ``DataLoader``, a generator. Inputs as ``compress`` takes them, or a
            :class:`~pycompress.evaluation.Pair` of such. Targets: a tensor with a row for each row of the outputs, or None where
            no metric needs any.
        metrics: names, or ``{name: function}`` of your own; ``function(outputs, targets)`` gives a number, and is called again for
            each draw of rows, with targets [rows, 0] where there are none. Names, for outputs [rows, classes] or a logit a row:
            ``accuracy``, ``top-5`` (or any), and of the second of two classes, of more the mean over classes, ``precision``,
            ``recall``, ``f1`` and ``auc``. ``mse``; ``perplexity`` of logits [rows, length, tokens], where targets [rows, length]
            are what each position should have given, -100 for none; ``sts``, of pairs of embeddings the rank correlation (Spearman)
            of their cosines with scores. Beside the baseline, without targets: ``cosine`` of the outputs, ``neighbours``, the share
            of the 10 nearest rows that stay, and ``agreement``, the share of equal decisions.
        baseline: the dense model, or any other.
        output: which tensor of what a model gives is judged; None: a tensor, ``logits``, or the only floating-point tensor.
        latency: numbers of rows, for which calls of both are timed in turns on inputs like those of the first batch.
        robustness: worse inputs, on which all is judged again.
        resamples, confidence, seed: of the intervals; fewer draws are quicker, a thousand are enough for 95 %.
    Returns:
        The :class:`~pycompress.evaluation.Evaluation`. A metric that fails, or meets NaN, is in it with the reason, beside all the
        others.
    Raises:
        TypeError: no module, data of another form, a model whose output is not clear. ValueError: no data, no metric of a name,
        none at all, one that needs a baseline or targets where there are none, other rows than targets.
        ImportError: the extra ``pycompress[evaluate]`` is not installed.
    """
    wanted = _metrics(metrics, baseline)
    models = [model] if baseline is None else [model, baseline]
    for one in models:
        if not isinstance(one, nn.Module):
            raise TypeError(f"evaluate: the model is {type(one).__name__}, expected a torch.nn.Module")
    if any(type(count) is not int or count < 1 for count in latency):
        raise ValueError(f"evaluate: latency is {latency!r}, expected numbers of rows from 1")
    bootstrap = Bootstrap(resamples, confidence, seed)
    known.library()  # its absence is told before anything runs
    runs = _Runs(models, wanted, output or of_models.the_tensor, robustness)
    for inputs, targets in of_models.batches_of(data):
        runs.meet(inputs, targets)
    if runs.first is None:
        raise ValueError("evaluate: the data are empty, expected at least one batch of (inputs, targets)")
    figures = [figure for way in runs.kept for figure in runs.figures(way, bootstrap)]
    found, notes = _sizes(models, *runs.first)
    return Evaluation(
        rows=runs.rows,
        figures=figures,
        sizes=found[0],
        baseline_sizes=found[1] if baseline is not None else None,
        latencies=_latencies(models, *runs.first, latency, notes),
        confidence=confidence,
        resamples=resamples,
        seed=seed,
        environment=_environment(),
        notes=notes,
    )


def _metrics(metrics: str | Sequence[str] | Mapping[str, known.Own], baseline: nn.Module | None) -> list[Metric]:
    """Raises before anything runs."""
    if isinstance(metrics, Mapping):
        wanted = []
        for name, function in metrics.items():
            if not callable(function):
                raise TypeError(
                    f"evaluate: the metric {name!r} is {function!r}, expected a function of outputs and targets"
                )
            wanted.append(known.own(name, function))
    else:
        wanted = [known.named(name) for name in ([metrics] if isinstance(metrics, str) else metrics)]
    if not wanted:
        raise ValueError(f"evaluate: there are no metrics, expected some of {', '.join(known.METRICS)}, or functions")
    if baseline is None and (beside := [metric.name for metric in wanted if metric.beside]):
        raise ValueError(f"evaluate: {', '.join(beside)} needs a baseline, with which the model is compared")
    return wanted


class _Runs:
    """Both models on batch after batch, as it is and made worse in each way; of the outputs, what metrics keep."""

    def __init__(
        self, models: list[nn.Module], metrics: list[Metric], output: Output, robustness: Robustness | None
    ) -> None:  # fmt: skip
        self.models, self.metrics, self.output = models, metrics, output
        self.rows, self.batches = 0, 0
        self.first: tuple[Any, int] | None = None  # inputs, and how many rows they give
        settings = robustness or Robustness()
        self.ways = {
            f"{kind} {strength:g}": Worse(
                kind, strength, settings, torch.Generator(device="cpu").manual_seed(settings.seed)
            )
            for kind, strength in settings.kinds()
        }
        self.kept: dict[str, Kept] = {way: defaultdict(list) for way in ("", *self.ways)}
        self.targets: list[Tensor] = []
        self.broken: dict[
            tuple[str, known.Reduce | None], str
        ] = {}  # why there is nothing of a way, or of what is kept

    def meet(self, inputs: Any, targets: Tensor | None) -> None:
        """Runs a batch."""
        if targets is None and (lacking := [one.name for one in self.metrics if one.labelled]):
            raise ValueError(f"evaluate: batch {self.batches} has no targets, which {', '.join(lacking)} needs")
        if self.batches and (targets is None) is bool(self.targets):
            raise ValueError(
                f"evaluate: batch {self.batches} has {'no ' if targets is None else ''}targets, unlike those before it"
            )
        rows = self._keep("", [inputs] * len(self.models), targets)
        self.first = self.first or (inputs, rows)
        for name, way in self.ways.items():
            if (name, None) not in self.broken:
                try:
                    worse = way.inputs(self.models, inputs, targets, self.output)
                except (ValueError, RuntimeError) as error:  # no float to move, no gradient through the model
                    self.broken[name, None] = str(error)
                else:
                    self._keep(name, worse, targets)
        if targets is not None:
            self.targets.append(targets)
        self.rows, self.batches = self.rows + rows, self.batches + 1

    def _keep(self, way: str, inputs: list[Any], targets: Tensor | None) -> int:
        found = [of_models.run(model, own, self.output) for model, own in zip(self.models, inputs, strict=True)]
        of_models.check_rows(found[0], targets, self.batches)
        if len(found) == 2 and found[0].shape != found[1].shape:
            raise ValueError(
                f"evaluate: in batch {self.batches} the model gives {list(found[0].shape)}, the baseline {list(found[1].shape)}, "
                "expected both alike"
            )
        for reduce in {metric.reduce for metric in self.metrics}:
            for i, outputs in enumerate(found):
                if (way, reduce) not in self.broken:
                    try:
                        self.kept[way][i, reduce].append(reduce(outputs, targets))
                    except Exception as error:  # that of one metric: the others are not lost
                        self.broken[way, reduce] = str(error) or type(error).__name__
        return len(found[0])

    def figures(self, way: str, bootstrap: Bootstrap) -> list[Figure]:
        """Of all metrics; a metric that fails has its reason."""
        figures = []
        alike = way not in self.ways or self.ways[way].kind == "noise"  # attacked, each model has inputs of its own
        for metric in (metric for metric in self.metrics if alike or not metric.beside):
            reason = self.broken.get((way, None)) or self.broken.get((way, metric.reduce)) or ""
            figure = None
            if not reason:
                try:
                    figure = self._figure(metric, way, bootstrap)
                except Exception as error:  # a user's function may raise anything: the other metrics are not lost
                    reason = str(error) or type(error).__name__
            figures.append(figure or Figure(metric.name, worse=way, reason=reason))
        return figures

    def _figure(self, metric: Metric, way: str, bootstrap: Bootstrap) -> Figure:
        kept = [self.kept[way][i, metric.reduce] for i in range(len(self.models))]
        for who, batches in zip(("the model", "the baseline"), kept, strict=False):
            if reason := of_models.described(batches, who):
                raise ValueError(reason)
        outputs = [_together(batches) for batches in kept]
        if metric.beside:
            targets = outputs.pop()
        elif self.targets and metric.reduce is known.whole:
            targets = _together(self.targets)
        else:
            targets = torch.empty(len(outputs[0]), 0, dtype=torch.float32, device="cpu")
        samples = [metric.sample(own, targets) for own in outputs]
        for sample in samples:
            if not math.isfinite(sample.value):
                raise ValueError(f"it is {sample.value}, expected a finite number")
        found: list[Interval | None] = [*bootstrap.intervals(*samples), None, None]
        return Figure(metric.name, found[0], found[1], found[2], metric.higher_is_better, way)


def _together(batches: list[Tensor]) -> Tensor:
    if len({(one.shape[1:], one.dtype) for one in batches}) > 1:
        found = ", ".join(dict.fromkeys(str(list(one.shape[1:])) for one in batches))
        raise ValueError(f"the rows of the batches have the shapes {found}, expected all alike")
    return torch.cat(batches)


def _sizes(models: list[nn.Module], inputs: Any, rows: int) -> tuple[list[Sizes | None], list[str]]:
    found: list[Sizes | None] = []
    notes = []
    for model, who in zip(models, ("the model", "the baseline"), strict=False):
        try:
            found.append(sizes_of(model, inputs.first if isinstance(inputs, Pair) else inputs, rows))
        except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
            found.append(None)
            notes.append(f"the sizes of {who} could not be had: {error}")
    return found, notes


def _latencies(
    models: list[nn.Module], inputs: Any, rows: int, counts: Sequence[int], notes: list[str]
) -> list[Latency]:  # fmt: skip
    try:
        return latencies(models, inputs.first if isinstance(inputs, Pair) else inputs, rows, counts)
    except ValueError as error:
        notes.append(f"no times: {error}")
        return []


def _environment() -> dict[str, Any]:
    from pycompress.benchmark.environment import Environment

    return Environment.collect().as_dict()
