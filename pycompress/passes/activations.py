"""An activation that follows a layer directly goes into its kernel, which applies it while the result is in registers.

That it follows is read from the source of the parent's ``forward``, or from its graph, if it is one of torch.fx; that nothing
else is done with them, from the rest of the code.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from itertools import pairwise

from torch import fx, nn

from pycompress.calls import Inputs
from pycompress.kinds import has_foreign_hooks, replaced_code
from pycompress.passes.code import Code, graph_of
from pycompress.passes.edit import TakeActivation
from pycompress.plan import Target
from pycompress.references import References, held
from pycompress.surgery import names_of

# Transformers has classes of its own for the same functions; by name, because the package need not be installed.
_BY_NAME = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
    "QuickGELUActivation": "quick_gelu",
}
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)
# What may not come to evaluate what stands in it, or evaluates it more than once.
_SOMETIMES = (
    ast.IfExp, ast.BoolOp, ast.Compare, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Await, ast.Yield,
    ast.YieldFrom,
)  # fmt: skip
_ALL_NAMES = {"locals", "vars", "eval", "exec"}  # reach variables without naming them


def activation_name(module: nn.Module) -> str | None:
    """The kernels' name of this activation module, None for any other module."""
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.SiLU:
        return "silu"
    if type(module) is nn.Hardswish:
        return "hardswish"
    if isinstance(module, nn.Hardtanh) and type(module) in (nn.Hardtanh, nn.ReLU6):
        return "relu6" if (module.min_val, module.max_val) == (0, 6) else None
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if type(module).__module__ == "transformers.activations":
        return _BY_NAME.get(type(module).__name__)
    return None


def take_over(model: nn.Module, targets: Sequence[Target], _: Inputs | None = None) -> list[TakeActivation]:
    """An activation that follows a layer wherever it is used becomes the layer's; the module leaves its place. A norm that is
    folded into the layer counts as the layer.

    Left out are layers and activations that the model holds in more than one place or calls in more than one, that have hooks, or
    with which code may do what cannot be seen. Calls from outside the model cannot be seen from here.
    """
    layers = {target.last: target for target in targets if target.kind.epilogue}
    parents = [module for module in model.modules() if _may_call_both(module, layers)]
    return [
        TakeActivation(layers[layer], activation, activation=name)
        for layer, activation in read_pairs(model, parents)
        if layer in layers
        and (name := activation_name(activation))
        and not has_foreign_hooks(activation)
        and not replaced_code(activation)
    ]


def _may_call_both(parent: nn.Module, layers: Container[nn.Module]) -> bool:
    """Whether a layer and an activation are its own; those of a graph lie anywhere inside."""
    own = [*(parent.modules() if isinstance(parent, fx.GraphModule) else parent.children())]
    return any(child in layers for child in own) and any(map(activation_name, own))


