"""What the rest of the package knows of a compression method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from pycompress.methods.inputs import PARTS, InputStatistics
from pycompress.weights import Weight
from pycompress.weights.rules import matrix_shape

NEEDS_CALIBRATION = "expected calibration=pc.calibrate(model, batches, plan=plan)"
Timing = Callable[
    [Weight], tuple[float, float]
]  # microseconds of a dense layer, and of the one with this weight instead


class Refused(ValueError):  # noqa: N818 - not a mistake of the caller's: an answer
    """A method declines a weight and says why: ``compress`` keeps that layer dense, with the reason in its summary."""


class Method(Protocol):
    """How to compress a weight; ``name`` is that of the weights that it makes."""

    name: ClassVar[str]

    def compress(self, weight: Tensor) -> Weight:
        """Floating point [n, k] -> canonical weight. Raises :class:`Refused` for a weight that it would not make better."""


@runtime_checkable
class LayersMethod(Protocol):
    """A method that looks at the weights of all its layers before it compresses one."""

    def for_layers(self, weights: list[Tensor], inputs: list[InputStatistics] | None) -> Sequence[Method]:
        """One method for each weight [n, k].

        Args:
            inputs: what the inputs of each layer look like, where there is a calibration and the method makes use of it.
        """


@runtime_checkable
class CalibratedMethod(Protocol):
    """A method that makes use of what a layer's inputs look like; of which part of it, ``needs`` may say (see :func:`needs_of`).
    One with a true ``lacks_inputs`` cannot go without."""

    def with_inputs(self, statistics: InputStatistics) -> Method:
        """The method for the layer that met these inputs."""


@runtime_checkable
class ConvolutionMethod(Protocol):
    """A method to which a convolution is more than its matrix [n, k]."""

    def for_convolution(self, shape: tuple[int, int, int, int], stride: tuple[int, int]) -> Method:
        """The method for a convolution with a weight [n, channels, height, width]; it too is given the matrix [n, k]."""


@runtime_checkable
class RecurrentMethod(Protocol):
    """A method to which a recurrent layer is several matrices."""

    def for_recurrent(
        self, cell: str, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool
    ) -> Method:
        """The method for an ``lstm`` or a ``gru``; it is given all matrices, one below another
        (:func:`pycompress.weights.recurrent.stacked`)."""


@runtime_checkable
class EmbeddingMethod(Protocol):
    """A method to which an embedding is another thing than a layer that multiplies."""

    def for_embedding(self) -> Method:
        """The method for an embedding; it too is given the matrix [n, k]."""


@runtime_checkable
class MeasuredMethod(Protocol):
    """A method part of which only the machine can tell: who compresses builds layers of the weights that it asks for."""

    def measured(self, shape: tuple[int, int], time: Timing) -> Method:
        """The method for a layer [n, k], with nothing left to measure. Raises :class:`Refused` where no weight is fast enough."""


@runtime_checkable
class GradualMethod(Protocol):
    """A method that can be reached step by step while a model trains."""

    def at(self, strength: float, shape: tuple[int, int]) -> Method:
        """The milder method on the way to this one, for a weight [n, k]: at 0 one that changes little, at 1 the method itself."""


@runtime_checkable
class SelectiveMethod(Protocol):
    """A method that does not take all kinds of layers that its weights can stand in, for reasons of its own options."""

    def refuses(self, kind: str) -> str:
        """Why it does not take layers of a kind (``Linear``, ``Conv2d``, ``Embedding``), or ''."""


def needs_of(method: Method) -> frozenset[str]:
    """Those of ``inputs.PARTS`` that a method makes use of: what its attribute ``needs``, several names or none, says; without one,
    moments of a :class:`CalibratedMethod`, and nothing of others."""
    needs = getattr(method, "needs", ("moments",) if isinstance(method, CalibratedMethod) else ())
    if isinstance(needs, str) or not set(needs) <= set(PARTS):
        raise ValueError(f"{type(method).__name__}: needs is {needs!r}, expected several of {', '.join(PARTS)}")
    return frozenset(needs)


def is_method(value: object) -> TypeGuard[Method]:
    """Whether a value is a method. The class of one is none."""
    named = isinstance(getattr(value, "name", None), str) and callable(getattr(value, "compress", None))
    return named and not isinstance(value, type)


def finite_matrix(kind: str, weight: Tensor, smallest: int = 1) -> Tensor:
    """float32 [n, k] on the CPU, rows dense and one behind another; the weight itself where it is that already. ``smallest``: of
    n and of k.

    Raises:
        TypeError: not a dense floating-point matrix. ValueError: it holds NaN or Inf, is on the meta device, empty or too large.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"{kind}: the weight is {type(weight).__name__}, expected floating point [n, k]")
    if weight.is_nested or weight.layout != torch.strided:
        layout = "nested" if weight.is_nested else f"of the layout {weight.layout}"
        raise TypeError(f"{kind}: the weight is {layout}, expected a dense one, floating point [n, k]")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise TypeError(f"{kind}: the weight is {weight.dtype} {list(weight.shape)}, expected floating point [n, k]")
    matrix_shape(kind, tuple(weight.shape), smallest)
    if weight.is_meta:
        raise ValueError(f"{kind}: the weight {list(weight.shape)} is on the meta device, expected one with data")
    w = weight.detach().to("cpu", torch.float32).resolve_neg().contiguous()
    bad = int((~torch.isfinite(w)).sum())
    if bad:
        raise ValueError(f"{kind}: the weight {list(w.shape)} holds {bad} NaN or Inf, expected finite values")
    return w
