"""Inputs made worse: by noise, and by small steps along the gradient of the loss (FGSM: Goodfellow et al. 2015, arXiv:1412.6572;
PGD: Madry et al. 2018, arXiv:1706.06083)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from pycompress.calls import Inputs, call_model, evaluating
from pycompress.evaluation.metrics import scores_of
from pycompress.evaluation.outputs import Output, only_float

STEPS = 10  # of PGD


@dataclass(frozen=True)
class Robustness:
    """How inputs are made worse, in their own units.

    Attributes:
        noise: standard deviations of Gaussian noise that is added; dense and compressed model get the same.
        fgsm, pgd: how far each number of the input may move. Each model is attacked by its own gradient, in which a compressed
            layer is taken for linear in what it quantizes. The loss is the cross entropy, of targets that are numbers the squared
            error. PGD begins anywhere within reach, and makes ten steps of a quarter of it. Metrics that compare with the baseline
            are left out, since both have other inputs.
        low, high: what inputs may not leave, such as 0 and 1 of images.
        seed: of the noise, and of where PGD begins.
    """

    noise: tuple[float, ...] = ()
    fgsm: tuple[float, ...] = ()
    pgd: tuple[float, ...] = ()
    low: float | None = None
    high: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("noise", "fgsm", "pgd"):
            values = getattr(self, name)
            if not isinstance(values, tuple | list) or not all(isinstance(v, int | float) and v > 0 for v in values):
                raise ValueError(f"Robustness: {name} is {values!r}, expected several numbers above 0")

    def kinds(self) -> Iterator[tuple[str, float]]:
        """(``noise``, ``fgsm`` or ``pgd``, how strong) of each."""
        for name in ("noise", "fgsm", "pgd"):
            for strength in getattr(self, name):
                yield name, float(strength)

    def within(self, x: Tensor) -> Tensor:
        return x if self.low is None and self.high is None else x.clamp(self.low, self.high)


@dataclass(frozen=True)
class Worse:
    """One way of making the inputs of a run worse, batch after batch."""

    kind: str
    strength: float
    settings: Robustness
    generator: torch.Generator

    def inputs(self, models: list[nn.Module], given: Inputs, targets: Tensor | None, output: Output) -> list[Inputs]:
        """For each model. Raises ValueError where they cannot be."""
        x, with_other = only_float(given)
        noise = torch.empty(x.shape, dtype=torch.float32, device="cpu")
        if self.kind == "noise":
            noise.normal_(generator=self.generator).mul_(self.strength)
            return [with_other(self.settings.within(x + noise.to(x)))] * len(models)
        start = x
        if self.kind == "pgd":
            noise.uniform_(-self.strength, self.strength, generator=self.generator)
            start = self.settings.within(x + noise.to(x))
        return [with_other(self._attacked(model, x, start, with_other, targets, output)) for model in models]

    def _attacked(
        self, model: nn.Module, x: Tensor, start: Tensor, with_other: Callable[[Tensor], Inputs], targets: Tensor | None,
        output: Output,
    ) -> Tensor:  # fmt: skip
        if targets is None:
            raise ValueError("there are no targets, expected some: without them there is no loss to raise")
        steps, step = (1, self.strength) if self.kind == "fgsm" else (STEPS, 2.5 * self.strength / STEPS)
        moved = start
        with evaluating(model, with_other(x)):
            for _ in range(steps):
                moved = moved.detach().requires_grad_()
                with torch.enable_grad():
                    loss = _loss(output(call_model(model, with_other(moved))), targets)
                    (slope,) = torch.autograd.grad(loss, moved)
                moved = (moved.detach() + step * slope.sign()).clamp(x - self.strength, x + self.strength)
                moved = self.settings.within(moved)
        return moved


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    targets = targets.to(outputs.device)
    if targets.is_floating_point():
        return mse_loss(
            outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1).to(outputs.dtype), reduction="sum"
        )
    return cross_entropy(scores_of(outputs), targets.reshape(len(targets)).long(), reduction="sum")
