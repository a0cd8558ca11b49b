"""compress(): what the plan chooses, what is left whole and why, and that a failure leaves the model as it was."""

from __future__ import annotations

import copy
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress import ops, race
from pycompress.methods import Int8, Sparse
from pycompress.model import LayerRecord, compressed_layers
from pycompress.nn import Int8Linear, SparseLinear
from pycompress.weights import SparseWeight

Build = Callable[..., nn.Module]
Python = Callable[..., subprocess.CompletedProcess[str]]
Same = Callable[[Tensor, Tensor], bool]
Snapshot = Callable[[nn.Module], Callable[[], bool]]

INT8 = pc.Int8()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.detach().flatten().double(), b.detach().flatten().double(), dim=0))


def records(model: nn.Module) -> dict[str, LayerRecord]:
    return {record.name: record for record in pc.summary(model).layers}


def methods(model: nn.Module) -> dict[str, str | None]:
    return {name: record.method for name, record in records(model).items()}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 8))


# --- the plan -----------------------------------------------------------------------------------------------------------


def test_a_method_is_for_every_linear_layer() -> None:
    model = mlp()
    result = pc.compress(model, INT8)
    assert list(compressed_layers(result)) == ["0", "2", "4"]
    x = torch.randn(20, 16)
    assert cosine(result(x), model(x)) > 0.999


def test_the_bits_of_the_method_reach_the_layers() -> None:
    for layer in compressed_layers(pc.compress(mlp(), Int8(activation_bits=7, weight_bits=7))).values():
        assert (layer.activation_bits, layer.weight_bits) == (7, 7)
        assert int(layer.weight.abs().max()) <= 63
        assert ops.parse(layer.form).activation_bits == 7


def test_the_first_glob_that_matches_decides() -> None:
    plan = {"0": None, "[0-2]": Int8(activation_bits=7), "*": INT8}
    result = pc.compress(mlp(), plan)
    bits = {name: layer.activation_bits for name, layer in compressed_layers(result).items()}
    assert bits == {"2": 7, "4": 8}
    assert records(result)["0"].reason == "the plan keeps '0' dense"

    reversed_plan = {"*": INT8, "[0-2]": Int8(activation_bits=7), "0": None}
    bits = {name: layer.activation_bits for name, layer in compressed_layers(pc.compress(mlp(), reversed_plan)).items()}
    assert bits == {"0": 8, "2": 8, "4": 8}, "order decides, not how narrow a glob is; a hidden glob is no error"


def test_layers_that_no_glob_matches_stay_dense() -> None:
    result = pc.compress(mlp(), {"2": INT8})
    assert methods(result) == {"0": None, "2": "int8", "4": None}
    assert records(result)["0"].reason == "no glob of the plan matches it"


def test_globs_on_dotted_names(lookup: Build) -> None:
    result = pc.compress(lookup(), {"blocks.*.up": INT8, "blocks.1.*": Int8(activation_bits=7)})
    bits = {name: layer.activation_bits for name, layer in compressed_layers(result).items()}
    assert bits == {"blocks.0.up": 8, "blocks.1.up": 8, "blocks.1.down": 7}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"nowhere.*": INT8}, "the glob 'nowhere.*' matches no layer that could be compressed; there are: 0, 2, 4"),
        ({"*": INT8, "nowhere": None}, "the glob 'nowhere' matches no layer"),
        ({"1": INT8}, "the glob '1' matches no layer that could be compressed"),  # nn.Tanh
        ({"": INT8}, "the glob '' matches no layer"),
        ({}, "the plan is empty"),
    ],
)
def test_plans_that_fit_nothing(plan: Any, message: str, snapshot: Snapshot) -> None:
    model = mlp()
    unchanged = snapshot(model)
    for inplace in (False, True):
        with pytest.raises(ValueError, match=message):
            pc.compress(model, plan, inplace=inplace)
    assert unchanged()


class Unknown:
    name = "int3"

    def compress(self, weight: Tensor) -> Any:
        raise AssertionError("no layer could take its weights")


@pytest.mark.parametrize(
    "plan",
    [
        None, "int8", 8, Int8, ["*"], {"*": "int8"}, {0: INT8}, {"*": Int8}, [("*", INT8)],
        Sparse, {"*": Sparse}, {"*": Unknown()}, Unknown(), nn.Linear(2, 2), Sparse().compress(torch.ones(2, 2)),
    ],
)  # fmt: skip
def test_plans_of_the_wrong_type(plan: Any, snapshot: Snapshot) -> None:
    model = mlp()
    unchanged = snapshot(model)
    with pytest.raises(TypeError, match="compress: the plan"):
        pc.compress(model, plan)
    assert unchanged()


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(ValueError, match="matches no layer that could be compressed; there are: none"):
        pc.compress(nn.Sequential(nn.LayerNorm(4), nn.ReLU()), INT8)


