"""save() and load() of whole models, and what is particular of some weights: contract/test_storage.py has what holds of all."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stored import Plan, Snapshot, Tensors, drop, edit, equal_states, pieces, put, refused, remove, write
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods import Int4, Int8, LowRank, Sparse
from pycompress.methods.method import Method
from pycompress.nn import LAYERS, Int8Linear, LowRankConv2d, LowRankEmbedding, SparseConv2d, SparseLinear

Build = Callable[..., nn.Module]
Python = Callable[..., subprocess.CompletedProcess[str]]
Same = Callable[[Tensor, Tensor], bool]

INT8 = pc.Int8()


def low_rank(rank: int, bits: int = 32, residual: Method | None = None, **options: Any) -> LowRank:
    return LowRank(rank, bits=bits, residual=residual, rank_guard=False, **options)


def net() -> nn.Sequential:
    """Two layers "0" and "2", an embedding-like buffer, a dense layer "4"."""
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 8)
    )  # fmt: skip
    model.register_buffer("table", torch.randn(3, 4))
    return model.eval()


def compressed(first: Method = INT8, second: Method | None = None) -> nn.Sequential:
    return pc.compress(net(), {"0": first, "2": second or Int8(7, 7), "4": None})


def images(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    layers = {
        "tokens": nn.Embedding(40, 16, padding_idx=3),
        "conv": nn.Conv2d(4, 8, 3, padding=1),
        "head": nn.Linear(16, 5),
    }
    return nn.ModuleDict(layers).to(dtype).eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# --- there and back -----------------------------------------------------------------------------------------------------

MIXED = [
    (Sparse(0.5), INT8), (Int4(activation_bits=16), low_rank(5, 8, Int8())), (Sparse(0.2, scope="model"),) * 2,
    (Sparse(1.0, "64x64"), low_rank(5, residual=Sparse(0.3))),
]  # fmt: skip


@pytest.mark.parametrize("methods", MIXED, ids=repr)
def test_several_layers(methods: tuple[Method, Method], path: Path, same: Same) -> None:
    model, x = compressed(*methods), torch.randn(5, 16)
    pc.save(model, path)
    for place in (net(), compressed(Sparse(0.9), low_rank(2))):
        loaded = pc.load(place, path)
        assert equal_states(loaded, model) and repr(loaded) == repr(model)
        assert (loaded[0].activation, type(loaded[1]), loaded[2].activation) == ("relu", nn.Identity, "none")
        assert same(loaded(x), model(x))
        assert pc.summary(loaded).bytes == pc.summary(model).bytes


def test_the_plan_of_each_weight(path: Path) -> None:
    """As it has stood in files since version 4 of the plan, 2 of the weights: whoever changes this changes the version."""
    model = nn.ModuleDict({
        "int8": nn.Linear(16, 8), "int4": nn.Linear(67, 8), "symmetric": nn.Linear(32, 8), "sparse": nn.Linear(16, 32),
        "sparse8": nn.Linear(16, 8), "low_rank": nn.Linear(16, 32), "residual": nn.Linear(32, 24),
        "conv": nn.Conv2d(8, 8, (4, 2), padding="same", dilation=(1, 3), bias=False), "tokens": nn.Embedding(40, 16),
    })  # fmt: skip
    methods = {
        "int8": INT8, "int4": Int4(), "symmetric": Int4(64, symmetric=True), "sparse": Sparse(0.25),
        "sparse8": Sparse(0.5, bits=8), "low_rank": low_rank(4, 8, INT8), "residual": low_rank(6, residual=Sparse(0.25)),
        "conv": Sparse(0.4), "tokens": low_rank(3, embeddings=True),
    }  # fmt: skip
    made = pc.compress(model, methods)
    tensors, plan = pieces(path, made)
    assert plan.keys() == {
        "version",
        "layers",
        "dense",
        "activations",
        "identities",
        "norms",
        "folded",
        "buffers",
        "aliases",
    }
    assert (plan["version"], plan["identities"], plan["aliases"], plan["buffers"]) == (4, [], {}, [])
    assert (plan["activations"], plan["dense"], plan["norms"], plan["folded"]) == ({}, {}, {}, {})
    eight = {"activation_bits": 8, "weight_bits": 8}
    geometry = {"kernel_size": [4, 2], "stride": [1, 1], "padding": "same", "dilation": [1, 3]}
    expected = {
        "int8": ("int8", [8, 16], eight),
        "int4": ("int4", [8, 67], {"group": 32, "symmetric": False, "activation_bits": 8}),
        "symmetric": ("int4", [8, 32], {"group": 64, "symmetric": True, "activation_bits": 8}),
        "sparse": ("sparse", [32, 16], {"bits": 32, "nnz": 128}),
        "sparse8": ("sparse", [8, 16], {"bits": 8, "nnz": made.sparse8.nnz, "activation_bits": 7}),
        "low_rank": (
            "low_rank", [32, 16],
            {"rank": 4, "bits": 8, "activation_bits": 7, "residual": {"method": "int8", "version": 2, **eight}},
        ),
        "residual": ("low_rank", [24, 32], {"rank": 6, "bits": 32, "residual": {**SPARSE, "bits": 32, "nnz": 192}}),
        "conv": ("sparse", [8, 64], {"bits": 32, "nnz": made.conv.nnz}),
        "tokens": ("low_rank", [40, 16], {"rank": 3, "bits": 32}),
    }  # fmt: skip
    kinds = {
        "conv": {"kind": "conv2d", "geometry": geometry},
        "tokens": {"kind": "embedding", "geometry": {"padding_idx": None}},
    }
    assert plan["layers"] == {
        name: {
            "weight": weight, "shape": shape, "settings": settings, "version": 2, "activation": "none",
            "bias": name not in kinds, **kinds.get(name, {"kind": "linear"}),
        }
        for name, (weight, shape, settings) in expected.items()
    }  # fmt: skip
    weights = {name: getattr(made, name).canonical() for name in expected}
    for name, tensor in (
        ("int8.int8_values", weights["int8"].values),
        ("int4.int4_values", weights["int4"].values),
        ("int4.int4_scale", weights["int4"].scale),
        ("int4.int4_zero_point", weights["int4"].zero_point),
        ("sparse.sparse_values", weights["sparse"].values),
        ("low_rank.low_rank_residual_int8_values", weights["low_rank"].residual.values),
        ("residual.low_rank_residual_sparse_mask", weights["residual"].residual.mask),
    ):
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
    assert (tensors["int8.int8_values"].dtype, tensors["int4.int4_scale"].dtype) == (torch.int8, torch.bfloat16)
    assert tensors["int4.int4_values"].shape == (8, 34) and "symmetric.int4_zero_point" not in tensors


@pytest.mark.parametrize("kind", [str, Path])
def test_kinds_of_paths(kind: Callable[[Path], Any], path: Path) -> None:
    pc.save(compressed(), kind(path))
    pc.load(net(), kind(path))


def test_not_a_path() -> None:
    with pytest.raises((TypeError, ValueError)):
        pc.load(net(), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_keeps_what_the_model_says(dtype: torch.dtype, path: Path, same: Same) -> None:
    method = low_rank(4, embeddings=True)
    model, tokens = pc.compress(images(dtype), method), torch.randint(40, (2, 7))
    pc.save(model, path)
    for target in (images(dtype), pc.compress(images(dtype), low_rank(2, embeddings=True))):
        loaded = pc.load(target, path)
        assert (type(loaded.tokens), type(loaded.conv)) == (LowRankEmbedding, LowRankConv2d)
        assert (loaded.tokens.padding_idx, loaded.tokens.dtype) == (3, dtype)
        assert same(loaded.tokens(tokens), model.tokens(tokens))


@pytest.mark.parametrize("meta", [False, True])
def test_a_head_tied_to_an_embedding(meta: bool, lookup: Build, path: Path, same: Same) -> None:
    model = pc.compress(lookup(tied=True), INT8)
    pc.save(model, path)
    with torch.device("meta" if meta else "cpu"):
        target = lookup(tied=True)
    loaded = pc.load(target, path)
    tokens = torch.randint(50, (2, 7))
    assert same(loaded(tokens), model(tokens))
    assert loaded.head.weight is loaded.embedding.weight  # type: ignore[union-attr]


def test_buffers_that_overlap(path: Path) -> None:
    """A buffer that is a view of another: stored, and loaded with its values."""

    def build() -> nn.Sequential:
        model = net()
        model.register_buffer("rows", model.table[:2])
        return model

    model = pc.compress(build(), INT8)
    pc.save(model, path)
    assert equal_states(pc.load(build(), path), model)


def test_an_encoder_runs_after_loading(path: Path) -> None:
    """Loaded layers must switch torch's fast path off, too."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        return nn.TransformerEncoder(layer, 1).eval()

    model = pc.compress(build(), INT8)
    pc.save(model, path)
    loaded = pc.load(build(), path)
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x))


