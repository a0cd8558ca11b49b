"""What the ops of all weights have in common, written once: schemas, fakes, vmap, derivatives, devices, and the short way in.

A weight has a *door* for each device, a module (or anything else) with these functions; ``ops/cpu`` and ``ops/cuda`` have those of
the package, a module for each weight:

``pack(parts, shape, settings, layout="") -> (packed, form)``
    parts: {attribute of the weight: tensor on the device}, a residual's behind ``residual_``. settings: ``Weight.settings()``.
    layout: to force one; the best where it is not given. The result is one uint8 vector there, and its form.
``unpack(packed, form) -> parts``
    What was packed, exactly.
``dense(packed, form) -> Tensor``
    float32 [n, k].
``linear(x, packed, form, bias, activation) -> Tensor``
    ``act(x W^T + bias)`` for x [..., k] of any dtype that its kernels read.
``sizes(form) -> {part: (shape, dtype)}``
    Of what ``unpack`` gives, in its order, for a form of any device; on the CPU's door alone.

int8 and sparse also have ``accumulate(x, packed, form) -> (acc, scale, zero_point)``; int8 has ``quantize(x, activation_bits) ->
(q, scale, zero_point)``, on the CPU with a range of the input besides, and on CUDA ``fused_linear(x, before, weight, shift, eps,
gate, packed, form, bias, activation)``.

Whatever the device, a form has all that ``Op.sizes`` needs, so that what ``unpack`` gives is known without looking into the
packed weight: int8 ``static`` where it is, int4 ``group`` and ``symmetric``, sparse ``nnz`` and ``bits`` (of the canonical values:
32 or 8), low rank ``rank``, ``bits`` and ``residual``. ``activation_bits`` stands in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pycompress.ops.checks import ACTIVATIONS, FLOATS, check_float, check_tensor, nobody_looks
from pycompress.ops.cpu import native
from pycompress.ops.derivative import ROWS, below, wanted
from pycompress.ops.flops import counted, of_rows
from pycompress.ops.form import Form, Sizes, parse

Parts = dict[str, Tensor]
Native = Callable[..., bool]  # (x, packed, bias, activation, y, threads): whether it took the tensors

library = torch.library.Library("pycompress", "DEF")
EXACT_STRIDES = (torch.Tag.needs_exact_strides,) if hasattr(torch.Tag, "needs_exact_strides") else ()


@dataclass(frozen=True)
class Op:
    """What can be done with the weights of one name, on any device that has a door for them.

    Attributes:
        doors: what runs where.
        pack: ``(parts, shape, settings, device="cpu", layout="") -> (packed, form)``.
        unpack, dense, linear, sizes: as those of a door.
    """

    name: str
    doors: Doors
    pack: Callable[..., tuple[Tensor, str]]
    unpack: Callable[[Tensor, str], Parts]
    dense: Callable[[Tensor, str], Tensor]
    linear: Callable[..., Tensor]
    sizes: Callable[[Form], Sizes]


OPS: dict[str, Op] = {}  # by the name of the weight; open for others'


# --- devices ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doors:
    """Of one weight: what runs where; ``cuda`` may be a module's name: importing the package touches no GPU."""

    name: str
    cpu: Any
    cuda: Any = None

    def on(self, device: torch.device) -> Any:
        """The door for a device; None where the weight has no kernels there."""
        if device.type == "cpu":
            return self.cpu
        if device.type == "cuda":
            return _module(self.cuda) if isinstance(self.cuda, str) else self.cuda
        return None

    def of(self, op: str, device: torch.device, *operands: Any, function: str = "linear") -> Any:
        """The door with this function for the device of all operands. Raises RuntimeError where there is none, or others are meant.

        A form belongs to its device: the door of another one could not read it. The CPU's looks at the tensors itself.
        """
        door = self.on(device)
        door = door if hasattr(door, function) else None
        if door is None or (device.type == "cuda" and any(isinstance(t, Tensor) and not t.is_cuda for t in operands)):
            devices = ", ".join(sorted({str(t.device) for t in operands if isinstance(t, Tensor)}))
            where = (
                "on the CPU: this layer has CPU kernels only" if door is None else "on one CUDA device or on the CPU"
            )
            raise RuntimeError(f"{op}: the tensors are on {devices}, expected all of them {where}")
        return door


@cache
def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        return None


# --- ops of x and a packed weight ----------------------------------------------------------------------------------------


