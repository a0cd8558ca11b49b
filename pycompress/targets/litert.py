"""LiteRT (TensorFlow Lite): a ``.tflite`` file (https://ai.google.dev/edge/litert).

litert-torch converts the model with its weights as floats; ai-edge-quantizer then puts our integers and scales in their places.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, from_numpy, nn

from pycompress.nn import CompressedLayer
from pycompress.targets.source import Source
from pycompress.targets.target import Carried, Run, Target
from pycompress.targets.twins import (
    Encoded,
    Floats,
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

_OPERATORS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")
_LOCK = threading.Lock()  # what the quantizer's table holds while one model is written is for that one


class LiteRT(Target):
    """One ``.tflite`` file, for inputs of the sizes of the example: the converter knows no others."""

    name, title, suffix = "litert", "LiteRT", ".tflite"
    extra, packages = "targets-litert", ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")
    open_sizes = False

    def carried(self, layer: CompressedLayer) -> Carried:
        if layer.kind.recurrent:
            return Carried("refused", "", "recurrent layers are not converted")
        return together([_carried(matrix, layer) for matrix in matrices_of(layer)])

    def write(self, source: Source, path: str) -> None:
        import litert_torch

        stored: dict[bytes, _Stored] = {}
        claims: list[tuple[str, bytes]] = []

        def twin(name: str, layer: CompressedLayer) -> nn.Module:
            def encode(weight: Weight, shape: tuple[int, ...]) -> Encoded:
                claims.append((name, _claimed(weight, shape, layer)))
                encoded, found = _encoded(weight, shape, layer)
                if found is not None:
                    stored[_digest(found.floats)] = found
                return encoded

            return twin_of(layer, encode)

        program = source.program(twin, dynamic=False)
        floats = f"{path}.floats"
        module = program.module()
        for part in module.modules():
            part.training = False  # programs are, and have no eval()
        litert_torch.convert(module, tuple(source.call.tensors.values())).export(floats)
        written = Path(floats).read_bytes()
        Path(floats).unlink()
        if stored:
            written = _quantized(written, stored)
        check_stored(self.title, claims, written)
        Path(path).write_bytes(written)

    def run(self, path: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return self.open(path)(inputs)

    def open(self, path: str) -> Run:
        from ai_edge_litert.interpreter import Interpreter

        runner = Interpreter(model_path=path, num_threads=1).get_signature_runner()
        wanted = runner.get_input_details()

        def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            fed = {}
            for i, (name, x) in enumerate(inputs.items()):
                one = wanted.get(f"args_{i}")
                if one is None:  # the model does without it
                    continue
                if [*x.shape] != [*one["shape"]]:
                    sizes = [*map(int, one["shape"])]
                    raise ValueError(
                        f"LiteRT: {name} is {[*x.shape]}, expected {sizes}, for which the file was written"
                    )
                fed[f"args_{i}"] = x.detach().cpu().numpy().astype(one["dtype"], copy=False)
            found = runner(**fed)
            return [from_numpy(found[f"output_{i}"]) for i in range(len(found))]

        return call


class _Stored(NamedTuple):
    """A weight as LiteRT's operator takes it.

    Attributes:
        floats: float32 as the converted model has it.
        values: int8 of the same shape; of 4 bits too.
        scale: float32 [n], or [n, groups].
        bits: 8 or 4.
        group: how many features share a scale; 0: all.
        quantizes: whether the input is quantized as it comes.
    """

    floats: npt.NDArray[np.float32]
    values: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    bits: int
    group: int
    quantizes: bool


class _Barrier(nn.Module):
    """x as it is, in an operator that the converter leaves where it is: it would multiply weights with the gains of a norm before
    them, or with a constant behind them, such as the scale of attention."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_min(torch.finfo(torch.float32).min)


def _form(weight: Weight) -> str:
    """How a matrix is stored: ``int8``, ``int4`` or ``float32``."""
    if isinstance(weight, Int8Weight) or (isinstance(weight, SparseWeight) and weight.bits == 8):
        return "int8"
    whole = isinstance(weight, Int4Weight) and weight.activation_bits == 8 and weight.k % weight.group == 0
    return "int4" if whole else "float32"


def _carried(weight: Weight, layer: CompressedLayer) -> Carried:
    """What becomes of one matrix of a layer."""
    if isinstance(weight, DenseWeight):
        return Carried("kept", "float32")
    form, bits = _form(weight), getattr(weight, "activation_bits", None)
    zeros = ", zeros and all" if isinstance(weight, SparseWeight) else ""
    if form == "float32":
        why = f"LiteRT has no {weight.name} weights"
        if bits == 16:
            why = "LiteRT has no product of groups with floats: activation_bits=8 is carried"
        elif isinstance(weight, Int4Weight):
            why = f"k is {weight.k}, no multiple of the group"
        return Carried("widened", f"float32{zeros}", why)
    seen = "made floats as they are used" if bits == 16 else ""
    return integers_carried(weight, layer, "LiteRT", seen)


def _claimed(weight: Weight, shape: tuple[int, ...], layer: CompressedLayer) -> bytes:
    """The integers that the file has to hold of a matrix, of 4 bits two a byte and signed. Of floats none."""
    form = _form(weight)
    if isinstance(weight, Int4Weight) and form == "int4":
        return pack_nibbles((weight.integers() - 8) & 15).numpy().tobytes()
    if isinstance(weight, Int8Weight | SparseWeight) and form == "int8":
        return _arranged(dense_int8(weight).values.view(shape), layer).numpy().tobytes()
    return b""


