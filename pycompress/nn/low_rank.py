"""``LowRankLinear``: an ``nn.Linear`` whose weight is a product of two thin factors, with or without a residual beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pycompress import ops
from pycompress.methods.low_rank import LowRank, LowRankWeight
from pycompress.nn.linear import CompressedLinear


class LowRankLinear(CompressedLinear):
    """``act(x (up down + R)^T + b)`` without ever making the product ``up down``.

    int8 factors, or a residual R in int8 or int4, quantize activations per row as they come; a row of x with NaN or Inf then gives
    a row of NaN. With float32 alone it gives NaN or Inf wherever it meets a weight.

    On a CUDA device float32 factors run, rounded to bfloat16 for the product alone, on x in bfloat16 or float16: without a
    residual or, up to rank 128, beside an int8 one. Moving others there raises ValueError.

    State: ``down`` float32 or int8 [r, k] and ``up`` [n, r]; for int8 ``down_scale`` float32 [r] and ``up_scale`` float32 [n]; the
    tensors of the residual behind ``residual_``. A state dict may bring another rank, and a sparse residual of another size, than
    the layer had.
    """

    weight_type = LowRankWeight
    has_cuda_kernels = True  # for float32 factors, alone or beside int8; packing refuses others there
    default_method = LowRank(energy=1.0, rank_guard=False)  # keeps all of the weight

    @property
    def rank(self) -> int:
        """How thin the factors are: 1 to min(n, k)."""
        return int(self.settings["rank"])

    @property
    def bits(self) -> int:
        """Of a factor's weight: 32 or 8."""
        return int(self.settings["bits"])

    @property
    def activation_bits(self) -> int | None:
        """7 or 8 for int8 factors, None for float32."""
        return self.settings.get("activation_bits")

    @property
    def residual(self) -> str:
        """The method of the residual: ``int8``, ``int4``, ``sparse``, ``dense``, or '' where there is none."""
        return str(self.settings["residual"]["method"]) if "residual" in self.settings else ""

    @property
    def weight(self) -> Tensor:
        """The dense layer's, float32, made at each access."""
        if self.packed.is_meta:
            return torch.empty(self.dense_shape, device="meta")
        return self.canonical().decompress()

    def canonical(self) -> LowRankWeight:
        """The canonical weight, on the CPU, unpacked at each call."""
        tensors = {name: tensor.cpu() for name, tensor in self._tensors().items()}
        return LowRankWeight.from_tensors((self.n, self.k), tensors, self.settings)

    def _pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return ops.low_rank_pack(
            tensors["down"], tensors["up"], tensors.get("down_scale"), tensors.get("up_scale"), self.activation_bits or 0,
            self.residual, self._pack_residual(tensors), tensors.get("residual_weight_scale"),
        )  # fmt: skip

    def _pack_residual(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """As the residual's own op packs it."""
        kind, rest = self.residual, self.settings.get("residual", {})
        if kind == "int8":
            return ops.int8_pack(tensors["residual_weight"], rest["activation_bits"])
        if kind == "int4":
            scale, zero_point = tensors["residual_group_scale"], tensors.get("residual_group_zero_point")
            return ops.int4_pack(
                tensors["residual_weight"], scale, zero_point, self.k, rest["group"], rest["activation_bits"]
            )
        if kind == "sparse":
            mask, values = tensors["residual_weight_mask"], tensors["residual_weight_values"]
            return ops.sparse_pack(mask, values, self.k, rest.get("activation_bits", 0))
        return tensors.get("residual_weight")  # dense, or none at all

    def _unpack(self) -> dict[str, Tensor]:
        on_cuda = self.packed.is_cuda
        sizes = ops.cuda_low_rank_sizes(self.n, self.k, self.rank, self.residual) if on_cuda else None
        found = ops.low_rank_unpack(self.packed, sizes)
        own = {"down": found.down, "up": found.up, "down_scale": found.down_scale, "up_scale": found.up_scale}
        residual = {"weight_scale": found.residual_scale, **self._unpack_residual(found.residual)}
        tensors = {**own, **{f"residual_{name}": tensor for name, tensor in residual.items()}}
        return {name: tensors[name] for name in self._expected()}  # those that are there, in the order of the state

    def _unpack_residual(self, packed: Tensor) -> dict[str, Tensor]:
        """The tensors of the residual's canonical weight but its scale per output channel."""
        kind, rest = self.residual, self.settings.get("residual", {})
        if kind == "int8":
            return {"weight": ops.int8_unpack(packed, (self.n, self.k))}
        if kind == "int4":
            values, scale, zero_point = ops.int4_unpack(packed, self.n, self.k, rest["group"], rest["symmetric"])
            tensors = {"weight": values, "group_scale": scale}
            return tensors if zero_point is None else {**tensors, "group_zero_point": zero_point}
        if kind == "sparse":
            mask, values = ops.sparse_unpack(packed)
            return {"weight_mask": mask, "weight_values": values}
        return {"weight": packed}  # float32 as it is, or of no use: there is none

    def _settings_with(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        settings = {**self.settings, "rank": len(tensors["down"])}
        if self.residual == "sparse":
            settings["residual"] = {**self.settings["residual"], "nnz": tensors["residual_weight_values"].numel()}
        return settings

    def _details(self) -> str:
        bits = f"bits={self.bits}" + (f", activation_bits={self.activation_bits}" if self.activation_bits else "")
        return f"rank={self.rank}, {bits}" + (f", residual={self.residual}" if self.residual else "")

    @property
    def label(self) -> str:
        """What a table calls the method, e.g. ``low rank 32 + int8``."""
        factors = f"low rank {self.rank}" + (" int8" if self.bits == 8 else "")
        return f"{factors} + {self.residual}" if self.residual else factors

    # --- forward --------------------------------------------------------------------------------------------------

    @staticmethod
    def _product(
        x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str  # noqa: ARG004
    ) -> Tensor:  # fmt: skip
        return ops.low_rank_linear(x, packed, n, bias, activation)

    @staticmethod
    def _dense(packed: Tensor, shape: tuple[int, int], scale: Tensor | None) -> Tensor:  # noqa: ARG004
        return ops.low_rank_dense(packed, *shape)
