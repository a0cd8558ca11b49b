"""ExecuTorch: a ``.pte`` program, its products in XNNPACK (https://docs.pytorch.org/executorch/stable/backends-xnnpack.html)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.kinds.walk import Walk
from pycompress.nn import CompressedLayer
from pycompress.targets.source import Source
from pycompress.targets.target import Carried, Run, Target
from pycompress.targets.twins import (
    Encoded,
    Int8Rows,
    ZeroPoints,
    as_floats,
    check_stored,
    dense_int8,
    integers_carried,
    matrices_of,
    together,
    twin_of,
)
from pycompress.weights import DenseWeight, Int4Weight, Int8Weight, SparseWeight, Weight
from pycompress.weights.int4 import pack_nibbles


class ExecuTorch(Target):
    """One ``.pte`` file. Dimensions that may have other sizes go up to those of the example inputs: memory is planned for these."""

    name, title, suffix = "executorch", "ExecuTorch", ".pte"
    extra, packages = "targets-executorch", ("executorch.exir",)

    def carried(self, layer: CompressedLayer) -> Carried:
        if layer.kind.recurrent:
            return Carried("refused", "", "recurrent layers are not converted")
        return together([_carried(matrix, layer) for matrix in matrices_of(layer)])

    def write(self, source: Source, path: str) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
            XnnpackDynamicallyQuantizedPartitioner,
            XnnpackPartitioner,
        )
        from executorch.exir import to_edge_transform_and_lower

        claims: list[tuple[str, bytes]] = []

        def twin(name: str, layer: CompressedLayer) -> nn.Module:
            def encode(weight: Weight, shape: tuple[int, ...]) -> Encoded:
                claims.append((name, _claimed(weight, shape, layer)))
                return _encoded(weight, shape, layer)

            return twin_of(layer, encode)

        program = source.program(twin)
        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()]
        )
        written = bytes(edge.to_executorch().buffer)
        check_stored(self.title, claims, written)
        Path(path).write_bytes(written)

    def run(self, path: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return self.open(path)(inputs)

    def open(self, path: str) -> Run:
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")
        planned = [tuple(method.metadata.input_tensor_meta(i).sizes()) for i in range(method.metadata.num_inputs())]

        def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            for (name, x), sizes in zip(inputs.items(), planned, strict=True):
                if x.dim() != len(sizes) or any(own > size for own, size in zip(x.shape, sizes, strict=True)):
                    raise ValueError(f"ExecuTorch: {name} is {[*x.shape]}, expected at most {[*sizes]}, as planned for")
            return [y.clone() for y in method.execute([x.detach().cpu().contiguous() for x in inputs.values()])]

        return call


def _form(weight: Weight, layer: CompressedLayer) -> str:
    """How a matrix of a layer is stored: ``int8``, ``int4`` or ``float32``."""
    bits = getattr(weight, "activation_bits", None)
    if isinstance(weight, Int8Weight) and layer.kind.tokens:
        return "int8"
    if isinstance(weight, Int8Weight | SparseWeight) and bits in (7, 8) and not _is_depthwise(layer):
        return "int8"
    return "int4" if isinstance(weight, Int4Weight) and bits == 8 and weight.k % weight.group == 0 else "float32"


def _is_depthwise(layer: CompressedLayer) -> bool:
    return isinstance(layer.geometry, Walk) and layer.geometry.groups == layer.geometry.in_channels


def _carried(weight: Weight, layer: CompressedLayer) -> Carried:
    """What becomes of one matrix of a layer."""
    if isinstance(weight, DenseWeight):
        return Carried("kept", "float32")
    form, bits = _form(weight, layer), getattr(weight, "activation_bits", None)
    zeros = ", zeros and all" if isinstance(weight, SparseWeight) else ""
    if form == "float32":
        return Carried("widened", f"float32{zeros}", _why_floats(weight, layer, bits))
    return integers_carried(weight, layer, "XNNPACK")


def _why_floats(weight: Weight, layer: CompressedLayer, bits: int | None) -> str:
    if bits == 16:
        return f"XNNPACK has no product of {weight.name} weights with floats: activation_bits=8 is carried"
    if isinstance(weight, Int4Weight):
        return f"k is {weight.k}, no multiple of the group"
    if bits is not None and _is_depthwise(layer):
        return "XNNPACK does not quantize images as they come where a group is one channel"
    return f"XNNPACK has no {weight.name} weights"


def _claimed(weight: Weight, shape: tuple[int, ...], layer: CompressedLayer) -> bytes:
    """The integers that the file has to hold of a matrix, as XNNPACK has them: channels last, or two a byte. Of floats none."""
    form = _form(weight, layer)
    if isinstance(weight, Int4Weight) and form == "int4":
        return pack_nibbles(weight.integers()).numpy().tobytes()
    if isinstance(weight, Int8Weight | SparseWeight) and form == "int8":
        values = dense_int8(weight).values.view(shape)
        return (values.permute(0, 2, 3, 1) if len(shape) == 4 else values).contiguous().numpy().tobytes()
    return b""


def _encoded(weight: Weight, shape: tuple[int, ...], layer: CompressedLayer) -> Encoded:
    form = _form(weight, layer)
    if isinstance(weight, Int4Weight) and form == "int4":
        return Encoded(_Groups(weight), _Rows(), None if weight.symmetric else ZeroPoints(weight))
    if isinstance(weight, Int8Weight | SparseWeight) and form == "int8":
        if isinstance(weight, Int8Weight) and layer.kind.tokens:
            return Encoded(Int8Rows(weight), nn.Identity())
        return Encoded(_PerChannel(dense_int8(weight), shape), _Images() if len(shape) == 4 else _Rows())
    return as_floats(weight, shape)


def _ops() -> Any:
    """torch's operators that XNNPACK reads quantization from."""
    import torch.ao.quantization.fx._decomposed  # registers them

    return torch.ops.quantized_decomposed


