"""Sparse with what calibration saw: each chooser beside a float64 reference of its paper, int8, degenerate inputs, threads."""

from __future__ import annotations

import copy
import pickle
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods.inputs import DAMPING, InputStatistics
from pycompress.methods.int8 import Int8
from pycompress.methods.masks import N_OF_M
from pycompress.methods.sparse import Sparse

Array = NDArray[np.float64]
PATTERNS: list[dict[str, Any]] = [
    {"density": 0.5},
    {"density": 0.4, "scope": "row"},
    {"density": 0.5, "pattern": "16x4"},
    {"density": 0.5, "pattern": "1x4"},
    {"pattern": "2:4"},
    {"pattern": "4:16"},
]


def statistics(x: Tensor) -> InputStatistics:
    x = x.double()
    return InputStatistics(len(x), x.T @ x / len(x), x.mean(dim=0))


def mixed_inputs(rows: int, k: int) -> Tensor:
    """Correlated, of different sizes."""
    return torch.randn(rows, k // 2 + 1) @ torch.randn(k // 2 + 1, k) * torch.logspace(-1, 1, k) + 0.1 * torch.randn(
        rows, k
    )


def lost(w: Tensor, x: Tensor, inputs: InputStatistics) -> float:
    error = (w - x).double()
    return float(((error @ inputs.moment("test", w.shape[1])) * error).sum())


# --- references -------------------------------------------------------------------------------------------------------


def sparse_gpt(w: Array, moment: Array, density: float, n_of_m: tuple[int, int] | None, block: int) -> Array:
    """Algorithm 1 of the paper, row by row and column by column."""
    w, k = w.copy(), len(moment)
    inverse = np.linalg.inv(moment + DAMPING * moment.diagonal().mean() * np.eye(k))
    upper = np.linalg.cholesky(inverse).T
    keep = np.ones(w.shape, bool)
    for j in range(k):
        if n_of_m is None and j % block == 0:
            saliency = w[:, j : j + block] ** 2 / upper.diagonal()[j : j + block] ** 2
            order = np.argsort(-saliency.ravel(), kind="stable")
            own = np.zeros(saliency.size, bool)
            stop = min(j + block, k)
            own[order[: round(density * len(w) * stop) - round(density * len(w) * j)]] = True
            keep[:, j : j + block] = own.reshape(saliency.shape)
        if n_of_m is not None and j % n_of_m[1] == 0:
            saliency = w[:, j : j + n_of_m[1]] ** 2 / upper.diagonal()[j : j + n_of_m[1]] ** 2
            rank = np.argsort(np.argsort(-saliency, axis=1, kind="stable"), axis=1)
            keep[:, j : j + n_of_m[1]] = rank < n_of_m[0]
        error = np.where(keep[:, j], 0.0, w[:, j]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        w[:, j] = np.where(keep[:, j], w[:, j], 0.0)
    return w


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:16"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (16, 48), (3, 130)])
def test_sparse_gpt_is_that_of_the_paper(shape: tuple[int, int], pattern: str) -> None:
    w, inputs = torch.randn(shape), statistics(mixed_inputs(200, shape[1]))
    density = None if pattern in N_OF_M else 0.5
    found = Sparse(density, pattern, choose="sparsegpt", inputs=inputs).compress(w).decompress()
    moment = inputs.moment("test", shape[1]).numpy()
    expected = sparse_gpt(w.double().numpy(), moment, 0.5, N_OF_M.get(pattern), 128)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (16, 48)])
