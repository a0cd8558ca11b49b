"""What the code of a model does with its modules, read from its source and never run.

In every method of every module's class, the expressions that lead from ``self`` to modules (``self.layers[i].mlp``) are followed
on the modules themselves, through attributes, lists and loops. Of what leads into the unknown, the names asked of it count.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from pycompress.references import References, attributes_of

_WALKS = {
    "__dict__", "_modules", "__getattr__", "__getattribute__", "children", "modules", "named_children", "named_modules",
    "get_submodule",
}  # fmt: skip
# Run when a module is made, or to show it; what they read of a layer, they do not use when it is called.
_ASIDE = {
    "__init__", "reset_parameters", "_reset_parameters", "init_weights", "_init_weights", "initialize_weights", "extra_repr",
    "__repr__",
}  # fmt: skip
_HARMLESS = {
    "isinstance",
    "len",
    "hasattr",
    "type",
    "id",
    "callable",
    "bool",
    "print",
}  # functions of which nothing comes back
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Method(NamedTuple):
    """A function of a class, and its source."""

    function: Any
    tree: ast.FunctionDef


class Code:
    """What was read.

    Attributes:
        mentions: by the id of a module, the expressions that lead to it or through it.
        hidden: ids of modules with which anything may be done: they are handed to a function or walked through, or the source of
            their class is missing.
        names: attributes that are asked of objects of which nothing is known.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mentions: dict[int, list[ast.expr]] = {}
        self.hidden: set[int] = set()
        self.names: set[str] = set()
        self._methods: dict[type, list[Method] | None] = {}
        for module in model.modules():
            self._read_class(module)
        self._read_other_functions(model)

    def forward_of(self, module: nn.Module) -> Method | None:
        """The plain function that a call of this module runs, as its class defines it; None where anything stands between."""
        kind = type(module)
        calls = ("__call__", "_call_impl", "__getattr__")
        if any(
            getattr(kind, name) is not getattr(nn.Module, name) for name in calls
        ) or "__getattribute__" in _own_names(kind):
            return None
        if any(callable(getattr(kind, name, None)) for name in vars(module)):
            return None
        found = [
            method
            for base in kind.__mro__
            for method in self._methods.get(base) or ()
            if method.function is kind.forward
        ]
        plain = found and found[0].tree.name == "forward" and not found[0].tree.decorator_list
        return found[0] if plain and not hasattr(kind.forward, "__wrapped__") else None

    def hide(self, module: nn.Module) -> None:
        """Anything may be done with it, and with all that is inside."""
        self.hidden.update(id(inside) for inside in module.modules())

    # --- all that is read ---------------------------------------------------------------------------------------------

    def _read_class(self, module: nn.Module) -> None:
        kind = type(module)
        if (graph := graph_of(module)) is not None:
            for node in graph.nodes:
                if node.op == "get_attr":  # the tensors of the module in front of the last dot
                    self.hidden.add(id(module.get_submodule(str(node.target).rpartition(".")[0])))
            return
        if kind in _CONTAINERS or all(child is None for child in module._modules.values()):
            return
        done: set[str] = (
            set()
        )  # names of methods, which those of the same name further behind do not run without `super`
        inherits = False
        for base in _bases(kind):
            if base not in self._methods:
                self._methods[base] = self._methods_of(base)
            methods = self._methods[base]
            if _stands_behind(base, kind):
                self.names.update(*(_names_in(one.__code__) for one in _functions(base)))
                continue
            if methods is None:
                self.hide(module)
                return
            for method in methods:
                if inherits or method.tree.name not in done:
                    _Reader(self, module, method).read()
            done.update(method.tree.name for method in methods)
            running = [method.function.__code__ for method in methods if method.tree.name not in _ASIDE]
            inherits = inherits or any("super" in _names_in(code) for code in running)

    def _methods_of(self, base: type) -> list[Method] | None:
        """None where the source of one is missing."""
        functions = _functions(base)
        self.names.update(*(_names_in(one.__code__) for one in functions if _is_of_a_framework(one)))
        found = [_method(one) for one in functions if not _is_of_a_framework(one)]
        return None if None in found else [one for one in found if one is not None]

    def _read_other_functions(self, model: nn.Module) -> None:
        """Functions that the model holds (hooks, closures), and the methods of plain objects that it holds."""
        seen: set[Any] = set()
        for reference in References(model):
            value = reference.value
            kind = type(value)
            if kind is FunctionType and not _is_torchs(value):
                self.names.update(_names_in(value.__code__))
            elif kind not in seen and not issubclass(kind, (nn.Module, Tensor)) and not _is_torchs(kind):
                seen.add(kind)
                for base in kind.__mro__:
                    self.names.update(name for function in _functions(base) for name in _names_in(function.__code__))


