"""TensorRT: an ONNX file of what its parser takes (:mod:`pycompress.onnx.symmetric`), and a calibration cache.

A cache is text: version and algorithm of what wrote it, then a line ``tensor: scale`` for each, the scale (the largest magnitude
over 127) as the eight hexadecimal digits of its float32. It is for builds from the float network; static ranges alone make one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping

from torch import Tensor, from_numpy

from pycompress.nn import CompressedLayer
from pycompress.targets.rounding import NOT_ROUNDED, rounds_rows
from pycompress.targets.source import Source
from pycompress.targets.target import Carried, Target
from pycompress.targets.twins import factors_of
from pycompress.weights import DenseWeight, Int4Weight, Int8Weight, LowRankConv2dWeight, LowRankWeight, Weight

FILE, CACHE = "model.onnx", "calibration.cache"  # in the folder
HEAD = "TRT-100300-EntropyCalibration2"  # TensorRT 10.3.0; another version wants its own number here


class TensorRt(Target):
    """A folder with ``model.onnx`` and, where ranges are static, ``calibration.cache``."""

    name, title, suffix, extra = "tensorrt", "TensorRT", "", "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    @property
    def absent(self) -> str:
        return "TensorRT needs an NVIDIA GPU, and is in no common package index"

    def carried(self, layer: CompressedLayer) -> Carried:
        if layer.kind.recurrent:
            return Carried("refused", "", "TensorRT has no integers in loops")
        weight = layer.canonical()
        if layer.kind.tokens and not isinstance(weight, LowRankWeight):
            return Carried("widened", "float32", "rows are looked up in floats")
        static = bool(layer.settings.get("static"))
        parts = [weight]
        if isinstance(weight, LowRankWeight):
            parts = [*factors_of(weight), *([] if weight.residual is None else [weight.residual])]
        found = [_carried(part) for part in parts]
        encoding = " + ".join(dict.fromkeys(one.encoding for one in found)) + (", int8 inputs" if static else "")
        if reason := next((one.reason for one in found if one.fate == "widened"), ""):
            return Carried("widened", encoding, reason)
        reason = "the range of inputs is made symmetric" if static else NOT_ROUNDED if rounds_rows(layer) else ""
        return Carried("kept", encoding, reason)

    def write(self, source: Source, path: str) -> None:
        import onnx

        from pycompress.onnx.whole_model import export_model

        os.mkdir(path)
        file = os.path.join(path, FILE)
        export_model(source.model, file, source.inputs, source.sizes, "symmetric")
        graph = onnx.load(file, load_external_data=False).graph
        scales = {one.name: one for one in graph.initializer}
        lines = [
            f"{node.input[0]}: {struct.pack('>f', float(onnx.numpy_helper.to_array(scales[node.input[1]]))).hex()}\n"
            for node in graph.node
            if node.op_type == "QuantizeLinear"
        ]
        if lines:
            with open(os.path.join(path, CACHE), "w", encoding="utf-8") as cache:
                cache.writelines([f"{HEAD}\n", *dict.fromkeys(lines)])

    def run(self, path: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """In ONNX Runtime, which computes what the file says: not called by ``deploy``, because it is not TensorRT."""
        from pycompress import onnx

        session = onnx.session(os.path.join(path, FILE))
        known = {one.name for one in session.get_inputs()}
        found = session.run(None, {name: x.detach().cpu().numpy() for name, x in inputs.items() if name in known})
        return [from_numpy(y) for y in found]


def _carried(weight: Weight) -> Carried:
    """One matrix."""
    if isinstance(weight, Int8Weight):
        return Carried("kept", "int8, a scale a row")
    if isinstance(weight, DenseWeight | LowRankConv2dWeight):
        return Carried("kept", "float32")
    if isinstance(weight, Int4Weight):
        if weight.symmetric and weight.k % weight.group == 0:
            return Carried("kept", "int4, a scale a group")
        short = f"k = {weight.k} is no multiple of the group, {weight.group}"
        return Carried("widened", "float32", short if weight.symmetric else "TensorRT has no zero points")
    return Carried("widened", "float32", "with its zeros")
