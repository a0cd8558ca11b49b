"""A model as an ONNX graph in which each compressed layer is one node that only says its name: what torch.onnx makes of it."""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
import torch.export
import torch.onnx
from torch import Tensor, nn

from pycompress.calls import Inputs, evaluating, only_argument
from pycompress.flat_call import Flat, FlatCall, Refused, at_least_two, output_names
from pycompress.nn.int8_recurrent import Int8Recurrent
from pycompress.nn.layer import CompressedLayer
from pycompress.ops.checks import FLOATS
from pycompress.passes import whole
from pycompress.state import unwatched

DOMAIN, PLACEHOLDER = "pycompress", "Layer"
MODEL = "model"  # the attribute of a Flat that is the model
_SCOPES = "pkg.torch.onnx.name_scopes"


def traced(
    model: nn.Module, inputs: Inputs, call: FlatCall, sizes: Mapping[str, Mapping[int, str]],
    layers: Mapping[str, CompressedLayer], opset: int,
) -> tuple[ir.Model, dict[str, str]]:  # fmt: skip
    """The graph, whose inputs are the call's tensors; and its outputs: {name: where the model returns it}.

    Blocks and other parts that run as one op are traced as the modules that they were, in evaluation mode; the model is left as it
    was. What torch's exporter calls a value, or a constant, keeps that name; nodes are named after the module that they are of.

    Args:
        sizes: the names of dimensions that may have other sizes, of each tensor.
        layers: those that become placeholders.
    Raises:
        ValueError: a layer is called with what it does not take. RuntimeError: torch could not trace or convert the model.
    """
    if not hasattr(torch.onnx, "ops"):
        raise RuntimeError(
            f"export: torch is {torch.__version__}, expected a later one, which has torch.onnx.ops.symbolic"
        )
    dynamic = {name: dict.fromkeys(own, torch.export.Dim.DYNAMIC) for name, own in sizes.items()}
    tensors = tuple(at_least_two(x, sizes[name]) for name, x in call.tensors.items())
    with whole.without(model), evaluating(model, inputs), unwatched(), _placeholders(layers):
        paths: list[str] = []
        flat = Flat(model, call, paths).eval()
        try:
            program = torch.export.export(
                flat, tensors, dynamic_shapes={"tensors": tuple(dynamic.values())}, strict=False
            )
        except Refused:
            raise
        except Exception as error:
            raise RuntimeError(f"export: torch.export could not trace the model: {_head(error)}") from error
        _check_operators(program)
        outputs = dict(zip(output_names(paths, call.tensors), paths, strict=True))
        try:
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, opset_version=opset, input_names=[*call.tensors], output_names=[*outputs]
            )  # fmt: skip
        except Exception as error:
            raise RuntimeError(f"export: torch.onnx could not convert the model: {_head(error)}") from error
    assert made is not None
    _name_sizes(made.model, sizes)
    _rename(made.model)
    return made.model, outputs


@contextmanager
def _placeholders(layers: Mapping[str, CompressedLayer]) -> Iterator[None]:
    """In the block what each layer computes is a node that stands for it, in the instance, so that hooks see it as they see the
    layer."""
    before: list[tuple[CompressedLayer, str, Any]] = []
    try:
        for name, layer in layers.items():
            own = (
                _recurrent_placeholders(name, layer)
                if isinstance(layer, Int8Recurrent)
                else _placeholders_of(name, layer)
            )
            for method, instead in own.items():
                before.append((layer, method, layer.__dict__.get(method)))
                layer.__dict__[method] = instead
        yield
    finally:
        for layer, method, earlier in before:
            layer.__dict__.pop(method)
            if earlier is not None:
                layer.__dict__[method] = earlier


