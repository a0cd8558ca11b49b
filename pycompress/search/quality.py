"""How good a model is: close to what the original gives, without labels, or by what the user says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calls import Inputs, call_model, evaluating, tensors_in
from pycompress.search.cache import digest

Metric = str | Callable[[nn.Module], float]  # a name of METRICS; or what rates a model, the higher the better
BATCHES = "expected several inputs: a list of tensors, of sequences of arguments or of mappings of keywords"


def checked(batches: Any, caller: str, what: str = "batches") -> list[Inputs]:
    """The batches as a list. Raises TypeError where they are one input, ValueError where there are none."""
    if isinstance(batches, Tensor | Mapping | str):
        raise TypeError(f"{caller}: {what} is {type(batches).__name__}, {BATCHES}")
    found = [*batches]
    if not found:
        raise ValueError(f"{caller}: {what} is empty, {BATCHES}")
    return found


class Quality:
    """Rates models beside an original.

    Args:
        original: by whose results the metrics without labels go.
        batches: what it is called with.
        metric: ``cosine``, ``kl``, or a function.
        caller: begins the messages.
    Attributes:
        name: of the metric.
        best: what the original gets.
        key: alike for a metric, batches and an original of the same content.
    Raises:
        TypeError, ValueError: another metric, a failing one, one that gives the original no finite number.
    """

    def __init__(self, original: nn.Module, batches: Sequence[Inputs], metric: Metric, caller: str) -> None:
        if not callable(metric) and metric not in METRICS:
            raise ValueError(
                f"{caller}: metric is {metric!r}, expected one of {', '.join(METRICS)}, or a function of a model"
            )
        self._batches, self._metric, self._caller = batches, metric, caller
        self.key = digest("quality", metric, batches, original)
        self.name = metric if isinstance(metric, str) else getattr(metric, "__qualname__", type(metric).__name__)
        self._expected = [] if callable(metric) else [_rows(original, batch) for batch in batches]
        self.best = self.of(original, "the original")

    def from_smaller(self, model: nn.Module, what: str) -> Quality:
        """The same, but ``best`` is what a smaller model gets, beside the same original."""
        found = copy(self)
        found.best = self.of(model, what)
        return found

    def of(self, model: nn.Module, what: str) -> float:
        """The quality of a model; ``what``: in messages. Raises ValueError where it is no finite number."""
        value = self.try_of(model, what)
        if not math.isfinite(value):
            raise ValueError(
                f"{self._caller}: the metric {self.name} gives {value} for {what}, expected a finite number"
            )
        return value

    def try_of(self, model: nn.Module, what: str) -> float:
        """As :meth:`of`, but NaN and Inf are answers. Raises RuntimeError where the metric fails, from what it raised."""
        if callable(self._metric):
            try:
                with evaluating(model):
                    return float(self._metric(model))
            except Exception as error:
                raise RuntimeError(
                    f"{self._caller}: the metric {self.name} failed for {what}: {type(error).__name__}: {error}"
                ) from error
        compare = METRICS[self._metric]
        total, count = 0.0, 0
        for batch, expected in zip(self._batches, self._expected, strict=True):
            found = _rows(model, batch)
            total += float(compare(found, expected).sum())
            count += len(expected)
        return total / count


def shown(result: Any, batch: Inputs) -> tuple[Tensor, Tensor]:
    """The first tensor of numbers in what a model gave; and 1 or 0 for its rows: 0 where the batch's mask of tokens hides them.

    Raises TypeError where there is none.
    """
    y = next((t for _, t in tensors_in(result) if t.is_floating_point() and t.dim() and t.numel()), None)
    if y is None:
        raise TypeError(f"the model gave {type(result).__name__}, expected a tensor of numbers in it")
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and y.dim() == 3 and mask.shape == y.shape[:2]:
        return y, (mask != 0).to(y.dtype)[..., None]
    return y, torch.ones([1] * y.dim(), dtype=y.dtype, device=y.device)


def _rows(model: nn.Module, batch: Inputs) -> Tensor:
    """What is shown of a model's result, float64 [rows, features]."""
    with evaluating(model, batch):
        y, mask = shown(call_model(model, batch), batch)
        y = y.double().clone()
    y = y[mask.squeeze(-1) != 0] if mask.dim() == 3 and mask.numel() > 1 else y
    return y.reshape(-1, y.shape[-1]) if y.dim() > 1 else y.reshape(1, -1)


def _cosine(found: Tensor, expected: Tensor) -> Tensor:
    return torch.cosine_similarity(found, expected, dim=1)


def _kl(found: Tensor, expected: Tensor) -> Tensor:
    """Less than 0: what the softmax of the rows loses, in nats."""
    p, q = expected.log_softmax(dim=1), found.log_softmax(dim=1)
    return -(p.exp() * (p - q)).sum(dim=1)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": _cosine, "kl": _kl}
