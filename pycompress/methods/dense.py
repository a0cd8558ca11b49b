"""Dense: the weight as it is, in float32, for an adapter beside it that is not merged (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycompress.methods.weight import Expected, check_tensors, finite_matrix, matrix_shape


@dataclass(frozen=True)
class Dense:
    """Keeps the weight in float32. Only meant as the residual of another method: on its own it compresses nothing."""

    name: ClassVar[str] = "dense"

    def compress(self, weight: Tensor) -> DenseWeight:
        """A float32 copy on the CPU.

        Args:
            weight: floating point [n, k], on any device.
        Raises:
            TypeError: not a floating-point matrix. ValueError: it holds NaN or Inf, is empty or on the meta device.
        """
        return DenseWeight(finite_matrix("Dense", weight).clone(memory_format=torch.contiguous_format))


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """The canonical dense weight.

    Attributes:
        weight: float32 [n, k], finite, on the CPU.
    Raises:
        ValueError: anything else.
    """

    name: ClassVar[str] = "dense"

    weight: Tensor

    def __post_init__(self) -> None:
        weight = self.weight
        if weight.dtype != torch.float32 or weight.dim() != 2:
            raise ValueError(f"DenseWeight: weight is {weight.dtype} {list(weight.shape)}, expected float32 [n, k]")
        matrix_shape("DenseWeight", (weight.shape[0], weight.shape[1]))
        if weight.device.type != "cpu":
            raise ValueError(f"DenseWeight: weight is on {weight.device}, expected the CPU")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("DenseWeight: weight holds NaN or Inf, expected finite values")

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def decompress(self) -> Tensor:
        """float32 [n, k], a copy."""
        return self.weight.clone()

    # --- stored form ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names that it has below the layer's."""
        return {"weight": self.weight}

    def settings(self) -> dict[str, int]:
        """The rest, for JSON: nothing."""
        return {}

    @classmethod
    def expected(cls, shape: tuple[int, int], settings: Mapping[str, object]) -> Expected:
        """Shape and dtype of the :meth:`tensors` of a weight [n, k]; allocates nothing.

        Raises:
            ValueError: any setting, or an impossible shape.
        """
        if settings:
            raise ValueError(f"DenseWeight: the settings are {list(settings)}, expected none")
        return {"weight": (matrix_shape("DenseWeight", shape), torch.float32)}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], settings: Mapping[str, object]
    ) -> DenseWeight:
        """The inverse of :meth:`tensors` and :meth:`settings`. Raises ValueError where anything does not fit."""
        check_tensors(cls.__name__, tensors, cls.expected(shape, settings))
        return cls(tensors["weight"])
