"""``unchanged``: what a run of a model may change is afterwards as it was before."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache, partial
from operator import is_
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


@contextmanager
def unchanged(*roots: object) -> Iterator[None]:
    """At the end of the block all that it changed is as it was, as far as that can be found.

    Numbers in tensors are found wherever these are kept, because every write of torch's operators is seen: what is about to be
    written over is copied then, and nothing else is, so that a large model or cache costs nothing. Found from the roots (modules,
    inputs) are: attributes and what containers, objects, closures, partials and the hooks of modules hold; class attributes and
    globals where the code is not a library's; shape, gradient and ``requires_grad`` of tensors; NumPy arrays, and generators of
    random numbers. The random states of torch, NumPy and Python are kept too. Not found is what lives in C++, iterators and files.
    """
    with ExitStack() as undo:
        undo.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count() if _use_cuda(roots) else 0)))
        undo.callback(random.setstate, random.getstate())
        undo.callback(np.random.set_state, np.random.get_state())
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        _Before(undo).note(roots)
        undo.enter_context(_Writes())
        yield


def unwatched() -> AbstractContextManager[Any]:
    """For runs that are timed in the block of :func:`unchanged`: operators go their usual way, unseen. What an earlier run in it
    wrote over is kept already, and put back at the end."""
    return _disable_current_modes()


def _use_cuda(roots: Iterable[object]) -> bool:
    modules = [root for root in roots if isinstance(root, nn.Module)]
    return any(t.is_cuda for module in modules for t in (*module.parameters(), *module.buffers()))


# --- numbers in tensors -----------------------------------------------------------------------------------------------


class _Writes(TorchDispatchMode):
    """Keeps what operators write over, and puts it back at the end; tensors that the run itself made are left to it."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()  # addresses of storages
        self.kept: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # what was written, and the numbers that it had

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import all of torch.compile, and is for modes under a compiler

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        written, makes = _effects(func)
        for position, name in written:
            self._keep(args[position] if position < len(args) else kwargs.get(name))
        result = func(*args, **kwargs)
        if makes:
            self._note_made(result)
        return result

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for tensor, numbers in reversed(self.kept.values()):
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                if _is_strided(tensor):
                    tensor.copy_(numbers)
                else:
                    tensor.data = numbers
        self.kept.clear()

    def _keep(self, value: Any) -> None:
        if isinstance(value, list | tuple):
            for item in value:
                self._keep(item)
        if not isinstance(value, Tensor) or value.is_meta:
            return
        storage = _address(value)
        if storage in self.made:
            return
        key: tuple[Any, ...] = (id(value),)
        if strided := _is_strided(value):
            key = (storage, value.dtype, value.storage_offset(), value.shape, value.stride())
        if key in self.kept:
            return
        unknown = suppress(RuntimeError, NotImplementedError)  # of a type that has no copy
        with unknown, torch.inference_mode(value.is_inference()), torch.no_grad():
            # (an alias of it as it lies now, since it may be changed to lie otherwise)
            self.kept[key] = value.detach() if strided else value, value.detach().clone()

    def _note_made(self, value: Any) -> None:
        if isinstance(value, list | tuple):
            for item in value:
                self._note_made(item)
        elif isinstance(value, Tensor) and (storage := _address(value)) is not None:
            self.made.add(storage)


