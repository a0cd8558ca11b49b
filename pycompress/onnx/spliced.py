"""The lowerings of layers, put into a graph in the places of the nodes that stand for them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto

from pycompress.nn.layer import CompressedLayer
from pycompress.onnx.graph import Graph, Lowering
from pycompress.onnx.traced import DOMAIN, PLACEHOLDER

KEPT = 2**12  # bytes of the largest constant that is held; larger ones are made again when they are written
COMMON = 8  # bytes of the largest constant that layers share by its name

Find = Callable[[CompressedLayer], Lowering | None]


class Lowered:
    """A layer's lowering without its large constants.

    Attributes:
        graph: with tensors without data in the place of large ones.
        y: the name of the result.
        digests: of the constants, by name.
        alone: the names of int8 constants that no other node may share.
        flat: whether x has to be the items of the layer's kind; else there may be more leading dimensions.
        any_rank: whether there may be none, too.
    """

    def __init__(self, graph: Graph, y: str, flat: bool) -> None:
        self.graph, self.y, self.flat = graph, y, flat
        self.any_rank = all(node.domain for node in graph.nodes)
        self.digests: dict[str, bytes] = {}
        self.n_bytes: dict[str, int] = {}
        ours = {name for node in graph.nodes if node.domain for name in node.input}
        self.alone = {
            one.name for one in graph.initializers if one.data_type == TensorProto.INT8 and one.name not in ours
        }
        for tensor in graph.initializers:
            self.digests[tensor.name] = hashlib.sha256(tensor.raw_data).digest()
            self.n_bytes[tensor.name] = len(tensor.raw_data)
            if len(tensor.raw_data) > KEPT:
                tensor.ClearField("raw_data")

    def int8_weights(self) -> set[bytes]:
        """The digests of those that standard operators read. (Zero points are equal in all layers.)"""
        return {self.digests[name] for name in self.alone if not name.endswith("zero_point")}


class Lowerings:
    """The lowerings of the layers of a model; at any time the constants of one layer are in memory."""

    def __init__(self, find: Find) -> None:
        self.find = find
        self._last: tuple[CompressedLayer, Graph] | None = None

    def lowered(self, name: str, layer: CompressedLayer, *, shared: bool = False) -> Lowered:
        """A layer's, with a weight that several nodes multiply with where it is ``shared``.

        Raises TypeError where there is no lowering for the layer, ValueError where its weights are too large.
        """
        lowering = self.find(layer)
        if lowering is None:
            raise TypeError(
                f"export: {name} is {type(layer).__name__}, expected a layer whose kind and weight have a lowering in "
                "onnx.LOWERINGS"
            )
        graph = Graph(unsigned=shared)
        try:
            y = lowering(graph, "x", layer)
        except ValueError as error:
            raise ValueError(f"export: {name}: {error}") from error
        return Lowered(graph, y, hasattr(layer, "lower"))

    def tensor(self, layer: CompressedLayer, shared: bool, name: str) -> ir.TensorProtocol:
        """One of its constants."""
        if self._last is None or self._last[0] is not layer:
            lowering, graph = self.find(layer), Graph(unsigned=shared)
            assert lowering is not None
            self._last = None  # (before the next one is made)
            lowering(graph, "x", layer)
            self._last = layer, graph
        (found,) = (tensor for tensor in self._last[1].initializers if tensor.name == name)
        return ir.serde.TensorProtoTensor(found)


@dataclass(frozen=True)
class Place:
    """Where a layer is in the graph: the names of its x, of what it takes beside it, of its y, and of what its lowering shows."""

    x: str
    y: str
    taken: dict[str, str]
    shown: dict[str, str]


class Splice:
    """Puts layers into a graph, in the places of the nodes that stand for them."""

    def __init__(
        self, model: ir.Model, lowerings: Lowerings, lowered: Mapping[str, Lowered], *, keep_names: bool = False
    ) -> None:
        """``keep_names``: what a layer gives is called as what its placeholder gave."""
        self.keep_names = keep_names
        self.graph, self.lowerings, self.lowered = model.graph, lowerings, dict(lowered)
        self._stored: dict[Any, ir.Value] = {}
        every = ir.traversal.RecursiveGraphIterator(model.graph)
        self._taken = {value.name for node in every for value in (*node.inputs, *node.outputs) if value is not None}
        self._taken |= {*model.graph.initializers, *(value.name for value in model.graph.inputs)}
        self._placeholders: list[tuple[str, ir.Node]] = [
            (node.attributes["layer"].as_string(), node)
            for node in ir.traversal.RecursiveGraphIterator(model.graph)
            if (node.domain, node.op_type) == (DOMAIN, PLACEHOLDER)
        ]

    def run(self, layers: Mapping[str, CompressedLayer]) -> dict[str, list[Place]]:
        """Returns where each layer is, once for each of its calls; [] for one that is never called."""
        uses: Counter[bytes] = Counter()
        for name, _ in self._placeholders:
            uses.update(self.lowered[name].int8_weights())
        for name, layer in layers.items():
            if any(uses[digest] > 1 for digest in self.lowered[name].int8_weights()):
                self.lowered[name] = self.lowerings.lowered(name, layer, shared=True)
        places: dict[str, list[Place]] = {name: [] for name in layers}
        for name, node in self._placeholders:
            places[name].append(self._replace(node, name, layers[name], len(places[name])))
        return places

    def _replace(self, node: ir.Node, name: str, layer: CompressedLayer, call: int) -> Place:
        lowered = self.lowered[name]
        prefix = f"{name}." if name else ""
        within = f"{prefix}{f'call_{call}.' if call else ''}"
        new = _Nodes(within)
        x, back = self._entered(new, node.inputs[0], layer, lowered)
        taken = {
            one.name: _as_float(new, value) for one, value in zip(lowered.graph.taken, node.inputs[1:], strict=True)
        }
        constants = {
            tensor.name: self._constant(layer, prefix, tensor, lowered) for tensor in lowered.graph.initializers
        }
        values = {"": None, "x": x, **taken, **constants}
        for proto in lowered.graph.nodes:
            outputs = [ir.Value(name=self._free(within + one)) for one in proto.output]
            values.update(zip(proto.output, outputs, strict=True))
            inputs = [values[one] for one in proto.input]
            new.add(proto.op_type, inputs, outputs, map(ir.from_proto, proto.attribute), proto.domain)
        # y, and of each state that it took the last one: h_0, h_n
        given = [lowered.y, *(f"{one.removesuffix('_0')}_n" for one in taken)]
        graph, fresh = node.graph, []
        for old, inner in zip(node.outputs, (values[one] for one in given), strict=True):
            y = back(inner) if inner is values[lowered.y] else _in_dtype(new, inner, old)
            if y is x or y.producer() is None:  # (a value of its own, which may be the graph's output)
                y = new("Identity", y)
            y.shape, y.type = old.shape, old.type
            fresh.append(y)
        graph.insert_before(node, new.nodes)
        for old, y in zip(node.outputs, fresh, strict=True):
            for i, one in enumerate(graph.outputs):
                if one is old:  # (it is called as the graph's output, then)
                    graph.outputs[i], y.name = y, old.name
            if self.keep_names:
                y.name = old.name
            ir.convenience.replace_all_uses_with(old, y)
        graph.remove(node, safe=True)
        return Place(
            x.name, values[lowered.y].name, {own: value.name for own, value in taken.items()},
            {one.name: values[one.name].name for one in lowered.graph.shown},
        )  # fmt: skip

    def _constant(self, layer: CompressedLayer, prefix: str, tensor: onnx.TensorProto, lowered: Lowered) -> ir.Value:
        """One constant of a layer as a value of the graph; an equal one, of tied weights or of all layers, serves again."""
        # (no two standard nodes share int8 ones: see Graph.unsigned)
        own = prefix + tensor.name if tensor.name in lowered.alone else ""
        key = tensor.data_type, tuple(tensor.dims), lowered.digests[tensor.name], own
        common = lowered.n_bytes[tensor.name] <= COMMON
        found = self._stored.get(key)
        if found is not None:
            return found
        name = f"{DOMAIN}.{tensor.name}" if common else prefix + tensor.name
        if name in self.graph.initializers:
            name = prefix + tensor.name
        name = self._free(name)
        if lowered.n_bytes[tensor.name] > KEPT:
            made: ir.TensorProtocol = ir.LazyTensor(
                partial(self.lowerings.tensor, layer, lowered.graph.unsigned, tensor.name), dtype=ir.DataType(tensor.data_type),
                shape=ir.Shape(tensor.dims), name=name,
            )  # fmt: skip
        else:
            made = ir.Tensor(ir.serde.TensorProtoTensor(tensor).numpy(), dtype=ir.DataType(tensor.data_type), name=name)
        value = ir.Value(name=name, type=ir.TensorType(made.dtype), shape=made.shape, const_value=made)
        self.graph.register_initializer(value)
        self._stored[key] = value
        return value

    def _free(self, name: str) -> str:
        """The name, or where something in the graph has it, a longer one."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def _entered(
        self, new: _Nodes, x: ir.Value, layer: CompressedLayer, lowered: Lowered
    ) -> tuple[ir.Value, Callable[[ir.Value], ir.Value]]:
        """x as the lowering takes it, and what makes of its y that of the layer: in the dtype of x, with its leading dimensions."""
        kind, outside = layer.kind, x
        back: list[Callable[[ir.Value], ir.Value]] = []
        if not kind.tokens and x.dtype != ir.DataType.FLOAT:
            back.append(partial(new, "Cast", to=int(x.dtype)))
            x = _as_float(new, x)
        elif kind.tokens and layer.dtype.itemsize != 4:
            back.append(partial(new, "Cast", to=int(ir.DataType[_NAMES[str(layer.dtype)]])))
        # (of an unknown rank all but the dimensions of an item lead)
        leading = -kind.dims if outside.shape is None else len(outside.shape) - kind.dims
        if lowered.any_rank:
            pass
        elif (lowered.flat or outside.shape is None) and leading != 1 and kind.dims < 2:
            sizes = new("Slice", new("Shape", outside), self._integers(0), self._integers(leading))
            last = layer.k if kind.tokens else layer.n
            sizes = new("Concat", sizes, self._integers(last), axis=0)
            back.insert(0, lambda y: new("Reshape", y, sizes))
            x = new("Reshape", x, self._integers(-1, *([] if kind.tokens else [layer.k])))
        elif leading == 0 and kind.dims:
            first = self._integers(0)
            back.insert(0, lambda y: new("Squeeze", y, first))
            x = new("Unsqueeze", x, first)

        def through(y: ir.Value) -> ir.Value:
            for one in back:
                y = one(y)
            return y

        return x, through

    def _integers(self, *numbers: int) -> ir.Value:
        """An int64 vector."""
        name = f"{DOMAIN}.integers_{'_'.join(map(str, numbers))}"
        if name not in self.graph.initializers:
            tensor = ir.tensor([*numbers], dtype=ir.DataType.INT64, name=name)
            self.graph.register_initializer(
                ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            )
        return self.graph.initializers[name]


_NAMES = {"torch.float16": "FLOAT16", "torch.bfloat16": "BFLOAT16", "torch.float64": "DOUBLE"}


class _Nodes:
    """Nodes in their order, whose names begin alike."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def add(self, operator: str, inputs: Any, outputs: Any, attributes: Any, domain: str = "") -> None:
        name = f"{self.prefix}{operator}_{len(self.nodes)}"
        self.nodes.append(ir.Node(domain, operator, inputs, [*attributes], outputs=outputs, name=name))

    def __call__(self, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """Adds a node between a layer and what is around it. Returns its result."""
        output = ir.Value(name=f"{self.prefix}around_{len(self.nodes)}")
        self.add(operator, inputs, [output], [ir.AttrInt64(key, value) for key, value in attributes.items()])
        return output


def _as_float(new: _Nodes, x: ir.Value) -> ir.Value:
    return x if x.dtype == ir.DataType.FLOAT else new("Cast", x, to=TensorProto.FLOAT)


def _in_dtype(new: _Nodes, y: ir.Value, like: ir.Value) -> ir.Value:
    return y if like.dtype == ir.DataType.FLOAT else new("Cast", y, to=int(like.dtype))
