"""The low-rank grid: `pycompress bench low-rank` and `benchmarks/kernels.py --op low_rank`.

All candidates of a cell (k, n, m) take their turns in one run. Their factors are Gaussian, not fitted to a weight,
which changes no time; candidates of the same rank hold the same ones, and so do the layers beside which they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import nn

from pycompress.benchmark import grid
from pycompress.benchmark.break_even import BreakEven, break_even
from pycompress.benchmark.harness import geometric_mean
from pycompress.benchmark.peers import (
    Bind,
    Build,
    Call,
    TwoLinears,
    available,
    ort_fp32,
    ort_two,
    torch_fp32,
    torch_two,
    two_linears,
)
from pycompress.benchmark.results import Comparison, Record, best_ratio, measured
from pycompress.benchmark.sparse import pruned
from pycompress.methods import Int4, Int8, Sparse
from pycompress.nn import Int8Linear, LowRankLinear
from pycompress.weights import LowRankWeight

# ------------------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class Candidate(grid.Candidate):
    """A dense or sparse main layer, factors, or the sum of both; built from nn.Linear, TwoLinears, or both in this order."""

    main: str = ""  # "dense", "sparse" or none
    rank: Fraction | int = 0  # of the factors: a share of min(n, k), a number (at most min(n, k)), or none
    main_bits: int = 32
    factor_bits: int = 32


def low_rank(factors: TwoLinears) -> Bind:
    """Our layer with float32 factors."""
    weight = LowRankWeight(factors.down.weight.detach(), factors.up.weight.detach())
    return grid.packed_call(LowRankLinear.from_weight(weight, factors.up.bias))


def low_rank_int8(factors: TwoLinears) -> Bind:
    """Our layer with int8 factors."""
    method = Int8(activation_bits=7)
    down, up = (method.compress(linear.weight.detach()) for linear in (factors.down, factors.up))
    weight = LowRankWeight(down.values, up.values, down.scale, up.scale, method.activation_bits)
    return grid.packed_call(LowRankLinear.from_weight(weight, factors.up.bias))


def branch(method: Int4 | Int8 | Sparse) -> Callable[[nn.Linear, TwoLinears], Bind]:
    """Our layer with float32 factors beside a main weight, in one call."""

    def build(main: nn.Linear, factors: TwoLinears) -> Bind:
        residual = method.compress(main.weight.detach())
        weight = LowRankWeight(factors.down.weight.detach(), factors.up.weight.detach(), residual=residual)
        return grid.packed_call(LowRankLinear.from_weight(weight, main.bias))

    return build


def int8_and_two(main: nn.Linear, factors: TwoLinears) -> Bind:
    """Our int8 layer, and torch's two layers of the factors added to it."""
    layer = Int8Linear.from_dense(main, method=Int8(7))
    weight_bytes = layer.packed.nbytes + sum(parameter.nbytes for parameter in factors.parameters())

    def bind(x: torch.Tensor) -> Call:
        def run() -> torch.Tensor:
            y: torch.Tensor = layer(x) + factors(x)
            return y

        return Call(run, run, weight_bytes)

    return bind


PEERS: dict[str, Build] = {"torch_fp32": torch_fp32, "ort_fp32": ort_fp32}
ZEROS = 80  # per cent of a sparse main weight
BRANCH_RANK = 32  # of the factors beside a main weight
RANKS = {  # our float32 layer at shares of min(n, k)
    "low_rank_8": Fraction(1, 8),
    "low_rank_4": Fraction(1, 4),
    "low_rank_3/8": Fraction(3, 8),
    "low_rank_2": Fraction(1, 2),
    "low_rank_3/4": Fraction(3, 4),
}
HIGHER_RANKS = ("low_rank_3/8", "low_rank_2", "low_rank_3/4")  # for the break-even alone
# These hold others against them.
REFERENCES = (
    *grid.DENSE_FP32, "dense_int8", "dense_int4", "sparse_80", "torch_two_8", "torch_two_4", "ort_two_8", "int8_two_call_32",
)  # fmt: skip


