"""The sparse grid: `pycompress bench sparse` and `benchmarks/kernels.py --op sparse`.

All candidates of a cell (k, n, m) take their turns in one run, so that each sparse layer is compared with dense
layers that were timed beside it. Candidates of the same pattern and share of zeros hold the same weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from pycompress.benchmark import grid
from pycompress.benchmark.break_even import BreakEven, break_even
from pycompress.benchmark.peers import Build, Call, available, ort_fp32, torch_csr, torch_fp32
from pycompress.benchmark.results import Comparison, Record
from pycompress.methods import Int8, Sparse

# ------------------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class Candidate(grid.Candidate):
    """Built from the layer that was pruned."""

    bits: int = 32  # of the weights: 8 or 32
    pattern: str = "dense"  # or one of the patterns of Sparse
    zeros: int = 0  # per cent of the weights


PEERS: dict[str, Build] = {"torch_fp32": torch_fp32, "ort_fp32": ort_fp32, "torch_csr": torch_csr}
ZEROS = (50, 70, 80, 90, 95)  # per cent
FEWER_ZEROS = (20, 30, 40)  # ours alone, where dense layers may be as fast: for the break-even
N_OF_M = {"2:4": 50, "4:8": 50, "4:16": 75}  # pattern -> per cent of zeros
INT8 = ("sparse_int8_80", "16x4_int8_80", "1x4_int8_80", *(f"{pattern}_int8" for pattern in N_OF_M))


def sparse_candidates(peers: Mapping[str, Build]) -> dict[str, Candidate]:
    """Ours and those of `PEERS` that run here, by name: what it is, bits, per cent of zeros."""
    fp32, int8 = grid.ours(Sparse(bits=32)), grid.ours(Sparse(bits=8))  # which keep the zeros that are there
    found = {name: Candidate(peers[name]) for name in grid.DENSE_FP32 if name in peers}
    found["dense_int8"] = Candidate(grid.ours(Int8(7)), 8)
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
    copy = nn.Linear(linear.in_features, linear.out_features, dtype=weight.dtype, device=weight.device)
    copy.weight = nn.Parameter(weight * mask, requires_grad=False)
    copy.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return copy


def works(linear: nn.Linear, candidates: Mapping[str, Candidate]) -> dict[str, grid.Work]:
    """What the candidates compute: the layer without some of its weights. `nnz` counts them before int8 rounds some to zero,
    `form` is the kernel format of ours and the call of torch CSR."""
    layers = {key: pruned(linear, *key) for key in {(one.pattern, one.zeros) for one in candidates.values()}}

    def work(of: Candidate) -> grid.Work:
        layer = layers[of.pattern, of.zeros]
        nnz = int(layer.weight.count_nonzero())

        def facts(call: Call) -> Record:
            return {"bits": of.bits, "pattern": of.pattern, "zeros": of.zeros, "nnz": nnz, "form": call.form}

        return grid.Work((layer,), layer, {of.bits: nnz}, 4 * linear.weight.numel(), facts)

    return {name: work(candidate) for name, candidate in candidates.items()}


def chosen() -> grid.Chosen:
    peers, missing = available(PEERS)
    return grid.Chosen(sparse_candidates(peers), missing)


def is_reference(name: str) -> bool:
    """Whether other candidates are held against this one."""
    return name in (*grid.DENSE_FP32, "dense_int8") or name.startswith("torch_csr_")


# ---------------------------------------------------------------------------------------------------- summary


def summarize(records: Sequence[Record]) -> list[Comparison]:
    """Geometric mean over the shapes and worst cell of every comparison that the records allow."""
    by_rows = {f"m = {m}": grid.with_rows(records, m, m) for m in sorted({record["m"] for record in records})}
    many = {"m >= 128": grid.with_rows(records, 128)}
    lines = [
        *(grid.against_dense(f"sparse_fp32_{zeros}", by_rows) for zeros in ZEROS),
        *(_against_csr(zeros, {"whole grid": records, **many}) for zeros in ZEROS),
        *(grid.against_dense(name, many) for name in ("dense_int8", "16x1_fp32_80", *INT8)),
        *(grid.against_dense(f"{pattern}_int8", {"m >= 32": grid.with_rows(records, 32)}) for pattern in N_OF_M),
        *(grid.against_int8(name, many) for name in INT8),
    ]
    return [line for part in lines for line in part]


def _against_csr(zeros: int, scopes: grid.Scopes) -> list[Comparison]:
    return grid.compare_each(f"sparse_fp32_{zeros}", (f"torch_csr_{zeros}",), "torch CSR", scopes)


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


def break_even_density(records: Iterable[Record]) -> list[BreakEven]:
    """Per number of rows, from the records of the unstructured fp32 layer at all its shares of zeros."""
    ours = [record for record in records if record["candidate"].startswith("sparse_fp32_")]
    return break_even(ours, lambda record: (100 - record["zeros"]) / 100, "non-zeros")


GRID = grid.Grid("sparse_linear", works, is_reference, chosen, (summarize, csr_forms, break_even_density))
