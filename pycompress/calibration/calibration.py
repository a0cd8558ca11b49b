"""``calibrate``: what the inputs of a model's layers look like, gathered from batches that run through it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pycompress.calibration import stored
from pycompress.calibration.description import Description
from pycompress.calibration.needs import Gather, parts_asked, parts_needed
from pycompress.calibration.positions import CONVENTION, Mask, Positions
from pycompress.calibration.sums import Room
from pycompress.calibration.watch import Watch
from pycompress.calls import Inputs, call_model, evaluating, uncompiled
from pycompress.methods.inputs import InputStatistics
from pycompress.replacing import FilePath

if TYPE_CHECKING:
    from typing_extensions import Self


class Calibration(Mapping[str, InputStatistics]):
    """The statistics of each layer that was met, by its name in the model (all of its names), once the ``with`` block has ended.

    Layers that meet the same input one after another (query, key and value; gate and up) share one second moment: in memory there
    is one [k, k] for each of these inputs.

    Attributes:
        text: what the user says of the data.
        calls: how often the model was called.
        running: whether its ``with`` block has not ended.
    """

    def __init__(
        self, statistics: Mapping[str, InputStatistics], *, text: str = "", calls: int = 0, watch: Watch | None = None
    ) -> None:  # fmt: skip
        self.text, self.calls, self.running = text, calls, watch is not None
        self._statistics = dict(statistics)
        self._watch = watch
        self._room = None if watch is None else watch.room  # where the moments lie

    def __enter__(self) -> Self:
        if self._watch is None or self._watch.running:
            raise RuntimeError("calibrate: this calibration has begun already, expected one `with` block for each")
        self._watch.begin()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        assert self._watch is not None
        watch, self._watch, self.running = self._watch, None, False
        self._statistics, self.calls = watch.end(), watch.calls
        if kind is None and watch.positions.unmet:
            raise ValueError(
                f"calibrate: no module was given a mask {watch.positions.mask!r} of the shape [batch, length]"
            )

    def __getitem__(self, name: str) -> InputStatistics:
        return self._statistics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)

    def __repr__(self) -> str:
        text = f", {self.text!r}" if self.text else ""
        return f"Calibration({len(self)} layers{text}{', running' if self.running else ''})"

    def describe(self) -> Description:
        """What there is of each layer, and what may be wrong with it: ``print`` it, or read its ``warnings``."""
        self._check_ended("describe")
        return Description(self, self.text, self.calls)

    def save(self, path: FilePath) -> None:
        """Writes it to a safetensors file, which takes the place of an older one whole or not at all.

        Raises:
            ValueError: its ``with`` block has not ended, or nothing was gathered. OSError: the file could not be written.
        """
        self._check_ended("save")
        stored.save(path, self._statistics, {"text": self.text, "calls": self.calls})

    @classmethod
    def load(cls, path: FilePath) -> Calibration:
        """What :meth:`save` wrote.

        Raises:
            ValueError: the file is another, or damaged: nothing of it is taken. OSError: it could not be read.
        """
        statistics, facts = stored.load(path)
        return cls(statistics, **facts)

    def _check_ended(self, what: str) -> None:
        if self.running:
            raise ValueError(
                f"Calibration.{what}: the calibration is still running, expected its `with` block to have ended"
            )


def _room(folder: FilePath | None, dtype: torch.dtype) -> Room:
    """Where second moments are kept."""
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"calibrate: dtype is {dtype}, expected torch.float64 or torch.float32")
    if folder is None:
        return lambda k: torch.zeros(k, k, dtype=dtype, device="cpu")
    if not os.path.isdir(folder):
        raise ValueError(f"calibrate: folder is {os.fspath(folder)!r}, expected one that is there")
    directory = TemporaryDirectory(prefix="calibration-", dir=folder, ignore_cleanup_errors=True)
    numbers = itertools.count()

    def mapped(k: int) -> Tensor:  # (it holds the directory, which is gone when nobody holds it)
        file = os.path.join(directory.name, f"{next(numbers)}.moment")
        return torch.from_file(file, shared=True, size=k * k, dtype=dtype, device="cpu").view(k, k)

    return mapped


def calibrate(
    model: nn.Module,
    batches: Iterable[Inputs] | None = None,
    *,
    plan: Any = None,
    gather: Gather | None = None,
    mask: Mask = CONVENTION,
    dtype: torch.dtype = torch.float64,
    folder: FilePath | None = None,
    description: str = "",
) -> Calibration:
    """Watches the inputs of a model's layers while batches run through it.

        calibration = pc.calibrate(model, batches)

        with pc.calibrate(model) as calibration:  # or, where the model is to be called in another way
            for batch in batches:
                model.generate(batch)

        model = pc.compress(model, pc.LowRank(96), calibration=calibration)

    A few hundred sentences or images like those that the model is for are enough for most layers: their rows (tokens, positions)
    should be several times as many as a layer has input features; :meth:`Calibration.describe` says where they are not. Every row
    counts alike, but padding does not count: see ``mask``.

    Args:
        model: any ``nn.Module`` with linear layers (``nn.Linear``, transformers' ``Conv1D``), ``nn.Conv1d``, ``nn.Conv2d`` or
            ``nn.Embedding``, in float32, float64, bfloat16 or float16. One that ``torch.compile`` made runs uncompiled for that
            long. Its layers carry hooks while they are watched, and lose them at the end, also when an error ends it.
        batches: inputs as ``compress`` takes them, each a tensor, a sequence of positional or a mapping of keyword arguments. The
            model runs in evaluation mode; it, the batches and the random state are left as they were. None: the ``with`` block runs
            the model, in whatever mode it is.
        plan: the plan that will be given to ``compress``: of each layer, what its method makes use of is gathered, and no more;
            where that is nothing for all of them, the model is not run.
        gather: instead of a plan, for all layers: ``moments`` (default), k^2 numbers for a layer of k features; ``diagonals``,
            their mean squares alone; ``ranges``, the lowest and highest values; ``histograms``, how often each value came, and
            ``extremes``, the ends of the last 1,024 calls, both with the ranges; or several of them.
        mask: which positions count: the name of an argument of the model, or of modules in it, a tensor [batch, length] that is
            not 0 there; or a function that makes such a tensor, or None, of all arguments of the model by name. Others are left
            out in each layer whose input is [batch, length, ...] or [batch * length, ...]; other inputs (pooled, images) count
            whole, and so does everything with None. By default transformers' ``attention_mask``, where there is one; while text is
            generated, the end of it that is for the new tokens. Of torch's transformers ``src_key_padding_mask`` and
            ``tgt_key_padding_mask`` are read besides.
        dtype: in which second moments are kept: ``torch.float64`` or, for half the memory, ``torch.float32``.
        folder: a folder for second moments, which are mapped from files there and not held in memory; the files are gone when the
            calibration is. ``save`` it to keep it.
        description: what the data are, for :meth:`Calibration.describe` and for the file.
    Returns:
        The :class:`Calibration`, to be read when the block has ended. For each layer met: the second moment and the mean of its
        inputs, of a convolution those of its patches, of an embedding how often each token came; over all batches.
    Raises:
        TypeError: no module, no plan, or one input in place of several. ValueError: no layer that could be watched, both a plan and
            gather, other values, or no mask where one was asked for by another name; from the model's call, where the input of a
            layer holds NaN, Inf, or numbers whose squares are too large for float64.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate: model is {type(model).__name__}, expected a torch.nn.Module")
    if plan is not None and gather is not None:
        raise ValueError(f"calibrate: plan and gather={gather!r} were given, expected one of them")
    model = uncompiled(model)
    parts = parts_asked("moments" if gather is None else gather)

    def needs(names: Mapping[Any, list[str]]) -> Mapping[Any, frozenset[str]]:
        return dict.fromkeys(names, parts) if plan is None else parts_needed(plan, names)

    watch = Watch(model, Positions(model, mask), needs, _room(folder, dtype))
    calibration = Calibration({}, text=description, watch=watch)
    if batches is None:
        return calibration
    if isinstance(batches, Tensor | Mapping | str):
        raise TypeError(
            f"calibrate: batches is {type(batches).__name__}, expected several inputs: a list, or a generator"
        )
    with calibration:
        for batch in () if watch.idle else batches:
            with evaluating(model, batch):
                call_model(model, batch)
    return calibration