def implement(
    name: str,
    schema: str,
    doors: Doors,
    function: str,
    fake: Callable[..., Tensor],
    differentiable: Callable[..., Tensor],
    vmapped: Callable[..., Tensor] | None = None,
    check: Callable[..., None] | None = None,
    cast: Callable[..., Tensor] | None = None,
) -> Any:
    """Defines the op ``name`` + schema, which calls the function of this name behind the doors of x's device; returns it.

    Args:
        fake: its result's shape and dtype.
        differentiable: ``(op, keys, *operands)``, the same of operators that can be differentiated, where a derivative is wanted.
        vmapped: the op for x with the dimension of ``torch.vmap`` in front; the op itself where it is not given.
        check: of the operands, on all devices.
        cast: ``(dtype, *operands)``, the op under autocast to a dtype; of x rounded to it where it is not given, as torch does.
    """
    library.define(name + schema, tags=EXACT_STRIDES)

    def on(device: str) -> Callable[..., Any]:
        def run(*operands: Any) -> Any:
            if check is not None:
                check(*operands)
            door = doors.of(name, torch.device(device), *operands, function=function)
            return getattr(door, function)(*operands)

        return run

    def faked(*operands: Any) -> Tensor:
        if check is not None:
            check(*operands)
        _check_together(name, operands)
        return fake(*operands)

    def vmap(_info: Any, in_dims: tuple[Any, ...], x: Tensor, *operands: Any) -> tuple[Tensor, int]:
        if any(isinstance(dim, int) for dim in in_dims[1:]):
            raise NotImplementedError(f"{name}: vmap over the weights, expected over x only")
        return (vmapped or op)(x.movedim(in_dims[0], 0), *operands), 0

    def autograd(keys: Any, x: Tensor, *rest: Any) -> Tensor:
        check_float(name, x)  # before the dispatcher says at length that it knows no kernel
        operands = (x, *rest)
        return differentiable(op, keys, *operands) if wanted(*operands) else below(op, keys, *operands)

    def cast_x(dtype: torch.dtype, x: Tensor, *operands: Any) -> Tensor:
        y: Tensor = op(x.to(dtype) if x.dtype in FLOATS else x, *operands)
        return y

    library.impl(name, on("cpu"), "CPU")
    library.impl(name, on("cuda"), "CUDA")
    library.impl(name, autograd, "Autograd", with_keyset=True)
    under_autocast(name, cast or cast_x)
    torch.library.register_fake(f"pycompress::{name}", faked, lib=library)
    torch.library.register_vmap(f"pycompress::{name}", vmap, lib=library)
    op = getattr(torch.ops.pycompress, name).default
    return op


def _check_together(op: str, operands: Iterable[Any]) -> None:
    """Raises RuntimeError where some of the tensors are on the meta device, and others on another."""
    devices = sorted({str(one.device) for one in operands if isinstance(one, Tensor)})
    if len(devices) > 1 and "meta" in devices:
        raise RuntimeError(f"{op}: the tensors are on {', '.join(devices)}, expected all of them on one device")


def under_autocast(name: str, run: Callable[..., Any] | None = None) -> None:
    """Defines an op under autocast to a dtype: ``run(dtype, *operands)``, within which there is none; else the op without it."""
    op = getattr(torch.ops.pycompress, name).default

    def on(device: str, keys: torch._C.DispatchKeySet) -> Callable[..., Any]:
        def cast(*operands: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*operands) if run is None else run(torch.get_autocast_dtype(device), *operands)

        return cast

    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"
        library.impl(name, on(device, torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))), key)


