"""A file that ``export`` wrote: what it says of itself, its layers one by one, and the whole of it run."""

from __future__ import annotations

import json
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from pycompress.calls import Inputs
from pycompress.flat_call import flat_call
from pycompress.onnx import FORMS
from pycompress.replacing import FilePath

KEY = "pycompress"  # in the metadata of the file
VERSION = 1  # of what stands there


class Exported:
    """Attributes:
    model: the graph.
    metadata: ``pycompress``, the version that wrote it; ``form``; ``outputs``: by name, where the model returns them; ``layers``:
        by name, what :func:`pycompress.storage.plan.entry_of` says of each, whether it takes ``tokens``, and how its ``x``, what it
        takes beside (``taken``), its ``y`` and what its lowering shows besides (``shown``) are called in the graph.
    """

    def __init__(self, path: FilePath) -> None:
        """Raises ValueError where export did not write the file, or a newer version did."""
        self.path = path
        self.model = onnx.load(path)
        found = {one.key: one.value for one in self.model.metadata_props}.get(KEY)
        if found is None:
            raise ValueError(f"{path}: no pycompress in its metadata, expected a file that pycompress.export wrote")
        self.metadata: dict[str, Any] = json.loads(found)
        if self.metadata.get("version") != VERSION:
            raise ValueError(f"{path}: its metadata has version {self.metadata.get('version')!r}, expected {VERSION}")
        if self.form not in FORMS:
            raise ValueError(f"{path}: its form is {self.form}, expected one of {', '.join(FORMS)}")
        self._nodes = [*self.model.graph.node]
        self._made_by = {name: i for i, node in enumerate(self._nodes) for name in node.output}
        self._constants = {tensor.name: tensor for tensor in self.model.graph.initializer}

    @property
    def form(self) -> str:
        """How layers were lowered."""
        return str(self.metadata["form"])

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        """Of those that are in the file, what it says."""
        found: dict[str, dict[str, Any]] = self.metadata["layers"]
        return found

    def layer(self, name: str) -> onnx.ModelProto:
        """One layer as a model of its own, with inputs and outputs called as :func:`pycompress.onnx.lower` does: the nodes and
        constants that the file has for it."""
        entry = self.layers[name]
        taken = entry.get("taken", {})  # (files of before there were such layers do not say)
        given = {entry["x"]: "x", **{inside: own for own, inside in taken.items()}}
        names = {**given, entry["y"]: "y", **{inside: shown for shown, inside in entry["shown"].items()}}
        chosen: set[int] = set()
        constants: dict[str, onnx.TensorProto] = {}
        pending = [inside for inside in names if inside not in given]
        while pending:
            value = pending.pop()
            if value in self._constants:
                constants[value] = self._constants[value]
            elif value and value not in given and self._made_by[value] not in chosen:
                chosen.add(self._made_by[value])
                pending += self._nodes[self._made_by[value]].input
        nodes = []
        for i in sorted(chosen):
            copy = onnx.NodeProto()
            copy.CopyFrom(self._nodes[i])
            copy.input[:] = [names.get(one, one) for one in copy.input]
            copy.output[:] = [names.get(one, one) for one in copy.output]
            nodes.append(copy)
        x = helper.make_tensor_value_info("x", TensorProto.INT64 if entry["tokens"] else TensorProto.FLOAT, None)
        others = [helper.make_tensor_value_info(own, TensorProto.FLOAT, None) for own in taken]
        outputs = [helper.make_value_info(shown, onnx.TypeProto()) for shown in ("y", *entry["shown"])]
        graph = helper.make_graph(nodes, name, [x, *others], outputs, [*constants.values()])
        return helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)

    def run(self, session: Any, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """The floating-point outputs of a session of the file for a model's inputs, float64, by where the model returns them."""
        tensors = flat_call(model, inputs).tensors
        wanted = {one.name: one.shape for one in session.get_inputs()}
        if {*tensors} != {*wanted}:
            raise ValueError(f"{self.path}: its inputs are {', '.join(wanted)}, given are {', '.join(tensors)}")
        names = list(self.metadata["outputs"])
        found = session.run(names, {name: x.detach().cpu().numpy() for name, x in tensors.items()})
        results = {self.metadata["outputs"][name]: torch.from_numpy(y) for name, y in zip(names, found, strict=True)}
        return {path: y.to(torch.float64) for path, y in results.items() if y.is_floating_point()}
