"""An ONNX file as an ``nn.Module``: a ``torch.fx.GraphModule`` of real layers and of torch calls.

The nodes are walked in their order. What has constant weights becomes a layer (:mod:`.layers`, :mod:`.recurrent`), arithmetic on
shapes stays arithmetic on Python's integers (:mod:`.shape_arithmetic`), what is made of constants is computed at once, and the
rest becomes calls of the functions in :mod:`pycompress.onnx.operators`. What does none of these is an error that names the node.
"""

from __future__ import annotations

import inspect
import keyword
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from typing import Any, Literal, get_args, get_origin, get_type_hints

import onnx
import torch
from onnx import AttributeProto
from torch import Tensor, fx, nn

from pycompress.onnx.importing import patterns, shape_arithmetic
from pycompress.onnx.importing.layers import LAYERS
from pycompress.onnx.importing.names import Names
from pycompress.onnx.importing.ranks import rank_of
from pycompress.onnx.importing.reading import DTYPES, NIBBLES, File, read, tensor
from pycompress.onnx.importing.recurrent import OPERATORS as RECURRENT
from pycompress.onnx.importing.recurrent import recurrent
from pycompress.onnx.importing.values import Constant, Size, Value
from pycompress.onnx.operators import OPERATORS, PYTHON, Row, tensor_of

CLAIMED = (*sorted({*OPERATORS, *RECURRENT, "Constant", "Dropout", "Identity"}),)
_LONG = 1024  # numbers of a constant that still stand in the code, where numbers are wanted
_FOLDED_BYTES = 1 << 16  # more than its operands take, that a constant which is computed may take
_RESERVED = {"self", "torch", "device", "inf", "nan"}  # names that the code of a graph uses itself
_Function = Callable[..., Any]


@dataclass
class Node:
    """A node of the file while it is imported.

    Attributes:
        operator, name, attributes: as the file has them, attributes as Python's values.
        inputs: None where one is left out; without those left out at the end.
        input_names, outputs: the names of the values.
        results: of the outputs in their order, once it is taken.
    """

    operator: str
    name: str
    proto: onnx.NodeProto
    attributes: dict[str, Any]
    inputs: list[Value | None]
    input_names: list[str]
    outputs: list[str]
    results: tuple[Value | None, ...] | None = field(default=None)

    def give(self, *results: Value | None) -> None:
        self.results = results


def import_file(path: str | os.PathLike[str]) -> fx.GraphModule:
    """See :func:`pycompress.from_onnx`."""
    return Importer(read(path)).model()