@pytest.mark.parametrize("model", [None, "model", lambda x: x, {"0": nn.Linear(2, 2)}])
def test_not_a_module(model: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        pc.compress(model, INT8)


ODD = ["a[0]", "a0", "b*", "b c", "ü?", "[!x]"]


@pytest.mark.parametrize("name", ODD)
def test_the_name_of_a_layer_means_that_layer(name: str) -> None:
    """Whatever it would mean as a glob."""
    model = nn.ModuleDict({one: nn.Linear(8, 8) for one in ODD})
    assert list(compressed_layers(pc.compress(model, {name: INT8}))) == [name]
    assert set(compressed_layers(pc.compress(model, {name: None, "*": INT8}))) == set(ODD) - {name}


def test_a_glob_that_is_no_name_is_a_glob() -> None:
    model = nn.ModuleDict({one: nn.Linear(8, 8) for one in ("a0", "a1", "b0")})
    assert list(compressed_layers(pc.compress(model, {"a[0]": INT8}))) == ["a0"]


@pytest.mark.parametrize(("plan", "name"), [(INT8, "0"), ({"2": INT8}, "2"), ({"4": None, "[02]": INT8}, "0")])
def test_a_glob_for_what_is_compressed_already_says_so(plan: Any, name: str) -> None:
    once = pc.compress(mlp(), {"0": INT8, "2": INT8, "4": INT8 if plan is INT8 else None})
    with pytest.raises(ValueError, match=f"matches no layer that could be compressed: {name} is an Int8Linear already"):
        pc.compress(once, plan)


# --- several methods ----------------------------------------------------------------------------------------------------


def test_a_method_for_each_layer() -> None:
    model, x = mlp(), torch.randn(20, 16)
    result = pc.compress(model, {"0": Sparse(0.5), "2": INT8, "4": Sparse(0.9, bits=8, activation_bits=8)})
    assert methods(result) == {"0": "sparse", "2": "int8", "4": "sparse"}
    assert [type(layer) for layer in compressed_layers(result).values()] == [SparseLinear, Int8Linear, SparseLinear]
    assert torch.equal(result[0].weight, Sparse(0.5).compress(model[0].weight).decompress())
    assert (result[4].bits, result[4].activation_bits) == (8, 8)
    assert cosine(result(x), model(x)) > 0.9


@pytest.mark.parametrize("inplace", [False, True])
def test_one_density_for_the_whole_model(inplace: bool) -> None:
    model = mlp()
    with torch.no_grad():
        model[4].weight *= 10
    magnitudes = torch.cat([model[i].weight.abs().flatten() for i in (0, 2, 4)])
    threshold = magnitudes.sort(descending=True).values[round(0.2 * len(magnitudes)) - 1]
    expected = {str(i): int((model[i].weight.abs() >= threshold).sum()) for i in (0, 2, 4)}
    layers = compressed_layers(pc.compress(model, Sparse(0.2, scope="model"), inplace=inplace))
    assert {name: layer.settings["nnz"] for name, layer in layers.items()} == expected
    assert sum(expected.values()) == round(0.2 * len(magnitudes))


def test_the_layers_of_one_method_are_seen_together() -> None:
    """Under whatever globs; another object is another method, an equal one too."""
    dense = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    with torch.no_grad():
        for i, layer in enumerate(dense):
            layer.weight.copy_(torch.rand(16, 16) + i + 1)
    one, two = Sparse(0.5, scope="model"), Sparse(0.5, scope="model")
    result = pc.compress(dense, {"0": one, "1": two, "2": one, "3": two})
    assert [layer.settings["nnz"] / 256 for layer in compressed_layers(result).values()] == [0, 0, 1, 1]


def test_layers_that_stay_dense_take_no_part() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), Scaled(16, 16))
    with torch.no_grad():
        model[2].weight.fill_(1e6)
        model[1].weight.fill_(1e3)
    result = pc.compress(model, {"1": None, "*": Sparse(0.5, scope="model")})
    assert result[0].density == 0.5


def test_a_shared_weight_is_seen_once() -> None:
    model = Tied()
    with torch.no_grad():
        model.first.weight.copy_(torch.rand(24, 24) + 1)
    result = pc.compress(model, Sparse(0.5, scope="model"))
    kept = round(0.5 * (24 * 24 + 24 * 4))
    assert (result.first.nnz, result.last.nnz) == (kept, 0)
    assert result.first.packed is result.second.packed


class Seeing:
    """A method of a user that makes sparse weights and looks at all layers first."""

    name = "sparse"

    def __init__(self, layers: int = -1) -> None:
        self.layers = layers

    def for_layers(self, weights: list[Tensor], inputs: None) -> list[Seeing]:
        assert inputs is None, "it makes no use of inputs"
        assert not any(weight.requires_grad for weight in weights)
        return [Seeing(len(weights)) for _ in weights]

    def compress(self, weight: Tensor) -> SparseWeight:
        assert self.layers == 3, "for_layers was asked first"
        return SparseWeight.from_dense(torch.triu(weight).float())


def test_a_method_of_ones_own() -> None:
    result = pc.compress(mlp(), Seeing())
    assert methods(result) == {"0": "sparse", "2": "sparse", "4": "sparse"}
    assert torch.equal(result[0].weight, torch.triu(result[0].weight))


def test_an_error_of_a_method_names_the_layer(snapshot: Snapshot) -> None:
    model = mlp()
    unchanged = snapshot(model)
    with pytest.raises(ValueError, match=r"compress: 2: Sparse: the weight is \[24, 32\], the mask \[3, 3\]"):
        pc.compress(model, {"2": Sparse.from_mask(torch.ones(3, 3, dtype=torch.bool))})
    assert unchanged()


