"""``Int8Linear``: an ``nn.Linear`` whose weight is int8 and whose product runs in the int8 kernels."""

from __future__ import annotations

from pycompress import ops
from pycompress.methods.int8 import Int8
from pycompress.nn.layer import setting
from pycompress.nn.linear import CompressedLinear
from pycompress.weights import Int8Weight


class Int8Linear(CompressedLinear):
    """``act(x W^T + b)`` with int8 weights; activations are quantized per row as they come ("dynamic"), all with one range that was
    known before ("static"), or stay in floating point.

    Quantized, a row of x with NaN or Inf gives a row of NaN; in floating point NaN or Inf wherever it meets a weight.

    State: ``int8_values`` [n, k], ``int8_scale`` float32 [n]; of a static one ``int8_input_scale`` float32 [1] and
    ``int8_input_zero_point`` uint8 [1].
    """

    weight_type = Int8Weight
    default_method = Int8()
    op = ops.OPS["int8"]
    has_cuda_kernels = True

    activation_bits: int = setting("activation_bits", "8 or 7, or 16 where activations stay in floating point.")
    weight_bits: int = setting("weight_bits", "8 or 7.")
    static: bool | None = setting("static", "True where the range of the input is fixed, else None.")

    @property
    def label(self) -> str:
        """What a table calls the method: ``int8``, ``int8 static``, or ``int8 a16`` where activations stay in floating point."""
        return "int8 a16" if self.activation_bits == 16 else "int8 static" if self.static else "int8"
