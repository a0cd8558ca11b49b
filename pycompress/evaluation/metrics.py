"""The metrics, by name: of what rows each is made, and the figure of some of them, by torchmetrics (the extra ``evaluate``)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pycompress.evaluation.bootstrap import Sample

Reduce = Callable[[Tensor, Tensor | None], Tensor]
NEIGHBOURS = 10
IGNORED = -100  # a target that counts for nothing, as torch's cross entropy has it


def library() -> Any:
    """torchmetrics' functions. Raises ImportError that names the extra."""
    try:
        import torchmetrics.functional
    except ImportError as error:
        raise ImportError(f'evaluate needs torchmetrics ({error}): pip install "pycompress[evaluate]"') from error
    return torchmetrics.functional


def whole(outputs: Tensor, _targets: Tensor | None) -> Tensor:
    return outputs


@dataclass(frozen=True)
class Metric:
    """One figure of a model.

    Attributes:
        sample: of all outputs, as ``reduce`` left them, and their targets.
        reduce: what is kept of a batch's outputs: a row for each.
        beside: the targets are the outputs of the baseline: there is none for the baseline itself.
        labelled: whether it needs targets.
        higher_is_better: None where nobody has said.
    """

    name: str
    sample: Callable[[Tensor, Tensor], Sample]
    reduce: Reduce = whole
    beside: bool = False
    labelled: bool = True
    higher_is_better: bool | None = True


def _mean(values: Tensor) -> float:
    return float(values.mean())


# --- decisions --------------------------------------------------------------------------------------------------------


def scores_of(outputs: Tensor) -> Tensor:
    """float64 [n, classes]; a single output is the logit of the second of two classes."""
    if outputs.dim() == 1 or (outputs.dim() == 2 and outputs.shape[1] == 1):
        logit = outputs.reshape(-1).double()
        return torch.stack([torch.zeros_like(logit), logit], dim=1)
    if outputs.dim() != 2:
        raise ValueError(f"the outputs are {list(outputs.shape)}, expected [rows, classes], or a logit a row")
    return outputs.double()


def _labels(scores: Tensor, targets: Tensor) -> Tensor:
    """int64 [n]."""
    labels = targets.reshape(len(targets), -1)
    whole = not targets.is_floating_point() and not targets.is_complex()
    if not whole or labels.shape != (len(scores), 1):
        raise ValueError(
            f"the targets are {targets.dtype} {list(targets.shape)}, expected whole numbers, [{len(scores)}]"
        )
    found = labels[:, 0].long()
    if int(found.min()) < 0 or int(found.max()) >= scores.shape[1]:
        raise ValueError(
            f"the targets go from {int(found.min())} to {int(found.max())}, expected 0 to {scores.shape[1] - 1}: there are "
            f"{scores.shape[1]} classes"
        )
    return found


def _hits(outputs: Tensor, targets: Tensor, top: int = 1) -> Sample:
    scores = scores_of(outputs)
    labels, classes = _labels(scores, targets), scores.shape[1]
    if top > classes:
        raise ValueError(f"there are {classes} classes, expected at least {top} for the best {top}")
    settings: dict[str, Any] = {"top_k": top, "average": "micro", "multidim_average": "samplewise"}
    hits = library().classification.multiclass_accuracy(scores[:, :, None], labels[:, None], classes, **settings)
    return Sample((hits.double(),), _mean)


def _of_classes(outputs: Tensor, targets: Tensor, name: str) -> Sample:
    """Of two classes, that of the second one; of more, the mean over classes."""
    scores = scores_of(outputs)
    labels, classes, own = _labels(scores, targets), scores.shape[1], library().classification
    if classes == 2:
        figure = getattr(own, f"binary_{name}")
    else:
        figure = partial(getattr(own, f"multiclass_{name}"), num_classes=classes, average="macro")
    return Sample((scores.argmax(1), labels), lambda *rows: float(figure(*rows, validate_args=False)))


def _auc(outputs: Tensor, targets: Tensor) -> Sample:
    """Of two classes, or the mean over classes of one against all others; those that are not there, or alone, have none."""
    scores = scores_of(outputs)
    labels, own = _labels(scores, targets), library().classification
    if scores.shape[1] == 2:
        scores, truth = (scores[:, 1] - scores[:, 0])[:, None], labels[:, None]
    else:
        classes = torch.arange(scores.shape[1], dtype=torch.int64, device=labels.device)
        scores, truth = scores.log_softmax(1), (labels[:, None] == classes).long()
    # The order alone counts, and so that of the scores is given: torchmetrics would make float32 sigmoids of them, with ties.
    orders = torch.stack([column.unique(return_inverse=True)[1] for column in scores.T], 1).double() / len(scores)

    def figure(orders: Tensor, truth: Tensor) -> float:
        found = [
            float(own.binary_auroc(order, one, validate_args=False))
            for order, one in zip(orders.T, truth.T, strict=True)
            if 0 < int(one.sum()) < len(one)
        ]
        return sum(found) / len(found) if found else float("nan")

    return Sample((orders, truth), figure)


