"""``calibrate``: what the inputs of a model's layers look like, gathered from batches that run through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from pycompress.methods.inputs import InputStatistics
from pycompress.nn import Conv2dGeometry
from pycompress.nn.dense import geometry_of, is_conv1d, weight_shape

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
    geometry: Conv2dGeometry | None
    sums: _Sums

    def is_met_by(self, module: nn.Module, x: Tensor, geometry: Conv2dGeometry | None) -> bool:
        """Whether this is the same input for a module that has not met it yet."""
        alike = x.dtype == self.x.dtype and x.device == self.x.device and geometry == self.geometry
        return alike and id(module) not in self.sums.users and torch.equal(x, self.x)


class Calibration(Mapping[str, InputStatistics]):
    """The statistics of each layer that was met, by its name in the model (all of its names), once the ``with`` block has ended.

    Layers that meet the same input one after another (query, key and value; gate and up) share one second moment: in memory there
    is one float64 [k, k] for each of these inputs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.running = True
        self._modules = {
            name: module for name, module in model.named_modules(remove_duplicate=False) if _is_watched(module)
        }
        self._sums: dict[int, _Sums] = {}  # by id of module
        self._latest: _Input | None = None
        self._statistics: dict[str, InputStatistics] = {}
        watched = {id(module): module for module in self._modules.values()}.values()
        self._handles = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in watched]

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
        if not isinstance(x, Tensor) or x.numel() == 0 or not _fits(module, x):
            return
        x = x.detach()
        if isinstance(module, nn.Embedding):
            counts = torch.bincount(x.flatten().cpu(), minlength=module.num_embeddings)
            self._add(_Sums({id(module)}, x.numel(), None, counts))
            return
        geometry = geometry_of(module)
        if self._latest is not None and self._latest.is_met_by(module, x, geometry):
            self._latest.sums.users.add(id(module))
            return
        self._settle()
        sums = _moments(x, geometry)
        if not bool(torch.isfinite(sums.second).all()):
            name = next(name for name, other in self._modules.items() if other is module)
            raise ValueError(f"calibrate: the input of {name or 'the model'} holds NaN or Inf, expected finite values")
        sums.users.add(id(module))
        self._latest = _Input(x.clone(), geometry, sums)

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
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._settle()
        self.running = False
        made: dict[int, InputStatistics] = {}
        for name, module in self._modules.items():
            sums = self._sums.get(id(module))
            if sums is not None:
                if id(sums) not in made:
                    made[id(sums)] = sums.statistics()
                self._statistics[name] = made[id(sums)]
        self._sums.clear()
        self._modules.clear()


def _is_watched(module: nn.Module) -> bool:
    """Whether there is anything to know of its inputs: a linear layer, an embedding, a convolution that can be compressed."""
    if isinstance(module, nn.Conv2d):
        try:
            geometry_of(module)
        except ValueError:
            return False
        return True
    return isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)


def _fits(module: nn.Module, x: Tensor) -> bool:
    """Whether the module takes such an input; of others it says itself what is wrong."""
    if isinstance(module, nn.Embedding):
        whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
        return whole and int(x.min()) >= 0 and int(x.max()) < module.num_embeddings
    if isinstance(module, nn.Conv2d):
        return x.dim() in (3, 4) and x.shape[-3] == module.in_channels
    return x.dim() > 0 and x.is_floating_point() and x.shape[-1] == weight_shape(module)[1]


def _moments(x: Tensor, geometry: Conv2dGeometry | None) -> _Sums:
    """Of the rows of x [..., k], or of the patches of the images x [N, c, height, width] or [c, height, width]."""
    parts = _rows(x) if geometry is None else _patches(x, geometry)
    sums: _Sums | None = None
    for part in parts:
        rows = part.to("cpu", torch.float64)
        own = _Sums(set(), len(rows), rows.sum(dim=0), rows.T @ rows)
        if sums is None:
            sums = own
        else:
            sums.add(own)
    assert sums is not None
    return sums


def _rows(x: Tensor) -> Iterator[Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    yield from rows.split(max(1, _CHUNK // rows.shape[1]))


def _patches(x: Tensor, geometry: Conv2dGeometry) -> Iterator[Tensor]:
    """The inputs of one output each, in the order in which a row of the weight has them: [positions, c * height * width]."""
    top, bottom, left, right = geometry.sides
    images = pad(x.reshape(-1, *x.shape[-3:]), (left, right, top, bottom))
    size = images[0].numel() * geometry.kernel_size[0] * geometry.kernel_size[1]  # of an unfolded image, at most
    for part in images.split(max(1, _CHUNK // size)):
        unfolded = unfold(part, geometry.kernel_size, geometry.dilation, 0, geometry.stride)
        yield unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])


@contextmanager
def calibrate(model: nn.Module) -> Iterator[Calibration]:
    """Watches the inputs of a model's layers while batches run through it.

        with pc.calibrate(model) as calibration:
            for batch in batches:
                model(batch)
        model = pc.compress(model, pc.LowRank(96), calibration=calibration)

    A few hundred sentences or images like those that the model is for are enough for most layers: their rows (tokens, positions)
    should be several times as many as a layer has input features. Every row counts alike, padding too: use batches of like lengths.

    Args:
        model: any ``nn.Module`` with linear layers (``nn.Linear``, transformers' ``Conv1D``), ``nn.Conv2d`` or ``nn.Embedding``.
            Its layers carry hooks inside the ``with`` block, and lose them at its end, also when an error ends it.
    Yields:
        The :class:`Calibration`, to be read when the block has ended. For each layer met, in float64: the second moment and the
        mean of its inputs, of a convolution those of its patches, of an embedding how often each token came; over all batches.
    Raises:
        TypeError: no module. ValueError: from the model's call, where the input of a layer holds NaN or Inf.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate: model is {type(model).__name__}, expected a torch.nn.Module")
    calibration = Calibration(model)
    try:
        yield calibration
    finally:
        calibration._finish()
