"""What was made of which tensors, remembered for as long as all of them live: so layers that share a weight go on sharing it.

Layers are unpacked, packed and moved one by one. Of one source each gets the same tensor, as parameters that are one stay one: in a
state dict (which holds a shared weight once, then), from one, through a pickle and on another device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary


class _Ref:
    """A tensor that is not kept alive, and that nobody has written into since."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = TensorWeakRef(tensor), _version(tensor)

    def __call__(self) -> Tensor | None:
        tensor = self.tensor()
        return tensor if tensor is not None and _version(tensor) == self.version else None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # torch counts no writes into tensors of its inference mode


class Same:
    """A part of a ``how``: this object and no other, which is not kept alive."""

    def __init__(self, value: object) -> None:
        try:
            self.value: Callable[[], object] = weakref.ref(value)
        except TypeError:
            self.value = lambda: None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value() is not None and self.value() is other.value()

    __hash__ = None  # type: ignore[assignment]


@dataclass
class _Entry:
    how: object
    sources: list[_Ref]
    made: dict[str, Any]  # tensors as _Ref, anything else as it is


_entries = WeakIdKeyDictionary()  # first source -> the entries that begin with it


def remember(sources: Sequence[Tensor], how: object, made: Mapping[str, Any]) -> None:
    """From now on :func:`recall` gives ``made``, whose tensors are not kept alive."""
    if any(value is sources[0] for value in made.values()):
        return  # nothing was made
    others = [entry for entry in _entries.get(sources[0], []) if _alive(entry) and entry.how != how]
    held = {name: _Ref(value) if isinstance(value, Tensor) else value for name, value in made.items()}
    _entries[sources[0]] = [*others, _Entry(how, [_Ref(source) for source in sources], held)]


def recall(sources: Sequence[Tensor], how: object) -> dict[str, Any] | None:
    """What was made in this way of these very tensors, where it is still there and as it was."""
    for entry in _entries.get(sources[0], []):
        if entry.how != how or len(entry.sources) != len(sources):
            continue
        same = all(ref() is source for ref, source in zip(entry.sources, sources, strict=True))
        return _alive(entry) if same else None
    return None


def _alive(entry: _Entry) -> dict[str, Any] | None:
    made = {name: value() if isinstance(value, _Ref) else value for name, value in entry.made.items()}
    return None if any(value is None for value in made.values()) else made


def shared(sources: Sequence[Tensor], how: object, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What ``make`` gives, or gave before in this way of these very tensors."""
    found = recall(sources, how)
    if found is None:
        found = dict(make())
        remember(sources, how, found)
    return found
