"""Low-rank convolutions (Zhang 2016, arXiv:1505.06798; Jaderberg 2014, arXiv:1405.3866; Kim 2016, arXiv:1511.06530).

A decomposition replaces one convolution by a chain of smaller ones, without anything between them:

    channel   [r, c, kh, kw], then [n, r, 1, 1]                                    Zhang: an SVD of the weight as [n, c kh kw]
    spatial   [r, c, kh, 1], then [n, r, 1, kw]                                    Jaderberg: an SVD of it as [n kw, c kh]
    tucker    [r_in, c, 1, 1], then [r_out, r_in, kh, kw], then [n, r_out, 1, 1]   Kim: Tucker-2, by HOSVD and rounds of HOOI
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from pycompress.methods.weight import Expected, check_tensors, matrix_shape
from pycompress.ops import MAX_STEP

DECOMPOSITIONS = ("channel", "spatial", "tucker")
# How many multiply-adds of such a chain take as long as one of the dense convolution: torch's oneDNN kernels get slower with fewer
# channels. Geometric means over four 3x3 layers of a ResNet-50, one image (`python benchmarks/convolutions.py`; two runs: channel
# 0.54 and 0.68, spatial 0.60 and 0.53, tucker 0.64 and 0.48). `only_if_faster` measures each layer itself.
EFFICIENCY = {"channel": 0.6, "spatial": 0.55, "tucker": 0.55}
HOOI_ROUNDS = 10  # at most; they end where one gains less than HOOI_GAIN of the weight's squares
HOOI_GAIN = 1e-7

Shape4 = tuple[int, int, int, int]
Ranks = tuple[int, ...]  # (r,), or (r_in, r_out) of tucker
Split = Callable[[Tensor], tuple[Tensor, Tensor]]  # a matrix [a, b] -> down [r, b] and up [a, r], both float32


@dataclass(frozen=True, eq=False)
class LowRankConv2dWeight:
    """The canonical weight of a low-rank convolution: what is saved, exported and compared; independent of any processor.

    Attributes:
        decomposition: ``channel``, ``spatial`` or ``tucker``.
        down: float32, the first convolution: [r, c, kh, kw], [r, c, kh, 1] or [r_in, c, 1, 1].
        up: float32, the last one: [n, r, 1, 1], [n, r, 1, kw] or [n, r_out, 1, 1].
        core: float32 [r_out, r_in, kh, kw] between the two, of tucker only.
    Raises:
        ValueError: a field that breaks these rules, NaN or Inf, or a rank above that of the matrix.
    """

    name: ClassVar[str] = "low_rank"

    decomposition: str
    down: Tensor
    up: Tensor
    core: Tensor | None = None

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.decomposition not in DECOMPOSITIONS:
            raise ValueError(f"{kind}: decomposition is {self.decomposition!r}, expected one of {DECOMPOSITIONS}")
        if (self.core is not None) != (self.decomposition == "tucker"):
            raise ValueError(f"{kind}: a core was {'not ' if self.core is None else ''}given for {self.decomposition}")
        for name, tensor in self.tensors().items():
            if tensor.dim() != 4:
                raise ValueError(f"{kind}: {name} is {list(tensor.shape)}, expected four dimensions")
        check_tensors(kind, self.tensors(), self.expected(self.shape, self.settings()))
        for name, tensor in self.tensors().items():
            if tensor.device.type != "cpu":
                raise ValueError(f"{kind}: {name} is on {tensor.device}, expected the CPU")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{kind}: {name} holds NaN or Inf, expected finite values")

    @property
    def kernel_size(self) -> tuple[int, int]:
        if self.core is not None:
            return self.core.shape[2], self.core.shape[3]
        return self.down.shape[2], max(self.down.shape[3], self.up.shape[3])

    @property
    def ranks(self) -> Ranks:
        """(r,), or (r_in, r_out) of tucker."""
        return (len(self.down),) if self.core is None else (len(self.down), len(self.core))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.up), self.down.shape[1] * prod(self.kernel_size)

    @property
    def shape4(self) -> Shape4:
        """(n, c, kh, kw) of the dense weight."""
        return len(self.up), self.down.shape[1], *self.kernel_size

    def factors(self) -> tuple[Tensor, ...]:
        """The weights of the convolutions, in the order in which they run."""
        return (self.down, self.up) if self.core is None else (self.down, self.core, self.up)

    def decompress(self) -> Tensor:
        """float32 [n, k]."""
        return composed(self.factors()).flatten(1)

    # --- stored form ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names that it has below the layer's."""
        return dict(zip(("down", "up") if self.core is None else ("down", "core", "up"), self.factors(), strict=True))

    def settings(self) -> dict[str, Any]:
        """The rest, for JSON."""
        rest = {"decomposition": self.decomposition, "kernel_size": list(self.kernel_size)}
        return {**rest, "rank": self.ranks[0]} if self.core is None else {**rest, "ranks": list(self.ranks)}

    @classmethod
    def expected(cls, shape: tuple[int, int], settings: Mapping[str, object]) -> Expected:
        """Shape and dtype of each of the :meth:`tensors` of a weight [n, k] with these settings; allocates nothing.

        Raises:
            ValueError: a setting that is missing, unknown, of the wrong type or out of range, or an impossible shape.
        """
        n, k = matrix_shape(cls.__name__, shape)
        decomposition, kernel = settings.get("decomposition"), settings.get("kernel_size")
        if not isinstance(decomposition, str) or decomposition not in DECOMPOSITIONS:
            raise ValueError(f"{cls.__name__}: decomposition is {decomposition!r}, expected one of {DECOMPOSITIONS}")
        rank = "ranks" if decomposition == "tucker" else "rank"
        if set(settings) != {"decomposition", "kernel_size", rank}:
            names = ["decomposition", "kernel_size", rank]
            raise ValueError(f"{cls.__name__}: the settings are {list(settings)}, expected {names}")
        height, width = _pair(cls.__name__, "kernel_size", kernel, MAX_STEP)
        if k % (height * width):
            raise ValueError(f"{cls.__name__}: kernel_size is {height}x{width}, expected a divisor of k = {k}")
        shape4 = (n, k // (height * width), height, width)
        found = settings[rank]
        ranks = _pair(cls.__name__, rank, found, n * k) if decomposition == "tucker" else (found,)
        limits = largest_ranks(decomposition, shape4)
        if not all(type(r) is int and 1 <= r <= most for r, most in zip(ranks, limits, strict=True)):
            most = " and ".join(map(str, limits))
            raise ValueError(f"{cls.__name__}: {rank} is {found!r}, expected 1 to {most} for a weight {list(shape4)}")
        return {name: (size, torch.float32) for name, size in factor_shapes(decomposition, shape4, ranks).items()}  # type: ignore[arg-type]

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], settings: Mapping[str, object]
    ) -> LowRankConv2dWeight:
        """The inverse of :meth:`tensors` and :meth:`settings`. Raises ValueError where anything does not fit."""
        check_tensors(cls.__name__, tensors, cls.expected(shape, settings))
        return cls(str(settings["decomposition"]), tensors["down"], tensors["up"], tensors.get("core"))


