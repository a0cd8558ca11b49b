"""The int4 grid: `pycompress bench int4` and `benchmarks/kernels.py --op int4`.

All candidates of a cell take their turns in one run. Those with 4-bit weights in groups of the same size hold the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pycompress.benchmark import grid
from pycompress.benchmark.peers import Bind, available, ort_fp32, ort_int4, torch_fp32
from pycompress.benchmark.results import Comparison, Record
from pycompress.methods.int4 import Int4
from pycompress.methods.int8 import Int8
from pycompress.nn.int4 import Int4Linear
from pycompress.weights import Int4Weight

# ------------------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class Candidate(grid.Candidate):
    """Built from nn.Linear; with a group from Int4Weight and the bias."""

    group: int = 0  # positions that share a scale
    peak_bits: int = 32  # 32, 8 or 4: which loop of the probe its products are like


def int4_layer(activation_bits: int) -> Callable[[Int4Weight, torch.Tensor], Bind]:
    def build(weight: Int4Weight, bias: torch.Tensor) -> Bind:
        return grid.packed_call(Int4Linear.from_weight(replace(weight, activation_bits=activation_bits), bias))

    return build


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
INT8 = {"int8_a7": Candidate(grid.ours(Int8(7)), peak_bits=8), "int8_a8": Candidate(grid.ours(Int8(8)), peak_bits=8)}
PEERS = {"torch_fp32": Candidate(torch_fp32), "ort_fp32": Candidate(ort_fp32), **matmul_nbits(spinning=False)}
SPINNING = matmul_nbits(spinning=True)  # ONNX Runtime as it comes: its workers spin on, which pays at one row


def works(linear: nn.Linear, candidates: Mapping[str, Candidate]) -> dict[str, grid.Work]:
    """What the candidates compute: the layer itself, or what its weight is when it is rounded in groups of each size."""
    groups = {candidate.group for candidate in candidates.values()} - {0}
    parts: dict[int, tuple[Any, ...]] = {0: (linear,)}
    parts |= {group: (Int4(group).compress(linear.weight), linear.bias) for group in groups}

    def work(of: Candidate) -> grid.Work:
        count = linear.weight.numel()
        return grid.Work(parts[of.group], linear, {of.peak_bits: count}, 4 * count, lambda _: {"group": of.group})

    return {name: work(candidate) for name, candidate in candidates.items()}


def chosen() -> grid.Chosen:
    """Ours and those of `PEERS` that run here; for the others, why not."""

    def alone(candidate: Candidate, linear: nn.Linear) -> Bind:
        return candidate(*works(linear, {"": candidate})[""].parts)

    usable, missing = available({name: partial(alone, candidate) for name, candidate in PEERS.items()})
    return grid.Chosen({**OURS, **INT8, **{name: PEERS[name] for name in usable}}, missing, {} if missing else SPINNING)


# ---------------------------------------------------------------------------------------------------- summary


def summarize(records: Sequence[Record]) -> list[Comparison]:
    """Geometric mean over the shapes and worst cell of every comparison that the records allow."""
    warm, cold = ([record for record in records if record["weights"] == kind] for kind in ("warm", "cold"))
    many, one, cold_one = (
        {"m >= 128": grid.with_rows(warm, 128)},
        {"m = 1": grid.with_rows(warm, 1, 1)},
        {"m = 1, cold": cold},
    )
    large = [record for record in cold if record["k"] * record["n"] >= 4096 * 4096]
    cold_large = {"m = 1, cold, 4096x4096 and larger": large}
    lines = []
    for name, candidate in OURS.items():
        peers = [other for other, peer in PEERS.items() if peer.group == candidate.group]
        spinning = [other for other, peer in SPINNING.items() if peer.group == candidate.group]
        lines += [
            grid.against_dense(name, many | one | cold_one),
            grid.compare_each(name, ("torch_fp32",), "torch fp32", cold_large),
            grid.compare_each(name, tuple(INT8), "the best of our int8", many | one | cold_one | cold_large),
            grid.compare_each(name, peers, "the best MatMulNBits", {"whole grid": warm} | cold_one),
            grid.compare_each(name, spinning, "the best MatMulNBits, spinning", one),
        ]
    return [line for part in lines for line in part]


SHAPES = (*grid.GRID_SHAPES, (4096, 14336))  # the last is that of a language model with 8e9 weights
GRID = grid.Grid("int4_linear", works, lambda name: name not in OURS, chosen, (summarize,), SHAPES, smallest_bits=4)