@pytest.mark.parametrize("method", [Sparse(0.3), Sparse(0.3, bits=8), Sparse(pattern="4:8", bits=8)])
@pytest.mark.parametrize("inplace", [False, True])
def test_sparse_layers_take_activations_and_keep_ties(method: Sparse, inplace: bool, block: Build) -> None:
    model = nn.Sequential(block(), block()).eval()
    model[1].down.weight = model[0].down.weight
    result = pc.compress(model, method, inplace=inplace)
    assert [layer.activation for layer in compressed_layers(result).values()] == ["gelu", "none", "gelu", "none"]
    assert type(result[0].act) is nn.Identity
    assert result[0].down.packed is result[1].down.packed
    assert method.bits == 32 or torch.equal(result[0].down.canonical().scale, result[1].down.canonical().scale)
    copied = copy.deepcopy(result)
    assert copied[0].down.packed is copied[1].down.packed
    x = torch.randn(5, 48)
    expected = nn.functional.gelu(nn.functional.linear(x, result[0].up.weight, result[0].up.bias))
    torch.testing.assert_close(result[0].up(x), expected, rtol=0.1, atol=0.1 if method.bits == 8 else 1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_transformer_encoder_with_sparse_layers() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padded = torch.randn(3, 6, 32), torch.arange(6)[None] >= torch.tensor([6, 4, 2])[:, None]
    result = pc.compress(model, Sparse())
    assert len(compressed_layers(result)) == 4
    assert all("MultiheadAttention" in r.reason for r in records(result).values() if r.method is None)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            y, expected = (m(x, src_key_padding_mask=padded)[~padded] for m in (result, model))
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_the_summary_of_sparse_layers() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 4))
    found = pc.summary(pc.compress(model, {"0": Sparse(0.2), "2": Sparse(0.5, pattern="2:4"), "3": INT8}))
    first, second, last = found.layers
    nnz = round(0.2 * 64 * 32)
    assert (first.method, first.bits, first.density) == ("sparse", 32, nnz / (64 * 32))
    assert first.bytes == 64 * 32 // 8 + 4 * nnz + 4 * 32
    assert second.bytes == 32 * 16 // 8 + 4 * 256 + 4 * 16
    assert (last.method, last.bits, last.density, last.label) == ("int8", None, None, "int8")
    dense, kept = model[0].weight, Sparse(0.2).compress(model[0].weight).decompress()
    assert first.error == pytest.approx(float(((dense - kept).norm() / dense.norm()).detach()), rel=1e-4)
    lines = str(found).splitlines()
    assert "sparse 20 %+relu" in lines[1]
    assert "sparse 50 %" in lines[2]
    assert found.bytes == sum(layer.bytes for layer in found.layers)
    assert found.dense_bytes == sum(p.numel() * p.element_size() for p in model.parameters())

    (int8,) = pc.summary(pc.compress(nn.Sequential(nn.Linear(64, 32)), Sparse(0.25, bits=8))).layers
    assert (int8.bits, int8.bytes) == (8, 64 * 32 // 8 + round((int8.density or 0) * 2048) + 4 * 32 + 4 * 32)
    assert " int8" in int8.label
    by_hand = nn.Sequential(SparseLinear.from_dense(nn.Linear(16, 8), Sparse(0.5)), nn.Linear(8, 2))
    (record,) = pc.summary(by_hand).layers
    assert (record.method, record.density, record.bytes, record.error) == ("sparse", 0.5, 8 * 2 + 4 * 64 + 4 * 8, None)


def test_the_summary_describes_the_layers_as_they_are_now() -> None:
    model = pc.compress(mlp(), {"0": Sparse(0.1), "2": INT8, "4": None})
    before = pc.summary(model)
    model.load_state_dict(pc.compress(mlp(), {"0": Sparse(0.5), "2": INT8, "4": None}).state_dict())
    model[4] = SparseLinear.from_dense(nn.Linear(24, 8), Sparse(0.25))
    found = pc.summary(model)
    assert [layer.label for layer in found.layers] == ["sparse 50 %", "int8", "sparse 25 %"]
    assert found.layers[2].reason == ""
    assert before.layers[0].label.startswith("sparse 9.96"), "a summary that was taken stays what it was"
    assert found.bytes == sum(layer.bytes for layer in found.layers)
    assert found.dense_bytes == before.dense_bytes == sum(p.numel() * 4 for p in mlp().parameters())


def test_bytes_of_tied_sparse_layers_count_once() -> None:
    model = Tied()
    found = pc.summary(pc.compress(model, Sparse(0.5, bits=8)))
    assert found.bytes == sum(layer.bytes for layer in found.layers)
    assert found.layers[1].bytes == 4 * 24
    assert found.dense_bytes == sum(p.numel() * p.element_size() for p in model.parameters())


# --- in place or not ----------------------------------------------------------------------------------------------------


def storages(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def test_a_copy_shares_nothing_and_the_original_stays(lookup: Build, snapshot: Snapshot) -> None:
    model = lookup(tied=True)
    unchanged = snapshot(model)
    tokens = torch.randint(50, (2, 7))
    expected = model(tokens)
    result = pc.compress(model, {"blocks.1.*": INT8, "*": None})
    assert result is not model
    assert unchanged()
    assert not storages(model) & storages(result)
    assert not {id(m) for m in model.modules()} & {id(m) for m in result.modules()}
    with torch.no_grad():
        for tensor in [*result.parameters(), *result.buffers()]:
            tensor.zero_()
    assert torch.equal(model(tokens), expected)


def test_in_place_changes_the_model_itself(lookup: Build, same: Same) -> None:
    model = lookup()
    copied, norm = pc.compress(model, INT8), model.blocks[0].norm  # type: ignore[index]
    result = pc.compress(model, INT8, inplace=True)
    assert result is model
    assert model.blocks[0].norm is norm  # type: ignore[index]
    assert list(compressed_layers(model)) == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
    tokens = torch.randint(50, (2, 7))
    assert same(model(tokens), copied(tokens))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_training_flags_stay(inplace: bool, training: bool, block: Build) -> None:
    model = block().train(training)
    result = pc.compress(model, INT8, inplace=inplace, example_inputs=torch.randn(2, 48))
    assert all(module.training is training for module in result.modules())


def test_the_model_itself_is_the_layer(snapshot: Snapshot) -> None:
    dense = nn.Linear(16, 8)
    unchanged = snapshot(dense)
    result = pc.compress(dense, INT8)
    assert isinstance(result, Int8Linear)
    assert list(compressed_layers(result)) == [""]
    assert "(the model)" in str(pc.summary(result))
    x = torch.randn(4, 16)
    assert cosine(result(x), dense(x)) > 0.999
    with pytest.raises(ValueError, match="the model itself is the layer to replace, which cannot be done in place"):
        pc.compress(dense, INT8, inplace=True)
    assert unchanged()


def test_compressing_what_is_compressed_already() -> None:
    once = pc.compress(mlp(), {"0": INT8})
    twice = pc.compress(once, {"4": Int8(activation_bits=7)})
    bits = {name: layer.activation_bits for name, layer in compressed_layers(twice).items()}
    assert bits == {"0": 8, "4": 7}
    with pytest.raises(ValueError, match="matches no layer that could be compressed"):
        pc.compress(twice, {"0": INT8})


def test_the_summary_keeps_what_was_compressed_before() -> None:
    twice = pc.compress(pc.compress(mlp(), {"0": INT8}), {"4": INT8})
    assert methods(twice) == {"0": "int8", "2": None, "4": "int8"}
    whole = pc.summary(twice)
    assert whole.dense_bytes == sum(p.numel() * p.element_size() for p in mlp().parameters())


# --- shared weights and modules -----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two linear layers with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return y


@pytest.mark.parametrize("inplace", [False, True])
def test_tied_linear_layers_stay_tied(inplace: bool, same: Same) -> None:
    model = Tied()
    x = torch.randn(9, 24)
    expected = model(x)
    result = pc.compress(model, INT8, inplace=inplace)
    assert result.first.packed is result.second.packed
    assert torch.equal(result.first.canonical().scale, result.second.canonical().scale)
    assert not torch.equal(result.first.bias, result.second.bias)
    assert result.last.packed is not result.first.packed
    assert cosine(result(x), expected) > 0.999
    copied = copy.deepcopy(result)
    assert copied.first.packed is copied.second.packed
    assert copied.first.packed is not result.first.packed
    assert same(copied(x), result(x))
    assert result.to(torch.bfloat16).first.packed is result.second.packed


def test_bytes_of_tied_layers_count_once() -> None:
    model = Tied()
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    found = pc.summary(pc.compress(model, INT8))
    weights, scales, biases = 24 * 24 + 24 * 4, 4 * (24 + 4), 4 * (24 + 24 + 4)
    assert found.bytes == weights + scales + biases
    assert found.dense_bytes == dense


def test_tied_layers_with_different_methods_do_not_share(same: Same) -> None:
    model = Tied()
    result = pc.compress(model, {"first": INT8, "second": Int8(activation_bits=7), "*": INT8})
    assert result.first.packed is not result.second.packed
    for name in ("first", "second"):
        one = pc.compress(getattr(model, name), Int8(activation_bits=8 if name == "first" else 7))
        x = torch.randn(3, 24)
        assert same(one(x), getattr(result, name)(x))


def test_one_of_two_tied_layers() -> None:
    result = pc.compress(Tied(), {"second": INT8})
    assert isinstance(result.first, nn.Linear)
    assert isinstance(result.second, Int8Linear)


def test_a_weight_tied_to_an_embedding_stays_dense(lookup: Build) -> None:
    for inplace in (False, True):
        model = lookup(tied=True)
        tokens = torch.randint(50, (2, 7))
        expected = model(tokens)
        result = pc.compress(model, INT8, inplace=inplace)
        assert type(result.head) is nn.Linear
        assert result.head.weight is result.embedding.weight  # type: ignore[union-attr]
        reason = records(result)["head"].reason
        assert reason == "its weight is shared with embedding: compressing it would add bytes"
        assert reason in str(pc.summary(result))
        assert cosine(result(tokens), expected) > 0.999


@pytest.mark.parametrize("inplace", [False, True])
def test_one_module_used_twice(inplace: bool) -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(9, 16)
    expected = model(x)
    result = pc.compress(model, INT8, inplace=inplace)
    assert isinstance(result[0], Int8Linear)
    assert result[0] is result[2]
    assert list(records(result)) == ["0", "4"], "one record for one module"
    assert cosine(result(x), expected) > 0.999


def test_a_plan_may_name_a_shared_module_by_any_of_its_names() -> None:
    shared = nn.Linear(16, 16)
    result = pc.compress(nn.Sequential(shared, nn.Tanh(), shared), {"2": INT8})
    assert isinstance(result[0], Int8Linear)
    assert result[0] is result[2]


def test_a_conv1d_tied_to_a_linear_layer() -> None:
    """GPT-2's Conv1D reads the shared weight as [in, out], nn.Linear as [out, in]: each must keep its own."""
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    model = nn.Sequential(utils.Conv1D(16, 16), nn.Tanh(), nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight.normal_()
    model[2].weight = model[0].weight
    x = torch.randn(50, 16)
    assert cosine(pc.compress(model, INT8)(x), model(x)) > 0.999


# --- layers that stay as they are ---------------------------------------------------------------------------------------


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.out = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(x + self.attention(x, x, x)[0])
        return y


@pytest.mark.parametrize("plan", [INT8, {"*out*": INT8}])
def test_multihead_attention_is_left_whole(plan: Any) -> None:
    model = WithAttention().eval()
    x = torch.randn(3, 5, 32)
    result = pc.compress(model, plan)
    assert type(result.attention) is nn.MultiheadAttention
    assert type(result.attention.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    record = records(result)["attention.out_proj"]
    assert record.method is None
    assert "inside nn.MultiheadAttention" in record.reason
    assert isinstance(result.out, Int8Linear)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert cosine(result(x), model(x)) > 0.999
            assert torch.equal(result.attention(x, x, x)[0], model.attention(x, x, x)[0])


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.GELU()])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transformer_encoder(activation: Any, padded: bool, norm_first: bool, inplace: bool) -> None:
    """Its fast path reads float weights itself, and turns padded batches into nested tensors: neither may run."""
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, activation=activation, batch_first=True, norm_first=norm_first, dropout=0.1
    )
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32)).eval()
    x = torch.randn(3, 6, 32)
    mask = torch.arange(6)[None] >= torch.tensor([6, 4, 2])[:, None] if padded else None
    with torch.inference_mode():
        expected = model(x, src_key_padding_mask=mask)
    result = pc.compress(model, INT8, inplace=inplace)
    assert len(compressed_layers(result)) == 4
    assert all("MultiheadAttention" in r.reason for r in records(result).values() if r.method is None)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            y = result(x, src_key_padding_mask=mask)
            kept = torch.ones_like(x, dtype=torch.bool) if mask is None else ~mask[:, :, None].expand_as(x)
            assert cosine(y[kept], expected[kept]) > 0.999
    assert result.train()(x, src_key_padding_mask=mask).shape == x.shape


