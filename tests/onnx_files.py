"""ONNX files for tests, written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

Inputs = Mapping[str, Sequence[int | str]]


def node(operator: str, inputs: str, outputs: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    """Inputs and outputs are names with spaces between; ``-`` is one that is left out."""
    names = ["" if one == "-" else one for one in inputs.split()]
    return helper.make_node(operator, names, outputs.split(), name=name, **attributes)


def model(
    nodes: Sequence[onnx.NodeProto], inputs: Inputs, outputs: Sequence[str], constants: Mapping[str, Any] | None = None, *,
    opset: int = 20, tokens: bool = False, producer: str = "hand", version: str = "",
) -> onnx.ModelProto:  # fmt: skip
    """Inputs are float32, or int64 ``tokens``; constants are arrays."""
    kind = TensorProto.INT64 if tokens else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, shape in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name=producer)
    made.producer_version = version
    return made


def written(path: Path, made: onnx.ModelProto) -> Path:
    path.write_bytes(made.SerializeToString())
    return path


def in_runtime(made: onnx.ModelProto, *inputs: Tensor) -> list[Tensor]:
    """What ONNX Runtime gives. A model without types of its outputs has them inferred."""
    checked = onnx.shape_inference.infer_shapes(made)
    checked.ir_version = min(checked.ir_version, 10)
    options = onnxruntime.SessionOptions()  # with optimisations it rounds what meets a quantized weight to 8 bits
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(checked.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return [torch.from_numpy(np.asarray(one)) for one in session.run(None, given)]


def floats(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
