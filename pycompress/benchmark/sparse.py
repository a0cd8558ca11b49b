"""The sparse grid: `pycompress bench sparse` and `benchmarks/kernels.py --op sparse`.

All candidates of a cell (k, n, m) take their turns in one run, so that each sparse layer is compared with dense
layers that were timed beside it. Candidates of the same pattern and share of zeros hold the same weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from pycompress.benchmark.environment import probe_bandwidth, probe_peaks
from pycompress.benchmark.harness import Timing, geometric_mean, interleave, ratio
from pycompress.benchmark.peers import (
    Bind,
    Build,
    Call,
    dense_linear,
    ort_fp32,
    relative_error,
    torch_csr,
    torch_fp32,
)
from pycompress.benchmark.results import Comparison, Record, best_ratio, compare, measured
from pycompress.methods.int8 import Int8
from pycompress.methods.sparse import Sparse
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.sparse import SparseLinear

# ------------------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class Candidate:
    """What is timed, and the weights that it gets."""

    build: Build  # from the layer that was pruned
    bits: int = 32  # of the weights: 8 or 32
    pattern: str = "dense"  # or one of the patterns of Sparse
    zeros: int = 0  # per cent of the weights


def packed_call(layer: Int8Linear | SparseLinear) -> Bind:
    """One of our layers, and what its weight takes."""

    def bind(x: torch.Tensor) -> Call:
        run = partial(layer, x)
        return Call(run, run, layer.packed.nbytes, layer.format if isinstance(layer, SparseLinear) else "")

    return bind


def pycompress_sparse(bits: int) -> Build:
    method = Sparse(bits=bits)  # keeps the zeros that are there
    return lambda linear: packed_call(SparseLinear.from_dense(linear, method=method))


def pycompress_dense(linear: nn.Linear) -> Bind:
    return packed_call(Int8Linear.from_dense(linear, method=Int8(activation_bits=7)))


SPARSE_PEERS: dict[str, Build] = {"torch_fp32": torch_fp32, "ort_fp32": ort_fp32, "torch_csr": torch_csr}
DENSE_FP32 = ("torch_fp32", "ort_fp32")
ZEROS = (50, 70, 80, 90, 95)  # per cent
FEWER_ZEROS = (20, 30, 40)  # ours alone, where dense layers may be as fast: for the break-even
N_OF_M = {"2:4": 50, "4:8": 50, "4:16": 75}  # pattern -> per cent of zeros
INT8 = ("sparse_int8_80", "16x4_int8_80", "1x4_int8_80", *(f"{pattern}_int8" for pattern in N_OF_M))


def sparse_candidates(peers: Mapping[str, Build]) -> dict[str, Candidate]:
    """Ours and those of `SPARSE_PEERS` that run here, by name: what it is, bits, per cent of zeros."""
    fp32, int8 = pycompress_sparse(32), pycompress_sparse(8)
    found = {name: Candidate(peers[name]) for name in DENSE_FP32 if name in peers}
    found["dense_int8"] = Candidate(pycompress_dense, 8)
    for zeros in (*FEWER_ZEROS, *ZEROS):
        found[f"sparse_fp32_{zeros}"] = Candidate(fp32, 32, "unstructured", zeros)
    if "torch_csr" in peers:
        for zeros in ZEROS:
            found[f"torch_csr_{zeros}"] = Candidate(peers["torch_csr"], 32, "unstructured", zeros)
    found["16x1_fp32_80"] = Candidate(fp32, 32, "16x1", 80)
    found["sparse_int8_80"] = Candidate(int8, 8, "unstructured", 80)
    found["16x4_int8_80"] = Candidate(int8, 8, "16x4", 80)
    found["1x4_int8_80"] = Candidate(int8, 8, "1x4", 80)
    for pattern, zeros in N_OF_M.items():
        found[f"{pattern}_int8"] = Candidate(int8, 8, pattern, zeros)
    return found


def linear_layers(model: nn.Module) -> dict[tuple[int, int], nn.Linear]:
    """The first linear layer of each shape (k, n) in a model."""
    found: dict[tuple[int, int], nn.Linear] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            found.setdefault((module.in_features, module.out_features), module)
    return found


def pruned(linear: nn.Linear, pattern: str, zeros: int) -> nn.Linear:
    """A copy of the layer without the `zeros` per cent of its weights that are smallest; the layer if "dense"."""
    if pattern == "dense":
        return linear
    weight = linear.weight.detach()
    mask = Sparse(density=None if pattern in N_OF_M else (100 - zeros) / 100, pattern=pattern).prune(weight)
    copy = nn.Linear(linear.in_features, linear.out_features)
    copy.weight = nn.Parameter(weight * mask, requires_grad=False)
    copy.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return copy


# ------------------------------------------------------------------------------------------------------- grid

SPARSE_SHAPES = ((384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768), (4096, 4096))  # (k, n)
SPARSE_ROWS = (1, 8, 32, 128, 512)
FEW_ROWS = 32  # up to here reading the weights may take longer than computing with them


def sparse_cells(shapes: Sequence[tuple[int, int]], rows: Sequence[int], source: str = "gaussian") -> list[Record]:
    """The cells {k, n, m, source} of a grid; `source` says where the weights come from."""
    return [{"k": k, "n": n, "m": m, "source": source} for k, n in shapes for m in rows]


def measure_sparse(
    cells: Iterable[Record],
    candidates: Mapping[str, Candidate],
    *,
    layers: Mapping[tuple[int, int], nn.Linear] | None = None,
    rounds: int = 11,
    min_time_s: float = 0.02,
    pause_s: float = 0.02,
    budget_s: float = 25.0,
) -> Iterator[list[Record]]:
    """Time the candidates on each cell of `sparse_cells`, and yield its records, one per candidate.

    `layers` are the dense layers by (k, n), Gaussian ones where it is None; `budget_s` is what a cell's turns may
    take, see interleave(). A record holds the cell and: `candidate`, `bits`, `pattern`, `zeros` (per cent), `nnz`
    (before int8 rounds some of them to zero), `form` (the kernel format of ours, the call of torch CSR),
    `weight_bytes`, `rounds`, `us` (median) and `us_quartiles`, `gops` (as if the layer were dense),
    `effective_gops` (non-zero weights only), `peak_gops` (the faster of the probes before and after),
    `bandwidth_gbs` (the probe's rate at the size of the weight, up to FEW_ROWS rows), `floor_us` and
    `share_of_floor` (floor_us / us), `relative_error` (Frobenius, to float32 with the same weights), and
    `time_ratio`: median and quartiles of the time of the dense layers and of torch CSR over this one's.
    """
    by_zeros: dict[Zeros, nn.Linear] = {}
    built: dict[str, Bind] = {}
    built_for = None
    for cell in cells:
        k, n, m = cell["k"], cell["n"], cell["m"]
        if built_for != (k, n):
            by_zeros, built = _build(dense_linear(k, n) if layers is None else layers[k, n], candidates)
            built_for = (k, n)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        calls = {name: bind(x) for name, bind in built.items()}
        with torch.inference_mode():
            before = probe_peaks()
            runs = {name: call.run for name, call in calls.items()}
            timings = interleave(runs, rounds=rounds, min_time_s=min_time_s, pause_s=pause_s, budget_s=budget_s)
            peaks = {loop: max(before[loop], after) for loop, after in probe_peaks().items()}
            errors = _errors(calls, candidates, by_zeros, x)
        records = []
        for name, candidate in candidates.items():
            nnz = int(by_zeros[candidate.pattern, candidate.zeros].weight.count_nonzero())
            weight = _weight(cell, candidate, calls[name], nnz, peaks)
            found = {"op": "sparse_linear", **cell, "candidate": name, **weight, **_times(name, timings)}
            records.append({**found, **_rates(found), "relative_error": errors[name]})
        yield records


Zeros = tuple[str, int]  # pattern and per cent, which name the weights of one shape


def _build(linear: nn.Linear, candidates: Mapping[str, Candidate]) -> tuple[dict[Zeros, nn.Linear], dict[str, Bind]]:
    """The pruned layers, and what each candidate made of its own."""
    by_zeros: dict[Zeros, nn.Linear] = {}
    built = {}
    for name, candidate in candidates.items():
        key = candidate.pattern, candidate.zeros
        if key not in by_zeros:
            by_zeros[key] = pruned(linear, *key)
        built[name] = candidate.build(by_zeros[key])
    return by_zeros, built


def _errors(
    calls: Mapping[str, Call],
    candidates: Mapping[str, Candidate],
    by_zeros: Mapping[Zeros, nn.Linear],
    x: torch.Tensor,
) -> dict[str, float]:
    """How far each candidate is from float32 with the same weights."""
    expected = {key: linear(x) for key, linear in by_zeros.items()}
    return {
        name: relative_error(call.output(), expected[candidates[name].pattern, candidates[name].zeros])
        for name, call in calls.items()
    }


def _weight(cell: Record, candidate: Candidate, call: Call, nnz: int, peaks: dict[str, float]) -> Record:
    """What a record says about a candidate's weight, and how long this machine takes at least."""
    weight_bytes = call.weight_bytes or 4 * cell["k"] * cell["n"]
    bandwidth = probe_bandwidth(weight_bytes, seconds=0.005) if cell["m"] <= FEW_ROWS else None
    peak = peaks.get("fp32_fma" if candidate.bits == 32 else "maddubs_d2")
    return {
        "bits": candidate.bits,
        "pattern": candidate.pattern,
        "zeros": candidate.zeros,
        "nnz": nnz,
        "form": call.form,
        "weight_bytes": weight_bytes,
        "peak_gops": peaks,
        "bandwidth_gbs": bandwidth,
        "floor_us": floor_us(2 * cell["m"] * nnz, peak, weight_bytes, bandwidth),
    }


def floor_us(operations: int, peak_gops: float | None, n_bytes: int, bandwidth_gbs: float | None) -> float | None:
    """The longer of computing at the peak and of reading the weights once; None where neither rate is known."""
    computing = 1e-3 * operations / peak_gops if peak_gops else None
    reading = 1e-3 * n_bytes / bandwidth_gbs if bandwidth_gbs else None
    return max((time for time in (computing, reading) if time is not None), default=None)


def is_reference(name: str) -> bool:
    """Whether other candidates are held against this one."""
    return name in (*DENSE_FP32, "dense_int8") or name.startswith("torch_csr_")


def _times(name: str, timings: Mapping[str, Timing]) -> Record:
    own = timings[name]
    ratios = {other: ratio(timing, own) for other, timing in timings.items() if is_reference(other) and other != name}
    return {
        "rounds": len(own.seconds),
        "us": own.median * 1e6,
        "us_quartiles": [value * 1e6 for value in own.quartiles],
        # Four digits: the fourth is noise already.
        "time_ratio": {other: [float(f"{value:.4g}") for value in found] for other, found in ratios.items()},
    }


def _rates(record: Record) -> Record:
    """What follows from a record's time."""
    operations = 2e-3 * record["m"] / record["us"]
    floor = record["floor_us"]
    return {
        "gops": operations * record["k"] * record["n"],
        "effective_gops": operations * record["nnz"],
        "share_of_floor": None if floor is None else floor / record["us"],
    }


# ---------------------------------------------------------------------------------------------------- summary


def summarize_sparse(records: Sequence[Record]) -> list[Comparison]:
    """Geometric mean over the shapes and worst cell of every comparison that the records allow."""
    by_rows = {f"m = {m}": _rows(records, m, m) for m in sorted({record["m"] for record in records})}
    many = {"m >= 128": _rows(records, 128)}
    wanted = [
        *(_against_dense(f"sparse_fp32_{zeros}", by_rows) for zeros in ZEROS),
        *(_against_csr(zeros, {"whole grid": records, **many}) for zeros in ZEROS),
        *(_against_dense(name, many) for name in ("dense_int8", "16x1_fp32_80", *INT8)),
        *(_against_dense(f"{pattern}_int8", {"m >= 32": _rows(records, 32)}) for pattern in N_OF_M),
        *(_against_int8(name, many) for name in INT8),
    ]
    return [line for lines in wanted for line in lines if line is not None]


Scopes = Mapping[str, Sequence[Record]]  # in words -> the records


def _rows(records: Iterable[Record], fewest: int, most: float = math.inf) -> list[Record]:
    return [record for record in records if fewest <= record["m"] <= most]


def _against_dense(candidate: str, scopes: Scopes) -> list[Comparison | None]:
    against = "the best dense fp32"
    return [compare(part, candidate, DENSE_FP32, against=against, scope=scope) for scope, part in scopes.items()]


def _against_csr(zeros: int, scopes: Scopes) -> list[Comparison | None]:
    name, peers = f"sparse_fp32_{zeros}", (f"torch_csr_{zeros}",)
    return [compare(part, name, peers, against="torch CSR", scope=scope) for scope, part in scopes.items()]


def _against_int8(candidate: str, scopes: Scopes) -> list[Comparison | None]:
    against = "our dense int8"
    return [compare(part, candidate, ("dense_int8",), against=against, scope=scope) for scope, part in scopes.items()]


def csr_forms(records: Iterable[Record]) -> list[str]:
    """Which of its forms torch CSR took, per number of rows: a line, or none where it took no part."""
    found: dict[int, Counter[str]] = {}
    for record in records:
        if record["candidate"].startswith("torch_csr_"):
            found.setdefault(record["m"], Counter())[record["form"]] += 1
    parts = [
        f"m = {m}: " + ", ".join(f"{form} ({count})" for form, count in forms.most_common())
        for m, forms in sorted(found.items())
    ]
    return ["torch CSR in the faster of its forms (in so many cells), " + "; ".join(parts)] if parts else []


# ------------------------------------------------------------------------------------------------- break-even


class Crossing(NamedTuple):
    """The density at which two layers are equally fast."""

    density: float
    side: str = ""  # "below" or "above": it lies beyond the densities that were measured, of which this is the last

    def __str__(self) -> str:
        return f"{self.side} {self.density:.0%}".lstrip()


def crossing(speedups: Mapping[float, float]) -> Crossing:
    """Where the sparse layer stops being the faster one.

    Args:
        speedups: density -> time of the dense layer over that of the sparse one. Walking from the sparsest, the
            first that falls below 1 and its predecessor are joined by a line in log(speedup).
    """
    points = sorted(speedups.items())
    density, speedup = points[0]
    if speedup < 1:
        return Crossing(density, "below")
    for (density, speedup), (denser, slower) in pairwise(points):
        if slower < 1:
            share = math.log(speedup) / math.log(speedup / slower)
            return Crossing(density + share * (denser - density))
    return Crossing(points[-1][0], "above")


@dataclass(frozen=True)
class BreakEven:
    """Up to which density the unstructured fp32 layer is at least as fast as the best dense one."""

    m: int
    mean: Crossing  # of the geometric means over the shapes
    shapes: dict[tuple[int, int], Crossing]  # (k, n) -> of that shape alone
    densities: tuple[float, ...]  # at which it was measured

    def __str__(self) -> str:
        low, high = (choose(self.shapes.values(), key=lambda found: found.density) for choose in (min, max))
        measured_at = ", ".join(f"{density:.0%}" for density in self.densities)
        return (
            f"break-even with the best dense fp32, m = {self.m}: {self.mean} non-zeros over {len(self.shapes)} shape(s), "
            f"from {low} to {high} (interpolated between time ratios measured at {measured_at})"
        )


def break_even(records: Iterable[Record]) -> list[BreakEven]:
    """Per number of rows, from the records of the unstructured fp32 layer at all its shares of zeros."""
    found: dict[int, dict[tuple[int, int], dict[float, float]]] = {}
    for record in records:
        if record["candidate"].startswith("sparse_fp32_") and measured(record, DENSE_FP32):
            shape = record["k"], record["n"]
            speedups = found.setdefault(record["m"], {}).setdefault(shape, {})
            speedups[(100 - record["zeros"]) / 100] = best_ratio(record, DENSE_FP32)
    lines = []
    for m, shapes in sorted(found.items()):
        densities = tuple(sorted(next(iter(shapes.values()))))  # the same for all shapes
        means = {density: geometric_mean(speedups[density] for speedups in shapes.values()) for density in densities}
        crossings = {shape: crossing(speedups) for shape, speedups in shapes.items()}
        lines.append(BreakEven(m, crossing(means), crossings, densities))
    return lines
