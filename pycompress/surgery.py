"""Find modules in a model, and put others in their places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from pycompress.nn import CompressedLayer
from pycompress.nn.trained import is_trained
from pycompress.references import Reference, References, held, with_others


def split(name: str) -> tuple[str, str]:
    """A dotted name as (name of the parent, attribute)."""
    parent, _, attribute = name.rpartition(".")
    return parent, attribute


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Each module with all the names that the model has for it, in the order of the first ones."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The compressed layers of a model by name, each module once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLayer)}


def shared_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules have."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {parameter for parameter, count in owners.items() if count > 1}


def held_elsewhere(model: nn.Module, modules: Iterable[nn.Module]) -> dict[nn.Module, list[str]]:
    """Those of ``modules`` that something in the model holds where it cannot be replaced (the closure of a function, an iterator, a
    bound method that only its class has), each with texts that name the places, such as ``the closure of encoder.run``."""
    found: dict[nn.Module, list[str]] = {}
    for one in held(References(model), modules):
        if one.obstacle and one.obstacle not in found.setdefault(one.module, []):
            found[one.module].append(one.obstacle)
    return {module: places for module, places in found.items() if places}


def swap(model: nn.Module, replacements: Mapping[Any, Any]) -> Callable[[], None]:
    """Puts modules in the places of others, wherever the model holds these: under all their names, in lists, tuples, sets,
    dictionaries, attributes of plain objects, partials, and as the owners of bound methods. The modules that go are not changed;
    those that come get their mode (training or not), and a compressed layer those of their attributes that it has not itself.

    Args:
        replacements: {module of the model: what takes its place}; a tensor of the model can be replaced alike.
    Returns:
        A function that undoes it.
    Raises:
        ValueError: one of them is the model itself, is none of its modules, or is held where it cannot be replaced.
        Nothing is changed then, nor where anything else is raised.
    """
    change = Swap(model, replacements)
    change.do()
    return change.undo


class _Edit(NamedTuple):
    """One reference, and what it held before and after."""

    reference: Reference
    before: Any
    after: Any

    def do(self) -> None:
        owner, _, key, _, write = self.reference
        assert write is not None
        write(owner, key, self.before, self.after)

    def undo(self) -> None:
        self._replace(before=self.after, after=self.before).do()


class Swap:
    """A :func:`swap` that is found and checked when it is made, and that can be done and undone again and again in microseconds."""

    def __init__(self, model: nn.Module, replacements: Mapping[Any, Any]) -> None:
        self._pairs = list(replacements.items())
        if any(old is model for old, _ in self._pairs):
            raise ValueError("swap: one of the modules to replace is the model itself, expected modules inside of it")
        new = {id(old): fresh for old, fresh in self._pairs}
        edits: dict[int, _Edit] = {}  # by reference: several of the modules may be in one tuple
        met: set[int] = set()
        for module, reference, obstacle in held(References(model, shut=replacements), replacements):
            if obstacle:
                raise ValueError(f"swap: a {type(module).__name__} cannot be replaced in {obstacle}")
            met.add(id(module))
            if id(reference) not in edits:
                edits[id(reference)] = _Edit(reference, reference.value, with_others(reference.value, new))
        for old, _ in self._pairs:
            if id(old) not in met:
                raise ValueError(f"swap: a {type(old).__name__} to replace is no module of the model")
        self._edits = list(edits.values())
        self._modules = [(old, fresh) for old, fresh in self._pairs if isinstance(fresh, nn.Module)]
        for old, fresh in self._modules:
            if isinstance(fresh, CompressedLayer):
                _carry_over(old, fresh)

    def do(self) -> None:
        """Puts the new modules in, or raises and leaves the model as it is."""
        self._write(self._edits, _Edit.do, _Edit.undo)
        for old, fresh in self._modules:
            fresh.train(old.training)

    def undo(self) -> None:
        """Puts the old ones back."""
        self._write(self._edits[::-1], _Edit.undo, _Edit.do)
        for old, fresh in self._modules:
            old.train(fresh.training)

    @staticmethod
    def _write(edits: list[_Edit], forth: Callable[[_Edit], None], back: Callable[[_Edit], None]) -> None:
        for i, edit in enumerate(edits):
            try:
                forth(edit)
            except BaseException:
                for done in edits[i::-1]:
                    back(done)
                raise


def _carry_over(old: nn.Module, fresh: CompressedLayer) -> None:
    """Gives a layer what others may ask of the module that it stands for: its sizes, and what somebody wrote on it."""
    for name, value in vars(old).items():
        if name not in vars(fresh) and not hasattr(type(fresh), name) and name not in fresh._buffers:
            vars(fresh)[name] = value


def switch_off_fast_paths(model: nn.Module) -> None:
    """torch's transformer encoder has a fast path that reads float weights, and packs padded batches for it: not with ours."""
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        if not any(isinstance(inner, CompressedLayer) or is_trained(inner) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        else:
            module.use_nested_tensor = module.enable_nested_tensor = False
