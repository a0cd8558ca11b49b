"""int8 convolutions on the CPU (``csrc/conv``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pycompress.ops.checks import (
    FLOATS,
    INT32,
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
    op, own = "int8_conv2d", parse(form)
    shape = conv2d_shape(op, x, own.n, kernel_size, stride, padding, dilation)
    check(
        own.layout == LAYOUT and tuple(kernel_size) == (own.kernel_h, own.kernel_w) and groups == own.groups,
        f"{op}: kernel_size is {tuple(kernel_size)} and groups {groups}, the packed weight is {form!r}",
    )
    expected = own.k // (own.kernel_h * own.kernel_w) * own.groups
    check(x.shape[-3] == expected, f"{op}: x has {x.shape[-3]} channels, the packed weight expects {expected}")
    memory = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory)


def is_channels_last(x: Tensor) -> bool:
    """Whether x lies dense with the channels last, and in no other way."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _run(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None, kernel_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, activation: str, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and scale and zero point of each image."""
    op = "int8_conv2d"
    check_float(op, x)
    y = result(x, form, kernel_size, stride, padding, dilation, groups, dtype)
    last = is_channels_last(x)
    if not last or x.is_neg():
        x, last = rows_of(op, x.contiguous())[0], False  # (a negated view loses its order: so be it)
        y = y if y.is_contiguous() else torch.empty(y.shape, dtype=y.dtype, device=y.device)
    own, n_bytes, scale = _checked(op, packed, form)
    code = activation_code(op, activation)
    bias_address = 0 if bias is None else channels(op, "bias", bias, own.n)
    images = x.shape[0] if x.dim() == 4 else 1
    image_scale = torch.empty(images, dtype=torch.float32, device="cpu")
    zero_point = torch.empty(images, dtype=torch.int32, device="cpu")
    native._C.int8_conv2d(
        x.data_ptr(), FLOATS[x.dtype], last, images, *x.shape[-3:], packed.data_ptr(), n_bytes, own.n, scale, bias_address,
        code, *stride, padding[0], padding[2], *dilation, *y.shape[-2:], y.data_ptr(),
        INT32 if y.dtype == torch.int32 else FLOATS[y.dtype], image_scale.data_ptr(), zero_point.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, image_scale, zero_point


def conv2d(*operands: Any) -> Tensor:
    return _run(*operands)[0]


def accumulate(
    x: Tensor, packed: Tensor, form: str, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sums int32 in the place of y, scale float32 [images], zero point int32 [images]."""
    return _run(x, packed, form, None, kernel_size, stride, padding, dilation, groups, "none", torch.int32)
