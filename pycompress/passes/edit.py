"""``Edit``: what a pass wants done to one layer of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pycompress.kinds.folded import items
from pycompress.plan import Norm, Target


@dataclass(frozen=True)
class Edit:
    """Has a layer do itself what a module beside it does, which becomes an ``nn.Identity``.

    Attributes:
        target: the layer; None where it is none of the plan, and the module stays.
        emptied: that module.
        reason: why it stays after all, or ''.
        behind: whether it takes the layer's results; else it gives its inputs.
        done: what a reason says was done to it.
    """

    done: ClassVar[str]
    target: Target | None
    emptied: nn.Module
    reason: str = ""
    behind: bool = True

    def through(self, x: Tensor) -> Tensor:
        """What the module does to a result of the layer, or to an input, as the layer would do it."""
        y: Tensor = type(self.emptied).forward(self.emptied, x)
        return y

    def hooks(self) -> list[RemovableHandle]:
        """Has the layer do in its calls what the module does."""
        assert self.target is not None
        if self.behind:
            return [self.target.last.register_forward_hook(lambda _, __, y: self.through(y))]
        return [self.target.module.register_forward_pre_hook(lambda _, x: self.through(*x))]

    def apply(self) -> None:
        """Changes the target, or notes why not."""
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Adds to what the summary says of the layer."""
        assert self.target is not None
        self.target.record.note = "; ".join(filter(None, [self.target.record.note, text]))


@dataclass(frozen=True)
class TakeActivation(Edit):
    """Its kernel applies an activation behind the product."""

    done = "fused"
    activation: str = "none"

    def apply(self) -> None:
        assert self.target is not None
        if self.reason:
            self.note(f"{self.activation} stays beside it: {self.reason}")
            return
        self.target.record.activation = self.activation
        self.target.fused = self.emptied


@dataclass(frozen=True)
class TakePadding(Edit):
    """It puts the zeros around its input itself that a padding module put there."""

    done = "taken in"
    behind: bool = False

    def apply(self) -> None:
        assert self.target is not None
        if self.reason:
            self.note(f"the {type(self.emptied).__name__} before it stays: {self.reason}")
            return
        self.target.pad = self.emptied


@dataclass(frozen=True)
class FoldNorm(Edit):
    """Its weight and bias do what a batch norm does; where that stays, it says why itself: see :func:`fold_norm.note_left`."""

    done = "folded"
    name: str = ""

    def through(self, x: Tensor) -> Tensor:
        assert self.target is not None
        y: Tensor = type(self.emptied).forward(self.emptied, items(self.target.module, x))
        return y.reshape(x.shape)

    def apply(self) -> None:
        if not self.reason:
            assert self.target is not None
            self.target.norms.append(Norm(self.emptied, self.name, self.behind))
