"""``LowRankLinear``: an ``nn.Linear`` whose weight is a product of two thin factors, with or without a residual beside them."""

from __future__ import annotations

from pycompress import ops
from pycompress.methods.low_rank import LowRank
from pycompress.nn.layer import setting
from pycompress.nn.linear import CompressedLinear
from pycompress.weights import LowRankWeight


class LowRankLinear(CompressedLinear):
    """``act(x (up down + R)^T + b)`` without ever making the product ``up down``.

    int8 factors, or a residual R in int8 or int4, quantize activations per row as they come; a row of x with NaN or Inf then gives
    a row of NaN. With float32 alone it gives NaN or Inf wherever it meets a weight.

    On a CUDA device float32 factors run, rounded to bfloat16 for the product alone, on x in bfloat16 or float16: without a
    residual or, up to rank 128, beside an int8 one. Moving others there raises ValueError or RuntimeError.

    State: ``low_rank_down`` float32 or int8 [r, k] and ``low_rank_up`` [n, r]; for int8 ``low_rank_down_scale`` float32 [r] and
    ``low_rank_up_scale`` float32 [n]; the tensors of the residual behind ``low_rank_residual_``. A state dict may bring another
    rank, and a sparse residual of another size, than the layer had.
    """

    weight_type = LowRankWeight
    op = ops.OPS["low_rank"]
    has_cuda_kernels = True  # for float32 factors, alone or beside int8; packing refuses others there
    default_method = LowRank(energy=1.0, rank_guard=False)  # keeps all of the weight

    rank: int = setting("rank", "How thin the factors are: 1 to min(n, k).")
    bits: int = setting("bits", "Of a factor's weight: 32 or 8.")
    activation_bits: int | None = setting("activation_bits", "7 or 8 for int8 factors, None for float32.")

    @property
    def residual(self) -> str:
        """The method of the residual: ``int8``, ``int4``, ``sparse``, ``dense``, or '' where there is none."""
        return str(self.settings["residual"]["method"]) if "residual" in self.settings else ""

    def _details(self) -> str:
        bits = f"bits={self.bits}" + (f", activation_bits={self.activation_bits}" if self.activation_bits else "")
        return f"rank={self.rank}, {bits}" + (f", residual={self.residual}" if self.residual else "")

    @property
    def label(self) -> str:
        """What a table calls the method, e.g. ``low rank 32 + int8``."""
        factors = f"low rank {self.rank}" + (" int8" if self.bits == 8 else "")
        return f"{factors} + {self.residual}" if self.residual else factors
