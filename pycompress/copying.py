"""A copy of a model to make changes in, without a copy of what will be replaced."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from itertools import chain
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

from pycompress.references import References

ModelT = TypeVar("ModelT", bound=nn.Module)

_TENSORS = ("_parameters", "_buffers", "_modules", "weight", "bias")  # the last two are attributes in a pruned module


def copied(model: ModelT, without: Iterable[nn.Module]) -> ModelT:
    """A copy that shares nothing with ``model``.

    It differs from what ``deepcopy`` makes in what that refuses or leaves to the original: tensors with a history (an activation
    that was kept, what weight normalization or pruning computed) are copied without it, and functions whose closures or defaults
    lead to modules of the model lead to those of the copy.

    Args:
        without: modules that are copied as shells, with all attributes but no tensors.
    Raises:
        TypeError: something that cannot be copied (a lock, a generator, an open file). Its name is in the message.
    """
    shells = {module: type(module).__new__(type(module)) for module in without}
    for shell in shells.values():
        nn.Module.__init__(shell)
    memo: dict[int, Any] = {id(module): shell for module, shell in shells.items()}
    modules = {id(module) for module in model.modules()}
    functions: list[tuple[FunctionType, FunctionType]] = []
    cells: dict[int, tuple[CellType, CellType]] = {}
    for reference in References(model, shut=shells):
        value = reference.value
        if isinstance(value, Tensor) and not value.is_leaf:  # deepcopy refuses these
            memo.setdefault(id(value), value.detach().clone())
        elif type(value) is FunctionType and id(value) not in memo and _leads_to(value, modules):
            memo[id(value)] = _with_other_cells(value, cells, modules)
            functions.append((value, memo[id(value)]))
    try:
        for module, shell in shells.items():
            rest = {name: value for name, value in vars(module).items() if name not in _TENSORS}
            vars(shell).update(deepcopy(rest, memo))
        result = deepcopy(model, memo)
        for cell, fresh in cells.values():
            fresh.cell_contents = deepcopy(cell.cell_contents, memo)
        for function, fresh_function in functions:
            for name in ("__defaults__", "__kwdefaults__", "__dict__"):
                setattr(fresh_function, name, deepcopy(getattr(function, name), memo))
    except Exception as error:
        where = _what_cannot_be_copied(model)
        raise TypeError(
            f"compress: {where} cannot be copied ({type(error).__name__}: {error}); inplace=True changes the model itself"
        ) from error
    return result


def _leads_to(value: Any, modules: set[int], seen: frozenset[int] = frozenset()) -> bool:
    """Whether a function, or what is in a list or the like, holds one of these modules."""
    if id(value) in modules:
        return True
    if id(value) in seen:
        return False
    kind = type(value)
    parts: Iterable[Any] = ()
    if kind is FunctionType:
        contents = [gc.get_referents(cell) for cell in value.__closure__ or ()]
        parts = [*chain(*contents), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif kind is MethodType:
        parts = (value.__self__, value.__func__)
    elif kind is partial:
        parts = (value.func, *value.args, *value.keywords.values())
    elif issubclass(kind, dict):
        parts = [*dict.keys(value), *dict.values(value)]
    elif issubclass(kind, (list, tuple, set, frozenset, deque)):
        parts = value
    return any(_leads_to(part, modules, seen | {id(value)}) for part in parts)


def _with_other_cells(
    function: FunctionType, cells: dict[int, tuple[CellType, CellType]], modules: set[int]
) -> FunctionType:  # fmt: skip
    """The same function with empty cells in the places of those that lead to modules; ``cells`` gets these and their like."""
    closure = []
    for cell in function.__closure__ or ():
        if any(_leads_to(value, modules) for value in gc.get_referents(cell)):
            closure.append(cells.setdefault(id(cell), (cell, CellType()))[1])
        else:
            closure.append(cell)
    fresh = FunctionType(function.__code__, function.__globals__, function.__name__, None, tuple(closure))
    for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(fresh, name, getattr(function, name))
    return fresh


def _what_cannot_be_copied(model: nn.Module) -> str:
    """The first attribute of a module of which deepcopy makes nothing, by name; or the first module that does so itself."""
    known: dict[int, Any] = {id(module): module for module in model.modules()}
    for reference in References(model):
        if isinstance(reference.value, Tensor):
            known[id(reference.value)] = reference.value
    for name, module in model.named_modules():
        own = [(f"{name}.{key}".lstrip("."), value) for key, value in vars(module).items()]
        for path, value in [*own, (name or "the model", module)]:
            try:
                deepcopy(value, {key: one for key, one in known.items() if one is not value})
            except Exception:
                return path
    return "the model"