@cache
def _effects(func: Any) -> tuple[list[tuple[int, str]], bool]:
    """Which arguments an operator writes to, and whether what it returns is new.

    The schemas of batch norms do not say that they write to the running statistics.
    """
    schema = func._schema
    written = [
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.name.startswith("running_") or (argument.alias_info is not None and argument.alias_info.is_write)
    ]
    made = all(one.alias_info is None for one in schema.returns) or schema.name == "aten::lift_fresh"
    return written, made


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _address(tensor: Tensor) -> int | None:
    """Of its storage; None where it has none of its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None


# --- objects ----------------------------------------------------------------------------------------------------------

_ATOMS = (
    str, bytes, int, float, complex, type(None), range, slice, CodeType, BuiltinFunctionType, ModuleType, torch.dtype, torch.device,
    torch.layout,
)  # fmt: skip
# (Those that run tests have state of their own, which the functions of a test lead to.)
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "transformers", "pytest", "_pytest", "hypothesis"} - {
    "__main__"
}


@cache
def _is_librarys(module: object) -> bool:
    """Whether code is of a library whose globals and classes keep no state of a model."""
    return not isinstance(module, str) or module.partition(".")[0] in _LIBRARIES or _is_ours(module)


def _is_ours(module: object) -> bool:
    return f"{module}.".startswith("pycompress.")


class _Before:
    """What can be reached from some objects: ``undo`` gets, for each of them that a run may change, how to change it back."""

    def __init__(self, undo: ExitStack) -> None:
        self.undo = undo
        self.seen: dict[int, object] = {}  # the objects themselves, lest another one gets the id of one that is gone
        self.pending: list[object] = []

    def note(self, value: object) -> None:
        self.pending.append(value)
        while self.pending:
            value = self.pending.pop()
            if not isinstance(value, _ATOMS) and id(value) not in self.seen:
                self.seen[id(value)] = value
                self._note(value)

    def _note(self, value: Any) -> None:
        if isinstance(value, type):
            self._class(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self.pending += [value.__self__, value.__func__]
        elif isinstance(value, classmethod | staticmethod):
            self.pending.append(value.__func__)
        elif isinstance(value, property):
            self.pending += [value.fget, value.fset]
        elif isinstance(value, partial):
            self.pending += [value.func, value.args, value.keywords]
        elif isinstance(value, CellType):
            self._attributes(
                lambda: ["cell_contents"], lambda _: _contents(value), partial(setattr, value), partial(delattr, value)
            )
        elif isinstance(value, nn.Module) or not _is_ours(
            type(value).__module__
        ):  # a hook of ours gathers what is to stay
            self._object(value)

    def _object(self, value: Any) -> None:
        self.pending.append(type(value))
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif isinstance(value, dict):
            self._dict(value, OrderedDict if isinstance(value, OrderedDict) else dict)
        elif isinstance(value, list | deque | bytearray):
            self._items(value, next(base for base in (list, deque, bytearray) if isinstance(value, base)))
        elif isinstance(value, set):
            self._set(value)
        elif isinstance(value, tuple | frozenset):
            self.pending += value
        elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            self.undo.callback(value.setstate, value.getstate())
        elif isinstance(value, torch.Generator | np.random.RandomState):
            self.undo.callback(value.set_state, value.get_state())  # type: ignore[arg-type]
        elif isinstance(value, np.random.Generator):
            self.undo.callback(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, torch.jit.ScriptModule):  # keeps it outside its attributes
            self.undo.callback(setattr, value, "training", value.training)
        if type(attributes := getattr(value, "__dict__", None)) is dict:
            self.pending.append(attributes)
        if slots := slots_of(type(value)):
            self._attributes(
                lambda: slots,
                lambda name: getattr(value, name, _NOTHING),
                lambda name, old: slots[name].__set__(value, old),
                lambda name: slots[name].__delete__(value),
            )

    def _class(self, value: type) -> None:
        if not _is_librarys(value.__module__):
            self.pending += value.__bases__
            self._attributes(
                lambda: vars(value),
                lambda name: vars(value).get(name, _NOTHING),
                partial(type.__setattr__, value),
                partial(type.__delattr__, value),
            )

    def _function(self, value: FunctionType) -> None:
        """What it carries with it, and the globals that it reads or sets; of modules among these what it may touch."""
        module = value.__globals__.get("__name__")
        if _is_ours(module):
            return
        self.pending += [value.__defaults__, value.__kwdefaults__, value.__dict__, *(value.__closure__ or ())]
        if _is_librarys(module):
            return
        names = _names_in(value.__code__)
        found = [value.__globals__.get(name) for name in names]
        modules = [one for one in found if isinstance(one, ModuleType) and not _is_librarys(one.__name__)]
        for namespace in (value.__globals__, *map(vars, modules)):
            self._attributes(
                lambda: names,
                lambda name, namespace=namespace: namespace.get(name, _NOTHING),  # type: ignore[misc]
                namespace.__setitem__,
                namespace.__delitem__,
            )

    # --- each has one way to change something back, where it is another by then -----------------------------------

    def _attributes(
        self,
        names: Callable[[], Iterable[str]],
        get: Callable[[str], Any],
        put: Callable[[str, Any], None],
        remove: Callable[[str], None],
    ) -> None:
        before = {name: get(name) for name in names()}

        def rebind() -> None:
            for name in [*before, *(name for name in names() if name not in before)]:
                old = before.get(name, _NOTHING)
                if get(name) is not old:
                    remove(name) if old is _NOTHING else put(name, old)

        self.undo.callback(rebind)
        self.pending += before.values()

    def _dict(self, value: dict[Any, Any], base: type[dict[Any, Any]]) -> None:
        """By the methods of the base: a subclass (transformers' ModelOutput) may refuse its own."""
        items = list(base.items(value))

        def refill() -> None:
            now = list(base.items(value))
            if len(now) == len(items) and all(a is b and c is d for (a, c), (b, d) in zip(now, items, strict=True)):
                return
            base.clear(value)
            for key, item in items:
                base.__setitem__(value, key, item)

        self.undo.callback(refill)
        self.pending += [part for item in items for part in item]

    def _items(self, value: Any, base: Any) -> None:
        items = list(base.__iter__(value))

        def refill() -> None:
            if base.__len__(value) != len(items) or not all(map(is_, base.__iter__(value), items)):
                base.clear(value)
                base.extend(value, items)

        self.undo.callback(refill)
        self.pending += items

    def _set(self, value: set[Any]) -> None:
        items = set(value)

        def refill() -> None:
            if not set.__eq__(value, items):
                set.clear(value)
                set.update(value, items)

        self.undo.callback(refill)
        self.pending += items

    def _array(self, value: np.ndarray[Any, Any]) -> None:
        if value.flags.writeable:
            self.undo.callback(np.copyto, value, value.copy())
        if value.dtype == object:
            self.pending += value.flat

    def _tensor(self, value: Tensor) -> None:
        """What is set without an operator; its numbers are kept once they are written over."""
        if is_lazy(value):
            return
        if value.is_leaf:
            required, gradient = value.requires_grad, value.grad
            value.grad = None  # what the run adds up goes elsewhere

            def give_back() -> None:
                if value.requires_grad != required:
                    (value if value.is_leaf else value.detach_()).requires_grad_(required)
                value.grad = gradient

            self.undo.callback(give_back)
        if type(value) not in (Tensor, nn.Parameter) or not _is_strided(value):
            return
        alias = value.detach()

        def point_back() -> None:
            if _place(value) != _place(alias):
                value.data = alias

        self.undo.callback(point_back)


_NOTHING = object()


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing in it yet
        return _NOTHING


def slots_of(cls: type) -> dict[str, Any]:
    """The descriptors of attributes that are not in ``__dict__``."""
    return {
        name: found
        for base in cls.__mro__
        if "__slots__" in vars(base)
        for name, found in vars(base).items()
        if isinstance(found, MemberDescriptorType)
    }


def _names_in(code: CodeType) -> set[str]:
    """All names that some code, and the functions in it, may look up outside themselves."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names, *(name for one in inner for name in _names_in(one))}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