def test_the_summary_of_a_loaded_model(path: Path) -> None:
    pc.save(compressed(), path)
    loaded = pc.load(net(), path)
    assert [record.name for record in pc.summary(loaded).layers] == ["0", "2"]
    recompressed = pc.load(compressed(), path)
    assert {record.name for record in pc.summary(recompressed).layers if record.method} == {"0", "2"}
    assert {record.error for record in pc.summary(recompressed).layers} == {None}, (
        "what it was belonged to other weights"
    )
    pc.save(pc.compress(images(), {"conv": Sparse(0.4), "*": None}), path)
    (record,) = pc.summary(pc.load(images(), path)).layers
    assert (record.kind, record.shape) == ("Conv2d", (8, 4, 3, 3))


def test_the_size_of_the_file(path: Path) -> None:
    """Of int8 a quarter; of int4 4 bits a weight, a bfloat16 scale and 4 bits of zero point for each 32 of them."""
    dense = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 512))
    pc.save(pc.compress(dense, Int8(activation_bits=7)), path)
    assert path.stat().st_size <= 0.27 * sum(p.numel() * 4 for p in dense.parameters())
    pc.save(pc.compress(nn.Sequential(nn.Linear(1024, 512, bias=False)), Int4()), path)
    assert 0 <= path.stat().st_size - 1024 * 512 * (4 + 20 / 32) / 8 < 1024