class _Integers(nn.Module):
    """A weight as integers, the scales beside them."""

    values: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, values: Tensor, scale: Tensor, zero: Tensor) -> None:
        super().__init__()
        for name, tensor in (("values", values), ("scale", scale), ("zero", zero)):
            self.register_buffer(name, tensor.contiguous())


class _PerChannel(_Integers):
    def __init__(self, weight: Int8Weight, shape: tuple[int, ...]) -> None:
        super().__init__(
            weight.values.view(shape), weight.scale, torch.zeros(len(weight.scale), dtype=torch.int64, device="cpu")
        )

    def forward(self) -> Tensor:
        y: Tensor = _ops().dequantize_per_channel(self.values, self.scale, self.zero, 0, -127, 127, torch.int8)
        return y


class _Groups(_Integers):
    """int4: a step is (value - 8) * scale."""

    def __init__(self, weight: Int4Weight) -> None:
        scale = weight.scale.to(torch.float32)
        super().__init__(
            weight.integers().to(torch.int8) - 8, scale, torch.zeros(scale.shape, dtype=torch.int32, device="cpu")
        )
        self._group = weight.group

    def forward(self) -> Tensor:
        y: Tensor = _ops().dequantize_per_channel_group(
            self.values, self.scale, self.zero, -8, 7, torch.int8, self._group, torch.float32
        )
        return y


class _Rows(nn.Module):
    """x in 8 bits, each row with a range of its own: the kernel quantizes."""

    def forward(self, x: Tensor) -> Tensor:
        ops = _ops()
        scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        q = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
        y: Tensor = ops.dequantize_per_token(q, scale, zero, -128, 127, torch.int8, torch.float32)
        return y


class _Images(nn.Module):
    """The same of what a convolution meets, where it is an image that has a range of its own."""

    def forward(self, x: Tensor) -> Tensor:
        ops = _ops()
        scale, zero = ops.choose_qparams(x, -128, 127, torch.finfo(torch.float32).eps, torch.int8)
        q = ops.quantize_per_tensor(x, scale, zero, -128, 127, torch.int8)
        y: Tensor = ops.dequantize_per_tensor(q, scale, zero, -128, 127, torch.int8)
        return y
