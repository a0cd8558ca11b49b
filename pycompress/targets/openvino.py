"""OpenVINO: its intermediate representation (IR), read from our ONNX file of the form ``fused``.

That form and not the exact one, of which OpenVINO widens int8 weights to float32, which takes more time and memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

from torch import Tensor, from_numpy

from pycompress.interchange import export
from pycompress.nn import CompressedLayer
from pycompress.targets.rounding import NOT_ROUNDED, rounds_rows
from pycompress.targets.source import Source
from pycompress.targets.target import Carried, Run, Target

FILE = "model.xml"  # in the folder, with model.bin beside it
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32"}  # else processors that have bfloat16 compute in it
# Rounding of inputs in groups of 32, which the CPU plugin would do of its own accord where the processor has VNNI. A model says so.
IN_FILE = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


class OpenVino(Target):
    """A folder with ``model.xml`` and ``model.bin``, to be compiled with :data:`OPTIONS`."""

    name, title, suffix, extra = "openvino", "OpenVINO", "", "targets-openvino"
    packages = ("onnx", "onnxscript", "onnxruntime", "openvino")

    def carried(self, layer: CompressedLayer) -> Carried:
        if layer.kind.recurrent:  # cosine 0.87 to an LSTM
            return Carried("refused", "", "OpenVINO does not compute the Scan that they are exported as")
        integers = "i8" if getattr(layer, "bits", None) == 8 else "f32"
        encodings = {
            "int8": "i8 constants, a scale a row" + (", u8 inputs" if layer.settings.get("static") else ""),
            "int4": "u4 constants, a scale and a u4 zero point a group",
            "sparse": f"{integers} values and a bit for each place, made dense when compiled",
            "low_rank": f"two factors, {integers}",
        }
        kind = layer.weight_type.name
        encoding = encodings.get(kind, f"{kind} constants, as its lowering has them")
        return Carried("kept", encoding, NOT_ROUNDED if kind in encodings and rounds_rows(layer) else "")

    def write(self, source: Source, path: str) -> None:
        import openvino

        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=os.path.dirname(path)) as folder:
            file = os.path.join(folder, "model.onnx")
            export(source.model, file, source.inputs, source.sizes, form="fused")
            model = openvino.Core().read_model(file)
            for name, value in IN_FILE.items():
                model.set_rt_info(value, ["runtime_options", name])
            os.mkdir(path)
            openvino.save_model(model, os.path.join(path, FILE), compress_to_fp16=False)
            del model  # (it maps the file)

    def run(self, path: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return self.open(path)(inputs)

    def open(self, path: str) -> Run:
        import openvino

        compiled = openvino.Core().compile_model(os.path.join(path, FILE), "CPU", OPTIONS)
        known = {name for one in compiled.inputs for name in one.get_names()}

        def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            found: Any = compiled({name: x.detach().cpu().numpy() for name, x in inputs.items() if name in known})
            return [from_numpy(found[at].copy()) for at in range(len(compiled.outputs))]

        return call