class Importer:
    """One file that is imported.

    Attributes:
        users: how often each value of the file is used.
        layers: the layers that were made, by name.
    """

    def __init__(self, file: File) -> None:
        self._file, self._proto = file, file.graph
        self._graph = fx.Graph()
        self._values: dict[str, Value] = {}
        self._stored = {one.name: one for one in self._proto.initializer}
        self._made_later = {name for node in self._proto.node for name in node.output if name}
        self._names = Names(self._proto.node)
        self._buffers: dict[str, Tensor] = {}
        self._parameters: dict[bytes, nn.Parameter] = {}
        self._sizes: dict[str, list[int | None]] = {}
        self._uses: Counter[fx.Node] = Counter()
        self.layers: dict[str, nn.Module] = {}
        self.users = Counter(name for node in self._proto.node for name in node.input)
        self.users.update(one.name for one in self._proto.output)

    def model(self) -> fx.GraphModule:
        """The whole model, in evaluation mode."""
        if self._proto.sparse_initializer:
            raise NotImplementedError("from_onnx: the file has sparse tensors, which are not imported")
        self._take_inputs()
        for proto in self._proto.node:
            self._take(proto)
        if not self._proto.output:
            raise ValueError("from_onnx: the graph has no outputs")
        given = [self.argument(self._value(one.name, "the output")) for one in self._proto.output]
        self._graph.output(given[0] if len(given) == 1 else tuple(given))
        patterns.simplify(
            self._graph, self._buffers, lambda node, layer: self._called(layer, node.meta["scope"], *node.args)
        )
        _remove_dead(self._graph)
        patterns.put_before_reshapes(self._graph, self.layers)
        return fx.GraphModule(self._root(), self._graph, class_name="ImportedModel").eval()

    def _root(self) -> nn.Module:
        """What the graph reads: layers below the names around them, and the buffers."""
        root = nn.Module()
        for name, layer in self.layers.items():
            around, _, own = name.rpartition(".")
            parent = root
            for part in filter(None, around.split(".")):
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(own, layer)
        for name, value in self._buffers.items():
            root.register_buffer(name, value)
        return root

    # --- what is asked while a node is taken ------------------------------------------------------------------------------

    def argument(self, value: Any) -> Any:
        """A value as an argument of a call that wants a tensor."""
        if isinstance(value, Size):
            more = () if value.dtype == torch.int64 else (value.dtype,)
            return self.call(tensor_of, value.value, *more, rank=0 if value.scalar else 1)
        if not isinstance(value, Constant):
            return value
        if value.node is None:
            name = self._names.unique(re.sub(r"\W", "_", value.name or "constant"))
            self._buffers[name] = value.tensor
            value.node = self._graph.get_attr(name)
            value.node.meta["rank"] = value.tensor.dim()
        return value.node

    def call(self, function: _Function, *args: Any, rank: int | None = None, **kwargs: Any) -> fx.Node:
        """Adds a call of a function."""
        node = self._graph.call_function(function, args, kwargs)
        if (function.__module__ or "").startswith("pycompress."):
            node.meta["is_wrapped"] = True  # who traces the code does not look into it
        node.meta["rank"], node.meta["scope"] = rank, self._at
        return node

    def call_layer(self, node: Node, layer: nn.Module, weight: Value | None, *args: Any, rank: int | None) -> fx.Node:
        """Adds a call of a layer, which gets its name here."""
        source = weight.name if isinstance(weight, Constant) else ""
        users = max(
            (self.users[name] for name, one in zip(node.input_names, node.inputs, strict=False) if one is weight),
            default=0,
        )
        users = max(users, self.users[source])
        name = self._names.layer(node.proto, source, users, type(layer).__name__.lower())
        self.layers[name] = layer
        called = self._graph.call_module(name, args)
        called.meta["rank"], called.meta["scope"] = rank, self._at
        return called

    def _called(self, layer: nn.Module, at: onnx.NodeProto, *args: Any) -> fx.Node:
        """A layer that stands for several nodes, where the last of them is."""
        name = self._names.layer(at, "", 0, type(layer).__name__.lower())
        self.layers[name] = layer
        return self._graph.call_module(name, args)

    def parameter(self, weight: Tensor) -> nn.Parameter:
        """A weight. Two that are equal to the bit are one: an exporter writes a tied one twice, turned."""
        whole = weight.detach().contiguous()
        if whole.data_ptr() == weight.data_ptr() and weight.is_contiguous():
            whole = weight
        flat = whole.flatten()
        if bool((flat == flat[0]).all()):  # all zeros, say: that two are alike means nothing
            return nn.Parameter(whole)
        key = blake2b(flat.view(torch.uint8).numpy().data).digest() + str((weight.shape, weight.dtype)).encode()
        return self._parameters.setdefault(key, nn.Parameter(whole))

    def layer_of(self, value: Any) -> nn.Module | None:
        """The layer whose result a value is."""
        called = isinstance(value, fx.Node) and value.op == "call_module"
        return self.layers[str(value.target)] if called else None

    def rank(self, value: Any) -> int | None:
        """How many dimensions a value has, where that is known."""
        if isinstance(value, Constant):
            return value.tensor.dim()
        if isinstance(value, Size):
            return 0 if value.scalar else 1
        found: int | None = value.meta.get("rank") if isinstance(value, fx.Node) else None
        return found

    def uses(self, value: fx.Node) -> int:
        """How many nodes of the file, and outputs, take a value, also those that are still to come."""
        return self._uses[value]

    def known_size(self, name: str, axis: int) -> int | None:
        """A size of an input of the file, where it says one."""
        sizes = self._sizes.get(name, [])
        return sizes[axis] if axis < len(sizes) else None

    # --- nodes ------------------------------------------------------------------------------------------------------------

    def _take_inputs(self) -> None:
        taken: set[str] = set()
        for one in self._proto.input:
            if one.name in self._stored:  # a default: files before IR version 4 list their weights so
                continue
            if not one.type.HasField("tensor_type") or one.type.tensor_type.elem_type not in DTYPES:
                raise NotImplementedError(f"from_onnx: the input {one.name!r} is no tensor of numbers")
            name = re.sub(r"\W", "_", one.name, flags=re.ASCII) or "x"
            name = f"x_{name}" if name[0].isdigit() or keyword.iskeyword(name) or name in _RESERVED else name
            while name in taken:
                name += "_"
            taken.add(name)
            node = self._graph.placeholder(name)
            shape = one.type.tensor_type.shape if one.type.tensor_type.HasField("shape") else None
            node.meta["rank"] = None if shape is None else len(shape.dim)
            self._sizes[one.name] = [size.dim_value or None for size in shape.dim] if shape else []
            self._give(one.name, node)
            self._uses[node] = self.users[one.name]

    def _give(self, name: str, value: Value) -> None:
        if name in self._values or name in self._stored:
            raise ValueError(f"from_onnx: {name!r} is made twice")
        self._values[name] = value

    def _value(self, name: str, what: str) -> Value:
        if name not in self._values and name in self._stored:
            proto = self._stored[name]
            self._values[name] = Constant(tensor(proto, self._file.folder), name, proto.data_type in NIBBLES)
        if name not in self._values:
            later = "made only behind it: the graph has a cycle or is not sorted"
            raise ValueError(
                f"from_onnx: {what} takes {name!r}, which is {later if name in self._made_later else 'made by nothing'}"
            )
        return self._values[name]

    def _take(self, proto: onnx.NodeProto) -> None:
        title = f"the node {proto.name or next(iter(proto.output), '?')} ({proto.op_type}, opset {self._file.opset})"
        self._at = proto
        try:
            self._check(proto)
            names = [*proto.input]
            while names and not names[-1]:
                names.pop()
            inputs = [self._value(name, title) if name else None for name in names]
            attributes = {one.name: self._attribute(one) for one in proto.attribute}
            node = Node(proto.op_type, proto.name, proto, attributes, inputs, names, [*proto.output])
            self._import(node)
            assert node.results is not None
            for i, name in enumerate(node.outputs):
                if not name:
                    continue
                given = node.results[i] if i < len(node.results) else None
                if given is None:
                    raise NotImplementedError(f"its output {i} ({name}) is not imported")
                self._give(name, given)
                if isinstance(given, fx.Node):  # what a node only passes on, it does not use
                    self._uses[given] += self.users[name] - any(given is one for one in inputs)
        except NotImplementedError as error:
            raise NotImplementedError(f"from_onnx: {title} is not imported: {_without_prefix(error)}") from error
        except Exception as error:  # whatever a file makes of our functions
            raise ValueError(f"from_onnx: {title}: {_without_prefix(error)}") from error

    def _check(self, proto: onnx.NodeProto) -> None:
        """That the operator is one, with these attributes and so many inputs; the standard's own table says so."""
        if proto.domain not in ("", "ai.onnx"):
            raise NotImplementedError(f"it is of the domain {proto.domain!r}, expected an operator of ONNX itself")
        opset = self._file.opset
        try:
            schema = onnx.defs.get_schema(proto.op_type, opset)
        except onnx.defs.SchemaError:
            raise ValueError(
                f"ONNX has no operator {proto.op_type} in opset {opset}: the file is invalid, as {self._file.maker} wrote it"
            ) from None
        if schema.deprecated:
            raise ValueError(f"{proto.op_type} is deprecated in opset {opset}")
        for one in proto.attribute:
            known = schema.attributes.get(one.name)
            if known is None:
                raise ValueError(f"{proto.op_type} has no attribute {one.name!r}")
            kind: Any = known.type
            if kind.name != AttributeProto.AttributeType.Name(one.type):
                raise ValueError(f"the attribute {one.name!r} is of another type than {proto.op_type} has")
        if not schema.min_input <= len(proto.input) <= schema.max_input:
            raise ValueError(f"it has {len(proto.input)} inputs, expected {schema.min_input} to {schema.max_input}")

    def _attribute(self, proto: onnx.AttributeProto) -> Any:
        """As Python has it. Raises NotImplementedError for a subgraph."""
        match proto.type:
            case AttributeProto.FLOAT:
                return proto.f
            case AttributeProto.INT:
                return proto.i
            case AttributeProto.STRING:
                return proto.s.decode()
            case AttributeProto.FLOATS:
                return list(proto.floats)
            case AttributeProto.INTS:
                return list(proto.ints)
            case AttributeProto.STRINGS:
                return [one.decode() for one in proto.strings]
            case AttributeProto.TENSOR if proto.t.data_type not in NIBBLES:
                return tensor(proto.t, self._file.folder)
        raise NotImplementedError(
            f"its attribute {proto.name!r} is a subgraph or something else that is not known here"
        )

    def _import(self, node: Node) -> None:
        if node.operator == "Constant":
            node.give(_constant(node))
        elif node.operator in ("Identity", "Dropout"):
            node.give(_passed(node))
        elif node.operator in RECURRENT:
            recurrent(self, node)
        elif node.operator not in OPERATORS:
            raise NotImplementedError("the operator is not known here")
        elif all(isinstance(one, Constant) for one in node.inputs) or not (
            shape_arithmetic.taken(self, node) or LAYERS.get(node.operator, _never)(self, node)
        ):
            self._from_table(node)

    # --- nodes by the table -----------------------------------------------------------------------------------------------

    def _from_table(self, node: Node) -> None:
        if node.operator != "DequantizeLinear" and any(
            isinstance(one, Constant) and one.nibbles for one in node.inputs
        ):
            raise NotImplementedError("it takes 4-bit integers, expected only of DequantizeLinear")
        function = _function(node.operator, self._file.opset)
        signature = _signature(function)
        args, kwargs = self._bound(node, function, signature)
        if (found := self._folded(function, args, kwargs)) is not None:
            node.give(*found)
            return
        literals = function in PYTHON.values() and any(not isinstance(one, Constant) for one in node.inputs)
        positional = [self._written(one, note, literals) for one, note in args]
        named = {name: self._written(one, note, False) for name, (one, note) in kwargs.items()}
        several = str(signature.return_annotation).startswith("tuple") if signature else False
        rank = self._rank(node)
        called = self.call(function, *positional, rank=None if several else rank, **named)
        if several:
            node.give(*(self.call(operator.getitem, called, i, rank=rank) for i in range(len(node.outputs))))
        else:
            node.give(called)

    def _bound(
        self, node: Node, function: _Function, signature: inspect.Signature | None
    ) -> tuple[list[tuple[Any, str]], dict[str, tuple[Any, str]]]:
        """(positional arguments, named ones), each with what the signature notes of it."""
        if signature is None:  # torch's own, which take tensors and nothing else
            if node.attributes:
                raise NotImplementedError(f"its attribute {next(iter(node.attributes))!r} is not known here")
            return [(one, "Tensor") for one in node.inputs], {}
        parameters, hints = signature.parameters, get_type_hints(function)
        kinds = inspect.Parameter
        places = [
            one for one in parameters.values() if one.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.POSITIONAL_ONLY)
        ]
        rest = next((one for one in parameters.values() if one.kind is kinds.VAR_POSITIONAL), None)
        if len(node.inputs) > len(places) and rest is None:
            raise NotImplementedError(f"its input {len(places)} ({node.input_names[len(places)]}) is not known here")
        args = [
            (one, str((places[i] if i < len(places) else rest).annotation))  # type: ignore[union-attr]
            for i, one in enumerate(node.inputs)
        ]
        kwargs = {}
        for name, value in node.attributes.items():
            if name not in parameters or name in [one.name for one in places[: len(node.inputs)]]:
                raise NotImplementedError(f"its attribute {name!r} is not known here")
            note = str(parameters[name].annotation)
            allowed = get_args(hints[name]) if get_origin(hints[name]) is Literal else (value,)
            if value not in allowed:
                raise NotImplementedError(
                    f"its attribute {name!r} is {value!r}, expected one of: {', '.join(map(repr, allowed))}"
                )
            kwargs[name] = (self._dtype(value) if "torch.dtype" in note else value, note)
        if "num_outputs" in parameters and "num_outputs" not in kwargs:
            kwargs["num_outputs"] = (len(node.outputs), "int")
        signature.bind(*(one for one, _ in args), **kwargs)
        return args, kwargs

    def _dtype(self, number: int) -> torch.dtype:
        if number not in DTYPES:
            raise NotImplementedError(f"the type {number} of ONNX is not known here")
        return DTYPES[number]

    def _written(self, value: Any, note: str, literals: bool) -> Any:
        """An argument as it stands in the code: numbers where the signature takes them and they are known, else a tensor."""
        if isinstance(value, Size) and "Sizes" in note:
            return value.value
        if isinstance(value, Constant):
            few = value.tensor.dim() <= 1 and value.tensor.numel() <= _LONG and value.tensor.dtype != torch.bool
            if ("Sizes" in note and few) or ((literals or "float" in note) and value.tensor.dim() == 0 and few):
                return value.tensor.tolist()
        if isinstance(value, Tensor):  # an attribute
            return self.argument(Constant(value, ""))
        return self.argument(value)

    def _folded(
        self, function: _Function, args: Sequence[tuple[Any, str]], kwargs: dict[str, tuple[Any, str]]
    ) -> list[Value] | None:
        """What is made of constants alone, if it takes not much more than they do; shapes are tried without memory first."""
        if not all(isinstance(one, Constant) or one is None for one, _ in args):
            return None

        def result(device: str) -> Any:
            def plain(one: Any, note: str) -> Any:
                value = one.tensor if isinstance(one, Constant) else one
                if isinstance(value, Tensor) and "Sizes" in note and value.dim() <= 1 and value.numel() <= _LONG:
                    return value.tolist()
                return value.to(device) if isinstance(value, Tensor) and "Sizes" not in note else value

            with torch.device(device), torch.no_grad():
                return function(*(plain(*one) for one in args), **{name: plain(*one) for name, one in kwargs.items()})

        try:
            tried = result("meta")
        except Exception:  # it depends on numbers, or is not possible at all: then the run says so
            return None
        several = isinstance(tried, tuple)
        n_bytes = sum(one.numel() * one.element_size() for one in (tried if several else [tried]))
        given = sum(one.tensor.numel() * one.tensor.element_size() for one, _ in args if isinstance(one, Constant))
        if n_bytes > 8 * given + _FOLDED_BYTES:  # (8 bytes may come of a bit)
            return None
        made = result("cpu")
        first = next((one.name for one, _ in args if isinstance(one, Constant)), "")
        return [Constant(one, first) for one in (made if several else [made])]

    def _rank(self, node: Node) -> int | None:
        axes: Sequence[Any] | None = node.attributes.get("axes")
        sizes: Sequence[Any] | None = None
        second = node.inputs[1] if len(node.inputs) > 1 else None
        if axes is None and isinstance(second, Constant):
            axes = sizes = [None] * second.tensor.numel() if second.tensor.numel() <= _LONG else None
        elif axes is None and isinstance(second, Size):
            sizes = second.parts
        ranks = [self.rank(one) for one in node.inputs]
        keep = bool(node.attributes.get("keepdims", 1))
        counts = [None if one is None else len(one) for one in (axes, sizes)]
        return rank_of(node.operator, ranks, keep, *counts)


