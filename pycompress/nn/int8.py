"""``Int8Linear``: an ``nn.Linear`` whose weight is int8 and whose product runs in the int8 kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pycompress import ops
from pycompress.methods.int8 import Int8, Int8Weight
from pycompress.nn.linear import CompressedLinear


class Int8Linear(CompressedLinear):
    """``act(x W^T + b)`` with int8 weights; activations are quantized per row as they come, or stay in floating point.

    Quantized, a row of x with NaN or Inf gives a row of NaN; in floating point NaN or Inf wherever it meets a weight.

    State: ``weight`` int8 [n, k], ``weight_scale`` float32 [n].
    """

    weight_type = Int8Weight
    default_method = Int8()
    has_cuda_kernels = True

    weight_scale: Tensor

    @property
    def activation_bits(self) -> int:
        return int(self.settings["activation_bits"])

    @property
    def weight_bits(self) -> int:
        return int(self.settings["weight_bits"])

    @property
    def label(self) -> str:
        """What a table calls the method: ``int8``, or ``int8 a16`` where activations stay in floating point."""
        return "int8 a16" if self.activation_bits == 16 else "int8"

    @property
    def weight(self) -> Tensor:
        """int8 [n, k], unpacked at each access."""
        return self._tensors()["weight"]

    def canonical(self) -> Int8Weight:
        """The canonical weight, on the CPU, unpacked at each call."""
        return Int8Weight(self.weight.cpu(), self.weight_scale.cpu(), self.activation_bits, self.weight_bits)

    def _pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return ops.int8_pack(tensors["weight"], self.activation_bits)

    def _unpack(self) -> dict[str, Tensor]:
        return {"weight": ops.int8_unpack(self.packed, (self.out_features, self.in_features))}

    @staticmethod
    def _product(
        x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str  # noqa: ARG004
    ) -> Tensor:  # fmt: skip
        return ops.int8_linear(x, packed, scale, bias, activation)  # type: ignore[arg-type]

    @staticmethod
    def _dense(packed: Tensor, shape: tuple[int, int], scale: Tensor | None) -> Tensor:
        assert scale is not None
        return ops.int8_unpack(packed, shape).to(torch.float32) * scale[:, None]
