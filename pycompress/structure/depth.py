"""Whole blocks: those without which a model's results change least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from pycompress.calls import Inputs, call_model, evaluating
from pycompress.structure.cut import Cut, Record, Step


def without_blocks(
    model: nn.Module, shares: Mapping[str, float | None], inputs: Inputs, loss: Callable[[tuple[str, ...]], float] | None = None
) -> Cut:  # fmt: skip
    """The cut that leaves the share of the blocks that each glob has, at least one of each list; the first that matches counts.

    ``loss``: what the model loses without some blocks; None: by how much its results for the inputs change.
    Raises ValueError where a glob matches none.
    """
    candidates = _candidates(model, inputs)
    pools: dict[str, list[str]] = {glob: [] for glob in shares}
    for name in candidates:
        glob = next((glob for glob in shares if fnmatchcase(name, glob)), None)
        if glob is not None:
            pools[glob].append(name)
    for glob, names in pools.items():
        if not names:
            raise ValueError(
                f"shrink: blocks: {glob!r} matches no block whose result looks like its input, expected one of {candidates}"
            )
    expected = _results(model, inputs, ())
    loss = loss or (lambda names: _change(_results(model, inputs, names), expected))
    gone: list[str] = []
    records = []
    for glob, names in pools.items():
        share = shares[glob]
        if share is None:
            continue
        stay, lost = [*names], 0.0
        while len(stay) > max(1, round(share * len(names))):
            losses = [loss((*gone, name)) for name in stay]
            lost = min(losses)
            gone.append(stay.pop(losses.index(lost)))
        records.append(Record("blocks", glob, len(names), len(stay), lost))
    return Cut((Step(modules=gone),), tuple(records))


def without(model: nn.Module, names: Sequence[str], inputs: Inputs | None) -> Cut:
    """The cut without the blocks of these names; how far results move is on record where there are inputs.

    Raises ValueError where one is no member of a list, or a list would be empty.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"shrink: blocks is {names!r}, expected a share, {{glob: share}}, or a list of names")
    left: dict[str, set[str]] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        members = left.setdefault(path, _members(model, path))
        if last not in members:
            raise ValueError(
                f"shrink: blocks has {name!r}, expected different members of an nn.ModuleList or nn.Sequential"
            )
        members.remove(last)
        if not members:
            raise ValueError(f"shrink: blocks has all members of {path or 'the model'}, expected one to stay")
    lost = math.nan
    if inputs is not None:
        lost = _change(_results(model, inputs, tuple(names)), _results(model, inputs, ()))
    records = [
        Record("blocks", f"{path}.*".lstrip("."), len(_members(model, path)), len(members), lost)
        for path, members in left.items()
    ]
    return replace(Cut.without(*names), records=tuple(records))


def _members(model: nn.Module, path: str) -> set[str]:
    owner = dict(model.named_modules(remove_duplicate=False)).get(path)
    return set(owner._modules) if isinstance(owner, nn.ModuleList | nn.Sequential) else set()


def _candidates(model: nn.Module, inputs: Inputs) -> list[str]:
    """The members of lists, met once, whose result has the shape and dtype of their first input. (One is left in each list.)"""
    met: dict[str, list[bool]] = {}
    handles = []
    for path, owner in model.named_modules():
        if not isinstance(owner, nn.ModuleList | nn.Sequential) or len(owner) < 2:
            continue
        for i, block in enumerate(owner):
            if any(True for _ in block.parameters()):
                handles.append(block.register_forward_hook(_look(met, f"{path}.{i}".lstrip("."))))
    try:
        with evaluating(model, inputs):
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, fits in met.items() if fits == [True]]


def _look(met: dict[str, list[bool]], name: str) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        met.setdefault(name, []).append(_alike(args, result))

    return hook


def _alike(args: tuple[Any, ...], result: Any) -> bool:
    y = result[0] if isinstance(result, tuple) and result else result
    x = args[0] if args else None
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype


@contextmanager
def skipping(model: nn.Module, blocks: tuple[str, ...]) -> Iterator[None]:
    """In the block these blocks of the model give their input."""

    def skip(_: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        return (args[0], *result[1:]) if isinstance(result, tuple) else args[0]

    handles = [model.get_submodule(name).register_forward_hook(skip) for name in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _results(model: nn.Module, inputs: Inputs, skipped: tuple[str, ...]) -> list[Tensor]:
    """What the model gives where some blocks give their input."""
    with skipping(model, skipped), evaluating(model, inputs):
        return [tensor.double().clone() for tensor in tensors_in(call_model(model, inputs))]


def _change(found: list[Tensor], expected: list[Tensor]) -> float:
    """The squared difference as a share of what was expected, the mean over tensors of one shape in both."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=False) if a.shape == b.shape]
    return sum(float((a - b).square().sum() / b.square().sum().clamp(min=1e-300)) for a, b in pairs) / max(
        len(pairs), 1
    )


def tensors_in(result: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returned, in their order."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() and result.numel() else []
    if isinstance(result, Mapping):
        result = list(result.values())
    parts = result if isinstance(result, list | tuple) else vars(result).values() if hasattr(result, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors_in(part)]
