"""``Int4Linear``: an ``nn.Linear`` whose weight is 4 bits wide and whose product runs in the int4 kernels."""

from __future__ import annotations

from pycompress import ops
from pycompress.methods.int4 import Int4
from pycompress.nn.layer import setting
from pycompress.nn.linear import CompressedLinear
from pycompress.weights import Int4Weight


class Int4Linear(CompressedLinear):
    """``act(x W^T + b)`` with int4 weights in groups; activations are quantized per row as they come, or stay in floating point.

    Quantized, a row of x with NaN or Inf gives a row of NaN; in floating point NaN or Inf wherever it meets a weight.

    State: ``int4_values`` uint8 [n, ceil(k / 2)], ``int4_scale`` bfloat16 [n, groups] and, but for symmetric weights,
    ``int4_zero_point`` uint8 [n, ceil(groups / 2)], with groups = ceil(k / group), as :class:`Int4Weight` has them.
    """

    weight_type = Int4Weight
    default_method = Int4()
    op = ops.OPS["int4"]
    has_cuda_kernels = True  # for activations of 16 bits; packing refuses others there

    group: int = setting("group", "How many input features share a scale: 32, 64 or 128.")
    symmetric: bool = setting("symmetric", "Whether there are no zero points.")
    activation_bits: int = setting("activation_bits", "8, or 16 where activations stay in floating point.")

    @property
    def label(self) -> str:
        """What a table calls the method, e.g. ``int4 g32 symmetric a16``."""
        rest = (" symmetric" if self.symmetric else "") + (" a16" if self.activation_bits == 16 else "")
        return f"int4 g{self.group}{rest}"
