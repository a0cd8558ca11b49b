"""calibrate(): statistics by their definition, shared where inputs are, and what compress() makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods import InputStatistics, Int8, LowRank, Refused
from pycompress.model import compressed_layers
from pycompress.weights import Int8Weight
from pycompress.weights.low_rank_conv import DECOMPOSITIONS


def moment(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows.T @ rows / len(rows)


def agrees(found: InputStatistics, rows: Tensor) -> None:
    """With the second moment and the mean of these rows, as closely as float32 products of so few rows are."""
    assert found.rows == len(rows)
    assert found.second_moment is not None
    assert found.mean is not None
    assert found.second_moment.dtype == found.mean.dtype == torch.float64
    exact, mean, unit = moment(rows), rows.double().mean(dim=0), 2.0 ** (-52 if rows.dtype == torch.float64 else -24)
    root = exact.diagonal().sqrt()
    assert bool(((found.second_moment - exact).abs() <= (len(rows) + 1) * unit * root[:, None] * root).all())
    assert bool(((found.mean - mean).abs() <= (len(rows) + 1) * unit * rows.double().abs().mean(dim=0)).all())
    assert torch.equal(found.second_moment, found.second_moment.T)


class Attention(nn.Module):
    """Three layers that meet one input, and one that meets another."""

    def __init__(self, k: int = 8) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(k, k) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.output(torch.tanh(self.query(x) * self.key(x) + self.value(x)))
        return mixed


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_linear_layer(dtype: torch.dtype) -> None:
    """All batches together, of any leading shape."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).to(dtype)
    batches = [torch.randn(size).to(dtype) for size in ((5, 6), (2, 3, 6), (6,))]
    with pc.calibrate(model) as calibration:
        for batch in batches:
            model(batch)
    rows = torch.cat([batch.reshape(-1, 6) for batch in batches])
    assert list(calibration) == ["0", "2"]
    agrees(calibration["0"], rows)
    assert calibration["2"].rows == len(rows) == 12


