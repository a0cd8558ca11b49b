"""The only door to the native module ``_cuda``: the CUDA kernels of the int8 ops (``csrc/int8/cuda.h``).

The module is loaded when CUDA is first asked for, so importing the package touches no GPU. Everything is launched on torch's
current stream; nothing waits for the device but packing, which is no part of a forward pass.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycompress.ops.native import FLOATS, INT32, activation_code, check, rows_of

SMALLEST_ARCH = 80
_NOTHING_BEFORE = (0, 0, 0, 0.0, 0, 0)  # as _cuda.pyi has it


@cache
def _load() -> tuple[Any, str | None]:
    """The native module, or why there is none."""
    try:
        return import_module("pycompress._cuda"), None
    except ModuleNotFoundError:
        return None, "pycompress was built without CUDA kernels (PYCOMPRESS_CUDA=ON makes the build ask for nvcc)"
    except ImportError as error:
        return None, f"the CUDA kernels cannot be loaded: {error}"


def cuda_error(device: torch.device | None = None) -> str | None:
    """Why the CUDA kernels cannot run (on ``device``, or on any); None where they can."""
    why = _load()[1]
    if why is not None:
        return why
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _capability_error(torch.cuda.current_device() if device is None or device.index is None else device.index)


@cache
def _capability_error(index: int) -> str | None:
    try:
        arch = _load()[0].compute_capability(index)
    except RuntimeError as error:  # such as a driver that is older than the toolkit the kernels were built with
        return str(error)
    if arch >= SMALLEST_ARCH:
        return None
    return f"{torch.cuda.get_device_name(index)} has compute capability {arch / 10}, expected 8.0 or later"


def native(op: str, device: torch.device | None = None) -> Any:
    """The native module. Raises RuntimeError, saying why, where the kernels cannot run."""
    why = cuda_error(device)
    if why is not None:
        raise RuntimeError(f"{op}: no CUDA here: {why}")
    return _load()[0]


def cuda_kernels() -> list[dict[str, Any]]:
    """The CUDA kernels of the int8 GEMM: op, name, arch (compute capability times ten), tile bm x bn, bytes of k a stage, stages.

    Best first. Empty where none were built. Asks for no device.
    """
    module = _load()[0]
    return [] if module is None else module.int8_kernels()


_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def stream_of(device: int) -> int:
    """Torch's current stream on a device, as an address. (``torch.cuda.current_stream`` takes 20 times as long.)"""
    if _raw_stream is not None:
        return int(_raw_stream(device))
    return int(torch.cuda.current_stream(device).cuda_stream)


def check_devices(op: str, x: Tensor, *others: Tensor | None) -> None:
    """Raises RuntimeError, naming the devices, unless x is on a CUDA device and all others are there too."""
    if x.is_cuda and all(other is None or other.device == x.device for other in others):
        return
    devices = ", ".join(sorted({str(t.device) for t in (x, *others) if t is not None}))
    raise RuntimeError(f"{op}: the tensors are on {devices}, expected all of them on one CUDA device or on the CPU")


def check_vector(op: str, name: str, tensor: Tensor, dtype: torch.dtype, size: int | None = None) -> None:
    """Raises ValueError where the tensor is no dense vector of this dtype (and size)."""
    if tensor.dtype is dtype and tensor.dim() == 1 and tensor.is_contiguous() and size in (None, tensor.shape[0]):
        return
    expected = "" if size is None else f" of {size} values"
    raise ValueError(f"{op}: {name} is {tensor.dtype} {list(tensor.shape)}, expected a dense {dtype} vector{expected}")


