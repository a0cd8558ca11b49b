"""What the grids of all ops share: cells, how one is measured, its records with their floors, and scopes of a summary.

All candidates of a cell (k, n, m) take their turns in one run, so that each is compared with others that were timed beside it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from pycompress.benchmark.environment import l3_bytes, probe_bandwidth, probe_peaks
from pycompress.benchmark.harness import Timing, interleave, rotating
from pycompress.benchmark.peers import Bind, Build, Call, dense_linear, relative_error
from pycompress.benchmark.results import Comparison, Record, compare, microseconds, time_ratios
from pycompress.methods.method import Method
from pycompress.nn import LAYERS, CompressedLayer, SparseLinear

GRID_SHAPES = ((384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768), (4096, 4096))  # (k, n)
GRID_ROWS = (1, 8, 32, 128, 512)
QUICK_SHAPES = ((384, 1536), (768, 768))
QUICK_ROWS = (1, 32, 512)
MAX_COPIES = 96  # layers so small that more copies would be needed to leave the cache get no cold figure
FEW_ROWS = 32  # up to here reading the weights may take longer than computing with them
DENSE_FP32 = ("torch_fp32", "ort_fp32")

# ------------------------------------------------------------------------------------------------- candidates


def packed_call(layer: CompressedLayer) -> Bind:
    """One of our layers, and what its weight takes."""

    def bind(x: torch.Tensor) -> Call:
        run = partial(layer, x)
        return Call(run, run, layer.packed.nbytes, layer.format if isinstance(layer, SparseLinear) else "")

    return bind


@dataclass(frozen=True)
class Candidate:
    """What is timed; a grid's own says which weights it gets."""

    build: Callable[..., Bind]  # from the parts of its Work

    def __call__(self, *parts: Any) -> Bind:
        return self.build(*parts)


class Work(NamedTuple):
    """What a candidate computes.

    Attributes:
        parts: what it is built of.
        exact: x [m, k] -> y [m, n] in float32 with the same weights, or with those that were there before rounding.
        operations: bits of weights -> multiply-adds with such weights, a row of x.
        weight_bytes: what the weight takes, where the candidate's calls do not say.
        facts: what its records say about the weight.
    """

    parts: tuple[Any, ...]
    exact: Callable[[torch.Tensor], torch.Tensor]
    operations: Mapping[int, int]
    weight_bytes: int
    facts: Callable[[Call], Record] = lambda _: {}


class Chosen(NamedTuple):
    """The candidates that run here, why others do not, and those that take part in warm one-row cells alone."""

    candidates: Mapping[str, Any]
    missing: Mapping[str, str]
    spinning: Mapping[str, Any] = {}


def ours(method: Method) -> Build:
    """Our layer, with what a method makes of a dense one's weight."""
    layer = LAYERS["linear", method.name]
    return lambda linear: packed_call(layer.from_dense(linear, method=method))


# ------------------------------------------------------------------------------------------------------ a run


class Turns(NamedTuple):
    """How long a cell is measured, as interleave() takes it."""

    rounds: int = 11
    min_time_s: float = 0.02
    pause_s: float = 0.02
    budget_s: float = math.inf


class Run(NamedTuple):
    """The times of a cell's candidates, and what the machine could do around them."""

    timings: dict[str, Timing]
    peak_gops: dict[str, float]  # of each loop of the probe, the faster of before and after


def run_cell(calls: Mapping[str, Call], turns: Turns, before: Run | None = None) -> Run:
    """The calls take their turns; ``before``: what ran already, to which this is added, with as many rounds."""
    if before is not None:
        done = len(next(iter(before.timings.values())).seconds)
        run = run_cell(calls, turns._replace(rounds=done, budget_s=math.inf))
        peaks = {loop: max(peak, run.peak_gops[loop]) for loop, peak in before.peak_gops.items()}
        return Run(before.timings | run.timings, peaks)
    with torch.inference_mode():
        first = probe_peaks()
        timings = interleave({name: call.run for name, call in calls.items()}, **turns._asdict())
        return Run(timings, {loop: max(first[loop], after) for loop, after in probe_peaks().items()})


def copies_to_leave_cache(layer_bytes: int) -> int:
    """How many copies of a layer hold half as much again as the last-level cache (at least 2)."""
    return max(2, math.ceil(1.5 * l3_bytes() / max(layer_bytes, 1)))