def test_a_file_for_another_processor(path: Path, tmp_path: Path, python: Python) -> None:
    torch.manual_seed(1)
    model = compressed()
    x = torch.randn(7, 16)
    pc.save(model, path)
    torch.save((x, model(x).detach(), model[0].weight), tmp_path / "expected.pt")
    code = """
import sys, torch
from torch import nn
import pycompress as pc
from pycompress import ops
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 8))
model.register_buffer("table", torch.zeros(3, 4))
pc.load(model, sys.argv[1])
x, y, weight = torch.load(sys.argv[2])
assert torch.equal(model[0].weight, weight)
# The layers to the bit; what torch computes behind them may round otherwise in another process.
torch.testing.assert_close(model(x), y)
y = torch.load(sys.argv[3])
assert torch.equal(model[:3](x), y)
print(next(kernel["name"] for kernel in ops.kernels() if kernel["available"]))
"""
    torch.save(model[:3](x), tmp_path / "layers.pt")
    result = python(code, path, tmp_path / "expected.pt", tmp_path / "layers.pt", PYCOMPRESS_ISA="scalar")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in {"scalar_4x8", "numba"}


# --- what cannot be saved -----------------------------------------------------------------------------------------------


def test_a_dense_model_is_not_saved(path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no compressed layer"):
        pc.save(net(), path)
    assert not path.exists()


def test_extra_state_is_not_saved(path: Path) -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    model = nn.Sequential(Int8Linear.from_dense(nn.Linear(4, 4)), Extra())
    with pytest.raises(TypeError, match=r"holds 1\._extra_state of type dict, expected tensors only"):
        pc.save(model, path)
    assert not path.exists()


# --- files that are none ------------------------------------------------------------------------------------------------


def test_no_such_file(path: Path, snapshot: Snapshot) -> None:
    model = net()
    unchanged = snapshot(model)
    with pytest.raises(FileNotFoundError):
        pc.load(model, path)
    assert unchanged()


def test_a_directory(tmp_path: Path, snapshot: Snapshot) -> None:
    refused(tmp_path, "load: ", snapshot, net(), compressed())


def test_a_file_of_another_program(path: Path, snapshot: Snapshot) -> None:
    save_file(net().state_dict(), path)
    message = "no pycompress plan in its metadata, expected a file that pycompress.save wrote"
    refused(path, message, snapshot, net(), compressed())
    save_file(net().state_dict(), path, metadata={"format": "pt"})
    refused(path, "no pycompress plan", snapshot, net(), compressed())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its plan is not JSON"),
        ("{", "its plan is not JSON"),
        ("nonsense", "its plan is not JSON"),
        ("[" * 100_000, "its plan is not JSON"),
        ('{"a":' * 100_000, "its plan is not JSON"),
        ("9" * 10_000, "load: "),
        ("null", "version None"),
        ("[]", "version None"),
        ("{}", "version None"),
        ('{"version": 1}', "no layers"),
        ('{"version": 2}', "no layers"),
        ('{"version": NaN}', "version nan"),
    ],
)
def test_plans_that_are_none(text: str, message: str, path: Path, snapshot: Snapshot) -> None:
    tensors, _ = pieces(path, compressed())
    write(path, tensors, text)
    refused(path, message, snapshot, net(), compressed())


