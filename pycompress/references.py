"""Where the modules of a model are kept: in the attributes of modules, in lists, dictionaries, partials, closures and so on."""

from __future__ import annotations

import gc
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import CellType, CodeType, FrameType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import getweakrefs, ref

import torch
from torch import Tensor, nn

from pycompress.state import slots_of

# Nothing is looked for in these. Globals are reached through frames and modules of Python: they are not the model's.
_CLOSED = (
    type, ModuleType, FrameType, CodeType, Tensor, str, bytes, bytearray, int, float, complex, range, type(None), torch.dtype,
    torch.device,
)  # fmt: skip
# Has to be made anew to hold something else, and then put in the place of the old one.
_FIXED = (tuple, frozenset, MethodType, ref)

Write = Callable[[Any, Any, Any, Any], None]  # (owner, key, before, after)


class Reference(NamedTuple):
    """A place in which an object is held: ``owner`` is held by ``key``.

    Attributes:
        text: of the path of the owner and the key: what errors call the place.
        write: puts another object there; None where that cannot be done.
    """

    owner: Any
    text: Callable[[str, Any], str]
    key: Any
    value: Any
    write: Write | None = None


class References:
    """All that a model refers to. Each object is looked into once, so that a cycle has an end.

    Objects are told by their type and never by ``isinstance``, which runs code of theirs (a weak proxy would claim to be a module).

    Args:
        model: whose modules' attributes are looked through, and all that is reached from there.
        shut: modules that are not looked into.
    """

    def __init__(self, model: nn.Module, shut: Iterable[nn.Module] = ()) -> None:
        self._names = {id(module): name for name, module in reversed([*model.named_modules()])}
        self._roots = [*model.modules()]
        self._shut = {id(module) for module in shut}
        self._origins: dict[int, Reference] = {}

    def __iter__(self) -> Iterator[Reference]:
        seen: dict[int, Any] = {id(module): module for module in self._roots}  # the objects, lest an id be used again
        queue = deque(self._roots)
        while queue:
            owner = queue.popleft()
            if id(owner) in self._shut:
                continue
            for reference in _references_in(owner):
                value = reference.value
                if id(value) not in seen:
                    seen[id(value)] = value
                    self._origins[id(value)] = reference
                    queue.append(value)
                yield reference

    def path(self, value: Any) -> str:
        """How an object that was met is reached: the name of a module, an attribute of one, an item of that, and so on."""
        steps = []
        while id(value) not in self._names:
            steps.append(self._origins[id(value)])
            value = steps[-1].owner
        path: str = self._names[id(value)]
        for step in reversed(steps):
            path = step.text(path, step.key)
        return path


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that an object is or holds, but for those of modules."""
    found: list[Tensor] = []
    seen: dict[int, Any] = {id(value): value}
    queue = deque([value])
    while queue:
        one = queue.popleft()
        if issubclass(type(one), Tensor):
            found.append(one)
        elif not issubclass(type(one), nn.Module):
            for reference in _references_in(one):
                if id(reference.value) not in seen:
                    seen[id(reference.value)] = reference.value
                    queue.append(reference.value)
    return found


def _references_in(owner: Any) -> Iterator[Reference]:
    """Of the objects that an object holds, those in which others may be held."""
    for reference in _all_references_in(owner):
        if not issubclass(type(reference.value), _CLOSED) or issubclass(type(reference.value), Tensor):
            yield reference


def _all_references_in(owner: Any) -> Iterator[Reference]:
    kind = type(owner)
    if issubclass(kind, _CLOSED):
        return
    attributes = attributes_of(owner)
    yield from (Reference(owner, _attribute, key, value, _set_attribute) for key, value in [*attributes.items()])
    if kind is FunctionType:
        for cell in owner.__closure__ or ():
            yield from (Reference(owner, _closure, None, value) for value in gc.get_referents(cell))
        for value in [*(owner.__defaults__ or ()), *(owner.__kwdefaults__ or {}).values()]:
            yield Reference(owner, _default, None, value)
        return
    known = {id(attributes)}
    for reference in _items_in(owner):
        known.add(id(reference.value))
        yield reference
    known.update(map(id, attributes.values()))
    for value in gc.get_referents(owner):  # whatever else it is made of: an iterator, a generator, a cache
        if id(value) not in known:
            yield Reference(owner, _part_of(kind), None, value)


def attributes_of(owner: Any) -> dict[str, Any]:
    """The ``__dict__`` of an object, without running code of its class; empty where it has none."""
    try:
        found = object.__getattribute__(owner, "__dict__")
    except (AttributeError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _items_in(owner: Any) -> Iterator[Reference]:
    """What an object holds besides its attributes, as far as it can be replaced there, or made anew with the object."""
    kind = type(owner)
    if issubclass(kind, dict):
        items = [*dict.items(owner)]
        yield from (Reference(owner, _item, key, value, _set_item) for key, value in items)
        yield from (Reference(owner, _key, None, key, _set_key) for key, _ in items)
    elif issubclass(kind, (list, deque, tuple)):
        put = None if issubclass(kind, tuple) else _set_item
        yield from (Reference(owner, _item, i, value, put) for i, value in enumerate(_iterated(owner)))
    elif issubclass(kind, (set, frozenset)):
        add = None if issubclass(kind, frozenset) else _set_member
        yield from (Reference(owner, _key, None, value, add) for value in _iterated(owner))
    elif issubclass(kind, partial):
        yield from (
            Reference(owner, _attribute, name, getattr(owner, name), _set_in_partial) for name in ("func", "args")
        )
    yield from _slots_of(owner)


def _iterated(owner: Any) -> list[Any]:
    """The items, whatever a subclass does when it is iterated over."""
    base: Any = next(base for base in (list, deque, tuple, set, frozenset) if issubclass(type(owner), base))
    return [*base.__iter__(owner)]


def _slots_of(owner: Any) -> Iterator[Reference]:
    for name, slot in slots_of(type(owner)).items():
        with suppress(AttributeError):  # it was never set
            yield Reference(owner, _attribute, name, slot.__get__(owner), _slot_setter(slot))


# --- how a place is called, and written to ----------------------------------------------------------------------------


def _attribute(path: str, key: Any) -> str:
    return f"{path}.{key}".lstrip(".")


def _item(path: str, key: Any) -> str:
    return f"{path}[{key!r}]" if type(key) in (str, int) else f"{path}[a {type(key).__name__}]"


def _key(path: str, _: Any) -> str:
    return path


def _closure(path: str, _: Any) -> str:
    return f"the closure of {path}"


def _default(path: str, _: Any) -> str:
    return f"a default argument of {path}"


def _part_of(kind: type) -> Callable[[str, Any], str]:
    return lambda path, _: path if kind in (MethodType, CellType) else f"the {kind.__name__} {path}"


def _set_attribute(owner: Any, key: Any, _: Any, after: Any) -> None:
    attributes_of(owner)[key] = after


def _set_item(owner: Any, key: Any, _: Any, after: Any) -> None:
    base = next(base for base in (dict, list, deque) if isinstance(owner, base))
    base.__setitem__(owner, key, after)


def _set_key(owner: Any, _: Any, before: Any, after: Any) -> None:
    items = [(after if key is before else key, value) for key, value in dict.items(owner)]  # in their order
    base = OrderedDict if isinstance(owner, OrderedDict) else dict
    base.clear(owner)
    base.update(owner, items)


def _set_member(owner: Any, _: Any, before: Any, after: Any) -> None:
    set.discard(owner, before)
    set.add(owner, after)


def _set_in_partial(owner: Any, key: Any, _: Any, after: Any) -> None:
    state = {"func": owner.func, "args": owner.args, key: after}
    owner.__setstate__((state["func"], state["args"], owner.keywords, attributes_of(owner)))


def _slot_setter(slot: MemberDescriptorType) -> Write:
    return lambda owner, _, __, after: slot.__set__(owner, after)


# --- modules inside what cannot be changed ----------------------------------------------------------------------------


class Held(NamedTuple):
    """A module in a place. ``obstacle``: why it cannot be replaced there, by a text that names the place, or ''."""

    module: nn.Module
    reference: Reference
    obstacle: str


def held(references: References, modules: Iterable[nn.Module]) -> Iterator[Held]:
    """All places that hold some of ``modules``, as they are or in a tuple, a bound method or the like, which can be made anew."""
    wanted = {id(module): module for module in modules}
    weak = {id(one): module for module in wanted.values() for one in getweakrefs(module)}
    for reference in references:
        if issubclass(type(reference.owner), _FIXED) and reference.write is None:
            continue  # seen from outside
        for module, what in _inside(reference.value, wanted, weak):
            stuck = what or reference.write is None
            place = reference.text(references.path(reference.owner), reference.key) if stuck else ""
            yield Held(module, reference, what + place)


def _inside(
    value: Any, wanted: dict[int, nn.Module], weak: dict[int, nn.Module]
) -> Iterator[tuple[nn.Module, str]]:  # fmt: skip
    """The modules that an object is, or is made of, and what it is where it cannot be made anew for another one."""
    kind = type(value)
    if id(value) in wanted:
        yield wanted[id(value)], ""
    elif id(value) in weak:
        yield weak[id(value)], "" if _can_point_anew(value) else "the weak reference "
    elif kind is MethodType:
        for part in (value.__self__, value.__func__):
            for module, what in _inside(part, wanted, weak):
                yield module, what or ("" if _is_of_every_layer(value, module) else "the bound method ")
    elif issubclass(kind, (tuple, frozenset)):
        for item in _iterated(value):
            yield from _inside(item, wanted, weak)


def _can_point_anew(weak: Any) -> bool:
    """Of weak references and proxies: whether nobody waits for the end of what they point to."""
    return type(weak) is ref and weak.__callback__ is None


def _is_of_every_layer(method: MethodType, module: nn.Module) -> bool:
    """Whether what takes the place of ``module`` has such a method too: its forward, or what all modules have."""
    function = method.__func__
    return function in (getattr(nn.Module, getattr(function, "__name__", ""), None), type(module).forward)


def with_others(value: Any, replacements: dict[int, nn.Module]) -> Any:
    """The same object, or one like it with other modules inside. ``replacements``: by the id of the module that goes."""
    kind = type(value)
    if id(value) in replacements:
        return replacements[id(value)]
    if kind is ref:
        target = value()
        return ref(replacements[id(target)]) if id(target) in replacements else value
    if kind is MethodType:
        if id(value.__self__) in replacements:
            name = "forward" if value.__func__ is type(value.__self__).forward else value.__name__
            return getattr(replacements[id(value.__self__)], name)
        return value
    if not issubclass(kind, (tuple, frozenset)):
        return value
    items = [with_others(item, replacements) for item in _iterated(value)]
    if all(map(lambda new, old: new is old, items, _iterated(value))):
        return value
    base: Any = tuple if issubclass(kind, tuple) else frozenset
    fresh = base.__new__(kind, items)  # also for a named tuple, whose own __new__ takes fields
    attributes_of(fresh).update(attributes_of(value))
    return fresh
