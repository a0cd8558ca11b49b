"""The products of an ONNX file as linear layers, and the file with compressed ones in their places: all else of it stays."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx import checker, defs, helper
from onnxscript import version_converter
from torch import Tensor, nn

from pycompress import __version__
from pycompress.onnx import lowering_of, session
from pycompress.onnx.exported import KEY, VERSION
from pycompress.onnx.graph import KERNELS_DOMAIN, KERNELS_VERSION
from pycompress.onnx.importing.names import Names
from pycompress.onnx.importing.reading import located, read
from pycompress.onnx.spliced import Lowered, Lowerings, Splice
from pycompress.onnx.stored import write
from pycompress.onnx.traced import DOMAIN, PLACEHOLDER
from pycompress.replacing import FilePath
from pycompress.storage.plan import entry_of
from pycompress.surgery import compressed_layers

_STANDARD = ("", "ai.onnx")
_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}
_DEFAULTS_ARE_INPUTS = 4  # the first version of files in which constants need not be among the inputs


@dataclass(frozen=True)
class Product:
    """A product with a constant weight.

    Attributes:
        nodes: those that a layer stands for: MatMul, and Add behind it where that adds a bias; or Gemm.
        x: what the layer takes.
        weight: its weight as the graph has it.
    """

    nodes: tuple[ir.Node, ...]
    x: ir.Value
    weight: ir.Value


class Products:
    """A file, and its MatMul and Gemm with constant weights outside of loops and branches.

    Attributes:
        layers: them as ``nn.Linear``, under the names that ``from_onnx`` gives layers. Called with the inputs of the file, it has
            each of them see what it meets when ONNX Runtime runs the file.
    """

    def __init__(self, path: FilePath) -> None:
        """Raises ValueError where the file is no ONNX file, has data outside of its folder, or no such product; OSError where it
        cannot be read."""
        self.path = Path(path)
        with _own_name():
            nodes = read(self.path).graph.node
            self._model = ir.load(self.path)
            for name, location in _external(self._model):
                located(name, location, self.path.parent)
        self._model.graph.sort()
        names, self._products = Names(nodes), dict[str, Product]()
        self.layers = _Watched(self._model, self._products)
        self._parameters: dict[Any, nn.Parameter] = {}
        for node in self._model.graph:
            made = self._linear(node)
            if made is not None:
                product, layer = made
                name = names.layer(
                    ir.serde.serialize_node(node), product.weight.name or "", len(product.weight.uses()), "linear"
                )
                self._products[name] = product
                _put(self.layers, name, layer)
        if not self._products:
            raise ValueError(f"compress_onnx: {path} has no MatMul or Gemm with a constant weight [k, n] of floats")

    def write(self, path: FilePath, form: str) -> None:
        """Writes the file with those layers that are compressed.

        Raises:
            ValueError: no layer is compressed, or the file's opset is too old for the form. OSError: the file could not be written;
            an older one is as it was.
        """
        layers = compressed_layers(self.layers)
        if not layers:
            raise ValueError(
                f"compress_onnx: no layer was compressed; there are: {', '.join([*self._products][:20])}, expected a plan "
                "with a method for one of them that takes it"
            )
        lowerings = Lowerings(lambda layer: lowering_of(layer, form))
        lowered = {name: lowerings.lowered(name, layer) for name, layer in layers.items()}
        weights = {self._products[name].weight for name in layers}
        for name in layers:
            _hold_place(self._model.graph, name, self._products[name])
        for weight in weights:
            _remove_unused(self._model.graph, weight)
        self._raise_opset(lowered.values(), form)
        places = Splice(self._model, lowerings, lowered, keep_names=True).run(layers)
        if any(node.domain for one in lowered.values() for node in one.graph.nodes):
            self._model.opset_imports[KERNELS_DOMAIN] = KERNELS_VERSION
        entries = {
            name: {**entry_of(layers[name]), "tokens": False, **asdict(place)} for name, (place,) in places.items()
        }
        self._model.metadata_props[KEY] = json.dumps(
            {"version": VERSION, "pycompress": __version__, "form": form, "outputs": {}, "layers": entries}
        )
        if self._model.ir_version < _DEFAULTS_ARE_INPUTS:
            constants = self._model.graph.initializers
            kept = [value for value in self._model.graph.inputs if value.name not in constants]
            self._model.graph.inputs[:] = kept
        opset = helper.make_opsetid("", _opset(self._model))
        self._model.ir_version = max(self._model.ir_version, helper.find_min_ir_version_for([opset]))
        write(self._model, path, check=_is_checked(self.path))

    # --- what is found ------------------------------------------------------------------------------------------------

    def _linear(self, node: ir.Node) -> tuple[Product, nn.Linear] | None:
        """A node as a layer, if it is one. A weight that something else reads too would stay in the file: it is left alone."""
        if node.domain not in _STANDARD or node.op_type not in ("MatMul", "Gemm"):
            return None
        x, weight, *rest = node.inputs
        found = None if weight is None else self._constant(weight)
        if x is None or weight is None or found is None or len(found.shape) != 2 or not found.size:
            return None
        if any(use.node.op_type not in ("MatMul", "Gemm") or use.idx != 1 for use in weight.uses()):
            return None
        said, turned, factor, bias = node.attributes, True, 1.0, None
        nodes: tuple[ir.Node, ...] = (node,)
        n = int(found.shape[1])
        if node.op_type == "Gemm":
            turned, factor = not said.get_int("transB", 0), said.get_float("alpha", 1.0)
            n = int(found.shape[1 if turned else 0])
            c = rest[0] if rest else None
            bias = None if c is None else self._vector(c, n)
            if said.get_int("transA", 0) or (c is not None and bias is None):
                return None
            bias = None if bias is None else bias * said.get_float("beta", 1.0)
        elif (behind := self._added(node, n)) is not None:
            nodes, bias = (node, behind[0]), behind[1]
        key = id(found), turned, factor
        if key not in self._parameters:
            values = torch.from_numpy(found.numpy().copy())
            self._parameters[key] = nn.Parameter((values.T if turned else values).mul(factor).contiguous())
        matrix = self._parameters[key]
        layer = nn.Linear(matrix.shape[1], n, bias=bias is not None, device="meta", dtype=matrix.dtype)
        layer.weight = matrix
        if bias is not None:
            layer.bias = nn.Parameter(bias)
        return Product(nodes, x, weight), layer

    def _constant(self, value: ir.Value) -> Any:
        """A tensor of floats that no input can replace."""
        if value.is_graph_input() and self._model.ir_version >= _DEFAULTS_ARE_INPUTS:
            return None
        found = ir.convenience.get_const_tensor(value)
        return found if found is not None and found.dtype in _DTYPES else None

    def _vector(self, value: ir.Value, n: int) -> Tensor | None:
        """A constant [n], or [1, n]."""
        found = self._constant(value)
        if found is None or found.size != n or found.shape[-1:] != (n,) or len(found.shape) > 2:
            return None
        return torch.from_numpy(found.numpy().copy()).reshape(n)

    def _added(self, node: ir.Node, n: int) -> tuple[ir.Node, Tensor] | None:
        """The Add behind a product, if nothing else takes that, and the constant [n] that it adds."""
        y = node.outputs[0]
        uses = list(y.uses())
        if len(uses) != 1 or y.is_graph_output() or uses[0].node.graph is not node.graph:
            return None
        behind = uses[0].node
        if behind.op_type != "Add" or behind.domain not in _STANDARD:
            return None
        other = behind.inputs[1 - uses[0].idx]
        bias = None if other is None or other.shape is None or len(other.shape) != 1 else self._vector(other, n)
        return None if bias is None else (behind, bias)

    # --- what is written ----------------------------------------------------------------------------------------------

    def _raise_opset(self, lowered: Iterable[Lowered], form: str) -> None:
        """Has the graph in the version of the standard operators that the layers need."""
        needed = max(
            defs.get_schema(node.op_type, one.graph.opset, "").since_version if not node.domain else 1
            for one in lowered
            for node in one.graph.nodes
        )
        given = _opset(self._model)
        if given >= needed:
            return
        self._model.opset_imports[DOMAIN] = 1
        try:
            version_converter.convert_version(self._model, needed, fallback=True)
        except Exception as error:
            raise ValueError(_too_old(self.path, given, form, needed, f" ({error})")) from error
        del self._model.opset_imports[DOMAIN]
        if _opset(self._model) != needed:
            raise ValueError(_too_old(self.path, given, form, needed, ""))


def _is_checked(path: Path) -> bool:
    """Whether a file passes the ONNX checker. (Some that run do not: outputs without a shape, say.)"""
    try:
        checker.check_model(os.fspath(path))
    except checker.ValidationError:
        return False
    return True


def _too_old(path: Path, given: int, form: str, needed: int, why: str) -> str:
    return (
        f"compress_onnx: {path} has the opset {given}, the form {form!r} of these layers needs {needed}, to which onnxscript could "
        f"not convert it{why}: expected form='kernels', which any opset can hold"
    )


def _opset(model: ir.Model) -> int:
    return next(int(version) for domain, version in model.opset_imports.items() if domain in _STANDARD)


def _external(model: ir.Model) -> Iterator[tuple[str, str]]:
    """Name and file of each tensor whose data lie in another file."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.name or "", os.fspath(value.const_value.location)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                yield attribute.name, os.fspath(attribute.value.location)


