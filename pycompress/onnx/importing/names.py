"""The names of layers in an imported model: those that they had where the file was made, as far as it says so."""

from __future__ import annotations

import ast
import keyword
import re
from collections import Counter
from collections.abc import Iterable

import onnx
from torch import fx

_SCOPES = "pkg.torch.onnx.name_scopes"  # the modules around a node, outermost first, then the node; torch.onnx.export writes it
# Last parts of a weight's name that say what it is of a layer, and names of operators (TensorFlow puts them into paths).
_PARTS = {
    "weight", "kernel", "w", "w_0", "weights", "embeddings", "embedding_lookup", "MatMul", "Conv2D", "Conv1D", "BiasAdd", "Cast",
    "ReadVariableOp", "Conv", "Gemm", "Tensordot", "transpose", "Transpose", "depthwise", "separable_conv2d", "convolution",
    "Gather", "GatherV2", "ExpandDims", "Reshape", "merged_input", "scale", "gamma",
}  # fmt: skip
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_AROUND = re.compile(r"^(StatefulPartitionedCall|PartitionedCall|functional\w*|sequential\w*|jit_\w+)$")
_GENERIC = re.compile(r"^(onnx::|val_|const_|constant|var_|_v_|initializer|auto_|[WRB]\d*__|\d+$|p2o\.)", re.IGNORECASE)


class Names:
    """Gives each layer a name of its own."""

    def __init__(self, nodes: Iterable[onnx.NodeProto]) -> None:
        self._taken: set[str] = set()
        self._inner: set[str] = set()  # what other names have in front of a dot
        self._counts: Counter[str] = Counter()
        self._around = {prefix for node in nodes for prefix in _prefixes(".".join(scopes_of(node)[-2:-1]))}

    def layer(self, node: onnx.NodeProto, weight: str, users: int, fallback: str) -> str:
        """By the module that the file says the node was in; by its weight, where that is this node's alone; by the node.

        A norm that was folded into a layer leaves its own module's name with the node: then the weight's comes first. A function
        that a module calls beside its children is named after that module and itself.
        """
        module, *_ = (*scopes_of(node)[-2:-1], "")
        if module in self._around:
            module = f"{module}.{fallback}"
        folded = node.op_type in _PRODUCTS and "norm" in (scopes_of(node) or [""])[-1]
        own = "" if users > 1 or _GENERIC.match(weight) else _path(weight.removesuffix(":0"))
        candidates = [own, module] if folded or not module else [module]
        path = (
            node.name.rpartition("/")[0] if node.name.startswith("/") else node.name
        )  # torch's older exporter: /module/Operator
        return self.unique(next(filter(None, [*candidates, own, _path(path)]), fallback))

    def unique(self, name: str) -> str:
        """As dotted Python names; numbered where one is taken."""
        parts = [_identifier(part) for part in re.split(r"[./:]+", name) if part]
        if parts and parts[0][0].isdigit() and len(parts) == 1:
            parts[0] = f"_{parts[0]}"
        base = ".".join(parts) or "layer"
        while not self._taken.isdisjoint(_prefixes(base)):  # a layer has no others inside
            base = "_".join(base.rsplit(".", 1))
        chosen = base
        while chosen in self._taken or chosen in self._inner:
            self._counts[base] += 1
            chosen = f"{base}_{self._counts[base]}"
        self._taken.add(chosen)
        self._inner.update(_prefixes(chosen))
        return chosen


def scopes_of(node: onnx.NodeProto) -> list[str]:
    """The dotted names of the modules around a node and its own, as torch.onnx.export saw them; [] where the file says none."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            try:
                found = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return []
            return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else []
    return []


def _path(name: str) -> str:
    """``functional/dense/MatMul/ReadVariableOp`` -> ``dense``; '' where nothing is left."""
    parts = [part for part in re.split(r"[./:]+", name) if part]
    while parts and (parts[-1] in _PARTS or (parts[-1][0].isupper() and parts[-1].rpartition("_")[0] in _PARTS)):
        parts.pop()
    while len(parts) > 1 and _AROUND.match(parts[0]):
        parts.pop(0)
    found = ".".join(parts)
    return re.sub(r"\.w_0$", "", found)


def _identifier(part: str) -> str:
    """Only what a module may be called; ``lambda`` and ``forward`` are taken."""
    plain = re.sub(r"\W", "_", part, flags=re.ASCII)
    return f"{plain}_" if keyword.iskeyword(plain) or hasattr(fx.GraphModule, plain) or plain == "training" else plain


def _prefixes(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts)))
