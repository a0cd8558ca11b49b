"""The only door to the native module ``_C``: loading it, what it is, and the calls that the ops of all weights have in common."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pycompress import reference
from pycompress.ops.checks import FLOATS, INT32, activation_code, check, matrix_of, rows_of
from pycompress.ops.form import Form, parse

_C: Any
try:
    # After torch, whose libgomp the extension then shares: one pool, one thread count.
    _C = import_module("pycompress._C")
    _extension_error: str | None = None
except ModuleNotFoundError as error:  # built without a compiler: the numba twin stands in
    _C = reference.extension
    _extension_error = str(error)
    warnings.warn(
        f"pycompress runs without native kernels ({error}): the numba twin computes the same, some 10 to 1000 times slower. "
        "To have them, install it where there is a C++ compiler.",
        RuntimeWarning,
        stacklevel=2,
    )
except ImportError as error:  # PYCOMPRESS_ISA names no instruction set
    if Path(sys.argv[0]).stem == "pycompress":  # the command line, which is not running yet
        sys.exit(f"pycompress: {error}")
    raise

# torch >= 2.10 lets the native module read tensors itself; before, and with the numba twin, their addresses are passed.
reads_tensors = hasattr(Tensor, "__dlpack_c_exchange_api__") and _C.use_exchange(Tensor.__dlpack_c_exchange_api__)


def extension_error() -> str | None:
    """Why the native module is absent and the numba twin runs instead; None where it is there."""
    return _extension_error


def folder() -> Path | None:
    """Where the native modules lie, which in an editable installation is not beside the package; None where they are absent."""
    return Path(_C.__file__).parent if _extension_error is None else None


def kernels() -> list[dict[str, Any]]:
    """All kernels that were compiled, best first: op, name, isa, mr, nr, kr, available (here and now: let by
    the processor and the cap, with no other forced).

    Those of the sparse op name the format that they read, too.
    """
    rows: list[dict[str, Any]] = _C.kernels()
    return rows


def instruction_sets() -> dict[str, bool]:
    """Which instruction sets this processor and its operating system offer, whatever PYCOMPRESS_ISA says."""
    sets: dict[str, bool] = _C.instruction_sets()
    return sets


@contextmanager
def capped(name: str) -> Iterator[None]:
    """Within, kernels run in this process as if the processor had no more than one instruction set; in all threads.

    A weight that was packed for a kernel that this excludes is refused there (ValueError).

    Args:
        name: scalar, avx2, avx_vnni, avx512_vnni or amx_int8; "" for all that the processor has, whatever PYCOMPRESS_ISA says.
    Raises:
        ValueError: for another name, or where the processor lacks it.
    """
    before = _C.cap_isa(name)
    try:
        yield
    finally:
        _C.cap_isa(before)


@contextmanager
def forced(op: str, name: str) -> Iterator[None]:
    """Within, nothing but the kernel of this name runs for an op in this process; in all threads.

    A weight that was packed for another kernel is refused there (ValueError): pack it within, too.

    Args:
        op, name: as :func:`kernels` has them; "" for the best, as ever.
    Raises:
        ValueError: for another op or name, or where the processor lacks what the kernel needs or a cap excludes it.
    """
    before = _C.force_kernel(op, name)
    try:
        yield
    finally:
        _C.force_kernel(op, before)


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


# --- packed weights, and calls with them -----


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


def linear(
    op: str, x: Tensor, packed: Tensor, form: str, bias: Tensor | None, activation: str, n_bytes: int, *scale: int,
    further: tuple[int, ...] = (),
) -> Tensor:  # fmt: skip
    """Checks the operands of an op and calls the native function of its name, which checks that the packed weight is its own.

    Args:
        n_bytes: of the packed weight, without a scale behind it.
        scale: the address of that scale, for a function that takes one (0: there is none).
        further: what that function takes behind y, before the number of threads.
    """
    x, ldx = rows_of(op, x)
    code = activation_code(op, activation)
    n = parse(form).n
    bias_address = 0 if bias is None else channels(op, "bias", bias, n)
    k = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], n))
    kind = FLOATS[x.dtype]
    getattr(_C, op)(
        x.data_ptr(), kind, x.numel() // k if k else 0, k, ldx, packed.data_ptr(), n_bytes, n, *scale, bias_address, code,
        y.data_ptr(), kind, *further, torch.get_num_threads(),
    )  # fmt: skip
    return y


def accumulate(op: str, x: Tensor, packed: Tensor, form: str, n_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of ``<op>_linear``, before any float: acc int32 [m, n], scale float32 [m], zero point int32 [m]."""
    x, ldx = matrix_of(f"{op}_accumulate", x)
    (m, k), n = x.shape, parse(form).n
    acc, scale = x.new_empty((m, n), dtype=torch.int32), x.new_empty(m, dtype=torch.float32)
    zero_point = x.new_empty(m, dtype=torch.int32)
    getattr(_C, f"{op}_linear")(
        x.data_ptr(), FLOATS[x.dtype], m, k, ldx, packed.data_ptr(), n_bytes, n, 0, 0, 0,
        acc.data_ptr(), INT32, scale.data_ptr(), zero_point.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return acc, scale, zero_point


def split(op: str, packed: Tensor, n: int) -> tuple[int, int]:
    """Of a packed weight with a scale per output channel behind it: how many bytes lie before it, and its address."""
    check_operand(op, "packed", packed, torch.uint8)
    n_bytes = packed.shape[0] - 4 * n
    check(
        n_bytes >= 0, f"{op}: packed has {packed.shape[0]} bytes, expected {n} scales behind the weight: unknown format"
    )
    return n_bytes, packed.data_ptr() + n_bytes


def scale_of(packed: Tensor, n: int) -> Tensor:
    """A copy of the scale float32 [n] behind a packed weight."""
    scale = packed.new_empty(n, dtype=torch.float32)
    ctypes.memmove(scale.data_ptr(), packed.data_ptr() + packed.shape[0] - scale.nbytes, scale.nbytes)
    return scale


def header_of(op: str, weight: str, packed: Tensor, n_bytes: int, form: Form, names: Iterable[str]) -> dict[str, Any]:
    """What a packed weight itself says. Raises ValueError where that is not what the form says of these names."""
    header: dict[str, Any] = getattr(_C, f"{weight}_header")(packed.data_ptr(), n_bytes)
    found = {name: header[name] for name in names}
    expected = {name: getattr(form, name, "") for name in names}
    check(found == expected, f"{op}: the packed weight has {found}, its form says {expected}")
    return header