def test_sums_are_kept_in_float64() -> None:
    """In float32 the small numbers would all be lost beside the large one, not only those in a block with it."""
    model = nn.Linear(1, 1)
    with pc.calibrate(model) as calibration:
        model(torch.full((1, 1), 1e5))
        for _ in range(10):
            model(torch.ones(1000, 1))
    assert float(calibration[""].second_moment) * 10001 == pytest.approx(1e10 + 10000, rel=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, (2, 3), stride=2, dilation=(2, 1)),
        nn.Conv2d(3, 4, (4, 2), padding="same"),
        nn.Conv2d(3, 4, 1),
    ],
)
def test_a_convolutions_patches_are_in_the_order_of_its_weight(
    conv: nn.Conv2d, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y = W x for each patch x: so E[y y^T] = W M W^T, and E[y] = W m, without the bias."""
    monkeypatch.setattr("pycompress.calibration.watch._CHUNK", 1000)  # an image or a few at a time
    conv.bias = None
    images = torch.randn(7, 3, 9, 10)
    with pc.calibrate(nn.Sequential(conv)) as calibration:
        y = conv(images)
        conv(images[0])
    y = torch.cat([y, y[:1]]).transpose(0, 1).flatten(1).T.double()
    found, w = calibration["0"], conv.weight.flatten(1).double()
    assert found.rows == len(y)
    assert torch.allclose(w @ found.second_moment @ w.T, moment(y), atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(w @ found.mean, y.mean(dim=0), atol=1e-6)  # type: ignore[arg-type]


def test_an_embedding_counts_tokens() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with pc.calibrate(model) as calibration:
        model(torch.tensor([[0, 1], [1, 4]]))
        model(torch.tensor([1], dtype=torch.int32))
    counts = calibration["0"].counts
    assert counts is not None
    assert counts.tolist() == [1, 3, 0, 0, 1]
    assert calibration["0"].rows == calibration["1"].rows == 5


def test_what_has_no_compressed_layer_is_not_watched() -> None:
    model = nn.ModuleDict(
        {
            "groups": nn.Conv2d(4, 4, 3, groups=2),
            "norm": nn.LayerNorm(4),
            "one": nn.ConvTranspose1d(4, 4, 1),
            "good": nn.Linear(4, 4),
        }
    )
    with pc.calibrate(model) as calibration:
        model["groups"](torch.randn(1, 4, 5, 5))
        model["norm"](torch.randn(2, 4))
        model["one"](torch.randn(1, 4, 5))
        model["good"](input=torch.randn(3, 4))  # by keyword
        model["good"](torch.randn(0, 4))  # nothing in it
    assert list(calibration) == ["good"]
    assert calibration["good"].rows == 3


def test_layers_that_meet_the_same_input_share_its_moment() -> None:
    model = Attention()
    with pc.calibrate(model) as calibration:
        for _ in range(3):
            model(torch.randn(10, 8))
    assert calibration["query"] is calibration["key"] is calibration["value"]
    assert calibration["output"] is not calibration["query"]
    assert all(calibration[name].rows == 30 for name in calibration)


def test_sharing_ends_where_inputs_differ() -> None:
    """Whatever the order, each layer has what it has met, no more and no less."""
    model = Attention()
    met: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}

    def call(names: str, x: Tensor) -> None:
        for name in names.split():
            met[name].append(x.clone())
            model.get_submodule(name)(x)

    with pc.calibrate(model) as calibration:
        a, b, c = (torch.randn(4, 8) for _ in range(3))
        call("query key value", a)
        call("query key", b)
        call("value", c)
        call("query value", a)
        call("key key", b)  # the same module twice: two times its rows
        call("query", c)
        c.mul_(2)  # in place: the same object, another input
        call("key", c)
    for name, inputs in met.items():
        agrees(calibration[name], torch.cat(inputs))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_every_mode_of_autograd(mode: Any) -> None:
    model, x = Attention(), torch.randn(10, 8)
    with pc.calibrate(model) as calibration, mode():
        model(x)
    agrees(calibration["query"], x)
    assert not calibration["query"].second_moment.requires_grad  # type: ignore[union-attr]


def test_a_module_under_two_names() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    with pc.calibrate(model) as calibration:
        model(torch.randn(3, 4))
    assert calibration["0"] is calibration["2"]
    assert calibration["0"].rows == 6


def test_torchs_transformer_runs_layer_by_layer() -> None:
    """Its fast path, which reads the weights itself, does without hooks: it stands back for them."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    with pc.calibrate(model) as calibration, torch.inference_mode():
        model(torch.randn(2, 5, 8))
    assert {"layers.0.linear1", "layers.1.linear2"} <= set(calibration)


# --- the context ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "good", "bad"),
    [
        (nn.Linear(4, 4), torch.randn(2, 4), torch.randn(2, 5)),
        (nn.Conv2d(2, 3, 3), torch.randn(1, 2, 4, 4), torch.randn(1, 3, 4, 4)),
        (nn.Conv2d(2, 3, 3), torch.randn(1, 2, 4, 4), torch.randn(4, 4)),
        (nn.Embedding(4, 2), torch.tensor([1, 3]), torch.tensor([4, 0])),
        (nn.Embedding(4, 2), torch.tensor([1, 3]), torch.tensor([0.5])),
    ],
)
def test_hooks_are_gone_at_the_end_also_after_an_error(layer: nn.Module, good: Tensor, bad: Tensor) -> None:
    """The error is the layer's own."""
    with pytest.raises((RuntimeError, IndexError)) as expected:
        layer(bad)
    kept: list[Any] = []

    def run() -> None:
        with pc.calibrate(layer) as calibration:
            kept.append(calibration)
            layer(good)
            layer(bad)

    with pytest.raises(type(expected.value)) as error:
        run()
    assert str(error.value) == str(expected.value)
    assert not layer._forward_pre_hooks
    (calibration,) = kept
    assert not calibration.running
    before = calibration[""].rows
    layer(good)
    assert calibration[""].rows == before


def test_two_calibrations_do_not_disturb_each_other() -> None:
    model = nn.Linear(4, 4)
    with pc.calibrate(model) as outer:
        model(torch.ones(1, 4))
        with pc.calibrate(model) as inner:
            model(torch.ones(1, 4))
    assert (outer[""].rows, inner[""].rows) == (2, 1)


def test_the_model_computes_as_before() -> None:
    model, x = Attention(), torch.randn(5, 8)
    expected = model(x)
    with pc.calibrate(model):
        assert torch.equal(model(x), expected)


def test_nan_in_an_input_is_named() -> None:
    model = Attention()
    with pytest.raises(ValueError, match="calibrate: the input of query holds NaN or Inf"), pc.calibrate(model):
        model(torch.full((2, 8), torch.nan))
    assert not model.query._forward_pre_hooks


