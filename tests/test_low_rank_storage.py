"""save() and load() of low-rank layers: nested settings, residuals, embeddings and convolutions; files that are refused."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods import Int4, Int8, Sparse
from pycompress.methods.dense import Dense
from pycompress.methods.low_rank import LowRank
from pycompress.methods.weight import Method
from pycompress.model import compressed_layers
from pycompress.nn import LowRankConv2d, LowRankEmbedding, LowRankLinear

Same = Callable[[Tensor, Tensor], bool]
Snapshot = Callable[[nn.Module], Callable[[], bool]]
Plan = dict[str, Any]
Tensors = dict[str, Tensor]


def low_rank(rank: int, bits: int = 32, residual: Method | None = None, **options: Any) -> LowRank:
    return LowRank(rank, bits=bits, residual=residual, rank_guard=False, **options)


METHODS = [
    low_rank(5), low_rank(16), low_rank(5, 8), low_rank(5, residual=Int8()), low_rank(1, residual=Sparse(0.3)),
    low_rank(5, residual=Dense()), low_rank(5, 8, Sparse(0.3, bits=8), activation_bits=8), low_rank(3, 8, Int8(7, 7)),
    low_rank(3, 8, Dense()), low_rank(3, residual=Sparse(0.0)), low_rank(5, residual=Int4()),
    low_rank(3, 8, Int4(64, symmetric=True), activation_bits=8),
]  # fmt: skip


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 8))
    model.register_buffer("table", torch.randn(3, 4))
    return model.eval()


def compressed(method: LowRank | None = None) -> nn.Sequential:
    """Layer "0" in int8 beside an int8 residual, "2" in float32 beside a sparse one; or both by one method."""
    plan = {"0": method or low_rank(4, 8, Int8()), "2": method or low_rank(6, residual=Sparse(0.25)), "4": None}
    return pc.compress(net(), plan)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def pieces(path: Path, model: nn.Module) -> tuple[Tensors, Plan]:
    """Tensors and plan of a good file."""
    pc.save(model, path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["pycompress"])  # noqa: SIM118


# --- there and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", ["random weights", "meta", "compressed by int8", "compressed", "compressed on meta"])
def test_round_trip(method: LowRank, target: str, path: Path, same: Same) -> None:
    model = compressed(method)
    pc.save(model, path)
    with torch.device("meta" if target == "meta" else "cpu"):
        dense = net()
    if target.startswith("compressed"):
        dense = pc.compress(dense, {"4": None, "*": Int8() if "int8" in target else low_rank(2)})
    if "on meta" in target:
        dense.to("meta")
    loaded = pc.load(dense, path)
    assert equal_states(loaded, model)
    assert all(type(layer) is LowRankLinear for layer in compressed_layers(loaded).values())
    assert [layer.settings for layer in compressed_layers(loaded).values()] == [model[0].settings, model[2].settings]
    assert (loaded[0].activation, type(loaded[1])) == ("relu", nn.Identity)
    x = torch.randn(5, 16)
    assert same(loaded(x), model(x))
    found, before = pc.summary(loaded), pc.summary(model)
    assert [(r.method, r.label, r.rank, r.bits, r.bytes) for r in found.layers if r.method] == [
        (r.method, r.label, r.rank, r.bits, r.bytes) for r in before.layers if r.method
    ]
    assert (found.bytes, found.layers[0].method, found.layers[0].rank) == (before.bytes, "low_rank", method.rank)


def test_what_is_in_the_file(path: Path) -> None:
    model = compressed()
    tensors, plan = pieces(path, model)
    assert set(tensors) == set(model.state_dict())
    assert torch.equal(tensors["0.residual_weight"], model[0].canonical().residual.values)
    common = {"method": "low_rank", "bias": True}
    eight = {"activation_bits": 8, "weight_bits": 8}
    assert plan["version"] == 1
    assert plan["layers"] == {
        "0": {
            **common, "shape": [32, 16], "activation": "relu", "rank": 4, "bits": 8, "activation_bits": 7,
            "residual": {"method": "int8", **eight},
        },
        "2": {
            **common, "shape": [24, 32], "activation": "none", "rank": 6, "bits": 32,
            "residual": {"method": "sparse", "bits": 32, "nnz": 192},
        },
    }  # fmt: skip


def test_saving_twice_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    tensors, plan = pieces(path, compressed())
    again, second = pieces(tmp_path / "again.safetensors", pc.load(net(), path))
    assert plan == second and tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


@pytest.mark.parametrize("method", METHODS)
def test_tied_layers(method: LowRank, path: Path, same: Same) -> None:
    model = pc.compress(Tied(), method)
    tensors, _ = pieces(path, model)
    stored = [*model.first.canonical().tensors(), "bias", "bias"]
    assert sorted(name.rpartition(".")[2] for name in tensors) == sorted(stored), "a shared weight is stored once"
    loaded, x = pc.load(Tied(), path), torch.randn(3, 24)
    assert loaded.first.packed is loaded.second.packed
    found, before = pc.summary(loaded), pc.summary(model)
    assert (found.bytes, found.dense_bytes) == (before.bytes, before.dense_bytes)
    assert same(loaded(x), model(x))


def images(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    layers = {
        "tokens": nn.Embedding(40, 16, padding_idx=3),
        "conv": nn.Conv2d(4, 8, 3, padding=1),
        "head": nn.Linear(16, 5),
    }
    return nn.ModuleDict(layers).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decomposition", ["channel", "spatial", "tucker"])
def test_embeddings_and_convolutions(dtype: torch.dtype, decomposition: str, path: Path, same: Same) -> None:
    method = low_rank(4, embeddings=True, decomposition=decomposition)
    model = pc.compress(images(dtype), method)
    _, plan = pieces(path, model)
    assert plan["layers"]["tokens"]["embedding"] is True
    for target in (images(dtype), pc.compress(images(dtype), low_rank(2, embeddings=True))):
        loaded = pc.load(target, path)
        assert equal_states(loaded, model)
        assert (type(loaded.tokens), type(loaded.conv)) == (LowRankEmbedding, LowRankConv2d)
        assert (loaded.tokens.padding_idx, loaded.tokens.dtype) == (3, dtype)
        tokens, image = torch.randint(40, (2, 7)), torch.randn(2, 4, 6, 6).to(dtype)
        assert same(loaded.tokens(tokens), model.tokens(tokens)) and same(loaded.conv(image), model.conv(image))
        assert pc.summary(loaded).bytes == pc.summary(model).bytes


# --- files that are refused ---------------------------------------------------------------------------------------------


def refused(path: Path, message: str, snapshot: Snapshot, *models: nn.Module) -> None:
    """load() says what is wrong and where, for a dense and for a compressed model, and changes neither."""
    for target in models or (net(), compressed()):
        unchanged = snapshot(target)
        with pytest.raises(ValueError, match=message) as error:
            pc.load(target, path)
        assert str(path) in str(error.value)
        assert unchanged()


def write(path: Path, tensors: Tensors, plan: Plan) -> None:
    path.unlink(missing_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"pycompress": json.dumps(plan)})


def edit(*keys: str, value: Any) -> Callable[[Plan], None]:
    def change(plan: Plan) -> None:
        part = plan["layers"]
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[Plan], None]:
    def change(plan: Plan) -> None:
        part = plan["layers"]
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]

    return change


def nested(value: Any) -> Callable[[Plan], None]:
    return edit("0", "residual", value=value)


FOUR = {"method": "int4", "group": 32, "symmetric": True, "activation_bits": 8}
DEEP: dict[str, Any] = {"method": "low_rank", "rank": 2, "bits": 32, "residual": {"method": "dense"}}
SPARSE = {"method": "sparse", "bits": 32, "nnz": 192}
PLANS: dict[str, tuple[Callable[[Plan], None], str]] = {
    "rank 0": (edit("0", "rank", value=0), "layer 0: .*rank is 0, expected 1 to 16"),
    "rank above min(n, k)": (edit("0", "rank", value=17), "layer 0: .*rank is 17, expected 1 to 16"),
    "rank huge": (edit("2", "rank", value=10**30), "layer 2: .*rank is 1000"),
    "rank true": (edit("0", "rank", value=True), "layer 0: .*rank is True"),
    "rank a float": (edit("0", "rank", value=4.0), "layer 0: .*rank is 4.0"),
    "rank text": (edit("0", "rank", value="break-even"), "layer 0: .*rank is 'break-even'"),
    "rank missing": (drop("0", "rank"), "layer 0: .*rank is None"),
    "rank other than the tensors": (edit("2", "rank", value=5), r"2.down is F32 \[6, 32\], expected F32 \[5, 32\]"),
    "bits 16": (edit("0", "bits", value=16), "layer 0: .*bits is 16"),
    "bits other than the tensors": (edit("2", "bits", value=8), "layer 2: .*settings"),
    "activation_bits 6": (edit("0", "activation_bits", value=6), "layer 0: .*activation_bits is 6"),
    "activation_bits beside floats": (edit("2", "activation_bits", value=7), "layer 2: .*settings"),
    "activation_bits missing": (drop("0", "activation_bits"), "layer 0: .*settings"),
    "something unknown": (edit("0", "code", value="import os"), "layer 0: .*settings"),
    "no residual": (drop("0", "residual"), "the model has no tensor '0.residual_weight'"),
    "residual null": (nested(None), "layer 0: .*residual is None, expected a dictionary"),
    "residual a name": (nested("int8"), "layer 0: .*residual is 'int8', expected a dictionary"),
    "residual a list": (nested([1]), r"layer 0: .*residual is \[1\], expected a dictionary"),
    "residual empty": (nested({}), "layer 0: .*method is None, expected one of"),
    "residual unknown": (nested({"method": "os.system"}), "layer 0: .*method is 'os.system', expected one of"),
    "residual of a list": (nested({"method": ["int8"]}), r"layer 0: .*method is \['int8'\], expected one of"),
    "a residual's residual": (nested(DEEP), "layer 0: .*method is 'low_rank', expected one of"),
    "a residual in a residual": (edit("2", "residual", "residual", value={"method": "dense"}), "layer 2: .*settings"),
    "dense with settings": (nested({"method": "dense", "bits": 32}), "layer 0: .*settings"),
    "another residual": (nested({"method": "dense"}), r"0.residual_weight is I8 \[32, 16\], expected F32"),
    "residual without bits": (nested({"method": "int8"}), "layer 0: .*activation_bits is None"),
    "the residual's bits": (edit("0", "residual", "activation_bits", value=9), "layer 0: .*activation_bits is 9"),
    "the residual's nnz": (edit("2", "residual", "nnz", value=191), r"2.residual_weight_values is F32 \[192\]"),
    "int4 of another group": (nested({**FOUR, "group": 48}), "layer 0: .*group is 48, expected one of 32, 64, 128"),
    "int4 of integers": (nested(FOUR), r"0.residual_weight is I8 \[32, 16\], expected U8 \[32, 8\]"),
    "nnz beyond the weight": (edit("2", "residual", "nnz", value=769), "layer 2: .*nnz is 769"),
    "the other residual": (nested(SPARSE), "the tensor 0.residual_weight_mask is missing"),
    "method int8": (edit("0", "method", value="int8"), "layer 0: .*weight_bits is None|layer 0: .*settings"),
    "method dense": (edit("0", "method", value="dense"), "method is 'dense', expected 'int4' or 'int8' or 'low_rank' or 'sparse'"),
    "shape transposed": (edit("0", "shape", value=[16, 32]), r"\[32, 16\].*in the model, \[16, 32\]"),
    "shape huge": (edit("0", "shape", value=[2**70, 2**70]), "load: "),
    "an embedding": (edit("2", "embedding", value=True), "layer 2: embedding is True, bias True"),
    "no embedding": (edit("2", "embedding", value=False), "layer 2: embedding is False"),
    "a convolution": (edit("2", "conv2d", value=[]), "layer 2: conv2d is "),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_hostile_plans(case: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed())
    change, message = PLANS[case]
    change(plan)
    write(path, tensors, plan)
    refused(path, message, snapshot)


def test_deeply_nested_settings(path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed())
    plan["layers"]["0"]["residual"] = None
    text = json.dumps(plan).replace("null", '{"residual":' * 100_000 + "1" + "}" * 100_000, 1)
    save_file(tensors, path, metadata={"pycompress": text})
    refused(path, "its plan is not JSON", snapshot)


def patch(name: str, index: int, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[index] = value

    return change


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def remove(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


NAN, INF = float("nan"), float("inf")
TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "NaN in down": (patch("2.down", 5, NAN), "layer 2: .*down holds NaN or Inf"),
    "Inf in up": (patch("2.up", 5, INF), "layer 2: .*up holds NaN or Inf"),
    "-128 in up": (patch("0.up", 5, -128), "layer 0: .*up holds -128"),
    "a scale of zero": (patch("0.up_scale", 5, 0.0), "layer 0: .*up_scale is not a positive finite number"),
    "a scale of NaN": (patch("0.down_scale", 3, NAN), "layer 0: .*down_scale is not a positive finite number"),
    "a residual's scale of Inf": (patch("0.residual_weight_scale", 3, INF), "layer 0: .*scale is not a positive"),
    "-128 in the residual": (patch("0.residual_weight", 3, -128), "layer 0: .*-128"),
    "zero in the residual": (patch("2.residual_weight_values", 3, 0), "layer 2: .*1 of the values are zero"),
    "bits of the residual": (put("2.residual_weight_mask", torch.zeros_like), "layer 2: .*the mask has 0 bits set"),
    "down too narrow": (put("2.down", lambda t: t[:, 1:]), r"2.down is F32 \[6, 31\], expected F32 \[6, 32\]"),
    "down of another rank": (put("2.down", lambda t: t[1:]), r"2.down is F32 \[5, 32\], expected F32 \[6, 32\]"),
    "up turned": (put("0.up", lambda t: t.T), r"0.up is I8 \[4, 32\], expected I8 \[32, 4\]"),
    "up in float64": (put("2.up", lambda t: t.double()), "2.up is F64"),
    "down in int8": (put("2.down", lambda t: t.to(torch.int8)), "2.down is I8"),
    "a residual of another shape": (put("0.residual_weight", lambda t: t[1:]), r"0.residual_weight is I8 \[31, 16\]"),
    "down missing": (remove("0.down"), "the tensor 0.down is missing"),
    "up missing": (remove("2.up"), "the tensor 2.up is missing"),
    "scale missing": (remove("0.down_scale"), "the tensor 0.down_scale is missing"),
    "residual missing": (remove("0.residual_weight"), "the tensor 0.residual_weight is missing"),
    "mask missing": (remove("2.residual_weight_mask"), "the tensor 2.residual_weight_mask is missing"),
    "the residual's scale missing": (remove("0.residual_weight_scale"), "0.residual_weight_scale is missing"),
    "a scale beside floats": (lambda t: t.update({"2.up_scale": torch.ones(24)}), "no tensor '2.up_scale'"),
    "another residual, too": (
        lambda t: t.update({"2.residual_weight": torch.ones(24, 32)}), "no tensor '2.residual_weight'",
    ),
    "a dense weight, too": (lambda t: t.update({"0.weight": torch.ones(32, 16)}), "no tensor '0.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_hostile_tensors(case: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed())
    change, message = TENSORS[case]
    change(tensors)
    write(path, tensors, plan)
    refused(path, message, snapshot)


INT4: dict[str, tuple[Callable[[Tensors, Plan], object], str]] = {
    "activations of 16 bits": (
        lambda _, plan: edit("0", "residual", "activation_bits", value=16)(plan),
        "layer 0: .*the residual's activation_bits is 16, expected 8",
    ),
    "without zero points": (
        lambda _, plan: edit("0", "residual", "symmetric", value=True)(plan), "no tensor '0.residual_group_zero_point'",
    ),
    "larger groups": (
        lambda _, plan: edit("2", "residual", "group", value=64)(plan), r"residual_group_scale is BF16 \[24, 2\]",
    ),
    "a scale of zero": (
        lambda tensors, _: patch("2.residual_group_scale", 3, 0.0)(tensors), "layer 2: .*a scale is not between",
    ),
    "scales in float32": (
        lambda tensors, _: put("0.residual_group_scale", lambda t: t.float())(tensors), "residual_group_scale is F32",
    ),
    "no scale": (
        lambda tensors, _: remove("0.residual_group_scale")(tensors), "the tensor 0.residual_group_scale is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INT4)
def test_hostile_residuals_in_int4(case: str, path: Path, snapshot: Snapshot) -> None:
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(48, 24))
    model = pc.compress(dense, low_rank(4, residual=Int4()))
    tensors, plan = pieces(path, model)
    change, message = INT4[case]
    change(tensors, plan)
    write(path, tensors, plan)
    refused(path, message, snapshot, dense, model)


def test_layers_of_another_kind(path: Path, snapshot: Snapshot) -> None:
    """An entry for a place where something else stands, and embeddings that are none."""
    model = pc.compress(images(), low_rank(4, embeddings=True))
    tensors, plan = pieces(path, model)
    scaled = images()
    scaled.tokens = nn.Embedding(40, 16, padding_idx=3, max_norm=1.0)
    write(path, tensors, plan)
    refused(path, "tokens is a Embedding in the model: max_norm is 1.0", snapshot, scaled)
    for name, message in (("conv", "a Conv2d"), ("tokens", "an Embedding"), ("head", "a linear layer")):
        for other in {"conv", "tokens", "head"} - {name}:
            moved = copy.deepcopy(plan)
            moved["layers"][other] = moved["layers"][name]
            write(path, tensors, moved)
            refused(path, f"{other} is a .* in the model, expected {message}", snapshot, images(), copy.deepcopy(model))
    for change, message in (
        ({"embedding": 1}, "embedding is 1, bias False"),
        ({"bias": True}, "bias True"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"residual": {"method": "dense"}}, "the tensor tokens.residual_weight is missing"),
        ({"method": "sparse"}, "method is 'sparse', expected 'low_rank'"),
        ({"shape": [41, 16]}, r"tokens is \[40, 16\] with bias=False in the model, \[41, 16\]"),
    ):
        changed = copy.deepcopy(plan)
        changed["layers"]["tokens"].update(change)
        write(path, tensors, changed)
        refused(path, message, snapshot, images())
    plan["layers"]["tokens"]["residual"] = {"method": "dense"}
    write(path, {**tensors, "tokens.residual_weight": torch.ones(40, 16)}, plan)
    refused(path, "layer tokens: LowRankEmbedding: the weight has a residual", snapshot, images())


def test_flipped_bytes_give_an_error_or_a_whole_model(path: Path) -> None:
    """Bits that flip in a number cannot be told from another number; anything else has to be noticed."""
    pieces(path, compressed())
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    generator = torch.Generator().manual_seed(5)
    refusals = 0
    for _ in range(150):
        position = int(torch.randint(0, 8 + header + 64, (1,), generator=generator))
        broken = bytearray(whole)
        broken[position] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        path.write_bytes(broken)
        model = net()
        before = copy.deepcopy(model)
        try:
            pc.load(model, path)
        except ValueError:
            refusals += 1
            assert equal_states(model, before)
        else:
            assert set(compressed_layers(model)) == {"0", "2"}
            assert model(torch.randn(2, 16)).shape == (2, 8)
    assert refusals > 75
