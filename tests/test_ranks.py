"""Ranks shared out over layers: against every other way to share them out, and against NumPy. Properties, never vectors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods import InputStatistics, LowRank, Refused, ranks
from pycompress.methods.inputs import DAMPING
from pycompress.methods.ranks import Layer


def layer(size: int, cost: int, most: int | None = None, dense: int | None = None) -> Layer:
    wins = torch.rand(size, dtype=torch.float64).square().sort(descending=True).values
    return Layer(wins * 10 ** float(torch.rand(())), cost, size if most is None else most, dense)


def lost(layers: Sequence[Layer], found: Sequence[int | None]) -> float:
    return sum(0.0 if r is None else float(own.wins[r:].sum()) for own, r in zip(layers, found, strict=True))


def cost(layers: Sequence[Layer], found: Sequence[int | None]) -> int:
    return sum((own.dense or 0) if r is None else r * own.cost for own, r in zip(layers, found, strict=True))


def choices(layers: Sequence[Layer]) -> list[tuple[int | None, ...]]:
    own = [[*range(8, at.most + 1, 8), *([None] if at.dense else [])] for at in layers]
    return list(itertools.product(*own))


@pytest.mark.parametrize("dense", [False, True])
def test_no_other_ranks_lose_less(dense: bool) -> None:
    """Against all there are: where the next step does not fit, at most what a budget without the dearest step would lose."""
    for seed in range(12):
        torch.manual_seed(seed)
        layers = [layer(32, 70, 24, 2100 if dense else None), layer(24, 50), layer(40, 90, 32, 3000 if dense else None)]
        every = choices(layers)
        for budget in (1700, 2600, 4000, 5500, 9000):
            found = ranks.shared_out(layers, budget)
            assert cost(layers, found) <= budget
            # The dense weight is a step of its own; without one, that of the widest layer is the dearest.
            dearest = 3000 if dense else 8 * 90
            allowed = min(lost(layers, one) for one in every if cost(layers, one) <= max(budget - dearest, 8 * 210))
            assert lost(layers, found) <= allowed + 1e-12


def test_layers_of_one_size_get_the_best_ranks_there_are() -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        layers = [layer(32, 64) for _ in range(3)]
        for budget in (3 * 8 * 64, 6 * 8 * 64, 10 * 8 * 64 + 5):
            found = ranks.shared_out(layers, budget)
            best = min(lost(layers, one) for one in choices(layers) if cost(layers, one) <= budget)
            assert lost(layers, found) == pytest.approx(best, rel=1e-12)


def test_a_layer_that_no_low_rank_suits_stays_dense_and_the_others_pay() -> None:
    flat, steep = torch.ones(32, dtype=torch.float64), 0.5 ** torch.arange(32, dtype=torch.float64)
    layers = [Layer(flat, 64, 15, 1024), Layer(steep, 64, 15, 1024)]
    assert ranks.shared_out(layers, 2048) == [None, None]
    assert ranks.shared_out(layers, 2047) == [None, 8]
    assert ranks.shared_out(layers, 1100) == [8, 8], "there was nothing left for the dense weight"
    with pytest.raises(ValueError, match="the budget is 1000, expected at least 1024: the smallest ranks"):
        ranks.shared_out(layers, 1000)


def test_layers_that_can_have_no_rank() -> None:
    layers = [
        Layer(torch.ones(2, dtype=torch.float64), 66, 0, 128),
        Layer(torch.ones(3, dtype=torch.float64), 20, 3, 61),
    ]
    assert ranks.shared_out(layers, 188) == [None, 3]


def test_ties_go_to_the_first_layers() -> None:
    layers = [Layer(torch.ones(16, dtype=torch.float64), 32, 16)] * 3
    assert ranks.shared_out(layers, 4 * 8 * 32) == [16, 8, 8]


def test_a_share_of_one_layer() -> None:
    assert ranks.of_share((384, 384), 0.5) == 96
    assert ranks.of_share((384, 384), 0.52) == 96, "down to a multiple of 8"
    assert ranks.of_share((16, 16), 0.9) == 7
    assert ranks.of_share((1, 7), 0.1) == 1
    assert ranks.of_share((10, 10), 1.0) == 5
    assert LowRank(share=0.5, rank_guard=False).compress(torch.randn(64, 64)).rank == 16


# --- what a rank wins -------------------------------------------------------------------------------------------------


def statistics(x: Tensor) -> InputStatistics:
    return InputStatistics(len(x), x.T @ x / len(x), x.mean(dim=0))


def reference(w: np.ndarray, x: np.ndarray | None) -> np.ndarray:
    """Singular values of D W L by NumPy, the spectrum's sum rooted."""
    if x is None:
        root, spread = np.eye(w.shape[1]), (w**2).sum(axis=1)
    else:
        moment = x.T @ x / len(x)
        root = np.linalg.cholesky(moment + DAMPING * np.diag(moment).mean() * np.eye(len(moment)))
        spread = (x @ w.T).var(axis=0)
    spread = spread + DAMPING * spread.mean()
    squares = np.linalg.svd(w @ root / np.sqrt(spread)[:, None], compute_uv=False) ** 2
    return np.asarray(squares / np.sqrt(squares.sum()))


