"""``sensitivity``: what a model loses where one layer is compressed, for each layer and candidate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from pycompress.calls import Inputs
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.method import Method
from pycompress.progress import on_a_terminal, track
from pycompress.replacing import FilePath
from pycompress.search.cache import Cache, digest
from pycompress.search.choices import Candidates, Choices, calibrated, named
from pycompress.search.probes import changes
from pycompress.search.quality import Metric, Quality, checked
from pycompress.search.ratings import Question, Ratings, check_workers, pool_of


@dataclass(frozen=True)
class Loss:
    """Of one layer and candidate.

    Attributes:
        error: trace(D M D^T) / trace(W M W^T): D the difference of the weights, M the second moment of the layer's inputs: the
            share of the layer's outputs that is error, whatever the model makes of it; None where the candidate does not take
            the layer.
        change: the expected squared change of the model's results, as a share of their squares, to first order
            (:mod:`pycompress.search.probes`); None where the model has no derivative there.
        exact: the quality of the original less that of the model in which this layer alone is compressed; None where not asked for.
        reason: why there is nothing: what the candidate said, or that the metric gave no finite number.
    """

    error: float | None = None
    change: float | None = None
    exact: float | None = None
    reason: str = ""

    @property
    def cheap(self) -> float | None:
        """The change where there is one, else the error."""
        return self.error if self.change is None else self.change


class Sensitivity(Mapping[tuple[str, str], Loss]):
    """{(layer, candidate): :class:`Loss`}; ``str()`` is a table, a line for each layer.

    Attributes:
        layers, candidates: names of both, in order.
        quality: of the original.
    """

    def __init__(self, losses: Mapping[tuple[str, str], Loss], quality: float) -> None:
        self._losses, self.quality = dict(losses), quality
        self.layers = [*dict.fromkeys(layer for layer, _ in losses)]
        self.candidates = [*dict.fromkeys(candidate for _, candidate in losses)]

    def __getitem__(self, key: tuple[str, str]) -> Loss:
        return self._losses[key]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._losses)

    def __len__(self) -> int:
        return len(self._losses)

    def __str__(self) -> str:
        rows = [("layer", *self.candidates)]
        rows += [(layer, *(self._cell(self[layer, name]) for name in self.candidates)) for layer in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        refused = [f"{layer}, {name}: {own.reason}" for (layer, name), own in self.items() if own.reason]
        return "\n".join([*table, *refused])

    __repr__ = __str__

    @staticmethod
    def _cell(loss: Loss) -> str:
        value = loss.cheap if loss.exact is None else loss.exact
        return "-" if value is None else f"{value:.2e}"


def sensitivity(
    model: nn.Module,
    candidates: Candidates | Method,
    batches: Sequence[Inputs],
    *,
    metric: Metric = "cosine",
    exact: bool = False,
    calibration: Mapping[str, InputStatistics] | Sequence[Inputs] | None = None,
    workers: str | None = None,
    cache: FilePath | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """What a model loses where one layer is compressed, for each layer and candidate.

    Args:
        model: as :func:`compress` takes it; it is only looked at.
        candidates: methods, or {name: method}. One that refuses a layer is on record with its reason.
        batches: inputs as :func:`compress` takes them.
        metric: ``cosine`` of the results to those of the original, the mean over their rows (without those that an
            ``attention_mask`` hides); ``kl``, minus the divergence of their softmax, in nats; or a function that rates a model, the
            higher the better.
        exact: rate the model once for each layer and candidate. Otherwise there is one backward pass for all of them, and
            ``change`` says in which order they come.
        calibration: what was gathered of the layers' inputs, or batches to gather it from; None: it is gathered from those above.
        workers: who rates models, with ``exact=True``: None, this process; ``"ray"`` (the extra ``ray``), the processes of the
            cluster for which ``ray.init`` was called, or else of this machine, each with as many threads as torch has here. They
            give the same bits; one on a machine with another processor, which may not, is an error. A metric of your own travels to
            them by cloudpickle.
        cache: a file that keeps whatever was found, by content of model, batches, candidates and metric, as soon as it is known.
        progress: show progress bars; None: on a terminal.
    Raises:
        TypeError: batches is one input, a candidate is no method. ValueError: no batches, no candidates, no layer that one of them
            takes, a metric of another name, or one that gives the original NaN or Inf. RuntimeError: the metric failed; the
            layer and the candidate are named, and what was found before is in the cache. ImportError: the extra is not installed.
    """
    who = "sensitivity"
    inputs, methods = checked(batches, who), named(candidates, who)
    check_workers(workers, who)
    if workers is not None and not exact:
        raise ValueError(
            f"{who}: workers is {workers!r} with exact=False, for which no model is rated, expected exact=True"
        )
    known = Cache(cache)
    choices = Choices(model, methods, calibrated(model, methods, inputs, calibration, who), inputs[0], known, who)
    quality = Quality(choices.model, inputs, metric, who)
    show = on_a_terminal() if progress is None else progress
    losses = cheap(choices, inputs, quality, known, progress=show)
    if not exact:
        return losses
    with pool_of(workers, choices, quality) as pool:
        return rated(losses, Ratings(choices, quality, known, pool, progress=show), show)


def cheap(
    choices: Choices, batches: Sequence[Inputs], quality: Quality, cache: Cache, *, progress: bool
) -> Sensitivity:  # fmt: skip
    """The losses of all choices, without the exact ones."""
    for candidate in track([*choices.candidates], "compressing", progress):
        choices.learn(candidate)
    found = _changes(choices, batches, cache)
    losses = {
        (name, candidate): Loss(fact.error, found.get(name, {}).get(candidate))
        for name, layer in choices.layers.items()
        for candidate, fact in layer.facts.items()
    }
    losses |= {key: Loss(reason=reason) for key, reason in choices.refused.items()}
    order = [(name, candidate) for name in choices.layers for candidate in choices.candidates]
    return Sensitivity({key: losses[key] for key in order}, quality.best)


def rated(losses: Sensitivity, ratings: Ratings, progress: bool) -> Sensitivity:
    """The same with the exact losses."""
    questions = {
        (name, candidate): Question({name: candidate}, False, f"{name} as {candidate}")
        for (name, candidate), loss in losses.items()
        if not loss.reason
    }
    ratings.prepare([*questions.values()])
    found = dict(losses)
    for key in track([*questions], "rating", progress):
        quality, old = ratings.of(questions[key])[1], losses[key]
        if math.isfinite(quality):
            found[key] = replace(old, exact=losses.quality - quality)
        else:
            found[key] = replace(old, reason=f"the metric {ratings.metric} gives {quality}")
    return Sensitivity(found, losses.quality)


def _changes(choices: Choices, batches: Sequence[Inputs], cache: Cache) -> dict[str, dict[str, float]]:
    """By layer and candidate. Nothing where the results have no derivative."""
    key = digest("changes", choices.key, choices.candidates, batches)
    known = cache.get(key)
    if known is None:
        made = {
            (name, candidate): choices.made(candidate)[name]
            for name, layer in choices.layers.items()
            for candidate in layer.facts
        }
        try:
            found = changes(choices.model, made, batches)
        except RuntimeError:  # torch's, of a model without derivatives
            found = {}
        known = {}
        for (name, candidate), change in found.items():
            known.setdefault(name, {})[candidate] = change
        cache.put(key, known)
    return known  # type: ignore[no-any-return]