def test_transformer_decoder() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    result = pc.compress(model, INT8)
    assert len(compressed_layers(result)) == 4
    with torch.inference_mode():
        assert cosine(result(x, memory), model(x, memory)) > 0.999


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


def test_subclasses_of_linear_are_reported() -> None:
    model = nn.Sequential(Scaled(8, 8), nn.Linear(8, 8))
    result = pc.compress(model, INT8)
    assert methods(result) == {"0": None, "1": "int8"}
    assert records(result)["0"].reason == "Scaled is a subclass of Linear, which may do something else"
    assert records(result)["0"].kind == "Scaled"


def test_parametrized_layers_are_reported() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    result = pc.compress(model, INT8)
    assert methods(result) == {"0": None, "1": "int8"}
    assert records(result)["0"].reason


def test_lazy_layers_are_reported() -> None:
    result = pc.compress(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8)), INT8)
    assert methods(result)["1"] == "int8"
    assert type(result[0]) is nn.LazyLinear


def test_a_weight_that_is_no_parameter() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].register_buffer("weight", weight)
    x = torch.randn(5, 8)
    assert cosine(pc.compress(model, INT8)(x), model(x)) > 0.999


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_are_reported(kind: str) -> None:
    model = mlp()
    getattr(model[2], kind)(lambda *arguments: None)
    result = pc.compress(model, INT8)
    assert methods(result) == {"0": "int8", "2": None, "4": "int8"}
    assert "hooks" in records(result)["2"].reason


