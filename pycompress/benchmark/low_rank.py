"""The low-rank grid: `pycompress bench low-rank` and `benchmarks/kernels.py --op low_rank`.

All candidates of a cell (k, n, m) take their turns in one run. Their factors are Gaussian, not fitted to a weight,
which changes no time; candidates of the same rank hold the same ones, and so do the layers beside which they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import nn

from pycompress.benchmark.break_even import BreakEven, break_even
from pycompress.benchmark.grid import (
    DENSE_FP32,
    Turns,
    against_dense,
    against_int8,
    compare_each,
    dense_int8,
    dense_int8_layer,
    limits,
    packed_call,
    rates,
    run_cell,
    times,
    with_rows,
)
from pycompress.benchmark.harness import geometric_mean
from pycompress.benchmark.peers import (
    Bind,
    Build,
    Call,
    TwoLinears,
    dense_linear,
    ort_fp32,
    ort_two,
    relative_error,
    torch_fp32,
    torch_two,
    two_linears,
)
from pycompress.benchmark.results import Comparison, Record, best_ratio, compare, measured
from pycompress.benchmark.sparse import pruned
from pycompress.methods.int4 import Int4
from pycompress.methods.int8 import Int8
from pycompress.methods.low_rank import LowRankWeight
from pycompress.methods.sparse import Sparse
from pycompress.nn.int4 import Int4Linear
from pycompress.nn.low_rank import LowRankLinear
from pycompress.nn.sparse import SparseLinear

# ------------------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class Candidate:
    """What is timed: a dense or sparse main layer, factors, or the sum of both."""

    build: Callable[..., Bind]  # from its parts: nn.Linear, TwoLinears, or both in this order
    main: str = ""  # "dense", "sparse" or none
    rank: Fraction | int = 0  # of the factors: a share of min(n, k), a number (at most min(n, k)), or none
    main_bits: int = 32
    factor_bits: int = 32


def low_rank(factors: TwoLinears) -> Bind:
    """Our layer with float32 factors."""
    weight = LowRankWeight(factors.down.weight.detach(), factors.up.weight.detach())
    return packed_call(LowRankLinear.from_weight(weight, factors.up.bias))


def low_rank_int8(factors: TwoLinears) -> Bind:
    """Our layer with int8 factors."""
    method = Int8(activation_bits=7)
    down, up = (method.compress(linear.weight.detach()) for linear in (factors.down, factors.up))
    weight = LowRankWeight(down.values, up.values, down.scale, up.scale, method.activation_bits)
    return packed_call(LowRankLinear.from_weight(weight, factors.up.bias))


def branch(method: Int4 | Int8 | Sparse) -> Callable[[nn.Linear, TwoLinears], Bind]:
    """Our layer with float32 factors beside a main weight, in one call."""

    def build(main: nn.Linear, factors: TwoLinears) -> Bind:
        residual = method.compress(main.weight.detach())
        weight = LowRankWeight(factors.down.weight.detach(), factors.up.weight.detach(), residual=residual)
        return packed_call(LowRankLinear.from_weight(weight, main.bias))

    return build


def int8_and_two(main: nn.Linear, factors: TwoLinears) -> Bind:
    """Our int8 layer, and torch's two layers of the factors added to it."""
    layer = dense_int8_layer(main)
    weight_bytes = layer.packed.nbytes + sum(parameter.nbytes for parameter in factors.parameters())

    def bind(x: torch.Tensor) -> Call:
        def run() -> torch.Tensor:
            y: torch.Tensor = layer(x) + factors(x)
            return y

        return Call(run, run, weight_bytes)

    return bind


def dense_int4(linear: nn.Linear) -> Bind:
    return packed_call(Int4Linear.from_dense(linear))


def sparse(linear: nn.Linear) -> Bind:
    return packed_call(SparseLinear.from_dense(linear, method=Sparse()))


LOW_RANK_PEERS: dict[str, Build] = {"torch_fp32": torch_fp32, "ort_fp32": ort_fp32}
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
    *DENSE_FP32, "dense_int8", "dense_int4", "sparse_80", "torch_two_8", "torch_two_4", "ort_two_8", "int8_two_call_32",
)  # fmt: skip