def _linear(
    doors: Doors, dense: Callable[[Tensor, str], Tensor], is_short: Callable[[Form], bool]
) -> Callable[..., Tensor]:
    name = f"{doors.name}_linear"

    def fake(x: Tensor, packed: Tensor, form: str, bias: Tensor | None, activation: str) -> Tensor:  # noqa: ARG001
        check_float(name, x)
        return x.new_empty((*x.shape[:-1], parse(form).n))

    schema = "(Tensor x, Tensor packed, str form, Tensor? bias, str activation) -> Tensor"
    op = implement(name, schema, doors, "linear", fake, ROWS.differentiable(dense))
    counted(name, of_rows)
    cpu_linear, codes, threads = doors.cpu.linear, ACTIVATIONS, torch.get_num_threads

    @lru_cache(maxsize=1 << 16)
    def short(form: str) -> tuple[int, Native | None]:
        parsed = parse(form)
        reads = native.reads_tensors and is_short(parsed)
        return parsed.n, getattr(native._C, f"{name}_tensors", None) if reads else None

    def linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None = None, activation: str = "none") -> Tensor:
        # Nobody is looking: the kernel is called without torch's dispatcher, which costs as much as a small layer (5 us of 9).
        if nobody_looks(x) and (bias is None or not (bias.requires_grad or bias.is_neg())):
            if x.is_cpu:
                n, call = short(form)
                if call is not None:
                    try:
                        y = x.new_empty((*x.shape[:-1], n))
                    except RuntimeError:
                        check_float(name, x)  # a nested one has no shape
                        raise
                    if call(x, packed, bias, codes.get(activation, -1), y, threads()):
                        return y
                return cpu_linear(x, packed, form, bias, activation)  # type: ignore[no-any-return]
            if x.is_cuda:
                return doors.of(name, x.device, x, packed, bias).linear(x, packed, form, bias, activation)  # type: ignore[no-any-return]
        check_tensor(name, x)
        return op(x, packed, form, bias, activation)  # type: ignore[no-any-return]

    linear.short = short  # type: ignore[attr-defined]  # (which remembers the native module)
    return linear


# --- a weight -----------------------------------------------------------------------------------------------------------


def define(name: str, cpu: Any, cuda: Any = None, is_short: Callable[[Form], bool] = lambda _form: True) -> Op:
    """Registers the ops of a weight, ``<name>_linear``, ``<name>_dense`` and ``<name>_unpack``, and the weight in :data:`OPS`.

    Args:
        cpu, cuda: its doors; the one for CUDA may be a module's name, or None.
        is_short: whether the native function that reads tensors itself, where there is one, takes weights of a form.
    Raises:
        ValueError: a weight of this name is there already.
    """
    if name in OPS:
        raise ValueError(f"ops: a weight named {name!r} is registered already, expected another name")
    doors, sizes = Doors(name, cpu, cuda), cpu.sizes
    dense, unpack = f"{name}_dense", f"{name}_unpack"
    library.define(f"{dense}(Tensor packed, str form) -> Tensor")
    library.define(f"{unpack}(Tensor packed, str form) -> Tensor[]")

    def dense_fake(packed: Tensor, form: str) -> Tensor:
        parsed = parse(form)
        return packed.new_empty((parsed.n, parsed.k), dtype=torch.float32)

    def unpack_fake(packed: Tensor, form: str) -> list[Tensor]:
        return [packed.new_empty(shape, dtype=dtype) for shape, dtype in sizes(parse(form)).values()]

    def dense_here(packed: Tensor, form: str) -> Any:
        return doors.of(dense, packed.device, packed).dense(packed, form)

    def unpack_here(packed: Tensor, form: str) -> list[Tensor]:
        parts = doors.of(unpack, packed.device, packed).unpack(packed, form)
        return [parts[part] for part in sizes(parse(form))]

    for op, here, fake in ((dense, dense_here, dense_fake), (unpack, unpack_here, unpack_fake)):
        for key in ("CPU", "CUDA"):
            library.impl(op, here, key)
        under_autocast(op)
        torch.library.register_fake(f"pycompress::{op}", fake, lib=library)
    dense_op, unpack_op = (getattr(torch.ops.pycompress, op).default for op in (dense, unpack))

    def pack(
        parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any],
        device: torch.device | str = "cpu", layout: str = "",
    ) -> tuple[Tensor, str]:  # fmt: skip
        device = torch.device(device)
        there = {part: tensor.detach().resolve_neg().to(device) for part, tensor in parts.items()}
        door = doors.of(f"{name}_pack", device, *there.values())
        try:
            packed, form = door.pack(there, shape, settings, layout)
        except KeyError as missing:
            given = f"the parts are {', '.join(parts)}, the settings {', '.join(settings)}"
            raise ValueError(f"{name}_pack: {missing} is missing: {given}") from None
        return packed, form

    def unpacked(packed: Tensor, form: str) -> Parts:
        return dict(zip(sizes(parse(form)), unpack_op(packed, form), strict=True))

    OPS[name] = Op(name, doors, pack, unpacked, dense_op, _linear(doors, dense_op, is_short), sizes)
    return OPS[name]