def _placeholders_of(name: str, layer: CompressedLayer) -> dict[str, Callable[..., Any]]:
    """By the name of the method that they stand in for."""
    kind = layer.kind

    def forward(*args: Tensor, **keywords: Tensor) -> Tensor:
        x = only_argument(args, keywords)
        if not kind.tokens and x.dtype not in FLOATS:
            raise Refused(f"export: {name} is called with {x.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        # (also where sizes are free: what a layer fixes, no dimension of the inputs may leave open)
        item = kind.sizes(layer.n, layer.k, layer.geometry)[0][1:]
        own = x.shape[x.dim() - kind.dims :] if x.dim() >= kind.dims else ()
        if len(own) != len(item[: kind.dims]) or any(
            isinstance(b, int) and a != b for a, b in zip(own, item, strict=False)
        ):
            raise Refused(f"export: {name} is called with {[*x.shape]}, expected {['...', *item]}")
        shape = kind.result_shape(x.shape, layer.n, layer.k, layer.geometry)
        dtype = layer.dtype if kind.tokens else x.dtype
        (y,) = _symbol(name, [x], [(shape, dtype)])
        return y

    return {"forward": forward}


def _recurrent_placeholders(name: str, layer: Int8Recurrent) -> dict[str, Callable[..., Any]]:
    """What is around the op, which is one node, is traced."""

    def run(x: Tensor, states: list[Tensor], _: None) -> list[Tensor]:
        y = (*x.shape[:2], layer.geometry.directions * layer.geometry.hidden_size)
        return [*_symbol(name, [x, *states], [(y, x.dtype), *((one.shape, x.dtype) for one in states)])]

    def packed(*_: Any) -> None:
        raise Refused(
            f"export: {name} is called with a PackedSequence, expected a tensor: ONNX has no packed sequences"
        )

    return {"run": run, "_packed": packed}


def _symbol(
    name: str, inputs: Sequence[Tensor], outputs: Sequence[tuple[Sequence[Any], torch.dtype]]
) -> Sequence[Tensor]:
    made: Sequence[Tensor] = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{PLACEHOLDER}", inputs, {"layer": name}, dtypes=[dtype for _, dtype in outputs],
        shapes=[shape for shape, _ in outputs], version=1,
    )  # fmt: skip
    return made


def _check_operators(program: Any) -> None:
    """Raises ValueError where our kernels are called by another than the layers."""
    for node in program.graph.nodes:
        if getattr(node.target, "namespace", "") == DOMAIN:
            stack = [*node.meta.get("nn_module_stack", {}).values()]
            where = stack[-1][0].removeprefix(MODEL).removeprefix(".") if stack else ""
            raise ValueError(
                f"export: {where or 'the model'} computes with {node.target}, the weight of a compressed layer as numbers, which "
                "ONNX has no operator for: expected layers that are called, or a plan that leaves this one dense"
            )


def _head(error: Exception) -> str:
    """The first line that says something, and the next ones of the paragraph."""
    return str(error).strip().partition("\n\n")[0][:1000] or type(error).__name__


def _name_sizes(model: ir.Model, sizes: Mapping[str, Mapping[int, str]]) -> None:
    """Calls free sizes as the caller does, where torch made symbols of them."""
    words: dict[str, str] = {}
    for value in model.graph.inputs:
        for dimension, word in sizes[value.name].items():
            words.setdefault(str(value.shape[dimension].value), word)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            named = [
                d if isinstance(d, int) else re.sub(r"\w+", lambda symbol: words.get(symbol[0], symbol[0]), str(d.value))
                for d in value.shape
            ]  # fmt: skip
            value.shape = ir.Shape(named)


def _rename(model: ir.Model) -> None:
    """Constants get the names that the model has for them, nodes that of their module; what torch notes of them (lines of source
    files) goes."""
    taken = {value.name for node in ir.traversal.RecursiveGraphIterator(model.graph) for value in node.outputs}
    taken |= {value.name for value in model.graph.inputs} | {*model.graph.initializers}
    for name, value in [*model.graph.initializers.items()]:
        short = name.removeprefix(f"{MODEL}.")
        if short not in taken:
            value.name = short
            value.const_value.name = short
    for number, node in enumerate(ir.traversal.RecursiveGraphIterator(model.graph)):
        scopes = [
            one for one in literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1] if one.startswith(f"{MODEL}.")
        ]
        scope = f"{scopes[-1].removeprefix(f'{MODEL}.')}/" if scopes else ""
        node.name = f"{scope}{node.op_type}_{number}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