def _never(*_: Any) -> bool:
    return False


def _passed(node: Node) -> Value | None:
    """What Identity gives, and Dropout in evaluation."""
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is not None and not (isinstance(training, Constant) and not training.tensor.any()):
        raise NotImplementedError("it drops numbers, as in training")
    if not node.attributes.get("is_test", 1):
        raise NotImplementedError("its attribute 'is_test' is 0, expected 1")
    return node.inputs[0]


def _constant(node: Node) -> Constant:
    """Of the attributes that a Constant may have, those of numbers."""
    items: list[tuple[str, Any]] = [*node.attributes.items()] or [("", None)]
    (name, value), *others = items
    dtypes = {
        "value_float": torch.float32,
        "value_floats": torch.float32,
        "value_int": torch.int64,
        "value_ints": torch.int64,
    }
    if others or (name != "value" and name not in dtypes):
        raise NotImplementedError(f"it has {list(node.attributes)}, expected one value of numbers")
    held: Tensor = value if name == "value" else torch.tensor(value, dtype=dtypes[name], device="cpu")
    return Constant(held, node.outputs[0])


def _function(name: str, opset: int) -> _Function:
    row: Row = OPERATORS[name]
    if callable(row):
        return row
    fitting = [since for since in row if since <= opset]
    if not fitting:
        raise NotImplementedError(f"what it means before opset {min(row)} is not known here")
    return row[max(fitting)]


@cache
def _signature(function: _Function) -> inspect.Signature | None:
    """None for functions of torch and of Python."""
    return inspect.signature(function) if (function.__module__ or "").startswith("pycompress.") else None


def _without_prefix(error: Exception) -> str:
    return str(error).removeprefix("from_onnx: ") or type(error).__name__


def _remove_dead(graph: fx.Graph) -> None:
    """What nothing takes; nothing in the graph has an effect but its result."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