def test_wanda_is_that_of_the_paper(shape: tuple[int, int]) -> None:
    w, x = torch.randn(shape), mixed_inputs(200, shape[1])
    score = w.double().abs().numpy() * np.linalg.norm(x.double().numpy(), axis=0)
    rank = np.argsort(np.argsort(-score, axis=1, kind="stable"), axis=1)
    expected = np.where(rank < round(0.4 * shape[1]), w.numpy(), 0)
    found = Sparse(0.4, scope="row", choose="wanda", inputs=statistics(x)).compress(w)
    assert np.array_equal(found.decompress().numpy(), expected)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_admm_keeps_the_least_squares_solution_of_its_support(pattern: str) -> None:
    w, inputs = torch.randn(12, 32), statistics(mixed_inputs(400, 32))
    density = None if pattern in N_OF_M else 0.5
    method = Sparse(density, pattern, inputs=inputs)
    found, mask = method.compress(w).decompress(), method.prune(w)
    assert torch.equal(found != 0, mask)
    moment = inputs.moment("test", 32)
    damped = moment + 1e-3 * torch.diag(moment.diagonal())
    best = torch.zeros_like(w, dtype=torch.float64)
    for row, own, given in zip(best, mask, w.double(), strict=True):
        row[own] = torch.linalg.solve(damped[own][:, own], (damped @ given)[own])
    assert lost(w, found, inputs) <= lost(w, best.float(), inputs) * 1.02
    assert float((found - best).norm() / best.norm()) < 0.05


def test_admm_comes_near_the_best_of_all_supports() -> None:
    """Brute force over 4 of 8 weights; magnitude is far from it."""
    ratios, plain = [], []
    for _ in range(10):
        w, inputs = torch.randn(1, 8), statistics(mixed_inputs(100, 8))
        moment, given = inputs.moment("test", 8), w[0].double()
        errors = []
        for chosen in combinations(range(8), 4):
            own = list(chosen)
            x = torch.zeros_like(given)
            x[own] = torch.linalg.solve(moment[own][:, own], (moment @ given)[own])
            errors.append(lost(w, x[None].float(), inputs))
        ratios.append(lost(w, Sparse(0.5, inputs=inputs).compress(w).decompress(), inputs) / min(errors))
        plain.append(lost(w, Sparse(0.5).compress(w).decompress(), inputs) / min(errors))
    assert float(np.median(ratios)) < 1.2 < float(np.median(plain))


# --- one beside another -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_admm_never_ends_above_sparse_gpt(seed: int) -> None:
    torch.manual_seed(seed)
    n, k = 16 * (1 + seed % 4), 16 * (1 + seed % 5)
    w, inputs = torch.randn(n, k), statistics(mixed_inputs(3 * k, k))
    options = PATTERNS[seed % len(PATTERNS)]
    errors = {
        choose: lost(w, Sparse(**options, choose=choose, inputs=inputs).compress(w).decompress(), inputs)
        for choose in ("admm", "sparsegpt", "magnitude")
    }
    assert errors["admm"] <= errors["sparsegpt"]
    assert errors["admm"] < errors["magnitude"]


@pytest.mark.parametrize("options", PATTERNS, ids=str)
@pytest.mark.parametrize("choose", ["admm", "sparsegpt", "wanda"])
def test_every_choice_keeps_the_pattern_and_the_count(options: dict[str, Any], choose: str) -> None:
    w, inputs = torch.randn(37, 150), statistics(mixed_inputs(200, 150))
    mask = Sparse(**options, choose=choose, inputs=inputs).prune(w)
    assert int(mask.sum()) in (int(Sparse(**options).prune(w).sum()), int(Sparse(**options).prune(mask.float()).sum()))
    assert torch.equal(Sparse(**options).prune(mask.float()), mask), "it is a mask of the pattern"


@pytest.mark.parametrize("options", PATTERNS, ids=str)
def test_int8_loses_little_more_and_never_more_than_plain_rounding(options: dict[str, Any]) -> None:
    w, inputs = torch.randn(32, 64), statistics(torch.randn(200, 40) @ torch.randn(40, 64))
    wide = Sparse(**options, inputs=inputs).compress(w)
    narrow = Sparse(**options, bits=8, inputs=inputs).compress(w)
    plain = Int8(7).compress(wide.decompress())
    assert narrow.bits == 8 and narrow.scale is not None and torch.equal(narrow.scale, plain.scale)
    damped = InputStatistics(
        1, inputs.moment("test", 64) + 1e-3 * torch.diag(inputs.squares("test", 64)), torch.zeros(64).double()
    )
    assert lost(w, narrow.decompress(), damped) <= lost(w, plain.decompress(), damped) * (1 + 1e-5)
    assert lost(w, narrow.decompress(), inputs) <= lost(w, wide.decompress(), inputs) * 1.05