@contextmanager
def _own_name() -> Iterator[None]:
    """What reads a file speaks as from_onnx."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("from_onnx: ", "compress_onnx: ")) from error


def _put(root: nn.Module, name: str, layer: nn.Module) -> None:
    around, _, own = name.rpartition(".")
    for part in filter(None, around.split(".")):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(own, layer)


def _hold_place(graph: ir.Graph, name: str, product: Product) -> None:
    """Puts a node that only says a layer's name in the place of a product."""
    last = product.nodes[-1]
    old = last.outputs[0]
    x, dtype = product.x, product.weight.const_value.dtype
    if x.type is None:
        x.type = ir.TensorType(dtype)
    y = ir.Value(name=old.name, shape=old.shape, type=old.type or ir.TensorType(dtype))
    graph.insert_before(last, ir.Node(DOMAIN, PLACEHOLDER, [x], [ir.AttrString("layer", name)], outputs=[y]))
    for i, one in enumerate(graph.outputs):
        if one is old:
            graph.outputs[i] = y
    ir.convenience.replace_all_uses_with(old, y)
    for node in reversed(product.nodes):
        rest = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        for value in rest:
            if value is not x:
                _remove_unused(graph, value)


def _remove_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Takes a constant away that nothing reads any more."""
    if list(value.uses()) or value.is_graph_output():
        return
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and producer.graph is graph:
        graph.remove(producer, safe=True)
    elif value.name in graph.initializers:
        if value.is_graph_input():
            graph.inputs.remove(value)
        del graph.initializers[value.name]


class _Watched(nn.Module):
    """The products of a graph; called, it runs the graph in ONNX Runtime, and each layer on what it meets there."""

    def __init__(self, model: ir.Model, products: Mapping[str, Product]) -> None:
        super().__init__()
        self._about = [model, products]  # (no module)
        self._session: Any = None

    def forward(self, *args: Any, **given: Any) -> dict[str, Tensor]:
        """Takes the inputs of the file, tensors, by position or by name; gives its outputs."""
        model, products = self._about
        if self._session is None:
            self._session = _session(model, [product.x for product in products.values()])
        inputs = [value.name for value in self._session.get_inputs()]
        feeds = {**dict(zip(inputs, args, strict=False)), **given}
        if {*feeds} != {*inputs}:
            raise ValueError(
                f"compress_onnx: the inputs of the file are {', '.join(inputs)}, given are {', '.join(feeds)}"
            )
        arrays = {name: x.detach().cpu().numpy() for name, x in feeds.items()}
        names = [value.name for value in self._session.get_outputs()]
        found = dict(zip(names, self._session.run(names, arrays), strict=True))
        tensors = {name: torch.from_numpy(x) for name, x in {**arrays, **found}.items() if hasattr(x, "shape")}
        for name, product in products.items():
            self.get_submodule(name)(tensors[product.x.name])
        return {value.name: tensors[value.name] for value in model.graph.outputs}


def batches_of(given: Iterable[Any]) -> Iterable[Any]:
    """Batches of tensors, where some are of arrays. What is none is left to :func:`pycompress.calibrate`."""
    if isinstance(given, Tensor | Mapping | str):
        return given

    def tensors(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return {name: _tensor(x) for name, x in batch.items()}
        return [_tensor(x) for x in batch] if isinstance(batch, list | tuple) else batch

    return map(tensors, given)


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x))


def _session(model: ir.Model, shown: Iterable[ir.Value]) -> Any:
    """A session of a graph that shows some of its values too."""
    outputs = [*model.graph.outputs]
    more = {value for value in shown if not value.is_graph_input() and not value.is_graph_output()}
    with TemporaryDirectory(prefix="compress-onnx-") as folder:
        path = os.path.join(folder, "model.onnx")
        model.graph.outputs.extend(sorted(more, key=lambda value: value.name or ""))
        try:
            ir.save(model, path, external_data="weights")
        finally:
            model.graph.outputs[:] = outputs
        return session(path, threads=torch.get_num_threads())