def low_rank_candidates(peers: Mapping[str, Build]) -> dict[str, Candidate]:
    """Ours, torch's two linear layers, and those of `PEERS` that run here, by name."""
    found = {name: Candidate(peers[name], "dense") for name in grid.DENSE_FP32 if name in peers}
    found["dense_int8"] = Candidate(grid.ours(Int8(7)), "dense", main_bits=8)
    found |= {name: Candidate(low_rank, rank=rank) for name, rank in RANKS.items()}
    found |= {f"torch_two_{part}": Candidate(torch_two, rank=Fraction(1, part)) for part in (8, 4)}
    if "ort_fp32" in peers:  # what that one needs
        found["ort_two_8"] = Candidate(ort_two, rank=Fraction(1, 8))
    found["low_rank_int8_4"] = Candidate(low_rank_int8, rank=Fraction(1, 4), factor_bits=8)
    found["int8_branch_32"] = Candidate(branch(Int8(activation_bits=7)), "dense", BRANCH_RANK, main_bits=8)
    found["int8_two_call_32"] = Candidate(int8_and_two, "dense", BRANCH_RANK, main_bits=8)
    found["dense_int4"] = Candidate(grid.ours(Int4()), "dense", main_bits=4)
    found["int4_branch_32"] = Candidate(branch(Int4()), "dense", BRANCH_RANK, main_bits=4)
    found["sparse_80"] = Candidate(grid.ours(Sparse()), "sparse")
    found["sparse_branch_32"] = Candidate(branch(Sparse()), "sparse", BRANCH_RANK)
    return found


def rank_of(candidate: Candidate, k: int, n: int) -> int:
    """The rank of a candidate's factors in a layer (k, n), 0 where it has none."""
    if isinstance(candidate.rank, Fraction):
        return max(1, int(candidate.rank * min(n, k)))
    return min(candidate.rank, n, k)


def works(dense: nn.Linear, candidates: Mapping[str, Candidate]) -> dict[str, grid.Work]:
    """What the candidates compute: the sum of their parts, which those that have the same share. `main` is dense, sparse or
    nothing, `rank_share` that of min(n, k), where it was asked for as a share; `multiply_adds` are those of a row of x, without
    those with zeros."""
    k, n = dense.in_features, dense.out_features
    mains: dict[str, list[nn.Linear]] = {"": [], "dense": [dense]}
    if any(candidate.main == "sparse" for candidate in candidates.values()):
        mains["sparse"] = [pruned(dense, "unstructured", ZEROS)]
    factors: dict[tuple[int, bool], list[TwoLinears]] = {(0, False): []}

    def work(of: Candidate) -> grid.Work:
        key = rank, _ = rank_of(of, k, n), not of.main  # the bias is the main layer's, where there is one
        if key not in factors:
            factors[key] = [two_linears(k, rank, n, bias=key[1])] if rank else []
        parts: tuple[nn.Module, ...] = (*mains[of.main], *factors[key])
        main, thin = sum(int(part.weight.count_nonzero()) for part in mains[of.main]), rank * (n + k)
        operations = {of.main_bits: main, of.factor_bits: thin}
        if of.main_bits == of.factor_bits:
            operations = {of.main_bits: main + thin}
        facts = {
            "main": of.main,
            "main_bits": of.main_bits if main else None,
            "rank": rank,
            "rank_share": float(of.rank) if isinstance(of.rank, Fraction) else None,
            "factor_bits": of.factor_bits if thin else None,
            "multiply_adds": main + thin,
        }
        there = {bits: count for bits, count in operations.items() if count}
        return grid.Work(
            parts,
            lambda x: torch.stack([part(x) for part in parts]).sum(dim=0),
            there,
            4 * (main + thin),
            lambda _: facts,
        )

    return {name: work(candidate) for name, candidate in candidates.items()}


def chosen() -> grid.Chosen:
    peers, missing = available(PEERS)
    return grid.Chosen(low_rank_candidates(peers), missing)