def test_a_hook_on_an_activation_keeps_it_in_place() -> None:
    fired = []
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model[1].register_forward_hook(lambda module, inputs, output: fired.append(output.shape))
    result = pc.compress(model, INT8, inplace=True)
    result(torch.randn(3, 8))
    assert fired == [(3, 8)]


def test_float64_layers_are_reported() -> None:
    model = nn.Sequential(nn.Linear(8, 8).double(), nn.Linear(8, 8))
    result = pc.compress(model, INT8)
    assert methods(result) == {"0": None, "1": "int8"}
    assert records(result)["0"].reason == "its weight is torch.float64, expected float32, bfloat16 or float16"


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_empty_layers_are_reported() -> None:
    result = pc.compress(nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 8), nn.Linear(8, 8)), INT8)
    assert methods(result) == {"0": None, "1": None, "2": "int8"}
    assert records(result)["0"].reason.startswith("its weight is [0, 8]")


def test_layers_that_are_too_wide_are_reported() -> None:
    result = pc.compress(nn.Sequential(nn.Linear(65537, 1), nn.Linear(1, 8)), INT8)
    assert methods(result) == {"0": None, "1": "int8"}
    assert "65536" in records(result)["0"].reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    result = pc.compress(model, INT8)
    assert len(compressed_layers(result)) == 3
    x = torch.randn(20, 16).to(dtype)
    assert result(x).dtype == dtype
    assert cosine(result(x), model(x)) > 0.999


# --- what is refused, and the model after that --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("inplace", [False, True])
def test_nan_is_refused_and_the_layer_named(value: float, where: str, inplace: bool, lookup: Build) -> None:
    model = lookup()
    with torch.no_grad():
        getattr(model.get_submodule("blocks.1.down"), where).flatten()[3] = value
    modules = list(model.modules())
    with pytest.raises(ValueError, match=rf"the {where} of blocks.1.down holds NaN or Inf"):
        pc.compress(model, INT8, inplace=inplace)
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert not compressed_layers(model)
    pc.compress(model, {"blocks.1.down": None, "*": INT8}, inplace=inplace)


def test_nan_in_the_model_itself() -> None:
    dense = nn.Linear(4, 4)
    with torch.no_grad():
        dense.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight of the model itself holds NaN"):
        pc.compress(dense, INT8)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_on_the_meta_device_is_refused(inplace: bool) -> None:
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match="compress: 0 is on meta, expected the CPU"):
        pc.compress(model, INT8, inplace=inplace)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match="0 is on cuda:0, expected the CPU"):
        pc.compress(mlp().cuda(), INT8)


class Stop(Exception):
    pass


