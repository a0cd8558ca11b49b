"""A call of a model as tensors with names: what the inputs of a graph can be."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pycompress.calls import Inputs, arguments_of, tensors_in

Dynamic = (
    Mapping[int, str] | Mapping[str, Mapping[int, str]]
)  # {dimension: name} of every input, or by the input's name


@dataclass(frozen=True)
class FlatCall:
    """The arguments of a call.

    Attributes:
        tensors: those among them, by name: of the parameter, or where it holds several (a dict of features) the last key.
    """

    tensors: dict[str, Tensor]
    _leaves: tuple[Any, ...]
    _structure: Any

    def call(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Calls the model with other tensors in the places of :attr:`tensors`; what else there was is as it was."""
        others = iter(tensors)
        leaves = [next(others) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, keywords = pytree.tree_unflatten(leaves, self._structure)
        return model(*args, **keywords)


class Refused(ValueError):  # noqa: N818 - it is raised as what it is
    """What a model, or a layer in it, says of a call that cannot be exported."""


class Flat(nn.Module):
    """A model with tensors as its arguments and results. Results that are arguments, or no tensors, are left out."""

    def __init__(self, model: nn.Module, call: FlatCall, paths: list[str] | None = None) -> None:
        """paths: becomes where the model returns them. (A list of the caller's: torch.export puts attributes back.)"""
        super().__init__()
        self.model, self._call, self._paths = model, call, [] if paths is None else paths

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Raises Refused where the model returns no tensor."""
        result = self._call.call(self.model, tensors)
        found = [(path, y) for path, y in tensors_in(result) if not any(y is x for x in tensors)]
        if not found:
            raise Refused(f"export: the model returned {type(result).__name__}, expected at least one tensor in it")
        self._paths[:] = [path for path, _ in found]
        return tuple(y for _, y in found)


def at_least_two(x: Tensor, sizes: Mapping[int, str]) -> Tensor:
    """x with 2 where a dimension that may have other sizes has 1, which a trace would take for a constant."""
    for dimension in sizes:
        if x.shape[dimension] == 1:
            x = x.repeat_interleave(2, dimension)
    return x


def flat_call(model: nn.Module, inputs: Inputs) -> FlatCall:
    """Raises TypeError where the inputs hold no tensor, or are of another type."""
    args, keywords = arguments_of(inputs)
    found, structure = pytree.tree_flatten_with_path((args, keywords))
    parameters = _positional(model)
    paths = [_path(keys, parameters) for keys, leaf in found if isinstance(leaf, Tensor)]
    if not paths:
        raise TypeError("export: the example inputs hold no tensor")
    tensors = [leaf for _, leaf in found if isinstance(leaf, Tensor)]
    return FlatCall(dict(zip(_names(paths), tensors, strict=True)), tuple(leaf for _, leaf in found), structure)


def _positional(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except ValueError:  # no signature is known
        return []


def _path(keys: Sequence[Any], parameters: Sequence[inspect.Parameter]) -> list[str]:
    """Where a leaf is, from the parameter on."""
    keywords, first, *rest = (_word(key) for key in keys)
    if not keywords:
        named = first < len(parameters) and parameters[first].kind is not inspect.Parameter.VAR_POSITIONAL
        first = parameters[first].name if named else f"input_{first}"
    return [str(part) for part in (first, *rest)]


def _word(key: Any) -> Any:
    """What a key of a sequence, a mapping or an object stands for."""
    return next(getattr(key, name) for name in ("idx", "key", "name") if hasattr(key, name))


def _names(paths: Sequence[Sequence[str]]) -> list[str]:
    """From the last key that is a word on; the whole path where that is no name of one input alone."""
    short = ["_".join(path[max(i for i, part in enumerate(path) if not part.isdigit()) :]) for path in paths]
    count = Counter(short)
    return [name if count[name] == 1 else "_".join(path) for name, path in zip(short, paths, strict=True)]


def output_names(paths: Iterable[str], taken: Iterable[str]) -> list[str]:
    """Names for what :func:`pycompress.calls.tensors_in` found: ``output['last_hidden_state']`` -> ``last_hidden_state``."""
    taken = {*taken}
    names = []
    for path in paths:
        parts = [part.strip("'\"") for part in path.replace("]", "").replace(".", "[").split("[")]
        name = "_".join(parts[1:] if len(parts) > 1 and not parts[1].isdigit() else parts)
        while name in taken:
            name = f"output_{name}"
        taken.add(name)
        names.append(name)
    return names


def dimensions(tensors: Mapping[str, Tensor], dynamic: Dynamic | None) -> dict[str, dict[int, str]]:
    """The names of the dimensions of each tensor that may have other sizes.

    Args:
        dynamic: None: the first one of every tensor is ``batch``, and the second one of those of whole numbers ``length``.
    Raises:
        ValueError: a tensor, or a dimension of one, that is not there.
    """
    if dynamic is None:
        return {
            name: {d: word for d, word in enumerate(("batch", "length")) if d < x.dim() and (d == 0 or not x.is_floating_point())}
            for name, x in tensors.items()
        }  # fmt: skip
    if not dynamic or all(isinstance(key, int) for key in dynamic):
        of_all = cast("dict[int, str]", dict(dynamic))
        if of_all and max(of_all) >= max(x.dim() for x in tensors.values()):
            raise ValueError(f"export: dynamic names dimension {max(of_all)}, which no input has")
        return {name: {d: of_all[d] for d in of_all if d < x.dim()} for name, x in tensors.items()}
    found: dict[str, dict[int, str]] = {name: {} for name in tensors}
    for name, own in dynamic.items():
        if not isinstance(name, str) or name not in tensors:
            raise ValueError(f"export: dynamic names the input {name!r}, there are: {', '.join(tensors)}")
        if not isinstance(own, Mapping) or not all(type(d) is int and 0 <= d < tensors[name].dim() for d in own):
            raise ValueError(
                f"export: dynamic has {own!r} for {name} {list(tensors[name].shape)}, expected {{dimension: name}}"
            )
        found[name] = dict(own)
    return found
