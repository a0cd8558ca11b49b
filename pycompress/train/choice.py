"""What a weight is held to while it trains, chosen anew on the way: by magnitude, or by movement, the sum of -gradient * weight
(Sanh et al. 2020, arXiv:2005.07683), or by gates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pycompress.methods import Sparse
from pycompress.methods.held import Held, HeldFactors, HeldInt4, HeldInt8, HeldMask, Projected, held, through
from pycompress.methods.masks import BLOCKS, N_OF_M
from pycompress.methods.method import GradualMethod, Method
from pycompress.train.gates import Gates
from pycompress.weights import SparseWeight, Weight

SELECTIONS = ("magnitude", "movement", "l0")


class Choice:
    """A ``Held`` whose mask or grid is chosen again and again, until it is closed; then it stays.

    While it is open, gradients reach what is pruned, too, so that it may come back (straight through, Bengio et al. 2013,
    arXiv:1308.3432), and ``pull`` draws the weight to its image. Closed, no gradient reaches what is pruned.

    Attributes:
        method: what it comes to.
        now: what holds the weight now.
        scores: float32 [n, k], how far each weight was moved away from zero, and ``recent``, since it was chosen last; None where
            that does not count.
        gates: before the weights, while it is open; None where there are none.
    """

    def __init__(self, method: Method, pull: float, selection: str, shape: tuple[int, int], seed: int = 0) -> None:
        self.method, self.pull = method, pull
        self.open = True
        self.scores: Tensor | None = None
        self.recent: Tensor | None = None
        self.gates: Gates | None = None
        if selection == "movement" and isinstance(method, Sparse):
            self.scores, self.recent = (torch.zeros(shape, dtype=torch.float32, device="cpu") for _ in range(2))
        if selection == "l0" and isinstance(method, Sparse):
            self.gates = Gates(shape, BLOCKS.get(method.pattern, (1, 1)), seed)
        self.now: Held

    @property
    def name(self) -> str:
        return self.now.name

    @property
    def activation_bits(self) -> int:
        return self.now.activation_bits

    @property
    def input_range(self) -> tuple[float, int] | None:
        return self.now.input_range

    def choose(self, weight: Tensor, strength: float) -> Tensor | None:
        """Chooses anew for a weight, float32 [n, k]; returns what a method that looks at inputs has made of it, if one did."""
        method = at(self.method, strength, (weight.shape[0], weight.shape[1]))
        importance = self._importance(weight.shape)
        if isinstance(method, Sparse) and importance is not None:
            chosen: Weight = method.compress(weight, importance)
        else:
            chosen = method.compress(weight)
        found = held(chosen)
        if found is None or isinstance(found, HeldFactors):
            self.now = Projected(method, self.pull)
            return None
        if isinstance(found, HeldMask | HeldInt8) and isinstance(method, Sparse):
            found.mask = _kept(method, weight, chosen, importance)
        self.now = found
        return chosen.decompress() if getattr(method, "inputs", None) is not None else None

    def _importance(self, shape: torch.Size) -> Tensor | None:
        """What ranks the weights, where it is not their magnitude."""
        if self.gates is not None:
            return self.gates.importance(shape)
        if self.scores is None or self.recent is None:
            return None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.recent)
        self.scores += self.recent
        self.recent.zero_()
        return self.scores - self.scores.amin() if bool(self.scores.any()) else None

    def compress(self, weight: Tensor) -> Weight:
        if self.gated:
            assert self.gates is not None
            return SparseWeight.from_dense(weight.detach() * self.gates.expected(weight.shape))
        return self.now.compress(weight)

    @property
    def gated(self) -> bool:
        """Whether gates, and not a mask, say what stays."""
        return self.open and self.gates is not None and isinstance(self.now, HeldMask)

    def image(self, weight: Tensor) -> Tensor:
        if self.gated:
            assert self.gates is not None
            return weight * self.gates.drawn(weight.shape)
        if not self.open:
            return self.now.image(weight)
        image = self.now.image(weight.detach())
        if self.recent is not None and torch.is_grad_enabled():
            return _Scored.apply(weight, image, self.recent, self.pull)  # type: ignore[no-any-return]
        return through(weight, image, self.pull)

    def learn(self) -> list[nn.Parameter]:
        """The scales, to be learned from now on. Those of 8 bits follow the weight, and clip nothing: none of them."""
        return self.now.learn() if isinstance(self.now, HeldInt4) else []

    def learned(self) -> list[nn.Parameter]:
        return [*([self.gates.logits] if self.gated and self.gates is not None else []), *self.now.learned()]

    def state(self) -> dict[str, Tensor]:
        own = {f"now.{name}": value for name, value in self.now.state().items()}
        if self.scores is not None and self.recent is not None:
            own |= {"scores": self.scores, "recent": self.recent}
        return own if self.gates is None else {**own, **self.gates.state()}

    def load(self, state: dict[str, Tensor]) -> None:
        if self.scores is not None and self.recent is not None:
            self.scores, self.recent = state["scores"].clone(), state["recent"].clone()
        if self.gates is not None:
            self.gates.load(state)
        self.now.load({name.removeprefix("now."): value for name, value in state.items() if name.startswith("now.")})


def at(method: Method, strength: float, shape: tuple[int, int]) -> Method:
    """The milder method on the way to it, if it has any."""
    return method.at(strength, shape) if isinstance(method, GradualMethod) else method


def _kept(method: Sparse, weight: Tensor, chosen: Weight, importance: Tensor | None) -> Tensor:
    """uint8 [n, k]: a weight that stays, and is zero just now, or rounds to zero, is not pruned."""
    if method.inputs is None and (method.density is not None or method.pattern in N_OF_M):
        return method.prune(weight, importance).view(torch.uint8)
    return (chosen.decompress() != 0).view(torch.uint8)


class _Scored(torch.autograd.Function):
    """As ``held.Through``, and adds to the scores how far the gradient moves each weight away from zero."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, image: Tensor, scores: Tensor, pull: float) -> Tensor:
        ctx.scores, ctx.pull = scores, pull
        ctx.save_for_backward(weight, image)
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, image = ctx.saved_tensors
        ctx.scores.addcmul_(gradient, weight, value=-1.0)
        return gradient + ctx.pull * (weight - image) if ctx.pull else gradient, None, None, None
