"""int8 on the CPU (``csrc/int8``, and ``csrc/weight_only`` where activations stay floating point)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.ops.checks import FLOATS, check, matrix_of, vector
from pycompress.ops.cpu import int8_conv, native
from pycompress.ops.cpu.int8_conv import NO_RANGE, Range, range_parts
from pycompress.ops.cpu.native import channels, split
from pycompress.ops.form import Form, Sizes, parse, written

_CHECKED = ("n", "k", "activation_bits")


def sizes(form: Form) -> Sizes:
    """Shape and dtype of what :func:`unpack` gives, on any device."""
    parts: Sizes = {"values": ((form.n, form.k), torch.int8), "scale": ((form.n,), torch.float32)}
    if form.keys.get("static"):
        parts |= {"input_scale": ((1,), torch.float32), "input_zero_point": ((1,), torch.uint8)}
    return parts


def pack(
    parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any], layout: str = ""
) -> tuple[Tensor, str]:
    """Canonical weight -> the layout of the best kernel here: a uint8 vector, for this process only.

    Args:
        parts: values int8 [n, k], in [-127, 127]; scale float32 [n]; for a static weight input_scale float32 [1], from 2^-126 to
            2^126, and input_zero_point uint8 [1].
        settings: activation_bits 7 or 8, the range of the activations that the packed weight will meet; 16: they stay floating
            point. static: whether they are quantized with the range that is given, not each row with its own. convolution (kernel
            height, kernel width, groups) where the rows are those of a convolution: for that alone.
        layout: the name of a kernel (:func:`pycompress.ops.kernels`), to force it.
    Raises:
        ValueError: wrong dtype or shape, a -128, k > 65536, or a kernel that cannot run here.
    """
    values, bits = parts["values"], settings["activation_bits"]
    if values.dtype != torch.int8 or values.dim() != 2 or tuple(values.shape) != tuple(shape):
        expected = list(shape) if values.dim() == 2 and values.dtype == torch.int8 else "[n, k]"
        raise ValueError(f"int8_pack: values is {values.dtype} {list(values.shape)}, expected int8 {expected}")
    check(bits in {7, 8, 16}, f"int8_pack: activation_bits is {bits}, expected 7, 8 or 16")
    values, scale = values.contiguous(), parts["scale"].detach().contiguous()
    channels("int8_pack", "scale", scale, shape[0])
    given = _range_in(parts) if settings.get("static") else None
    check(
        given is not None or "input_scale" not in parts,
        "int8_pack: there is an input_scale, expected none without static",
    )
    if (convolution := settings.get("convolution")) is not None:
        return int8_conv.pack(values, scale, bits, given, convolution, layout)
    data = native._C.int8_pack(values.data_ptr(), *shape, bits, layout, torch.get_num_threads(), *(given or NO_RANGE))
    packed = vector(data, scale)
    own = native._C.int8_header(packed.data_ptr(), len(data))["layout"]
    keys: dict[str, Any] = {"activation_bits": bits, **({"static": 1} if given else {})}
    return packed, written(own, *shape, **keys)


def _range_in(parts: Mapping[str, Tensor]) -> Range:
    """The range of the input that stands among the parts of a static weight."""
    found: list[Any] = []
    for name, dtype in (("input_scale", torch.float32), ("input_zero_point", torch.uint8)):
        tensor = parts[name]
        check(
            tensor.dtype == dtype and tensor.shape == (1,),
            f"int8_pack: {name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} [1]",
        )
        found.append(tensor.item())
    return found[0], found[1]


def _checked(op: str, packed: Tensor, form: str) -> tuple[Form, int, dict[str, Any]]:
    """The form, the bytes before the scale, and the header, which says what the form says."""
    own = parse(form)
    n_bytes, _ = split(op, packed, own.n)
    header = native.header_of(op, "int8", packed, n_bytes, own, _CHECKED)
    static = header["input_scale"] != 0
    check(
        static == bool(own.keys.get("static")),
        f"{op}: the packed weight is {'static' if static else 'dynamic'}, its form is {form!r}",
    )
    return own, n_bytes, header


def unpack(packed: Tensor, form: str) -> dict[str, Tensor]:
    if int8_conv.is_packed(form):
        return int8_conv.unpack(packed, form)
    own, n_bytes, header = _checked("int8_unpack", packed, form)
    values = packed.new_empty((own.n, own.k), dtype=torch.int8)
    native._C.int8_unpack(packed.data_ptr(), n_bytes, values.data_ptr())
    return {"values": values, "scale": native.scale_of(packed, own.n), **range_parts(packed, header)}


def dense(packed: Tensor, form: str) -> Tensor:
    parts = unpack(packed, form)
    return parts["values"].to(torch.float32) * parts["scale"][:, None]


def linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None, activation: str) -> Tensor:
    n_bytes, scale = split("int8_linear", packed, parse(form).n)
    return native.linear("int8_linear", x, packed, form, bias, activation, n_bytes, scale, further=(0, 0))


def fused_linear(
    x: Tensor, before: str, weight: Tensor | None, shift: Tensor | None, eps: float, gate: Tensor | None, packed: Tensor,
    form: str, bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """The layer, after what stands in front of it in torch's own operators."""
    return linear(before_layer(x, before, weight, shift, eps, gate), packed, form, bias, activation)