def test_importance_ranks_and_the_rest_is_fitted() -> None:
    w, inputs, importance = torch.randn(8, 24), statistics(mixed_inputs(100, 24)), torch.rand(8, 24)
    method = Sparse(0.5, inputs=inputs)
    assert torch.equal(method.prune(w, importance), Sparse(0.5).prune(importance))
    fitted = method.compress(w, importance).decompress()
    assert lost(w, fitted, inputs) < lost(w, Sparse(0.5).compress(w, importance).decompress(), inputs)


def test_zeros_that_are_there_lose_nothing() -> None:
    w, inputs = torch.randn(8, 24), statistics(mixed_inputs(100, 24))
    mask = torch.rand(8, 24) < 0.5
    left = torch.where(mask, w, 0.0)
    assert torch.allclose(Sparse(inputs=inputs).compress(left).decompress(), left, rtol=1e-6, atol=0)
    fitted = Sparse.from_mask(mask).with_inputs(inputs).compress(w).decompress()
    assert torch.equal(fitted != 0, mask)
    assert lost(w, fitted, inputs) < lost(w, left, inputs)


# --- degenerate inputs ------------------------------------------------------------------------------------------------


def degenerate() -> dict[str, Tensor]:
    x = torch.randn(50, 32)
    dead, twins, outlier, tiny = x.clone(), x.clone(), x.clone(), x.clone()
    dead[:, ::2] = 0.0
    twins[:, 16:] = twins[:, :16]
    outlier[:, 3] *= 1e8
    tiny[:, 5:] *= 1e-20
    return {
        "dead": dead, "twins": twins, "one row": x[:1], "outlier": outlier, "tiny": tiny, "zero": torch.zeros(5, 32),
        "one live": torch.zeros(5, 32).index_fill(1, torch.tensor([7]), 2.0), "huge": x * 1e18, "small": x * 1e-18,
    }  # fmt: skip


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("choose", ["admm", "sparsegpt", "wanda"])
@pytest.mark.parametrize("case", degenerate())
def test_degenerate_inputs(case: str, choose: str, bits: int) -> None:
    x = degenerate()[case]
    for w in (torch.randn(16, 32), torch.zeros(16, 32), torch.randn(1, 32), torch.randn(16, 32) * 1e30):
        for options in PATTERNS:
            method = Sparse(**options, choose=choose, bits=bits, inputs=statistics(x))
            weight = method.compress(w).decompress()
            assert torch.isfinite(weight).all()
            assert not weight[~method.prune(w)].any()
    if case == "dead" and choose != "sparsegpt":
        mask = Sparse(0.5, scope="row", choose=choose, inputs=statistics(x)).prune(torch.randn(16, 32))
        assert not mask[:, ::2].any(), "what is dead goes first"


@pytest.mark.parametrize("choose", ["admm", "sparsegpt", "wanda"])
def test_one_feature_and_one_channel(choose: str) -> None:
    for density in (0.0, 1.0):
        found = Sparse(density, choose=choose, inputs=statistics(torch.randn(9, 1))).compress(torch.ones(1, 1))
        assert found.decompress().item() == pytest.approx(density)


@pytest.mark.parametrize("choose", ["admm", "sparsegpt"])
def test_a_moment_of_no_inputs(choose: str) -> None:
    wrong = InputStatistics(9, torch.ones(4, 4).double() - 3 * torch.eye(4).double() * 0.5, torch.zeros(4).double())
    with pytest.raises(ValueError, match=r"Sparse: the second moment of the inputs has .* expected none"):
        Sparse(0.5, choose=choose, inputs=wrong).compress(torch.randn(3, 4))


# --- threads, methods as values, models -------------------------------------------------------------------------------


@pytest.mark.parametrize("choose", ["admm", "sparsegpt", "wanda"])
def test_the_same_bits_on_any_number_of_threads(choose: str) -> None:
    w, inputs = torch.randn(96, 200), statistics(mixed_inputs(300, 200))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            method = Sparse(0.5, bits=8, choose=choose, inputs=inputs)
            found.append(
                (method.compress(w).decompress(), Sparse(0.5, choose=choose, inputs=inputs).compress(w).values)
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for pair in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(pair, found[0], strict=True))