# ---------------------------------------------------------------------------------------------------- summary


@dataclass(frozen=True)
class Cost:
    """A comparison with the layer that a candidate contains, as what the rest of it costs."""

    of: Comparison

    @property
    def mean(self) -> float:
        return 1 / self.of.geometric_mean - 1

    @property
    def worst(self) -> float:
        return 1 / self.of.worst - 1

    def __str__(self) -> str:
        return (
            f"{self.of.candidate} over {self.of.against} alone, {self.of.scope} ({self.of.cells} cell(s)): "
            f"{self.mean:+.1%} time (geometric mean), worst {self.worst:+.1%} at {self.of.worst_cell}"
        )


def summarize(records: Sequence[Record]) -> list[Comparison | Cost]:
    """Geometric mean over the shapes and worst cell of every comparison that the records allow."""
    many, one, few = grid.with_rows(records, 32), grid.with_rows(records, 1, 1), grid.with_rows(records, 8, 8)
    by_rows = {"m >= 32": many, "m = 1": one, "m = 8": few}
    halves = {"m <= 64": grid.with_rows(records, 1, 64), "m > 64": grid.with_rows(records, 65)}
    lines: list[Sequence[Comparison | Cost]] = [
        *(grid.against_dense(name, by_rows) for name in ("low_rank_8", "low_rank_4")),
        *(grid.compare_each(f"low_rank_{part}", (f"torch_two_{part}",), "two torch layers", halves) for part in (8, 4)),
        grid.compare_each("low_rank_8", ("ort_two_8",), "two MatMul of ONNX Runtime", halves),
        grid.against_int8("low_rank_int8_4", {"m >= 32": many}),
        *(_costs(records, name, "dense_int8") for name in ("int8_branch_32", "int8_two_call_32")),
        grid.compare_each("int8_branch_32", ("int8_two_call_32",), "the same in two calls", {"whole grid": records}),
        _costs(records, "int4_branch_32", "dense_int4"),
        _costs(records, "sparse_branch_32", "sparse_80"),
    ]
    return [line for part in lines for line in part]


def _costs(records: Sequence[Record], candidate: str, contained: str) -> list[Cost]:
    cell = [record for record in grid.with_rows(records, 128, 128) if (record["k"], record["n"]) == (768, 3072)]
    scopes = {"whole grid": records, "m >= 32": grid.with_rows(records, 32), "768x3072, m = 128": cell}
    return [Cost(line) for line in grid.compare_each(candidate, (contained,), contained, scopes)]


# From these the rank guard of LowRank estimates times (pycompress/profiles.py).
SPEEDS = ("low_rank_8", "low_rank_4", "low_rank_2", "low_rank_int8_4", "dense_int8", "dense_int4", "sparse_80")


def speeds(records: Iterable[Record]) -> list[str]:
    """How fast a multiply-add is beside one of the best dense fp32 layer: a line, or none without m >= 32."""
    found: dict[str, list[float]] = {}
    for record in grid.with_rows(records, 32):
        if record["candidate"] in SPEEDS and measured(record, grid.DENSE_FP32):
            share = record["multiply_adds"] / (record["k"] * record["n"])
            found.setdefault(record["candidate"], []).append(best_ratio(record, grid.DENSE_FP32) * share)
    if not found:
        return []
    parts = ", ".join(f"{name} {geometric_mean(values):.2f}" for name, values in found.items())
    return [f"multiply-adds a second, those of the best dense fp32 = 1, m >= 32 (geometric mean): {parts}"]


def break_even_rank(records: Iterable[Record]) -> list[BreakEven]:
    """Per number of rows, from the records of our float32 layer at all its ranks."""
    ours = [record for record in records if record["candidate"] in RANKS]
    return break_even(ours, lambda record: float(record["rank_share"]), "of min(n, k) as rank")


GRID = grid.Grid(
    "low_rank_linear", works, lambda name: name in REFERENCES, chosen, (summarize, speeds, break_even_rank)
)
