"""``nn.LSTM`` and ``nn.GRU``: two matrices for each layer and direction; one meets the input, one what came out a step before.

Their [n, k] is that of all matrices one below another, as wide as the widest (:mod:`pycompress.weights.recurrent`).
"""

# ruff: noqa: ARG002, ARG003 - a kind that is asked what all are asked may not need all of it

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pycompress.kinds.kind import Kind
from pycompress.methods.method import Method, RecurrentMethod
from pycompress.weights.recurrent import MAX_SIZE, Matrix, matrices, stacked, whole_shape


@dataclass(frozen=True)
class RecurrentGeometry:
    """The arguments of an ``nn.LSTM`` or ``nn.GRU``.

    Attributes:
        input_size, hidden_size, num_layers: from 1.
        batch_first: inputs are [batch, steps, input_size], not [steps, batch, input_size].
        bidirectional: a second direction walks the steps from the last one on.
        dropout: between layers in training; two geometries that differ in nothing else are equal.
    Raises:
        ValueError: anything else.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    batch_first: bool = False
    bidirectional: bool = False
    dropout: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size", "num_layers"):
            if type(value := getattr(self, name)) is not int or not 1 <= value <= MAX_SIZE:
                raise ValueError(f"RecurrentGeometry: {name} is {value!r}, expected a number from 1 to {MAX_SIZE}")
        for name in ("batch_first", "bidirectional"):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"RecurrentGeometry: {name} is {value!r}, expected True or False")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout <= 1:
            raise ValueError(f"RecurrentGeometry: dropout is {self.dropout!r}, expected a number from 0 to 1")

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def matrices(self, cell: str) -> tuple[Matrix, ...]:
        """Those of an ``lstm`` or a ``gru``."""
        return matrices(cell, self.input_size, self.hidden_size, self.num_layers, self.bidirectional)

    def __str__(self) -> str:
        defaults = {"num_layers": 1, "batch_first": False, "bidirectional": False, "dropout": 0}
        values = {name: value for name, value in self.settings().items() if value != defaults.get(name)}
        return ", ".join(f"{name}={value}" for name, value in values.items())

    def settings(self) -> dict[str, Any]:
        """For JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_settings(cls, k: int, settings: Mapping[str, Any]) -> RecurrentGeometry:
        """The inverse of :meth:`settings`. Raises ValueError where anything does not fit."""
        names = [one.name for one in fields(cls)]
        if set(settings) != set(names):
            raise ValueError(f"RecurrentGeometry: the settings are {list(settings)}, expected {names}")
        return cls(**settings)


class Recurrent(Kind):
    """Sequences [steps, batch, input_size] (or batch first, unbatched, packed) -> the hidden states, and the last ones.

    Attributes:
        cell: what the kernels and files call it.
    """

    cell: ClassVar[str]
    geometry_type = RecurrentGeometry
    dims, epilogue, shares = 2, False, False
    recurrent = True
    no_rows = "half of what its matrices meet is its own"

    def misfit(self, module: nn.Module) -> str:
        """Why no compressed layer could take this module, whatever its weight, or ''."""
        if reason := super().misfit(module):
            return reason
        assert isinstance(module, nn.RNNBase)
        if module.proj_size:
            return f"proj_size is {module.proj_size}, expected 0"
        return ""

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        return list(module.parameters(recurse=False))

    def parameter(self, module: nn.Module) -> nn.Parameter | None:
        return module._parameters.get("weight_ih_l0")

    def stored(self, module: nn.Module) -> Tensor:
        """The first of its matrices: for dtype and device, which are those of all."""
        weight: Tensor = module.weight_ih_l0  # type: ignore[assignment]
        return weight

    def tensors(self, module: nn.Module) -> dict[str, Tensor | None]:
        return {name: getattr(module, name) for name in module._flat_weights_names}  # type: ignore[union-attr]

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return whole_shape(self._matrices(module))

    def _matrices(self, module: nn.Module) -> tuple[Matrix, ...]:
        return self.geometry(module).matrices(self.cell)

    def matrix(self, module: nn.Module) -> Tensor:
        of = self._matrices(module)
        return stacked([getattr(module, f"weight_{one.name}").detach() for one in of], whole_shape(of)[1])

    def bias(self, module: nn.Module) -> Tensor | None:
        """One number for each row of each matrix: [n]."""
        if not module.bias:
            return None
        return torch.cat([getattr(module, f"bias_{one.name}").detach() for one in self._matrices(module)])

    def geometry(self, module: nn.Module) -> RecurrentGeometry:
        assert isinstance(module, nn.RNNBase)
        return RecurrentGeometry(*(getattr(module, one.name) for one in fields(RecurrentGeometry)))

    def fitted(self, method: Method, module: nn.Module) -> Method:
        if not isinstance(method, RecurrentMethod):
            return method
        own = self.geometry(module)
        return method.for_recurrent(self.cell, own.input_size, own.hidden_size, own.num_layers, own.bidirectional)

    def weight_shape(self, n: int, k: int, geometry: RecurrentGeometry) -> tuple[int, ...]:
        first = geometry.matrices(self.cell)[0]
        return first.n, first.k

    def count(self, n: int, k: int, geometry: RecurrentGeometry) -> int:
        return sum(one.n * one.k for one in geometry.matrices(self.cell))

    def attributes(self, n: int, k: int, geometry: RecurrentGeometry) -> dict[str, Any]:
        return {**geometry.settings(), "mode": self.cell.upper(), "proj_size": 0}

    def describe(self, n: int, k: int, geometry: RecurrentGeometry) -> str:
        return str(geometry)

    def has_rows(self, module: nn.Module) -> bool:
        """Its matrices meet different rows, half of them such as only the layer itself sees."""
        return False

    def input_of(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
        """Without the initial state; of a packed one, sequences that are all as long as the longest."""
        x = args[0] if args else keywords["input"]
        if not isinstance(x, PackedSequence):
            return x  # type: ignore[no-any-return]
        return x.data.new_empty((len(x.batch_sizes), int(x.batch_sizes[0]), x.data.shape[1]))

    def sizes(self, n: int, k: int, geometry: RecurrentGeometry) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
        """Steps first, whatever ``batch_first`` says."""
        width = geometry.hidden_size * geometry.directions
        return ("steps", "batch", geometry.input_size), ("steps", "batch", width)


class Lstm(Recurrent):
    """Gates i, f, g, o, and a cell state beside the hidden one."""

    name, cell, dense = "lstm", "lstm", nn.LSTM
    phrase, plural = "an LSTM", "LSTMs"


class Gru(Recurrent):
    """Gates r, z, n."""

    name, cell, dense = "gru", "gru", nn.GRU
    phrase, plural = "a GRU", "GRUs"
