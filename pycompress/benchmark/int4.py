"""The int4 grid: `pycompress bench int4` and `benchmarks/kernels.py --op int4`.

All candidates of a cell take their turns in one run. Those with 4-bit weights in groups of the same size hold the same ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from pycompress.benchmark.environment import l3_bytes
from pycompress.benchmark.grid import (
    GRID_SHAPES,
    Run,
    Turns,
    against_dense,
    compare_each,
    limits,
    packed_call,
    rates,
    run_cell,
    times,
    with_rows,
)
from pycompress.benchmark.int8 import cold_call, int8_cells
from pycompress.benchmark.peers import (
    Bind,
    Call,
    available,
    dense_linear,
    ort_fp32,
    ort_int4,
    relative_error,
    torch_fp32,
)
from pycompress.benchmark.results import Comparison, Record
from pycompress.methods.int4 import Int4, Int4Weight
from pycompress.methods.int8 import Int8
from pycompress.nn.int4 import Int4Linear
from pycompress.nn.int8 import Int8Linear

# ------------------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class Candidate:
    """What is timed, and the weights that it gets."""

    build: Callable[..., Bind]  # from nn.Linear; with a group from Int4Weight and the bias
    group: int = 0  # positions that share a scale
    peak_bits: int = 32  # 32, 8 or 4: which loop of the probe its products are like


def int4_layer(activation_bits: int) -> Callable[[Int4Weight, torch.Tensor], Bind]:
    def build(weight: Int4Weight, bias: torch.Tensor) -> Bind:
        return packed_call(Int4Linear.from_weight(replace(weight, activation_bits=activation_bits), bias))

    return build


def int8_layer(activation_bits: int) -> Callable[[nn.Linear], Bind]:
    method = Int8(activation_bits=activation_bits)
    return lambda linear: packed_call(Int8Linear.from_dense(linear, method=method))


def matmul_nbits(spinning: bool) -> dict[str, Candidate]:
    """MatMulNBits in blocks of 32 and 128, in float32 and (a8) with x rounded to 8 bits."""
    found = {}
    for group in (32, 128):
        for name, level, peak_bits in ((f"nbits_{group}", 0, 32), (f"nbits_{group}_a8", 4, 8)):
            build = partial(ort_int4, accuracy_level=level, spinning=spinning)
            found[f"{name}_spinning" if spinning else name] = Candidate(build, group, peak_bits)
    return found


OURS = {
    "pycompress_int4": Candidate(int4_layer(8), 32, 4),
    "pycompress_int4_g128": Candidate(int4_layer(8), 128, 4),
    "pycompress_int4_a16": Candidate(int4_layer(16), 32),
}
INT8 = {"int8_a7": Candidate(int8_layer(7), peak_bits=8), "int8_a8": Candidate(int8_layer(8), peak_bits=8)}
INT4_PEERS = {"torch_fp32": Candidate(torch_fp32), "ort_fp32": Candidate(ort_fp32), **matmul_nbits(spinning=False)}
INT4_SPINNING = matmul_nbits(spinning=True)  # ONNX Runtime as it comes: its workers spin on, which pays at one row


def int4_candidates() -> tuple[dict[str, Candidate], dict[str, str]]:
    """Ours and those of `INT4_PEERS` that run here; for the others, why not."""
    builds = {name: partial(_alone, candidate) for name, candidate in INT4_PEERS.items()}
    usable, missing = available(builds)
    return {**OURS, **INT8, **{name: INT4_PEERS[name] for name in usable}}, missing


def _alone(candidate: Candidate, linear: nn.Linear) -> Bind:
    return _built(candidate, linear, _weights(linear, {"": candidate}))


def _weights(linear: nn.Linear, candidates: Mapping[str, Candidate]) -> dict[int, Int4Weight]:
    """The layer's 4-bit weights for each size of groups."""
    groups = {candidate.group for candidate in candidates.values() if candidate.group}
    return {group: Int4(group).compress(linear.weight) for group in groups}


def _built(candidate: Candidate, linear: nn.Linear, weights: Mapping[int, Int4Weight]) -> Bind:
    if candidate.group:
        return candidate.build(weights[candidate.group], linear.bias)
    return candidate.build(linear)


# ------------------------------------------------------------------------------------------------------- grid

INT4_SHAPES = (*GRID_SHAPES, (4096, 14336))  # (k, n); the last is that of a language model with 8e9 weights


def int4_cells(shapes: Sequence[tuple[int, int]], rows: Sequence[int], *, cold: bool = True) -> list[Record]:
    """The cells {k, n, m, weights} of a grid: all with warm weights, and one row with cold ones as well."""
    return int8_cells(shapes, rows, cold=cold, bits=4)


