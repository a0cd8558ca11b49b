"""``Evaluation``: what :func:`evaluate` found, as records, as a table and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pycompress.evaluation.bootstrap import Interval
from pycompress.evaluation.latency import Latency
from pycompress.evaluation.sizes import Sizes


@dataclass(frozen=True)
class Figure:
    """One metric.

    Attributes:
        name: of the metric.
        model, baseline: of both, on the same rows; None where there is none: of the baseline itself what compares with it, and both
            where ``reason`` says why the metric failed.
        difference: model less baseline, with the rows drawn for both together.
        higher_is_better: None where nobody has said.
        worse: what was done to the inputs: ``noise 0.1``; '' for nothing.
    """

    name: str
    model: Interval | None = None
    baseline: Interval | None = None
    difference: Interval | None = None
    higher_is_better: bool | None = None
    worse: str = ""
    reason: str = ""

    @property
    def verdict(self) -> str:
        """``no loss shown``, ``loss`` or ``gain``, where there is a difference with an interval: whether that holds 0, or on which
        side of it it lies. No loss shown is not none: the interval says how large one could be."""
        own = self.difference
        if own is None or own.low is None or own.high is None:
            return ""
        if own.low <= 0 <= own.high:
            return "no loss shown"
        if self.higher_is_better is None:
            return "differs"
        return "gain" if (own.low > 0) is self.higher_is_better else "loss"


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`; ``str()`` is a table.

    Attributes:
        rows: how many were judged.
        figures: of each metric, and again for each way of making the inputs worse.
        sizes, baseline_sizes: None where ``notes`` says why not.
        latencies: for each number of rows that was asked for.
        confidence, resamples, seed: of the intervals.
        environment: what times depend on: processor, threads, versions.
        notes: what else could not be had, and why.
    """

    rows: int
    figures: list[Figure]
    sizes: Sizes | None
    baseline_sizes: Sizes | None
    latencies: list[Latency]
    confidence: float
    resamples: int
    seed: int
    environment: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> dict[str, str]:
        """Why each metric failed that did."""
        return {f"{one.name} {one.worse}".rstrip(): one.reason for one in self.figures if one.reason}

    @property
    def compression_ratio(self) -> float | None:
        """The baseline's bytes on disk over the model's."""
        return ratio(self.baseline_sizes, self.sizes, "disk_bytes")

    def __getitem__(self, name: str) -> Figure:
        """The figure of a metric on inputs as they are. Raises KeyError."""
        for figure in self.figures:
            if figure.name == name and not figure.worse:
                return figure
        raise KeyError(name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        figures = [{**asdict(figure), "verdict": figure.verdict} for figure in self.figures]
        return {**asdict(self), "figures": figures, "failed": self.failed, "compression_ratio": self.compression_ratio}

    def __str__(self) -> str:
        lines = _table([("metric", "model", "baseline", "difference", ""), *map(_of_figure, self.figures)])
        lines.append(f"{self.rows:,} rows; {self.confidence:.0%} intervals of {self.resamples:,} bootstrap draws")
        if self.sizes is not None:
            lines += ["", *_table([("", "model", "baseline", "ratio"), *size_rows(self.sizes, self.baseline_sizes)])]
        if self.latencies:
            head = ("rows", "p50 ms", "p95 ms", "rows/s", "baseline p50", "p95", "speed-up")
            lines += ["", *_table([head, *map(latency_row, self.latencies)])]
        return "\n".join([*lines, *self.notes])


def ratio(baseline: Sizes | None, sizes: Sizes | None, name: str) -> float | None:
    """How many times as much the baseline has."""
    if baseline is None or sizes is None:
        return None
    before, after = getattr(baseline, name), getattr(sizes, name)
    return before / after if before is not None and after else None


SIZES = {  # what tables say of each field
    "parameters": "parameters",
    "nonzeros": "non-zeros",
    "macs": "MACs a row",
    "flops": "FLOPs a row",
    "memory_bytes": "bytes in memory",
    "disk_bytes": "bytes on disk",
}


def size_rows(sizes: Sizes, baseline: Sizes | None) -> list[tuple[str, ...]]:
    """(what, of the model, of the baseline, how many times as much that has) of each size."""

    def of(own: Sizes | None, name: str) -> str:
        value = None if own is None else getattr(own, name)
        if value is None or own is None:
            return "-"
        return f"{value / own.rows:,.0f}" if name in ("macs", "flops") else f"{value:,}"

    rows: list[tuple[str, ...]] = []
    for name, what in SIZES.items():
        times = ratio(baseline, sizes, name)
        rows.append((what, of(sizes, name), of(baseline, name), "-" if times is None else f"{times:.2f}"))
    return rows


def latency_row(one: Latency) -> tuple[str, ...]:
    """Rows, the model's p50, p95 and rows per second, the baseline's p50 and p95, and the speed-up with its quartiles."""
    own = (f"{one.rows:,}", f"{one.times.p50_ms:.3g}", f"{one.times.p95_ms:.3g}", f"{one.times.rows_per_s:,.0f}")
    if one.baseline is None or one.speedup is None:
        return (*own, "-", "-", "-")
    median, low, high = one.speedup
    return (*own, f"{one.baseline.p50_ms:.3g}", f"{one.baseline.p95_ms:.3g}", f"{median:.2f} ({low:.2f} to {high:.2f})")


def _of_figure(figure: Figure) -> tuple[str, ...]:
    cells = ["-" if one is None else str(one) for one in (figure.model, figure.baseline, figure.difference)]
    return (f"{figure.name} {figure.worse}".rstrip(), *cells, figure.reason or figure.verdict)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
