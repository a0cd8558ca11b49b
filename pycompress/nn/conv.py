"""``CompressedConv2d``: what all compressed convolutions have in common, which is what the dense ones are besides their weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pycompress.kinds import CONV2D, Kind
from pycompress.kinds.walk import Walk
from pycompress.nn.layer import CompressedLayer
from pycompress.ops.checks import check_float
from pycompress.weights import Weight

if TYPE_CHECKING:
    from typing_extensions import Self


class CompressedConv2d(CompressedLayer):
    """``act(conv2d(x, W) + b)`` with a compressed weight, made by :meth:`from_dense` or :meth:`from_weight`.

    The canonical weight is that of the matrix [out_channels, in_channels / groups * height * width].

    Shapes:
        x [N, in_channels, H, W] or [in_channels, H, W], of an ``nn.Conv1d`` without H, in float32, bfloat16 or float16, of any
        memory format -> as the dense layer, in the same dtype.
    """

    kind: Kind = CONV2D
    geometry: Walk

    def __init__(self, weight: Weight, geometry: Walk, bias: Tensor | None = None, activation: str = "none") -> None:
        super().__init__(weight, bias, activation, geometry)
        if self.k != geometry.in_features:
            raise ValueError(
                f"{type(self).__name__}: the weight is [{self.n}, {self.k}], expected k = {geometry.in_features} for {geometry}"
            )

    @classmethod
    def from_weight(cls, weight: Weight, geometry: Walk, bias: Tensor | None = None, activation: str = "none") -> Self:
        """From a canonical weight [out_channels, in_channels * height * width]; bias float [out_channels] or None."""
        return cls(weight, geometry, bias, activation)

    def _image(self, x: Tensor) -> Tensor:
        """x as the ops take it, which know images with zeros around them; these look at x themselves."""
        to = self.geometry
        if to.dims == 2 and to.padding_mode == "zeros":
            return x
        name = type(self).__name__
        check_float(name, x)
        if x.dim() not in (to.dims + 1, to.dims + 2):
            raise ValueError(
                f"{name}: x is {list(x.shape)}, expected [N, in_channels, *sizes] or [in_channels, *sizes]"
            )
        return to.as_image(to.filled(x))

    @classmethod
    def misfit(cls, geometry: Walk, settings: Mapping[str, Any] | None = None) -> str:  # noqa: ARG003
        if geometry.groups == 1:
            return ""
        return f"groups is {geometry.groups}, expected 1: convolutions in groups have no kernel yet"
