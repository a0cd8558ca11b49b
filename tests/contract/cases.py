"""What the promises are shown on: for each row of the table of layers some ways of making one, and an input.

A row that has no variants here has one, of its layer's ``default_method``: a new weight is tested by being in the table, a new kind
of layer by that and one line in ``kinds.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract.kinds import DENSE, LEADS, SIZES, K, N
from pycompress import ops
from pycompress.kinds import Kind
from pycompress.methods import Dense, Int4, Int8, Known, LowRank, Sparse
from pycompress.methods.method import Method
from pycompress.nn import LAYERS, CompressedLayer
from pycompress.nn.factors import FactorsLayer

State = dict[str, Any]
Same = Callable[[Tensor, Tensor], bool]
Forked = Callable[..., Any]

# --- how they are compressed ----------------------------------------------------------------------------------------------


def low_rank(rank: int = 6, bits: int = 32, residual: Method | None = None, **options: Any) -> LowRank:
    return LowRank(rank, bits=bits, residual=residual, rank_guard=False, **options)


VARIANTS: dict[tuple[str, str], dict[str, Method]] = {
    ("linear", "int8"): {
        "8": Int8(),
        "7": Int8(7, 7),
        "a7": Int8(7),
        "a16": Int8(16),
        "static": Int8(activation="static", observer=Known(-3.0, 2.5)),
        "static a7": Int8(7, activation="static", observer=Known(-0.25, 1.0)),
    },
    ("linear", "int4"): {
        "g32": Int4(),
        "g64 symmetric": Int4(64, symmetric=True),
        "g128": Int4(128),
        "g32 a16": Int4(activation_bits=16),
        "g128 symmetric a16": Int4(128, symmetric=True, activation_bits=16),
    },
    ("linear", "sparse"): {
        "float32": Sparse(0.25),
        "int8": Sparse(0.25, bits=8, activation_bits=8),
        "int8 a7": Sparse(0.25, bits=8),
        "16x1": Sparse(0.25, "16x1"),
        "16x4": Sparse(0.25, "16x4", bits=8),
        "16x16": Sparse(0.5, "16x16"),
        "16x16 int8": Sparse(0.5, "16x16", bits=8),
        "32x32": Sparse(0.5, "32x32", bits=8),
        "4:16": Sparse(pattern="4:16", bits=8),
        "density 0": Sparse(0.0),
        "density 0 int8": Sparse(0.0, bits=8),
        "density 1": Sparse(1.0),
        "density 1 int8": Sparse(1.0, bits=8),
        "one weight": Sparse(1 / (N * K)),
        "rows without weights": Sparse.from_mask((torch.arange(N) % 3 == 1)[:, None].expand(N, K)),
    },
    ("linear", "low_rank"): {
        "float32": low_rank(),
        "int8": low_rank(bits=8),
        "int8 a8": low_rank(bits=8, activation_bits=8),
        "rank 1": low_rank(1),
        "the whole rank": low_rank(N),
        "float32 + int8": low_rank(residual=Int8()),
        "float32 + int4": low_rank(residual=Int4()),
        "float32 + sparse": low_rank(residual=Sparse(0.2)),
        "float32 + dense": low_rank(residual=Dense()),
        "float32 + sparse int8": low_rank(residual=Sparse(0.2, bits=8)),
        "int8 + int8": low_rank(bits=8, residual=Int8(activation_bits=7)),
        "int8 + int4": low_rank(bits=8, residual=Int4(64, symmetric=True)),
        "int8 + sparse int8": low_rank(bits=8, residual=Sparse(0.2, "16x4", bits=8)),
        "int8 + sparse": low_rank(bits=8, residual=Sparse(0.2)),
        "int8 + dense": low_rank(bits=8, residual=Dense()),
        "a residual of nothing": low_rank(residual=Sparse(0.0)),
        "rank 2 + int4": low_rank(2, residual=Int4()),
        "int8 rank 2 + int8": low_rank(2, bits=8, residual=Int8(activation_bits=7)),
        "int8 rank 9 + nothing": low_rank(9, bits=8, residual=Sparse(0.0, bits=8)),
    },
    ("conv2d", "int8"): {
        "8": Int8(),
        "7": Int8(7, 7),
        "static": Int8(activation="static", observer=Known(-3.0, 2.5)),
    },
    ("conv1d", "int8"): {"8": Int8(), "static": Int8(7, activation="static", observer=Known(-3.0, 2.5))},
    ("conv1d", "sparse"): {"float32": Sparse(0.3), "density 0": Sparse(0.0)},
    ("conv2d", "sparse"): {"float32": Sparse(0.3), "16x1": Sparse(0.3, "16x1"), "density 0": Sparse(0.0)},
    ("conv2d", "low_rank"): {
        "channel": low_rank(4, decomposition="channel"),
        "spatial": low_rank(4, decomposition="spatial"),
        "tucker": low_rank(4, decomposition="tucker"),
        "channel rank 2": low_rank(2, decomposition="channel"),
        "spatial rank 7": low_rank(7, decomposition="spatial"),
        "tucker rank 2": low_rank(2, decomposition="tucker"),
    },
    ("embedding", "int8"): {"8": Int8(embeddings=True), "7": Int8(16, 7, embeddings=True)},
    ("embedding", "low_rank"): {"rank 4": low_rank(4, embeddings=True), "rank 12": low_rank(12, embeddings=True)},
}


@dataclass(frozen=True)
class Case:
    """A row of the table, and how one of its layers is made."""

    layer_type: type[CompressedLayer]
    variant: str
    method: Method
    make: Callable[[bool], nn.Module]

    def __repr__(self) -> str:
        return f"{self.kind.name} {self.layer_type.weight_type.name}: {self.variant}"

    @property
    def kind(self) -> Kind:
        return self.layer_type.kind

    @property
    def runs_in_torch(self) -> bool:
        """Whether torch's own operators compute it: their sums may be made in another order for other strides or batches."""
        return issubclass(self.layer_type, FactorsLayer)

    @property
    def activations(self) -> list[str]:
        return list(ops.ACTIVATIONS) if self.kind.epilogue else ["none"]

    @property
    def leads(self) -> list[tuple[int, ...]]:
        return LEADS.get(self.kind.name, [(3,)])

    def dense(self, *, bias: bool = True) -> nn.Module:
        return self.make(bias)

    def layer(self, activation: str = "none", *, bias: bool = True) -> Any:
        """Of a new dense layer each time, so any attribute may be read of it; an activation where the kind takes one."""
        activation = activation if self.kind.epilogue else "none"
        return self.layer_type.from_dense(self.dense(bias=bias), self.method, activation)

    def twin(self, layer: Any, activation: str | None = None) -> Any:
        """Another layer with the weight of one."""
        activation = layer.activation if activation is None else activation
        return self.layer_type.build(layer.canonical(), layer.geometry, layer.bias, activation)

    def item(self, module: nn.Module | None = None) -> tuple[int, ...]:
        """The shape of one item of an input."""
        module = self.dense() if module is None else module
        geometry = self.kind.geometry(module)
        sizes = self.kind.sizes(*self.kind.shape(module), geometry)[0]
        return tuple(size if isinstance(size, int) else SIZES.get(size, 4) for size in sizes[1:])

    def x(self, *lead: int, module: nn.Module | None = None) -> Tensor:
        """A random input: [*lead, *item]; three items where no ``lead`` is given."""
        module = self.dense() if module is None else module
        dims = self.item(module) if self.kind.dims else ()
        like = torch.empty((*(lead or (3,)), *dims), dtype=torch.int64 if self.kind.tokens else torch.float32)
        return self.kind.sample(module, like)

    def given(self, lead: tuple[int, ...]) -> Tensor:
        """An input with these dimensions in front of its item, none too."""
        return self.x(*lead) if lead else self.x(1)[0]

    def as_dense(self, layer: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The dense layer with the weight, and the bias, of a compressed one."""
        dense = self.dense(bias=layer.bias is not None)
        with torch.no_grad():
            stored = self.kind.stored(dense)
            stored.copy_(layer.canonical().decompress().view(stored.shape))
            if layer.bias is not None:
                dense.bias.copy_(layer.bias)  # type: ignore[operator, union-attr]
        return dense.to(dtype)


def cases(table: Mapping[tuple[str, str], type[CompressedLayer]] = LAYERS) -> list[Case]:
    """All variants of all rows but recurrent layers', whose promises are in test_recurrent.py. Raises KeyError for a kind that has
    no dense layer here."""
    found = []
    for row, layer_type in table.items():
        if layer_type.kind.recurrent:
            continue
        variants = VARIANTS.get(row) or {"by default": layer_type.default_method}
        found += [Case(layer_type, name, method, DENSE[row[0]]) for name, method in variants.items()]
    return found


CASES = cases()
ROWS = list({case.layer_type: case for case in reversed(CASES)}.values())[::-1]  # the first variant of each
FLOATS = [case for case in CASES if not case.kind.tokens]


def over(chosen: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", chosen, ids=repr)


EVERY, EACH_ROW, EVERY_FLOAT = over(CASES), over(ROWS), over(FLOATS)
EACH_FLOAT_ROW = over([case for case in ROWS if not case.kind.tokens])

# --- what two layers have in common ---------------------------------------------------------------------------------------


def state(module: nn.Module) -> dict[str, Tensor]:
    """Everything that decides what a layer computes."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def equal_states(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def equal_weights(a: Any, b: Any) -> bool:
    same = type(a) is type(b) and a.settings() == b.settings() and a.shape == b.shape
    return same and equal_states(a.tensors(), b.tensors())