def test_an_exception_half_way_leaves_the_original_as_it_was(
    lookup: Build, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lookup()
    unchanged = snapshot(model)
    for point in range(5):
        fail_at(point, monkeypatch)
        with pytest.raises(Stop):
            pc.compress(model, INT8)
        assert unchanged()
    monkeypatch.undo()
    assert len(compressed_layers(pc.compress(model, INT8))) == 5


def fail_at(point: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Int8.compress raises when it is called for the layer of this number."""
    monkeypatch.undo()
    genuine, calls = Int8.compress, iter(range(100))

    def compress(self: Int8, weight: Tensor) -> Any:
        if next(calls) == point:
            raise Stop
        return genuine(self, weight)

    monkeypatch.setattr(Int8, "compress", compress)


def test_an_exception_half_way_in_place_leaves_the_model_as_it_was(
    lookup: Build, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lookup()
    unchanged = snapshot(model)
    for point in range(5):
        fail_at(point, monkeypatch)
        with pytest.raises(Stop):
            pc.compress(model, INT8, inplace=True)
        assert unchanged()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_method_that_cannot_take_a_later_layer_leaves_the_model_as_it_was(inplace: bool, snapshot: Snapshot) -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 2))
    unchanged = snapshot(model)
    with pytest.raises(ValueError, match="compress: 1: LowRank"):
        pc.compress(model, pc.LowRank(8), inplace=inplace)
    assert unchanged()
    assert not compressed_layers(model)


class Stubborn(nn.Module):
    def __deepcopy__(self, memo: Any) -> Any:
        raise Stop


def generated() -> Any:
    yield 1


@pytest.mark.parametrize(
    ("thing", "where"),
    [
        (Stubborn(), "1.inner.thing"),
        (threading.Lock(), "1.inner.thing"),
        (generated(), "1.inner.thing"),
        ([{"a": threading.Lock()}], "1.inner.thing"),
    ],
)
def test_what_cannot_be_copied_is_named(thing: Any, where: str, snapshot: Snapshot) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"inner": nn.Tanh()}))
    model[1]["inner"].thing = thing  # type: ignore[index]
    unchanged = snapshot(model)
    with pytest.raises(
        TypeError, match=rf"compress: {where} cannot be copied .*; inplace=True changes the model itself"
    ):
        pc.compress(model, INT8)
    assert unchanged()
    assert type(pc.compress(model, INT8, inplace=True)[0]) is Int8Linear


@pytest.mark.parametrize("only_if_faster", [False, True])
def test_a_forward_that_fails_leaves_the_model_whole(only_if_faster: bool, snapshot: Snapshot) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.up(x)
            raise Stop

    model = Failing()
    unchanged = snapshot(model)
    if not only_if_faster:
        pc.compress(model, INT8, example_inputs=torch.randn(2, 8))  # nothing needs to be run
        return
    for inplace in (False, True):
        with pytest.raises(Stop):
            pc.compress(model, INT8, example_inputs=torch.randn(2, 8), only_if_faster=True, inplace=inplace)
        assert unchanged(), "no hook is left behind, no layer replaced, the training flag as it was"


# --- fusion -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.ReLU6(), "relu6"),
        (nn.ReLU6(inplace=True), "relu6"),
        (nn.Hardtanh(0, 6), "relu6"),
        (nn.Hardswish(), "hardswish"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_goes_into_the_layer_before_it(activation: nn.Module, name: str, inplace: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 32), activation, nn.Linear(32, 8)).eval()
    x = torch.randn(30, 16)
    expected = model(x)
    result = pc.compress(model, INT8, inplace=inplace)
    assert [layer.activation for layer in compressed_layers(result).values()] == [name, "none"]
    assert type(result[1]) is nn.Identity
    assert records(result)["0"].activation == name
    assert f"int8+{name}" in str(pc.summary(result))
    assert cosine(result(x), expected) > 0.999


def test_fused_inside_a_block(block: Build) -> None:
    model = block()
    result = pc.compress(model, INT8)
    assert result.up.activation == "gelu"
    assert type(result.act) is nn.Identity
    assert type(model.act) is nn.GELU
    x = torch.randn(9, 48)
    assert cosine(result(x), model(x)) > 0.9999


@pytest.mark.parametrize(
    "activation", [nn.Tanh(), nn.LeakyReLU(), nn.Hardtanh(-6, 6), nn.Hardsigmoid(), nn.Sigmoid(), nn.ELU()]
)
def test_other_activations_stay(activation: nn.Module, block: Build) -> None:
    model = block(activation=activation)
    result = pc.compress(model, INT8)
    assert result.up.activation == "none"
    assert type(result.act) is type(activation)
    x = torch.randn(9, 48)
    assert cosine(result(x), model(x)) > 0.999


class Used(nn.Module):
    """Two linear layers and an activation, with the forward that a test gives."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.other, self.act = nn.Linear(16, 16), nn.Linear(16, 16), nn.SiLU()
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def sum_used_elsewhere(self: Any, x: Tensor) -> Tensor:
    h = self.fc(x)
    return torch.as_tensor(self.act(h) + h)


NOT_FUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the activation twice": lambda self, x: self.act(self.fc(x)) + self.act(self.other(x)),
    "the layer twice": lambda self, x: self.act(self.fc(x)) + self.fc(x),
    "the sum used elsewhere": sum_used_elsewhere,
    "something between": lambda self, x: self.act(self.fc(x) + 1),
    "a layer, not the activation": lambda self, x: self.other(self.fc(x)),
    "in place between": lambda self, x: self.act(self.fc(x).mul_(2)),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_what_is_not_fused(case: str) -> None:
    model = Used(NOT_FUSED[case])
    result = pc.compress(model, INT8)
    assert {layer.activation for layer in compressed_layers(result).values()} == {"none"}
    assert type(result.act) is nn.SiLU
    x = torch.randn(9, 16)
    assert cosine(result(x), model(x)) > 0.999


class Skippable(nn.Module):
    """The activation is applied in one of two ways through forward only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(16, 16), nn.SiLU()

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        h: Tensor = self.fc(x)
        if skip is not None:
            return torch.as_tensor(self.act(h) + skip)
        return h


def test_a_way_through_forward_without_the_activation() -> None:
    model, x, skip = Skippable(), torch.randn(9, 16), torch.randn(9, 16)
    result = pc.compress(model, INT8)
    assert cosine(result(x, skip), model(x, skip)) > 0.999
    assert cosine(result(x), model(x)) > 0.999


class TrainedOtherwise(nn.Module):
    """In training something stands between the layer and its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(16, 16), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if self.training:
            h = h - 0.5
        y: Tensor = self.act(h)
        return y


@pytest.mark.parametrize("training", [False, True])
def test_the_training_flag_when_compressing_does_not_change_the_result(training: bool) -> None:
    model, x = TrainedOtherwise(), torch.randn(9, 16)
    result = pc.compress(model.train(training), INT8)
    for flag in (False, True):
        assert cosine(result.train(flag)(x), model.train(flag)(x)) > 0.999


class TwoNames(nn.Module):
    """One activation under two names, called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(16, 16), nn.SiLU()
        self.alias = self.act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.alias(self.fc(x))
        return y


def test_an_activation_under_two_names_is_applied_once() -> None:
    model, x = TwoNames(), torch.randn(9, 16)
    assert cosine(pc.compress(model, INT8)(x), model(x)) > 0.999


class Outside(nn.Module):
    """The outer forward calls the inner layer past the inner forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner[0](x)
        return y


def test_a_layer_called_from_outside_its_parent() -> None:
    model, x = Outside(), torch.randn(9, 16)
    assert cosine(pc.compress(model, INT8)(x), model(x)) > 0.999


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.calls = nn.Linear(16, 16), nn.SiLU(), 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.fc(x)
        y: Tensor = self.act(self.last)
        return y


@pytest.mark.parametrize("inplace", [False, True])
def test_looking_for_activations_leaves_no_trace(inplace: bool) -> None:
    model = Remembering()
    result = pc.compress(model, INT8, inplace=inplace)
    for one in (model, result):
        assert one.last is None
        assert one.calls == 0


def test_a_shared_activation_is_fused_where_it_can_be() -> None:
    act = nn.ReLU()
    model = nn.Sequential(
        nn.Sequential(nn.Linear(16, 16), act), nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), act)
    )
    x = torch.randn(9, 16)
    result = pc.compress(model, INT8)
    assert type(result[1][2]) is nn.ReLU
    assert cosine(result(x), model(x)) > 0.999


def test_keyword_calls() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(input=x)
            return y

    model, x = Keyword(), torch.randn(5, 8)
    assert cosine(pc.compress(model, INT8)(x), model(x)) > 0.999