def low_rank_candidates(peers: Mapping[str, Build]) -> dict[str, Candidate]:
    """Ours, torch's two linear layers, and those of `LOW_RANK_PEERS` that run here, by name."""
    found = {name: Candidate(peers[name], "dense") for name in DENSE_FP32 if name in peers}
    found["dense_int8"] = Candidate(dense_int8, "dense", main_bits=8)
    found |= {name: Candidate(low_rank, rank=rank) for name, rank in RANKS.items()}
    found |= {f"torch_two_{part}": Candidate(torch_two, rank=Fraction(1, part)) for part in (8, 4)}
    if "ort_fp32" in peers:  # what that one needs
        found["ort_two_8"] = Candidate(ort_two, rank=Fraction(1, 8))
    found["low_rank_int8_4"] = Candidate(low_rank_int8, rank=Fraction(1, 4), factor_bits=8)
    found["int8_branch_32"] = Candidate(branch(Int8(activation_bits=7)), "dense", BRANCH_RANK, main_bits=8)
    found["int8_two_call_32"] = Candidate(int8_and_two, "dense", BRANCH_RANK, main_bits=8)
    found["dense_int4"] = Candidate(dense_int4, "dense", main_bits=4)
    found["int4_branch_32"] = Candidate(branch(Int4()), "dense", BRANCH_RANK, main_bits=4)
    found["sparse_80"] = Candidate(sparse, "sparse")
    found["sparse_branch_32"] = Candidate(branch(Sparse()), "sparse", BRANCH_RANK)
    return found


# ------------------------------------------------------------------------------------------------------- grid


