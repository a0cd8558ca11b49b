"""ONNX Runtime: standard operators that compute the integers of our kernels (:func:`pycompress.export`, the exact form)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, from_numpy

from pycompress.interchange import export
from pycompress.nn import CompressedLayer
from pycompress.targets.source import Source
from pycompress.targets.target import Carried, Run, Target


class OnnxRuntime(Target):
    """One ``.onnx`` file, to be opened with the options of :func:`pycompress.onnx.session`."""

    name, title, suffix, extra, packages = (
        "onnxruntime",
        "ONNX Runtime",
        ".onnx",
        "onnx",
        ("onnx", "onnxscript", "onnxruntime"),
    )

    def carried(self, layer: CompressedLayer) -> Carried:
        bits = getattr(layer, "bits", None)
        if layer.weight_type.name == "sparse":
            return Carried(
                "kept", f"values and a bit for each place, {'int8' if bits == 8 else 'float32'}, made dense when loaded"
            )
        if layer.weight_type.name == "low_rank":
            return Carried("kept", f"two factors, {'int8' if bits == 8 else 'float32'}")
        return Carried("kept", f"{layer.weight_type.name} constants")

    def write(self, source: Source, path: str) -> None:
        export(source.model, path, source.inputs, source.sizes, form="exact")

    def run(self, path: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return self.open(path)(inputs)

    def open(self, path: str) -> Run:
        from pycompress import onnx

        session = onnx.session(path)
        known = {one.name for one in session.get_inputs()}

        def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            fed = {name: x.detach().cpu().numpy() for name, x in inputs.items() if name in known}
            return [from_numpy(y) for y in session.run(None, fed)]

        return call
