"""``Kind``: what a layer is apart from the numbers in its weight: how its matrix, its bias and its input lie."""

# ruff: noqa: ARG002 - a kind that is asked what all are asked may not need all of it

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pycompress.kinds.pruned import current, pruned_names
from pycompress.methods.method import Method


class Geometry(Protocol):
    """What a layer of some kind has to know besides weight and bias: a frozen dataclass, compared by its values."""

    def settings(self) -> dict[str, Any]:
        """For JSON: what a file says of it."""

    @classmethod
    def from_settings(cls, k: int, settings: Mapping[str, Any]) -> Geometry:
        """The inverse, for a weight [n, k]. Raises ValueError where anything does not fit."""


class Kind:
    """A kind of dense layer. As it stands here, it is one that multiplies rows of k features with a matrix [n, k].

    A subclass says what is different: at least ``name``, ``dense`` and, where the module keeps it otherwise, the matrix. Layers of
    a kind without a compressed layer in ``nn.LAYERS`` stay dense, and the summary says so.

    Attributes:
        name: in files and in the table of layers. Kinds of one name are replaced by the same compressed layers.
        dense: the class of its modules. Subclasses of that are recognized, but may do something else and stay dense.
        phrase, plural: what errors call one of its layers, and several.
        geometry_type: what :meth:`geometry` gives; None where there is nothing to know.
        dims: how many dimensions of an input are one item: the features; channels, height and width; of tokens none.
        tokens: an input is whole numbers that choose rows of the matrix.
        biased: there may be a bias.
        epilogue: an activation may follow the product.
        pads: zeros that a padding module puts around an input may become its own: its geometry has them as ``around``.
        shares: compressed layers of two modules with one weight can have one compressed weight.
        recurrent: what a step gives is what the next one meets: there is more than the input to see, to calibrate and to train.
        no_rows: why :meth:`rows` cannot tell, where :meth:`has_rows` says so.
        always: its layers are candidates of every plan, not only of one whose methods take them.
    """

    name: ClassVar[str]
    dense: ClassVar[type[nn.Module]]
    phrase: ClassVar[str]
    plural: ClassVar[str]
    geometry_type: ClassVar[type[Geometry] | None] = None
    dims: ClassVar[int] = 1
    tokens: ClassVar[bool] = False
    biased: ClassVar[bool] = True
    epilogue: ClassVar[bool] = True
    pads: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    recurrent: ClassVar[bool] = False
    no_rows: ClassVar[str] = "in groups each meets rows of its own"
    always: ClassVar[bool] = True

    def __repr__(self) -> str:
        return f"<kind {self.name}>"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)  # layers keep theirs, and are copied and pickled with it

    def __hash__(self) -> int:
        return hash(type(self))

    # --- a dense module ---------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """The name of the dense class."""
        return self.dense.__name__

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind, as far as its class says."""
        return isinstance(module, self.dense)

    def misfit(self, module: nn.Module) -> str:
        """Why no compressed layer could take this module, whatever its weight, or ''."""
        if type(module) is not self.dense:
            return f"{type(module).__name__} is a subclass of {self.title}, which may do something else"
        try:
            self.geometry(module)
        except ValueError as error:
            return str(error)
        return ""

    def parameter(self, module: nn.Module) -> nn.Parameter | None:
        """The parameter that keeps the weight; None where it is no parameter, but a buffer or computed."""
        return module._parameters.get("weight_orig" if "weight" in pruned_names(module) else "weight")

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """All that would be gone with the module's weight."""
        weight = self.parameter(module)
        return [] if weight is None else [weight]

    def tensors(self, module: nn.Module) -> dict[str, Tensor | None]:
        """What kernels have to be able to read, by name."""
        return {"weight": self.stored(module), "bias": getattr(module, "bias", None)}

    def stored(self, module: nn.Module) -> Tensor:
        """The parameter (or buffer) that keeps the weight: as the module has it, unmasked where it is pruned."""
        weight = module.weight_orig if "weight" in pruned_names(module) else module.weight
        assert isinstance(weight, Tensor)
        return weight

    def dense_shape(self, module: nn.Module) -> tuple[int, ...]:
        """Of the weight as the module keeps it. As torch computes: attributes may be out of date."""
        return tuple(self.stored(module).shape)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(n, k) of the matrix."""
        n, *rest = self.dense_shape(module)
        return n, math.prod(rest)

    def matrix(self, module: nn.Module) -> Tensor:
        """The [n, k] with which the module computes: the parameter itself or a view of it, where that can be, or a masked copy."""
        weight = current(module, "weight")
        assert weight is not None
        return weight.reshape(len(weight), -1)

    def bias(self, module: nn.Module) -> Tensor | None:
        """The [n] with which the module computes, or None."""
        return current(module, "bias") if self.biased else None

    def geometry(self, module: nn.Module) -> Any:
        """A ``geometry_type``, or None. Raises ValueError for what no geometry says."""
        return None

    def fitted(self, method: Method, module: nn.Module) -> Method:
        """The method for this layer, where it is told more than the matrix."""
        return method

    # --- its compressed layers --------------------------------------------------------------------------------------

    def weight_shape(self, n: int, k: int, geometry: Any) -> tuple[int, ...]:
        """Of the module's weight whose matrix is [n, k]."""
        return n, k

    def count(self, n: int, k: int, geometry: Any) -> int:
        """How many weights the dense module has."""
        return n * k

    def as_weight(self, matrix: Tensor, geometry: Any) -> Tensor:
        """The matrix [n, k] as the module keeps it, contiguous: the inverse of :meth:`matrix`."""
        return matrix.view(self.weight_shape(matrix.shape[0], matrix.shape[1], geometry))

    def attributes(self, n: int, k: int, geometry: Any) -> dict[str, Any]:
        """What else may be read of the module: what its layers have as attributes."""
        return {"in_features": k, "out_features": n}

    def describe(self, n: int, k: int, geometry: Any) -> str:
        """The arguments of the dense module, for ``repr``."""
        return f"in_features={k}, out_features={n}"

    def note(self, geometry: Any) -> str:
        """What a summary says of a layer's geometry, or ''."""
        return ""

    # --- inputs and results -----------------------------------------------------------------------------------------

    def has_rows(self, module: nn.Module) -> bool:
        """Whether :meth:`rows` can tell what this module's matrix meets."""
        return True

    def input_of(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
        """What a module was called with."""
        x: Tensor
        (x,) = (*args, *keywords.values())
        return x

    def accepts(self, module: nn.Module, x: Tensor) -> bool:
        """Whether a module takes such an input; of others it says itself what is wrong."""
        return x.dim() > 0 and x.is_floating_point() and x.shape[-1] == self.shape(module)[1]

    def items(self, x: Tensor) -> Tensor:
        """The leading dimensions as one: [items, ...]."""
        return x.reshape(-1, *x.shape[x.dim() - self.dims :])

    def quantized_together(self, x: Tensor) -> Tensor:
        """x as rows of what layers that quantize their input give one scale: [..., together]."""
        return x

    def spread(self, geometry: Any) -> int:
        """In how many rows a number of the input may lie."""
        return 1

    def rows(self, x: Tensor, geometry: Any, chosen: Tensor | None = None) -> Tensor:
        """What the matrix meets: one row for each row of :meth:`results`, in their order.

        Args:
            x: the :meth:`items` of an input.
            chosen: int64 [m], which of the rows; None: all.
        Returns:
            [m, k] in the dtype of x; tokens [m].
        """
        return x if chosen is None else x[chosen]

    def results(self, y: Tensor) -> Tensor:
        """The rows [m, n] of a result."""
        return y.reshape(-1, y.shape[-1])

    def result_shape(self, shape: Sequence[Any], n: int, k: int, geometry: Any) -> tuple[Any, ...]:
        """Of the result of an input of this shape; sizes may be torch's symbols."""
        return *shape[:-1], n

    def sample(self, module: nn.Module, like: Tensor) -> Tensor:
        """A random input on the CPU of the shape, stride and dtype of one without data."""
        return torch.randn_like(like, device="cpu")

    def sizes(self, n: int, k: int, geometry: Any) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
        """The shapes of items and of their results; a name stands for any size."""
        return ("m", k), ("m", n)
