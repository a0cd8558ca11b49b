"""The ops of pycompress as torch sees them: schemas, fakes, checks. The only door to the native module ``_C``.

Every op is registered with ``torch.library`` (``define`` and ``impl``, the cheapest of its ways to dispatch), so that
``torch.compile(fullgraph=True)``, ``torch.export`` and ``FakeTensor`` work. The layers call the functions of this module.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pycompress import reference

_C: Any
try:
    # After torch, whose libgomp the extension then shares: one pool, one thread count.
    _C = import_module("pycompress._C")
    _extension_error: str | None = None
except ModuleNotFoundError as error:  # built without a compiler: the numba twin stands in
    _C = reference.Native()
    _extension_error = str(error)

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT32 = 3
MAX_IN_FEATURES = 65536  # int32 sums cannot overflow up to here

_library = torch.library.Library("pycompress", "DEF")


def extension_error() -> str | None:
    """Why the native module is absent and the numba twin runs instead; None where it is there."""
    return _extension_error


def kernels() -> list[dict[str, Any]]:
    """All kernels that were compiled, best first: op, name, isa, mr, nr, kr, available (here, under PYCOMPRESS_ISA)."""
    rows: list[dict[str, Any]] = _C.kernels()
    return rows


def instruction_sets() -> dict[str, bool]:
    """Which instruction sets this processor and its operating system offer, whatever PYCOMPRESS_ISA says."""
    sets: dict[str, bool] = _C.instruction_sets()
    return sets


def peak(loop: str, seconds: float = 0.05) -> float:
    """G op/s that this machine reaches at most, on all of torch's threads.

    Args:
        loop: ``fp32_fma``, or ``maddubs_d1`` / ``maddubs_d2`` / ``maddubs_d4``: u8 * s8 products, of which one, two or four are
            added in 16 bits before they are widened.
    Raises:
        ValueError: for another name, or where the processor has no AVX2.
    """
    return float(_C.peak(loop, seconds, torch.get_num_threads()))


def bandwidth(n_bytes: int, seconds: float = 0.05) -> float:
    """Read bandwidth in GB/s over ``n_bytes`` split among torch's threads. Raises ValueError without AVX2."""
    return float(_C.bandwidth(n_bytes, seconds, torch.get_num_threads()))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _rows(op: str, x: Tensor) -> tuple[Tensor, int]:
    """``x`` as it can be walked by rows: [..., k] with dense rows one stride apart; and that stride in elements."""
    if x.dtype not in _FLOATS:
        raise TypeError(f"{op}: x is {x.dtype}, expected float32, bfloat16 or float16")
    if x.dim() == 0:
        raise ValueError(f"{op}: x is a scalar, expected [..., k]")
    if x.is_neg() or x._is_zerotensor():  # views without memory of their own kind
        x = x.resolve_neg() if x.is_neg() else torch.zeros(x.shape, dtype=x.dtype)
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]


# --- int8_linear ------------------------------------------------------------------------------------------------------

_library.define(
    "int8_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, str activation) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,) if hasattr(torch.Tag, "needs_exact_strides") else (),
)