def _encoded(weight: Weight, shape: tuple[int, ...], layer: CompressedLayer) -> tuple[Encoded, _Stored | None]:
    """Floats, and what is to take their place."""
    form, quantizes = _form(weight), getattr(weight, "activation_bits", None) != 16
    if isinstance(weight, Int4Weight) and form == "int4":
        values, scale = weight.integers().to(torch.int8) - 8, weight.scale.to(torch.float32)
        floats = values * scale.repeat_interleave(weight.group, dim=1)
        known = _Stored(floats.numpy(), values.numpy(), scale.numpy(), 4, weight.group, quantizes)
        beside = None if weight.symmetric else ZeroPoints(weight)
        return Encoded(Floats(floats), _Barrier(), beside, _Barrier()), known
    if isinstance(weight, Int8Weight | SparseWeight) and form == "int8":
        dense = dense_int8(weight)
        if layer.kind.tokens:
            return Encoded(Int8Rows(dense), nn.Identity()), None
        floats = dense.decompress().view(shape)
        there, integers = (_arranged(one, layer).numpy() for one in (floats, dense.values.view(shape)))
        known = _Stored(there, integers, dense.scale.numpy(), 8, 0, quantizes)
        return Encoded(Floats(floats), _Barrier(), behind=_Barrier()), known
    return as_floats(weight, shape), None


def _arranged(weight: Tensor, layer: CompressedLayer) -> Tensor:
    """As LiteRT's operator has it: a convolution's channels last, a depthwise one's as if they were those of one filter."""
    if weight.dim() != 4:
        return weight
    depthwise = layer.geometry.groups > 1 and layer.geometry.groups == layer.geometry.in_channels
    return weight.permute(*((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))).contiguous()


def _digest(array: npt.NDArray[Any]) -> bytes:
    """By which floats are known again, whatever their shape."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).digest()


def _quantized(model: bytes, stored: Mapping[bytes, _Stored]) -> bytes:
    """The model with integers in the places of the floats that are known."""
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    operators = [qtyping.TFLOperationName[name] for name in _OPERATORS]
    algorithm = algorithm_manager.AlgorithmName.DEQUANTIZED_WEIGHT_RECOVERY
    read = tfl_flatbuffer_utils.read_model(bytearray(model))
    work = quantizer.Quantizer(bytearray(model))
    graph = read.subgraphs[0]
    for op in graph.operators:
        code = read.operatorCodes[op.opcodeIndex].builtinCode
        kind = tfl_flatbuffer_utils.TFL_OP_CODE_TO_NAME.get(code)
        if kind not in operators:
            continue
        data = read.buffers[graph.tensors[op.inputs[1]].buffer].data
        known = None if data is None else stored.get(_digest(np.asarray(data)))
        if known is None:
            continue
        granularity = f"BLOCKWISE_{known.group}" if known.group else "CHANNELWISE"
        config = qtyping.OpQuantizationConfig(
            weight_tensor_config=qtyping.TensorQuantizationConfig(
                num_bits=known.bits, symmetric=True, granularity=qtyping.QuantGranularity[granularity]
            ),
            compute_precision=qtyping.ComputePrecision.INTEGER if known.quantizes else qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=not known.quantizes,
            skip_checks=True,
        )
        scope = re.escape(tfl_flatbuffer_utils.get_op_scope(op, graph.tensors))
        work.update_quantization_recipe(f"^{scope}$", kind, config, algorithm)
    with _looked_up(stored):
        return bytes(work.quantize(enable_progress_report=False).quantized_model)


@contextmanager
def _looked_up(stored: Mapping[bytes, _Stored]) -> Iterator[None]:
    """In the block the quantizer looks weights up in the place of its weight recovery, which guesses a scale from the distances of
    the floats: wrongly where a row has no two integers that are neighbours. It knows no algorithms but those in its own list."""
    from ai_edge_quantizer import algorithm_manager, qtyping
    from ai_edge_quantizer.algorithms.uniform_quantize import common_quantize, dequantized_weight_recovery
    from ai_edge_quantizer.algorithms.utils import common_utils

    def parameters(op: Any, config: Any, content: Any = None, seen: Any = None) -> Any:
        if content is None:
            return dequantized_weight_recovery.get_tensor_quant_params(op, config, content, seen)
        known = stored[_digest(content)]
        axis = common_utils.get_weight_quantized_dim(op, content, config.granularity)
        scale = known.scale
        if not known.group:
            scale = scale.reshape([-1 if at == axis else 1 for at in range(content.ndim)])
        return qtyping.UniformQuantParams(
            scale=scale,
            zero_point=np.zeros_like(scale, dtype=np.int32),
            num_bits=known.bits,
            symmetric=True,
            quantized_dimension=axis,
            block_size=known.group,
            quantized_data=known.values,
        )

    def register(function: Any) -> None:
        for name in _OPERATORS:
            algorithm_manager.register_quantized_op(
                algorithm_manager.AlgorithmName.DEQUANTIZED_WEIGHT_RECOVERY,
                qtyping.TFLOperationName[name],
                dequantized_weight_recovery.init_qsvs,
                calibration_func=dequantized_weight_recovery.calibrate,
                materialize_func=partial(common_quantize.materialize_fc_conv, function),
            )

    with _LOCK:
        register(parameters)
        try:
            yield
        finally:
            register(dequantized_weight_recovery.get_tensor_quant_params)
