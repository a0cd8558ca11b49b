"""``Distillation``: a student learns what a teacher gives (Hinton et al. 2015, arXiv:1503.02531), on the way (Romero et al. 2014,
arXiv:1412.6550) and between tokens (MiniLMv2, Wang et al. 2021, arXiv:2012.15828).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, mse_loss

from pycompress.calls import Inputs, call_model, evaluating
from pycompress.train.calls import tensor_of
from pycompress.train.losses import mean_of, relative
from pycompress.train.watch import Watch

EMBEDDINGS = ("cosine", "mse")


class _Pair(NamedTuple):
    """A module of the student, and the one of the teacher whose result it is to have."""

    student: str
    teacher: str


class Distillation(nn.Module):
    """The loss of a student beside its teacher.

    .. code-block:: python

        distill = pc.Distillation(teacher, student, logits=0.5, temperature=2.0)
        result = student(**batch)
        loss = distill(result, result.loss)

    It is the sum of the parts that are asked for:

    - ``logits``: ``alpha * loss + (1 - alpha) * T^2 * KL(softmax(teacher / T) || softmax(student / T))``, with the loss of the task
      that is given (where none is, the second term with the factor 1); T^2 keeps the gradients as large for every temperature;
    - ``hidden``: the squared error of the results of modules, relative to the teacher's, the mean over the pairs of modules. Where
      the widths differ, a linear layer takes the student's to the teacher's: a parameter of this module, for the optimizer;
    - ``relations``: KL between softmax(A A^T / sqrt(d)) of results A of modules (queries, keys, values), by ``relation_heads``;
    - ``embedding``: 1 - cosine, or the mean squared error, of the mean over the tokens (of the result itself, where it has two
      dimensions).

    The student is watched: the teacher is called with what the student was called with last, without labels. It is no part of this
    module: not trained, moved or saved with it; it runs in evaluation mode without gradients. :meth:`close` ends the watching.

    Args:
        teacher, student: the models. The student may be a prepared one.
        logits: alpha in [0, 1], of models that return ``logits`` or are logits themselves; None: nothing of this kind.
        temperature: T > 0.
        hidden, relations: a glob of names in both models, ``{student's glob: teacher's glob}``, or None. Matches are paired in
            their order; where the teacher has more, evenly, the last with the last.
        embedding: ``cosine``, ``mse`` or None.
        weights: of the parts: ``{"hidden": 0.5}``; 1 where nothing is said.
        relation_heads: into how many the features of results are divided for ``relations``.
        mask: name of the argument that says which positions count.
        cache: a folder for what the teacher gives, by the bytes of what it is called with: it computes each batch once.
        example_inputs: what to run both models on, once, to learn the widths of what is ``hidden``; needed where they differ.
    Raises:
        TypeError, ValueError: nothing is asked for, a glob matches nothing, another value of an argument.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        logits: float | None = None,
        temperature: float = 1.0,
        hidden: str | Mapping[str, str] | None = None,
        relations: str | Mapping[str, str] | None = None,
        embedding: str | None = None,
        weights: Mapping[str, float] | None = None,
        relation_heads: int = 12,
        mask: str = "attention_mask",
        cache: str | Path | None = None,
        example_inputs: Inputs | None = None,
    ) -> None:
        super().__init__()
        parts = {"logits": logits, "hidden": hidden, "relations": relations, "embedding": embedding}
        _check(parts, temperature, relation_heads, weights or {})
        self.alpha, self.temperature, self.embedding = logits, temperature, embedding
        self.relation_heads, self.mask = relation_heads, mask
        self.weights = dict.fromkeys(parts, 1.0) | dict(weights or {})
        self.hidden, self.relations = _pairs(hidden, student, teacher), _pairs(relations, student, teacher)
        self.projections = nn.ModuleDict()
        teacher.eval().requires_grad_(False)
        self._cache = None if cache is None else Path(cache)
        pairs = (*self.hidden, *self.relations)
        self._taught = Watch(teacher, {pair.teacher for pair in pairs})
        self._learned = Watch(student, {pair.student for pair in pairs})
        if example_inputs is not None and self.hidden:
            self._project(example_inputs)
        self._learned.always()

    def close(self) -> None:
        """Ends the watching of the student."""
        self._learned.close()

    def forward(self, result: Any, loss: Tensor | None = None) -> Tensor:
        """The loss of the student's last call.

        Args:
            result: what the student returned.
            loss: of the task.
        Raises:
            ValueError: a part needs what the models do not give. RuntimeError: the student was not called since.
        """
        args, keywords = self._learned.taken()
        mask = keywords.get(self.mask)
        mask = mask.bool() if isinstance(mask, Tensor) else None
        taught = self._lesson(args, keywords, mask)
        parts: list[Tensor] = []
        if self.alpha is not None:
            divergence = _divergence(_logits(result), taught["logits"], self.temperature, mask)
            mixed = divergence if loss is None else self.alpha * loss + (1 - self.alpha) * divergence
            parts.append(self.weights["logits"] * mixed)
        elif loss is not None:
            parts.append(loss)
        if self.hidden:
            parts.append(self.weights["hidden"] * self._hidden(taught, mask))
        if self.relations:
            pairs = ((self._learned.results[pair.student], taught[pair.teacher]) for pair in self.relations)
            found = [_relation(y, target, self.relation_heads, mask) for y, target in pairs]
            parts.append(self.weights["relations"] * torch.stack(found).mean())
        if self.embedding is not None:
            y, target = mean_of(tensor_of(result), mask), taught["embedding"]
            near = (
                1 - cosine_similarity(y, target, dim=-1).mean() if self.embedding == "cosine" else mse_loss(y, target)
            )
            parts.append(self.weights["embedding"] * near)
        self._learned.results.clear()
        return torch.stack(parts).sum()

    def trainer_loss(self, result: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:  # noqa: ARG002
        """The ``compute_loss_func`` of transformers' Trainer: with the loss that the student returned, if it did."""
        own = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
        if own is None and labels is not None and self.alpha is not None:
            own = nn.functional.cross_entropy(_logits(result).flatten(0, -2), labels.flatten())
        total: Tensor = self(result, own)
        return total

    def _hidden(self, taught: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
        errors = []
        for pair in self.hidden:
            y, target = self._learned.results[pair.student], taught[pair.teacher]
            if y.shape[-1] != target.shape[-1]:
                if _key(pair.student) not in self.projections:
                    raise ValueError(
                        f"Distillation: {pair.student} gives {y.shape[-1]} features, {pair.teacher} {target.shape[-1]}: expected "
                        "example_inputs, to make the layer that takes these to those"
                    )
                y = self.projections[_key(pair.student)](y)
            errors.append(relative(y, target, _fitting(mask, target)))
        return torch.stack(errors).mean()

    @torch.no_grad()
    def _project(self, inputs: Inputs) -> None:
        """Makes the linear layers that take what modules of the student give to the teacher's widths."""
        for watch in (self._learned, self._taught):
            with evaluating(watch.model, inputs), watch.watching():
                call_model(watch.model, inputs)
        for pair in self.hidden:
            width, wide = self._learned.results[pair.student].shape[-1], self._taught.results[pair.teacher].shape[-1]
            if width != wide:
                self.projections[_key(pair.student)] = nn.Linear(
                    width, wide, bias=False, dtype=torch.float32, device="cpu"
                )

    @torch.no_grad()
    def _lesson(self, args: tuple[Any, ...], keywords: dict[str, Any], mask: Tensor | None) -> dict[str, Tensor]:
        """What the teacher gives: the results of the modules that are asked for, by their names, logits and embedding."""
        keywords = {name: value for name, value in keywords.items() if "label" not in name}
        path = None if self._cache is None else self._cache / f"{_digest(args, keywords)}.pt"
        if path is not None and path.exists():
            return torch.load(path, weights_only=True)  # type: ignore[no-any-return]
        teacher = self._taught.model.eval()
        with self._taught.watching():
            result = teacher(*args, **keywords)
        found = dict(self._taught.results)
        self._taught.results.clear()
        if self.alpha is not None:
            found["logits"] = _logits(result)
        if self.embedding is not None:
            found["embedding"] = mean_of(tensor_of(result), mask)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".new")
            torch.save(found, beside)
            beside.replace(path)
        return found


def _check(parts: Mapping[str, Any], temperature: float, heads: int, weights: Mapping[str, float]) -> None:
    if all(value is None for value in parts.values()):
        raise ValueError(f"Distillation: nothing is asked for, expected one of {', '.join(parts)}")
    alpha, embedding = parts["logits"], parts["embedding"]
    if alpha is not None and not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
        raise ValueError(f"Distillation: logits is {alpha!r}, expected alpha in [0, 1] or None")
    if embedding not in (None, *EMBEDDINGS):
        raise ValueError(f"Distillation: embedding is {embedding!r}, expected None or one of {', '.join(EMBEDDINGS)}")
    if not temperature > 0:
        raise ValueError(f"Distillation: temperature is {temperature!r}, expected a number above 0")
    if type(heads) is not int or heads < 1:
        raise ValueError(f"Distillation: relation_heads is {heads!r}, expected a number from 1")
    for name, weight in weights.items():
        if name not in parts or not weight >= 0:
            raise ValueError(
                f"Distillation: weights has {name!r}: {weight!r}, expected numbers from 0 for {', '.join(parts)}"
            )


def _pairs(globs: str | Mapping[str, str] | None, student: nn.Module, teacher: nn.Module) -> list[_Pair]:
    found: list[_Pair] = []
    for own, other in {globs: globs}.items() if isinstance(globs, str) else (globs or {}).items():
        ours, theirs = _matches(student, own), _matches(teacher, other)
        if len(ours) > len(theirs):
            raise ValueError(
                f"Distillation: {own!r} matches {len(ours)} modules of the student and {other!r} {len(theirs)} of the teacher, "
                "expected no fewer there"
            )
        found += [_Pair(name, theirs[(i + 1) * len(theirs) // len(ours) - 1]) for i, name in enumerate(ours)]
    return found


def _matches(model: nn.Module, glob: str) -> list[str]:
    """Of the names that a glob matches, those that are not inside of another."""
    names = [name for name, _ in model.named_modules() if name and fnmatchcase(name, glob)]
    if not names:
        raise ValueError(f"Distillation: the glob {glob!r} matches no module of a {type(model).__name__}")
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _key(name: str) -> str:
    """A name of a module as one for a child of this one."""
    return name.replace(".", "/")


def _logits(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    found = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    if not isinstance(found, Tensor):
        raise ValueError(f"Distillation: the result is {type(result).__name__}, expected one with logits")
    return found


def _divergence(y: Tensor, target: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """T^2 KL(target || y), the mean over the items, or over the positions that count."""
    if y.shape != target.shape:
        raise ValueError(f"Distillation: the student's logits are {list(y.shape)}, the teacher's {list(target.shape)}")
    mask = _fitting(mask, target)
    if mask is not None and target.dim() > 2:
        y, target = y[mask], target[mask]
    own, other = (log_softmax(logits.flatten(0, -2) / temperature, dim=-1) for logits in (y, target))
    return temperature**2 * kl_div(own, other, reduction="batchmean", log_target=True)


def _relation(y: Tensor, target: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """KL between the attentions of the tokens to each other, [batch, length, width] each."""
    own, other = (_self_attention(x, heads, mask) for x in (y, target))
    rows = (other.exp() * (other - own)).sum(-1)  # [batch, heads, length]
    if mask is None:
        return rows.mean()
    return (rows * mask[:, None]).sum() / (mask.sum() * rows.shape[1])


def _self_attention(x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """log softmax(A A^T / sqrt(d)): [batch, heads, length, length]."""
    if x.dim() != 3 or x.shape[-1] % heads:
        raise ValueError(
            f"Distillation: a result is {list(x.shape)}, expected [batch, length, width], width a multiple of {heads}"
        )
    a = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = a @ a.transpose(-1, -2) / a.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    return log_softmax(scores, dim=-1)


def _fitting(mask: Tensor | None, x: Tensor) -> Tensor | None:
    return mask if mask is not None and mask.shape == x.shape[:2] else None


def _digest(args: Sequence[Any], keywords: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in (*enumerate(args), *sorted(keywords.items())):
        digest.update(f"{name}:".encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