def low_rank_cells(shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> list[Record]:
    """The cells {k, n, m} of a grid."""
    return [{"k": k, "n": n, "m": m} for k, n in shapes for m in rows]


@dataclass(frozen=True)
class Parts:
    """What a candidate computes, in float32: the sum of its parts."""

    main: nn.Linear | None
    factors: TwoLinears | None

    @property
    def modules(self) -> list[nn.Module]:
        return [part for part in (self.main, self.factors) if part is not None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([part(x) for part in self.modules]).sum(dim=0)

    @property
    def rank(self) -> int:
        return 0 if self.factors is None else self.factors.down.out_features

    @property
    def main_weights(self) -> int:
        """How many there are that are not zero."""
        return 0 if self.main is None else int(self.main.weight.count_nonzero())

    @property
    def factor_weights(self) -> int:
        return 0 if self.factors is None else self.factors.down.weight.numel() + self.factors.up.weight.numel()


def measure_low_rank(
    cells: Iterable[Record],
    candidates: Mapping[str, Candidate],
    *,
    rounds: int = 11,
    min_time_s: float = 0.02,
    pause_s: float = 0.02,
    budget_s: float = 15.0,
) -> Iterator[list[Record]]:
    """Time the candidates on each cell of `low_rank_cells`, and yield its records, one per candidate.

    `budget_s` is what a cell's turns may take, see interleave(). A record holds the cell and: `candidate`, `main`
    (dense, sparse or nothing) and `main_bits`, `rank`, `rank_share` (of min(n, k), where it was asked for as a share)
    and `factor_bits`, `multiply_adds` (a row of x, without those with zeros), `weight_bytes`, `rounds`, `us` (median)
    and `us_quartiles`, `gops` (as if the layer were dense), `effective_gops` (of `multiply_adds`), `peak_gops`,
    `bandwidth_gbs`, `floor_us` and `share_of_floor` as in the sparse grid, `relative_error` (Frobenius, to float32 with
    the same weights), and `time_ratio`: median and quartiles of the time of each of `REFERENCES` over this one's.
    """
    parts: dict[str, Parts] = {}
    built: dict[str, Bind] = {}
    built_for = None
    for cell in cells:
        k, n, m = cell["k"], cell["n"], cell["m"]
        if built_for != (k, n):
            parts = _parts(k, n, candidates)
            built = {name: candidate.build(*parts[name].modules) for name, candidate in candidates.items()}
            built_for = (k, n)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        calls = {name: bind(x) for name, bind in built.items()}
        timings, peaks = run_cell(calls, Turns(rounds, min_time_s, pause_s, budget_s))
        references = [name for name in REFERENCES if name in timings]
        records = []
        for name, candidate in candidates.items():
            weight = _weight(m, candidate, parts[name], calls[name], peaks)
            found = {"op": "low_rank_linear", **cell, "candidate": name, **weight, **times(name, timings, references)}
            with torch.inference_mode():
                error = relative_error(calls[name].output(), parts[name](x))
            records.append({**found, **rates(found, found["multiply_adds"]), "relative_error": error})
        yield records


def _parts(k: int, n: int, candidates: Mapping[str, Candidate]) -> dict[str, Parts]:
    """The weights of each candidate, shared among those that have the same."""
    dense = dense_linear(k, n)
    mains: dict[str, nn.Linear | None] = {"": None, "dense": dense}
    if any(candidate.main == "sparse" for candidate in candidates.values()):
        mains["sparse"] = pruned(dense, "unstructured", ZEROS)
    factors: dict[tuple[int, bool], TwoLinears | None] = {(0, False): None}
    found = {}
    for name, candidate in candidates.items():
        key = rank_of(candidate, k, n), not candidate.main  # the bias is the main layer's, where there is one
        if key not in factors:
            factors[key] = two_linears(k, key[0], n, bias=key[1]) if key[0] else None
        found[name] = Parts(mains[candidate.main], factors[key])
    return found


def rank_of(candidate: Candidate, k: int, n: int) -> int:
    """The rank of a candidate's factors in a layer (k, n), 0 where it has none."""
    if isinstance(candidate.rank, Fraction):
        return max(1, int(candidate.rank * min(n, k)))
    return min(candidate.rank, n, k)


def _weight(m: int, candidate: Candidate, parts: Parts, call: Call, peaks: dict[str, float]) -> Record:
    """What a record says about a candidate's weights, and how long this machine takes at least."""
    main, factors = parts.main_weights, parts.factor_weights
    weight_bytes = call.weight_bytes or 4 * (main + factors)
    operations: dict[int, int] = {}
    for bits, weights in ((candidate.main_bits, main), (candidate.factor_bits, factors)):
        if weights:
            operations[bits] = operations.get(bits, 0) + 2 * m * weights
    return {
        "main": candidate.main,
        "main_bits": candidate.main_bits if main else None,
        "rank": parts.rank,
        "rank_share": float(candidate.rank) if isinstance(candidate.rank, Fraction) else None,
        "factor_bits": candidate.factor_bits if factors else None,
        "multiply_adds": main + factors,
        "weight_bytes": weight_bytes,
        **limits(m, operations, weight_bytes, peaks),
    }


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


def summarize_low_rank(records: Sequence[Record]) -> list[Comparison | Cost]:
    """Geometric mean over the shapes and worst cell of every comparison that the records allow."""
    many, one, few = with_rows(records, 32), with_rows(records, 1, 1), with_rows(records, 8, 8)
    by_rows = {"m >= 32": many, "m = 1": one, "m = 8": few}
    halves = {"m <= 64": with_rows(records, 1, 64), "m > 64": with_rows(records, 65)}
    lines: list[Sequence[Comparison | Cost]] = [
        *(against_dense(name, by_rows) for name in ("low_rank_8", "low_rank_4")),
        *(compare_each(f"low_rank_{part}", (f"torch_two_{part}",), "two torch layers", halves) for part in (8, 4)),
        compare_each("low_rank_8", ("ort_two_8",), "two MatMul of ONNX Runtime", halves),
        against_int8("low_rank_int8_4", {"m >= 32": many}),
        *(_costs(records, name, "dense_int8") for name in ("int8_branch_32", "int8_two_call_32")),
        compare_each("int8_branch_32", ("int8_two_call_32",), "the same in two calls", {"whole grid": records}),
        _costs(records, "int4_branch_32", "dense_int4"),
        _costs(records, "sparse_branch_32", "sparse_80"),
    ]
    return [line for part in lines for line in part]


def _costs(records: Sequence[Record], candidate: str, contained: str) -> list[Cost]:
    cell = [record for record in with_rows(records, 128, 128) if (record["k"], record["n"]) == (768, 3072)]
    scopes = {"whole grid": records, "m >= 32": with_rows(records, 32), "768x3072, m = 128": cell}
    lines = (compare(part, candidate, (contained,), against=contained, scope=scope) for scope, part in scopes.items())
    return [Cost(line) for line in lines if line is not None]


# From these the rank guard of LowRank estimates times (methods/break_even.py).
SPEEDS = ("low_rank_8", "low_rank_4", "low_rank_2", "low_rank_int8_4", "dense_int8", "dense_int4", "sparse_80")


def speeds(records: Iterable[Record]) -> list[str]:
    """How fast a multiply-add is beside one of the best dense fp32 layer: a line, or none without m >= 32."""
    found: dict[str, list[float]] = {}
    for record in with_rows(records, 32):
        if record["candidate"] in SPEEDS and measured(record, DENSE_FP32):
            share = record["multiply_adds"] / (record["k"] * record["n"])
            found.setdefault(record["candidate"], []).append(best_ratio(record, DENSE_FP32) * share)
    if not found:
        return []
    parts = ", ".join(f"{name} {geometric_mean(values):.2f}" for name, values in found.items())
    return [f"multiply-adds a second, those of the best dense fp32 = 1, m >= 32 (geometric mean): {parts}"]


def break_even_rank(records: Iterable[Record]) -> list[BreakEven]:
    """Per number of rows, from the records of our float32 layer at all its ranks."""
    ours = [record for record in records if record["candidate"] in RANKS]
    return break_even(ours, lambda record: float(record["rank_share"]), "of min(n, k) as rank")