@pytest.mark.parametrize(("n", "k"), [(6, 9), (9, 6), (1, 5), (5, 1)])
def test_what_ranks_win_is_the_papers_truncation_loss(n: int, k: int) -> None:
    w, x = torch.randn(n, k, dtype=torch.float64), torch.randn(50, k, dtype=torch.float64) + 2
    assert np.allclose(ranks.wins(w, statistics(x)).numpy(), reference(w.numpy(), x.numpy()), rtol=1e-9, atol=1e-10)
    assert np.allclose(ranks.wins(w, None).numpy(), reference(w.numpy(), None), rtol=1e-9, atol=1e-10)


def test_the_size_of_a_weight_and_of_its_outputs_says_nothing() -> None:
    w, inputs = torch.randn(12, 10, dtype=torch.float64), statistics(torch.randn(90, 10, dtype=torch.float64))
    each = torch.logspace(-3, 3, 12, dtype=torch.float64)[:, None]
    for told in (None, inputs):
        assert torch.allclose(ranks.wins(w, told), ranks.wins(w * 1e3, told))
    assert not torch.allclose(ranks.wins(w, inputs)[:3], ranks.wins(w * each, inputs)[:3], rtol=0.01), "damped"


@pytest.mark.parametrize("x", [torch.zeros(4, 6), torch.ones(1, 6), torch.eye(6)[:2].repeat(3, 1) * 1e6])
def test_degenerate_inputs(x: Tensor) -> None:
    """None at all, one sample, dead features and outliers: finite, and never below zero."""
    for w in (torch.randn(5, 6), torch.zeros(5, 6), torch.randn(1, 6)):
        wins = ranks.wins(w.double(), statistics(x.double()))
        assert torch.isfinite(wins).all()
        assert (wins >= 0).all()
        assert len(wins) == min(w.shape)


# --- by way of LowRank ------------------------------------------------------------------------------------------------


def model_of(*weights: Tensor) -> nn.Sequential:
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
    for own, w in zip(layers, weights, strict=True):
        own.weight.data = w.clone()
    return nn.Sequential(*layers)


def narrow(n: int, k: int, rank: int) -> Tensor:
    return torch.randn(n, rank) @ torch.randn(rank, k) / math.sqrt(rank * k)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_model_shares_one_budget(calibrated: bool, bits: int) -> None:
    weights = [narrow(96, 64, 8), narrow(64, 96, 40), narrow(64, 64, 20)]
    model = model_of(*weights)
    x = torch.randn(300, 64)
    calibration = pc.calibrate(model, [x]) if calibrated else None
    own, even = (
        pc.compress(model, LowRank(share=0.45, scope=scope, bits=bits, rank_guard=False), calibration=calibration)
        for scope in ("model", "layer")
    )
    found = [record.rank or 0 for record in pc.summary(own).layers]
    spent = sum(r * sum(w.shape) for r, w in zip(found, weights, strict=True))
    assert spent <= 0.45 * sum(w.numel() for w in weights)
    assert found[1] > found[0] >= 8
    assert all(r % 8 == 0 for r in found)
    with torch.no_grad():
        error = [float((small(x) - model(x)).norm()) for small in (own, even)]
    assert bits == 8 or error[0] < error[1], "with int8, the rounding of the activations is the larger part"


def test_a_layer_whose_rank_would_be_no_faster_stays_dense_and_says_why() -> None:
    model = model_of(narrow(96, 96, 8), torch.eye(96), narrow(96, 96, 8))
    small = pc.compress(model, LowRank(share=0.6, scope="model"))
    assert [type(m).__name__ for m in small] == ["LowRankLinear", "Linear", "LowRankLinear"]
    reason = pc.summary(small).layers[1].reason
    assert reason.startswith("the shared budget keeps it dense: it would need a rank above the break-even, ")
    tiny = pc.compress(model_of(narrow(96, 96, 8), torch.randn(1, 96)), LowRank(share=0.6, scope="model"))
    assert pc.summary(tiny).layers[1].reason == "the shared budget keeps it dense: no rank is faster"


def test_the_same_ranks_at_any_number_of_threads() -> None:
    weights = [torch.randn(200, 150) @ torch.diag(torch.linspace(1, 0.1, 150) ** p) for p in (1, 2, 3)]
    inputs = [statistics(torch.randn(400, 150).double()) for _ in weights]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(LowRank(share=0.4, scope="model", rank_guard=False).for_layers(weights, inputs))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_what_is_refused() -> None:
    w = torch.randn(32, 32)
    with pytest.raises(ValueError, match=r"LowRank: share is 0\.01: the budget is 10, expected at least 512"):
        LowRank(share=0.01, scope="model", rank_guard=False).for_layers([w])
    with pytest.raises(ValueError, match="scope is 'model', expected the method that for_layers"):
        LowRank(share=0.5, scope="model").compress(w)
    ones = torch.ones(2, 64)
    stays, _ = LowRank(share=0.6, scope="model").for_layers([ones[:1], w])
    with pytest.raises(Refused, match="the shared budget keeps it dense"):
        stays.compress(ones[:1])
    one = LowRank(4)
    assert one.for_layers([w, w]) == [one, one]
