"""``SparseLinear``: an ``nn.Linear`` of whose weight only the non-zero part is kept and multiplied, in the sparse kernels.

``SparseLayer`` is what it has in common with the sparse convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pycompress import ops
from pycompress.methods.sparse import Sparse, SparseWeight
from pycompress.nn.layer import CompressedLayer
from pycompress.nn.linear import CompressedLinear


class SparseLayer(CompressedLayer):
    """A layer with a sparse weight [n, k], in float32 or in int8.

    State: ``weight_mask`` uint8 [n, ceil(k / 8)], ``weight_values`` float32 or int8 [nnz], for int8 ``weight_scale`` float32 [n].
    A state dict may bring more or fewer weights than the layer had.
    """

    weight_type = SparseWeight
    default_method = Sparse()  # keeps the zeros that are there

    @property
    def bits(self) -> int:
        """Of a stored weight: 32 or 8."""
        return int(self.settings["bits"])

    @property
    def activation_bits(self) -> int | None:
        """7 or 8 for int8, None for float32."""
        return self.settings.get("activation_bits")

    @property
    def nnz(self) -> int:
        """How many weights are stored."""
        return int(self.settings["nnz"])

    @property
    def density(self) -> float:
        """Share of the weights that are stored."""
        return self.nnz / (self.n * self.k)

    @property
    def format(self) -> str:
        """One of ``ops.SPARSE_FORMATS``, or of ``ops.CUDA_SPARSE_FORMATS`` on a CUDA device: the one that packing chose; '' on the
        meta device, and where the layer was moved to a device that has no kernels for it.
        """
        packed_here = self.packed.is_cpu or (self.packed.is_cuda and self.has_cuda_kernels)
        return ops.sparse_format(self.packed) if packed_here else ""

    @property
    def weight(self) -> Tensor:
        """The dense layer's, float32 with its zeros, made at each access."""
        if self.packed.is_meta:
            return torch.empty(self.dense_shape, device="meta")
        return self.canonical().decompress().view(self.dense_shape)

    def canonical(self) -> SparseWeight:
        """The canonical weight, on the CPU, unpacked at each call."""
        tensors = {name: tensor.cpu() for name, tensor in self._tensors().items()}
        return SparseWeight.from_tensors((self.n, self.k), tensors, self.settings)

    def _pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        mask, values = tensors["weight_mask"], tensors["weight_values"]
        return ops.sparse_pack(mask, values, self.k, self.activation_bits or 0)

    def _unpack(self) -> dict[str, Tensor]:
        mask, values = ops.sparse_unpack(self.packed, (self.n, self.k, self.nnz, self.bits))
        return {"weight_mask": mask, "weight_values": values}

    @staticmethod
    def _dense(packed: Tensor, shape: tuple[int, int], scale: Tensor | None) -> Tensor:
        weight = ops.sparse_dense(packed, (*shape, 32 if scale is None else 8))
        return weight if scale is None else weight.to(torch.float32) * scale[:, None]

    def _settings_with(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**self.settings, "nnz": tensors["weight_values"].numel()}

    def _details(self) -> str:
        bits = f"bits={self.bits}" + (f", activation_bits={self.activation_bits}" if self.activation_bits else "")
        return f"density={self.density:.3g}, {bits}"

    @property
    def label(self) -> str:
        """What a table calls the method, e.g. ``sparse 20 % int8``."""
        return f"sparse {100 * self.density:.3g} %" + (" int8" if self.bits == 8 else "")


class SparseLinear(SparseLayer, CompressedLinear):
    """``act(x W^T + b)`` with a sparse weight; for int8, activations are quantized per row as they come.

    float32: NaN or Inf in x shows in those outputs whose row has a weight for it. int8: it gives a row of NaN.

    On a CUDA device float32 weights run whose values are all bfloat16 or all float16 numbers, on x of that type: those of a model
    in that type; and int8 weights that are 2:4 or in square blocks, on x of any type. Tensor cores take 2:4 and square blocks
    (``Sparse(pattern=...)``) at any number of rows; other float32 patterns are for few rows. Moving a weight there that does not
    run raises ValueError; nothing is rounded on the way. float32: NaN or Inf may show in all of its row.
    """

    has_cuda_kernels = True

    @staticmethod
    def _product(
        x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str
    ) -> Tensor:
        return ops.sparse_linear(x, packed, n, scale, bias, activation)
