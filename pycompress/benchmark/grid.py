"""What the sparse and the low-rank grid share: shapes, the run of a cell, floors, and scopes of a summary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from pycompress.benchmark.environment import probe_bandwidth, probe_peaks
from pycompress.benchmark.harness import Timing, interleave, ratio
from pycompress.benchmark.peers import Bind, Call
from pycompress.benchmark.results import Comparison, Record, compare
from pycompress.methods.int8 import Int8
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.linear import CompressedLinear
from pycompress.nn.sparse import SparseLinear

GRID_SHAPES = ((384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768), (4096, 4096))  # (k, n)
GRID_ROWS = (1, 8, 32, 128, 512)
FEW_ROWS = 32  # up to here reading the weights may take longer than computing with them
DENSE_FP32 = ("torch_fp32", "ort_fp32")

# ------------------------------------------------------------------------------------------------- candidates


def packed_call(layer: CompressedLinear) -> Bind:
    """One of our layers, and what its weight takes."""

    def bind(x: torch.Tensor) -> Call:
        run = partial(layer, x)
        return Call(run, run, layer.packed.nbytes, layer.format if isinstance(layer, SparseLinear) else "")

    return bind


def dense_int8_layer(linear: nn.Linear) -> Int8Linear:
    return Int8Linear.from_dense(linear, method=Int8(activation_bits=7))


def dense_int8(linear: nn.Linear) -> Bind:
    return packed_call(dense_int8_layer(linear))


# ----------------------------------------------------------------------------------------------------- a cell


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


def run_cell(calls: Mapping[str, Call], turns: Turns) -> Run:
    """All candidates of a cell take their turns."""
    with torch.inference_mode():
        before = probe_peaks()
        timings = interleave({name: call.run for name, call in calls.items()}, **turns._asdict())
        return Run(timings, {loop: max(before[loop], after) for loop, after in probe_peaks().items()})


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
    own = timings[name]
    ratios = {other: ratio(timings[other], own) for other in references if other != name}
    return {
        "rounds": len(own.seconds),
        "us": own.median * 1e6,
        "us_quartiles": [value * 1e6 for value in own.quartiles],
        # Four digits: the fourth is noise already.
        "time_ratio": {other: [float(f"{value:.4g}") for value in found] for other, found in ratios.items()},
    }


def rates(record: Record, multiply_adds: int) -> Record:
    """What follows from a record's time; `multiply_adds` that are really done, a row of x."""
    operations = 2e-3 * record["m"] / record["us"]
    floor = record["floor_us"]
    return {
        "gops": operations * record["k"] * record["n"],
        "effective_gops": operations * multiply_adds,
        "share_of_floor": None if floor is None else floor / record["us"],
    }


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