def aligned_rows(x: Tensor, ldx: int) -> tuple[Tensor, int]:
    """What ``rows_of`` gave, with rows of 16 bit values that begin at multiples of 16 bytes: a copy where they do not."""
    if ldx % 8 == 0 and x.data_ptr() % 16 == 0:
        return x, ldx
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    padded = x.new_zeros((rows.shape[0], -(-k // 8) * 8))
    padded[:, :k] = rows
    return padded, padded.shape[1]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Before(NamedTuple):
    """What the quantizer computes in front of the layer (``ops/int8_fused.py``)."""

    code: int
    weight: Tensor | None
    shift: Tensor | None
    eps: float
    gate: Tensor | None


def int8_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, activation: str, kernel: str = "",
    before: Before | None = None,
) -> Tensor:  # fmt: skip
    """``ops.int8_linear`` for tensors on a CUDA device; ``kernel``: a name from :func:`cuda_kernels`, to force it."""
    op = "int8_linear"
    check_devices(op, x, packed, scale, bias)
    module = native(op, x.device)
    x, ldx = rows_of(op, x)
    code = activation_code(op, activation)
    n = scale.shape[0] if scale.dim() else 0
    check_vector(op, "packed", packed, torch.uint8)
    check_vector(op, "scale", scale, torch.float32)
    if bias is not None:
        check_vector(op, "bias", bias, torch.float32, n)
    k = x.shape[-1]
    m = x.numel() // k if k else 0
    y = x.new_empty((*x.shape[:-1], n))
    workspace = torch.empty(module.int8_workspace(m, k), dtype=torch.uint8, device=x.device)
    kind, device = FLOATS[x.dtype], x.device.index
    front = _NOTHING_BEFORE
    if before is not None:
        weight, shift = (None if t is None else t.contiguous() for t in (before.weight, before.shift))
        gate, ldg = (None, 0) if before.gate is None else rows_of(op, before.gate)
        front = (before.code, _address(weight), _address(shift), before.eps, _address(gate), ldg)
    module.int8_linear(
        device, stream_of(device), x.data_ptr(), kind, m, k, ldx, front, packed.data_ptr(), packed.shape[0], n,
        scale.data_ptr(), _address(bias), code, y.data_ptr(), kind, workspace.data_ptr(), kernel,
    )  # fmt: skip
    return y


def int8_pack(values: Tensor, activation_bits: int, kernel: str = "") -> Tensor:
    """``ops.int8_pack`` on a CUDA device: one layout for all kernels, so none can be named. Waits for the device."""
    op = "int8_pack"
    module = native(op, values.device)
    check(kernel == "", f"int8_pack: kernel is {kernel!r}, expected none: all CUDA kernels read one layout")
    check(
        values.dtype == torch.int8 and values.dim() == 2,
        f"int8_pack: values is {values.dtype} {list(values.shape)}, expected int8 [n, k]",
    )
    values = values.contiguous()
    (n, k), device = values.shape, values.device.index
    packed = torch.empty(module.int8_packed_bytes(n, k), dtype=torch.uint8, device=values.device)
    refused = torch.zeros(1, dtype=torch.int32, device=values.device)
    module.int8_pack(
        device, stream_of(device), values.data_ptr(), n, k, activation_bits, packed.data_ptr(), refused.data_ptr()
    )
    check(not refused.item(), "int8_pack: a weight is -128, expected -127 to 127 (the scale is symmetric)")
    return packed


def int8_unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """``ops.int8_unpack`` on a CUDA device."""
    op = "int8_unpack"
    module = native(op, packed.device)
    check_vector(op, "packed", packed, torch.uint8)
    values = torch.empty((n, k), dtype=torch.int8, device=packed.device)
    device = packed.device.index
    module.int8_unpack(device, stream_of(device), packed.data_ptr(), packed.shape[0], n, k, values.data_ptr())
    return values


def int8_header(packed: Tensor) -> dict[str, Any]:
    """n, k and activation_bits of a packed weight on a CUDA device. Waits for the device."""
    check_vector("int8_header", "packed", packed, torch.uint8)
    magic, n, k, bits = packed[:16].cpu().view(torch.int32).tolist() if packed.numel() >= 16 else (0, 0, 0, 0)
    bytes_expected = native("int8_header", packed.device).int8_packed_bytes(n, k) if magic == _MAGIC else 0
    check(
        packed.numel() == bytes_expected,
        "packed int8 weight: unknown format, expected what int8_pack returns on a CUDA device",
    )
    return {"n": n, "k": k, "activation_bits": bits}


_MAGIC = int.from_bytes(b"pyc8", "little")


def int8_rows(x: Tensor, ldx: int, activation_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The quantizer alone: x [m, k] with row stride ldx -> workspace uint8, and in it scale [m] and zero point [m]."""
    module = native("int8_quantize", x.device)
    (m, k), device = x.shape, x.device.index
    workspace = torch.empty(module.int8_workspace(m, k), dtype=torch.uint8, device=x.device)
    module.int8_quantize(
        device, stream_of(device), x.data_ptr(), FLOATS[x.dtype], m, k, ldx, _NOTHING_BEFORE, activation_bits,
        workspace.data_ptr(),
    )  # fmt: skip
    tail = workspace[workspace.shape[0] - 8 * m :]
    return workspace, tail[: 4 * m].view(torch.float32), tail[4 * m :].view(torch.int32)


def int8_quantize(x: Tensor, ldx: int, activation_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.int8_quantize`` on a CUDA device."""
    workspace, scale, zero_point = int8_rows(x, ldx, activation_bits)
    (m, k), device = x.shape, x.device.index
    q = torch.empty((m, k), dtype=torch.uint8, device=x.device)
    native("int8_quantize", x.device).int8_unsigned_rows(
        device, stream_of(device), workspace.data_ptr(), m, k, q.data_ptr()
    )
    return q, scale.clone(), zero_point.clone()


def int8_multiply(
    rows: Tensor, k: int, packed: Tensor, y: Tensor, scale: Tensor | None = None, bias: Tensor | None = None,
    activation: str = "none", kernel: str = "",
) -> None:  # fmt: skip
    """The GEMM alone, on rows from :func:`int8_rows`, into y [m, n]; int32 y takes the sums and needs no scale."""
    module, device = native("int8_linear", y.device), y.device.index
    m, n = y.shape
    module.int8_multiply(
        device, stream_of(device), m, k, packed.data_ptr(), packed.shape[0], n,
        _address(scale), _address(bias),
        activation_code("int8_linear", activation), y.data_ptr(), INT32 if y.dtype == torch.int32 else FLOATS[y.dtype],
        rows.data_ptr(), kernel,
    )  # fmt: skip


def int8_accumulate(x: Tensor, ldx: int, packed: Tensor, kernel: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """``ops.int8_accumulate`` on a CUDA device. Waits for the device: n and the bits stand in the packed weight."""
    check_devices("int8_accumulate", x, packed)
    header = int8_header(packed)
    rows, scale, zero_point = int8_rows(x, ldx, header["activation_bits"])
    acc = torch.empty((x.shape[0], header["n"]), dtype=torch.int32, device=x.device)
    int8_multiply(rows, x.shape[1], packed, acc, kernel=kernel)
    return acc, scale.clone(), zero_point.clone()
