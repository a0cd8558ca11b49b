"""``calibrate``: what the inputs of a model's layers look like, gathered from batches that run through it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pycompress.calibration.positions import CONVENTION, Mask, Positions
from pycompress.calls import Inputs, call_model, evaluating, layer_by_layer, uncompiled
from pycompress.kinds import Kind, kind_of
from pycompress.methods.inputs import InputStatistics

if TYPE_CHECKING:
    from typing_extensions import Self

_CHUNK = 1 << 24  # numbers that are held in float64, and unfolded, at a time


@dataclass
class _Sums:
    """What the layers in ``users`` (ids of modules) have met, all of it together.

    Attributes:
        first: float64 [k], the sum of the rows; None for tokens.
        second: float64 [k, k], the sum of x x^T; of tokens int64 [num_embeddings], their counts.
    """

    users: set[int]
    rows: int
    first: Tensor | None
    second: Tensor

    def add(self, other: _Sums) -> None:
        self.rows += other.rows
        self.second = self.second + other.second
        if self.first is not None and other.first is not None:
            self.first = self.first + other.first

    def statistics(self) -> InputStatistics:
        if self.first is None:
            return InputStatistics(self.rows, counts=self.second)
        return InputStatistics(self.rows, self.second / self.rows, self.first / self.rows)


@dataclass
class _Input:
    """The latest input, and what it adds to the sums of those that met it."""

    x: Tensor  # a copy: the model may write over its own
    read: tuple[str, Any]  # name of the kind, and the geometry: how it is read
    sums: _Sums

    def is_met_by(self, module: nn.Module, x: Tensor, read: tuple[str, Any]) -> bool:
        """Whether this is the same input for a module that has not met it yet."""
        alike = x.dtype == self.x.dtype and x.device == self.x.device and read == self.read
        return alike and id(module) not in self.sums.users and torch.equal(x, self.x)


class Calibration(Mapping[str, InputStatistics]):
    """The statistics of each layer that was met, by its name in the model (all of its names), once the ``with`` block has ended.

    Layers that meet the same input one after another (query, key and value; gate and up) share one second moment: in memory there
    is one float64 [k, k] for each of these inputs.
    """

    def __init__(self, model: nn.Module, mask: Mask = CONVENTION) -> None:
        self.running = True
        self._model: nn.Module | None = model
        self._positions = Positions(model, mask)
        self._context = ExitStack()  # for as long as the layers are watched
        self._kinds: dict[nn.Module, Kind] = {}
        self._sums: dict[int, _Sums] = {}  # by id of module
        self._latest: _Input | None = None
        self._statistics: dict[str, InputStatistics] = {}

    def __enter__(self) -> Self:
        if self._model is None or self._kinds:
            raise RuntimeError("calibrate: this calibration has begun already, expected one `with` block for each")
        kinds = {module: kind_of(module) for module in self._model.modules()}
        self._kinds = {module: kind for module, kind in kinds.items() if kind is not None and kind.has_rows(module)}
        if not self._kinds:
            raise ValueError(
                f"calibrate: the model is {type(self._model).__name__}, in which no layer can be watched; expected one with "
                "nn.Linear, Conv1D, nn.Conv2d or nn.Embedding (of one that was scripted, the module that it was made of)"
            )
        self._context.enter_context(layer_by_layer())
        handles = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in self._kinds]
        for handle in [*handles, *self._positions.watch()]:
            self._context.callback(handle.remove)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._finish()
        if kind is None and self._positions.unmet:
            raise ValueError(
                f"calibrate: no module was given a mask {self._positions.mask!r} of the shape [batch, length]"
            )

    def __getitem__(self, name: str) -> InputStatistics:
        return self._statistics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)

    def __repr__(self) -> str:
        return f"Calibration({len(self)} layers{', running' if self.running else ''})"

    # --- while it runs --------------------------------------------------------------------------------------------

    def _note(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        (x, *_) = (*args, *keywords.values())
        kind = self._kinds[module]
        if not isinstance(x, Tensor) or x.numel() == 0 or not kind.accepts(module, x := _dense(x.detach())):
            return
        x = self._positions.counting(x, kind.dims)
        if x.numel() == 0:
            return
        if kind.tokens:
            counts = torch.bincount(x.flatten().cpu(), minlength=kind.shape(module)[0])
            self._add(_Sums({id(module)}, x.numel(), None, counts))
            return
        read = (kind.name, kind.geometry(module))
        if self._latest is not None and self._latest.is_met_by(module, x, read):
            self._latest.sums.users.add(id(module))
            return
        self._settle()
        sums = _moments(x, kind, read[1])
        if not bool(torch.isfinite(sums.second).all()):
            name = next(name for name, other in self._model.named_modules() if other is module)  # type: ignore[union-attr]
            raise ValueError(f"calibrate: the input of {name or 'the model'} holds NaN or Inf, expected finite values")
        sums.users.add(id(module))
        self._latest = _Input(x.clone(), read, sums)

    def _settle(self) -> None:
        if self._latest is not None:
            self._add(self._latest.sums)
        self._latest = None

    def _add(self, new: _Sums) -> None:
        """To the sums of each of its users. Users that have met the same until now go on sharing theirs."""
        groups = {id(sums): sums for user in new.users if (sums := self._sums.get(user)) is not None}
        for sums in groups.values():
            part = sums.users & new.users
            own = sums
            if part != sums.users:  # the others did not meet this one
                sums.users -= part
                own = replace(sums, users=part)
            own.add(new)
            self._sums.update(dict.fromkeys(part, own))
        fresh = new.users - self._sums.keys()
        if fresh:
            self._sums.update(dict.fromkeys(fresh, replace(new, users=fresh)))

    def _finish(self) -> None:
        self._context.close()
        self._settle()
        self.running = False
        assert self._model is not None
        made: dict[int, InputStatistics] = {}
        for name, module in self._model.named_modules(remove_duplicate=False):
            sums = self._sums.get(id(module)) if module in self._kinds else None
            if sums is not None:
                if id(sums) not in made:
                    made[id(sums)] = sums.statistics()
                self._statistics[name] = made[id(sums)]
        self._sums.clear()
        self._kinds.clear()
        self._model = None


def _dense(x: Tensor) -> Tensor:
    """The rows of all items of a nested tensor, one after another."""
    return torch.cat([item.reshape(-1, *item.shape[-1:]) for item in x.unbind()]) if x.is_nested else x


def _moments(x: Tensor, kind: Kind, geometry: Any) -> _Sums:
    """Of all rows that the matrix of a layer meets when its input is x."""
    sums: _Sums | None = None
    items = kind.items(x)
    size = items[0].numel() * kind.spread(geometry)  # of an item's rows, at most
    for part in items.split(max(1, _CHUNK // size)):
        rows = kind.rows(part, geometry).to("cpu", torch.float64)
        own = _Sums(set(), len(rows), rows.sum(dim=0), rows.T @ rows)
        if sums is None:
            sums = own
        else:
            sums.add(own)
    assert sums is not None
    return sums


def calibrate(model: nn.Module, batches: Iterable[Inputs] | None = None, *, mask: Mask = CONVENTION) -> Calibration:
    """Watches the inputs of a model's layers while batches run through it.

        calibration = pc.calibrate(model, batches)

        with pc.calibrate(model) as calibration:  # or, where the model is to be called in another way
            for batch in batches:
                model.generate(batch)

        model = pc.compress(model, pc.LowRank(96), calibration=calibration)

    A few hundred sentences or images like those that the model is for are enough for most layers: their rows (tokens, positions)
    should be several times as many as a layer has input features. Every row counts alike, but padding does not count: see ``mask``.

    Args:
        model: any ``nn.Module`` with linear layers (``nn.Linear``, transformers' ``Conv1D``), ``nn.Conv2d`` or ``nn.Embedding``.
            One that ``torch.compile`` made runs uncompiled for that long. Its layers carry hooks while they are watched, and lose
            them at the end, also when an error ends it.
        batches: inputs as ``compress`` takes them, each a tensor, a sequence of positional or a mapping of keyword arguments. The
            model runs in evaluation mode; it, the batches and the random state are left as they were. None: the ``with`` block runs
            the model, in whatever mode it is.
        mask: which positions count: the name of an argument of the model, or of modules in it, a tensor [batch, length] that is
            not 0 there; or a function that makes such a tensor, or None, of all arguments of the model by name. Others are left
            out in each layer whose input is [batch, length, ...] or [batch * length, ...]; other inputs (pooled, images) count
            whole, and so does everything with None. By default transformers' ``attention_mask``, where there is one. Of torch's
            transformers ``src_key_padding_mask`` and ``tgt_key_padding_mask`` are read besides.
    Returns:
        The :class:`Calibration`, to be read when the block has ended. For each layer met, in float64: the second moment and the
        mean of its inputs, of a convolution those of its patches, of an embedding how often each token came; over all batches.
    Raises:
        TypeError: no module, or one input in place of several. ValueError: no layer that could be watched, or no mask where one was
            asked for by another name; from the model's call, where the input of a layer holds NaN or Inf.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate: model is {type(model).__name__}, expected a torch.nn.Module")
    model = uncompiled(model)
    calibration = Calibration(model, mask)
    if batches is None:
        return calibration
    if isinstance(batches, Tensor | Mapping | str):
        raise TypeError(
            f"calibrate: batches is {type(batches).__name__}, expected several inputs: a list, or a generator"
        )
    with calibration:
        for batch in batches:
            with evaluating(model, batch):
                call_model(model, batch)
    return calibration