def test_deeply_nested_settings(path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed(low_rank(4, 8, INT8)))
    plan["layers"]["0"]["settings"]["residual"] = None
    text = json.dumps(plan).replace("null", '{"residual":' * 100_000 + "1" + "}" * 100_000, 1)
    write(path, tensors, text)
    refused(path, "its plan is not JSON", snapshot, net(), compressed())


@pytest.mark.parametrize("version", [0, 5, 99, -1, "1", None, [1], True, 1.0])
def test_unknown_versions(version: Any, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed())
    write(path, tensors, {**plan, "version": version})
    refused(path, "its plan has version .*, expected 1 to 4", snapshot, net(), compressed())


def of_version_1(tensors: Tensors, plan: Plan) -> tuple[Tensors, Plan]:
    """A file of int8 and int4 layers as version 1 wrote it."""
    layers = {}
    for name, entry in plan["layers"].items():
        common = {key: entry[key] for key in ("shape", "bias", "activation")}
        layers[name] = {"method": entry["weight"], **common, **entry["settings"]}
        for part, stored in LAYERS["linear", entry["weight"]].weight_type.older[1].items():
            present = f"{name}.{entry['weight']}_{part}"
            tensors = {f"{name}.{stored}" if key == present else key: tensor for key, tensor in tensors.items()}
    return tensors, {**plan, "version": 1, "layers": layers}


def test_a_plan_of_version_1(path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed())
    write(path, *of_version_1(tensors, plan))
    found = pc.load(net(), path).state_dict()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    for change, message in (
        ({"method": None}, "layer 0: weight is None, expected 'int4'"),
        ({"method": ["int8"]}, "layer 0: weight is "),
        ({"activation_bits": 9}, "layer 0: .*activation_bits is 9"),
        ({"code": "import os"}, "layer 0: .*settings"),
        ({"settings": {}}, "layer 0: .*settings"),
        ({"embedding": True}, "layer 0: bias is True, expected false"),
        ({"embedding": 1}, "layer 0: .*settings"),
        ({"conv2d": {}}, "0 is a (Int8)?Linear in the model, expected a Conv2d"),
        ({"shape": None}, "layer 0: shape is None"),
    ):
        own, old = of_version_1(tensors, plan)
        old["layers"]["0"].update(change)
        write(path, own, old)
        refused(path, message, snapshot, net(), compressed())


# --- plans and tensors that do not fit the model ------------------------------------------------------------------------