def measure_int4(
    cells: Iterable[Record],
    candidates: Mapping[str, Candidate],
    *,
    spinning: Mapping[str, Candidate] | None = None,
    rounds: int = 11,
    min_time_s: float = 0.02,
    pause_s: float = 0.02,
    budget_s: float = 20.0,
) -> Iterator[list[Record]]:
    """Time the candidates on each cell of `int4_cells`, and yield its records, one per candidate.

    `spinning` holds candidates for the warm one-row cells alone, timed after the others; `budget_s` is what a cell's turns
    may take, see interleave(). A record holds the cell and: `candidate`, `group`, `weight_bytes`, `rounds`, `us` (median)
    and `us_quartiles`, `gops`, `peak_gops`, `bandwidth_gbs` (beyond the cache for cold weights), `floor_us` and
    `share_of_floor` as in the sparse grid, `relative_error` (Frobenius, to float32 before the weights were rounded), and
    `time_ratio`: median and quartiles of the time of each candidate but those of ours with 4 bits over this one's.
    """
    weights: dict[int, Int4Weight] = {}
    built: dict[str, Bind] = {}
    built_for = None
    for cell in cells:
        k, n, m = cell["k"], cell["n"], cell["m"]
        linear = dense_linear(k, n)
        if built_for != (k, n):
            weights = _weights(linear, candidates)
            built = {name: _built(candidate, linear, weights) for name, candidate in candidates.items()}
            built_for = (k, n)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        calls = {name: bind(x) for name, bind in built.items()}
        here, extra = dict(candidates), dict[str, Candidate]()
        if cell["weights"] == "cold":
            calls = {name: _cold(here[name], linear, weights, x, call) for name, call in calls.items()}
        elif m == 1:
            extra = dict(spinning or {})
        run = run_cell(calls, Turns(rounds, min_time_s, pause_s, budget_s))
        if extra:  # workers that spin on would steal the cores from whoever is next
            further = {name: _built(candidate, linear, weights)(x) for name, candidate in extra.items()}
            done = len(next(iter(run.timings.values())).seconds)
            run = _both(run, run_cell(further, Turns(done, min_time_s, pause_s)))
            here, calls = here | extra, calls | further
        yield [_record(cell, name, here[name], call, linear, x, run) for name, call in calls.items()]


def _cold(
    candidate: Candidate, linear: nn.Linear, weights: Mapping[int, Int4Weight], x: torch.Tensor, warm: Call
) -> Call:
    def make() -> Call:
        return _built(candidate, copy.deepcopy(linear), weights)(x)

    return cold_call(make, warm.weight_bytes or 4 * linear.weight.numel())


def _both(a: Run, b: Run) -> Run:
    peaks = {loop: max(peak, b.peak_gops[loop]) for loop, peak in a.peak_gops.items()}
    return Run(a.timings | b.timings, peaks)


def _record(
    cell: Record, name: str, candidate: Candidate, call: Call, linear: nn.Linear, x: torch.Tensor, run: Run
) -> Record:
    k, n, m = cell["k"], cell["n"], cell["m"]
    weight_bytes = call.weight_bytes or 4 * k * n
    read_bytes = 2 * l3_bytes() if cell["weights"] == "cold" else weight_bytes
    references = [other for other in run.timings if other not in OURS]
    found = {
        "op": "int4_linear",
        **cell,
        "candidate": name,
        "group": candidate.group,
        "weight_bytes": weight_bytes,
        **limits(m, {candidate.peak_bits: 2 * m * k * n}, weight_bytes, run.peak_gops, read_bytes),
        **times(name, run.timings, references),
    }
    with torch.inference_mode():
        error = relative_error(call.output(), linear(x))
    return {**found, **rates(found, k * n), "relative_error": error}


# ---------------------------------------------------------------------------------------------------- summary


def summarize_int4(records: Sequence[Record]) -> list[Comparison]:
    """Geometric mean over the shapes and worst cell of every comparison that the records allow."""
    warm, cold = ([record for record in records if record["weights"] == kind] for kind in ("warm", "cold"))
    many, one, cold_one = {"m >= 128": with_rows(warm, 128)}, {"m = 1": with_rows(warm, 1, 1)}, {"m = 1, cold": cold}
    large = [record for record in cold if record["k"] * record["n"] >= 4096 * 4096]
    cold_large = {"m = 1, cold, 4096x4096 and larger": large}
    lines = []
    for name, candidate in OURS.items():
        peers = [other for other, peer in INT4_PEERS.items() if peer.group == candidate.group]
        spinning = [other for other, peer in INT4_SPINNING.items() if peer.group == candidate.group]
        lines += [
            against_dense(name, many | one | cold_one),
            compare_each(name, ("torch_fp32",), "torch fp32", cold_large),
            compare_each(name, tuple(INT8), "the best of our int8", many | one | cold_one | cold_large),
            compare_each(name, peers, "the best MatMulNBits", {"whole grid": warm} | cold_one),
            compare_each(name, spinning, "the best MatMulNBits, spinning", one),
        ]
    return [line for part in lines for line in part]
