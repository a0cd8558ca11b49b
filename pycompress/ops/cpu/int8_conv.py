"""int8 convolutions on the CPU (``csrc/conv``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pycompress.ops.checks import (
    FLOATS,
    INT32,
    UINT8,
    Ints,
    activation_code,
    check,
    check_float,
    conv2d_shape,
    rows_of,
    vector,
)
from pycompress.ops.cpu import native
from pycompress.ops.cpu.native import channels, split
from pycompress.ops.form import Form, parse, written

LAYOUT = "convolution"
_CHECKED = ("n", "k", "groups", "kernel_h", "kernel_w", "activation_bits")
Range = tuple[float, int]  # scale and zero point of an input that is quantized statically
NO_RANGE: Range = (0.0, 0)  # to the native module: each row, or image, has its own
Target = tuple[float, int, int]  # scale, zero point and largest number of what takes y as bytes
NO_TARGET: Target = (0.0, 0, 0)
_TYPES = {**FLOATS, torch.int32: INT32, torch.uint8: UINT8}
_BEHIND = 128  # bytes that the kernels may read behind bytes which they do not copy then: kBehind in conv.h


def pack(
    values: Tensor, scale: Tensor, bits: int, given: Range | None, convolution: tuple[int, int, int], kernel: str
) -> tuple[Tensor, str]:  # fmt: skip
    """As :func:`pycompress.ops.cpu.int8.pack`, of a matrix with the rows (channel, kernel row, kernel column) of a convolution.

    Args:
        given: the range of a static weight's input.
        convolution: kernel height, kernel width, groups.
    """
    (n, k), (height, width, groups) = values.shape, convolution
    check(bits != 16, "int8_conv2d_pack: activation_bits is 16, expected 7 or 8")
    check(
        min(convolution) > 0 and k % (height * width) == 0,
        f"int8_conv2d_pack: k is {k}, expected a multiple of the kernel's {height}x{width}",
    )
    in_channels = k // (height * width) * groups
    data = native._C.int8_conv2d_pack(
        values.data_ptr(),
        n,
        in_channels,
        groups,
        height,
        width,
        bits,
        kernel,
        torch.get_num_threads(),
        *(given or NO_RANGE),
    )
    keys: dict[str, Any] = {"groups": groups, "kernel_h": height, "kernel_w": width, "activation_bits": bits}
    if given:
        keys["static"] = 1
    return vector(data, scale), written(LAYOUT, n, k, **keys)


def is_packed(form: str) -> bool:
    """Whether it is the form of a convolution."""
    return form.startswith(f"{LAYOUT} ")


def _checked(op: str, packed: Tensor, form: str) -> tuple[Form, int, int]:
    """The form, the bytes before the scale, and the scale's address."""
    own = parse(form)
    check(own.layout == LAYOUT, f"{op}: the form is {form!r}, expected that of a convolution")
    n_bytes, scale = split(op, packed, own.n)
    return own, n_bytes, scale


def unpack(packed: Tensor, form: str) -> dict[str, Tensor]:
    own, n_bytes, _ = _checked("int8_unpack", packed, form)
    header = native.header_of("int8_unpack", "int8_conv2d", packed, n_bytes, own, _CHECKED)
    static = header["input_scale"] != 0
    check(
        static == bool(own.keys.get("static")),
        f"int8_unpack: the packed weight is {'static' if static else 'dynamic'}, its form is {form!r}",
    )
    values = packed.new_empty((own.n, own.k), dtype=torch.int8)
    native._C.int8_conv2d_unpack(packed.data_ptr(), n_bytes, values.data_ptr())
    return {"values": values, "scale": native.scale_of(packed, own.n), **range_parts(packed, header)}