def cold_call(build: Callable[..., Bind], parts: tuple[Any, ...], x: torch.Tensor, weight_bytes: int) -> Call:
    """A candidate that rotates over copies of a layer, and so meets its weights outside the cache."""
    calls = []
    for _ in range(copies_to_leave_cache(weight_bytes)):
        call = build(*copy.deepcopy(parts))(x)
        with torch.inference_mode():
            call.run()  # the worker of a new ONNX Runtime session spins until its first run has ended
        calls.append(call)
    return calls[0]._replace(run=rotating([call.run for call in calls]))


# --------------------------------------------------------------------------------------------------- a record

PEAK_LOOPS = {32: "fp32_fma", 8: "maddubs_d2", 4: "maddubs_d8"}  # bits of the weights -> the loop of the probe
Operations = Mapping[int, int]  # bits of the weights -> how many operations are done with them


def limits(
    m: int, operations: Operations, weight_bytes: int, peak_gops: Mapping[str, float], read_bytes: int | None = None
) -> Record:
    """What a record says about the machine, and how long a layer takes on it at least.

    `read_bytes` is what the probe of the bandwidth reads again and again: the weight, where nothing else is said.
    """
    bandwidth = probe_bandwidth(read_bytes or weight_bytes, seconds=0.005) if m <= FEW_ROWS else None
    floor = floor_us(operations, peak_gops, weight_bytes, bandwidth)
    return {"peak_gops": peak_gops, "bandwidth_gbs": bandwidth, "floor_us": floor}


def floor_us(
    operations: Operations, peak_gops: Mapping[str, float], n_bytes: int, bandwidth_gbs: float | None
) -> float | None:
    """The longer of computing at the peak and of reading the weights once; None where neither rate is known."""
    peaks = {bits: peak_gops.get(PEAK_LOOPS[bits]) for bits in operations}
    computing = [1e-3 * operations[bits] / peak for bits, peak in peaks.items() if peak]
    times = [sum(computing)] if len(computing) == len(operations) else []
    if bandwidth_gbs:
        times.append(1e-3 * n_bytes / bandwidth_gbs)
    return max(times, default=None)


def times(name: str, timings: Mapping[str, Timing], references: Iterable[str]) -> Record:
    """What a record says about a candidate's time, and about that of each of `references` beside it."""
    ratios = time_ratios(name, timings, references)
    # Four digits: the fourth is noise already.
    rounded = {other: [float(f"{value:.4g}") for value in found] for other, found in ratios.items()}
    return {"rounds": len(timings[name].seconds), **microseconds(timings[name]), "time_ratio": rounded}


def rates(record: Record, multiply_adds: int) -> Record:
    """What follows from a record's time; `multiply_adds` that are really done, a row of x."""
    operations = 2e-3 * record["m"] / record["us"]
    floor = record["floor_us"]
    return {
        "gops": operations * record["k"] * record["n"],
        "effective_gops": operations * multiply_adds,
        "share_of_floor": None if floor is None else floor / record["us"],
    }


def cell_record(cell: Record, name: str, call: Call, work: Work, run: Run, references: Sequence[str]) -> Record:
    """What is said about a candidate in a cell; without the error."""
    weight_bytes = call.weight_bytes or work.weight_bytes
    operations = {bits: 2 * cell["m"] * count for bits, count in work.operations.items()}
    read_bytes = 2 * l3_bytes() if is_cold(cell) else weight_bytes
    found = {
        **cell,
        "candidate": name,
        **work.facts(call),
        "weight_bytes": weight_bytes,
        **limits(cell["m"], operations, weight_bytes, run.peak_gops, read_bytes),
        **times(name, run.timings, references),
    }
    return {**found, **rates(found, sum(work.operations.values()))}


def is_cold(cell: Record) -> bool:
    return cell.get("weights") == "cold"


# ------------------------------------------------------------------------------------------------------ grids


