"""LowRank().compress and its canonical weights: optimal errors, ranks, guards, and what is refused. Properties, never vectors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pycompress as pc
from pycompress.methods import Dense, InputStatistics, Int4, Int8, LowRank, Refused, Sparse, break_even, factors, svd
from pycompress.methods.inputs import Metric
from pycompress.methods.method import MeasuredMethod
from pycompress.profiles import PROFILES, Profile
from pycompress.weights import DenseWeight, LowRankWeight, Weight
from pycompress.weights.low_rank_conv import largest_ranks

SHAPES = [(1, 1), (1, 40), (40, 1), (7, 5), (24, 24), (17, 60), (60, 17)]
EPS32 = 2.0**-24
AVX2 = PROFILES["avx2"]


def free(rank: int | None = None, **options: Any) -> LowRank:
    """Whatever it costs."""
    return LowRank(rank, rank_guard=False, **options)


def tails(w: Tensor) -> np.ndarray:
    """[r]: the Frobenius norm of what the best weight of rank r leaves, by NumPy's SVD in float64; r from 0 to min(n, k)."""
    squares = np.linalg.svd(w.double().numpy(), compute_uv=False) ** 2
    return np.sqrt(np.concatenate([squares[::-1].cumsum()[::-1], [0.0]]))


def lost(w: Tensor, weight: Any, moment: Tensor | None = None) -> float:
    """||(W - W') X||_F over the root of the rows of X, by the definition of the second moment."""
    rest = w.double() - weight.decompress().double()
    m = torch.eye(rest.shape[1], dtype=torch.float64) if moment is None else moment
    return math.sqrt(max(0.0, float(torch.einsum("ni,ij,nj->", rest, m, rest))))


def correlated(rows: int, k: int, decay: float = 0.85) -> Tensor:
    """Inputs [rows, k] whose directions differ much in size."""
    turn = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0]
    return torch.randn(rows, k, dtype=torch.float64) * decay ** torch.arange(k) @ turn.T


def statistics(x: Tensor) -> InputStatistics:
    x = x.double()
    return InputStatistics(len(x), x.T @ x / len(x), x.mean(dim=0))


# --- the optimal error ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_no_weight_of_the_rank_is_closer(shape: tuple[int, int]) -> None:
    """Eckart & Young; beyond the optimum only what storing the factors in float32 costs."""
    w = torch.randn(shape)
    best = tails(w)
    for rank in {1, (min(shape) + 1) // 2, min(shape)}:
        weight = free(rank).compress(w)
        assert weight.shape == shape
        assert weight.rank == rank == np.linalg.matrix_rank(weight.decompress().double().numpy(), tol=1e-5)
        rounding = 4 * EPS32 * math.sqrt(rank) * float(w.double().norm())
        assert best[rank] - rounding <= lost(w, weight) <= best[rank] * (1 + 1e-9) + rounding


@pytest.mark.parametrize("shape", SHAPES)
def test_the_full_rank_gives_the_weight_again(shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    again = free(min(shape)).compress(w).decompress()
    assert torch.allclose(again, w, rtol=0, atol=8 * EPS32 * math.sqrt(min(shape)) * float(w.norm()))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_a_weight_of_low_rank_is_found(n: int, k: int, rank: int, seed: int, size: float) -> None:
    """Also where singular values are tiny or repeated, and whatever the size: the squares lie in float64."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(n, k, rank)
    w = torch.randn(n, rank, generator=generator) @ torch.randn(rank, k, generator=generator) * size
    weight = free(rank).compress(w)
    assert lost(w, weight) <= 1e-5 * float(w.double().norm())


def test_a_weight_of_zeros() -> None:
    for method in (free(3), free(energy=0.5), free(error=0.0), free(2, bits=8), free(2, residual=Int8())):
        weight = method.compress(torch.zeros(5, 8))
        assert not weight.decompress().any()
    assert free(energy=1.0).compress(torch.zeros(5, 8)).rank == 1


def test_the_largest_floats_do_not_overflow() -> None:
    """A factor as large as the weight's norm would; norms that are equal in both factors do not."""
    top = torch.finfo(torch.float32).max
    w = torch.full((64, 48), top / 2)
    weight = free(1).compress(w)
    assert torch.isfinite(weight.decompress()).all()
    assert lost(w / top, LowRankWeight(weight.down / top, weight.up)) < 1e-5


def test_repeated_singular_values() -> None:
    """Any basis of the space will do."""
    w = torch.linalg.qr(torch.randn(16, 16))[0]
    assert lost(w, free(5).compress(w)) == pytest.approx(math.sqrt(11), rel=1e-6)


@pytest.mark.parametrize("method", [free(4), free(4, algorithm="randomized"), free(energy=0.9), free(4, bits=8)])
def test_the_same_weight_gives_the_same_bits(method: LowRank) -> None:
    w = torch.randn(40, 30)
    first, second = method.compress(w), method.compress(w.clone())
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name])


def test_dtypes_layouts_and_the_weight_itself() -> None:
    w = torch.randn(12, 20)
    kept = w.clone()
    expected = free(4).compress(w).decompress()
    assert torch.equal(w, kept), "the weight is only read"
    for alike in (w.T.contiguous().T, w.double(), torch.nn.Parameter(w)):
        assert torch.allclose(free(4).compress(alike).decompress(), expected, atol=1e-5)
    half = w.bfloat16()
    assert torch.equal(free(4).compress(half).decompress(), free(4).compress(half.float()).decompress())


# --- the algorithms ---------------------------------------------------------------------------------------------------


