"""Weights for the ops: for each weight of ``pycompress.ops.OPS`` some ways of making one, and what there is to know about them.

A weight that has no variants here has one, of the method of a layer of its own: a new op is tested by being in the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from packing import Packed
from torch import Tensor

from pycompress import ops
from pycompress.nn import LAYERS
from pycompress.weights import DenseWeight, Int4Weight, Int8Weight, LowRankWeight, SparseWeight, Weight
from pycompress.weights.int4 import pack_nibbles
from pycompress.weights.int8 import range_tensors

Make = Callable[[int, int], Weight]  # (n, k)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EPS = float(torch.finfo(torch.float32).eps)

# --- random weights -----------------------------------------------------------------------------------------------------


def scales(n: int) -> Tensor:
    return torch.rand(n) / 127 + 1e-3


def integers(*shape: int, top: int = 127) -> Tensor:
    return torch.randint(-top, top + 1, shape, dtype=torch.int8)


def int8(n: int, k: int, bits: int = 8, input_range: tuple[float, int] | None = None) -> Int8Weight:
    return Int8Weight(integers(n, k), scales(n), bits, 8, *range_tensors(input_range))


def int4(n: int, k: int, group: int = 32, symmetric: bool = False, bits: int = 8) -> Int4Weight:
    groups = -(-k // group)
    values, scale = torch.randint(16, (n, k), dtype=torch.uint8), (torch.rand(n, groups) * 0.02 + 1e-3).bfloat16()
    zero_point = None if symmetric else pack_nibbles(torch.randint(16, (n, groups), dtype=torch.uint8))
    return Int4Weight(pack_nibbles(values), scale, zero_point, k, group, bits)


# The formats of sparse weights: the blocks that they are made for. Of a window of four positions two may stay.
FLOAT_FORMATS = {"rows": (1, 1), "panels": (16, 1)}
INT8_FORMATS = {"quads": (1, 1), "quads4": (1, 4), "windows": (1, 4), "chains": (16, 4)}
FORMATS = {**FLOAT_FORMATS, **INT8_FORMATS}


def kept(layout: str, n: int, k: int, density: float) -> Tensor:
    """bool [n, k]: random, in the pattern that the format is made for."""
    rows, columns = FORMATS[layout]
    if layout == "windows":
        windows = torch.rand(n, -(-k // columns), columns).argsort(-1) < min(2, density * columns)
        return windows.flatten(1)[:, :k]
    blocks = torch.rand(-(-n // rows), -(-k // columns)) < density
    return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:n, :k]


def canonical(dense: Tensor, activation_bits: int = 8) -> SparseWeight:
    """The sparse weight of a matrix, float32 or int8."""
    if dense.dtype == torch.float32:
        return SparseWeight.from_dense(dense)
    return SparseWeight.from_dense(dense, scales(len(dense)), activation_bits)


def sparse(n: int, k: int, layout: str = "rows", density: float = 0.3, activation_bits: int = 8) -> SparseWeight:
    signs = torch.randint(2, (n, k)) * 2 - 1
    dense = torch.randn(n, k) if layout in FLOAT_FORMATS else (torch.randint(1, 128, (n, k)) * signs).to(torch.int8)
    return canonical(dense * kept(layout, n, k, density), activation_bits)


# What stands beside the factors of a low-rank weight. An int8 residual quantizes x for half of the weights as the factors do.
RESIDUALS: dict[str, Make] = {
    "dense": lambda n, k: DenseWeight(torch.randn(n, k)),
    **{name: partial(sparse, layout=name, density=0.4) for name in FLOAT_FORMATS},
    "int8": lambda n, k: int8(n, k, 7 + n % 2),
    **{name: lambda n, k, name=name: sparse(n, k, name, 0.4, 7 + n % 2) for name in INT8_FORMATS},  # type: ignore[misc]
    "int4": int4,
    "int4 symmetric": partial(int4, group=128, symmetric=True),
}
# (n, k): rank; around the tile of 6 rows x 16 channels, the ends of the rank, odd sizes.
RANKS = {
    (1, 1): 1, (1, 40): 1, (40, 1): 1, (15, 33): 15, (16, 16): 16, (17, 31): 6, (33, 17): 17, (48, 130): 1, (65, 131): 33,
    (200, 300): 40,
}  # fmt: skip


def low_rank(n: int, k: int, bits: int = 32, residual: str = "", activation_bits: int = 7) -> LowRankWeight:
    rank = RANKS.get((n, k), min(n, k, 7))
    beside = RESIDUALS[residual](n, k) if residual else None
    if bits == 32:
        return LowRankWeight(torch.randn(rank, k), torch.randn(n, rank), residual=beside)
    return LowRankWeight(integers(rank, k), integers(n, rank), scales(rank), scales(n), activation_bits, beside)


# --- the cases ----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Make]] = {
    "int8": {
        **{str(bits): partial(int8, bits=bits) for bits in (8, 7, 16)},
        **{f"{bits} static": partial(int8, bits=bits, input_range=(0.03, 60)) for bits in (8, 7)},
    },
    "int4": {
        f"{group} {'symmetric ' * symmetric}a{bits}": partial(int4, group=group, symmetric=symmetric, bits=bits)
        for group, symmetric, bits in ((32, False, 8), (64, True, 8), (32, False, 16), (128, False, 16))
    },
    "sparse": {name: partial(sparse, layout=name, activation_bits=7 + i % 2) for i, name in enumerate(FORMATS)},
    "low_rank": {
        f"{bits} + {residual}".removesuffix(" + "): partial(low_rank, bits=bits, residual=residual)
        for bits in (32, 8) for residual in ("", *RESIDUALS)
    },
    "dense": {"dense": RESIDUALS["dense"]},
}  # fmt: skip
# Those on which a promise is shown that the registry keeps for all in the same way.
SOME = {
    "int8": ["8", "16", "8 static"],
    "int4": ["32 a8", "64 symmetric a8", "128 a16"],
    "sparse": ["rows", "quads"],
    "low_rank": ["32", "32 + dense", "32 + rows", "32 + int4", "8 + int8", "8 + quads", "8 + int4 symmetric"],
}
N, K = 24, 36


@dataclass(frozen=True)
class Case:
    """A weight of the table, and how one is made."""

    name: str
    variant: str
    weight: Make
    layout: str = ""

    def __repr__(self) -> str:
        return f"{self.name}: {self.variant}"

    @property
    def op(self) -> ops.Op:
        return ops.OPS[self.name]

    @property
    def in_torch(self) -> bool:
        """Computed by torch's own operators, which sum in an order of their own; its packed vector is the matrix alone."""
        return self.name == "dense"

    @property
    def backends(self) -> tuple[str, ...]:
        """Where there is a kernel for it, for a test that runs on each in turn, or on some."""
        return ("native", "twin") if self.layout in {"windows", "chains"} else ("native", "scalar", "twin")

    def pack(self, weight: Weight, /, **changes: Any) -> Packed:
        """changes: of the parts."""
        parts = {**weight.parts(), **changes}
        try:
            return ops.pack(self.name, parts, weight.shape, weight.settings(), layout=self.layout)
        except ValueError as error:
            if "no kernel that this processor runs" in str(error):
                pytest.skip(str(error))  # windows and chains, on the scalar kernels
            raise

    def made(self, n: int = N, k: int = K) -> tuple[Tensor, str, Tensor]:
        """A packed weight, its form, and a bias."""
        return *self.pack(self.weight(n, k)), torch.randn(n)

    def others(self, form: str) -> dict[str, Callable[[Tensor, Tensor, str], Any]]:
        """What else takes x [m, k] and a packed weight of this form."""
        if self.name == "low_rank":
            return {"low_rank_intermediate": ops.low_rank_intermediate}
        if self.name == "int8" and ops.parse(form).keys.get("activation_bits") != 16:
            return {
                "int8_accumulate": ops.int8_accumulate,
                "int8_quantize": lambda x, _packed, form: ops.int8_quantize(x, ops.parse(form).activation_bits),
            }
        return {"sparse_accumulate": ops.sparse_accumulate} if "bits=8 " in f"{form} " and self.name == "sparse" else {}