PLANS: dict[str, tuple[Callable[[Plan], object], str]] = {
    "layers a list": (edit("layers", value=[]), "no layers"),
    "layers null": (edit("layers", value=None), "no layers"),
    "a layer null": (edit("layers", "0", value=None), "no layers"),
    "a layer a number": (edit("layers", "0", value=3), "no layers"),
    "aliases missing": (drop("aliases"), "no aliases"),
    "aliases a list": (edit("aliases", value=["0"]), "no aliases"),
    "an alias to a number": (edit("aliases", value={"0.int8_values": 3}), "no aliases"),
    "an alias to nothing": (edit("aliases", value={"x": "nowhere"}), "alias 'x' stands for 'nowhere'"),
    "an alias to itself": (edit("aliases", value={"x": "x"}), "alias 'x' stands for 'x'"),
    "an alias over a tensor": (edit("aliases", value={"0.int8_values": "3.weight"}), "alias '0.int8_values'"),
    "an alias that the model lacks": (edit("aliases", value={"x": "0.int8_values"}), "the model has no tensor 'x'"),
    "identities missing": (drop("identities"), "no identities"),
    "identities a number": (edit("identities", value=1), "no identities"),
    "an identity a number": (edit("identities", value=[1]), "no identities"),
    "an identity nowhere": (edit("identities", value=["9"]), "the model has no module '9'"),
    "an identity in the place of the model": (edit("identities", value=[""]), "load: "),
    "an identity in the place of a dense layer": (edit("identities", value=["1", "4"]), "load: "),
    "an identity in the place of an int8 layer": (edit("identities", value=["1", "0"]), "load: "),
    "an identity in the place of a norm": (edit("identities", value=["1", "3"]), "load: "),
    "the other layer": (lambda plan: plan["layers"].update({"0": plan["layers"]["2"]}), "load: "),
    "a layer that the model lacks": (edit("layers", "7", value=None), "load: "),
    "one layer too few": (drop("layers", "0"), "load: "),
    "no layer": (edit("layers", value={}), "load: "),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_hostile_plans(case: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed())
    change, message = PLANS[case]
    change(plan)
    write(path, tensors, plan)
    refused(path, message, snapshot, net(), compressed())


@pytest.mark.parametrize("name", ["1", "3", "7", "nowhere.deep", "", "0.weight", "..", "0.", "__class__", "forward"])
def test_layers_that_the_model_does_not_have(name: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed())
    plan["layers"][name] = plan["layers"]["0"]
    write(path, tensors, plan)
    message = "is a .* in the model, expected a linear layer" if name in ("1", "3") else "load: "
    refused(path, message, snapshot, net(), compressed())


def test_a_compressed_layer_that_is_dense_in_the_file(path: Path, snapshot: Snapshot) -> None:
    pc.save(compressed(), path)
    refused(path, "the model's layer 4 is compressed, in the file it is dense", snapshot, pc.compress(net(), INT8))


TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "dense weight of another shape": (put("4.weight", lambda t: t[:, :-1]), "4.weight is F32"),
    "dense weight of integers": (put("4.weight", lambda t: t.to(torch.int32)), "4.weight is I32"),
    "dense weight of booleans": (put("4.weight", lambda t: t > 0), "4.weight is BOOL"),
    "norm of another shape": (put("3.weight", lambda t: t[None]), "3.weight is F32"),
    "buffer of another shape": (put("table", lambda t: t[:2]), "table is F32"),
    "dense weight missing": (remove("4.weight"), "4.weight is missing"),
    "buffer missing": (remove("table"), "table is missing"),
    "one that the model lacks": (lambda t: t.update({"9.weight": torch.zeros(3)}), "the model has no tensor '9.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_hostile_tensors_of_dense_layers(case: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed())
    change, message = TENSORS[case]
    change(tensors)
    write(path, tensors, plan)
    refused(path, message, snapshot, net(), compressed())


def test_an_alias_may_not_give_one_weight_to_layers_of_different_bits(path: Path) -> None:
    """They would run with one packed weight, which knows one range of activations."""

    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
        model[1].weight = model[0].weight
        return model

    tensors, plan = pieces(path, pc.compress(tied(), INT8))
    plan["layers"]["1"]["settings"]["activation_bits"] = 7
    write(path, tensors, plan)
    try:
        loaded = pc.load(tied(), path)
    except ValueError:
        return
    assert loaded[1].packed is not loaded[0].packed


# --- residuals ----------------------------------------------------------------------------------------------------------

FOUR = {"method": "int4", "version": 2, "group": 32, "symmetric": True, "activation_bits": 8}
DEEP: dict[str, Any] = {"method": "low_rank", "rank": 2, "bits": 32, "residual": {"method": "dense", "version": 2}}
SPARSE = {"method": "sparse", "version": 2, "bits": 32, "nnz": 192}
RESIDUALS: list[tuple[str, Any, str]] = [
    ("0", {}, "layer 0: .*method is None, expected one of"),
    ("0", DEEP, "layer 0: .*method is 'low_rank', expected one of"),
    ("2", {**SPARSE, "residual": {"method": "dense"}}, "layer 2: .*settings"),
    ("0", {"method": "dense", "bits": 32}, "layer 0: .*settings"),
    ("0", {"method": "dense", "version": 2}, "the tensor 0.low_rank_residual_dense_weight is missing"),
    ("0", {"method": "int8"}, "layer 0: .*activation_bits is None"),
    ("0", {**FOUR, "group": 48}, "layer 0: .*group is 48, expected 32, 64 or 128"),
    ("0", FOUR, "the tensor 0.low_rank_residual_int4_values is missing"),
    ("2", {**SPARSE, "nnz": 769}, "layer 2: .*nnz is 769"),
    ("0", SPARSE, "the tensor 0.low_rank_residual_sparse_mask is missing"),
]


@pytest.mark.parametrize(("layer", "residual", "message"), RESIDUALS)
def test_hostile_residuals(layer: str, residual: Any, message: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed(low_rank(4, 8, INT8), low_rank(6, residual=Sparse(0.25))))
    plan["layers"][layer]["settings"]["residual"] = residual
    write(path, tensors, plan)
    refused(path, message, snapshot, net(), compressed())


# --- embeddings, and layers of several kinds ----------------------------------------------------------------------------


def test_entries_for_layers_of_another_kind(path: Path, snapshot: Snapshot) -> None:
    model = pc.compress(images(), low_rank(4, embeddings=True))
    tensors, plan = pieces(path, model)
    scaled = images()
    scaled.tokens = nn.Embedding(40, 16, padding_idx=3, max_norm=1.0)
    refused(path, "tokens is a Embedding in the model: max_norm is 1.0", snapshot, scaled)
    for name, message in (("conv", "a Conv2d"), ("tokens", "an Embedding"), ("head", "a linear layer")):
        for other in {"conv", "tokens", "head"} - {name}:
            moved = copy.deepcopy(plan)
            moved["layers"][other] = moved["layers"][name]
            write(path, tensors, moved)
            refused(path, f"{other} is a .* in the model, expected {message}", snapshot, images(), copy.deepcopy(model))
    settings = plan["layers"]["tokens"]["settings"]
    for change, message in (
        ({"geometry": {}}, r"the settings are \[\], expected \['padding_idx'\]"),
        ({"geometry": {"padding_idx": 3, "code": 1}}, r"the settings are .*'code'\], expected \['padding_idx'\]"),
        ({"geometry": {"padding_idx": -1}}, "padding_idx is -1, expected None or a number from 0"),
        ({"geometry": {"padding_idx": True}}, "padding_idx is True"),
        ({"geometry": {"padding_idx": 2}}, "tokens is .*padding_idx=3 in the model, .*padding_idx=2 in the file"),
        ({"geometry": {"padding_idx": None}}, "tokens is .*padding_idx=3 in the model, .*padding_idx=None in the file"),
        ({"settings": {**settings, "residual": {"method": "dense"}}}, "layer tokens: the weight has a residual"),
        ({"kind": "linear", "geometry": None}, "expected a linear layer"),
    ):
        changed = copy.deepcopy(plan)
        changed["layers"]["tokens"].update(change)
        write(path, tensors, changed)
        refused(path, message, snapshot, images())
    settings["residual"] = {"method": "dense", "version": 2}
    write(path, {**tensors, "tokens.low_rank_residual_dense_weight": torch.ones(40, 16)}, plan)
    refused(path, "layer tokens: the weight has a residual", snapshot, images())


# --- convolutions -------------------------------------------------------------------------------------------------------

CONVOLUTIONS = pytest.mark.parametrize("method", [Sparse(0.5), low_rank(3)], ids=["sparse", "low_rank"])


def conv(method: Method | None = None, *arguments: Any, **options: Any) -> nn.Sequential:
    dense = nn.Sequential(nn.Conv2d(*(arguments or (5, 8, 3, 1, 1)), **options))
    return dense if method is None else pc.compress(dense, method)


@CONVOLUTIONS
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            nn.Conv2d(5, 8, 3),
            r"0 is \[8, 45\] .*padding=\(0, 0\).* in the model, \[8, 45\] .*padding=\(1, 1\).* in the file",
        ),
        (nn.Conv2d(5, 8, 3, 2, 1), r"stride=\(2, 2\).* in the model, .*stride=\(1, 1\).* in the file"),
        (nn.Conv2d(5, 8, 3, 1, 1, 2), r"dilation=\(2, 2\).* in the model"),
        (nn.Conv2d(5, 8, (9, 1), 1, 1), r"kernel_size=\(9, 1\).* in the model"),
        (nn.Conv2d(45, 8, 1, 1, 1), r"in_channels=45.* in the model"),
        (nn.Conv2d(20, 8, 3, 1, 1, groups=4), "groups=4 in the model"),
        (nn.Conv2d(5, 8, 3, 1, 1, padding_mode="reflect"), "padding_mode=reflect in the model"),
        (nn.Linear(45, 8), "0 is a (Int8)?Linear in the model, expected a Conv2d"),
        (SparseLinear.from_dense(nn.Linear(45, 8)), "SparseLinear in the model, expected a Conv2d"),
        (SparseConv2d.from_dense(nn.Conv2d(5, 8, 3)), r"padding=\(0, 0\).* in the model"),
    ],
)
def test_models_with_another_convolution(
    method: Method, other: nn.Module, message: str, path: Path, snapshot: Snapshot
) -> None:
    pc.save(conv(method), path)
    refused(path, message, snapshot, nn.Sequential(other))