def graph_of(module: nn.Module) -> fx.Graph | None:
    """The graph of a ``torch.fx.GraphModule``, where a call of it runs the code of that graph and nothing else."""
    kind = type(module)
    if not isinstance(module, fx.GraphModule) or kind.__mro__[1] is not fx.GraphModule or "forward" in vars(module):
        return None
    forward = vars(kind).get("forward")
    made = isinstance(forward, FunctionType) and forward.__code__.co_filename.startswith("<eval_with_key>")
    graph: fx.Graph = module.graph
    return graph if made and module.code == graph.python_code("self").src else None


def _is_torchs(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == "torch"


def _bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if issubclass(base, nn.Module) and base not in (nn.Module, *_CONTAINERS)] + [
        base for base in kind.__mro__ if not issubclass(base, nn.Module) and base is not object
    ]


def _own_names(kind: type) -> set[str]:
    return {name for base in _bases(kind) for name in vars(base)}


def _stands_behind(base: type, kind: type) -> bool:
    """Whether it is a base class, of another package, of the class that defines forward: it knows nothing of the layers there."""
    order = kind.__mro__
    owner = next(one for one in order if "forward" in vars(one))
    return order.index(base) > order.index(owner) and base.__module__.split(".")[0] != owner.__module__.split(".")[0]


def _is_of_a_framework(function: FunctionType) -> bool:
    home = str(function.__globals__.get("__name__"))
    return home.startswith("transformers.") and not home.startswith("transformers.models.")


def _functions(kind: type) -> list[FunctionType]:
    """All that a class defines, and what is wrapped in them."""
    found: list[Any] = []
    for value in vars(kind).values():
        if isinstance(value, property):
            found += [value.fget, value.fset, value.fdel]
        else:
            found.append(value.__func__ if isinstance(value, (staticmethod, classmethod)) else value)
    for one in found:  # which grows
        if isinstance(inner := attributes_of(one).get("__wrapped__"), FunctionType):
            found.append(inner)
    return [one for one in found if isinstance(one, FunctionType)]


def _method(function: Any) -> Method | None:
    """A function with its source; None where that is missing or is not the function's (the file was changed since)."""
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    try:
        lines, _ = inspect.getsourcelines(code)
        (tree,) = ast.parse(textwrap.dedent("".join(lines))).body
        compiled = compile(ast.Module([tree], []), code.co_filename, "exec", code.co_flags & annotations.compiler_flag)
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    if not isinstance(tree, ast.FunctionDef) or tree.name != code.co_name:
        return None
    (source,) = (one for one in compiled.co_consts if isinstance(one, CodeType) and one.co_name == code.co_name)
    asked = _names_in(source, strings=False) - {*code.co_freevars}
    return Method(function, tree) if {_unmangled(name) for name in _names_in(code)} >= asked else None


def _unmangled(name: str) -> str:
    """``__x`` of ``_Class__x``."""
    return name[name.index("__") :] if name.startswith("_") and "__" in name[1:] and not name.startswith("__") else name


def _names_in(code: CodeType, *, strings: bool = True) -> set[str]:
    """What a function, or one inside it, asks of other objects: names of attributes and globals, and strings, which may be such."""
    found = {*code.co_names}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names_in(constant, strings=strings)
        elif strings and isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
    return found


# --- one method of one module -----------------------------------------------------------------------------------------


class Value(NamedTuple):
    """What an expression may be: these objects, and if not ``known``, anything else too."""

    objects: list[Any]
    known: bool = True


_UNKNOWN = Value([], known=False)


