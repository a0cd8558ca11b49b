"""``Int8Conv2d``: an ``nn.Conv2d`` whose weight is int8 and whose product runs in the int8 kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pycompress import ops
from pycompress.kinds import NN_CONV1D
from pycompress.kinds.walk import Walk
from pycompress.methods.int8 import Int8
from pycompress.nn.conv import CompressedConv2d
from pycompress.nn.handing import handed
from pycompress.nn.layer import setting
from pycompress.weights import Int8Weight


class Int8Conv2d(CompressedConv2d):
    """``act(conv2d(x, W) + b)`` with int8 weights; activations are quantized per image as they come ("dynamic"), or all with one
    range that was known before ("static"). Any groups.

    An image with NaN or Inf gives an image of NaN. The result lies channels last where the input does.

    State: ``int8_values`` [out_channels, in_channels / groups * height * width], ``int8_scale`` float32 [out_channels]; of
    a static one ``int8_input_scale`` float32 [1] and ``int8_input_zero_point`` uint8 [1].
    """

    weight_type = Int8Weight
    default_method = Int8()
    op = ops.OPS["int8"]

    activation_bits: int = setting("activation_bits", "8 or 7.")
    weight_bits: int = setting("weight_bits", "8 or 7.")
    static: bool | None = setting("static", "True where the range of the input is fixed, else None.")

    @property
    def label(self) -> str:
        """What a table calls the method: ``int8`` or ``int8 static``."""
        return "int8 static" if self.static else "int8"

    @classmethod
    def misfit(cls, geometry: Walk, settings: Mapping[str, Any] | None = None) -> str:  # noqa: ARG003
        if settings is not None and settings["activation_bits"] == 16:
            return "activation_bits is 16, expected 8 or 7: int8 weights alone have no convolution yet"
        return ""

    def _pack(self, parts: Mapping[str, Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, str]:
        assert self.op is not None
        convolution = (*self.geometry.plane[0], self.geometry.groups)
        return self.op.pack(parts, (self.n, self.k), {**self.settings, "convolution": convolution}, device)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Conv2d gives it
        if not is_compiling() and (y := handed(self, input)) is not None:
            return y
        own, to = self._buffers, self.geometry
        y = ops.int8_conv2d(
            self._image(input), own["packed"], self.form, own["bias"], *to.plane, to.groups, self.activation,  # type: ignore[arg-type]
        )  # fmt: skip
        return to.from_image(y)


class Int8Conv1d(Int8Conv2d):
    """The same of an ``nn.Conv1d``, for sequences: x [N, in_channels, length] or [in_channels, length].

    State: as :class:`Int8Conv2d`, of [out_channels, in_channels / groups * kernel size].
    """

    kind = NN_CONV1D