GEOMETRY = {"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
GEOMETRIES: list[tuple[Any, str]] = [
    ({**GEOMETRY, "groups": 3}, "groups is 3, expected 1: convolutions in groups have no kernel yet"),
    ({**GEOMETRY, "groups": True}, "the settings are .*'groups'"),
    ({**GEOMETRY, "groups": 2.0}, "groups is 2.0, expected a number from 1"),
    ({}, r"the settings are \[\], expected \['kernel_size', 'stride', 'padding', 'dilation'\]"),
    ({**GEOMETRY, "groups": 1}, "the settings are .*'groups'"),
    ({**GEOMETRY, "kernel_size": [2, 2]}, r"kernel_size is \(2, 2\), expected a divisor of k = 45"),
    ({**GEOMETRY, "kernel_size": [1, 1]}, "in_channels=45.* in the file"),
    ({**GEOMETRY, "kernel_size": [9, 1]}, "in the model"),
    ({**GEOMETRY, "kernel_size": [0, 3]}, r"kernel_size is \(0, 3\)"),
    ({**GEOMETRY, "kernel_size": [[3], 3]}, r"kernel_size is \(\[3\], 3\)"),
    ({**GEOMETRY, "kernel_size": 3}, "kernel_size is 3"),
    ({**GEOMETRY, "kernel_size": [True, 3]}, r"kernel_size is \(True, 3\)"),
    ({**GEOMETRY, "stride": [10**30, 1]}, "stride is"),
    ({**GEOMETRY, "stride": "same"}, "stride is 'same'"),
    ({**GEOMETRY, "padding": [-1, 1]}, r"padding is \(-1, 1\)"),
    ({**GEOMETRY, "padding": {"a": 1}}, "padding is {'a': 1}"),
    ({**GEOMETRY, "padding": "everything"}, "padding is 'everything'"),
    ({**GEOMETRY, "padding": "same"}, "padding=same.* in the file"),
    ({**GEOMETRY, "dilation": [2, 1]}, r"dilation=\(2, 1\).* in the file"),
    ({**GEOMETRY, "dilation": [1.5, 1]}, r"dilation is \(1.5, 1\)"),
]


@CONVOLUTIONS
def test_hostile_geometries(method: Method, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, conv(method))
    entry = plan["layers"]["0"]
    assert entry["geometry"] == GEOMETRY
    others: list[tuple[dict[str, Any], str]] = [
        ({"shape": [45, 8]}, "kernel_size is"),
        ({"kind": "linear"}, "layer 0: geometry is .*, expected none"),
        ({"kind": "linear", "geometry": None}, "expected a linear layer|layer 0: LowRankWeight: "),
    ]
    if isinstance(method, Sparse):
        int8 = {"bits": 8, "nnz": 3, "activation_bits": 7}
        others.append(({"settings": int8}, "the weight is int8, expected float32"))
    for change, message in [*(({"geometry": geometry}, message) for geometry, message in GEOMETRIES), *others]:
        write(path, tensors, {**plan, "layers": {"0": {**entry, **change}}})
        refused(path, message, snapshot, conv(), conv(method), what=change)