class _Reader:
    """Follows what one method does with the modules that it reaches from ``self``."""

    def __init__(self, code: Code, module: nn.Module, method: Method) -> None:
        self.code, self.tree, self.globals = code, method.tree, method.function.__globals__
        arguments = [*method.tree.args.posonlyargs, *method.tree.args.args]
        self.bound: dict[
            str, list[Value | tuple[ast.expr, bool]]
        ] = {}  # by local name: expressions, or (True) items of these
        if arguments:
            self.bound[arguments[0].arg] = [Value([module])]
        self.parents = {child: node for node in ast.walk(method.tree) for child in ast.iter_child_nodes(node)}
        self.local = _local_names(method.function.__code__)

    def read(self) -> None:
        for node in ast.walk(self.tree):
            self._bind(node)
        for body in self.tree.body:
            # Of what runs aside, only the functions that it defines may be called later.
            inner = [one for one in ast.walk(body) if isinstance(one, (ast.FunctionDef, ast.Lambda))]
            for root in inner if self.tree.name in _ASIDE else [body]:
                for node in ast.walk(root):
                    if isinstance(node, _CHAIN) and not self._is_inside_a_chain(node):
                        self._note(node)

    def _is_inside_a_chain(self, node: ast.AST) -> bool:
        parent = self.parents[node]
        return isinstance(parent, (ast.Attribute, ast.Subscript)) and parent.value is node

    # --- what local names may be --------------------------------------------------------------------------------------

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind_to(target, node.value)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            self._bind_to(node.target, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            for target, iterable in _iterations(node.target, node.iter):
                self._bind_to(target, iterable, item=True)

    def _bind_to(self, target: ast.expr, value: ast.expr, *, item: bool = False) -> None:
        if isinstance(target, ast.Name):
            self.bound.setdefault(target.id, []).append((value, item) if isinstance(value, _CHAIN) else _UNKNOWN)
        elif isinstance(target, (ast.Tuple, ast.List)):
            parts = (
                value.elts if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts) else None
            )
            for i, one in enumerate(target.elts):
                self._bind_to(one, parts[i] if parts and not item else ast.Constant(None))

    def _value(self, node: ast.expr, seen: tuple[str, ...] = ()) -> Value:
        if isinstance(node, ast.Name):
            return self._value_of_name(node.id, seen)
        if isinstance(node, ast.Attribute):
            return self._attribute(self._value(node.value, seen), node.attr)
        if isinstance(node, ast.Subscript):
            base = self._value(node.value, seen)
            return base if isinstance(node.slice, ast.Slice) else _items(base)
        return _UNKNOWN

    def _attribute(self, base: Value, name: str) -> Value:
        if not base.known:
            self.code.names.add(name)
        return _joined([_attribute(one, name) for one in base.objects], known=base.known)

    def _value_of_name(self, name: str, seen: tuple[str, ...]) -> Value:
        if name in self.bound:
            if name in seen:
                return Value([])
            parts = []
            for one in self.bound[name]:
                if isinstance(one, Value):
                    parts.append(one)
                else:
                    value = self._value(one[0], (*seen, name))
                    parts.append(_items(value) if one[1] else value)
            return _joined(parts)
        if name in self.local:
            return _UNKNOWN
        return Value([self.globals[name]] if name in self.globals else [])

    # --- what is done with them ---------------------------------------------------------------------------------------

    def _note(self, chain: ast.expr) -> None:
        """One whole expression ``self.a.b[i].c``, and how it is used."""
        value, step = self._value(chain), chain
        use = self.parents[chain]
        called = isinstance(use, ast.Call) and use.func is chain
        whole = use if called and isinstance(use, ast.Call) else chain
        self._mention(value, whole)
        while isinstance(step, (ast.Attribute, ast.Subscript)):
            base = self._value(step.value)
            self._mention(base, whole)
            if isinstance(step, ast.Subscript):
                self._mention(_items(base), whole)  # of a slice, too
            if isinstance(step, ast.Attribute) and step.attr in _WALKS:
                self._hide(base)
            elif isinstance(step, ast.Attribute) and step.attr in _GIVING and not self._is_iterated(use):
                self._hide(Value([one for one in base.objects if isinstance(one, (*_CONTAINERS, *_PLAIN))]))
            step = step.value
        if isinstance(use, ast.Call) and (name := _asked_by_name(use)) and use.args[0] is chain:
            self._hide(self._attribute(value, name))
        elif not (called or self._is_harmless(chain)):
            self._hide(value)

    def _mention(self, value: Value, by: ast.expr) -> None:
        for module in _modules_among(value.objects):
            mentions = self.code.mentions.setdefault(id(module), [])
            if by not in mentions[-1:]:
                mentions.append(by)

    def _hide(self, value: Value) -> None:
        for module in _modules_among(value.objects):
            self.code.hide(module)

    def _is_iterated(self, node: ast.AST) -> bool:
        """Whether a loop goes over an expression, whose variables were bound to its items."""
        while isinstance(self.parents[node], ast.Call) and _called_name(self.parents[node]) in _PASSED_ON:
            node = self.parents[node]
        parent = self.parents[node]
        return isinstance(parent, (ast.For, ast.comprehension)) and parent.iter is node

    def _is_harmless(self, chain: ast.expr) -> bool:
        """Whether the module that an expression leads to is only compared, bound to a name that is followed, or returned, to code
        that is read too."""
        parent = self.parents[chain]
        if isinstance(parent, ast.Call):
            return _called_name(parent) in _HARMLESS or self._is_iterated(chain)
        if isinstance(parent, ast.Assign):
            return all(isinstance(target, ast.Name) for target in parent.targets)
        if isinstance(parent, ast.Tuple) and isinstance(self.parents[parent], ast.Assign):
            return all(isinstance(target, ast.Tuple) for target in self.parents[parent].targets)  # type: ignore[attr-defined]
        if isinstance(parent, (ast.If, ast.While, ast.IfExp)):
            return parent.test is chain
        if isinstance(parent, ast.UnaryOp):
            return isinstance(parent.op, ast.Not)
        if isinstance(chain, ast.Name) and isinstance(chain.ctx, ast.Store):
            return True
        if isinstance(parent, (ast.AnnAssign, ast.NamedExpr)):
            return isinstance(parent.target, ast.Name)
        return isinstance(parent, _LOOKS) or self._is_iterated(chain)


