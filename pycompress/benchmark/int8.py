"""The int8 grid: `pycompress bench int8` and `benchmarks/kernels.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pycompress.benchmark.environment import l3_bytes, probe_bandwidth
from pycompress.benchmark.grid import (
    GRID_SHAPES,
    PEAK_LOOPS,
    Chosen,
    Grid,
    Run,
    Work,
    compare_each,
    is_cold,
    ours,
    with_rows,
)
from pycompress.benchmark.peers import (
    Build,
    Call,
    available,
    ort_fp32,
    ort_int8,
    torch_dynamic,
    torch_fp32,
)
from pycompress.benchmark.results import Comparison, Record, measured, microseconds, time_ratios
from pycompress.methods.int8 import Int8

OURS: dict[str, Build] = {"pycompress_a7": ours(Int8(7)), "pycompress_a8": ours(Int8(8))}
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


def works(linear: nn.Linear, builds: Mapping[str, Build]) -> dict[str, Work]:
    """What the candidates compute: the layer itself, all of them."""
    count = linear.weight.numel()
    bits = {name: 32 if name.endswith("_fp32") else 8 for name in builds}
    return {name: Work((linear,), linear, {size: count}, count * size // 8) for name, size in bits.items()}


def chosen() -> Chosen:
    usable, missing = available(PEERS)
    return Chosen({**OURS, **usable}, missing, available(SPINNING)[0])


def record(cell: Record, name: str, call: Call, work: Work, run: Run, references: Sequence[str]) -> Record:  # noqa: ARG001
    """What is said about a candidate in a cell: the cell and `candidate`, `us` (median) and `us_quartiles`, `gops`,
    `share_of_peak` (of maddubs_d2; of fp32_fma for the fp32 candidates), `weight_gbs` (weight bytes read per second, in 1e9),
    `peak_gops` (the faster of the probes before and after), `bandwidth_gbs` (one-row cells: the probe's rate at the size of the
    int8 weight, or beyond the cache for cold weights), and `time_ratio`: median and quartiles of each other candidate's time over
    this one's."""
    ((bits, count),), own = work.operations.items(), run.timings[name]
    gops, peak = 2e-9 * cell["m"] * count / own.median, run.peak_gops.get(PEAK_LOOPS[bits])
    return {
        **cell,
        "candidate": name,
        **microseconds(own),
        "gops": gops,
        "share_of_peak": gops / peak if peak else None,
        "weight_gbs": 1e-9 * work.weight_bytes / own.median,
        "peak_gops": run.peak_gops,
        "bandwidth_gbs": probe_bandwidth(2 * l3_bytes() if is_cold(cell) else count) if cell["m"] == 1 else None,
        "time_ratio": time_ratios(name, run.timings, references),
    }


def summarize(records: Sequence[Record]) -> list[Comparison]:
    """Geometric mean and worst cell of every comparison that the records allow."""
    warm, cold = ([record for record in records if record["weights"] == kind] for kind in ("warm", "cold"))
    whole = {"whole grid": warm, "m >= 128": with_rows(records, 128)}
    one = {"m = 1": with_rows(warm, 1, 1), "m = 1, cold weights": cold}
    spinning = {"m = 1, ONNX Runtime spinning": [record for record in records if measured(record, SPINNING)]}
    return [
        *compare_each("pycompress_a7", [*PEERS], "the best peer", whole | one),
        *compare_each("pycompress_a7", [*PEERS, *SPINNING], "the best peer", spinning),
        *compare_each("pycompress_a8", EXACT_PEERS, "the best exact peer", whole | one),
        *compare_each("pycompress_a8", ("ort_s8",), "ONNX Runtime s8, which saturates", whole),
        *compare_each("pycompress_a8", [*PEERS, *SPINNING], "the best peer", spinning),
    ]


SHAPES = ((384, 384), *GRID_SHAPES)
GRID = Grid(
    "int8_linear", works, lambda _: True, chosen, (summarize,), SHAPES, rounds=15, smallest_bits=8, record=record
)