# --- only_if_faster -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[float, float]]:
    """{in_features: (dense us, compressed us)}: what the measurement is made to find; 10 and 5 by default."""
    times: dict[int, tuple[float, float]] = {}

    def measured(first: Callable[[], Tensor], second: Callable[[], Tensor], **_: Any) -> tuple[float, float]:
        dense, compressed = first(), second()
        assert dense.shape == compressed.shape, "the same input to both"
        assert cosine(dense, compressed) > 0.99
        return times.get(dense.shape[-1], (10.0, 5.0))

    monkeypatch.setattr(race, "interleaved_us", measured)
    monkeypatch.setattr(race, "model_us", lambda *_: (10.0, 5.0))
    return times


@pytest.mark.parametrize("inplace", [False, True])
def test_dense_stays_where_it_is_not_slower(inplace: bool, clock: dict[int, tuple[float, float]]) -> None:
    clock.update({32: (10.0, 5.0), 24: (5.0, 10.0), 8: (7.0, 7.0)})
    model = mlp()
    dense = model[2]
    result = pc.compress(model, INT8, example_inputs=torch.randn(4, 16), only_if_faster=True, inplace=inplace)
    assert methods(result) == {"0": "int8", "2": None, "4": None}
    found = records(result)
    assert (found["0"].dense_us, found["0"].us) == (10.0, 5.0)
    assert (found["2"].dense_us, found["2"].us) == (5.0, 10.0)
    assert found["2"].reason == "dense is faster here: 5 us against 10 us"
    assert found["2"].bytes == found["2"].dense_bytes
    assert found["2"].error is None
    assert type(result[2]) is nn.Linear
    assert (result[2] is dense) is inplace
    assert not any(module._forward_pre_hooks for module in result.modules())


def test_sparse_is_measured_too(clock: dict[int, tuple[float, float]]) -> None:
    clock.update({24: (5.0, 10.0)})
    plan = {"0": Sparse(), "*": Sparse(1.0, scope="model", bits=8)}
    result = pc.compress(mlp(), plan, example_inputs=torch.randn(4, 16), only_if_faster=True)
    assert methods(result) == {"0": "sparse", "2": None, "4": "sparse"}
    record = records(result)["2"]
    assert (record.label, record.density, record.bits, record.us) == ("dense", None, None, 10.0)


def test_calls_are_summed(clock: dict[int, tuple[float, float]]) -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), shared)
    result = pc.compress(model, INT8, example_inputs=torch.randn(4, 16), only_if_faster=True)
    assert (records(result)["0"].dense_us, records(result)["0"].us) == (30.0, 15.0)


def test_a_dense_winner_keeps_its_activation(clock: dict[int, tuple[float, float]], block: Build) -> None:
    clock[96] = (1.0, 2.0)
    model, x = block(), torch.randn(5, 48)
    result = pc.compress(model, INT8, example_inputs=x, only_if_faster=True)
    assert type(result.up) is nn.Linear
    assert type(result.act) is nn.GELU
    assert records(result)["up"].activation == "none"
    assert cosine(result(x), model(x)) > 0.999


