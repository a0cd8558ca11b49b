"""The int8 grid: `pycompress bench int8` and `benchmarks/kernels.py`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from pycompress.benchmark.environment import l3_bytes, probe_bandwidth, probe_peaks
from pycompress.benchmark.harness import Timing, interleave, ratio, rotating
from pycompress.benchmark.peers import (
    Bind,
    Build,
    Call,
    dense_linear,
    module_call,
    ort_fp32,
    ort_int8,
    relative_error,
    torch_dynamic,
    torch_fp32,
)
from pycompress.benchmark.results import Comparison, Record, compare, measured
from pycompress.methods.int8 import Int8
from pycompress.nn.int8 import Int8Linear


def pycompress_int8(activation_bits: int) -> Build:
    method = Int8(activation_bits=activation_bits)
    return lambda linear: module_call(Int8Linear.from_dense(linear, method=method))


OURS: dict[str, Build] = {"pycompress_a7": pycompress_int8(7), "pycompress_a8": pycompress_int8(8)}
PEERS: dict[str, Build] = {
    "torch_fp32": torch_fp32,
    "torch_fbgemm": torch_dynamic("fbgemm"),
    "torch_onednn": torch_dynamic("onednn"),
    "ort_fp32": ort_fp32,
    "ort_u8": ort_int8(signed=False),
    "ort_s8": ort_int8(signed=True),
}
SPINNING: dict[str, Build] = {  # ONNX Runtime as it comes: its workers spin on, which pays at one row
    "ort_u8_spinning": ort_int8(signed=False, spinning=True),
    "ort_s8_spinning": ort_int8(signed=True, spinning=True),
}
EXACT_PEERS = ("torch_fbgemm", "ort_u8")

# (k, n)
INT8_SHAPES = ((384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768), (4096, 4096))
INT8_ROWS = (1, 8, 32, 128, 512)
QUICK_SHAPES = ((384, 1536), (768, 768))
QUICK_ROWS = (1, 32, 512)
MAX_COPIES = 96  # layers so small that more copies would be needed to leave the cache get no cold figure


def copies_to_leave_cache(layer_bytes: int) -> int:
    """How many copies of a layer hold half as much again as the last-level cache (at least 2)."""
    return max(2, math.ceil(1.5 * l3_bytes() / layer_bytes))


def int8_cells(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int], *, cold: bool = True, bits: int = 8
) -> list[Record]:
    """The cells {k, n, m, weights} of a grid: all with warm weights, and one row with cold ones as well.

    `bits` are those of a weight of the smallest candidate.
    """
    cells: list[Record] = []
    for k, n in shapes:
        cells += [{"k": k, "n": n, "m": m, "weights": "warm"} for m in rows]
        if cold and 1 in rows and copies_to_leave_cache(k * n * bits // 8) <= MAX_COPIES:
            cells.append({"k": k, "n": n, "m": 1, "weights": "cold"})
    return cells


def measure_int8(
    cells: Iterable[Record],
    builds: Mapping[str, Build],
    *,
    spinning: Mapping[str, Build] | None = None,
    rounds: int = 15,
    min_time_s: float = 0.02,
    pause_s: float = 0.02,
    weights: str = "gaussian",
) -> Iterator[list[Record]]:
    """Time the candidates on each cell of `int8_cells`, and yield its records, one per candidate.

    `spinning` holds candidates for the warm one-row cells alone, timed after the others. A record holds the cell
    and: `candidate`, `us` (median) and `us_quartiles`, `gops`, `peak_gops` (the faster of the probes before and after),
    `share_of_peak` (of maddubs_d2; of fp32_fma for the fp32 candidates), `weight_gbs` (weight bytes read per
    second, in 1e9), `bandwidth_gbs` (one-row cells: the probe's rate at the size of the int8 weight, or
    beyond the cache for cold weights), `relative_error` (Frobenius, to fp32), and `time_ratio`: median and
    quartiles of each other candidate's time over this one's.
    """
    built: dict[str, Bind] = {}
    built_for = None
    extra: dict[str, Bind]
    for cell in cells:
        k, n, m = cell["k"], cell["n"], cell["m"]
        linear = dense_linear(k, n, weights)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        if cell["weights"] == "cold":
            extra, calls = {}, {name: _cold_call(build, linear, x, name) for name, build in builds.items()}
        else:
            if built_for != (k, n):
                built = {name: build(linear) for name, build in builds.items()}
                built_for = (k, n)
            extra = {name: build(linear) for name, build in (spinning or {}).items()} if m == 1 else {}
            calls = {name: bind(x) for name, bind in {**built, **extra}.items()}
        with torch.inference_mode():
            before = probe_peaks()
            # Workers that spin on would steal the cores from whoever is next: they take their turns afterwards.
            timings: dict[str, Timing] = {}
            for group in (built.keys() if cell["weights"] == "warm" else calls.keys(), extra.keys()):
                runs = {name: calls[name].run for name in group}
                timings |= interleave(runs, rounds=rounds, min_time_s=min_time_s, pause_s=pause_s)
            limits = _limits(cell, before)
            errors = {name: relative_error(call.output(), linear(x)) for name, call in calls.items()}
        yield [_record(cell, name, timings, errors[name], limits) for name in calls]


def _cold_call(build: Build, linear: nn.Linear, x: torch.Tensor, name: str) -> Call:
    return cold_call(lambda: build(copy.deepcopy(linear))(x), linear.weight.numel() * _weight_bytes(name))


def cold_call(make: Callable[[], Call], weight_bytes: int) -> Call:
    """A candidate that rotates over copies of a layer, and so meets its weights outside the cache."""
    calls = []
    for _ in range(copies_to_leave_cache(weight_bytes)):
        call = make()
        with torch.inference_mode():
            call.run()  # the worker of a new ONNX Runtime session spins until its first run has ended
        calls.append(call)
    return calls[0]._replace(run=rotating([call.run for call in calls]))


def _weight_bytes(candidate: str) -> int:
    return 4 if candidate.endswith("_fp32") else 1


def _limits(cell: Record, before: dict[str, float]) -> Record:
    """What the machine could do around this cell: its arithmetic peaks, and at one row its read bandwidth."""
    peaks = {loop: max(before[loop], after) for loop, after in probe_peaks().items()}
    read = 2 * l3_bytes() if cell["weights"] == "cold" else cell["k"] * cell["n"]
    return {"peak_gops": peaks, "bandwidth_gbs": probe_bandwidth(read) if cell["m"] == 1 else None}


def _record(cell: Record, name: str, timings: dict[str, Timing], error: float, limits: Record) -> Record:
    k, n, m = cell["k"], cell["n"], cell["m"]
    own = timings[name]
    gops = 2e-9 * m * k * n / own.median
    peak = limits["peak_gops"].get("fp32_fma" if name.endswith("_fp32") else "maddubs_d2")
    return {
        "op": "int8_linear",
        **cell,
        "candidate": name,
        "us": own.median * 1e6,
        "us_quartiles": [value * 1e6 for value in own.quartiles],
        "gops": gops,
        "share_of_peak": gops / peak if peak else None,
        "weight_gbs": 1e-9 * k * n * _weight_bytes(name) / own.median,
        **limits,
        "relative_error": error,
        "time_ratio": {other: list(ratio(timing, own)) for other, timing in timings.items() if other != name},
    }


_SCOPES: dict[str, Callable[[Record], bool]] = {
    "whole grid": lambda record: record["weights"] == "warm",
    "m >= 128": lambda record: record["m"] >= 128,
    "m = 1": lambda record: record["m"] == 1 and record["weights"] == "warm",
    "m = 1, cold weights": lambda record: record["m"] == 1 and record["weights"] == "cold",
    "m = 1, ONNX Runtime spinning": lambda record: measured(record, SPINNING),
}
_GRID = ("whole grid", "m >= 128")
_COMPARISONS = (
    ("pycompress_a7", "the best peer", tuple(PEERS), (*_GRID, "m = 1", "m = 1, cold weights")),
    ("pycompress_a7", "the best peer", (*PEERS, *SPINNING), ("m = 1, ONNX Runtime spinning",)),
    ("pycompress_a8", "the best exact peer", EXACT_PEERS, (*_GRID, "m = 1", "m = 1, cold weights")),
    ("pycompress_a8", "ONNX Runtime s8, which saturates", ("ort_s8",), _GRID),
    ("pycompress_a8", "the best peer", (*PEERS, *SPINNING), ("m = 1, ONNX Runtime spinning",)),
)


def summarize_int8(records: Sequence[Record]) -> list[Comparison]:
    """Geometric mean and worst cell of every comparison that the records allow."""
    lines = [
        compare(filter(_SCOPES[scope], records), candidate, peers, against=against, scope=scope)
        for candidate, against, peers, scopes in _COMPARISONS
        for scope in scopes
    ]
    return [line for line in lines if line is not None]