_CHAIN = (ast.Name, ast.Attribute, ast.Subscript)
_LOOKS = (ast.Compare, ast.FormattedValue, ast.Return, ast.Expr, ast.Assert)
_PLAIN = (list, tuple, set, frozenset, deque, dict)
_PASSED_ON = {"enumerate", "zip", "reversed", "list", "tuple", "iter", "sorted"}
_GIVING = {
    "values",
    "items",
    "get",
    "pop",
    "popitem",
    "copy",
    "__iter__",
    "__getitem__",
}  # of containers: what they hold


def _iterations(target: ast.expr, iterable: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, what it gets the items of) for ``for target in iterable``."""
    parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else []
    name, arguments = _called_name(iterable), iterable.args if isinstance(iterable, ast.Call) else []
    if name == "enumerate" and len(parts) == 2 and arguments:
        yield parts[0], ast.Constant(0)
        yield from _iterations(parts[1], arguments[0])
    elif name == "zip" and len(parts) == len(arguments):
        for part, argument in zip(parts, arguments, strict=True):
            yield from _iterations(part, argument)
    elif name in _PASSED_ON and len(arguments) == 1:
        yield from _iterations(target, arguments[0])
    elif isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Attribute) and name in ("values", "items"):
        if name == "items" and len(parts) == 2:
            yield parts[0], ast.Constant("")
        yield (parts[1] if name == "items" and len(parts) == 2 else target), iterable.func.value
    else:
        yield target, iterable


def _called_name(node: ast.AST) -> str:
    """The last part of the name of what is called, '' where that is no call of a name."""
    called = node.func if isinstance(node, ast.Call) else None
    return called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""


def _asked_by_name(call: ast.Call) -> str:
    """``name`` of ``getattr(x, "name")`` and the like, or ''."""
    name = call.args[1] if len(call.args) > 1 and _called_name(call) in ("getattr", "setattr", "delattr") else None
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""


def _local_names(code: CodeType) -> set[str]:
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    return {*code.co_varnames, *code.co_cellvars, *code.co_freevars}.union(*map(_local_names, inner))


def _joined(values: Iterable[Value], *, known: bool = True) -> Value:
    values = list(values)
    return Value([one for value in values for one in value.objects], known and all(value.known for value in values))


def _attribute(owner: Any, name: str) -> Value:
    if isinstance(owner, nn.Module):
        for children in (owner._modules, owner._parameters, owner._buffers):
            if name in children:
                return Value([children[name]])
    if name in attributes_of(owner):
        return Value([attributes_of(owner)[name]])
    if isinstance(owner, (ModuleType, type, Tensor, str, int, float, *_PLAIN, type(None))):
        return Value([])  # nothing of the model's
    found = inspect.getattr_static(type(owner), name, None)
    return Value([]) if isinstance(found, (FunctionType, staticmethod, classmethod)) else _UNKNOWN


def _items(value: Value) -> Value:
    """What the objects hold."""
    found: list[Any] = []
    for one in value.objects:
        if isinstance(one, nn.Module):
            found += one._modules.values()
        elif isinstance(one, dict):
            found += [*one, *one.values()]
        elif isinstance(one, _PLAIN):
            found += one
    return Value(found, value.known)


def _modules_among(objects: list[Any]) -> Iterator[nn.Module]:
    """Modules, also those that lists and the like hold."""
    seen: set[int] = set()
    queue = deque(objects)
    while queue:
        one = queue.popleft()
        if isinstance(one, nn.Module):
            yield one
        elif isinstance(one, _PLAIN) and id(one) not in seen:
            seen.add(id(one))
            queue += [*one, *one.values()] if isinstance(one, dict) else one