def _pair(kind: str, name: str, value: object, most: int) -> tuple[int, int]:
    sizes = (
        [size for size in value if type(size) is int and 1 <= size <= most] if isinstance(value, list | tuple) else []
    )
    if len(sizes) != 2 or not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{kind}: {name} is {value!r}, expected two numbers from 1 to {most}")
    return sizes[0], sizes[1]


# --- sizes --------------------------------------------------------------------------------------------------------------


def factor_shapes(decomposition: str, shape: Shape4, ranks: Ranks) -> dict[str, Shape4]:
    """Of each factor of a weight (n, c, kh, kw), in the order in which they run."""
    n, c, height, width = shape
    if decomposition == "tucker":
        r_in, r_out = ranks
        return {"down": (r_in, c, 1, 1), "core": (r_out, r_in, height, width), "up": (n, r_out, 1, 1)}
    (r,) = ranks
    if decomposition == "spatial":
        return {"down": (r, c, height, 1), "up": (n, r, 1, width)}
    return {"down": (r, c, height, width), "up": (n, r, 1, 1)}


def largest_ranks(decomposition: str, shape: Shape4) -> Ranks:
    """Those with which any weight (n, c, kh, kw) is reproduced."""
    n, c, height, width = shape
    if decomposition == "tucker":
        return min(c, n * height * width), min(n, c * height * width)
    if decomposition == "spatial":
        return (min(c * height, n * width),)
    return (min(c * height * width, n),)


def multiply_adds(decomposition: str, shape: Shape4, ranks: Ranks, stride: tuple[int, int]) -> int:
    """For one position of the result. What runs before a stride runs at all positions that the stride leaves out, too."""
    down, *core, up = (prod(size) for size in factor_shapes(decomposition, shape, ranks).values())
    repeated = {"channel": 1, "spatial": stride[1], "tucker": stride[0] * stride[1]}[decomposition]
    return down * repeated + sum(core) + up


def cost(decomposition: str, shape: Shape4, ranks: Ranks, stride: tuple[int, int]) -> float:
    """Estimated time, in multiples of the dense convolution's."""
    return multiply_adds(decomposition, shape, ranks, stride) / EFFICIENCY[decomposition] / prod(shape)


def share_of_bytes(decomposition: str, shape: Shape4, ranks: Ranks) -> float:
    """Bytes of the factors, in multiples of the dense weight's."""
    return sum(prod(size) for size in factor_shapes(decomposition, shape, ranks).values()) / prod(shape)


