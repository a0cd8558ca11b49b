"""The only door to the native module ``_C``, and what every op needs: torch's library, the checks, the short way in."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import Tensor

from pycompress import reference

_C: Any
try:
    # After torch, whose libgomp the extension then shares: one pool, one thread count.
    _C = import_module("pycompress._C")
    _extension_error: str | None = None
except ModuleNotFoundError as error:  # built without a compiler: the numba twin stands in
    _C = reference.extension
    _extension_error = str(error)

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT32 = 3
MAX_IN_FEATURES = 65536  # int32 sums cannot overflow up to here

library = torch.library.Library("pycompress", "DEF")
EXACT_STRIDES = (torch.Tag.needs_exact_strides,) if hasattr(torch.Tag, "needs_exact_strides") else ()


def extension_error() -> str | None:
    """Why the native module is absent and the numba twin runs instead; None where it is there."""
    return _extension_error


def kernels() -> list[dict[str, Any]]:
    """All kernels that were compiled, best first: op, name, isa, mr, nr, kr, available (here, under PYCOMPRESS_ISA).

    Those of the sparse op name the format that they read, too.
    """
    rows: list[dict[str, Any]] = _C.kernels()
    return rows


def instruction_sets() -> dict[str, bool]:
    """Which instruction sets this processor and its operating system offer, whatever PYCOMPRESS_ISA says."""
    sets: dict[str, bool] = _C.instruction_sets()
    return sets


def peak(loop: str, seconds: float = 0.05) -> float:
    """G op/s that this machine reaches at most, on all of torch's threads.

    Args:
        loop: ``fp32_fma``, or ``maddubs_d1`` / ``_d2`` / ``_d4`` / ``_d8``: u8 * s8 products, of which one, two, four or eight are
            added in 16 bits before they are widened.
    Raises:
        ValueError: for another name, or where the processor has no AVX2.
    """
    return float(_C.peak(loop, seconds, torch.get_num_threads()))


def bandwidth(n_bytes: int, seconds: float = 0.05) -> float:
    """Read bandwidth in GB/s over ``n_bytes`` split among torch's threads. Raises ValueError without AVX2."""
    return float(_C.bandwidth(n_bytes, seconds, torch.get_num_threads()))


# --- checks -----------------------------------------------------------------------------------------------------------


def check(condition: bool, message: str) -> None:
    """Raises ValueError with the message where the condition does not hold."""
    if not condition:
        raise ValueError(message)


def check_float(op: str, x: Tensor) -> None:
    """Raises TypeError where x is of a dtype that no kernel reads."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x is {x.dtype}, expected float32, bfloat16 or float16")


def rows_of(op: str, x: Tensor) -> tuple[Tensor, int]:
    """``x`` as it can be walked by rows: [..., k] with dense rows one stride apart; and that stride in elements."""
    if x.dtype not in FLOATS:
        check_float(op, x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x is a scalar, expected [..., k]")
    if x.is_neg() or x._is_zerotensor():  # views without memory of their own kind
        x = x.resolve_neg() if x.is_neg() else torch.zeros(x.shape, dtype=x.dtype)
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]


def matrix_of(op: str, x: Tensor) -> tuple[Tensor, int]:
    """As :func:`rows_of`, for an x that must be [m, k]."""
    x, ldx = rows_of(op, x)
    check(x.dim() == 2, f"{op}: x is {list(x.shape)}, expected [m, k]")
    return x, ldx


def check_operand(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError where the tensor is no dense vector of this dtype on the CPU."""
    if tensor.dtype is dtype and tensor.is_cpu and tensor.dim() == 1 and tensor.is_contiguous():
        return
    source = f" from {op.rpartition('_')[0]}_pack" if name == "packed" else " with one value per output channel"
    raise ValueError(
        f"{op}: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected a dense {dtype} vector on "
        f"the CPU{source}"
    )


def channels(op: str, name: str, tensor: Tensor, n: int) -> int:
    """The address of a float32 [n]. Raises ValueError where the tensor is none."""
    check_operand(op, name, tensor, torch.float32)
    if tensor.shape[0] != n:
        raise ValueError(f"{op}: {name} is {list(tensor.shape)}, expected [{n}]")
    return tensor.data_ptr()