def spectrum(kind: str, size: int) -> Tensor:
    steps = torch.arange(size, dtype=torch.float64)
    return {"flat": torch.ones(size).double(), "slow": (1 + steps) ** -0.5, "fast": 0.5**steps}[kind]


def with_spectrum(values: Tensor, n: int, k: int) -> Tensor:
    left = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(k, len(values), dtype=torch.float64))[0]
    return left * values @ right.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("algorithm", ["exact", "randomized"])
def test_directions_are_orthonormal(algorithm: str, shape: tuple[int, int]) -> None:
    for a in (torch.randn(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)):
        for rank in {1, min(shape)}:
            up = svd.leading(a, rank, algorithm)
            assert up.shape == (shape[0], rank)
            assert torch.allclose(up.T @ up, torch.eye(rank, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("kind", ["flat", "slow", "fast"])
@pytest.mark.parametrize(("n", "k"), [(80, 120), (120, 80)])
def test_the_randomized_error_is_inside_its_bound(kind: str, n: int, k: int) -> None:
    """E error^2 <= (2 + r / (p - 1)) tail^2 (Halko et al., theorem 10.5, and the cut to r), and in fact close to the tail."""
    a = with_spectrum(spectrum(kind, 80), n, k)
    for rank in (1, 10, 40):
        up = svd.randomized(a, rank)
        error = float((a - up @ (up.T @ a)).norm())
        best = tails(a)[rank]
        assert error <= math.sqrt(2 + rank / (svd.OVERSAMPLING - 1)) * best + 1e-8
        assert best * (1 - 1e-9) - 1e-13 <= error <= 1.1 * best + 1e-8


def test_without_power_iterations_the_bound_holds_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case for which the theorem is stated."""
    monkeypatch.setattr(svd, "POWER_ITERATIONS", 0)
    squares = []
    for _ in range(20):
        a = with_spectrum(spectrum("slow", 60), 60, 90)
        up = svd.randomized(a, 10)
        squares.append(float((a - up @ (up.T @ a)).square().sum()))
    assert np.mean(squares) <= (2 + 10 / (svd.OVERSAMPLING - 1)) * tails(a)[10] ** 2


def test_singular_values_below_the_rounding_of_float32_are_told_apart() -> None:
    """What squaring leaves: the error of a projection stays within 1e-7 of the largest singular value."""
    a = with_spectrum(10.0 ** -torch.arange(12, dtype=torch.float64), 40, 30)
    for rank in range(1, 13):
        up = svd.exact(a)[:, :rank]
        assert float((a - up @ (up.T @ a)).norm()) <= tails(a)[rank] * (1 + 1e-6) + 1e-7


def test_auto_takes_the_randomized_one_for_a_small_rank_of_a_large_layer() -> None:
    assert svd.chosen("auto", (4096, 4096), 64) == "randomized"
    assert svd.chosen("auto", (4096, 4096), None) == "exact"
    assert svd.chosen("auto", (4096, 4096), 2048) == "exact"
    assert svd.chosen("auto", (4096, 64), 4) == "exact"
    assert svd.chosen("exact", (4096, 4096), 4) == "exact"


# --- whitened ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(20, 30), (30, 20), (24, 24), (1, 9)])
def test_whitened_is_optimal_for_its_inputs(n: int, k: int) -> None:
    """||(W - W_r) X|| equals the tail of the singular values of W X, as no weight of rank r can have less."""
    w, x = torch.randn(n, k), correlated(400, k)
    inputs = statistics(x)
    for rank in {1, min(n, k) // 2 or 1}:
        best = tails(w.double() @ x.T)[rank] / math.sqrt(len(x))
        size = float((w.double() @ x.T).norm()) / math.sqrt(len(x))
        found = lost(w, free(rank).with_inputs(inputs).compress(w), inputs.second_moment)
        assert found <= best * 1.03 + 1e-6 * size, "a little more: the moment is damped"
        assert found >= best - 1e-6 * size


def test_whitening_beats_plain_on_correlated_inputs() -> None:
    w, x = torch.randn(48, 40), correlated(1000, 40)
    inputs = statistics(x)
    for rank, share in ((4, 0.7), (12, 0.3), (20, 0.15)):
        plain, whitened = free(rank).compress(w), free(rank).with_inputs(inputs).compress(w)
        assert lost(w, whitened, inputs.second_moment) < share * lost(w, plain, inputs.second_moment)
        assert lost(w, whitened) > lost(w, plain), "of the weight itself, plain has the smallest error"


def test_whitening_is_plain_on_white_inputs() -> None:
    w = torch.randn(30, 20)
    white = InputStatistics(100, torch.eye(20, dtype=torch.float64) * 3.7, torch.zeros(20, dtype=torch.float64))
    for shape in (w, w.T.contiguous()[:, :20]):
        plain, whitened = free(5).compress(shape), free(5).with_inputs(white).compress(shape)
        assert torch.allclose(plain.decompress(), whitened.decompress(), atol=1e-6)


@pytest.mark.parametrize(("n", "k"), [(12, 30), (30, 12)])
def test_fewer_rows_than_features(n: int, k: int) -> None:
    """What calibration never showed counts a little, so that the weight does not go to pieces there."""
    w, x = torch.randn(n, k), torch.randn(3, k)
    weight = free(6).with_inputs(statistics(x)).compress(w)
    assert lost(w, weight, statistics(x).second_moment) < 0.01 * float(w.norm())
    assert lost(w, weight) <= float(w.norm()) * (1 + 1e-6)
    full = free(min(n, k)).with_inputs(statistics(x)).compress(w)
    assert lost(w, full) < 1e-5 * float(w.norm())


def test_inputs_that_are_always_zero_say_nothing() -> None:
    w = torch.randn(8, 10)
    nothing = InputStatistics(5, torch.zeros(10, 10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64))
    assert torch.equal(free(3).with_inputs(nothing).compress(w).decompress(), free(3).compress(w).decompress())


def test_wrong_inputs() -> None:
    w, good = torch.randn(8, 10), statistics(torch.randn(20, 10))
    with pytest.raises(ValueError, match=r"LowRank: inputs are 10 features wide, the weight has k = 12"):
        free(3, inputs=good).compress(torch.randn(8, 12))
    counts = InputStatistics(4, counts=torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=r"LowRank: inputs are counts of 4 tokens, expected those of 8 embeddings"):
        free(3, inputs=counts).compress(w)
    minus = InputStatistics(5, -torch.eye(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64))
    with pytest.raises(ValueError, match="negative eigenvalues"):
        free(3, inputs=minus).compress(w)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0, "counts": torch.zeros(2, dtype=torch.int64)}, "rows is 0, expected a number from 1"),
        ({"rows": True, "counts": torch.ones(1, dtype=torch.int64)}, "rows is True"),
        ({"rows": 1}, r"second_moment is None, expected float64 or float32 \[k, k\]"),
        ({"rows": 1, "second_moment": torch.ones(2, 2).half()}, "second_moment is torch.float16"),
        ({"rows": 1, "second_moment": torch.ones(2, 3).double()}, r"\[2, 3\], expected float64 or float32"),
        ({"rows": 1, "second_moment": torch.ones(2, 2).double()}, r"mean is None, expected float64 \[2\]"),
        (
            {"rows": 1, "second_moment": torch.full((1, 1), math.nan).double(), "mean": torch.ones(1).double()},
            "second_moment holds NaN or Inf",
        ),
        ({"rows": 1, "counts": torch.ones(1)}, "counts is torch.float32"),
        ({"rows": 3, "counts": torch.tensor([1, 1])}, "counts add up to 2"),
        ({"rows": 1, "counts": torch.tensor([-1, 2])}, "expected numbers from 0"),
        ({"rows": 1, "counts": torch.tensor([1]), "mean": torch.ones(1).double()}, "expected the one or the others"),
    ],
)
def test_statistics_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputStatistics(**arguments)


def test_joined_statistics_are_those_of_all_rows() -> None:
    x = torch.randn(50, 6)
    whole = statistics(x)
    joined = InputStatistics.joined([statistics(x[:13]), statistics(x[13:])])
    assert joined.rows == 50
    assert joined.second_moment is not None and joined.mean is not None
    assert torch.allclose(joined.second_moment, whole.second_moment)  # type: ignore[arg-type]
    assert torch.allclose(joined.mean, whole.mean)  # type: ignore[arg-type]
    counts = [InputStatistics(3, counts=torch.tensor(c)) for c in ([1, 2, 0], [0, 0, 3])]
    both = InputStatistics.joined(counts)
    assert both.counts is not None and both.counts.tolist() == [1, 2, 3]


# --- how the rank is chosen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("n", "k"), [(20, 30), (30, 20), (1, 7)])
def test_energy_and_error_give_the_smallest_rank_that_satisfies(n: int, k: int, calibrated: bool) -> None:
    w = torch.randn(n, k)
    inputs = statistics(correlated(300, k, 0.95)) if calibrated else None
    moment = inputs.second_moment if inputs else None
    whole = lost(w, LowRankWeight(torch.zeros(1, k), torch.zeros(n, 1)), moment)
    for value in (0.05, 0.3, 0.6, 0.9, 0.99):
        for method, share in (
            (free(error=value, inputs=inputs), value),
            (free(energy=value, inputs=inputs), math.sqrt(1 - value)),
        ):
            weight = method.compress(w)
            assert lost(w, weight, moment) <= share * whole * (1 + 1e-5)
            if weight.rank > 1:
                smaller = free(weight.rank - 1, inputs=inputs).compress(w)
                assert lost(w, smaller, moment) > share * whole * (1 - 1e-5)


def test_all_energy_is_all_that_there_is() -> None:
    w = torch.randn(12, 3) @ torch.randn(3, 20)
    for method in (free(energy=1.0), free(error=0.0)):
        assert 3 <= method.compress(w.double()).rank <= 12, (
            "the rounding of the product to float32 has a rank of its own"
        )
        assert method.compress(torch.eye(9)[:, :5]).rank == 5
        assert method.compress(torch.ones(9, 5)).rank == 1


def test_energy_and_error_say_the_same() -> None:
    w = torch.randn(25, 35)
    for error in (0.1, 0.5, 0.8):
        assert free(error=error).compress(w).rank == free(energy=1 - error**2).compress(w).rank


def test_a_rank_above_the_smaller_side_is_an_error() -> None:
    for shape in ((8, 12), (12, 8)):
        with pytest.raises(
            ValueError, match=rf"LowRank: rank is 9, expected at most 8 for a weight \[{shape[0]}, {shape[1]}\]"
        ):
            free(9).compress(torch.randn(shape))


# --- int8 factors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation_bits", [7, 8])
def test_int8_factors_lose_little(activation_bits: int) -> None:
    w = with_spectrum(spectrum("slow", 40), 64, 48).float()
    float_factors = free(20).compress(w)
    weight = free(20, bits=8, activation_bits=activation_bits).compress(w)
    assert (weight.down.dtype, weight.up.dtype, weight.bits) == (torch.int8, torch.int8, 8)
    assert weight.activation_bits == activation_bits
    assert weight.down_scale is not None and weight.down_scale.shape == (20,)
    assert weight.up_scale is not None and weight.up_scale.shape == (64,)
    assert lost(w, weight) < lost(w, float_factors) + 0.03 * float(w.norm())


def test_each_int8_factor_is_what_int8_makes_of_it() -> None:
    """Half a step at most from some factors whose product is the float one."""
    w = torch.randn(32, 24)
    weight = free(8, bits=8).compress(w)
    for values in (weight.down, weight.up):
        assert (values.abs().amax(dim=1) == 127).all(), "the whole range, row by row"


@pytest.mark.parametrize(("n", "k"), [(40, 30), (30, 40), (1, 9)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_up_is_fitted_to_what_rounding_made_of_down(n: int, k: int, calibrated: bool) -> None:
    """The least squares of NumPy; and what is kept is never worse than up as the SVD has it."""
    w, x = torch.randn(n, k), correlated(300, k).float() if calibrated else torch.eye(k)
    metric = Metric(x.double().T @ x.double() / len(x) if calibrated else None)
    down = torch.randn(min(n, k) // 2 or 1, k).double()
    expected = np.linalg.lstsq((x.double() @ down.T).numpy(), (x.double() @ w.double().T).numpy(), rcond=None)[0].T
    found = factors.fitted(w.double(), down, metric)
    assert found is not None
    assert np.allclose(found.numpy(), expected, rtol=1e-6, atol=1e-8)
    method = free(len(down), bits=8, inputs=statistics(x) if calibrated else None)
    weight = method.compress(w)
    down, up = method.split(w.double(), metric, len(down))
    size = metric.squares(down).sqrt()[:, None].sqrt()
    plain = (
        Int8().compress((up * size.T).float()).decompress().double()
        @ Int8().compress((down / size).float()).decompress().double()
    )
    assert lost(w, weight, metric.moment) <= metric.norm(w.double() - plain) * (1 + 1e-6) + 1e-9


def test_factors_that_say_nothing_are_not_fitted() -> None:
    """Rows of down that are alike or zero: inputs of one sample, a weight of zeros, one feature."""
    assert factors.fitted(torch.randn(4, 3).double(), torch.zeros(2, 3).double(), Metric()) is None
    one = torch.randn(1, 12)
    for w, x in (
        (torch.randn(8, 12), one),
        (torch.zeros(8, 12), torch.randn(9, 12)),
        (torch.randn(6, 1), torch.ones(3, 1)),
    ):
        weight = free(1 if w.shape[1] == 1 else 4, bits=8).with_inputs(statistics(x)).compress(w)
        assert torch.isfinite(weight.decompress()).all()
        assert lost(w, weight, statistics(x).second_moment) <= 0.02 * float((w @ x.T).norm()) + 1e-6


# --- residual ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "residual",
    [
        Int8(),
        Int8(7, 7),
        Int4(),
        Int4(128, symmetric=True),
        Sparse(0.3),
        Sparse(0.3, bits=8),
        Sparse(pattern="2:4"),
        Dense(),
    ],
)
@pytest.mark.parametrize("bits", [32, 8])
def test_the_residual_is_its_methods_of_what_the_factors_leave(residual: Any, bits: int) -> None:
    w = torch.randn(20, 28)
    weight = free(4, bits=bits, residual=residual).compress(w)
    assert weight.residual is not None
    assert weight.residual.name == residual.name
    factors = free(4, bits=bits).compress(w)
    assert torch.equal(factors.down, weight.down)
    own = residual.compress((w.double() - factors.decompress()).float())
    for name, tensor in own.tensors().items():
        assert torch.equal(tensor, weight.tensors()["low_rank_residual_" + name])
    assert torch.equal(weight.decompress(), factors.decompress() + own.decompress())
    assert lost(w, weight) < lost(w, factors)


def test_a_residual_is_given_the_inputs_if_it_takes_any() -> None:
    """GPTQ of what whitened factors leave; by the method itself, and by way of a calibrated model."""
    w, x = torch.randn(40, 64), correlated(600, 64).float()
    inputs = statistics(x)
    moment = inputs.second_moment
    for method in (free(4, residual=Int4()).with_inputs(inputs), free(4, residual=Int4(), inputs=inputs)):
        weight, factors = method.compress(w), free(4, inputs=inputs).compress(w)
        assert torch.equal(weight.down, factors.down)
        rest = (w.double() - factors.decompress()).float()
        own, plain = Int4(inputs=inputs).compress(rest), Int4().compress(rest)
        assert weight.residual is not None
        assert torch.equal(weight.residual.decompress(), own.decompress())
        assert lost(rest, own, moment) < 0.8 * lost(rest, plain, moment)
    model = torch.nn.Sequential(torch.nn.Linear(64, 40))
    model[0].weight.data = w
    with pc.calibrate(model) as calibration:
        model(x)
    result = pc.compress(model, free(4, residual=Int4()), calibration=calibration)
    assert lost(w, result[0].canonical(), moment) == pytest.approx(lost(w, weight, moment), rel=1e-2)
    eight = free(4, residual=Int8())
    assert torch.equal(
        eight.with_inputs(inputs).compress(w).residual.decompress(), Int8(inputs=inputs).compress(rest).decompress()  # type: ignore[union-attr]
    )  # fmt: skip


def test_factors_take_what_4_bits_lose_most_of() -> None:
    """Few large directions, as SVDQuant has them: without them the range of the rest, and so its rounding, is smaller."""
    w = 0.1 * torch.randn(96, 128) + torch.randn(96, 4) @ torch.randn(4, 128)
    for method in (Int4(), Int4(64, symmetric=True)):
        assert lost(w, free(4, residual=method).compress(w)) < 0.1 * lost(w, method.compress(w))


def test_a_dense_residual_leaves_nothing() -> None:
    w = torch.randn(10, 14)
    assert torch.allclose(free(2, residual=Dense()).compress(w).decompress(), w, atol=1e-6)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("residual", [Int8(weight_bits=7), Int4(64), Sparse(0.2), Sparse(0.2, "16x1")])
def test_alternations_never_end_worse(residual: Any, calibrated: bool) -> None:
    w = with_spectrum(spectrum("slow", 30), 40, 30).float() + 0.3 * torch.randn(40, 30) * (torch.rand(40, 30) < 0.1)
    inputs = statistics(correlated(500, 30)) if calibrated else None
    moment = inputs.second_moment if inputs else None
    errors = [
        lost(w, free(4, residual=residual, alternations=rounds, inputs=inputs).compress(w), moment)
        for rounds in (0, 1, 2, 5)
    ]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("calibrated", [False, True])
def test_alternations_fit_the_factors_to_the_residual_that_is_there(calibrated: bool) -> None:
    """None of the rank would be closer beside it: the tail of what it leaves, whitened."""
    w, x = torch.randn(40, 30), correlated(500, 30)
    inputs = statistics(x) if calibrated else None
    root = x.T / math.sqrt(len(x)) if calibrated else torch.eye(30).double()
    first, once = (free(4, residual=Sparse(0.3), alternations=rounds, inputs=inputs).compress(w) for rounds in (0, 1))
    assert first.residual is not None
    assert once.residual is not None
    best = tails((w.double() - first.residual.decompress()) @ root)[4]
    moment = inputs.second_moment if inputs else None
    assert lost(w, once, moment) <= best * 1.03 + 1e-5
    assert lost(w, once, moment) < 0.95 * lost(w, first, moment)


def test_alternations_separate_what_is_sparse_from_what_is_low_rank() -> None:
    """Two of rank and sparse (GoDec, Zhou & Tao 2011): alone the first fit is thrown off by the spikes."""
    base = torch.randn(40, 2) @ torch.randn(2, 40)
    spikes = torch.where(torch.rand(40, 40) < 0.02, 5.0, 0.0)
    first, last = (
        lost(base + spikes, free(2, residual=Sparse(0.03), alternations=rounds).compress(base + spikes))
        for rounds in (0, 20)
    )
    assert last < 0.1 * first


# --- the guard --------------------------------------------------------------------------------------------------------


def test_the_guard_refuses_from_the_break_even_on() -> None:
    n, k = 96, 96
    w = torch.randn(n, k)
    for bits in (32, 8):
        most = break_even.estimated((n, k), bits, AVX2)
        assert 0 < most < n
        LowRank(most, bits=bits).compress(w)
        with pytest.raises(
            Refused,
            match=rf"rank {most + 1} would not be smaller and faster than dense 96x96: the break-even is rank {most}",
        ):
            LowRank(most + 1, bits=bits).compress(w)


def test_the_estimate_is_that_of_the_table() -> None:
    n, k, speed = 768, 3072, AVX2.speed("factors", 32)
    most = break_even.estimated((n, k), 32, AVX2)
    assert most * (n + k) / speed < n * k <= (most + 1) * (n + k) / speed
    assert break_even.estimated((n, k), 8, AVX2) > most
    assert break_even.estimated((8, 1), 32, AVX2) == 0


@pytest.mark.parametrize("residual", [Int8(), Int4()])
def test_the_guard_counts_the_residual(residual: Any) -> None:
    w = torch.randn(64, 64)
    free_room = break_even.estimated((64, 64), 32, AVX2)
    beside = break_even.estimated((64, 64), 32, AVX2, residual.compress(w))
    assert 0 < beside < free_room
    LowRank(beside, residual=residual).compress(w)
    with pytest.raises(
        Refused,
        match=rf"rank {beside + 1} beside its {residual.name} residual would not .*: the break-even is rank {beside}",
    ):
        LowRank(beside + 1, residual=residual).compress(w)


def test_the_guard_knows_which_residuals_are_slow() -> None:
    w = torch.randn(64, 64)
    eight, four = (break_even.residual_cost(residual.compress(w), AVX2) for residual in (Int8(), Int4()))
    assert 0 < four < eight < 64 * 64 == break_even.residual_cost(Dense().compress(w), AVX2)
    with pytest.raises(Refused, match=r"rank 1 beside its dense residual would not .*: no rank is"):
        LowRank(1, residual=Dense()).compress(w)
    with pytest.raises(Refused, match="beside its sparse residual"):
        LowRank(1, residual=Sparse(0.9)).compress(w)
    LowRank(1, residual=Sparse(0.1)).compress(w)


def test_the_guard_judges_the_rank_that_the_weight_chose() -> None:
    with pytest.raises(Refused, match="rank 30 would not"):
        LowRank(energy=1.0).compress(torch.linalg.qr(torch.randn(30, 30))[0])
    assert LowRank(energy=1.0).compress(torch.ones(30, 30)).rank == 1


def test_bytes_never_exceed_the_dense_ones() -> None:
    for shape in ((64, 64), (16, 200), (300, 20)):
        for bits in (32, 8):
            most = break_even.largest_smaller(shape, bits)
            sizes = [
                sum(t.nbytes for t in free(rank, bits=bits).compress(torch.randn(shape)).tensors().values())
                for rank in (most, min(most + 1, *shape))
                if 1 <= rank <= min(shape)
            ]
            dense = 4 * shape[0] * shape[1]
            assert sizes[0] < dense
            assert most >= min(shape) or sizes[1] >= dense


def test_refused_is_a_value_error() -> None:
    assert issubclass(Refused, ValueError)


def test_the_guard_judges_by_a_profile() -> None:
    """By the default, by name or one's own: what is fast elsewhere may be refused here."""
    assert LowRank(4) == LowRank(4, profile="avx2")
    w = torch.randn(96, 96)
    slow, fast = (Profile("mine", {"factors 32": speed, "channel": speed}) for speed in (0.1, 3.0))
    assert break_even.estimated((96, 96), 32, slow) < break_even.estimated((96, 96), 32, PROFILES["none"]) == 47
    assert break_even.estimated((96, 96), 32, fast) == break_even.largest_smaller((96, 96), 32)
    LowRank(47, profile=fast).compress(w)
    LowRank(47, profile="none").compress(w)
    for profile in ("avx2", slow):
        with pytest.raises(Refused, match="rank 47 would not"):
            LowRank(47, profile=profile).compress(w)
    conv, shape = torch.randn(64, 576), (64, 64, 3, 3)
    assert LowRank(40, profile=fast).for_convolution(shape, (1, 1)).compress(conv).shape == (64, 576)
    with pytest.raises(Refused):
        LowRank(40, profile=slow).for_convolution(shape, (1, 1)).compress(conv)


@pytest.mark.parametrize("make", [Int8, lambda fit: Sparse(0.5, fit=fit), lambda fit: LowRank(2, profile=fit)])
def test_profiles_that_are_none(make: Any) -> None:
    with pytest.raises(ValueError, match=r"(fit|profile) is 'sse', expected a Profile or one of avx2, none"):
        make(fit="sse")
    for bad in (None, 1, b"avx2"):
        with pytest.raises(TypeError, match=r"(fit|profile) is .*, expected a Profile or one of avx2, none"):
            make(fit=bad)


def test_a_profile_is_checked() -> None:
    for arguments, error in (
        ({"speeds": {"int8": 0.0}}, ValueError), ({"speeds": {"int8": math.nan}}, ValueError), ({"largest_rms": 1.5}, ValueError),
        ({"largest_rms": 0}, ValueError), ({"speeds": {"int8": "2"}}, TypeError), ({"largest_rms": True}, TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match=r"Profile: .* is .*, expected a number"):
            Profile("mine", **arguments)
    mine = Profile("mine", {"sparse 8": 3.0, "sparse": 2.0})
    assert (mine.speed("sparse", 8), mine.speed("sparse", 32), mine.speed("int4")) == (3.0, 2.0, 1.0)
    assert hash(LowRank(2, profile=mine)) == hash(LowRank(2, profile=Profile("mine", dict(mine.speeds))))


# --- the measured break-even ------------------------------------------------------------------------------------------


class FakedTime:
    """Ranks up to the limit take no longer than the dense layer; remembers the ranks that were asked for."""

    def __init__(self, limit: int) -> None:
        self.limit, self.asked = limit, list[int]()

    def __call__(self, weight: Weight) -> tuple[float, float]:
        assert isinstance(weight, LowRankWeight)
        self.asked.append(weight.rank)
        return 1.0, 1.0 if weight.rank <= self.limit else 1.1


@pytest.mark.parametrize("bits", [32, 8])
def test_break_even_is_the_largest_rank_that_is_measured_to_be_no_slower(bits: int) -> None:
    time, w = FakedTime(21), torch.randn(64, 96)
    before = torch.get_rng_state()
    method = LowRank("break-even", bits=bits).measured((64, 96), time)
    assert torch.equal(torch.get_rng_state(), before)
    weight = method.compress(w)
    assert (weight.rank, weight.bits) == (16, bits), "in steps of 8"
    assert max(time.asked) <= 64 and len(time.asked) <= 4
    assert method.measured((64, 96), time) is method, "nothing is left to measure"


def test_break_even_where_everything_is_faster_is_the_largest_that_is_smaller() -> None:
    method = LowRank("break-even").measured((64, 96), FakedTime(1000))
    assert method.compress(torch.randn(64, 96)).rank == break_even.largest_smaller((64, 96), 32)


def test_break_even_where_nothing_is_faster() -> None:
    with pytest.raises(Refused, match="no rank of a 64x96 layer is measured to be faster than the dense one here"):
        LowRank("break-even").measured((64, 96), FakedTime(0))


def test_break_even_has_to_be_measured_before() -> None:
    assert isinstance(LowRank(1), MeasuredMethod)
    with pytest.raises(ValueError, match=r"rank is 'break-even', expected that measured\(\) has put a number"):
        LowRank("break-even").compress(torch.randn(64, 96))


# --- embeddings and convolutions --------------------------------------------------------------------------------------


def test_an_embeddings_rows_count_as_often_as_their_tokens_came() -> None:
    """||D (W - W_r)|| with D^2 the counts equals the tail of the singular values of D W."""
    table, counts = torch.randn(50, 12), torch.randint(0, 40, (50,)).square()
    counts[7] = 0
    inputs = InputStatistics(int(counts.sum()), counts=counts)
    root = counts.double().sqrt()[:, None]
    weighted = free(4, embeddings=True).with_inputs(inputs).compress(table)
    plain = free(4, embeddings=True).compress(table)

    def error(weight: LowRankWeight) -> float:
        return float((root * (table.double() - weight.decompress())).norm())

    best = tails(root * table.double())[4]
    assert best * (1 - 1e-6) <= error(weighted) <= 1.01 * best < error(plain)
    assert weighted.shape == (50, 12)
    assert lost(table, plain) == pytest.approx(tails(table)[4], rel=1e-5)


@pytest.mark.parametrize("decomposition", ["channel", "spatial", "tucker"])
def test_a_convolution(decomposition: str) -> None:
    shape = (24, 10, 3, 3)
    w = torch.randn(24, 90)
    full = max(largest_ranks(decomposition, shape))
    own = free(full, decomposition=decomposition).for_convolution(shape, (1, 1))
    weight: Any = own.compress(w)
    assert own.name == weight.name == "low_rank"
    assert weight.decomposition == decomposition
    assert torch.allclose(weight.decompress(), w, atol=1e-4)
    with pytest.raises(ValueError, match=f"rank is {full + 1}, expected at most {full}"):
        free(full + 1, decomposition=decomposition).for_convolution(shape, (1, 1)).compress(w)
    errors = [
        lost(w, free(rank, decomposition=decomposition).for_convolution(shape, (1, 1)).compress(w))
        for rank in (2, 6, 10)
    ]
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(ValueError, match=r"the weight is \[24, 91\], expected that of a convolution \[24, 10, 3, 3\]"):
        own.compress(torch.randn(24, 91))


@pytest.mark.parametrize("decomposition", ["channel", "spatial", "tucker"])
def test_a_convolutions_error_is_kept(decomposition: str) -> None:
    w = torch.randn(24, 90)
    for error in (0.2, 0.7):
        method = free(error=error, decomposition=decomposition).for_convolution((24, 10, 3, 3), (1, 1))
        assert lost(w, method.compress(w)) <= error * float(w.norm()) * (1 + 1e-5)


def test_a_convolutions_channel_split_is_that_of_its_matrix() -> None:
    w, inputs = torch.randn(24, 90), statistics(correlated(400, 90, 0.97))
    for method in (free(6), free(6, inputs=inputs)):
        conv = method.for_convolution((24, 10, 3, 3), (1, 1)).compress(w)
        assert torch.allclose(conv.decompress(), method.compress(w).decompress(), atol=1e-5)


def test_spatial_whitening_is_for_the_columns_of_the_kernel() -> None:
    """Inputs that differ by channel only: the same moment in each column, so it beats plain."""
    w = torch.randn(20, 8 * 9)
    moment = torch.diag((0.5 ** torch.arange(8, dtype=torch.float64)).repeat_interleave(9))
    inputs = InputStatistics(10, moment, torch.zeros(72, dtype=torch.float64))
    method = free(5, decomposition="spatial")
    plain, whitened = (
        m.for_convolution((20, 8, 3, 3), (1, 1)).compress(w) for m in (method, method.with_inputs(inputs))
    )
    assert lost(w, whitened, moment) < 0.9 * lost(w, plain, moment)


@pytest.mark.parametrize("decomposition", ["channel", "spatial", "tucker"])
def test_a_convolutions_guard(decomposition: str) -> None:
    shape, w = (64, 64, 3, 3), torch.randn(64, 576)
    LowRank(4, decomposition=decomposition).for_convolution(shape, (1, 1)).compress(w)
    most = max(largest_ranks(decomposition, shape))
    with pytest.raises(
        Refused, match=rf"rank .*{most} \({decomposition}\) would not be .* 64x64x3x3: the break-even is rank"
    ) as error:
        LowRank(most, decomposition=decomposition).for_convolution(shape, (1, 1)).compress(w)
    even = max(map(int, str(error.value).rsplit(" ", 1)[1].split("x")))
    LowRank(even, decomposition=decomposition).for_convolution(shape, (1, 1)).compress(w)
    with pytest.raises(Refused):
        LowRank(even + 1, decomposition=decomposition).for_convolution(shape, (1, 1)).compress(w)


@pytest.mark.parametrize(
    ("method", "kind", "reason"),
    [
        (LowRank(4), "Linear", ""),
        (LowRank(4, bits=8, residual=Int8()), "Linear", ""),
        (LowRank(4), "Conv2d", ""),
        (LowRank(4, bits=8), "Conv2d", "int8 factors can be had in linear layers only"),
        (LowRank(4, residual=Int8()), "Conv2d", "a residual can be had in linear layers only"),
        (LowRank("break-even"), "Conv2d", "the break-even is measured for linear layers only"),
        (LowRank(4), "Embedding", "LowRank takes embeddings with embeddings=True only"),
        (LowRank(4, embeddings=True), "Embedding", ""),
        (LowRank(4, embeddings=True, bits=8), "Embedding", "int8 factors can be had in linear layers only"),
    ],
)
def test_refuses(method: LowRank, kind: str, reason: str) -> None:
    assert method.refuses(kind) == reason


# --- hostile arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "nothing is given, expected exactly one of rank, energy, error and share"),
        ({"rank": 3, "energy": 0.5}, ValueError, "exactly one of rank"),
        ({"rank": 0}, ValueError, "rank is 0, expected a number from 1 or 'break-even'"),
        ({"rank": -3}, ValueError, "rank is -3"),
        ({"rank": True}, ValueError, "rank is True"),
        ({"rank": 2.0}, ValueError, "rank is 2.0"),
        ({"rank": "breakeven"}, ValueError, "rank is 'breakeven'"),
        ({"energy": 0.0}, ValueError, r"energy is 0.0, expected a share in \(0, 1\]"),
        ({"energy": 1.5}, ValueError, "energy is 1.5"),
        ({"energy": math.nan}, ValueError, "energy is nan"),
        ({"energy": "0.5"}, TypeError, "energy is '0.5', expected a number"),
        ({"energy": True}, TypeError, "energy is True"),
        ({"error": 1.0}, ValueError, r"error is 1.0, expected a share in \[0, 1\)"),
        ({"error": -0.1}, ValueError, "error is -0.1"),
        ({"share": 0.0}, ValueError, r"share is 0.0, expected a share in \(0, 1\]"),
        ({"share": True}, TypeError, "share is True, expected a number"),
        ({"share": 0.5, "rank": 3}, ValueError, "exactly one of rank"),
        ({"share": 0.5, "scope": "row"}, ValueError, "scope is 'row', expected one of layer, model"),
        ({"rank": 3, "scope": "model"}, ValueError, "share is None, expected a share"),
        (
            {"share": 0.5, "scope": "model", "residual": Int8()},
            ValueError,
            r"residual is Int8\(.*\), expected None for",
        ),
        ({"share": 0.5, "scope": "model", "embeddings": True}, ValueError, "embeddings is True, expected False for"),
        ({"share": 0.5, "scope": "model", "decomposition": "spatial"}, ValueError, "'spatial', expected channel for"),
        ({"share": 0.5, "decomposition": "tucker"}, ValueError, "tucker has ranks of two kinds"),
        ({"rank": 1, "bits": 16}, ValueError, "bits is 16, expected 8 or 32"),
        ({"rank": 1, "bits": 8.0}, ValueError, "bits is 8.0"),
        ({"rank": 1, "activation_bits": 6}, ValueError, "activation_bits is 6, expected 7 or 8"),
        ({"rank": 1, "residual": 3}, TypeError, "residual is 3, expected a method"),
        ({"rank": 1, "residual": Int8}, TypeError, "expected a method such as"),
        (
            {"rank": 1, "residual": LowRank(1)},
            ValueError,
            r"residual is LowRank\(rank=1\), expected one that makes weights of .*int8",
        ),
        ({"rank": "break-even", "residual": Int8()}, ValueError, "'break-even' beside a residual"),
        ({"rank": 1, "alternations": -1}, ValueError, "alternations is -1"),
        ({"rank": 1, "alternations": 2}, ValueError, "alternations is 2, expected 0 without a residual"),
        ({"rank": 1, "algorithm": "fast"}, ValueError, "algorithm is 'fast', expected one of auto, exact, randomized"),
        ({"energy": 0.5, "algorithm": "randomized"}, ValueError, "expected a rank"),
        (
            {"rank": 1, "decomposition": "cp"},
            ValueError,
            "decomposition is 'cp', expected one of channel, spatial, tucker",
        ),
        ({"rank": 1, "embeddings": 1}, TypeError, "embeddings is 1, expected True or False"),
        ({"rank": 1, "rank_guard": None}, TypeError, "rank_guard is None"),
        ({"rank": 1, "inputs": torch.eye(3)}, TypeError, "inputs is Tensor, expected InputStatistics or None"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LowRank(**arguments)


@pytest.mark.parametrize("method", [free(1), free(energy=0.5), Dense()])
def test_hostile_weights(method: Any) -> None:
    kind = type(method).__name__
    for weight, message in (
        (torch.full((2, 3), math.nan), "holds 6 NaN or Inf"),
        (torch.tensor([[1.0, math.inf]]), "holds 1 NaN or Inf"),
        (torch.ones(0, 3), r"\[0, 3\]"),
        (torch.ones(3, 0), r"\[3, 0\]"),
        (torch.ones(1, 65537), "65537"),
        (torch.ones(2, 3, device="meta"), "meta device"),
    ):
        with pytest.raises(ValueError, match=f"{kind}: .*{message}"):
            method.compress(weight)
    for other in (torch.ones(3), torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int8), np.ones((2, 3))):
        with pytest.raises(TypeError, match=f"{kind}: the weight is .*, expected floating point"):
            method.compress(other)


def test_methods_are_values() -> None:
    assert LowRank(3) == LowRank(rank=3) != LowRank(4)
    assert hash(LowRank(3, residual=Int8())) == hash(LowRank(3, residual=Int8()))
    assert repr(LowRank(3, residual=Sparse(0.2))) == "LowRank(rank=3, residual=Sparse(density=0.2))"
    assert repr(LowRank("break-even", bits=8)) == "LowRank(rank='break-even', bits=8)"
    shown = repr(LowRank(3).with_inputs(statistics(torch.randn(9, 4))))
    assert shown == "LowRank(rank=3, inputs=InputStatistics(rows=9, second_moment=torch.float64 [4, 4]))"
    assert repr(InputStatistics(1, counts=torch.tensor([1]))) == "InputStatistics(rows=1, counts=torch.int64 [1])"


# --- dense ------------------------------------------------------------------------------------------------------------


def test_dense_is_the_weight() -> None:
    w = torch.randn(3, 5)
    weight = Dense().compress(w)
    assert torch.equal(weight.decompress(), w)
    assert (weight.name, weight.shape, weight.settings()) == ("dense", (3, 5), {})
    w.zero_()
    assert weight.weight.any(), "a copy"
    assert torch.equal(DenseWeight.from_tensors((3, 5), weight.tensors(), {}).weight, weight.weight)


def test_the_metric_is_that_of_the_rows() -> None:
    x, rows = torch.randn(70, 6).double(), torch.randn(4, 6).double()
    metric = Metric(statistics(x).second_moment)
    assert torch.allclose(metric.squares(rows), (rows @ x.T).square().mean(dim=1))
    assert torch.allclose(Metric().squares(rows), rows.square().sum(dim=1))
