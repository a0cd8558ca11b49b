"""``Sums``: what some layers have met, row after row, as far as it is needed."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from pycompress.calibration.products import BLOCK, BLOCKS, STEP, add_products, fits_float32, mirror, wide
from pycompress.methods.histogram import Histogram
from pycompress.methods.inputs import LAST_CALLS, InputStatistics, kept

Room = Callable[[int], Tensor]  # zeros [k, k], for a second moment


class Sums:
    """Of the rows that the layers in ``users`` (ids of modules) have met, all of them together.

    Rows wait until there are ``BLOCK``: many short inputs cost no more than a few long ones.

    Args:
        users: the layers.
        k: features of a row.
        parts: those of ``inputs.PARTS`` that are gathered.
        room: where a second moment is kept.
    """

    def __init__(self, users: set[int], k: int, parts: frozenset[str], room: Room) -> None:
        self.users, self.k, self.parts, self._room = users, k, parts, room
        self.rows = 0
        width = wide(k)  # of products that threads split in one way
        zeros = torch.zeros(width, dtype=torch.float64, device="cpu")
        self.first = zeros if parts & {"moments", "diagonals"} else None
        self.square = zeros.clone() if "diagonals" in parts and "moments" not in parts else None
        self.second = room(width) if "moments" in parts else None
        ranges = bool(parts & {"ranges", "histograms", "extremes"})
        self.low = zeros + torch.inf if ranges else None
        self.high = zeros - torch.inf if ranges else None
        self.values = Histogram.empty() if "histograms" in parts else None
        self.extremes = zeros.new_empty(LAST_CALLS, 2) if "extremes" in parts else None  # in turns
        self.calls = 0
        self._waiting = torch.empty(0, width, dtype=torch.float32, device="cpu")
        self._count, self._largest = 0, 0.0  # of the rows that wait

    def called(self, low: float, high: float) -> None:
        """The layers have met one input more, which lies between these ends; its rows follow."""
        if self.extremes is not None:
            self.extremes[self.calls % LAST_CALLS] = self.extremes.new_tensor([low, high])
        self.calls += 1

    def add(self, rows: Tensor, largest: float) -> None:
        """rows: floating point [r, k], on any device, finite; ``largest``: no magnitude is larger."""
        self.rows += len(rows)
        rows = rows.detach()
        if rows.dtype == torch.float64:
            for some in rows.split(BLOCK * BLOCKS):
                self._take(self._widened(some.to("cpu")), largest, exact=True)
            return
        if self._count:
            missing = BLOCK - self._count
            self._wait(rows[:missing], largest)
            rows = rows[missing:]
        whole = len(rows) - len(rows) % BLOCK
        for some in rows[:whole].split(BLOCK * BLOCKS):
            if len(some):
                self._take(self._widened(some.to("cpu", torch.float32)), largest)
        self._wait(rows[whole:], largest)

    def without(self, users: set[int]) -> Sums:
        """What these have met, by themselves from now on; the others go on here."""
        own = copy(self)
        own.users, self.users = users, self.users - users
        for name in ("first", "square", "low", "high", "extremes", "_waiting"):
            value = getattr(self, name)
            setattr(own, name, None if value is None else value.clone())
        if self.second is not None:
            own.second = self._room(len(self.second)).copy_(self.second)
        return own

    def statistics(self) -> InputStatistics:
        """Ends it: the sums become means in place."""
        self._flush()
        k, moment = self.k, self.second
        if moment is not None:
            mirror(moment)
            moment /= self.rows
            moment = moment[:k, :k]
        mean, square = (None if sums is None else sums[:k] / self.rows for sums in (self.first, self.square))
        low, high = (None if ends is None else ends[:k] for ends in (self.low, self.high))
        values = {} if self.values is None else kept(self.values)
        return InputStatistics(
            self.rows, moment, mean, mean_square=square, low=low, high=high, **values, extremes=self._last_extremes()
        )

    def _last_extremes(self) -> Tensor | None:
        if self.extremes is None or self.calls <= LAST_CALLS:
            return None if self.extremes is None else self.extremes[: self.calls]
        return self.extremes.roll(-(self.calls % LAST_CALLS), 0)

    def _widened(self, rows: Tensor) -> Tensor:
        return rows if self.k % STEP == 0 else torch.nn.functional.pad(rows, (0, wide(self.k) - self.k))

    def _wait(self, rows: Tensor, largest: float) -> None:
        if not len(rows):
            return
        if not len(self._waiting):
            self._waiting = self._waiting.new_empty(BLOCK, self._waiting.shape[1])
        stop = self._count + len(rows)
        self._waiting[self._count : stop] = self._widened(rows)
        self._count, self._largest = stop, max(self._largest, largest)
        if stop == BLOCK:
            self._flush()

    def _flush(self) -> None:
        if self._count:
            self._take(self._waiting[: self._count], self._largest)
        self._count, self._largest = 0, 0.0

    def _take(self, rows: Tensor, largest: float, *, exact: bool = False) -> None:
        """float32 or float64 [r, width], r <= BLOCK * BLOCKS."""
        if self.low is not None and self.high is not None:
            torch.minimum(self.low, rows.amin(dim=0), out=self.low)
            torch.maximum(self.high, rows.amax(dim=0), out=self.high)
        if self.values is not None:
            self.values = self.values.with_values(rows[:, : self.k], largest)
        if not (exact or fits_float32(largest)):
            rows = rows.double()
        for block in rows.split(BLOCK):
            if self.first is not None:
                self.first += block.sum(dim=0)
            if self.square is not None:
                self.square += block.square().sum(dim=0)
        if self.second is not None:
            add_products(self.second, rows)
