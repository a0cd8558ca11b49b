"""How good and how large the models of plans are: nothing here needs a clock, so it can be found out in any process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from pycompress.progress import track
from pycompress.records import summary
from pycompress.search.cache import Cache, digest
from pycompress.search.choices import Choices
from pycompress.search.quality import Quality
from pycompress.search.timing import here

Found = tuple[float, float]  # bytes of the model; its quality, NaN and Inf too


@dataclass(frozen=True)
class Question:
    """Which model is rated.

    Attributes:
        plan: {layer: candidate, or None for dense}; layers that it does not name are dense.
        whole: with blocks that run as one op, as ``compress`` makes it; else with layers replaced and nothing besides.
        what: it is, in messages.
    """

    plan: Mapping[str, str | None]
    whole: bool
    what: str


class Pool(Protocol):
    """Processes that answer what they are asked (:class:`pycompress.integrations.ray.Pool`)."""

    size: int

    def answers(self, questions: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Places and answers, as they come."""


class Ratings:
    """What is known of plans, or is found out: in this process when it is asked for, or before that in others.

    Args:
        pool: the other processes, if there are any.
        progress: show a bar while they work.
    """

    def __init__(self, choices: Choices, quality: Quality, cache: Cache, pool: Pool | None, *, progress: bool) -> None:
        self._choices, self._quality, self._cache, self._pool, self._progress = choices, quality, cache, pool, progress

    @property
    def metric(self) -> str:
        """Its name."""
        return self._quality.name

    @property
    def at_once(self) -> int:
        """How many questions are answered at a time."""
        return 1 if self._pool is None else self._pool.size

    def knows(self, question: Question) -> bool:
        """Whether the answer is known already."""
        return self._cache.get(self._key(question)) is not None

    def of(self, question: Question) -> Found:
        """The answer. Raises RuntimeError where the metric fails."""
        key = self._key(question)
        known = self._cache.get(key)
        if known is None:
            known = self._cache.put(key, _answer(self._choices, self._quality, question))
        return float(known[0]), float(known[1])

    def prepare(self, questions: Sequence[Question]) -> None:
        """Has other processes answer what is not known yet, and keeps each answer as it comes; without them nothing is done."""
        if self._pool is None:
            return
        keys = {self._key(question): question for question in questions}
        open_keys = [key for key in keys if self._cache.get(key) is None]
        answers = self._pool.answers([keys[key] for key in open_keys])
        for _, (place, answer) in zip(track(open_keys, "rating", self._progress), answers, strict=True):
            self._cache.put(open_keys[place], answer)

    def _key(self, question: Question) -> str:
        methods = {name: candidate and self._choices.candidates[candidate] for name, candidate in question.plan.items()}
        return digest("rating", self._choices.key, methods, question.whole, self._quality.key)


def _answer(choices: Choices, quality: Quality, question: Question) -> list[Any]:
    """Bytes and quality, as JSON has them: it has no NaN."""
    with choices.applied(question.plan, blocks=question.whole) as model:
        found = quality.try_of(model, question.what)
        return [float(summary(model).bytes), found if math.isfinite(found) else str(found)]


# --- other processes ------------------------------------------------------------------------------------------------------


def check_workers(workers: str | None, caller: str) -> None:
    """Raises ValueError for workers of another name, ImportError where their extra is not installed."""
    if workers not in (None, "ray"):
        raise ValueError(f"{caller}: workers is {workers!r}, expected None or 'ray'")
    if workers == "ray":
        import pycompress.integrations.ray  # noqa: F401


def pool_of(workers: str | None, choices: Choices, quality: Quality) -> AbstractContextManager[Pool | None]:
    """The processes that ``workers`` stands for, which have what this one has; None: there are no others."""
    if workers is None:
        return nullcontext()
    from pycompress.integrations.ray import Pool as RayPool

    return RayPool(partial(_answerer, choices, quality, here()), torch.get_num_threads())


def _answerer(choices: Choices, quality: Quality, expected: Mapping[str, Any]) -> Callable[[Question], list[Any]]:
    """What a process of a pool answers with. Raises RuntimeError where floats would not come out as in the process that asks."""
    if (found := here()) != expected:
        raise RuntimeError(
            f"a worker runs on {found}, where results may differ in their last bits, expected {expected}"
        )
    return partial(_answer, choices, quality)
