"""The functions of the native module ``_C``, with the same signatures, where that was not built."""

from __future__ import annotations

import ctypes
import math
import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pycompress.reference import int8, low_rank, sparse
from pycompress.reference.activation import finish

Array = NDArray[Any]
MAX_IN_FEATURES = 65536
MAX_OUT_FEATURES = 2**24  # of the sparse op
# Bits of the values that a format holds; here all formats lie alike.
SPARSE_FORMATS = {"rows": 32, "panels": 32, "quads": 8, "quads4": 8, "windows": 8, "chains": 8}
_DTYPES: dict[int, Any] = {32: np.float32, 8: np.int8}
_ACTIVATION_BITS = {32: (0,), 8: (7, 8)}
RESIDUALS = ("", "dense", "int8", "sparse")  # by the number that the low-rank op gives them


def _view(address: int, dtype: Any, *shape: int) -> Array:
    count = math.prod(shape)
    if count == 0:
        empty: Array = np.empty(shape, dtype)
        return empty
    raw = (ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(address)
    view: Array = np.frombuffer(raw, dtype=dtype).reshape(shape)
    return view


def _load(address: int, kind: int, m: int, k: int, ldx: int) -> Array:
    """Rows of float32 (kind 0), bfloat16 (1) or float16 (2) at an address, as float32 [m, k]."""
    if m == 0:
        return np.empty((0, k), np.float32)
    dtype = (np.float32, np.uint16, np.float16)[kind]
    flat = _view(address, dtype, (m - 1) * ldx + k)
    rows = np.lib.stride_tricks.as_strided(flat, (m, k), (ldx * flat.itemsize, flat.itemsize))
    if kind == 1:
        return np.ascontiguousarray((rows.astype(np.uint32) << 16).view(np.float32))
    return np.ascontiguousarray(rows, dtype=np.float32)


def _store(address: int, kind: int, y: Array) -> None:
    if kind == 1:
        bits = y.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        _view(address, np.uint16, *y.shape)[:] = np.where(np.isnan(y), (bits >> 16) | 0x40, rounded)
    else:
        _view(address, (np.float32, None, np.float16, np.int32)[kind], *y.shape)[:] = y


def _vector(address: int, n: int) -> Array:
    """float32 [n] at an address, empty where there is none."""
    return _view(address, np.float32, n) if address else np.empty(0, np.float32)


def _sparse_format(name: str, bits: int) -> str:
    """The format of this name, which must hold values of so many bits; the unstructured one for ''."""
    if not name:
        return "rows" if bits == 32 else "quads"
    if name not in SPARSE_FORMATS:
        *most, last = SPARSE_FORMATS
        raise ValueError(f"sparse_pack: no format is named '{name}', expected {', '.join(most)} or {last}")
    if SPARSE_FORMATS[name] != bits:
        holds, these = (_DTYPES[size].__name__ for size in (SPARSE_FORMATS[name], bits))
        raise ValueError(f"sparse_pack: format {name} holds {holds} weights, these are {these}")
    return name


class _LowRank(NamedTuple):
    """The header of a packed low-rank weight."""

    n: int
    k: int
    rank: int
    bits: int
    activation_bits: int
    residual: int  # an index of RESIDUALS
    residual_bytes: int
    residual_scaled: int

    def parts(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """dtype and shape of the arrays behind the header, each of which starts at a multiple of eight bytes."""
        factors, scaled = _DTYPES[self.bits], self.bits == 8
        dense = self.residual == 1
        return {
            "down": (factors, (self.rank, self.k)),
            "up": (factors, (self.n, self.rank)),
            "down_scale": (np.float32, (self.rank if scaled else 0,)),
            "up_scale": (np.float32, (self.n if scaled else 0,)),
            "residual": (np.float32, (self.n, self.k)) if dense else (np.uint8, (self.residual_bytes,)),
            "residual_scale": (np.float32, (self.n if self.residual_scaled else 0,)),
        }

    def sizes(self) -> list[int]:
        """Bytes of the parts, with what fills them up."""
        return [-(-math.prod(shape) * np.dtype(kind).itemsize // 8) * 8 for kind, shape in self.parts().values()]

    def is_valid(self) -> bool:
        residual_bytes = {0: 0, 1: 4 * self.n * self.k}.get(self.residual, self.residual_bytes)
        return (
            self.n >= 1
            and 1 <= self.k <= MAX_IN_FEATURES
            and 1 <= self.rank <= min(self.n, self.k)
            and self.activation_bits in _ACTIVATION_BITS.get(self.bits, ())
            and 0 <= self.residual < len(RESIDUALS)
            and self.residual_scaled in {2: (1,), 3: (0, 1)}.get(self.residual, (0,))
            and self.residual_bytes == residual_bytes >= 0
        )


class Native:
    """Stands where the module ``_C`` would."""

    def kernels(self) -> list[dict[str, Any]]:
        numba = {"name": "numba", "isa": "scalar", "mr": 1, "nr": 1, "kr": 1, "available": True}
        sparse_rows = ({"op": "sparse", **numba, "format": name} for name in SPARSE_FORMATS)
        return [{"op": "int8", **numba}, *sparse_rows, {"op": "low_rank", **numba}]

    def instruction_sets(self) -> dict[str, bool]:
        return {"scalar": True}

    def use_exchange(self, _capsule: object) -> bool:
        return False

    def peak(self, loop: str, _seconds: float, _threads: int) -> float:
        raise ValueError(f"peak: the loop {loop} needs the native extension, which was not built")

    def bandwidth(self, n_bytes: int, _seconds: float, _threads: int) -> float:
        raise ValueError(f"bandwidth: reading {n_bytes} bytes needs the native extension, which was not built")

    # --- int8: a header, then the int8 values [n, k] ------------------------------------------------------------------

    _HEADER = struct.Struct("<8sqqq")
    _MAGIC = b"pyc.ref1"

    def int8_header(self, packed: int, n_bytes: int) -> dict[str, Any]:
        size = self._HEADER.size
        magic, n, k, bits = (
            self._HEADER.unpack(bytes(_view(packed, np.uint8, size))) if n_bytes >= size else (b"", 0, 0, 0)
        )
        sizes = n >= 1 and 1 <= k <= MAX_IN_FEATURES and bits in (7, 8)
        if magic != self._MAGIC or not sizes or n_bytes != size + n * k:
            raise ValueError("packed int8 weight: unknown format, expected what int8_pack of this version returns")
        return {"n": n, "k": k, "activation_bits": bits, "groups": n * k // 4, "items": (0, 0, 0)}

    def int8_pack(self, values: int, n: int, k: int, activation_bits: int, kernel: str, _threads: int) -> bytes:
        weights = _view(values, np.int8, n, k)
        if n < 1 or not 1 <= k <= MAX_IN_FEATURES:
            raise ValueError(f"int8_pack: the weight is [{n}, {k}], expected at least one row and 1 to 65536 columns")
        if activation_bits not in (7, 8):
            raise ValueError(f"int8_pack: activation_bits is {activation_bits}, expected 7 or 8")
        if kernel not in ("", "numba"):
            raise ValueError(f"no int8 kernel is named '{kernel}'")
        if (weights == -128).any():
            raise ValueError("int8_pack: a weight is -128, expected -127 to 127 (the scale is symmetric)")
        return self._HEADER.pack(self._MAGIC, n, k, activation_bits) + weights.tobytes()

    def _weights(self, packed: int, n_bytes: int) -> tuple[Array, int]:
        header = self.int8_header(packed, n_bytes)
        return _view(packed + self._HEADER.size, np.int8, header["n"], header["k"]), header["activation_bits"]

    def int8_unpack(self, packed: int, n_bytes: int, values: int) -> None:
        weights, _ = self._weights(packed, n_bytes)
        _view(values, np.int8, *weights.shape)[:] = weights

    def int8_quantize(
        self, x: int, kind: int, m: int, k: int, ldx: int, bits: int, q: int, scale: int, zero_point: int
    ) -> None:
        if bits not in (7, 8):
            raise ValueError(f"int8_quantize: activation_bits is {bits}, expected 7 or 8")
        result = int8.quantize(_load(x, kind, m, k, ldx), 2**bits - 1)
        _view(q, np.uint8, m, k)[:], _view(scale, np.float32, m)[:], _view(zero_point, np.int32, m)[:] = result

    def int8_linear(
        self, x: int, x_kind: int, m: int, k: int, ldx: int, packed: int, n_bytes: int, n: int, weight_scale: int,
        bias: int, activation: int, y: int, y_kind: int, row_scale: int, zero_point: int, _threads: int,
    ) -> None:  # fmt: skip
        weights, bits = self._weights(packed, n_bytes)
        if k != weights.shape[1]:
            raise ValueError(f"int8_linear: x is [{m}, {k}], the packed weight expects k = {weights.shape[1]}")
        if n != weights.shape[0]:
            raise ValueError(f"int8_linear: the scale has {n} channels, the packed weight {weights.shape[0]}")
        rows = _load(x, x_kind, m, k, ldx)
        self._integers(rows, weights, bits, weight_scale, bias, activation, y, y_kind, row_scale, zero_point)

    def _integers(
        self, x: Array, weights: Array, bits: int, weight_scale: int, bias: int, activation: int,
        y: int, y_kind: int, row_scale: int, zero_point: int,
    ) -> None:  # fmt: skip
        """x float32 [m, k] times int8 [n, k], into the addresses y, row_scale and zero_point (these two may be 0)."""
        m, n = len(x), len(weights)
        q, rows, zeros = int8.quantize(x, 2**bits - 1)
        acc = int8.accumulate(q, zeros, np.ascontiguousarray(weights))
        if row_scale:
            _view(row_scale, np.float32, m)[:] = rows
        if zero_point:
            _view(zero_point, np.int32, m)[:] = zeros
        if y_kind == 3:
            return _store(y, y_kind, acc)
        v = int8.rescale(acc, rows, _vector(weight_scale, n))
        return _store(y, y_kind, finish(v, _vector(bias, n), activation))

    # --- sparse: a header, the values [nnz], then the mask [n, ceil(k / 8)] --------------------------------------------

    _SPARSE_HEADER = struct.Struct("<8sqqqqq8s")
    _SPARSE_MAGIC = b"pyc.spa1"

    def sparse_pack(
        self, mask: int, values: int, n: int, k: int, nnz: int, bits: int, activation_bits: int, name: str,
        _threads: int,
    ) -> bytes:  # fmt: skip
        chosen = _sparse_format(name, bits)
        for what, size, most in (("out_features", n, MAX_OUT_FEATURES), ("in_features", k, MAX_IN_FEATURES)):
            if not 1 <= size <= most:
                raise ValueError(f"sparse_pack: {what} is {size}, expected 1 to {most}")
        if activation_bits not in _ACTIVATION_BITS[bits]:
            raise ValueError(
                f"sparse_pack: activation_bits is {activation_bits}, expected 7 or 8 for int8 weights, 0 for float32"
            )
        bitmask, numbers = _view(mask, np.uint8, n, -(-k // 8)), _view(values, _DTYPES[bits], nnz)
        if sparse.count(bitmask) != nnz:
            raise ValueError(f"sparse_pack: the mask has {sparse.count(bitmask)} ones, but there are {nnz} values")
        header = self._SPARSE_HEADER.pack(self._SPARSE_MAGIC, n, k, nnz, bits, activation_bits, chosen.encode())
        return header + numbers.tobytes() + bitmask.tobytes()

    def sparse_header(self, packed: int, n_bytes: int) -> dict[str, Any]:
        size = self._SPARSE_HEADER.size
        data = bytes(_view(packed, np.uint8, size)) if n_bytes >= size else bytes(size)
        magic, n, k, nnz, bits, activation_bits, padded = self._SPARSE_HEADER.unpack(data)
        name = padded.rstrip(b"\0").decode(errors="replace")
        if (
            magic != self._SPARSE_MAGIC
            or n < 1
            or not 1 <= k <= MAX_IN_FEATURES
            or nnz < 0
            or SPARSE_FORMATS.get(name) != bits
            or activation_bits not in _ACTIVATION_BITS[bits]
            or n_bytes != size + nnz * bits // 8 + n * -(-k // 8)
        ):
            raise ValueError("packed sparse weight: unknown format, expected what sparse_pack of this version returns")
        return {"n": n, "k": k, "nnz": nnz, "bits": bits, "activation_bits": activation_bits, "format": name}

    def _sparse(self, packed: int, n_bytes: int) -> tuple[dict[str, Any], Array, Array]:
        """The header, the mask and the values, which fit each other."""
        header = self.sparse_header(packed, n_bytes)
        n, k, nnz, dtype = header["n"], header["k"], header["nnz"], _DTYPES[header["bits"]]
        start = packed + self._SPARSE_HEADER.size
        values = _view(start, dtype, nnz)
        mask = _view(start + values.nbytes, np.uint8, n, -(-k // 8))
        if sparse.count(mask) != nnz:
            raise ValueError(
                f"packed sparse weight: the mask has {sparse.count(mask)} bits set, there are {nnz} values"
            )
        return header, mask, values

    def sparse_unpack(self, packed: int, n_bytes: int, mask: int, values: int) -> None:
        _, own_mask, own_values = self._sparse(packed, n_bytes)
        _view(mask, np.uint8, *own_mask.shape)[:] = own_mask
        _view(values, own_values.dtype, *own_values.shape)[:] = own_values

    def sparse_linear(
        self, x: int, x_kind: int, m: int, k: int, ldx: int, packed: int, n_bytes: int, n: int, weight_scale: int,
        bias: int, activation: int, y: int, y_kind: int, row_scale: int, zero_point: int, _threads: int,
    ) -> None:  # fmt: skip
        header, mask, values = self._sparse(packed, n_bytes)
        if k != header["k"]:
            raise ValueError(f"sparse_linear: x is [{m}, {k}], the packed weight expects k = {header['k']}")
        if n != header["n"]:
            raise ValueError(f"sparse_linear: n is {n}, the packed weight has {header['n']} channels")
        rows = _load(x, x_kind, m, k, ldx)
        if header["bits"] == 8:
            if not weight_scale and y_kind != 3:
                raise ValueError("sparse_linear: the packed weight is int8, expected a scale")
            weights, bits = sparse.decompress(mask, values, k), header["activation_bits"]
            return self._integers(rows, weights, bits, weight_scale, bias, activation, y, y_kind, row_scale, zero_point)
        if weight_scale or y_kind == 3:
            raise ValueError("sparse_linear: the packed weight is float32, which has neither a scale nor integer sums")
        return _store(y, y_kind, sparse.linear(rows, mask, values, _vector(bias, n), code=activation))

    def sparse_conv2d(
        self, x: int, x_kind: int, images: int, channels: int, height: int, width: int, packed: int, n_bytes: int, n: int,
        bias: int, activation: int, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_top: int, pad_left: int,
        dilation_h: int, dilation_w: int, out_h: int, out_w: int, y: int, _threads: int,
    ) -> None:  # fmt: skip
        header, mask, values = self._sparse(packed, n_bytes)
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
        planes = _load(x, x_kind, images, size, size).reshape(images, channels, height, width)
        result = np.empty((images, n, out_h, out_w), np.float32)
        for i in range(images):
            rows = sparse.patches(
                planes[i], (kernel_h, kernel_w), (stride_h, stride_w), (pad_top, pad_left), (dilation_h, dilation_w),
                (out_h, out_w),
            )  # fmt: skip
            result[i] = sparse.linear(rows, mask, values, _vector(bias, n), code=activation).T.reshape(n, out_h, out_w)
        return _store(y, x_kind, result)

    # --- low rank: a header, then the factors, their scales, the residual and its scale -------------------------------

    _LOW_RANK_HEADER = struct.Struct("<8s8q")
    _LOW_RANK_MAGIC = b"pyc.low1"

    def low_rank_pack(
        self, down: int, up: int, n: int, k: int, rank: int, bits: int, activation_bits: int, down_scale: int,
        up_scale: int, residual_kind: int, residual: int, residual_bytes: int, residual_scale: int, _threads: int,
    ) -> bytes:  # fmt: skip
        if not 1 <= k <= MAX_IN_FEATURES:
            raise ValueError(f"low_rank_pack: in_features is {k}, expected 1 to {MAX_IN_FEATURES}")
        if not 1 <= rank <= min(n, k):
            raise ValueError(f"low_rank_pack: the rank is {rank}, expected 1 to {min(n, k)} for a weight [{n}, {k}]")
        if activation_bits not in _ACTIVATION_BITS[bits]:
            raise ValueError(
                f"low_rank_pack: activation_bits is {activation_bits}, expected 7 or 8 for int8 factors, 0 for float32"
            )
        header = _LowRank(n, k, rank, bits, activation_bits, residual_kind, residual_bytes, int(residual_scale != 0))
        addresses = (down, up, down_scale, up_scale, residual, residual_scale)
        self._check_residual("low_rank_pack", header, residual)
        pieces = [self._LOW_RANK_HEADER.pack(self._LOW_RANK_MAGIC, *header)]
        for address, (kind, shape), size in zip(addresses, header.parts().values(), header.sizes(), strict=True):
            pieces.append(_view(address, kind, *shape).tobytes().ljust(size, b"\0"))
        return b"".join(pieces)

    def _check_residual(self, op: str, header: _LowRank, residual: int) -> None:
        """The packed residual at an address has the size of the factors' product, and a scale where it is int8."""
        if header.residual < 2:
            return
        describe = self.int8_header if header.residual == 2 else self.sparse_header
        own = describe(residual, header.residual_bytes)
        if (own["n"], own["k"]) != (header.n, header.k):
            raise ValueError(
                f"{op}: the residual is {own['n']}x{own['k']}, expected {header.n}x{header.k} as the factors"
            )
        bits = own.get("bits", 8)
        if header.residual_scaled != (bits == 8):
            given = "a scale" if header.residual_scaled else "no scale"
            raise ValueError(f"{op}: the residual has {given}, expected one for int8 values and none for float32")

    def low_rank_header(self, packed: int, n_bytes: int) -> dict[str, Any]:
        header = self._low_rank(packed, n_bytes)
        named = {"residual": RESIDUALS[header.residual], "residual_scaled": bool(header.residual_scaled)}
        return {**header._asdict(), **named}

    def _low_rank(self, packed: int, n_bytes: int) -> _LowRank:
        size = self._LOW_RANK_HEADER.size
        data = bytes(_view(packed, np.uint8, size)) if n_bytes >= size else bytes(size)
        magic, *fields = self._LOW_RANK_HEADER.unpack(data)
        header = _LowRank(*fields)
        if magic != self._LOW_RANK_MAGIC or not header.is_valid() or n_bytes != size + sum(header.sizes()):
            raise ValueError(
                "packed low-rank weight: unknown format, expected what low_rank_pack of this version returns"
            )
        self._check_residual("packed low-rank weight", header, self._addresses(packed, header)["residual"])
        return header

    def _addresses(self, packed: int, header: _LowRank) -> dict[str, int]:
        """Where the parts lie."""
        starts = np.cumsum([packed + self._LOW_RANK_HEADER.size, *header.sizes()])
        return dict(zip(header.parts(), map(int, starts), strict=False))

    def _parts(self, packed: int, header: _LowRank) -> dict[str, Array]:
        """The arrays themselves, as views."""
        addresses = self._addresses(packed, header)
        return {name: _view(addresses[name], kind, *shape) for name, (kind, shape) in header.parts().items()}

    def low_rank_unpack(
        self, packed: int, n_bytes: int, down: int, up: int, down_scale: int, up_scale: int, residual: int,
        residual_scale: int,
    ) -> None:  # fmt: skip
        parts = self._parts(packed, self._low_rank(packed, n_bytes))
        addresses = (down, up, down_scale, up_scale, residual, residual_scale)
        for address, part in zip(addresses, parts.values(), strict=True):
            if address:
                _view(address, part.dtype, *part.shape)[:] = part

    def low_rank_linear(
        self, x: int, x_kind: int, m: int, k: int, ldx: int, packed: int, n_bytes: int, n: int, bias: int,
        activation: int, y: int, y_kind: int, intermediate: int, _threads: int,
    ) -> None:  # fmt: skip
        header = self._low_rank(packed, n_bytes)
        if k != header.k:
            raise ValueError(f"low_rank_linear: x is [{m}, {k}], the packed weight expects k = {header.k}")
        if n != header.n:
            raise ValueError(f"low_rank_linear: n is {n}, the packed weight has {header.n} channels")
        rows, parts, bits = _load(x, x_kind, m, k, ldx), self._parts(packed, header), header.activation_bits
        t = low_rank.intermediate(rows, parts["down"], parts["down_scale"], activation_bits=bits)
        if intermediate:
            _view(intermediate, np.float32, m, header.rank)[:] = t
        v = low_rank.expand(t, parts["up"], parts["up_scale"], _vector(bias, n) if bias else None, activation_bits=bits)
        v = self._with_residual(rows, header, parts, v)
        return _store(y, y_kind, finish(v, np.empty(0, np.float32), activation))

    def _with_residual(self, x: Array, header: _LowRank, parts: dict[str, Array], addend: Array) -> Array:
        """What the residual makes of x float32 [m, k], and the addend float32 [m, n]."""
        residual, scale = parts["residual"], parts["residual_scale"]
        if header.residual == 0:
            return addend
        if header.residual == 1:
            return low_rank.product(x, residual, addend)
        total: Array = low_rank.add(self._residual_sums(x, header.residual, residual, scale), addend)
        return total

    def _residual_sums(self, x: Array, kind: int, packed: Array, scale: Array) -> Array:
        """x float32 [m, k] times the weight that int8_pack (kind 2) or sparse_pack (3) packed."""
        address, n_bytes = packed.ctypes.data, len(packed)
        if kind == 2:
            weights, bits = self._weights(address, n_bytes)
            return int8.linear(x, weights, scale, activation_bits=bits)
        header, mask, values = self._sparse(address, n_bytes)
        if header["bits"] == 32:
            return sparse.accumulate(x, mask, values)
        weights, bits = sparse.decompress(mask, values, header["k"]), header["activation_bits"]
        return int8.linear(x, weights, scale, activation_bits=bits)
