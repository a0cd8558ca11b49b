"""``Int4Linear``: an ``nn.Linear`` whose weight is 4 bits wide and whose product runs in the int4 kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pycompress import ops
from pycompress.methods.int4 import Int4, Int4Weight
from pycompress.nn.linear import CompressedLinear


class Int4Linear(CompressedLinear):
    """``act(x W^T + b)`` with int4 weights in groups; activations are quantized per row as they come, or stay in floating point.

    Quantized, a row of x with NaN or Inf gives a row of NaN; in floating point NaN or Inf wherever it meets a weight.

    State: ``weight`` uint8 [n, ceil(k / 2)], ``group_scale`` bfloat16 [n, groups] and, but for symmetric weights,
    ``group_zero_point`` uint8 [n, ceil(groups / 2)], with groups = ceil(k / group), as :class:`Int4Weight` has them.
    """

    weight_type = Int4Weight
    default_method = Int4()
    has_cuda_kernels = True  # for activations of 16 bits; packing refuses others there

    @property
    def group(self) -> int:
        """How many input features share a scale: 32, 64 or 128."""
        return int(self.settings["group"])

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return bool(self.settings["symmetric"])

    @property
    def activation_bits(self) -> int:
        """8, or 16 where activations stay in floating point."""
        return int(self.settings["activation_bits"])

    @property
    def weight(self) -> Tensor:
        """The dense layer's, float32, made at each access."""
        if self.packed.is_meta:
            return torch.empty(self.dense_shape, device="meta")
        return ops.int4_dense(self.packed, self.n, self.k)

    def canonical(self) -> Int4Weight:
        """The canonical weight, on the CPU, unpacked at each call."""
        tensors = {name: tensor.cpu() for name, tensor in self._tensors().items()}
        return Int4Weight.from_tensors((self.n, self.k), tensors, self.settings)

    @property
    def label(self) -> str:
        """What a table calls the method, e.g. ``int4 g32 symmetric a16``."""
        rest = (" symmetric" if self.symmetric else "") + (" a16" if self.activation_bits == 16 else "")
        return f"int4 g{self.group}{rest}"

    def _pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        zero_point = tensors.get("group_zero_point")
        return ops.int4_pack(
            tensors["weight"], tensors["group_scale"], zero_point, self.k, self.group, self.activation_bits
        )

    def _unpack(self) -> dict[str, Tensor]:
        values, scale, zero_point = ops.int4_unpack(self.packed, self.n, self.k, self.group, self.symmetric)
        tensors = {"weight": values, "group_scale": scale}
        return tensors if zero_point is None else {**tensors, "group_zero_point": zero_point}

    @staticmethod
    def _product(
        x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str  # noqa: ARG004
    ) -> Tensor:  # fmt: skip
        return ops.int4_linear(x, packed, n, bias, activation)

    @staticmethod
    def _dense(packed: Tensor, shape: tuple[int, int], scale: Tensor | None) -> Tensor:  # noqa: ARG004
        return ops.int4_dense(packed, *shape)
