"""What a model calls one of its blocks with, batch after batch, and what the block gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calibration import Mask
from pycompress.calibration.positions import Positions
from pycompress.calls import Inputs, call_model, layer_by_layer


@dataclass(frozen=True)
class Call:
    """Of a block, in one batch.

    Attributes:
        mask: bool [batch, length], True where a position counts; None: all do.
    """

    args: tuple[Any, ...]
    keywords: dict[str, Any]
    mask: Tensor | None


class _Reached(BaseException):
    """Ends a run of the model where the block is called; no part of the model should handle it."""


def tensor_of(result: Any) -> Tensor:
    """The floating-point tensor of what a module returned: itself, or the first one in a tuple, a mapping or the like.

    Raises:
        ValueError: there is none.
    """
    values = (
        result.values() if isinstance(result, Mapping) else result if isinstance(result, tuple | list) else [result]
    )
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ValueError(f"reconstruct: the result is {type(result).__name__}, expected a floating-point tensor in it")


class Calls:
    """The calls of a model's blocks, one block after another, with the activations of one block in memory.

    Where a block is called with what the block before it gave, and with nothing else that is new, the activations of that one are
    carried on; otherwise the model runs up to the block again. Which of the two, the first batch tells.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Inputs], mask: Mask) -> None:
        self._model, self._batches, self._mask = model, batches, mask
        self._before: tuple[nn.Module, list[Call]] | None = None

    def of(self, block: nn.Module) -> list[Call]:
        """One for each batch. Raises ValueError for a block that a batch does not call, or more than once."""
        first = self._captured(block, self._batches[0], once=True)
        following = self._following(first)
        calls = following or [first, *(self._captured(block, batch) for batch in self._batches[1:])]
        self._before = block, calls
        return calls

    @torch.no_grad()
    def _following(self, first: Call) -> list[Call] | None:
        if self._before is None:
            return None
        block, calls = self._before
        if _without_input(first) != _without_input(calls[0]):
            return None
        if (
            not first.args
            or not isinstance(first.args[0], Tensor)
            or not torch.equal(output(block, calls[0]), first.args[0])
        ):
            return None
        return [first, *(replace(call, args=(output(block, call), *call.args[1:])) for call in calls[1:])]

    @torch.no_grad()
    def _captured(self, block: nn.Module, batch: Inputs, *, once: bool = False) -> Call:
        positions, found = Positions(self._model, self._mask), list[Call]()

        def note(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *keywords.values()) if isinstance(value, Tensor)]
            shape = tensors[0].shape[:2] if tensors else None
            mask = next((scope for scope in reversed(positions.scopes) if scope.shape == shape), None)
            found.append(Call(_copied(args), _copied(keywords), None if mask is None or bool(mask.all()) else mask))
            if not once:
                raise _Reached

        handles = [block.register_forward_pre_hook(note, with_kwargs=True), *positions.watch()]
        try:
            with layer_by_layer():
                call_model(self._model, batch)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(found) != 1:
            raise ValueError(
                f"reconstruct: a batch calls a {type(block).__name__} {len(found)} times, expected one call of each block"
            )
        return found[0]


def output(block: nn.Module, call: Call) -> Tensor:
    return tensor_of(block(*call.args, **call.keywords))


def _copied(values: Any) -> Any:
    """The model may write over its own."""
    if isinstance(values, Tensor):
        return values.clone()
    if isinstance(values, tuple) and type(values) is tuple:
        return tuple(map(_copied, values))
    if type(values) is dict:
        return {name: _copied(value) for name, value in values.items()}
    return values


class _Same:
    """Compares by what it holds: tensors by their numbers."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, _Same)
        one, two = self.value, other.value
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            return one.dtype == two.dtype and torch.equal(one, two)
        if type(one) is not type(two):
            return False
        if isinstance(one, tuple):
            return [*map(_Same, one)] == [*map(_Same, two)]
        return one is two or (isinstance(one, bool | int | float | str) and bool(one == two))

    __hash__ = None  # type: ignore[assignment]


def _without_input(call: Call) -> tuple[Any, ...]:
    keywords = {name: _Same(value) for name, value in call.keywords.items()}
    return [*map(_Same, call.args[1:])], keywords, _Same(call.mask)
