"""int8 convolutions: a header, then the values [n, k]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pycompress.reference import int8_conv
from pycompress.reference.extension import memory
from pycompress.reference.extension.int8 import bits_of, check_range, has_range, value_of


def _is_valid(of: memory.Header) -> bool:
    kernel = of["kernel_h"] * of["kernel_w"]
    fits = kernel > 0 and of["groups"] > 0 and of["k"] % kernel == 0 and of["n"] % of["groups"] == 0
    return memory.has_shape(of) and fits and of["activation_bits"] in (7, 8) and has_range(of)


LAYOUT = memory.Layout(
    "int8_conv2d",
    b"pyc.con1",
    ("n", "k", "groups", "kernel_h", "kernel_w", "activation_bits", "input_scale", "input_zero_point"),
    lambda of: {"values": (np.int8, (of["n"], of["k"]))},
    _is_valid,
)
int8_conv2d_unpack = LAYOUT.unpack


def int8_conv2d_header(packed: int, packed_bytes: int) -> dict[str, Any]:
    header: dict[str, Any] = LAYOUT.read(packed, packed_bytes)[0]
    return {**header, "input_scale": value_of(header["input_scale"])}


def int8_conv2d_pack(
    values: int, n: int, channels: int, groups: int, kernel_h: int, kernel_w: int, activation_bits: int, kernel: str,
    _threads: int, input_scale: float, input_zero_point: int,
) -> bytes:  # fmt: skip
    if n < 1 or channels < 1 or groups < 1 or channels % groups or n % groups:
        raise ValueError(
            f"int8_conv2d_pack: groups is {groups}, expected a divisor of {channels} and {n} channels, from 1"
        )
    if (k := channels // groups * kernel_h * kernel_w) > memory.MAX_IN_FEATURES:
        raise ValueError(f"int8_conv2d_pack: an output is made of {k} inputs, expected at most 65536")
    if kernel not in ("", "numba"):
        raise ValueError(f"no int8 kernel is named '{kernel}'")
    if (memory.view(values, np.int8, n, k) == -128).any():
        raise ValueError("int8_conv2d_pack: a weight is -128, expected -127 to 127 (the scale is symmetric)")
    if input_scale:
        check_range("int8_conv2d_pack", (input_scale, input_zero_point), activation_bits)
    numbers = (n, k, groups, kernel_h, kernel_w, activation_bits, bits_of(input_scale), input_zero_point)
    return LAYOUT.pack(dict(zip(LAYOUT.fields, numbers, strict=True)), values)


def int8_conv2d(*all_operands: Any) -> None:
    *operands, scale, zero_point, _threads = all_operands
    done = _convolve(*operands, channels_last_of_y=operands[2])
    if len(done.scale) and scale:
        memory.view(scale, np.float32, len(done.scale))[:] = done.scale
        memory.view(zero_point, np.int32, len(done.scale))[:] = done.zero_point


def int8_conv2d_hand_on(*all_operands: Any) -> bool:
    *operands, channels_last_of_y, to_scale, to_zero_point, to_amax, _behind, addend, beside, _threads = all_operands
    to = (to_scale, to_zero_point, to_amax) if to_scale else None
    return _convolve(*operands, channels_last_of_y=channels_last_of_y, to=to, addend=addend, beside=beside).finite


@dataclass(frozen=True)
class _Done:
    """Scale and zero point of each image, and whether bytes can say all of y."""

    scale: Any
    zero_point: Any
    finite: bool


def _convolve(
    x: int, x_type: int, channels_last: bool, images: int, channels: int, height: int, width: int, packed: int,
    packed_bytes: int, n: int, weight_scale: int, bias: int, activation: int, stride_h: int, stride_w: int, pad_top: int,
    pad_left: int, dilation_h: int, dilation_w: int, out_h: int, out_w: int, y: int, y_type: int, *,
    channels_last_of_y: bool, to: tuple[float, int, int] | None = None, addend: int = 0, beside: int = 0,
) -> _Done:  # fmt: skip
    header, parts = LAYOUT.read(packed, packed_bytes)
    of = header["k"] // (header["kernel_h"] * header["kernel_w"]) * header["groups"]
    if (channels, n) != (of, header["n"]):
        raise ValueError(
            f"int8_conv2d: x has {channels} channels and y {n}, the packed weight expects {of} and {header['n']}"
        )
    size, is_bytes = channels * height * width, x_type == memory.UINT8
    planes = memory.view(x, np.uint8, images, size) if is_bytes else memory.load(x, x_type, images, size, size)
    shape = (images, height, width, channels) if channels_last else (images, channels, height, width)
    planes = planes.reshape(shape)
    planes = np.ascontiguousarray(np.moveaxis(planes, -1, 1)) if channels_last else planes
    fixed = (value_of(header["input_scale"]), header["input_zero_point"]) if header["input_scale"] else None
    if is_bytes:
        if fixed is None or not channels_last:
            raise ValueError("int8_conv2d: x is bytes, expected a static weight and the channels last")
        q, scales, zeros = planes, np.full(images, fixed[0], np.float32), np.full(images, fixed[1], np.int32)
    else:
        q, scales, zeros = int8_conv.quantize(planes, header["activation_bits"], fixed)
    acc = int8_conv.accumulate(
        q, zeros, parts["values"], (header["kernel_h"], header["kernel_w"]), (stride_h, stride_w), (pad_top, pad_left),
        (dilation_h, dilation_w), (out_h, out_w), header["groups"],
    )  # fmt: skip
    found, finite = acc, not np.isnan(scales).any()
    if y_type != memory.INT32:
        shape = (images, out_h, out_w, n)
        skip = np.moveaxis(memory.view(addend, np.float32, *shape), -1, 1) if addend else None
        own_bias = memory.vector(bias, n) if bias else None
        found = int8_conv.rescale(acc, scales, memory.vector(weight_scale, n), own_bias, addend=skip, code=activation)
    if to is not None and (addend or beside):
        finite = bool(np.isfinite(found).all())
    if to is not None:
        own_bytes = int8_conv.requantize(found, *to)
        if beside:
            memory.store(beside, memory.UINT8, np.ascontiguousarray(np.moveaxis(own_bytes, 1, -1)))
        else:
            found = own_bytes
    memory.store(y, y_type, np.ascontiguousarray(np.moveaxis(found, 1, -1)) if channels_last_of_y else found)
    return _Done(scales, zeros, finite)
