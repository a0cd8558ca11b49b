"""What the rest of the package knows of a compression method, and of the canonical weight that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from pycompress.methods.inputs import InputStatistics
from pycompress.ops import MAX_IN_FEATURES

Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name of a stored tensor -> its shape and dtype


class Refused(ValueError):  # noqa: N818 - not a mistake of the caller's: an answer
    """A method declines a weight and says why: ``compress`` keeps that layer dense, with the reason in its summary."""


class Weight(Protocol):
    """A canonical weight [n, k]: what is saved, exported and compared; independent of any processor.

    It is the tensors of :meth:`tensors` and the values of :meth:`settings`, nothing else; whoever makes one checks all of it.
    """

    name: ClassVar[str]  # of the method, in plans, files and summaries

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k) of the dense weight."""

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names that it has below the layer's; scales per output channel are ``weight_scale``."""

    def settings(self) -> dict[str, Any]:
        """The rest, for JSON: numbers, strings and dictionaries of them."""

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
        """Floating point [n, k] -> canonical weight. Raises :class:`Refused` for a weight that it would not make better."""


@runtime_checkable
class LayersMethod(Protocol):
    """A method that looks at the weights of all its layers before it compresses one."""

    def for_layers(self, weights: list[Tensor]) -> Sequence[Method]:
        """One method for each weight [n, k]."""


@runtime_checkable
class CalibratedMethod(Protocol):
    """A method that makes use of what a layer's inputs look like."""

    def with_inputs(self, statistics: InputStatistics) -> Method:
        """The method for the layer that met these inputs."""


@runtime_checkable
class ConvolutionMethod(Protocol):
    """A method to which a convolution is more than its matrix [n, k]."""

    def for_convolution(self, shape: tuple[int, int, int, int], stride: tuple[int, int]) -> Method:
        """The method for a convolution with a weight [n, channels, height, width]; it too is given the matrix [n, k]."""


@runtime_checkable
class SelectiveMethod(Protocol):
    """A method that says which kinds of layers it takes. Others take linear layers, and no convolutions."""

    def refuses(self, kind: str) -> str:
        """Why it cannot take layers of a kind, ``Linear``, ``Conv2d`` or ``Embedding``; '' where it can."""


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


def matrix_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(n, k), checked. Raises ValueError where it is no shape of a weight that a kernel takes."""
    n, k = shape
    if type(n) is not int or type(k) is not int or n < 1 or not 1 <= k <= MAX_IN_FEATURES:
        raise ValueError(f"{kind}: the shape is [{n!r}, {k!r}], expected [n > 0, 1 to {MAX_IN_FEATURES}]")
    return n, k


def finite_matrix(kind: str, weight: Tensor) -> Tensor:
    """float32 [n, k] on the CPU; the weight itself where it is that already.

    Raises:
        TypeError: not a floating-point matrix. ValueError: it holds NaN or Inf, is on the meta device, empty or too large.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"{kind}: the weight is {type(weight).__name__}, expected floating point [n, k]")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise TypeError(f"{kind}: the weight is {weight.dtype} {list(weight.shape)}, expected floating point [n, k]")
    matrix_shape(kind, tuple(weight.shape))
    if weight.is_meta:
        raise ValueError(f"{kind}: the weight {list(weight.shape)} is on the meta device, expected one with data")
    w = weight.detach().to("cpu", torch.float32)
    bad = int((~torch.isfinite(w)).sum())
    if bad:
        raise ValueError(f"{kind}: the weight {list(w.shape)} holds {bad} NaN or Inf, expected finite values")
    return w