@dataclass(frozen=True)
class Grid:
    """The grid of one op.

    Attributes:
        op: as the records name it.
        works: from a dense layer and the candidates by name, what each of them computes.
        is_reference: whether the times of others are compared with those of a candidate of this name.
        chosen: looks for those that run here.
        summaries: what is drawn from the records, in lines.
        shapes, rows, rounds: what is measured where nothing else is asked for.
        smallest_bits: of a weight of the smallest candidate, where one row meets cold weights as well.
        record: what is said about a candidate in a cell.
    """

    op: str
    works: Callable[[nn.Linear, Mapping[str, Any]], dict[str, Work]]
    is_reference: Callable[[str], bool]
    chosen: Callable[[], Chosen]
    summaries: tuple[Callable[[Sequence[Record]], Sequence[object]], ...]
    shapes: tuple[tuple[int, int], ...] = GRID_SHAPES
    rows: tuple[int, ...] = GRID_ROWS
    rounds: int = 11
    smallest_bits: int | None = None
    record: Callable[[Record, str, Call, Work, Run, Sequence[str]], Record] = cell_record

    def cells(
        self, shapes: Sequence[tuple[int, int]], rows: Sequence[int], *, cold: bool = True, **facts: Any
    ) -> list[Record]:
        """The cells {k, n, m, and the facts}; in grids with cold weights {k, n, m, weights}, where one row meets both."""
        if self.smallest_bits is None:
            return [{"k": k, "n": n, "m": m, **facts} for k, n in shapes for m in rows]
        cells: list[Record] = []
        for k, n in shapes:
            cells += [{"k": k, "n": n, "m": m, "weights": "warm"} for m in rows]
            if cold and 1 in rows and copies_to_leave_cache(k * n * self.smallest_bits // 8) <= MAX_COPIES:
                cells.append({"k": k, "n": n, "m": 1, "weights": "cold"})
        return cells

    def measure(
        self,
        cells: Iterable[Record],
        candidates: Mapping[str, Any],
        *,
        spinning: Mapping[str, Any] | None = None,
        layer: Callable[[int, int], nn.Linear] = dense_linear,
        rounds: int = 11,
        min_time_s: float = 0.02,
        pause_s: float = 0.02,
        budget_s: float = math.inf,
    ) -> Iterator[list[Record]]:
        """Times the candidates on each of the :meth:`cells`, and yields its records, one per candidate.

        `spinning` holds candidates for the warm one-row cells alone, timed after the others; `layer` gives the dense layer of a
        shape (k, n); `budget_s` is what a cell's turns may take, see interleave(). A record holds `op`, the cell and `candidate`;
        what the op's :class:`Work` says; `weight_bytes`, `rounds`, `us` (median) and `us_quartiles`; `gops` (as if the layer were
        dense) and `effective_gops` (of the products that are done); `peak_gops` (the faster of the probes before and after);
        `bandwidth_gbs` (up to FEW_ROWS rows the probe's rate at the size of the weight, or beyond the cache for cold ones);
        `floor_us` and `share_of_floor` (floor_us / us); `time_ratio`: median and quartiles of the time of each reference over
        this one's; and `relative_error` (Frobenius, to float32).
        """
        turns, built_for = Turns(rounds, min_time_s, pause_s, budget_s), None
        for cell in cells:
            k, n, m = cell["k"], cell["n"], cell["m"]
            if built_for != (k, n):
                everybody = {**candidates, **(spinning or {})}
                works, built_for = self.works(layer(k, n), everybody), (k, n)
                built = {name: build(*works[name].parts) for name, build in candidates.items()}
            x = torch.randn(
                m, k, generator=torch.Generator(device="cpu").manual_seed(m), dtype=torch.float32, device="cpu"
            )
            calls = {name: bind(x) for name, bind in built.items()}
            if is_cold(cell):
                sizes = {name: call.weight_bytes or works[name].weight_bytes for name, call in calls.items()}
                calls = {name: cold_call(candidates[name], works[name].parts, x, size) for name, size in sizes.items()}
            run = run_cell(calls, turns)
            if (
                m == 1 and spinning and not is_cold(cell)
            ):  # workers that spin on would steal the cores from whoever is next
                further = {name: build(*works[name].parts)(x) for name, build in spinning.items()}
                run, calls = run_cell(further, turns, before=run), calls | further
            references = [name for name in run.timings if self.is_reference(name)]
            records = []
            for name, call in calls.items():
                found = self.record({"op": self.op, **cell}, name, call, works[name], run, references)
                with torch.inference_mode():
                    records.append({**found, "relative_error": relative_error(call.output(), works[name].exact(x))})
            yield records


# ---------------------------------------------------------------------------------------------------- summary

Scopes = Mapping[str, Sequence[Record]]  # in words -> the records


def with_rows(records: Iterable[Record], fewest: int, most: float = math.inf) -> list[Record]:
    return [record for record in records if fewest <= record["m"] <= most]


def compare_each(candidate: str, peers: Sequence[str], against: str, scopes: Scopes) -> list[Comparison]:
    """compare() in each of the scopes where they met."""
    lines = (compare(part, candidate, peers, against=against, scope=scope) for scope, part in scopes.items())
    return [line for line in lines if line is not None]


def against_dense(candidate: str, scopes: Scopes) -> list[Comparison]:
    return compare_each(candidate, DENSE_FP32, "the best dense fp32", scopes)


def against_int8(candidate: str, scopes: Scopes) -> list[Comparison]:
    return compare_each(candidate, ("dense_int8",), "our dense int8", scopes)
