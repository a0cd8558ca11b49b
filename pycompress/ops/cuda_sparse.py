"""Sparse weights on a CUDA device: which of three packed forms a mask takes there, and what runs it.

Square blocks, where few enough are present (:mod:`pycompress.ops.cuda_blocks`); 2:4 (:mod:`pycompress.ops.cuda_structured`);
single weights under a bitmap (:mod:`pycompress.ops.cuda_bitmap`). Values are int8, or float32 of which all are bfloat16 or all are
float16 numbers: those of a model in that type. On the device they stand in 16 bits, which loses nothing, because packing
refuses weights that would have to be rounded.

The host knows the form of a packed weight by its number of dimensions: [k, row], [1, k, row], [1, 1, k, row].
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycompress.ops import cuda, cuda_bitmap, cuda_blocks, cuda_structured
from pycompress.ops.native import check

FORMATS = ("bitmap", "structured", "blocks64", "blocks32", "blocks16")
# The largest share of blocks that may be present. Larger blocks cost less each, so they may be more; above it the other forms
# multiply less.
MOST_PRESENT = {64: 0.5, 32: 0.4, 16: 0.35}
# Of each byte of a mask: whether both groups of four have at most two weights.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
_TWO_OF_FOUR: NDArray[np.bool_] = (_BITS.reshape(256, 2, 4).sum(axis=2) <= 2).all(axis=1)


# --- packing ----------------------------------------------------------------------------------------------------------


def share_of_blocks(mask: NDArray[np.uint8], block: int) -> float:
    """Of the blocks x block pieces of a weight, how many hold a weight; those at the edges are smaller.

    Args:
        mask: uint8 [n > 0, ceil(k / 8)], the canonical weight's.
        block: a multiple of 8.
    """
    n, row_bytes = mask.shape
    padded = np.pad(mask, ((0, -n % block), (0, -row_bytes % (block // 8))))
    grid = padded.reshape(-1, block, padded.shape[1] // (block // 8), block // 8)
    return float(grid.any(axis=(1, 3)).mean())


def is_two_of_four(mask: NDArray[np.uint8]) -> bool:
    """Whether each four consecutive input features have at most two weights."""
    return bool(_TWO_OF_FOUR[mask].all())


def chosen_format(mask: NDArray[np.uint8], *, int8: bool) -> str:
    """One of FORMATS for a weight with this mask, uint8 [n > 0, ceil(k / 8)]. Raises ValueError where none takes it."""
    shares = {block: share_of_blocks(mask, block) for block in MOST_PRESENT}
    for block, most in MOST_PRESENT.items():
        if shares[block] <= most:
            return f"blocks{block}"
    if is_two_of_four(mask):
        return "structured"
    if int8:
        present = ", ".join(f"{100 * share:.3g} % of {block}x{block}" for block, share in shares.items())
        limits = ", ".join(f"{100 * most:.3g} %" for most in MOST_PRESENT.values())
        raise ValueError(
            f"sparse_pack: the int8 weight has more than two non-zeros in four consecutive input features, and of the blocks "
            f"{present} are present; expected on a CUDA device the pattern 2:4, or of the blocks at most {limits}"
        )
    return "bitmap"


def _halves(values: Tensor) -> Tensor:
    """float32 values in the 16 bits that hold all of them exactly."""
    bits = values.view(torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        half = values.to(dtype)
        if torch.equal(half.to(torch.float32).view(torch.int32), bits):
            return half
    raise ValueError(
        "sparse_pack: values are float32, expected bfloat16 or float16 numbers on a CUDA device, where nothing is rounded: "
        "compress the model in one of these types"
    )


def pack(mask: Tensor, values: Tensor, k: int, activation_bits: int, form: str, device: torch.device) -> Tensor:
    """``ops.sparse_pack`` on a CUDA device.

    Args:
        mask, values: on the CPU, checked.
        activation_bits: 7 or 8 for int8 values, 0 for float32.
        form: one of FORMATS, to force it; '' for :func:`chosen_format`.
        device: where the packed weight shall be.
    Raises:
        ValueError: values that neither bfloat16 nor float16 has, int8 that no form takes, a form that does not exist or cannot
        hold this weight; the number of values is not that of the mask's bits.
    """
    op, int8 = "sparse_pack", values.dtype == torch.int8
    check(mask.shape[0] > 0, f"{op}: mask is {list(mask.shape)}, expected [n > 0, ...]")
    count = int(_BITS.sum(axis=1)[mask.numpy()].sum())
    check(values.numel() == count, f"{op}: there are {values.numel()} values, the mask has {count} bits set")
    check(
        activation_bits in ((7, 8) if int8 else (0,)),
        f"{op}: activation_bits is {activation_bits}, expected {'7 or 8' if int8 else 0} for {values.dtype} values",
    )
    check(
        form in ("", *FORMATS),
        f"{op}: format is {form!r}, expected one of {', '.join(FORMATS)} on a CUDA device, or '' for the fastest",
    )
    form = form or chosen_format(mask.numpy(), int8=int8)
    if not int8:
        values = _halves(values)
    if form == "structured":
        return cuda_structured.pack(mask, values, k, activation_bits, device)
    if form == "bitmap":
        check(not int8, f"{op}: values is {values.dtype}, expected float32 for the format bitmap")
        return cuda_bitmap.pack(mask, values, k).to(device)
    return cuda_blocks.pack(mask, values, k, activation_bits, int(form.removeprefix("blocks"))).to(device)


def leading(form: str, k: int) -> tuple[int, ...]:
    """The dimensions of a packed weight but the last."""
    return {"bitmap": (k,), "structured": (1, k)}.get(form, (1, 1, k))


def format_of(packed: Tensor) -> str:
    """One of FORMATS, of a packed weight on a CUDA device."""
    if packed.dim() == 4:
        return f"blocks{cuda_blocks.block_of(packed)}"
    return "bitmap" if packed.dim() == 2 else "structured"


# --- what reads it ----------------------------------------------------------------------------------------------------


def _check_packed(op: str, packed: Tensor) -> None:
    check(
        packed.dtype is torch.uint8 and packed.dim() in (2, 3, 4),
        f"{op}: packed is {packed.dtype} {list(packed.shape)}, expected what sparse_pack returns on a CUDA device: uint8 "
        "[k, ...], [1, k, ...] or [1, 1, k, ...]",
    )


def linear(x: Tensor, packed: Tensor, n: int, scale: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    """``ops.sparse_linear`` for tensors on a CUDA device."""
    op = "sparse_linear"
    cuda.check_devices(op, x, packed, scale, bias)
    _check_packed(op, packed)
    if packed.dim() == 2:
        return cuda_bitmap.linear(x, packed, n, scale, bias, activation)
    if packed.dim() == 3:
        return cuda_structured.linear(x, packed, n, scale, bias, activation)
    return cuda_blocks.linear(x, packed, n, scale, bias, activation)


def dense(packed: Tensor, n: int, k: int, bits: int) -> Tensor:
    """``ops.sparse_dense`` on a CUDA device: float32 or int8 [n, k]."""
    op = "sparse_dense"
    _check_packed(op, packed)
    of_form = {2: cuda_bitmap.dense, 3: cuda_structured.dense, 4: cuda_blocks.dense}
    weight = of_form[packed.dim()](packed, n, k)
    check(8 * weight.element_size() == bits, f"{op}: bits is {bits}, the packed weight is {weight.dtype}")
    return weight


def accumulate(x: Tensor, ldx: int, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.sparse_accumulate`` for x [m, k] with row stride ldx on a CUDA device. Waits for it."""
    op = "sparse_accumulate"
    cuda.check_devices(op, x, packed)
    _check_packed(op, packed)
    check(packed.dim() > 2, f"{op}: the packed weight is float32, expected int8")
    return cuda_structured.accumulate(x, ldx, packed) if packed.dim() == 3 else cuda_blocks.accumulate(x, ldx, packed)


def unpack(packed: Tensor, n: int, k: int, nnz: int, bits: int) -> tuple[Tensor, Tensor]:
    """``ops.sparse_unpack`` on a CUDA device. Waits for it."""
    weight = dense(packed, n, k, bits)
    kept = weight != 0
    values, padded = weight[kept], torch.nn.functional.pad(kept, (0, -k % 8))
    check(values.numel() == nnz, f"sparse_unpack: nnz is {nnz}, the packed weight has {values.numel()}")
    digits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return (padded.view(n, -1, 8) * digits).sum(2, dtype=torch.uint8), values
