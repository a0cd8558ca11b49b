"""The cases of the CUDA benchmark: that their weights are what they are named for, and what can be computed without a device."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pycompress.benchmark import cuda as measuring
from pycompress.benchmark import cuda_low_rank, cuda_sparse
from pycompress.benchmark.cuda import Case, Set
from pycompress.benchmark.cuda_int8 import INT8
from pycompress.ops.cuda import native
from pycompress.ops.cuda import sparse as forms
from pycompress.weights import Int8Weight, LowRankWeight, SparseWeight

CASES = (
    *INT8,
    *cuda_sparse.STRUCTURED,
    *cuda_sparse.BLOCK_SPARSE,
    *cuda_low_rank.LOW_RANK_WIDE,
    *cuda_low_rank.SIDE_BRANCH,
)


def one_of(case: Case, m: int, k: int, n: int) -> Set:
    """As the benchmark makes them, on the CPU and in float32."""
    linear = nn.Linear(k, n)
    assert case.weight is not None
    weight = case.weight(n, k)
    with torch.no_grad():
        linear.weight.copy_(weight.decompress())
    return Set(torch.randn(m, k), linear, weight)


def test_cases_can_be_told_apart() -> None:
    assert len({case.op for case in CASES}) == len(CASES)
    assert all("torch_bf16" in case.builds and case.shapes for case in CASES)


@pytest.mark.parametrize(
    ("case", "form", "density"),
    [
        (cuda_sparse.STRUCTURED[0], "structured", 0.5),
        *zip(cuda_sparse.BLOCK_SPARSE, ("blocks64", "blocks64", "blocks32", "blocks16"), (0.2, 0.1, 0.2, 0.2), strict=True),
    ],
    ids=lambda value: value.op if isinstance(value, Case) else "",
)  # fmt: skip
def test_sparse_cases_run_in_their_form(case: Case, form: str, density: float) -> None:
    assert case.weight is not None
    weight = case.weight(640, 1280)
    assert isinstance(weight, SparseWeight)
    assert weight.density == pytest.approx(density, abs=0.01)
    assert torch.equal(weight.values, weight.values.bfloat16().float())
    for int8 in (False, True):
        assert forms.chosen_format(weight.mask.numpy(), int8=int8) == form


def test_low_rank_cases() -> None:
    wide, branch = cuda_low_rank.an_eighth(96, 128), cuda_low_rank.beside_int8(96, 128)
    assert (wide.rank, wide.residual) == (16, None)
    assert branch.rank == 32
    assert isinstance(branch.residual, Int8Weight)
    one = one_of(cuda_low_rank.LOW_RANK_WIDE[0], 5, 128, 96)
    assert isinstance(one.weight, LowRankWeight)
    expected = one.linear(one.x)
    torch.testing.assert_close(cuda_low_rank.torch_two_linears(one)(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cuda_low_rank.ours(one)(), expected, rtol=1e-4, atol=1e-5)


def test_sparse_candidates_compute_what_the_layer_does() -> None:
    one = one_of(cuda_sparse.STRUCTURED[0], 5, 128, 96)
    expected = one.linear(one.x)
    torch.testing.assert_close(cuda_sparse.ours(32)(one)(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cuda_sparse.ours(8)(one)(), expected, rtol=0.05, atol=0.1)


def test_every_kernel_that_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"name": f"{arch}_{element}_{size}", "arch": arch, "element": element, "size": size}
        for arch, element, size in itertools.product((80, 90), (0, 1, 2), (16, 64))
    ]
    monkeypatch.setattr(native, "native", lambda *_: SimpleNamespace(blocks_kernels=lambda: rows))
    for capability, archs in (((8, 9), (80,)), ((9, 0), (80, 90)), ((10, 0), (80,))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        expected = {f"pycompress_{arch}_{element}_64" for arch in archs for element in (0, 2)}
        assert cuda_sparse.every_kernel("blocks_kernels", 64).keys() == expected


def test_lines_name_the_case() -> None:
    base = {"op": "blocks", "m": 1, "k": 2, "n": 3}
    measured = {
        **base, "candidate": "ours", "us": 10.0, "tops": 1.0, "host_us": 2.0, "kernels": ["a", "b"],
        "time_ratio": {"torch_bf16": [2.5, 2.4, 2.6]},
    }  # fmt: skip
    assert list(measuring.lines([measured, {**base, "candidate": "peer", "unavailable": "no library"}])) == [
        "blocks m=1 k=2 n=3 ours: 10.0 us, 1 TOP/s, 2.50x torch bf16, 2.0 us in Python; a, b",
        "blocks m=1 k=2 n=3 peer: not measured: no library",
    ]