def linear_cpu(
    op: str, x: Tensor, packed: Tensor, n: int, bias: Tensor | None, activation: str, *further: int
) -> Tensor:
    """Checks the operands of an op whose packed weight holds its scales, and calls the native function of its name.

    Args:
        further: what that function takes behind y, before the number of threads.
    """
    x, ldx = rows_of(op, x)
    code = activation_code(op, activation)
    check_operand(op, "packed", packed, torch.uint8)
    bias_address = 0 if bias is None else channels(op, "bias", bias, n)
    k = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], n))
    kind = FLOATS[x.dtype]
    getattr(_C, op)(
        x.data_ptr(), kind, x.numel() // k if k else 0, k, ldx, packed.data_ptr(), packed.shape[0], n, bias_address,
        code, y.data_ptr(), kind, *further, torch.get_num_threads(),
    )  # fmt: skip
    return y


def activation_code(op: str, activation: str) -> int:
    """What the kernels call an activation. Raises ValueError where they know none of this name."""
    code = ACTIVATIONS.get(activation)
    if code is None:
        raise ValueError(f"{op}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    return code


def not_on_cpu(op: str, *tensors: Tensor | None) -> NoReturn:
    """Raises the RuntimeError of an op that was called with tensors of another device."""
    devices = ", ".join(sorted({str(t.device) for t in tensors if isinstance(t, Tensor)}))
    raise RuntimeError(
        f"{op}: the tensors are on {devices}, expected all of them on the CPU: this layer has CPU kernels only"
    )


def implement(
    name: str,
    cpu: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    vmapped: Callable[..., Tensor],
    cuda: Callable[..., Tensor] | None = None,
) -> Any:
    """Registers what a defined op of x and a packed weight does; returns the op.

    Args:
        cpu, fake: the op itself, and its result's shape and dtype.
        vmapped: the op for x with the dimension of ``torch.vmap`` in front.
        cuda: the op on a CUDA device; without it, an error there.
    """

    def elsewhere(*operands: Any) -> NoReturn:
        not_on_cpu(name, *operands)

    def vmap(_info: Any, in_dims: tuple[Any, ...], x: Tensor, *operands: Any) -> tuple[Tensor, int]:
        if any(isinstance(dim, int) for dim in in_dims[1:]):
            raise NotImplementedError(f"{name}: vmap over the weights, expected over x only")
        return vmapped(x.movedim(in_dims[0], 0), *operands), 0

    library.impl(name, cpu, "CPU")
    library.impl(name, elsewhere if cuda is None else cuda, "CUDA")
    torch.library.register_fake(f"pycompress::{name}", fake, lib=library)
    torch.library.register_vmap(f"pycompress::{name}", vmap, lib=library)
    return getattr(torch.ops.pycompress, name).default


def vector(data: bytes) -> Tensor:
    """The bytes as a uint8 vector: aligned by torch, and filled without its thread pool (fork)."""
    packed = torch.empty(len(data), dtype=torch.uint8)
    ctypes.memmove(packed.data_ptr(), data, len(data))
    return packed


# --- the short way in -------------------------------------------------------------------------------------------------

_tracing = getattr(torch._C, "_is_tracing", None)
_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)

# torch >= 2.10 lets the native module read tensors itself; before, and with the numba twin, their addresses are passed.
reads_tensors = hasattr(Tensor, "__dlpack_c_exchange_api__") and _C.use_exchange(Tensor.__dlpack_c_exchange_api__)


def is_plain(x: Tensor) -> bool:
    """x is on the CPU, and nobody is looking: no compiler, tracer, tensor subclass or dispatch mode that must see the op.

    Then the kernel is called without torch's dispatcher, which costs as much as a small layer (5 us of 9).
    """
    return x.is_cpu and nobody_looks(x)


def nobody_looks(x: Tensor) -> bool:
    """As :func:`is_plain`, for x on any device."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not x.requires_grad
        and not x.is_neg()
        and _transforms is not None
        and _transforms() is None
        and _tracing is not None
        and not _tracing()
        and _dispatch_modes is not None
        and not _dispatch_modes()
    )