def _cases(name: str) -> list[Case]:
    if name not in VARIANTS:
        layers = [layer for layer in LAYERS.values() if layer.weight_type.name == name]
        return [
            Case(name, "by default", lambda n, k, method=layer.default_method: method.compress(torch.randn(n, k)))  # type: ignore[misc]
            for layer in layers[:1]
        ]
    return [
        Case(name, variant, make, next((word for word in variant.split() if word in FORMATS), ""))
        for variant, make in VARIANTS[name].items()
    ]


# For packing alone: each scheme of groups, and weights of which few, none or all are there.
FURTHER = [
    *(
        Case("int4", f"{scheme}", lambda n, k, scheme=scheme: int4(n, k, *scheme))  # type: ignore[misc]
        for scheme in itertools.product((32, 64, 128), (False, True), (8, 16))
    ),
    *(
        Case("sparse", f"{name} {share}", lambda n, k, name=name, share=share: sparse(n, k, name, share, 7), name)  # type: ignore[misc]
        for name, share in itertools.product(FORMATS, (0.0, 0.1, 0.5, 1.0))
    ),
]
CASES = [case for name in ops.OPS for case in _cases(name)]
FEW = [case for case in CASES if case.variant in SOME.get(case.name, case.variant)]
EACH = list({case.name: case for case in reversed(FEW)}.values())[::-1]  # the first of each


def over(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=repr)


def everywhere(test: Callable[..., None]) -> Any:
    """Runs a test, in whose file is the fixture ``packing.backend``, for each case on each backend."""
    return pytest.mark.usefixtures("backend")(over(CASES)(test))


def gathered(result: Any) -> list[Any]:
    """What a call gave, one by one."""
    return [result] if isinstance(result, Tensor) else list(result.values() if isinstance(result, dict) else result)


# --- what a weight is -----------------------------------------------------------------------------------------------------


def quantizes(weight: Weight) -> bool:
    """Whether all that meets x are integers: then a row's result has the same bits among any others."""
    residual = getattr(weight, "residual", None)
    own = weight.settings().get("activation_bits") in {7, 8}
    return own and (residual is None or quantizes(residual))


def quantizes_some(weight: Weight | None) -> bool:
    """Whether a row with NaN or Inf is quantized somewhere, so that its whole result is NaN."""
    if weight is None:
        return False
    return weight.settings().get("activation_bits") in {7, 8} or quantizes_some(getattr(weight, "residual", None))


def ideal(weight: Weight) -> tuple[Tensor, Tensor]:
    """The weight without a rounding, float64 [n, k], and the sum of the magnitudes that it is made of."""
    if not isinstance(weight, LowRankWeight):
        exact = weight.decompress().double()
        return exact, exact.abs()
    down, up = weight.down.double(), weight.up.double()
    if weight.down_scale is not None and weight.up_scale is not None:
        down, up = down * weight.down_scale.double()[:, None], up * weight.up_scale.double()[:, None]
    rest, size = (0, 0) if weight.residual is None else ideal(weight.residual)
    return up @ down + rest, up.abs() @ down.abs() + size


def gamma(count: int) -> float:
    """How far so many roundings to float32, one after the other, take a number from what it was, relatively."""
    return count * EPS / 2 / (1 - count * EPS / 2)