def read_pairs(model: nn.Module, parents: Sequence[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    """Children of these modules of which, as the source says, the second gets all that the first gives, and only that. Both stand
    in one place of the model, and no code may do with them what cannot be seen."""
    if not parents:
        return []
    code = Code(model)
    pairs = [pair for parent in parents for pair in _pairs(model, parent, code)]
    places = Counter(one.module for one in held(References(model), {module for pair in pairs for module in pair}))
    return [pair for pair in pairs if not any(id(one) in code.hidden or places[one] != 1 for one in pair)]


def _pairs(model: nn.Module, parent: nn.Module, code: Code) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Children of ``parent`` of which the second gets all that the first gives, and only that; of a graph, modules inside."""
    if (graph := graph_of(parent)) is not None:
        yield from _followed_in(graph, parent)
        return
    if isinstance(parent, nn.Sequential):
        if _is_plain(parent) and not _is_asked_for_items(model, parent, code):
            for pair in pairwise(parent._modules.values()):
                if not any(child is None or code.mentions.get(id(child)) for child in pair):
                    yield pair
        return
    forward = code.forward_of(parent)
    for names, calls in followed(forward.tree) if forward else ():
        first, second = (parent._modules.get(name) for name in names)
        if first is None or second is None or code.names.intersection(names):
            continue
        if all(code.mentions.get(id(child)) == [call] for child, call in zip((first, second), calls, strict=True)):
            yield first, second


def _followed_in(graph: fx.Graph, parent: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for second in graph.nodes:
        first = second.args[0] if second.op == "call_module" and len(second.args) == 1 and not second.kwargs else None
        if not isinstance(first, fx.Node) or first.op != "call_module" or [*first.users] != [second]:
            continue
        if calls[first.target] == calls[second.target] == 1:
            yield parent.get_submodule(str(first.target)), parent.get_submodule(str(second.target))


def _is_plain(parent: nn.Sequential) -> bool:
    """Whether a call of it calls its children one behind the other, and nobody watches that."""
    kind = type(parent)
    plain = all(
        getattr(kind, name) is getattr(nn.Sequential, name)
        for name in ("forward", "__iter__", "__call__", "_call_impl")
    )
    return plain and not has_foreign_hooks(parent) and not replaced_code(parent) and not replaced_code(nn.Sequential())


def _is_asked_for_items(model: nn.Module, parent: nn.Module, code: Code) -> bool:
    """Whether code that knows it by its name, on an object that was not followed, may call its items one by one."""
    for name in names_of(model)[parent]:
        words = [word for word in name.split(".") if not word.isdigit()]
        if words and words[-1] in code.names:
            return True
    return False


def followed(forward: ast.FunctionDef) -> Iterator[tuple[tuple[str, str], tuple[ast.Call, ast.Call]]]:
    """Names of children, and their calls, where every run of a forward that comes so far does ``self.second(self.first(x))``:
    written so, or with a local variable between two statements that has no other use."""
    if not forward.args.args or any(isinstance(node, ast.Name) and node.id in _ALL_NAMES for node in ast.walk(forward)):
        return
    owner = forward.args.args[0].arg
    for i, statement in enumerate(forward.body):
        for second in _certain(statement) if isinstance(statement, _SIMPLE) else ():
            if not (name := _child_called(second, owner)):
                continue
            assert isinstance(second, ast.Call)
            first: ast.expr | None = second.args[0]
            if isinstance(first, ast.Name):
                first = _assigned(forward, i, first)
            if first is not None and (before := _child_called(first, owner)):
                assert isinstance(first, ast.Call)
                yield (before, name), (first, second)


def _certain(node: ast.AST) -> Iterator[ast.AST]:
    """What is evaluated once where a statement is run."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _SOMETIMES):
            yield from _certain(child)


def _child_called(node: ast.AST, owner: str) -> str:
    """``name`` of ``owner.name(x)``, or ''."""
    if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords or isinstance(node.args[0], ast.Starred):
        return ""
    called = node.func
    mine = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == owner
    return called.attr if mine and isinstance(called, ast.Attribute) else ""


def _assigned(forward: ast.FunctionDef, i: int, variable: ast.Name) -> ast.expr | None:
    """What the statement before statement i gave a variable that is read in statement i, once, and nowhere later."""
    before, statement = forward.body[i - 1], forward.body[i]
    if i == 0 or not isinstance(before, ast.Assign) or not _is_name(before.targets, variable.id):
        return None
    again = isinstance(statement, ast.Assign) and _is_name(statement.targets, variable.id)
    inside = [
        node for node in ast.walk(forward) if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node is not forward
    ]
    reads = [*_reads(statement, variable.id)]
    for later in [*inside, *([] if again else forward.body[i + 1 :])]:
        reads += _reads(later, variable.id)
    return before.value if reads == [variable] else None


def _is_name(targets: list[ast.expr], name: str) -> bool:
    return len(targets) == 1 and isinstance(targets[0], ast.Name) and targets[0].id == name


def _reads(node: ast.AST, name: str) -> Iterator[ast.Name]:
    for one in ast.walk(node):
        if isinstance(one, ast.Name) and one.id == name and not isinstance(one.ctx, ast.Store):
            yield one