def test_measured_with_the_activation_that_it_takes_over(block: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measured(first: Callable[[], Tensor], second: Callable[[], Tensor], **_: Any) -> tuple[float, float]:
        seen.append(cosine(first(), second()))
        return 2.0, 1.0

    monkeypatch.setattr(race, "interleaved_us", measured)
    monkeypatch.setattr(race, "model_us", lambda *_: (10.0, 5.0))
    pc.compress(block(), INT8, example_inputs=torch.randn(5, 48), only_if_faster=True)
    assert len(seen) == 2
    assert min(seen) > 0.999


@pytest.mark.usefixtures("clock")
def test_a_layer_that_is_never_reached(block: Build) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    result = pc.compress(Unused(), INT8, example_inputs=torch.randn(3, 16), only_if_faster=True)
    assert methods(result) == {"used": "int8", "unused.0": None}
    record = records(result)["unused.0"]
    assert "never reach it" in record.reason
    assert record.activation == "none", "it keeps its activation module, so nothing is fused"
    assert type(result.unused[1]) is nn.ReLU
    assert "+relu" not in str(pc.summary(result))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("inputs", [torch.randn(3, 16), (torch.randn(3, 16),), [torch.randn(3, 16)]])
def test_kinds_of_example_inputs(inputs: Any) -> None:
    result = pc.compress(mlp(), INT8, example_inputs=inputs, only_if_faster=True)
    assert len(compressed_layers(result)) == 3


@pytest.mark.usefixtures("clock")
def test_example_inputs_by_keyword(lookup: Build) -> None:
    tokens = torch.randint(50, (2, 5))
    result = pc.compress(lookup(), INT8, example_inputs={"tokens": tokens}, only_if_faster=True)
    assert len(compressed_layers(result)) == 5


@pytest.mark.usefixtures("clock")
def test_layers_called_by_keyword_are_measured() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(input=x)
            return y

    result = pc.compress(Keyword(), INT8, example_inputs=torch.randn(3, 8), only_if_faster=True)
    assert methods(result) == {"fc": "int8"}


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("inputs", ["text", 3, 1.5])
def test_example_inputs_of_the_wrong_type(inputs: Any, snapshot: Snapshot) -> None:
    model = mlp()
    unchanged = snapshot(model)
    with pytest.raises(TypeError, match="expected a tensor, a sequence of arguments or a mapping"):
        pc.compress(model, INT8, example_inputs=inputs, only_if_faster=True)
    assert unchanged()


def test_only_if_faster_needs_example_inputs(snapshot: Snapshot) -> None:
    model = mlp()
    unchanged = snapshot(model)
    with pytest.raises(ValueError, match="only_if_faster needs example_inputs"):
        pc.compress(model, INT8, only_if_faster=True)
    assert unchanged()


@pytest.mark.usefixtures("clock")
def test_measuring_leaves_training_and_random_state_alone(block: Build) -> None:
    model = nn.Sequential(block(), nn.Dropout(0.5)).train()
    model[0].norm.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    result = pc.compress(model, INT8, example_inputs=torch.randn(3, 48), only_if_faster=True)
    for one in (model, result):
        assert {name: m.training for name, m in one.named_modules() if name in flags} == flags


@pytest.mark.usefixtures("clock")
def test_a_transformer_encoder_is_measured() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    result = pc.compress(model, INT8, example_inputs=torch.randn(2, 5, 32), only_if_faster=True)
    assert len(compressed_layers(result)) == 4, "its fast path does not hide the layers from the measurement"


# --- summary ------------------------------------------------------------------------------------------------------------


def test_summary(block: Build) -> None:
    model = nn.Sequential(block(64), nn.Linear(64, 10).double(), nn.Linear(64, 10))
    result = pc.compress(model, {"0.*": INT8, "1": INT8})
    found = pc.summary(result)
    up, down, double, last = found.layers
    assert [record.name for record in found.layers] == ["0.up", "0.down", "1", "2"]
    assert (up.method, up.kind, up.shape, up.activation) == ("int8", "Linear", (128, 64), "gelu")
    assert (up.dense_bytes, up.bytes) == (4 * (128 * 64 + 128), 128 * 64 + 8 * 128)
    assert up.error is not None
    assert 0.001 < up.error < 0.02
    assert (down.method, down.activation) == ("int8", "none")
    assert (double.method, double.bytes) == (None, 8 * (64 * 10 + 10))
    assert (last.method, last.bytes) == (None, 4 * (64 * 10 + 10))
    assert found.dense_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.bytes == found.dense_bytes - up.dense_bytes - down.dense_bytes + up.bytes + down.bytes

    lines = str(found).splitlines()
    assert lines[0].split()[:4] == ["layer", "shape", "method", "bytes"]
    assert len(lines) == 7
    assert lines[1].split()[:5] == ["0.up", "128x64", "int8+gelu", f"{up.bytes:,}", f"{up.bytes / up.dense_bytes:.2f}"]
    assert lines[3].endswith(double.reason)
    assert lines[4].endswith("no glob of the plan matches it")
    assert lines[5].startswith("0.norm") and lines[5].endswith("no compressed layer for LayerNorm")
    assert lines[6].startswith("the whole model")
    assert f"{found.bytes:,}" in lines[6]


def test_the_error_of_a_layer_is_that_of_its_weight() -> None:
    dense = nn.Linear(64, 32)
    result = pc.compress(nn.Sequential(dense), INT8)
    weight = result[0].canonical().decompress()  # type: ignore[operator]
    expected = float((weight - dense.weight).norm() / dense.weight.norm())
    assert records(result)["0"].error == pytest.approx(expected, rel=1e-4)


def test_a_layer_of_zeros_has_no_error() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    nn.init.zeros_(model[0].weight)
    result = pc.compress(model, INT8)
    assert records(result)["0"].error == 0.0
    assert torch.equal(result(torch.randn(2, 8)), model(torch.randn(2, 8)))


def test_summary_of_a_model_that_was_put_together_by_hand() -> None:
    model = nn.Sequential(Int8Linear.from_dense(nn.Linear(16, 8)), nn.Linear(8, 2))
    (record,) = pc.summary(model).layers
    assert (record.name, record.method, record.shape, record.error) == ("0", "int8", (8, 16), None)
    assert "0" in str(pc.summary(model))


@pytest.mark.parametrize("stream", [None, object()])
@pytest.mark.parametrize("progress", [None, False])
def test_no_standard_error_or_an_odd_one(stream: Any, progress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    assert len(compressed_layers(pc.compress(mlp(), INT8, progress=progress))) == 3


def test_progress_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert len(compressed_layers(pc.compress(mlp(), INT8, progress=True))) == 3


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    pc.compress(mlp(), INT8, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "compressing" in captured.err
    pc.compress(mlp(), INT8)
    assert capsys.readouterr() == ("", "")


# --- memory -------------------------------------------------------------------------------------------------------------

MEMORY = """
import torch
from torch import nn
import pycompress as pc

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

width = 1536
pc.compress(nn.Sequential(nn.Linear(width, 16)), pc.Int8())(torch.zeros(1, width))  # what is allocated once
for depth, inplace in ((12, True), (4, False)):
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    for layer in model:
        nn.init.normal_(layer.weight)
    del layer
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
    before = status("VmRSS")
    result = pc.compress(model, pc.Int8(activation_bits=7), inplace=inplace)
    print((status("VmHWM") - before) / (4 * width * width), (status("VmRSS") - before) / (4 * width * width))
    del model, result
"""


def test_peak_memory(python: Python) -> None:
    """In layers of 9 MiB: in place, the model, its compressed layers and a few more at the most; at the end, a quarter of it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError as error:
        pytest.skip(f"the peak of the resident memory cannot be reset here: {error}")
    # A fixed threshold: glibc otherwise comes to keep freed blocks of this size, and what is held cannot be told.
    result = python(MEMORY, MALLOC_MMAP_THRESHOLD_="1048576")
    assert result.returncode == 0, result.stderr
    (peak, after), (copy_peak, copy_after) = (map(float, line.split()) for line in result.stdout.splitlines())
    assert peak < 12 * 0.25 + 5
    assert after < -12 * 0.7
    assert copy_peak < 5 + 4 * 0.3
    assert copy_after < 4 * 0.3


@pytest.mark.parametrize("faster", [True, False])
def test_methods_that_measure_are_given_layers(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def measured(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> tuple[float, float]:
        dense, compressed = first(), second()
        assert dense.shape == compressed.shape
        asked.append(tuple(dense.shape))
        return (10.0, 5.0) if faster else (5.0, 10.0)

    monkeypatch.setattr("pycompress.plan.interleaved_us", measured)
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64))
    result = pc.compress(model, pc.LowRank("break-even"))
    assert set(asked) == {(128, 64), (128, 48)}
    if faster:
        assert [record.rank for record in pc.summary(result).layers] == [27] * 3, "the largest that is smaller"
        once = len(asked)
        pc.compress(nn.Sequential(model[0]), pc.LowRank("break-even"))
        assert len(asked) < 2 * once, "once for each shape"
    else:
        reasons = {record.reason for record in pc.summary(result).layers}
        assert reasons == {
            f"no rank of a {size} layer is measured to be faster than the dense one here" for size in ("64x48", "48x64")
        }
