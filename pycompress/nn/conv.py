"""``CompressedConv2d``: what all compressed convolutions have in common, which is what an ``nn.Conv2d`` is besides its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from pycompress.methods.weight import Method, Weight
from pycompress.nn.dense import dense_bias, dense_weight, fitted, geometry_of
from pycompress.nn.geometry import Conv2dGeometry
from pycompress.nn.layer import CompressedLayer

if TYPE_CHECKING:
    from typing_extensions import Self


class CompressedConv2d(CompressedLayer):
    """``act(conv2d(x, W) + b)`` with a compressed weight, made by :meth:`from_dense` or :meth:`from_weight`.

    The canonical weight is that of the matrix [out_channels, in_channels * height * width].

    Shapes:
        x [N, in_channels, H, W] or [in_channels, H, W] in float32, bfloat16 or float16, of any memory format -> as
        ``nn.Conv2d``, in the same dtype.
    """

    dense_kind = "Conv2d"
    geometry: Conv2dGeometry
    groups = 1
    padding_mode = "zeros"

    def __init__(
        self, weight: Weight, geometry: Conv2dGeometry, bias: Tensor | None = None, activation: str = "none"
    ) -> None:
        super().__init__(weight, bias, activation)
        if self.k != geometry.in_features:
            raise ValueError(
                f"{type(self).__name__}: the weight is [{self.n}, {self.k}], expected k = {geometry.in_features} for {geometry}"
            )
        self.geometry = geometry

    @classmethod
    def from_dense(cls, dense: nn.Module, method: Method | None = None, activation: str = "none") -> Self:
        own = fitted(method or cls.default_method, dense)
        return cls.replacing(dense, own.compress(dense_weight(dense)), activation)

    @classmethod
    def from_weight(
        cls, weight: Weight, geometry: Conv2dGeometry, bias: Tensor | None = None, activation: str = "none"
    ) -> Self:
        """From a canonical weight [out_channels, in_channels * height * width]; bias float [out_channels] or None."""
        return cls(weight, geometry, bias, activation)

    @classmethod
    def replacing(cls, dense: nn.Module, weight: Weight, activation: str = "none") -> Self:
        geometry = geometry_of(dense)
        if geometry is None:
            raise TypeError(f"{cls.__name__}: the dense layer is {type(dense).__name__}, expected Conv2d")
        return cls(weight, geometry, dense_bias(dense), activation)

    @property
    def in_channels(self) -> int:
        return self.geometry.in_channels

    @property
    def out_channels(self) -> int:
        return self.n

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.geometry.kernel_size

    @property
    def stride(self) -> tuple[int, int]:
        return self.geometry.stride

    @property
    def padding(self) -> tuple[int, int] | str:
        return self.geometry.padding

    @property
    def dilation(self) -> tuple[int, int]:
        return self.geometry.dilation

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return self.n, self.in_channels, *self.kernel_size

    def _with_weight(self, weight: Weight, bias: Tensor | None) -> Self:
        return type(self).from_weight(weight, self.geometry, bias, self.activation)

    def _sizes(self) -> str:
        return f"out_channels={self.out_channels}, {self.geometry}"
