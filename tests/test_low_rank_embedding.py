"""The low-rank embedding: its table against float64, the module against the dense one, and the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods import Dense, InputStatistics, Int8, LowRank, Refused, Sparse
from pycompress.nn import LowRankEmbedding
from pycompress.weights import LowRankWeight

Same = Callable[[Tensor, Tensor], bool]
Snapshot = Callable[[nn.Module], Callable[[], bool]]
Lookup = Callable[..., nn.Module]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def method(rank: int | None = None, **options: Any) -> LowRank:
    return LowRank(rank, **{"rank_guard": False, "embeddings": True, **options})


def layer(rank: int = 4, n: int = 30, d: int = 12, **options: Any) -> LowRankEmbedding:
    return LowRankEmbedding.from_dense(nn.Embedding(n, d, **options), method(rank))


def statistics(counts: Tensor) -> InputStatistics:
    return InputStatistics(int(counts.sum()), counts=counts)


# --- the weight ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 11, 12])
def test_no_table_of_this_rank_is_closer(rank: int) -> None:
    dense = nn.Embedding(40, 12)
    made = LowRankEmbedding.from_dense(dense, method(rank))
    squares = torch.linalg.svdvals(dense.weight.detach().double()).square()
    lost = float((made.weight - dense.weight).detach().double().square().sum() / squares.sum())
    assert lost == pytest.approx(float(squares[rank:].sum() / squares.sum()), rel=1e-4, abs=1e-10)
    assert (made.rank, made.weight.shape) == (rank, (40, 12))


def test_rows_count_as_often_as_their_tokens_came() -> None:
    weight, counts = torch.randn(60, 16), torch.zeros(60, dtype=torch.int64)
    counts[:20] = torch.randint(1, 100, (20,))

    def error(made: LowRankWeight) -> float:
        return float(
            (counts * (made.decompress() - weight).square().sum(1)).sum() / (counts * weight.square().sum(1)).sum()
        )

    aware, plain = (how.compress(weight) for how in (method(6).with_inputs(statistics(counts)), method(6)))
    squares = torch.linalg.svdvals(weight.double() * counts.sqrt()[:, None]).square()
    assert error(aware) == pytest.approx(float(squares[6:].sum() / squares.sum()), rel=0.05)
    assert error(aware) < 0.7 * error(plain)
    # Whatever the basis, each row is projected on it: a token that never came gets the best that is left.
    basis = torch.linalg.qr(aware.factors()[0].double().T)[0]
    torch.testing.assert_close(aware.decompress().double(), weight.double() @ basis @ basis.T, atol=1e-5, rtol=1e-4)


def test_the_guard_and_other_refusals() -> None:
    weight = torch.randn(64, 32)
    with pytest.raises(Refused, match=r"rank 22 would not be .*the break-even is rank"):
        method(22, rank_guard=True).compress(weight)
    with pytest.raises(ValueError, match="expected at most 32"):
        method(33).compress(weight)
    with pytest.raises(ValueError, match="expected those of 64 embeddings"):
        method(4).with_inputs(statistics(torch.ones(63, dtype=torch.int64))).compress(weight)
    assert "embeddings=True" in LowRank(4).refuses("Embedding")
    for options in ({"bits": 8}, {"residual": Int8()}, {"rank": "break-even"}):
        assert "linear layers only" in LowRank(**{"rank": 4, "embeddings": True, **options}).refuses("Embedding")
    assert method(4).refuses("Embedding") == ""


# --- the module ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 0, 4)])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_full_rank_is_the_dense_layer(shape: tuple[int, ...], integers: torch.dtype) -> None:
    dense = nn.Embedding(30, 12)
    made = LowRankEmbedding.from_dense(dense, method(12))
    tokens = torch.randint(30, shape, dtype=integers)
    y = made(tokens)
    torch.testing.assert_close(y, dense(tokens).detach(), atol=1e-5, rtol=1e-4)
    assert not y.requires_grad
    assert made(input=tokens).shape == y.shape
    assert (made.num_embeddings, made.embedding_dim, made.padding_idx) == (30, 12, None)


def test_the_padding_row_stays_zero() -> None:
    made = layer(4, padding_idx=3)
    assert made.padding_idx == 3
    assert not made(torch.tensor(3)).any()
    assert "padding_idx=3" in repr(made)
    dense = nn.Embedding(30, 12, padding_idx=-1)
    dense.weight.data[29] = 1.0  # trained, or loaded from elsewhere
    assert LowRankEmbedding.from_dense(dense, method(12))(torch.tensor(29)).allclose(torch.ones(12), atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_of_the_results(dtype: torch.dtype, same: Same) -> None:
    made = LowRankEmbedding.from_dense(nn.Embedding(30, 12).to(dtype), method(4))
    tokens = torch.arange(30)
    assert made(tokens).dtype == made.dtype == dtype
    assert made.packed.dtype == torch.float32
    wide = copy.deepcopy(made).float()
    assert same(made(tokens), wide(tokens).to(dtype))
    assert same(copy.deepcopy(wide).to(dtype)(tokens), made(tokens))
    assert nn.Sequential(wide).half()[0].dtype == torch.float16


def test_weights_that_are_none_of_an_embedding() -> None:
    w = torch.randn(30, 12)
    for how, what in (
        (LowRank(4, bits=8, rank_guard=False), "int8 factors"),
        (method(4, residual=Dense()), "a residual"),
    ):
        with pytest.raises(
            ValueError, match=f"LowRankEmbedding: the weight has {what}, expected float32 factors alone"
        ):
            LowRankEmbedding.from_weight(how.compress(w))
    good = method(4).compress(w)
    for index in (30, -1, True, 1.0):
        with pytest.raises(ValueError, match=r"LowRankEmbedding: padding_idx is .*, expected None or 0 to 29"):
            LowRankEmbedding.from_weight(good, index)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the dense layer is Linear"):
        LowRankEmbedding.replacing(nn.Linear(12, 30), good)
    with pytest.raises(ValueError, match="activation is 'relu', expected 'none'"):
        LowRankEmbedding.replacing(nn.Embedding(30, 12), good, "relu")
    with pytest.raises(ValueError, match=r"max_norm is 1\.0, expected None"):
        LowRankEmbedding.from_dense(nn.Embedding(30, 12, max_norm=1.0), method(4))


# --- the whole model ----------------------------------------------------------------------------------------------------


def reasons(model: nn.Module) -> dict[str, str]:
    return {record.name: record.reason for record in pc.summary(model).layers}


def test_compress(lookup: Lookup, snapshot: Snapshot) -> None:
    model = lookup()
    unchanged = snapshot(model)
    made = pc.compress(model, {"embedding": LowRank(8, embeddings=True), "*": None})
    assert unchanged()
    assert isinstance(made.embedding, LowRankEmbedding)
    record = pc.summary(made).layers[0]
    assert (record.name, record.kind, record.method, record.label) == (
        "embedding",
        "Embedding",
        "low_rank",
        "low rank 8",
    )
    assert (record.bytes, record.dense_bytes, record.rank) == (4 * 8 * (50 + 32), 4 * 50 * 32, 8)


def test_calibrated_tokens_lose_less(lookup: Lookup) -> None:
    model, tokens = lookup(), torch.randint(12, (4, 30))
    with pc.calibrate(model) as calibration:
        model(tokens)
    plan = {"embedding": method(6), "*": None}
    aware, plain = (pc.compress(model, plan, calibration=c).embedding for c in (calibration, None))
    errors = [float((m(tokens) - model.embedding(tokens)).detach().norm()) for m in (aware, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_what_stays_dense_says_why(lookup: Lookup) -> None:
    tied = pc.compress(lookup(tied=True), {"embedding": method(4), "*": None})
    assert isinstance(tied.embedding, nn.Embedding)
    assert "its weight is shared with" in reasons(tied)["embedding"]
    guarded = pc.compress(lookup(), {"embedding": LowRank(31, embeddings=True), "*": None})
    assert "break-even" in reasons(guarded)["embedding"]
    not_asked = pc.compress(lookup(), LowRank(4, rank_guard=False))
    assert type(not_asked.embedding) is nn.Embedding
    assert "embedding" not in reasons(not_asked)
    normed = nn.Sequential(nn.Embedding(20, 8, max_norm=1.0), nn.Linear(8, 8))
    assert "max_norm" in reasons(pc.compress(normed, method(2)))["0"]
    sub = nn.Sequential(type("Other", (nn.Embedding,), {})(20, 8))
    assert "Other is a subclass of Embedding" in reasons(pc.compress(sub, method(2)))["0"]


def test_options_that_are_about_gradients_have_none(lookup: Lookup) -> None:
    model = nn.Sequential(nn.Embedding(20, 8, padding_idx=1, sparse=True, scale_grad_by_freq=True), nn.Linear(8, 8))
    made = pc.compress(model, {"0": method(8), "*": None})
    torch.testing.assert_close(made(torch.arange(20)), model(torch.arange(20)), atol=1e-5, rtol=1e-4)
    assert made[0].padding_idx == 1


def test_only_if_faster_measures_tokens(lookup: Lookup) -> None:
    made = pc.compress(
        lookup(), {"embedding": method(4), "*": None}, example_inputs=torch.randint(50, (2, 9)), only_if_faster=True
    )
    assert pc.summary(made).layers[0].us is not None


@pytest.mark.parametrize("other", [Int8(), Sparse(0.5), Sparse(0.5, bits=8), LowRank(2)], ids=repr)
def test_methods_that_take_no_embeddings_leave_them_alone(other: Any) -> None:
    model = pc.compress(nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8)), other)
    assert type(model[0]) is nn.Embedding
    assert [record.name for record in pc.summary(model).layers] == ["1"]
