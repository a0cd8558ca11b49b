"""The sparse grid: `pycompress bench sparse` and `benchmarks/kernels.py --op sparse`.

All candidates of a cell (k, n, m) take their turns in one run, so that each sparse layer is compared with dense
layers that were timed beside it. Candidates of the same pattern and share of zeros hold the same weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pycompress.benchmark.break_even import BreakEven, break_even
from pycompress.benchmark.grid import (
    DENSE_FP32,
    Scopes,
    Turns,
    against_dense,
    against_int8,
    compare_each,
    dense_int8,
    limits,
    packed_call,
    rates,
    run_cell,
    times,
    with_rows,
)
from pycompress.benchmark.peers import Bind, Build, Call, dense_linear, ort_fp32, relative_error, torch_csr, torch_fp32
from pycompress.benchmark.results import Comparison, Record
from pycompress.methods.sparse import Sparse
from pycompress.nn.sparse import SparseLinear

# ------------------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class Candidate:
    """What is timed, and the weights that it gets."""

    build: Build  # from the layer that was pruned
    bits: int = 32  # of the weights: 8 or 32
    pattern: str = "dense"  # or one of the patterns of Sparse
    zeros: int = 0  # per cent of the weights


def pycompress_sparse(bits: int) -> Build:
    method = Sparse(bits=bits)  # keeps the zeros that are there
    return lambda linear: packed_call(SparseLinear.from_dense(linear, method=method))


SPARSE_PEERS: dict[str, Build] = {"torch_fp32": torch_fp32, "ort_fp32": ort_fp32, "torch_csr": torch_csr}
ZEROS = (50, 70, 80, 90, 95)  # per cent
FEWER_ZEROS = (20, 30, 40)  # ours alone, where dense layers may be as fast: for the break-even
N_OF_M = {"2:4": 50, "4:8": 50, "4:16": 75}  # pattern -> per cent of zeros
INT8 = ("sparse_int8_80", "16x4_int8_80", "1x4_int8_80", *(f"{pattern}_int8" for pattern in N_OF_M))


def sparse_candidates(peers: Mapping[str, Build]) -> dict[str, Candidate]:
    """Ours and those of `SPARSE_PEERS` that run here, by name: what it is, bits, per cent of zeros."""
    fp32, int8 = pycompress_sparse(32), pycompress_sparse(8)
    found = {name: Candidate(peers[name]) for name in DENSE_FP32 if name in peers}
    found["dense_int8"] = Candidate(dense_int8, 8)
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
        timings, peaks = run_cell(calls, Turns(rounds, min_time_s, pause_s, budget_s))
        errors = _errors(calls, candidates, by_zeros, x)
        references = [name for name in timings if is_reference(name)]
        records = []
        for name, candidate in candidates.items():
            nnz = int(by_zeros[candidate.pattern, candidate.zeros].weight.count_nonzero())
            weight = _weight(cell, candidate, calls[name], nnz, peaks)
            found = {"op": "sparse_linear", **cell, "candidate": name, **weight, **times(name, timings, references)}
            records.append({**found, **rates(found, nnz), "relative_error": errors[name]})
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
    with torch.inference_mode():
        expected = {key: linear(x) for key, linear in by_zeros.items()}
        return {
            name: relative_error(call.output(), expected[candidates[name].pattern, candidates[name].zeros])
            for name, call in calls.items()
        }


def _weight(cell: Record, candidate: Candidate, call: Call, nnz: int, peaks: dict[str, float]) -> Record:
    """What a record says about a candidate's weight, and how long this machine takes at least."""
    weight_bytes = call.weight_bytes or 4 * cell["k"] * cell["n"]
    return {
        "bits": candidate.bits,
        "pattern": candidate.pattern,
        "zeros": candidate.zeros,
        "nnz": nnz,
        "form": call.form,
        "weight_bytes": weight_bytes,
        **limits(cell["m"], {candidate.bits: 2 * cell["m"] * nnz}, weight_bytes, peaks),
    }


def is_reference(name: str) -> bool:
    """Whether other candidates are held against this one."""
    return name in (*DENSE_FP32, "dense_int8") or name.startswith("torch_csr_")


# ---------------------------------------------------------------------------------------------------- summary


def summarize_sparse(records: Sequence[Record]) -> list[Comparison]:
    """Geometric mean over the shapes and worst cell of every comparison that the records allow."""
    by_rows = {f"m = {m}": with_rows(records, m, m) for m in sorted({record["m"] for record in records})}
    many = {"m >= 128": with_rows(records, 128)}
    lines = [
        *(against_dense(f"sparse_fp32_{zeros}", by_rows) for zeros in ZEROS),
        *(_against_csr(zeros, {"whole grid": records, **many}) for zeros in ZEROS),
        *(against_dense(name, many) for name in ("dense_int8", "16x1_fp32_80", *INT8)),
        *(against_dense(f"{pattern}_int8", {"m >= 32": with_rows(records, 32)}) for pattern in N_OF_M),
        *(against_int8(name, many) for name in INT8),
    ]
    return [line for part in lines for line in part]


def _against_csr(zeros: int, scopes: Scopes) -> list[Comparison]:
    return compare_each(f"sparse_fp32_{zeros}", (f"torch_csr_{zeros}",), "torch CSR", scopes)


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