def test_no_model() -> None:
    with pytest.raises(TypeError, match=r"calibrate: model is int, expected a torch.nn.Module"), pc.calibrate(3):  # type: ignore[arg-type]
        pass


# --- compress(..., calibration=...) -----------------------------------------------------------------------------------


def calibrated(model: nn.Module, *batches: Tensor) -> Any:
    with pc.calibrate(model) as calibration, torch.no_grad():
        for batch in batches:
            model(batch)
    return calibration


def test_each_layer_gets_its_own_inputs() -> None:
    model = Attention()
    calibration = calibrated(model, torch.randn(50, 8) * torch.tensor([4.0, 3, 2, 1, 0.1, 0.1, 0.1, 0.1]))
    method = LowRank(3, rank_guard=False)
    layers = compressed_layers(pc.compress(model, method, calibration=calibration))
    for name, layer in layers.items():
        weight = model.get_submodule(name).weight
        own = method.with_inputs(calibration[name]).compress(weight)  # type: ignore[arg-type]
        assert torch.equal(layer.canonical().decompress(), own.decompress())
        assert not torch.equal(layer.canonical().decompress(), method.compress(weight).decompress())  # type: ignore[arg-type]


def test_calibration_makes_the_outputs_closer() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    x = torch.randn(600, 32) * 0.8 ** torch.arange(32)
    calibration = calibrated(model, x[:500])
    method = LowRank(8, rank_guard=False)
    plain, whitened = pc.compress(model, method), pc.compress(model, method, calibration=calibration)
    errors = [float((other(x[500:]) - model(x[500:])).detach().norm()) for other in (plain, whitened)]
    assert errors[1] < 0.5 * errors[0]


def test_methods_that_make_no_use_of_it_go_without() -> None:
    class Rounded:
        name = "int8"

        def compress(self, weight: Tensor) -> Int8Weight:
            return Int8().compress(weight)

    assert len(compressed_layers(pc.compress(Attention(), Rounded(), calibration={}))) == 4


def test_a_layer_that_was_never_seen_is_named() -> None:
    model = nn.ModuleDict({"seen": nn.Linear(16, 16), "unseen": nn.Linear(16, 16)})
    with pc.calibrate(model) as calibration:
        model["seen"](torch.randn(3, 16))
    with pytest.raises(ValueError, match="compress: the calibration never saw unseen: run batches that reach it"):
        pc.compress(model, LowRank(2), calibration=calibration)
    result = pc.compress(model, {"unseen": None, "*": LowRank(2)}, calibration=calibration)
    assert list(compressed_layers(result)) == ["seen"]


def test_statistics_of_another_layer_are_refused_with_its_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    other = calibrated(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8))
    with pytest.raises(ValueError, match="compress: 0: LowRank: inputs are 8 features wide, the weight has k = 16"):
        pc.compress(model, LowRank(2), calibration=other)


def test_a_calibration_that_still_runs() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pc.calibrate(model) as calibration:
        model(torch.randn(3, 16))
        with pytest.raises(ValueError, match="compress: the calibration is still running"):
            pc.compress(model, LowRank(2), calibration=calibration)


