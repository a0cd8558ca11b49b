"""What a compressed weight is held to while it is trained: its mask, its grid. Straight-through gradients (Bengio et al. 2013,
arXiv:1308.3432), with a pull to the image where asked for (SR-STE, Zhou et al. 2021, arXiv:2102.04010).
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pycompress.methods.groups import Grid, Rounded, valid_scale
from pycompress.methods.learned import learned_scale, logarithms, on_learned_scale
from pycompress.methods.method import Method
from pycompress.weights import Int4Weight, Int8Weight, LowRankWeight, SparseWeight, Weight
from pycompress.weights.int4 import TOP, pack_nibbles
from pycompress.weights.int8 import range_tensors


class Held(Protocol):
    """A method that keeps what was chosen once, and is cheap: it is run at every step of a training.

    Attributes:
        name, compress: as those of :class:`Method`.
        activation_bits: 7 or 8 where the layer quantizes its input, 16 where it does not.
        input_range: scale and zero point where it does so with one range for all rows; None where each has its own.
    """

    @property
    def name(self) -> str: ...

    @property
    def activation_bits(self) -> int: ...

    @property
    def input_range(self) -> tuple[float, int] | None: ...

    def compress(self, weight: Tensor) -> Weight: ...

    def image(self, weight: Tensor) -> Tensor:
        """``compress(weight).decompress()`` for a float32 [n, k], to the bit, with a gradient."""

    def learned(self) -> list[nn.Parameter]:
        """What it depends on besides the weight, and what an optimizer moves."""

    def state(self) -> dict[str, Tensor]:
        """What it keeps of what was chosen: what another one of its class, for another weight, is made the same by."""

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse."""


