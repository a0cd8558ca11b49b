"""``SparseConv2d``: an ``nn.Conv2d`` of whose weight only the non-zero part is kept and multiplied, in the sparse kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pycompress import ops
from pycompress.kinds import NN_CONV1D
from pycompress.kinds.walk import Walk
from pycompress.nn.conv import CompressedConv2d
from pycompress.nn.sparse import SparseLayer


class SparseConv2d(SparseLayer, CompressedConv2d):
    """``act(conv2d(x, W) + b)`` with a sparse float32 weight. The result is contiguous.

    Zeros are not multiplied: NaN or Inf in x shows in those outputs that have a weight for it.
    """

    @classmethod
    def misfit(cls, geometry: Walk, settings: Mapping[str, Any] | None = None) -> str:
        if settings is not None and settings["bits"] != 32:
            return "the weight is int8, expected float32: int8 has no sparse convolution yet"
        return super().misfit(geometry)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Conv2d gives it
        own, to = self._buffers, self.geometry
        y = ops.sparse_conv2d(
            self._image(input), own["packed"], self.form, own["bias"], *to.plane, self.activation,  # type: ignore[arg-type]
        )  # fmt: skip
        return to.from_image(y)


class SparseConv1d(SparseConv2d):
    """The same of an ``nn.Conv1d``, for sequences: x [N, in_channels, length] or [in_channels, length]."""

    kind = NN_CONV1D