def _agreement(outputs: Tensor, targets: Tensor) -> Sample:
    return _hits(outputs, scores_of(targets).argmax(1))


# --- numbers ----------------------------------------------------------------------------------------------------------


def _mse(outputs: Tensor, targets: Tensor) -> Sample:
    if outputs.numel() != targets.numel() or len(outputs) != len(targets):
        raise ValueError(f"the targets are {list(targets.shape)}, expected {list(outputs.shape)} as the outputs are")
    columns = [one.reshape(len(one), -1).double().T for one in (outputs, targets)]
    of_rows = library().mean_squared_error(*columns, num_outputs=len(outputs))
    return Sample((of_rows.reshape(-1),), _mean)


def _negative_log_likelihoods(outputs: Tensor, targets: Tensor | None) -> Tensor:
    """float64 [n, 2]: the sum over a row's positions, and how many there are; logits [n, length, tokens], targets [n, length]."""
    assert targets is not None
    if outputs.dim() != 3 or targets.shape != outputs.shape[:2] or targets.is_floating_point():
        raise ValueError(
            f"the outputs are {list(outputs.shape)} and the targets {targets.dtype} {list(targets.shape)}, expected logits [rows, "
            "length, tokens] and tokens [rows, length]"
        )
    losses = cross_entropy(outputs.double().movedim(2, 1), targets.long(), ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.sum(1), (targets != IGNORED).sum(1).double()], dim=1)


def _perplexity(sums: Tensor, _targets: Tensor) -> Sample:
    return Sample((sums,), lambda rows: float((rows[:, 0].sum() / rows[:, 1].sum()).exp()))


# --- embeddings -------------------------------------------------------------------------------------------------------


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    flat = [one.reshape(len(one), -1).double() for one in (first, second)]
    cosines: Tensor = library().cosine_similarity(*flat, reduction="none")
    return cosines


def _cosine(outputs: Tensor, targets: Tensor) -> Sample:
    return Sample((_cosines(outputs, targets),), _mean)


def _neighbours(outputs: Tensor, targets: Tensor) -> Sample:
    if len(outputs) < 2:
        raise ValueError("there is 1 row, expected at least 2: it has no neighbours")
    near, other = _nearest(outputs), _nearest(targets)
    kept = (near[:, :, None] == other[:, None, :]).any(2).double().mean(1)
    return Sample((kept,), _mean)


def _nearest(outputs: Tensor) -> Tensor:
    """int64 [n, 10], or what there is: of each row the nearest others by cosine."""
    unit = torch.nn.functional.normalize(outputs.reshape(len(outputs), -1).double(), dim=1)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-torch.inf)
    return cosines.topk(min(NEIGHBOURS, len(outputs) - 1), dim=1).indices


def _sts(outputs: Tensor, targets: Tensor) -> Sample:
    if outputs.dim() != 3 or outputs.shape[1] != 2 or targets.numel() != len(outputs):
        raise ValueError(
            f"the outputs are {list(outputs.shape)} and the targets {list(targets.shape)}, expected embeddings [pairs, 2, "
            "features], which inputs in a Pair give, and a score a pair"
        )
    cosines, spearman = _cosines(outputs[:, 0], outputs[:, 1]), library().spearman_corrcoef
    return Sample((cosines, targets.reshape(-1).double()), lambda *rows: float(spearman(*rows)))


METRICS: dict[str, Metric] = {
    known.name: known
    for known in (
        Metric("accuracy", _hits),
        Metric("precision", partial(_of_classes, name="precision")),
        Metric("recall", partial(_of_classes, name="recall")),
        Metric("f1", partial(_of_classes, name="f1_score")),
        Metric("auc", _auc),
        Metric("mse", _mse, higher_is_better=False),
        Metric("perplexity", _perplexity, _negative_log_likelihoods, higher_is_better=False),
        Metric("sts", _sts),
        Metric("cosine", _cosine, beside=True, labelled=False),
        Metric("neighbours", _neighbours, beside=True, labelled=False),
        Metric("agreement", _agreement, beside=True, labelled=False),
    )
}
Own = Callable[[Tensor, Tensor], Any]


def own(name: str, function: Own) -> Metric:
    """A user's: of outputs and targets, [n, 0] where there are none, a number."""

    def sample(outputs: Tensor, targets: Tensor) -> Sample:
        return Sample((outputs, targets), lambda *rows: float(function(*rows)))

    return Metric(name, sample, labelled=False, higher_is_better=None)


def named(name: str) -> Metric:
    """One of :data:`METRICS`, or ``top-<k>``. Raises ValueError where there is none of the name."""
    if name in METRICS:
        return METRICS[name]
    if found := re.fullmatch(r"top-([1-9]\d*)", name):
        return Metric(name, partial(_hits, top=int(found[1])))
    raise ValueError(f"evaluate: there is no metric {name!r}, expected one of {', '.join(METRICS)}, or top-5")
