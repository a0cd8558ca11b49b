"""``Int8RecurrentWeight``: the matrices of a recurrent layer, a canonical int8 weight each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pycompress.weights.int8 import Int8Weight
from pycompress.weights.rules import one_of
from pycompress.weights.weight import Expected, Setting, Settings, Shape, Tensors, Weight, check_tensors

if TYPE_CHECKING:
    from typing_extensions import Self

GATES = {"lstm": 4, "gru": 3}
MAX_SIZE = 1 << 24


class Matrix(NamedTuple):
    """One matrix of a recurrent layer.

    Attributes:
        name: as torch calls it, without ``weight_``: ``ih_l0``, ``hh_l0_reverse``.
        n, k: its shape: gates * hidden_size, and what it meets.
        start: its first row where all matrices stand one below another.
    """

    name: str
    n: int
    k: int
    start: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.n)


@cache
def matrices(cell: str, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool) -> tuple[Matrix, ...]:
    """Those of a layer, in torch's order: of each layer and direction the input's and the hidden state's."""
    found, start, n = [], 0, GATES[cell] * hidden_size
    directions = ("", "_reverse") if bidirectional else ("",)
    for layer in range(num_layers):
        k = input_size if layer == 0 else hidden_size * len(directions)
        for direction in directions:
            for name, width in (("ih", k), ("hh", hidden_size)):
                found.append(Matrix(f"{name}_l{layer}{direction}", n, width, start))
                start += n
    return tuple(found)


def whole_shape(of: tuple[Matrix, ...]) -> Shape:
    """(n, k) of all matrices, one below another, as wide as the widest."""
    return of[-1].start + of[-1].n, max(matrix.k for matrix in of)


def stacked(parts: list[Tensor], k: int) -> Tensor:
    """Matrices [n, up to k] one below another: [sum of n, k], zeros where they are narrower."""
    return torch.cat([pad(part, (0, k - part.shape[1])) for part in parts])


def _size(value: object, _shape: Shape, _settings: Settings) -> str:
    return "" if type(value) is int and 1 <= value <= MAX_SIZE else f"a number from 1 to {MAX_SIZE}"


def _from_settings(settings: Settings) -> tuple[Matrix, ...]:
    names = ("cell", "input_size", "hidden_size", "num_layers", "bidirectional")
    return matrices(*(settings[name] for name in names))


@dataclass(frozen=True, eq=False, repr=False)
class Int8RecurrentWeight(Weight):
    """The canonical int8 weight of an LSTM or a GRU. Its [n, k] are all matrices, one below another, as wide as the widest.

    Attributes:
        cell: ``lstm`` or ``gru``.
        input_size, hidden_size, num_layers, bidirectional: which matrices there are (:func:`matrices`).
        parts_of: an :class:`Int8Weight` for each of them, dynamic, all with the same bits.
    """

    name: ClassVar[str] = "int8"  # which the weight of a linear layer has in the table
    fields: ClassVar[tuple[Any, ...]] = ()
    options: ClassVar[tuple[Setting, ...]] = (
        Setting("cell", one_of(*GATES)),
        Setting("input_size", _size),
        Setting("hidden_size", _size),
        Setting("num_layers", _size),
        Setting("bidirectional", one_of(False, True)),
        Setting("activation_bits", one_of(7, 8)),
        Setting("weight_bits", one_of(7, 8)),
    )

    cell: str
    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    parts_of: tuple[Int8Weight, ...]

    def __post_init__(self) -> None:
        kind = type(self).__name__
        found, expected = {(p.activation_bits, p.weight_bits, p.static) for p in self.parts_of}, len(self.matrices)
        if len(self.parts_of) != expected or len(found) != 1 or next(iter(found))[2]:
            raise ValueError(
                f"{kind}: there are {len(self.parts_of)} weights with (activation_bits, weight_bits, static) of "
                f"{sorted(found, key=str)}, expected {expected}, all dynamic and alike"
            )
        check_tensors(kind, self.tensors(), self.expected(self.shape, self.settings()))

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Which matrix each of the weights is."""
        return matrices(self.cell, self.input_size, self.hidden_size, self.num_layers, self.bidirectional)

    @property
    def activation_bits(self) -> int:
        return self.parts_of[0].activation_bits

    @property
    def weight_bits(self) -> int:
        return self.parts_of[0].weight_bits

    @property
    def shape(self) -> Shape:
        return whole_shape(self.matrices)

    def decompress(self) -> Tensor:
        """float32 [n, k]."""
        return stacked([part.decompress() for part in self.parts_of], self.shape[1])

    def __getitem__(self, name: str) -> Int8Weight:
        """The weight of one matrix, e.g. ``weight["hh_l0"]``."""
        for matrix, part in zip(self.matrices, self.parts_of, strict=True):
            if matrix.name == name:
                return part
        raise KeyError(name)

    @classmethod
    def options_of_shape(cls) -> tuple[str, ...]:
        """The settings that say which matrices there are."""
        return tuple(option.name for option in cls.options if not option.name.endswith("_bits"))

    # --- what it is made of ---------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Tensor]:
        """Its tensors, behind the names of the matrices."""
        return {
            f"{matrix.name}_{name}": tensor
            for matrix, part in zip(self.matrices, self.parts_of, strict=True)
            for name, tensor in part.parts().items()
        }

    def tensors(self) -> dict[str, Tensor]:
        return {f"{self.name}_{name}": tensor for name, tensor in self.parts().items()}

    @classmethod
    def names(cls, settings: Settings) -> dict[str, str]:
        parts = (f"{matrix.name}_{name}" for matrix in _from_settings(settings) for name in ("values", "scale"))
        return {part: f"{cls.name}_{part}" for part in parts}

    @classmethod
    def expected(cls, shape: Shape, settings: Settings) -> Expected:
        settings = cls.complete(shape, settings)
        of = _from_settings(settings)
        if tuple(shape) != whole_shape(of):
            raise ValueError(
                f"{cls.__name__}: the shape is {list(shape)}, expected {list(whole_shape(of))} as the settings say"
            )
        found: Expected = {}
        for matrix in of:
            found[f"{cls.name}_{matrix.name}_values"] = (matrix.n, matrix.k), torch.int8
            found[f"{cls.name}_{matrix.name}_scale"] = (matrix.n,), torch.float32
        return found

    @classmethod
    def from_tensors(cls, shape: Shape, tensors: Tensors, settings: Settings) -> Self:
        check_tensors(cls.__name__, tensors, cls.expected(shape, settings))
        rest = dict(cls.complete(shape, settings))
        bits = rest.pop("activation_bits"), rest.pop("weight_bits")

        def part(name: str) -> Int8Weight:
            return Int8Weight(tensors[f"{cls.name}_{name}_values"], tensors[f"{cls.name}_{name}_scale"], *bits)

        return cls(**rest, parts_of=tuple(part(matrix.name) for matrix in _from_settings(settings)))

    @classmethod
    def measured(cls, tensors: Mapping[str, Tensor], settings: Settings) -> dict[str, Any]:  # noqa: ARG003
        return dict(settings)  # nothing follows from the tensors
