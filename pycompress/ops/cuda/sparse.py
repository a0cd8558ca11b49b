"""Sparse weights on a CUDA device: which of three layouts a mask takes there, and what runs it.

Square blocks, where few enough are present (:mod:`pycompress.ops.cuda.blocks`); 2:4 (:mod:`pycompress.ops.cuda.structured`);
single weights under a bitmap (:mod:`pycompress.ops.cuda.bitmap`). Values are int8, or float32 of which all are bfloat16 or all are
float16 numbers: those of a model in that type. On the device they stand in 16 bits, which loses nothing, because packing
refuses weights that would have to be rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycompress.ops.checks import check
from pycompress.ops.cpu.sparse import checked
from pycompress.ops.cuda import bitmap, blocks, structured, tiles
from pycompress.ops.cuda.native import check_vector, scale_in, with_scale
from pycompress.ops.cuda.sparse_layout import element_name
from pycompress.ops.cuda.sparse_layout import layout as layout_of
from pycompress.ops.form import written

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


def pack(
    parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any], layout: str = ""
) -> tuple[Tensor, str]:
    """``ops.pack`` of tensors on a CUDA device, those of a checked canonical weight; by way of the CPU, once for a weight.

    Args:
        layout: one of FORMATS, to force it; '' for :func:`chosen_format`.
    Raises:
        ValueError: values that neither bfloat16 nor float16 has, int8 that no layout takes, a layout that does not exist or cannot
        hold this weight; the number of values is not that of the mask's bits.
    """
    op, (n, k), device = "sparse_pack", shape, parts["values"].device
    mask, values = checked(parts["mask"].cpu(), parts["values"].cpu(), n, k)
    int8, bits = values.dtype == torch.int8, settings.get("activation_bits") or 0
    count = int(_BITS.sum(axis=1)[mask.numpy()].sum())
    check(values.numel() == count, f"{op}: there are {values.numel()} values, the mask has {count} bits set")
    check(
        bits in ((7, 8) if int8 else (0,)),
        f"{op}: activation_bits is {bits}, expected {'7 or 8' if int8 else 0} for {values.dtype} values",
    )
    check(
        layout in ("", *FORMATS),
        f"{op}: layout is {layout!r}, expected one of {', '.join(FORMATS)} on a CUDA device, or '' for the fastest",
    )
    layout = layout or chosen_format(mask.numpy(), int8=int8)
    check(not int8 or layout != "bitmap", f"{op}: values is {values.dtype}, expected float32 for the layout bitmap")
    stored, keys = values if int8 else _halves(values), dict[str, Any]()
    if layout == "structured":
        packed = structured.pack(mask.to(device), stored.to(device), k)
    elif layout == "bitmap":
        packed, keys = bitmap.pack(mask, stored, k)
    else:
        packed, keys = blocks.pack(mask, stored, k, int(layout.removeprefix("blocks")))
    form = written(
        layout, n, k, nnz=count, bits=8 if int8 else 32, activation_bits=bits, element=element_name(stored.dtype),
        bytes=packed.numel(), **keys,
    )  # fmt: skip
    packed = packed.to(device)
    return with_scale(op, packed, parts["scale"], n) if int8 else packed, form


# --- what reads it ----------------------------------------------------------------------------------------------------


def linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None, activation: str, kernel: str = "") -> Tensor:
    """``ops.sparse_linear`` for tensors on a CUDA device; kernel: of 2:4 or of blocks, to force it."""
    of = layout_of(form)
    if of.kernels == "bitmap":
        return bitmap.linear(x, packed, of, bias, activation)
    return tiles.linear(x, packed, of, bias, activation, kernel)


def accumulate(x: Tensor, packed: Tensor, form: str, kernel: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """``ops.sparse_accumulate`` for x [m, k] on a CUDA device."""
    return tiles.accumulate(x, packed, layout_of(form), kernel)


def _matrix(op: str, packed: Tensor, form: str) -> Tensor:
    """The stored values and their zeros, float32 or int8 [n, k]."""
    of = layout_of(form)
    check_vector(op, "packed", packed, torch.uint8, of.size)
    return bitmap.matrix(packed, of) if of.kernels == "bitmap" else tiles.matrix(packed, of)


def dense(packed: Tensor, form: str) -> Tensor:
    """float32 [n, k]."""
    weight, of = _matrix("sparse_dense", packed, form), layout_of(form)
    return weight.float() * scale_in(packed, of.bytes)[:, None] if of.is_int8 else weight


def unpack(packed: Tensor, form: str) -> dict[str, Tensor]:
    """What :func:`pack` was given. Waits for the device."""
    weight, of = _matrix("sparse_unpack", packed, form), layout_of(form)
    kept = weight != 0
    values, padded = weight[kept], torch.nn.functional.pad(kept, (0, -of.k % 8))
    check(values.numel() == of.nnz, f"sparse_unpack: nnz is {of.nnz}, the packed weight has {values.numel()}")
    digits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    mask = (padded.view(of.n, -1, 8) * digits).sum(2, dtype=torch.uint8)
    return {"mask": mask, "values": values, **({"scale": scale_in(packed, of.bytes)} if of.is_int8 else {})}