def test_a_method_with_inputs_is_a_value() -> None:
    inputs = statistics(torch.randn(9, 4))
    method = Sparse(0.5).with_inputs(inputs)
    assert method == Sparse(0.5, inputs=inputs) != Sparse(0.5)
    assert len({method, Sparse(0.5, inputs=inputs), Sparse(0.5, choose="wanda", inputs=inputs)}) == 2
    assert repr(Sparse(0.5, choose="wanda")) == "Sparse(density=0.5, choose='wanda')"
    assert "inputs=InputStatistics(rows=9" in repr(method)
    w = torch.randn(3, 4)
    for copied in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        assert torch.equal(copied.compress(w).decompress(), method.compress(w).decompress())


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="choose is 'best', expected None or one of admm, sparsegpt, wanda, magnitude"):
        Sparse(0.5, choose="best")
    with pytest.raises(TypeError, match="inputs is Tensor, expected InputStatistics or None"):
        Sparse(0.5, inputs=torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose is 'admm' and inputs is None"):
        Sparse(0.5, choose="admm").compress(torch.randn(3, 4))
    with pytest.raises(ValueError, match="inputs are 4 features wide, the weight has k = 5"):
        Sparse(0.5, inputs=statistics(torch.randn(9, 4))).compress(torch.randn(3, 5))


def network() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), mixed_inputs(300, 48)


def test_compress_tells_each_layer_of_its_inputs() -> None:
    model, x = network()
    calibration = pc.calibrate(model, [x])
    outputs = model(x).detach()

    def error(method: Sparse, **options: Any) -> float:
        return float((pc.compress(model, method, **options)(x).detach() - outputs).norm())

    assert error(Sparse(0.5), calibration=calibration) < 0.7 * error(Sparse(0.5))
    small = pc.compress(model, Sparse(0.5))
    assert "pruned by magnitude, without a calibration" in str(pc.summary(small))
    assert "magnitude" not in str(pc.summary(pc.compress(model, Sparse(0.5), calibration=calibration)))
    assert "magnitude" not in str(pc.summary(pc.compress(model, Sparse(0.5, choose="magnitude"))))
    dead = pc.calibrate(model, [torch.zeros(5, 48)])
    assert "its inputs were all zero: pruned by magnitude" in str(
        pc.summary(pc.compress(model, Sparse(0.5), calibration=dead))
    )


def test_a_convolution_is_pruned_by_its_patches() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 16, 3)).eval(), torch.randn(8, 4, 9, 9).cumsum(dim=3)
    by_inputs = pc.compress(model, Sparse(0.5), calibration=pc.calibrate(model, [x]))
    by_magnitude = pc.compress(model, Sparse(0.5))
    losses = [float((one(x) - model(x)).detach().norm()) for one in (by_inputs, by_magnitude)]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("pattern", ["unstructured", "16x4"])
def test_one_density_is_shared_out_by_what_the_outputs_lose(pattern: str) -> None:
    weights = [torch.randn(32, 64), 100 * torch.randn(32, 64)]
    inputs = [statistics(torch.randn(99, 64)) for _ in weights]
    own = Sparse(0.5, pattern, scope="model").for_layers(weights, inputs)
    counts = [int(one.prune(w).sum()) for one, w in zip(own, weights, strict=True)]
    assert sum(counts) == 32 * 64
    assert counts[0] > 800, "the scale of a layer says nothing about what it loses"
    plain = Sparse(0.5, pattern, scope="model").for_layers(weights)
    assert int(plain[1].prune(weights[1]).sum()) > 1900


def test_a_calibration_gathers_what_the_choice_needs() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    plan = {"0": Sparse(0.5, choose="wanda"), "1": Sparse(0.5, choose="magnitude")}
    seen = pc.calibrate(model, [torch.randn(16, 8)], plan=plan)
    assert (seen["0"].second_moment, [*seen]) == (None, ["0"])
    result = pc.compress(model, plan, calibration=seen)  # the other one makes no use of inputs
    assert [layer.nnz for layer in result] == [32, 16]
