"""The only door to the native module ``_cuda``, and what all ops on a CUDA device check before they call it.

The module is loaded when CUDA is first asked for, so importing the package touches no GPU. Everything is launched on torch's
current stream; nothing waits for the device but packing and unpacking, which are no part of a forward pass.

A packed weight is one uint8 vector: the kernel's buffer, ``bytes`` of its form, and behind it the scale of the output channels
where the weight has one, float32 [n].
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycompress.ops.checks import activation_code, rows_of

SMALLEST_ARCH = 80
HALVES = (torch.bfloat16, torch.float16)


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


def address(tensor: Tensor | None) -> int:
    """Of a tensor's first value; 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def room(size: int, device: torch.device) -> Tensor | None:
    """So many bytes for a kernel to work in; None for none."""
    return torch.empty(size, dtype=torch.uint8, device=device) if size else None


# --- checks -----------------------------------------------------------------------------------------------------------


def check_devices(op: str, x: Tensor, *others: Tensor | None) -> None:
    """Raises RuntimeError, naming the devices, unless x is on a CUDA device and all others are there too."""
    if x.is_cuda and all(other is None or other.device == x.device for other in others):
        return
    devices = ", ".join(sorted({str(t.device) for t in (x, *others) if t is not None}))
    raise RuntimeError(f"{op}: the tensors are on {devices}, expected all of them on one CUDA device or on the CPU")


def check_vector(op: str, name: str, tensor: Tensor, dtype: torch.dtype, size: int) -> None:
    """Raises ValueError where the tensor is no dense vector of this dtype and size."""
    if tensor.dtype is dtype and tensor.dim() == 1 and tensor.is_contiguous() and tensor.shape[0] == size:
        return
    raise ValueError(
        f"{op}: {name} is {tensor.dtype} {list(tensor.shape)}, expected a dense {dtype} vector of {size} values"
    )


class Operands(NamedTuple):
    """Of a linear op, checked: x [..., k] with its rows ldx elements apart, m of them, and y [..., n]."""

    x: Tensor
    ldx: int
    m: int
    y: Tensor
    activation: int


def operands(
    op: str, x: Tensor, packed: Tensor, shape: tuple[int, int], size: int, bias: Tensor | None, activation: str,
    dtype: torch.dtype | None = None,
) -> Operands:  # fmt: skip
    """Checks what a linear op is given.

    Args:
        shape: (n, k) of the packed weight, of which there are ``size`` bytes.
        dtype: the one that x must have, where one is wanted.
    Raises:
        TypeError: another dtype of x. ValueError: sizes or dtypes do not fit. RuntimeError: the tensors are not on one CUDA device.
    """
    check_devices(op, x, packed, bias)
    x, ldx = rows_of(op, x)
    n, k = shape
    if dtype is not None and x.dtype is not dtype:
        raise TypeError(f"{op}: x is {x.dtype}, expected {dtype} as the values of the packed weight")
    if x.shape[-1] != k:
        raise ValueError(f"{op}: x is {list(x.shape)}, the packed weight expects k = {k}")
    code = activation_code(op, activation)
    check_vector(op, "packed", packed, torch.uint8, size)
    if bias is not None:
        check_vector(op, "bias", bias, torch.float32, n)
    return Operands(x, ldx, x.numel() // k, x.new_empty((*x.shape[:-1], n)), code)


def check_halves(op: str, x: Tensor, why: str = "") -> None:
    """Raises TypeError where x is not in one of the types of 16 bits."""
    if x.dtype not in HALVES:
        raise TypeError(f"{op}: x is {x.dtype}, expected bfloat16 or float16 on a CUDA device{why}")


def aligned_rows(x: Tensor, ldx: int) -> tuple[Tensor, int]:
    """What ``rows_of`` gave, with rows of 16 bit values that begin at multiples of 16 bytes: a copy where they do not."""
    if ldx % 8 == 0 and x.data_ptr() % 16 == 0:
        return x, ldx
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    padded = x.new_zeros((rows.shape[0], -(-k // 8) * 8))
    padded[:, :k] = rows
    return padded, padded.shape[1]


# --- the scale behind the kernel's buffer -----------------------------------------------------------------------------


def with_scale(op: str, buffer: Tensor, scale: Tensor, n: int) -> Tensor:
    """The packed weight of a kernel's buffer and the scale of its n channels. Raises ValueError for another scale."""
    scale = scale.detach().contiguous()
    check_vector(op, "scale", scale, torch.float32, n)
    return torch.cat((buffer, scale.view(torch.uint8)))


def scale_in(packed: Tensor, size: int) -> Tensor:
    """The scale in a packed weight whose buffer has ``size`` bytes, as a tensor of its own."""
    return packed[size:].clone().view(torch.float32)
