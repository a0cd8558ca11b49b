"""``Watch``: hooks on a model's layers, which add what comes in to their sums; what several layers meet is added once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calibration.positions import Positions, counting
from pycompress.calibration.sums import Room, Sums
from pycompress.calls import layer_by_layer
from pycompress.kinds import Kind, kind_of
from pycompress.methods.inputs import OF_VALUES, InputStatistics
from pycompress.state import unwatched
from pycompress.surgery import names_of

Needs = Callable[[Mapping[Any, list[str]]], Mapping[Any, frozenset[str]]]

_CHUNK = 1 << 22  # numbers that are unfolded at a time
_LARGEST = 1e150  # of float64: squares of larger ones, or sums of these, are no float64


@dataclass
class _Met:
    """The latest input, which several layers may meet one after another.

    Attributes:
        x: as it came, or a copy where torch does not count the writes to it.
        version: how often it had been written to; None of a copy.
        how: by what it is read: parts, kind, geometry and mask.
        sums: of its users.
        known: the sums that layers have which may meet it, too: the same, or None where it is the first input of all its users.
        users: the layers that have met it.
        add: what adds it to sums, when all its users are known; None where it has been added.
    """

    x: Tensor
    version: int | None
    how: tuple[Any, ...]
    sums: Sums
    known: Sums | None
    users: set[int]
    add: Callable[[Sums], None] | None

    @classmethod
    def of(
        cls, x: Tensor, how: Any, sums: Sums, known: Sums | None, user: int, add: Callable[[Sums], None] | None
    ) -> _Met:
        counted = not x.is_inference()
        return cls(x if counted else x.clone(), x._version if counted else None, how, sums, known, {user}, add)

    def is_met(self, x: Tensor, how: tuple[Any, ...]) -> bool:
        """Whether this is the same input, read in the same way."""
        mine, mask = self.how[:-1], self.how[-1]
        if (
            how[:-1] != mine
            or how[-1] is not mask
            or (x.dtype, x.device, x.shape) != (self.x.dtype, self.x.device, self.x.shape)
        ):
            return False
        if self.version is not None:
            if self.x._version != self.version:
                return False
            if x.data_ptr() == self.x.data_ptr() and x.stride() == self.x.stride() and x._version == self.version:
                return True
        return torch.equal(x, self.x)


class Watch:
    """Of all layers of a model whose rows can be told, from :meth:`begin` to :meth:`end`.

    Args:
        needs: which parts are gathered of each layer, given all of its names.
        room: where second moments are kept.
    """

    def __init__(self, model: nn.Module, positions: Positions, needs: Needs, room: Room) -> None:
        self.model, self.positions, self.room = model, positions, room
        names = names_of(model)
        kinds = {
            module: kind
            for module in names
            if (kind := kind_of(module)) is not None and not (kind.recurrent or kind.misfit(module))
        }
        told = {module for module, kind in kinds.items() if kind.has_rows(module)}
        if not told:
            raise ValueError(
                f"calibrate: the model is {type(model).__name__}, in which no layer can be watched; expected one with "
                "nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d or nn.Embedding (of one that was scripted, the module that it was made of)"
            )
        self._names = {module: names[module] for module in kinds}
        wanted = {m: parts if m in told else parts & OF_VALUES for m, parts in needs(self._names).items()}
        self._parts = {module: parts for module, parts in wanted.items() if parts}
        self._kinds = {module: kinds[module] for module in self._parts}
        self.calls, self.running = 0, False  # of the model
        self._context = ExitStack()  # for as long as the layers are watched
        self._sums: dict[int, Sums] = {}  # by id of module
        self._counts: dict[int, Tensor] = {}
        self._latest: _Met | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is needed."""
        return not self._parts

    def begin(self) -> None:
        self.running = True
        self._context.enter_context(layer_by_layer())
        handles = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in self._kinds]
        handles.append(self.model.register_forward_pre_hook(self._count))
        for handle in [*handles, *self.positions.watch()]:
            self._context.callback(handle.remove)

    def end(self) -> dict[str, InputStatistics]:
        """By all names of each layer that was met."""
        self._context.close()
        self._settle()
        made: dict[int, InputStatistics] = {}
        found: dict[str, InputStatistics] = {}
        for module, names in self._names.items():
            if (counts := self._counts.get(id(module))) is not None:
                found.update(dict.fromkeys(names, InputStatistics(int(counts.sum()), counts=counts)))
            elif (sums := self._sums.get(id(module))) is not None:
                if id(sums) not in made:
                    made[id(sums)] = sums.statistics()
                found.update(dict.fromkeys(names, made[id(sums)]))
        return found

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def _note(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        # What is kept outlives the block that the model runs in, and is not undone with it.
        with unwatched(), torch.inference_mode(False), torch.no_grad():
            self._gather(module, args, keywords)

    def _gather(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        (x, *_) = (*args, *keywords.values())
        kind, key = self._kinds[module], id(module)
        if not isinstance(x, Tensor) or x.numel() == 0 or not kind.accepts(module, x := _dense(x.detach())):
            return
        mask = self.positions.mask_of(x, kind.dims)
        if kind.tokens:
            tokens = counting(x, mask, kind.dims).flatten().cpu()
            if len(tokens):
                counts = torch.bincount(tokens, minlength=kind.shape(module)[0])
                self._counts[key] = self._counts.get(key, 0) + counts
            return
        geometry, parts = kind.geometry(module), self._parts[module]
        how = (parts, kind.name, geometry, mask)
        sums, met = self._sums.get(key), self._latest
        if met is not None and key not in met.users and sums is met.known and met.is_met(x, how):
            met.users.add(key)
            if met.known is None:
                met.sums.users.add(key)
                self._sums[key] = met.sums
            return
        self._settle()
        chosen = counting(x, mask, kind.dims)
        if chosen.numel() == 0:
            return
        ends = self._ends(module, chosen)
        if sums is not None and sums.users != {key}:  # who else of them meets it has to be known first
            rows = chosen.clone() if chosen is x else chosen
            self._latest = _Met.of(x, how, sums, sums, key, lambda own: _add(own, rows, ends, kind, geometry))
            return
        known, sums = sums, sums or Sums({key}, kind.shape(module)[1], parts, self.room)
        _add(sums, chosen, ends, kind, geometry)
        if known is None:
            self._sums[key] = sums
            self._latest = _Met.of(x, how, sums, None, key, None)

    def _settle(self) -> None:
        met, self._latest = self._latest, None
        if met is None or met.add is None:
            return
        own = met.sums
        if met.users != own.users:  # the others did not meet this one
            own = own.without(met.users)
            self._sums.update(dict.fromkeys(met.users, own))
        met.add(own)

    def _ends(self, module: nn.Module, x: Tensor) -> tuple[float, float]:
        """The lowest and the highest value. Raises ValueError where there are none, or their squares are no numbers."""
        low, high = map(float, torch.aminmax(x))  # (NaN in x is both)
        largest = max(abs(low), abs(high))
        if largest < _LARGEST:
            return low, high
        name = self._names[module][0] or "the model"
        holds = f"{largest:.3g}, whose square is too large for" if math.isfinite(largest) else "NaN or Inf, expected"
        values = "float64" if math.isfinite(largest) else "finite values"
        raise ValueError(f"calibrate: the input of {name} holds {holds} {values}")


def _dense(x: Tensor) -> Tensor:
    """The rows of all items of a nested tensor, one after another."""
    return torch.cat([item.reshape(-1, *item.shape[-1:]) for item in x.unbind()]) if x.is_nested else x


def _add(sums: Sums, x: Tensor, ends: tuple[float, float], kind: Kind, geometry: Any) -> None:
    """All rows that the matrix of a layer meets when its input is x, which lies between these ends."""
    sums.called(*ends)
    largest = max(map(abs, ends))
    items = kind.items(x)
    spread = kind.spread(geometry)
    for part in items.split(max(1, _CHUNK // (items[0].numel() * spread))) if spread > 1 else (items,):
        sums.add(kind.rows(part, geometry), largest)
