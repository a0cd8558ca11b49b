"""The ops of low-rank weights."""

from __future__ import annotations

from torch import Tensor

from pycompress.ops import cpu
from pycompress.ops.registry import define

DENSE = define("dense", cpu.dense, cpu.dense)  # only beside others, as R
OP = define("low_rank", cpu.low_rank, "pycompress.ops.cuda.low_rank", lambda form: form.layout == "factors")


def low_rank_linear(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``act(x down^T up^T + x R^T + bias)``: two thin products, and beside them what they leave, R, where there is one.

    int8 factors are two :func:`int8_linear` one after the other, to the bit, for every thread count and kernel. float32 factors
    are sums of fused multiply-adds, each within ``gamma(k + r + 4) * (sum_j (sum_i |x_i down_ji|) |up_nj| + |bias|)`` of the exact
    one, gamma(q) = q u / (1 - q u) with u = 2^-24. R adds the sums of :func:`int8_linear`, of :func:`int4_linear` or of
    :func:`sparse_linear`; a float32 R goes on with k more multiply-adds, which makes it gamma(2 k + r + 4), and
    ``sum_i |x_i R_ni|`` one of what it multiplies. An R of any other weight in ``ops.OPS`` adds the float32 result of its own op.
    On a CUDA device float32 factors run, rounded to bfloat16, on x in bfloat16 or float16, to which what lies between the factors
    is rounded too: without R or, up to rank 128, beside the sums of :func:`int8_linear` for an int8 R. Formulas and bounds are in
    ``csrc/low_rank/cuda.h`` and ``csrc/low_rank/branch.h``.

    Args:
        x: float32, bfloat16 or float16, [..., k], any strides; converted to float32 exactly, the result is rounded once. A row
            with NaN or Inf: int8 factors, an int8 or an int4 residual give a row of NaN, float32 ones NaN or Inf where a weight
            meets it, zeros included (but for those that a sparse residual leaves out).
        packed, form: from :func:`pycompress.ops.pack`.
        bias: float32 [n] or None.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``quick_gelu``, ``relu6`` or ``hardswish``.
    Returns:
        [..., n], dense, of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: sizes or dtypes do not fit. RuntimeError: the tensors are not all on the CPU
        or on one CUDA device, or there are no CUDA kernels.
    """
    return OP.linear(x, packed, form, bias, activation)


# --- what it is made of, for validation and tests ---------------------------------------------------------------------


def low_rank_intermediate(x: Tensor, packed: Tensor, form: str) -> Tensor:
    """``x down^T``: what the second factor meets, in int8 before it is quantized. On the CPU.

    Args:
        x: float32, bfloat16 or float16, [m, k].
        packed, form: from :func:`pycompress.ops.pack`.
    Returns:
        float32 [m, r].
    """
    return cpu.low_rank.intermediate(x, packed, form)


def low_rank_residual(packed: Tensor, form: str) -> tuple[Tensor, str]:
    """The residual of a packed weight on the CPU, as its own op packed it. Raises ValueError where there is none."""
    return cpu.low_rank.residual_of(packed, form)
