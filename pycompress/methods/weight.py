"""What the rest of the package knows of a compression method, and of the canonical weight that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name of a stored tensor -> its shape and dtype


class Weight(Protocol):
    """A canonical weight [n, k]: what is saved, exported and compared; independent of any processor.

    It is the tensors of :meth:`tensors` and the numbers of :meth:`settings`, nothing else; whoever makes one checks all of it.
    """

    name: ClassVar[str]  # of the method, in plans, files and summaries

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k) of the dense weight."""

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names that it has below the layer's; scales per output channel are ``weight_scale``."""

    def settings(self) -> dict[str, int]:
        """The rest, for JSON."""

    @classmethod
    def expected(cls, shape: tuple[int, int], settings: Mapping[str, object]) -> Expected:
        """What :meth:`tensors` of a weight [n, k] with these settings must hold; allocates nothing.

        Raises:
            ValueError: a setting that is missing, unknown, of the wrong type or out of range.
        """

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], settings: Mapping[str, object]
    ) -> Weight:
        """The inverse of :meth:`tensors` and :meth:`settings`. Raises ValueError where anything does not fit."""

    def decompress(self) -> Tensor:
        """float32 [n, k]."""


class Method(Protocol):
    """How to compress a weight; ``name`` is that of the weights that it makes."""

    name: ClassVar[str]

    def compress(self, weight: Tensor) -> Weight:
        """Floating point [n, k] -> canonical weight."""


@runtime_checkable
class LayersMethod(Protocol):
    """A method that looks at the weights of all its layers before it compresses one."""

    def for_layers(self, weights: list[Tensor]) -> Sequence[Method]:
        """One method for each weight [n, k]."""


@runtime_checkable
class SelectiveMethod(Protocol):
    """A method that says which kinds of layers it takes. Others take linear layers, and no convolutions."""

    def refuses(self, kind: str) -> str:
        """Why it cannot take layers of a kind, ``Linear`` or ``Conv2d``; '' where it can."""


def refusal(method: Method, kind: str) -> str:
    """Why a method cannot take layers of a kind, or ''."""
    if isinstance(method, SelectiveMethod):
        return method.refuses(kind)
    return "" if kind == "Linear" else f"{method.name} takes linear layers only"


def is_method(value: object) -> TypeGuard[Method]:
    """Whether a value is a method. The class of one is none."""
    named = isinstance(getattr(value, "name", None), str) and callable(getattr(value, "compress", None))
    return named and not isinstance(value, type)


def check_tensors(kind: str, tensors: Mapping[str, Tensor], expected: Expected) -> None:
    """Raises ValueError where the tensors are not those that are expected, by name, shape and dtype."""
    if set(tensors) != set(expected):
        raise ValueError(f"{kind}: the tensors are {list(tensors)}, expected {list(expected)}")
    for name, (shape, dtype) in expected.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise ValueError(f"{kind}: {name} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}")