class Through(torch.autograd.Function):
    """The image of a weight. The gradient goes to the weight as it is, plus ``pull * (weight - image)``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, image: Tensor, pull: float = 0.0) -> Tensor:
        ctx.pull = pull
        if pull:
            ctx.save_for_backward(weight, image)
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if ctx.pull:
            weight, image = ctx.saved_tensors
            gradient = gradient + ctx.pull * (weight - image)
        return gradient, None, None


def through(weight: Tensor, image: Tensor, pull: float = 0.0) -> Tensor:
    return Through.apply(weight, image, pull)  # type: ignore[no-any-return]


class Projected:
    """Any method, run anew at every step: masks and grids follow the weight.

    Args:
        pull: of the weight to its image, added to the gradient: a share of their difference.
    """

    def __init__(self, method: Method, pull: float = 0.0) -> None:
        self.method, self.pull = method, pull
        # A sparse or a low-rank weight has them for 8 bits only.
        rounds = getattr(method, "bits", 8) == 8
        self.activation_bits: int = getattr(method, "activation_bits", 16) if rounds else 16
        self.input_range: tuple[float, int] | None = getattr(method, "input_range", None)

    @property
    def name(self) -> str:
        return self.method.name

    def compress(self, weight: Tensor) -> Weight:
        return self.method.compress(weight)

    def image(self, weight: Tensor) -> Tensor:
        return through(weight, self.compress(weight).decompress(), self.pull)

    def learned(self) -> list[nn.Parameter]:
        return []

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        pass


# A product with a mask of bytes takes an eighth of the time of torch's `where`, forth and back.
class HeldMask:
    """float32 weights that stay where they are: no optimizer's momentum or decay brings others back."""

    name: ClassVar[str] = "sparse"

    def __init__(self, weight: SparseWeight) -> None:
        self.activation_bits, self.input_range = 16, None
        self.mask = (weight.decompress() != 0).view(torch.uint8)

    def compress(self, weight: Tensor) -> SparseWeight:
        return SparseWeight.from_dense(self.image(weight.detach()))

    def image(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def learned(self) -> list[nn.Parameter]:
        return []

    def state(self) -> dict[str, Tensor]:
        return {"mask": self.mask}

    def load(self, state: dict[str, Tensor]) -> None:
        self.mask = state["mask"]


class HeldInt8:
    """8-bit rows on their scales, dense or where a mask has them. A scale grows where the row outgrows it: where the largest
    integer would not fit, or where 8-bit activations would meet larger integers (by their root mean square) than any row had.
    """

    def __init__(self, weight: Int8Weight | SparseWeight) -> None:
        assert weight.scale is not None
        assert weight.activation_bits is not None
        dense = weight.decompress()
        self.name = weight.name
        self.mask = (dense != 0).view(torch.uint8) if isinstance(weight, SparseWeight) else None
        self.scale, self.activation_bits = weight.scale, weight.activation_bits
        self.input_range: tuple[float, int] | None = getattr(weight, "input_range", None)
        self.weight_bits: int = getattr(weight, "weight_bits", 8)
        self.top = 2 ** (self.weight_bits - 1) - 1
        steps = _rms(dense) / self.scale
        self.largest_rms = float(steps.amax()) if self.activation_bits == 8 and steps.numel() else None

    def compress(self, weight: Tensor) -> Weight:
        steps, scale = self._rounded(weight.detach() if self.mask is None else weight.detach() * self.mask)
        if self.mask is None:
            values, fixed = steps.to(torch.int8), range_tensors(self.input_range)
            return Int8Weight(values, scale, self.activation_bits, self.weight_bits, *fixed)
        return SparseWeight.from_dense(steps.to(torch.int8), scale, self.activation_bits)

    def image(self, weight: Tensor) -> Tensor:
        kept = weight if self.mask is None else weight * self.mask
        steps, scale = self._rounded(kept.detach())
        return through(kept, steps.mul_(scale[:, None]))

    def learned(self) -> list[nn.Parameter]:
        return []

    def state(self) -> dict[str, Tensor]:
        own = {"scale": self.scale}
        if self.input_range is not None:
            own |= dict(zip(("input_scale", "input_zero_point"), range_tensors(self.input_range), strict=True))
        if self.mask is not None:
            own["mask"] = self.mask
        if self.largest_rms is not None:
            own["largest_rms"] = torch.tensor(self.largest_rms, dtype=torch.float64, device="cpu")
        return own

    def load(self, state: dict[str, Tensor]) -> None:
        self.scale, self.mask = state["scale"], state.get("mask")
        self.largest_rms = float(state["largest_rms"]) if "largest_rms" in state else None
        if "input_scale" in state:
            self.input_range = float(state["input_scale"]), int(state["input_zero_point"])

    def _rounded(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Integers as float32 [n, k], and the scale of each row."""
        reach = w.abs().amax(dim=1)
        scale = torch.where(reach > (self.top + 0.5) * self.scale, reach / self.top, self.scale)
        if self.largest_rms:
            rms = _rms(w) / self.largest_rms
            scale = torch.where(rms > (1 + 1e-5) * scale, rms, scale)  # more than rounding makes of it
        return (w / scale[:, None]).round_().clamp_(-self.top, self.top), scale


class HeldInt4:
    """4-bit weights on the grids of their groups, whose scales may be learned."""

    name: ClassVar[str] = "int4"

    def __init__(self, weight: Int4Weight) -> None:
        self._begun = Grid(weight.scale.float().view(-1, 1), weight.zero_points().float().view(-1, 1))
        self.log_scale: nn.Parameter | None = None
        self.shape, self.group, self.symmetric = weight.shape, weight.group, weight.symmetric
        self.activation_bits, self.input_range = weight.activation_bits, None

    @property
    def grid(self) -> Grid:
        if self.log_scale is None:
            return self._begun
        # Learned in float32, and rounded to what the weight can store.
        return self._begun._replace(scale=valid_scale(learned_scale(self._begun.scale, self.log_scale)))

    def compress(self, weight: Tensor) -> Int4Weight:
        grid = self.grid
        rounded = Rounded.joined(grid, grid.steps(self._groups(weight.detach())), self.shape)
        zero_point = None if self.symmetric else pack_nibbles(rounded.zero_point)
        packed = pack_nibbles(rounded.integers)
        return Int4Weight(packed, rounded.scale, zero_point, self.shape[1], self.group, self.activation_bits)

    def image(self, weight: Tensor) -> Tensor:
        grid, rows = self.grid, self._groups(weight)
        image = grid.steps(rows.detach()).mul_(grid.scale)
        if self.log_scale is None:
            return through(weight, self._joined(image))
        return self._joined(on_learned_scale(rows, self.log_scale, image, *grid, TOP))

    def learn(self) -> list[nn.Parameter]:
        """Makes of its scales what is learned, from what they are now."""
        self.log_scale = logarithms(self._begun.scale)
        return [self.log_scale]

    def learned(self) -> list[nn.Parameter]:
        return [] if self.log_scale is None else [self.log_scale]

    def state(self) -> dict[str, Tensor]:
        own = self._begun._asdict()
        return own if self.log_scale is None else {**own, "log_scale": self.log_scale.detach()}

    def load(self, state: dict[str, Tensor]) -> None:
        self._begun = Grid(state["scale"], state["zero_point"])
        self.log_scale = nn.Parameter(state["log_scale"].clone()) if "log_scale" in state else None

    def _groups(self, w: Tensor) -> Tensor:
        short = -self.shape[1] % self.group
        return (pad(w, (0, short)) if short else w).reshape(-1, self.group)

    def _joined(self, groups: Tensor) -> Tensor:
        return groups.view(self.shape[0], -1)[:, : self.shape[1]]


class HeldFactors:
    """Two factors, each trained by itself, on the scales of its rows where it is int8; the residual stays as it is.

    Attributes:
        rank: of factors with more rows and columns, the first ones count, and train.
        down, up: what holds them; None where they are float32.
        residual: float32 [n, k], or None.
    """

    name: ClassVar[str] = "low_rank"

    def __init__(self, weight: LowRankWeight) -> None:
        self.rank = weight.rank
        self.down = self.up = None
        self.activation_bits = 16
        if weight.down_scale is not None and weight.up_scale is not None and weight.activation_bits is not None:
            self.activation_bits = weight.activation_bits
            self.down, self.up = (
                HeldInt8(Int8Weight(values, scale, self.activation_bits, 8))
                for values, scale in ((weight.down, weight.down_scale), (weight.up, weight.up_scale))
            )
        self._set_residual(weight.residual)

    def _set_residual(self, weight: Weight | None) -> None:
        self._residual = weight
        self.residual = None if weight is None else weight.decompress()
        # What meets the residual is quantized as it says, where the factors take floats.
        self.residual_bits: int = getattr(weight, "activation_bits", None) or 16

    def compress(self, down: Tensor, up: Tensor) -> LowRankWeight:
        """From the factors, float32 [r, k] and [n, r]."""
        down, up = down.detach()[: self.rank], up.detach()[:, : self.rank]
        if self.down is None or self.up is None:
            return LowRankWeight(down.clone(), up.contiguous().clone(), residual=self._residual)
        first, second = self.down.compress(down), self.up.compress(up)
        assert isinstance(first, Int8Weight)
        assert isinstance(second, Int8Weight)
        return LowRankWeight(
            first.values, second.values, first.scale, second.scale, self.activation_bits, self._residual
        )

    def images(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of ``compress(down, up)``, with a gradient."""
        down, up = down[: self.rank], up[:, : self.rank]
        if self.down is None or self.up is None:
            return down, up
        return self.down.image(down), self.up.image(up)

    def learned(self) -> list[nn.Parameter]:
        """As :meth:`Held.learned`."""
        return []

    def state(self) -> dict[str, Tensor]:
        """As :meth:`Held.state`."""
        own = {"rank": torch.tensor(self.rank, dtype=torch.int64, device="cpu")}
        for side, holder in (("down", self.down), ("up", self.up)):
            own |= {f"{side}.{name}": value for name, value in (holder.state() if holder else {}).items()}
        if self._residual is not None:
            own |= {f"residual.{name}": value for name, value in self._residual.tensors().items()}
        return own

    def load(self, state: dict[str, Tensor]) -> None:
        """As :meth:`Held.load`."""
        self.rank = int(state["rank"])
        for side, holder in (("down", self.down), ("up", self.up)):
            if holder is not None:
                holder.load(_within(state, side))
        if self._residual is not None:
            own = self._residual
            self._set_residual(type(own).from_tensors(own.shape, _within(state, "residual"), own.settings()))


def _within(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.partition(".")[2]: value for name, value in state.items() if name.startswith(f"{part}.")}


def held(weight: Weight) -> Held | HeldFactors | None:
    """What keeps the mask or the grid of a weight; None for one of which this is not known yet."""
    if isinstance(weight, SparseWeight):
        return HeldMask(weight) if weight.scale is None else HeldInt8(weight)
    if isinstance(weight, Int8Weight):
        return HeldInt8(weight)
    if isinstance(weight, Int4Weight):
        return HeldInt4(weight)
    return HeldFactors(weight) if isinstance(weight, LowRankWeight) else None


def _rms(w: Tensor) -> Tensor:
    """Root mean square per row."""
    return torch.linalg.vector_norm(w, dim=1) / max(1, w.shape[1]) ** 0.5  # type: ignore[no-any-return]
