"""``CompressedConv2d``: what all compressed convolutions have in common, which is what an ``nn.Conv2d`` is besides its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pycompress.kinds import CONV2D, Conv2dGeometry
from pycompress.nn.layer import CompressedLayer
from pycompress.weights import Weight

if TYPE_CHECKING:
    from typing_extensions import Self


class CompressedConv2d(CompressedLayer):
    """``act(conv2d(x, W) + b)`` with a compressed weight, made by :meth:`from_dense` or :meth:`from_weight`.

    The canonical weight is that of the matrix [out_channels, in_channels / groups * height * width].

    Shapes:
        x [N, in_channels, H, W] or [in_channels, H, W] in float32, bfloat16 or float16, of any memory format -> as
        ``nn.Conv2d``, in the same dtype.
    """

    kind = CONV2D
    geometry: Conv2dGeometry

    def __init__(
        self, weight: Weight, geometry: Conv2dGeometry, bias: Tensor | None = None, activation: str = "none"
    ) -> None:
        super().__init__(weight, bias, activation, geometry)
        if self.k != geometry.in_features:
            raise ValueError(
                f"{type(self).__name__}: the weight is [{self.n}, {self.k}], expected k = {geometry.in_features} for {geometry}"
            )

    @classmethod
    def from_weight(
        cls, weight: Weight, geometry: Conv2dGeometry, bias: Tensor | None = None, activation: str = "none"
    ) -> Self:
        """From a canonical weight [out_channels, in_channels * height * width]; bias float [out_channels] or None."""
        return cls(weight, geometry, bias, activation)

    @classmethod
    def misfit(cls, geometry: Conv2dGeometry, settings: Mapping[str, Any] | None = None) -> str:  # noqa: ARG003
        if geometry.groups == 1:
            return ""
        return f"groups is {geometry.groups}, expected 1: convolutions in groups have no kernel yet"