def test_layers_that_share_a_weight_go_on_sharing_it() -> None:
    """Fitted to the inputs of both."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False))
    model[2].weight = model[0].weight
    x = torch.randn(40, 16)
    calibration = calibrated(model, x)
    first, second = compressed_layers(pc.compress(model, LowRank(4), calibration=calibration)).values()
    assert first.packed is second.packed
    both = InputStatistics.joined([calibration["0"], calibration["2"]])
    own = LowRank(4).with_inputs(both).compress(model[0].weight)
    assert torch.equal(first.canonical().decompress(), own.decompress())


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_convolutions(decomposition: str) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3))
    x = torch.randn(4, 16, 8, 8)
    method = LowRank(4, decomposition=decomposition)
    result = pc.compress(model, method, calibration=calibrated(model, x))
    assert len(compressed_layers(result)) == 2
    assert result(x).shape == model(x).shape


# --- what is refused, and embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_a_refused_layer_stays_dense_with_the_reason(inplace: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    expected = {name: p.clone() for name, p in model[2].named_parameters()}
    result = pc.compress(model, LowRank(8), inplace=inplace)
    assert list(compressed_layers(result)) == ["0"]
    kept, refused = pc.summary(result).layers
    assert kept.label == "low rank 8"
    assert refused.reason.startswith("rank 8 would not be smaller and faster than dense 8x64: the break-even is rank")
    assert refused.bytes == refused.dense_bytes == 4 * (64 * 8 + 8)
    assert all(torch.equal(p, expected[name]) for name, p in result[2].named_parameters())
    assert isinstance(result[1], nn.Identity)
    assert result(torch.randn(3, 64)).shape == (3, 8)


def test_a_refused_layer_keeps_its_activation() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU())
    result = pc.compress(model, LowRank(8))
    assert isinstance(result[1], nn.ReLU)
    x = torch.randn(3, 64)
    assert torch.equal(result(x), model(x))


def test_refused_while_it_is_measured() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    result = pc.compress(model, LowRank(8), example_inputs=torch.randn(2, 64), only_if_faster=True)
    assert "the break-even is rank" in pc.summary(result).layers[0].reason


class Refusing:
    """A method of somebody else, which declines everything."""

    name = "int8"

    def compress(self, _weight: Tensor) -> Any:
        raise Refused("not today")


def test_refused_shared_weights() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    result = pc.compress(model, Refusing())
    assert [record.reason for record in pc.summary(result).layers] == ["not today"] * 2
    assert pc.summary(result).bytes == pc.summary(result).dense_bytes == 4 * (16 * 16 + 32)
    assert result[1].weight is result[0].weight


class Words(nn.Module):
    """A table of tokens with a head behind it."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(100, 32), nn.Linear(32, 100, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(self.table(tokens))
        return scores


def test_embeddings_are_candidates_only_where_the_plan_takes_them() -> None:
    model = Words()
    for plan in (LowRank(8), Int8(), {"head": LowRank(8)}):
        result = pc.compress(model, plan)
        assert [record.name for record in pc.summary(result).layers] == ["head"]
    with pytest.raises(ValueError, match="the glob 'table' matches no layer"):
        pc.compress(model, {"table": LowRank(8)})
    result = pc.compress(model, LowRank(8, embeddings=True))
    assert [record.label for record in pc.summary(result).layers] == ["low rank 8", "low rank 8"]
    result = pc.compress(model, {"head": LowRank(8, embeddings=True), "*": Int8()})
    table, head = pc.summary(result).layers
    assert (table.label, table.reason) == ("dense", "Int8 takes embeddings with embeddings=True only")
    assert head.method == "low_rank"


def test_an_embedding_is_weighted_by_its_tokens() -> None:
    model = Words()
    often = torch.randint(0, 10, (500,))
    calibration = calibrated(model, often, torch.arange(100))
    plain, weighted = (
        pc.compress(model, LowRank(6, embeddings=True), calibration=given) for given in (None, calibration)
    )
    exact = model.table(often)
    errors = [float((other.table(often) - exact).detach().norm()) for other in (plain, weighted)]
    assert errors[1] < 0.6 * errors[0]
    assert pc.summary(weighted).layers[0].kind == "Embedding"


def test_a_tied_embedding_stays_dense_with_the_reason() -> None:
    model = Words(tied=True)
    result = pc.compress(model, LowRank(8, embeddings=True))
    table, head = pc.summary(result).layers
    assert table.reason == "its weight is shared with head: compressing it would add bytes"
    assert head.reason == "its weight is shared with table: compressing it would add bytes"
    assert result.head.weight is result.table.weight


def test_embeddings_that_may_do_something_else_stay_dense() -> None:
    class Scaled(nn.Embedding):
        pass

    model = nn.Sequential(nn.Embedding(50, 16, max_norm=1.0), Scaled(50, 16), nn.Linear(16, 16))
    first, second, _ = pc.summary(pc.compress(model, LowRank(4, embeddings=True))).layers
    assert "max_norm" in first.reason
    assert second.reason == "Scaled is a subclass of Embedding, which may do something else"


def test_an_embedding_is_measured_on_tokens() -> None:
    model = Words()
    result = pc.compress(
        model, {"table": LowRank(8, embeddings=True)}, example_inputs=torch.arange(60), only_if_faster=True
    )
    table = pc.summary(result).layers[0]
    assert table.dense_us is not None
    assert table.us is not None
    assert result(torch.arange(60)).shape == (60, 100)


def test_an_activation_behind_an_embedding_stays() -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.ReLU())
    result = pc.compress(model, LowRank(4, embeddings=True))
    assert isinstance(result[1], nn.ReLU)
    assert list(compressed_layers(result)) == ["0"]