def range_parts(packed: Tensor, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parts of a static weight that say the range of its input; of another one none."""
    if not header["input_scale"]:
        return {}
    return {
        "input_scale": packed.new_full((1,), header["input_scale"], dtype=torch.float32),
        "input_zero_point": packed.new_full((1,), header["input_zero_point"]),
    }


def result(
    x: Tensor, form: str, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """An empty tensor for the result, channels last where x lies so.

    Raises:
        ValueError: x, the form and the geometry do not fit each other.
    """
    return _empty(
        _shape(x.shape, form, kernel_size, stride, padding, dilation, groups),
        dtype or x.dtype,
        is_channels_last(x),
        x.device,
    )


def _empty(shape: Ints, dtype: torch.dtype, channels_last: bool, device: torch.device | str = "cpu") -> Tensor:
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=memory)


def _shape(
    x: Ints, form: str, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[int, ...]:  # fmt: skip
    """Of the result for x of a shape. Raises ValueError where that, the form and the geometry do not fit each other."""
    op, own = "int8_conv2d", parse(form)
    shape = conv2d_shape(op, x, own.n, kernel_size, stride, padding, dilation)
    check(
        own.layout == LAYOUT and tuple(kernel_size) == (own.kernel_h, own.kernel_w) and groups == own.groups,
        f"{op}: kernel_size is {tuple(kernel_size)} and groups {groups}, the packed weight is {form!r}",
    )
    expected = own.k // (own.kernel_h * own.kernel_w) * own.groups
    check(x[-3] == expected, f"{op}: x has {x[-3]} channels, the packed weight expects {expected}")
    return shape


_remembered_shape = lru_cache(maxsize=1 << 12)(_shape)  # of numbers: a compiler's symbols cannot be looked up


def shape_of(x: Tensor, form: str, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Ints:
    """Of a call that is run: of the same layer and input there are many, and this takes as long as a small one."""
    geometry = (tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups)
    return _remembered_shape(tuple(x.shape), form, *geometry)


def is_channels_last(x: Tensor) -> bool:
    """Whether x lies dense with the channels last, and in no other way."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _run(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None, kernel_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, activation: str, dtype: torch.dtype | None = None, image_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y; scale and zero point of each image go where they are wanted."""
    op = "int8_conv2d"
    check_float(op, x)
    shape = shape_of(x, form, kernel_size, stride, padding, dilation, groups)
    last = is_channels_last(x) and not x.is_neg()
    if not last:
        x = rows_of(op, x.contiguous())[0]  # (a negated view loses its order: so be it)
    y = _empty(shape, dtype or x.dtype, last)
    operands = _operands(op, x, last, packed, form, bias, stride, padding, dilation, activation, y)
    ranges = (0, 0) if image_scale is None or zero_point is None else (image_scale.data_ptr(), zero_point.data_ptr())
    native._C.int8_conv2d(*operands, *ranges, torch.get_num_threads())
    return y


def _operands(
    op: str, x: Tensor, last: bool, packed: Tensor, form: str, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    activation: str, y: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """What the native functions are called with, up to y."""
    own, n_bytes, scale = _checked(op, packed, form)
    code = activation_code(op, activation)
    bias_address = 0 if bias is None else channels(op, "bias", bias, own.n)
    return (
        x.data_ptr(), _TYPES[x.dtype], last, x.shape[0] if x.dim() == 4 else 1, *x.shape[-3:], packed.data_ptr(), n_bytes,
        own.n, scale, bias_address, code, *stride, padding[0], padding[2], *dilation, *y.shape[-2:], y.data_ptr(), _TYPES[y.dtype],
    )  # fmt: skip


def conv2d(*operands: Any) -> Tensor:
    return _run(*operands)


def accumulate(
    x: Tensor, packed: Tensor, form: str, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sums int32 in the place of y, scale float32 [images], zero point int32 [images]."""
    images = x.shape[0] if x.dim() == 4 else 1
    scale = torch.empty(images, dtype=torch.float32, device="cpu")
    zero_point = torch.empty(images, dtype=torch.int32, device="cpu")
    walk = (kernel_size, stride, padding, dilation, groups)
    y = _run(x, packed, form, None, *walk, "none", torch.int32, scale, zero_point)
    return y, scale, zero_point


def input_target(packed: Tensor, form: str) -> Target | None:
    """What a static weight's input is quantized by; None where it has no range of its own."""
    own, n_bytes, _ = _checked("int8_conv2d", packed, form)
    header = native.header_of("int8_conv2d", "int8_conv2d", packed, n_bytes, own, _CHECKED)
    scale = header["input_scale"]
    return (scale, header["input_zero_point"], (1 << header["activation_bits"]) - 1) if scale else None


def hand_on(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, activation: str, to: Target | None, channels_last: bool, addend: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """As :func:`conv2d`, from bytes where x is uint8, and to bytes where there is a target.

    Args:
        x: float32 [N, C, H, W], or uint8 of it, the channels last: what this weight's range makes of it.
        to: scale, zero point and largest number of what takes y; None: y is float32.
        channels_last: whether those of a y of float32 lie so.
        addend: float32 of y's shape, the channels last, which is added before the activation; not where the layer is depthwise.
    Returns:
        None where an image, or behind an addend y, is not finite, which bytes cannot say.
    """
    walk = (kernel_size, stride, padding, dilation, groups)
    y, _, finite = _hand_on(x, packed, form, bias, *walk, activation, to, channels_last, addend)
    if to is None:
        return y if channels_last else y.contiguous()
    return y if finite else None


def hand_on_beside(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, activation: str, to: Target, addend: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As :func:`hand_on`, y float32 with the channels last and its bytes beside it, which are None where they cannot say what y is.
    Not of a depthwise layer."""
    walk = (kernel_size, stride, padding, dilation, groups)
    y, beside, finite = _hand_on(x, packed, form, bias, *walk, activation, to, True, addend, keep=True)
    return y, beside if finite else None


def _hand_on(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, activation: str, to: Target | None, channels_last: bool, addend: Tensor | None, keep: bool = False,
) -> tuple[Tensor, Tensor | None, bool]:  # fmt: skip
    """y, its bytes where it is kept in float32 beside them, and whether bytes say all of it."""
    op = "int8_conv2d"
    shape = shape_of(x, form, kernel_size, stride, padding, dilation, groups)
    is_bytes, depthwise = x.dtype == torch.uint8, groups == x.shape[1] == shape[1]
    y_last = channels_last or to is not None or addend is not None or (depthwise and is_bytes)
    last = is_bytes or is_channels_last(x) or (depthwise and y_last)
    y_last = last if depthwise else y_last  # whose kernels walk both alike
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    behind = x.untyped_storage().nbytes() - x.storage_offset() - x.numel() if is_bytes else 0
    y = _empty(shape, torch.float32, y_last) if to is None or keep else _bytes(shape)
    beside = _bytes(shape) if keep else None
    operands = _operands(op, x, last, packed, form, bias, stride, padding, dilation, activation, y)
    others = (_addend(op, addend, shape), 0 if beside is None else beside.data_ptr())
    threads = torch.get_num_threads()
    finite = native._C.int8_conv2d_hand_on(*operands, y_last, *(to or NO_TARGET), behind, *others, threads)
    return y, beside, finite


def _addend(op: str, addend: Tensor | None, shape: Ints) -> int:
    """Its address, or 0."""
    if addend is None:
        return 0
    fits = addend.dtype == torch.float32 and tuple(addend.shape) == tuple(shape)
    check(
        fits and addend.is_contiguous(memory_format=torch.channels_last),
        f"{op}: the addend is {addend.dtype} {list(addend.shape)} with strides {list(addend.stride())}, expected torch.float32 "
        f"{list(shape)} with the channels last",
    )
    return addend.data_ptr()


def _bytes(shape: Ints) -> Tensor:
    """An empty tensor of bytes, the channels last, with as many behind them as a kernel reads."""
    _, channels, height, width = shape
    memory = torch.empty(math.prod(shape) + _BEHIND, dtype=torch.uint8, device="cpu")
    return memory.as_strided(tuple(shape), (channels * height * width, 1, width * channels, channels))