def before_layer(
    x: Tensor, before: str, weight: Tensor | None, shift: Tensor | None, eps: float, gate: Tensor | None
) -> Tensor:
    """What stands in front of a layer: computed in float32, rounded to x's dtype."""
    if gate is not None:
        act = nn.functional.silu(gate.float()) if before == "silu_gate" else nn.functional.gelu(
            gate.float(), approximate="tanh" if before == "gelu_tanh_gate" else "none"
        )  # fmt: skip
        return (act.to(x.dtype).float() * x.float()).to(x.dtype)
    scale = None if weight is None else weight.float()
    if before == "rms_norm":
        return nn.functional.rms_norm(x.float(), x.shape[-1:], scale, eps).to(x.dtype)
    offset = None if shift is None else shift.float()
    return nn.functional.layer_norm(x.float(), x.shape[-1:], scale, offset, eps).to(x.dtype)


def depths(packed: Tensor, form: str) -> dict[str, Any]:
    header = _checked("int8_depths", packed, form)[2]
    return {name: header[name] for name in (*_CHECKED, "groups", "items")}


# --- the integers alone -----------------------------------------------------------------------------------------------


def quantize(
    x: Tensor, activation_bits: int, input_range: Range | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, ldx = matrix_of("int8_quantize", x)
    m, k = x.shape
    q, scale = x.new_empty((m, k), dtype=torch.uint8), x.new_empty(m, dtype=torch.float32)
    zero_point = x.new_empty(m, dtype=torch.int32)
    native._C.int8_quantize(
        x.data_ptr(), FLOATS[x.dtype], m, k, ldx, activation_bits, *(input_range or NO_RANGE),
        q.data_ptr(), scale.data_ptr(), zero_point.data_ptr(),
    )  # fmt: skip
    return q, scale, zero_point


def rounded(x: Tensor, activation_bits: int, input_range: Range | None = None) -> Tensor:
    """float32 [m, k]: what the integers of :func:`quantize` mean."""
    x, ldx = matrix_of("int8_round", x)
    m, k = x.shape
    y = x.new_empty((m, k), dtype=torch.float32)
    native._C.int8_round(
        x.data_ptr(), FLOATS[x.dtype], m, k, ldx, activation_bits, *(input_range or NO_RANGE), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def accumulate(x: Tensor, packed: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    own = parse(form)
    check(
        own.activation_bits != 16,
        f"int8_accumulate: the packed weight's activation_bits is {own.activation_bits}, expected 7 or 8: there are no integers",
    )
    return native.accumulate("int8", x, packed, form, split("int8_accumulate", packed, own.n)[0])
