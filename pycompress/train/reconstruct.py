"""``reconstruct``: compressed, and then trained without labels to give what the dense model gives: block by block (BRECQ, Li et al.
2021, arXiv:2102.05426), then the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pycompress.calibration import Mask
from pycompress.calibration.positions import CONVENTION
from pycompress.calls import Inputs, call_model, layer_by_layer, uncompiled
from pycompress.copying import copied
from pycompress.methods.inputs import InputStatistics
from pycompress.model import compress
from pycompress.nn.factors import autocast_dtype
from pycompress.passes import whole as as_one
from pycompress.plan import Plan
from pycompress.progress import on_a_terminal
from pycompress.train import checkpoint as files
from pycompress.train.calls import Calls
from pycompress.train.fit import Budget, Clock, Fit, run
from pycompress.train.losses import closeness
from pycompress.train.objective import Loss, Objective, OfBlock, OfModel
from pycompress.train.student import begin, training, write_into

ModelT = TypeVar("ModelT", bound=nn.Module)

MOST_HELD_OUT = 8  # batches: scores are no training


@dataclass(frozen=True)
class Progress:
    """How far :func:`reconstruct` is.

    Attributes:
        block: name of the block that is trained, '' for the whole model.
        steps: of the optimizer, for this block.
        seconds: since the training began, in all.
        score, first: the best loss on held-out batches, by the compressed kernels, and that before the block was trained.
    """

    block: str
    steps: int
    seconds: float
    score: float
    first: float

    def __str__(self) -> str:
        name = self.block or "the whole model"
        return f"{self.seconds:6.0f} s  {name}: {self.steps} steps, loss {self.score:.4g} (before: {self.first:.4g})"


def reconstruct(
    model: ModelT,
    plan: Plan,
    batches: Iterable[Inputs],
    *,
    calibration: Mapping[str, InputStatistics] | None = None,
    blocks: str | Sequence[str] | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    whole: float = 0.75,
    lr: float = 1e-3,
    held_out: float = 0.1,
    mask: Mask = CONVENTION,
    loss: Loss = closeness,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool | Callable[[Progress, nn.Module], None] | None = None,
) -> ModelT:
    """Compresses a copy of a model, and trains it on unlabelled batches to give what the dense model gives.

    Block after block is trained to give what the dense block gives: the inputs are those that the compressed model has there, the
    targets what the dense block makes of those of the dense model; the loss is the squared error relative to the targets, over the
    positions that count. Then all blocks are trained together, to the outputs of the whole model and, as much, of each block.
    Weights stay in their format: what is pruned stays zero, integers stay on their grids (an int8 scale grows where its row
    outgrows it), low rank trains both factors, beside a residual that stays as it is. Biases, norms and all other parameters inside
    the blocks are trained too, which costs nothing where the model runs; what is outside of the blocks is not, nor are compressed
    convolutions of low rank.

    Training computes as the layers will, rounded activations included; scores are measured with the compressed layers themselves.
    Under ``torch.autocast("cpu", torch.bfloat16)`` the steps of the training, and nothing else, are computed in bfloat16: in two
    thirds of the time on processors with AMX.

    Args:
        plan, calibration: as :func:`compress` takes them; the calibration chooses masks and grids, once.
        batches: a few hundred to thousands of items like those that the model is for, tokenized: a tensor, a sequence of positional
            or a mapping of keyword arguments each. At least two. Items of similar length in a batch waste least time on padding.
        blocks: a glob of the names of the model's blocks, or several; of what it matches the outermost modules. A batch must call
            each once. None: the whole model alone is trained.
        minutes: of training, after the model is compressed.
        steps: of the optimizer instead, in which each layer takes part: so the result can be reproduced.
        whole: the share of minutes, or steps, in which the whole model is trained: a step of it takes as long as one of each block.
        lr: the learning rate of blocks, of the whole model a fifth. It rises over the first 5 % of the time, then falls to 0.
        held_out: the share of the batches (at least one, at most 8) that scores are measured on, not trained: a block keeps the
            parameters that had the best score, and is done where the score gets no better.
        mask: which positions count, as :func:`calibrate` takes it: transformers' ``attention_mask``.
        loss: of the whole model: ``loss(result, dense result, mask)``, of the results as the models return them, mask bool
            [batch, length] or None, to a scalar with a gradient. Default: KL of ``logits`` where there are some; else the relative
            error, and the cosine of the mean over the positions, of the first tensor that is returned.
        seed: of the order of the batches.
        checkpoint: a file to continue from, where it is there, and to write to at every score. With ``steps`` the result is that
            of a training that was never interrupted.
        progress: whether to print the score as it gets better; or what to call with a :class:`Progress` and the model as it is, in
            evaluation mode: it must not change it, and its time does not count. None: print on a terminal.
    Returns:
        What :func:`compress` returns, with other numbers; the summary has a note of the steps. ``model`` stays as it is.
        ``KeyboardInterrupt`` ends the training early, with the best parameters until then.
    Raises:
        TypeError, ValueError: as :func:`compress`; a glob that matches no module, a block that a batch does not call exactly once,
            parameters in blocks that are not float32, fewer than two batches, not exactly one of minutes and steps, a checkpoint of
            another training.
    """
    given = list(batches)
    _check(given, minutes, steps, whole, held_out)
    model = uncompiled(model)  # type: ignore[assignment]
    dtype = autocast_dtype(torch.device("cpu"))
    with torch.autocast("cpu", enabled=False):
        with as_one.without(model):
            dense = copied(model, ()).eval().requires_grad_(False)
        names = _names(dense, blocks, given[0])
        # (The student is made of the dense model, with its norms; those that fold_norms took out before are gone from both.)
        compressed = compress(model, plan, calibration=calibration, blocks=False, fold_norms=False)
        student = copied(dense, ())
        begin(student, compressed, [student.get_submodule(name) for name in names or [""]])
        trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
        mark = files.fingerprint(
            compressed.state_dict(), sorted(trained), names, steps, whole, lr, held_out, seed, len(given)
        )
        path = None if checkpoint is None else Path(checkpoint)
        training_run = _Run(
            dense, student, names, given, held_out, mask, loss, lr, seed, dtype, _printer(progress), path, mark
        )
        phases = {**dict.fromkeys(names, 1 - whole), "": whole if names else 1.0}
        interrupted = ""
        try:
            training_run.all(phases, minutes, steps)
        except KeyboardInterrupt:
            interrupted = ", interrupted"
        write_into(
            compressed, student, dense, lambda name: f"reconstructed, {training_run.steps_of(name)} steps{interrupted}"
        )
        as_one.install(compressed)
        return compressed


def _check(batches: list[Any], minutes: float | None, steps: int | None, whole: float, held_out: float) -> None:
    if (minutes is None) == (steps is None):
        raise ValueError(f"reconstruct: minutes is {minutes!r}, steps is {steps!r}, expected exactly one of them")
    for name, value in (("minutes", minutes), ("steps", steps)):
        if value is not None and not value >= 0:
            raise ValueError(f"reconstruct: {name} is {value!r}, expected a number from 0")
    if not 0 <= whole <= 1 or not 0 < held_out < 1:
        raise ValueError(f"reconstruct: whole is {whole!r}, held_out is {held_out!r}, expected shares between 0 and 1")
    if len(batches) < 2:
        raise ValueError(f"reconstruct: there are {len(batches)} batches, expected at least 2: one to measure on")


def _names(model: nn.Module, globs: str | Sequence[str] | None, batch: Inputs) -> list[str]:
    """The names of the blocks, in the order in which they are called."""
    if globs is None:
        return []
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for glob in [globs] if isinstance(globs, str) else globs:
        matched = [name for name in modules if name and fnmatchcase(name, glob)]
        if not matched:
            raise ValueError(
                f"reconstruct: the glob {glob!r} matches no module; there are {', '.join([*modules][1:8]) or 'none'}, ..."
            )
        found |= {name: modules[name] for name in matched}
    found = {name: block for name, block in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    called: list[nn.Module] = []
    handles = [block.register_forward_pre_hook(lambda block, _: called.append(block)) for block in found.values()]
    try:
        with torch.no_grad(), layer_by_layer():
            call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, block in found.items():
        if called.count(block) != 1:
            raise ValueError(
                f"reconstruct: a batch calls {name} {called.count(block)} times, expected one call of each block"
            )
    return sorted(found, key=lambda name: called.index(found[name]))


def _printer(progress: bool | Callable[[Progress, nn.Module], None] | None) -> Callable[[Progress, nn.Module], None]:
    if callable(progress):
        return progress
    if progress or (progress is None and on_a_terminal()):
        return lambda now, _: print(now, file=sys.stderr, flush=True)  # noqa: T201
    return lambda _now, _model: None


class _Run:
    """A training from its first phase, or from its checkpoint, to its last."""

    def __init__(
        self, dense: nn.Module, student: nn.Module, blocks: list[str], batches: list[Inputs], held_out: float, mask: Mask,
        loss: Loss, lr: float, seed: int, dtype: torch.dtype | None, tell: Callable[[Progress, nn.Module], None],
        path: Path | None, mark: str,
    ) -> None:  # fmt: skip
        self._dense, self._student, self._blocks, self._dtype = dense, student, blocks, dtype
        self._loss, self._lr, self._seed, self._tell, self._path, self._mark = loss, lr, seed, tell, path, mark
        count = min(MOST_HELD_OUT, max(1, round(held_out * len(batches))))
        held = {
            round((i + 0.5) * len(batches) / count - 0.5) for i in range(count)
        }  # spread over them: they may be sorted
        self._held = sorted(held)
        self._own = [i for i in range(len(batches)) if i not in held]
        self._calls = {model: Calls(model, batches, mask) for model in (dense, student)}
        self._trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self._phase, self._fit, self._clock = 0, Fit(), Clock()
        self._steps: dict[str, int] = {}  # by block

    def steps_of(self, layer: str) -> int:
        """In which a layer took part."""
        return sum(steps for name, steps in self._steps.items() if not name or layer.startswith(f"{name}."))

    def all(self, shares: Mapping[str, float], minutes: float | None, steps: int | None) -> None:
        """Trains the blocks of these names: each for its share of the steps, or together for that of the minutes."""
        self._resume()
        names = [name for name, share in shares.items() if share]
        times = [shares[name] / (1 if not name else max(1, len(names) - 1)) for name in names]
        for i in range(self._phase, len(names)):
            self._phase = i
            left = 0.0 if minutes is None else max(0.0, 60 * minutes - self._clock.seconds)
            until = self._clock.seconds + left * times[i] / sum(times[i:])
            self._run(names[i], Budget(None if steps is None else round(steps * shares[names[i]]), until))
            self._fit = Fit()

    def _run(self, name: str, budget: Budget) -> None:
        block = self._student.get_submodule(name)
        parameters = {key: p for key, p in self._trained.items() if not name or key.startswith(f"{name}.")}
        if not parameters:
            return
        calls, dense = (self._calls[model].of(model.get_submodule(name)) for model in (self._student, self._dense))
        objective: Objective = OfBlock() if name else OfModel(self._blocks, self._loss)

        @torch.no_grad()
        def target(i: int) -> Any:
            return objective.results(self._dense.get_submodule(name), dense[i])

        target = cache(target) if objective.kept else target

        def loss(i: int) -> Tensor:
            training(block, True)
            with _in(self._dtype):
                found = objective.results(block, calls[i])
            return objective.error(found, target(i), calls[i].mask)

        @torch.no_grad()
        def score() -> float:
            training(block, False)
            found = ((i, objective.results(block, calls[i])) for i in self._held)
            return sum(float(objective.error(own, target(i), calls[i].mask)) for i, own in found) / len(self._held)

        def after_score(fit: Fit) -> None:
            self._steps[name] = fit.steps
            self._write()
            now = Progress(name, fit.steps, self._clock.seconds, fit.score, fit.first_score)
            self._clock.rest(lambda: self._tell(now, self._student))

        self._fit.start = self._fit.start if self._fit.best else self._clock.seconds
        try:
            run(
                self._fit, parameters, lambda step: loss(self._own[step]), score, len(self._own), budget, self._clock,
                lr=self._lr if name else self._lr / 5, seed=f"{self._seed}/{self._phase}", after_score=after_score,
            )  # fmt: skip
        finally:
            self._steps[name] = self._fit.steps
            training(block, False)

    # --- its checkpoint -------------------------------------------------------------------------------------------

    def _write(self) -> None:
        if self._path is None:
            return
        parameters = {name: parameter.detach() for name, parameter in self._trained.items()}
        state = {"phase": self._phase, "steps": self._steps, "seconds": self._clock.seconds, "parameters": parameters}
        files.write(self._path, self._mark, {**state, "fit": vars(self._fit)})

    def _resume(self) -> None:
        found = None if self._path is None else files.read(self._path, self._mark)
        if found is None:
            return
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(found["parameters"][name])
        self._phase, self._steps, self._fit = found["phase"], found["steps"], Fit(**found["fit"])
        self._clock = Clock(found["seconds"])


@contextmanager
def _in(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to a dtype, without torch's flash attention: backwards in bfloat16 it takes eight times as long as in float32."""
    if dtype is None:
        yield
        return
    with torch.autocast("cpu", dtype), sdpa_kernel(SDPBackend.MATH):
        yield