# --- decompositions -----------------------------------------------------------------------------------------------------


def composed(factors: tuple[Tensor, ...]) -> Tensor:
    """The dense weight [n, c, kh, kw] of a chain of convolutions."""
    down, *core, up = factors
    if core:
        return torch.einsum("no,oiyx,ic->ncyx", up.flatten(1), core[0], down.flatten(1))
    return torch.einsum("nrx,rcyz->ncyxz", up[:, :, 0], down).flatten(3)


def channel(weight: Tensor, split: Split) -> LowRankConv2dWeight:
    """weight [n, c, kh, kw]; split sees it as [n, c kh kw], an input of which is a patch."""
    n, _, height, width = weight.shape
    down, up = split(weight.flatten(1))
    return LowRankConv2dWeight("channel", down.reshape(len(down), -1, height, width), up.reshape(n, -1, 1, 1))


def spatial(weight: Tensor, split: Split) -> LowRankConv2dWeight:
    """weight [n, c, kh, kw]; split sees it as [n kw, c kh]: output channel and column against input channel and row."""
    n, c, height, width = weight.shape
    down, up = split(weight.permute(0, 3, 1, 2).reshape(n * width, c * height))
    rows = up.reshape(n, width, -1).transpose(1, 2).contiguous()
    return LowRankConv2dWeight("spatial", down.reshape(-1, c, height, 1), rows.reshape(n, -1, 1, width))


def tucker(weight: Tensor, ranks: tuple[int, int]) -> LowRankConv2dWeight:
    """Tucker-2 in float64: the weight's projection on r_in directions of its input and r_out of its output channels.

    The directions start as those that hold most of the weight each on its own (HOSVD), which loses at most the sum of what either
    leaves out, and at most twice as many squares as the best ones would (De Lathauwer et al. 2000). Each round of HOOI then takes
    the best ones of one side for those of the other, so it never loses more than before.

    Args:
        weight: float32 [n, c, kh, kw].
        ranks: (r_in, r_out), from 1 to c and to n.
    """
    w, (r_in, r_out) = weight.double(), ranks
    u_in, u_out = _directions(w, 1, r_in), _directions(w, 0, r_out)
    total, held = float(w.square().sum()), 0.0
    for _ in range(HOOI_ROUNDS):
        u_in = _directions(torch.einsum("ncyx,no->ocyx", w, u_out), 1, r_in)
        narrow = torch.einsum("ncyx,ci->niyx", w, u_in)
        u_out = _directions(narrow, 0, r_out)
        before, held = held, float(torch.einsum("niyx,no->oiyx", narrow, u_out).square().sum())
        if held - before <= HOOI_GAIN * total:
            break
    core = torch.einsum("ncyx,ci,no->oiyx", w, u_in, u_out)
    down, up = u_in.T[..., None, None], u_out[..., None, None]
    return LowRankConv2dWeight("tucker", *(factor.float().contiguous() for factor in (down, up, core)))


def tucker_ranks(weight: Tensor, lost: float, stride: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """The cheapest (r_in, r_out) with which :func:`tucker` loses at most this share of the squares of the weight.

    HOSVD loses at most the sum of what the two sides leave out, so every pair whose sum is small enough will do.
    """
    shape = (weight.shape[0], weight.shape[1], weight.shape[2], weight.shape[3])
    w = weight.double()
    # [r]: what r directions of a side leave out. A little more than `lost` for the rounding of the spectrum itself.
    tails = [_tails(_spectrum(w, dim)) for dim in (1, 0)]
    budget = (lost + 1e-13) * float(w.square().sum())
    best: tuple[int, tuple[int, int]] | None = None
    for r_in in range(1, len(tails[0])):
        fits = (tails[0][r_in] + tails[1][1:] <= budget).nonzero()
        if len(fits):
            pair = (r_in, 1 + int(fits[0]))
            best = min(filter(None, (best, (multiply_adds("tucker", shape, pair, stride), pair))))
    return largest_ranks("tucker", shape) if best is None else best[1]  # type: ignore[return-value]


def _unfolded(w: Tensor, dim: int) -> Tensor:
    return w.movedim(dim, 0).flatten(1)


def _directions(w: Tensor, dim: int, rank: int) -> Tensor:
    """float64 [size of the dimension, rank]: the orthonormal directions that hold most of w."""
    matrix = _unfolded(w, dim)
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T)[1]
    return vectors[:, -rank:].flip(1)


def _spectrum(w: Tensor, dim: int) -> Tensor:
    """The squared singular values of w, unfolded along a dimension, descending."""
    matrix = _unfolded(w, dim)
    squares: Tensor = torch.linalg.eigvalsh(matrix @ matrix.T)
    return squares.clamp(min=0).flip(0)


def _tails(squares: Tensor) -> Tensor:
    """[r]: the sum of all squares but the first r; as many and one entries."""
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