def _int8_linear_cpu(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    x, ldx = _rows("int8_linear", x)
    code = ACTIVATIONS.get(activation)
    if code is None:
        raise ValueError(f"int8_linear: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    _check_operand("int8_linear", "packed", packed, torch.uint8)
    _check_operand("int8_linear", "scale", scale, torch.float32)
    shape, n = x.shape, scale.shape[0]
    k = shape[-1]
    bias_address = 0
    if bias is not None:
        _check_operand("int8_linear", "bias", bias, torch.float32)
        if bias.shape[0] != n:
            raise ValueError(f"int8_linear: bias is {list(bias.shape)}, expected [{n}]")
        bias_address = bias.data_ptr()
    y = x.new_empty((*shape[:-1], n))
    kind = _FLOATS[x.dtype]
    _C.int8_linear(
        x.data_ptr(), kind, x.numel() // k if k else 0, k, ldx, packed.data_ptr(), packed.shape[0], n, scale.data_ptr(),
        bias_address, code, y.data_ptr(), kind, 0, 0, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _check_operand(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype is dtype and tensor.is_cpu and tensor.dim() == 1 and tensor.is_contiguous():
        return
    raise ValueError(
        f"{op}: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected a dense {dtype} vector on "
        "the CPU" + (" from int8_pack" if name == "packed" else " with one value per output channel")
    )


def _int8_linear_fake(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:  # noqa: ARG001
    if x.dtype not in _FLOATS:
        raise TypeError(f"int8_linear: x is {x.dtype}, expected float32, bfloat16 or float16")
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _not_on_cpu(op: str, *tensors: Tensor | None) -> None:
    devices = ", ".join(sorted({str(t.device) for t in tensors if isinstance(t, Tensor)}))
    raise RuntimeError(
        f"{op}: the tensors are on {devices}, expected all of them on the CPU: this layer has CPU kernels only"
    )


def _int8_linear_elsewhere(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:  # noqa: ARG001
    _not_on_cpu("int8_linear", x, packed, scale, bias)
    raise AssertionError("unreachable")


_library.impl("int8_linear", _int8_linear_cpu, "CPU")
_library.impl("int8_linear", _int8_linear_elsewhere, "CUDA")
torch.library.register_fake("pycompress::int8_linear", _int8_linear_fake, lib=_library)


def _int8_linear_vmap(_info: Any, in_dims: tuple[Any, ...], x: Tensor, *operands: Any) -> tuple[Tensor, int]:
    if any(dim is not None for dim in in_dims[1:]):
        raise NotImplementedError("int8_linear: vmap over the weights, expected over x only")
    y: Tensor = torch.ops.pycompress.int8_linear.default(x.movedim(in_dims[0], 0), *operands)
    return y, 0


torch.library.register_vmap("pycompress::int8_linear", _int8_linear_vmap, lib=_library)
_int8_linear_op = torch.ops.pycompress.int8_linear.default

_tracing = getattr(torch._C, "_is_tracing", None)
_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)


# torch >= 2.10 lets the native module read tensors itself; before, and with the numba twin, their addresses are passed.
_reads_tensors = hasattr(Tensor, "__dlpack_c_exchange_api__") and _C.use_exchange(Tensor.__dlpack_c_exchange_api__)


def _is_plain(x: Tensor) -> bool:
    """Nobody is looking: no compiler, tracer, tensor subclass or dispatch mode that must see the op.

    Then the kernel is called without torch's dispatcher, which costs as much as a small layer (5 us of 9).
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not x.requires_grad
        and x.is_cpu
        and not x.is_neg()
        and _transforms is not None
        and _transforms() is None
        and _tracing is not None
        and not _tracing()
        and _dispatch_modes is not None
        and not _dispatch_modes()
    )


def int8_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``act(x W^T + bias)`` with int8 weights, activations quantized per row inside the op.

    The formula and its rounding are in ``csrc/int8/gemm.h``: exact integers, float32 steps in a fixed order, so the result
    has the same bits for every thread count and every kernel.

    Args:
        x: float32, bfloat16 or float16, [..., k], any strides. A row with NaN or Inf gives a row of NaN.
        packed: uint8 vector from :func:`int8_pack`.
        scale: float32 [n], one per output channel.
        bias: float32 [n] or None.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
    Returns:
        [..., n], dense, of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: sizes or dtypes do not fit. RuntimeError: a tensor is not on the CPU.
    """
    if _is_plain(x):
        if _reads_tensors and scale.dim() == 1 and x.dim() != 0:
            y = x.new_empty((*x.shape[:-1], scale.shape[0]))
            code = ACTIVATIONS.get(activation, -1)
            if code >= 0 and _C.int8_linear_tensors(x, packed, scale, bias, code, y, torch.get_num_threads()):
                return y
        return _int8_linear_cpu(x, packed, scale, bias, activation)
    result: Tensor = _int8_linear_op(x, packed, scale, bias, activation)
    return result


# --- packing ----------------------------------------------------------------------------------------------------------

_library.define("int8_pack(Tensor values, int activation_bits, str kernel='') -> Tensor")


def _int8_pack_cpu(values: Tensor, activation_bits: int, kernel: str = "") -> Tensor:
    if values.dtype != torch.int8 or values.dim() != 2:
        raise ValueError(f"int8_pack: values is {values.dtype} {list(values.shape)}, expected int8 [n, k]")
    values = values.contiguous()
    n, k = values.shape
    data = _C.int8_pack(values.data_ptr(), n, k, activation_bits, kernel, torch.get_num_threads())
    packed = torch.empty(len(data), dtype=torch.uint8)  # aligned by torch, and filled without its thread pool (fork)
    ctypes.memmove(packed.data_ptr(), data, len(data))
    return packed


def _int8_pack_fake(values: Tensor, activation_bits: int, kernel: str = "") -> Tensor:  # noqa: ARG001
    return values.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.uint8)


_library.impl("int8_pack", _int8_pack_cpu, "CPU")
torch.library.register_fake("pycompress::int8_pack", _int8_pack_fake, lib=_library)


def int8_pack(values: Tensor, activation_bits: int, kernel: str = "") -> Tensor:
    """Canonical weight -> the layout of the best kernel here (or of the one named): a uint8 vector, for this process only.

    Args:
        values: int8 [n, k], in [-127, 127].
        activation_bits: 7 or 8, the range of the activations that the packed weight will meet.
        kernel: a name from :func:`kernels`, to force it.
    Raises:
        ValueError: wrong dtype or shape, a -128, k > 65536, or a kernel that cannot run here.
    """
    packed: Tensor = torch.ops.pycompress.int8_pack.default(values, activation_bits, kernel)
    return packed


_library.define("int8_unpack(Tensor packed, int n, int k) -> Tensor")


def _int8_unpack_cpu(packed: Tensor, n: int, k: int) -> Tensor:
    _check_operand("int8_unpack", "packed", packed, torch.uint8)
    header = _C.int8_header(packed.data_ptr(), packed.numel())
    _check(
        (header["n"], header["k"]) == (n, k),
        f"int8_unpack: the packed weight is {header['n']}x{header['k']}, not {n}x{k}",
    )
    values = torch.empty((n, k), dtype=torch.int8)
    _C.int8_unpack(packed.data_ptr(), packed.numel(), values.data_ptr())
    return values


def _int8_unpack_fake(packed: Tensor, n: int, k: int) -> Tensor:
    return packed.new_empty((n, k), dtype=torch.int8)


_library.impl("int8_unpack", _int8_unpack_cpu, "CPU")
torch.library.register_fake("pycompress::int8_unpack", _int8_unpack_fake, lib=_library)


def int8_unpack(packed: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
    """The int8 [n, k] that :func:`int8_pack` was given, exactly. Costs a pass over the weight.

    Args:
        shape: (n, k); read from the packed weight where it is not given.
    """
    if shape is None:
        header = int8_depths(packed)
        shape = header["n"], header["k"]
    values: Tensor = torch.ops.pycompress.int8_unpack.default(packed, *shape)
    return values


def int8_depths(packed: Tensor) -> dict[str, Any]:
    """How a packed weight spends its lane budget: ``groups`` of four positions, and ``items`` run at depth 4, 2 and 1."""
    _check_operand("int8_depths", "packed", packed, torch.uint8)
    header: dict[str, Any] = _C.int8_header(packed.data_ptr(), packed.numel())
    return header


# --- the integers alone, for validation and tests ---------------------------------------------------------------------


def int8_quantize(x: Tensor, activation_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The quantizer of :func:`int8_linear` alone.

    Args:
        x: float32, bfloat16 or float16, [m, k].
        activation_bits: 7 or 8.
    Returns:
        q uint8 [m, k], scale float32 [m], zero point int32 [m]; q = 0 and scale NaN for a row with NaN or Inf.
    """
    x, ldx = _rows("int8_quantize", x)
    _check(x.dim() == 2, f"int8_quantize: x is {list(x.shape)}, expected [m, k]")
    m, k = x.shape
    q = torch.empty((m, k), dtype=torch.uint8)
    scale, zero_point = torch.empty(m), torch.empty(m, dtype=torch.int32)
    _C.int8_quantize(
        x.data_ptr(),
        _FLOATS[x.dtype],
        m,
        k,
        ldx,
        activation_bits,
        q.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
    )
    return q, scale, zero_point


def int8_accumulate(x: Tensor, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of :func:`int8_linear`, before any float: acc[m, n] = sum_k (q[m, k] - zero_point[m]) w[n, k].

    Args:
        x: float32, bfloat16 or float16, [m, k].
        packed: from :func:`int8_pack`.
    Returns:
        acc int32 [m, n], scale float32 [m], zero point int32 [m].
    """
    x, ldx = _rows("int8_accumulate", x)
    _check(x.dim() == 2, f"int8_accumulate: x is {list(x.shape)}, expected [m, k]")
    _check_operand("int8_accumulate", "packed", packed, torch.uint8)
    m, k = x.shape
    n = _C.int8_header(packed.data_ptr(), packed.numel())["n"]
    acc = torch.empty((m, n), dtype=torch.int32)
    scale, zero_point = torch.empty(m), torch.empty(m, dtype=torch.int32)
    _C.int8_linear(
        x.data_ptr(), _FLOATS[x.dtype], m, k, ldx, packed.data_ptr(), packed.numel(), n, 0, 0, 0,
        acc.data_ptr(), _INT32, scale.data_ptr(), zero_point.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return acc, scale, zero_point
