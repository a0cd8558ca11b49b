"""sparse: a header, the mask [n, ceil(k / 8)], then the values [nnz]."""

from __future__ import annotations

from typing import Any

import numpy as np

from pycompress.reference import sparse
from pycompress.reference.extension import memory
from pycompress.reference.extension.int8 import integers
from pycompress.reference.extension.memory import Array, Header

MAX_OUT_FEATURES = 2**24
# Bits of the values that a format holds; here all formats lie alike.
SPARSE_FORMATS = {"rows": 32, "panels": 32, "quads": 8, "quads4": 8, "windows": 8, "chains": 8}
DTYPES: dict[int, Any] = {32: np.float32, 8: np.int8}
ACTIVATION_BITS = {32: (0,), 8: (7, 8)}


def _parts(of: Header) -> dict[str, tuple[Any, tuple[int, ...]]]:
    return {"mask": (np.uint8, (of["n"], -(-of["k"] // 8))), "values": (DTYPES[of["bits"]], (of["nnz"],))}


def _is_valid(of: Header) -> bool:
    named = dict(enumerate(SPARSE_FORMATS.values())).get(of["format"]) == of["bits"]
    return memory.has_shape(of) and of["nnz"] >= 0 and named and of["activation_bits"] in ACTIVATION_BITS[of["bits"]]


LAYOUT = memory.Layout("sparse", b"pyc.spa1", ("n", "k", "nnz", "bits", "activation_bits", "format"), _parts, _is_valid)


def _format(name: str, bits: int) -> str:
    """The format of this name, which must hold values of so many bits; the unstructured one for ''."""
    if not name:
        return "rows" if bits == 32 else "quads"
    if name not in SPARSE_FORMATS:
        *most, last = SPARSE_FORMATS
        raise ValueError(f"sparse_pack: no format is named '{name}', expected {', '.join(most)} or {last}")
    if SPARSE_FORMATS[name] != bits:
        holds, these = (DTYPES[size].__name__ for size in (SPARSE_FORMATS[name], bits))
        raise ValueError(f"sparse_pack: format {name} holds {holds} weights, these are {these}")
    return name


def sparse_pack(
    mask: int, values: int, n: int, k: int, nnz: int, bits: int, activation_bits: int, name: str,
    _threads: int,
) -> bytes:  # fmt: skip
    chosen = _format(name, bits)
    for what, size, most in (("out_features", n, MAX_OUT_FEATURES), ("in_features", k, memory.MAX_IN_FEATURES)):
        if not 1 <= size <= most:
            raise ValueError(f"sparse_pack: {what} is {size}, expected 1 to {most}")
    if activation_bits not in ACTIVATION_BITS[bits]:
        raise ValueError(
            f"sparse_pack: activation_bits is {activation_bits}, expected 7 or 8 for int8 weights, 0 for float32"
        )
    bitmask = memory.view(mask, np.uint8, n, -(-k // 8))
    if sparse.count(bitmask) != nnz:
        raise ValueError(f"sparse_pack: the mask has {sparse.count(bitmask)} ones, but there are {nnz} values")
    numbers = (n, k, nnz, bits, activation_bits, [*SPARSE_FORMATS].index(chosen))
    return LAYOUT.pack(dict(zip(LAYOUT.fields, numbers, strict=True)), mask, values)


def sparse_header(packed: int, packed_bytes: int) -> dict[str, Any]:
    header, _ = LAYOUT.read(packed, packed_bytes)
    return {**header, "format": [*SPARSE_FORMATS][header["format"]]}


def parts_of(packed: int, packed_bytes: int) -> tuple[dict[str, int], Array, Array]:
    """The header, the mask and the values, which fit each other."""
    header, parts = LAYOUT.read(packed, packed_bytes)
    ones, nnz = sparse.count(parts["mask"]), header["nnz"]
    if ones != nnz:
        raise ValueError(f"packed sparse weight: the mask has {ones} bits set, there are {nnz} values")
    return header, parts["mask"], parts["values"]


def sparse_unpack(packed: int, packed_bytes: int, mask: int, values: int) -> None:
    parts_of(packed, packed_bytes)
    LAYOUT.unpack(packed, packed_bytes, mask, values)


def sparse_linear(
    x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int, weight_scale: int,
    bias: int, activation: int, y: int, y_type: int, row_scale: int, zero_point: int, _threads: int,
) -> None:  # fmt: skip
    header, mask, values = parts_of(packed, packed_bytes)
    memory.check_fit("sparse_linear", (m, k), n, header)
    rows = memory.load(x, x_type, m, k, ldx)
    if header["bits"] == 8:
        if not weight_scale and y_type != memory.INT32:
            raise ValueError("sparse_linear: the packed weight is int8, expected a scale")
        weights, bits = sparse.decompress(mask, values, k), header["activation_bits"]
        return integers(rows, weights, bits, weight_scale, bias, activation, y, y_type, row_scale, zero_point)
    if weight_scale or y_type == memory.INT32:
        raise ValueError("sparse_linear: the packed weight is float32, which has neither a scale nor integer sums")
    return memory.store(y, y_type, sparse.linear(rows, mask, values, memory.vector(bias, n), code=activation))


def sparse_conv2d(
    x: int, x_type: int, images: int, channels: int, height: int, width: int, packed: int, packed_bytes: int, n: int,
    bias: int, activation: int, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_top: int, pad_left: int,
    dilation_h: int, dilation_w: int, out_h: int, out_w: int, y: int, _threads: int,
) -> None:  # fmt: skip
    header, mask, values = parts_of(packed, packed_bytes)
    if header["bits"] == 8:
        raise ValueError("sparse_conv2d: the packed weight is int8, expected float32")
    if (k := channels * kernel_h * kernel_w) != header["k"]:
        raise ValueError(
            f"sparse_conv2d: {channels} channels and a kernel of {kernel_h}x{kernel_w} make {k} positions, the packed "
            f"weight expects k = {header['k']}"
        )
    if n != header["n"]:
        raise ValueError(f"sparse_conv2d: n is {n}, the packed weight has {header['n']} channels")
    size = channels * height * width
    planes = memory.load(x, x_type, images, size, size).reshape(images, channels, height, width)
    result = np.empty((images, n, out_h, out_w), np.float32)
    for i in range(images):
        rows = sparse.patches(
            planes[i], (kernel_h, kernel_w), (stride_h, stride_w), (pad_top, pad_left), (dilation_h, dilation_w),
            (out_h, out_w),
        )  # fmt: skip
        result[i] = sparse.linear(rows, mask, values, memory.vector(bias, n), code=activation).T.reshape(
            n, out_h, out_w
        )
    return memory.store(y, x_type, result)
