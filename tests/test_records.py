"""summary(): every parameter and buffer is in it once, with its layer or a reason; what it says of a layer is true now."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn import CompressedLayer
from pycompress.nn.int8 import Int8Linear
from pycompress.records import Summary


class Experts(nn.Module):
    """Most of the weights of a mixture of experts lie in parameters of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.randn(4, 16, 8)), nn.Parameter(torch.randn(4, 8, 8))


class Everything(nn.Module):
    """One of each that has no compressed layer, beside one that has."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(8))
        self.layer, self.again = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norms = nn.Sequential(*(nn.LayerNorm(8) for _ in range(3)))
        self.experts, self.recurrent = nn.ModuleList([Experts(), Experts()]), nn.RNN(8, 8)
        self.attention, self.table = nn.MultiheadAttention(8, 2), nn.Embedding(5, 8)
        self.wide, self.batch = nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)
        self.positions = nn.Module()
        self.positions.register_buffer("ids", torch.arange(10), persistent=False)


def tied() -> nn.Module:
    model = Everything()
    model.again.weight = model.layer.weight
    model.token = nn.Parameter(model.token.detach())
    model.norms[1] = model.norms[0]
    model.positions.register_buffer("also", model.positions.ids)
    return model


def odd() -> nn.Module:
    model = Everything()
    model.register_buffer("sparse", torch.eye(8).to_sparse())
    model.register_buffer("rows", torch.eye(8).to_sparse_csr())
    model.register_buffer("columns", torch.eye(8).to_sparse_csc())
    model.register_buffer("float8", torch.ones(3).to(torch.float8_e4m3fn))
    model.register_buffer("complex", torch.ones(3, dtype=torch.complex64))
    return model.to(torch.float32)


def transformers_model(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers", reason="the extra pycompress[demo] is not installed")
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return made.eval()

    return make


MODELS: dict[str, Callable[[], nn.Module]] = {
    "everything": Everything,
    "tied": tied,
    "odd": odd,
    "torch's transformer": lambda: nn.Transformer(8, 2, 1, 1, 16),
    "T5": transformers_model("T5Config", "T5Model", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=20),
    "GPT-2": transformers_model("GPT2Config", "GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8),
    "Mixtral": transformers_model(
        "MixtralConfig", "MixtralModel", hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=20, num_local_experts=4,
    ),
    "BERT": transformers_model(
        "BertConfig", "BertModel", hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=20
    ),
}  # fmt: skip


def bytes_of(tensor: Tensor) -> int:
    parts = {
        torch.sparse_coo: lambda t: [t._values(), t._indices()],
        torch.sparse_csr: lambda t: [t.values(), t.crow_indices(), t.col_indices()],
        torch.sparse_csc: lambda t: [t.values(), t.ccol_indices(), t.row_indices()],
    }
    found = parts[tensor.layout](tensor) if tensor.layout in parts else [tensor]
    return sum(part.numel() * part.element_size() for part in found)


def whole(model: nn.Module) -> int:
    """All parameters and buffers, each once; packed weights as the file has them."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    packed = {id(m.packed): m for m in model.modules() if isinstance(m, CompressedLayer)}
    plain = sum(bytes_of(tensor) for key, tensor in tensors.items() if key not in packed)
    return plain + sum(layer.canonical_bytes() for layer in packed.values())


def every_tensor_is_in(found: Summary, model: nn.Module) -> None:
    rows = [*found.layers, *found.others]
    names = [record.name for record in rows]
    assert len(set(names)) == len(names)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert name.rpartition(".")[0] in names, name
        assert tensor is not None
    assert all(record.method or record.reason for record in rows), "each has its layer or the reason"
    assert found.bytes == sum(record.bytes for record in rows) == whole(model)
    assert found.dense_bytes == sum(record.dense_bytes for record in rows)


@pytest.mark.parametrize("kind", MODELS)
def test_everything_of_a_model_is_in_the_total(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    never = pc.summary(model)
    every_tensor_is_in(never, model)
    assert never.layers == []
    assert never.bytes == never.dense_bytes
    made = pc.compress(model, pc.Int8(), inplace=kind == "odd")  # (torch copies no CSR)
    found = pc.summary(made)
    every_tensor_is_in(found, made)
    assert found.dense_bytes == never.bytes, "the dense model is the one that was there"
    assert found.bytes < found.dense_bytes
    assert all(record.error is not None for record in found.layers if record.method)
    if kind != "odd":  # whose tensors a file may not hold
        pc.save(made, tmp_path / "model.safetensors")
        loaded = pc.load(MODELS[kind](), tmp_path / "model.safetensors")
        every_tensor_is_in(pc.summary(loaded), loaded)
        assert pc.summary(loaded).bytes == found.bytes


@pytest.mark.parametrize("kind", ["everything", "tied", "Mixtral"])
def test_on_the_meta_device(kind: str) -> None:
    with torch.device("meta"):
        model = MODELS[kind]()
    found = pc.summary(model)
    every_tensor_is_in(found, model)
    assert found.bytes == pc.summary(MODELS[kind]()).bytes


def test_the_reasons() -> None:
    model = Everything()
    model.lazy = nn.LazyLinear(4)
    made = pc.compress(model, {"layer": pc.Int8(), "attention.*": None})
    found = pc.summary(made)
    reasons = {record.name: record.reason for record in [*found.layers, *found.others]}
    assert reasons["layer"] == ""
    assert reasons["again"] == reasons["lazy"] == "no glob of the plan matches it"
    assert reasons["norms.0"] == "no compressed layer for LayerNorm"
    assert reasons["experts.0"] == "no compressed layer for Experts, with gate_up 4x16x8, down 4x8x8"
    assert reasons["recurrent"] == "no compressed layer for RNN"
    assert reasons["attention"] == "it reads its weights itself"
    assert reasons["attention.out_proj"] == "the plan keeps 'attention.*' dense"
    assert reasons["table"] == "no plan was for it"
    assert reasons["positions"] == "buffers only"
    assert reasons[""] == "no compressed layer for Everything"
    never = {record.name: record.reason for record in pc.summary(model).others}
    assert never["lazy"] == "its parameters are not initialized yet"
    assert never["layer"] == "no plan was for it"
    assert never["attention.out_proj"].endswith("is a subclass of Linear, which may do something else")


def test_the_table_is_short() -> None:
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(25)), nn.LayerNorm(9), nn.RNN(8, 8)
    )
    found = pc.summary(pc.compress(model, pc.Int8()))
    lines = str(found).splitlines()
    assert len(lines) == 1 + 25 + 2 + 1
    assert lines[26].split()[:3] == ["26", "LayerNorm", "dense"] and lines[26].endswith(
        "no compressed layer for LayerNorm"
    )
    assert f"{25 * 2 * 32 + 2 * 36:,}" in lines[26]
    assert lines[27].startswith("26  ") and lines[27].endswith("no compressed layer for RNN")
    assert len(found.others) == 27


# --- what is true now ---------------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 4))


def by_name(model: nn.Module) -> dict[str, Any]:
    found = pc.summary(model)
    return {record.name: record for record in [*found.layers, *found.others]}


def test_a_layer_that_was_put_back_or_removed_is_described_no_more() -> None:
    model = mlp()
    made = pc.compress(model, {"4": None, "*": pc.Int8()})
    made[0] = model[0]
    del made[2:4]  # and what was "4" is "2" now
    found = pc.summary(made)
    assert [record.name for record in found.layers] == ["2"]
    assert found.layers[0].reason == "the plan keeps '4' dense"
    assert by_name(made)["0"].reason == "no plan was for it"
    every_tensor_is_in(found, made)
    assert found.bytes == found.dense_bytes


def test_a_layer_that_was_replaced_by_hand_has_no_error_of_another() -> None:
    made = pc.compress(mlp(), pc.Int8())
    made[0] = Int8Linear.from_dense(nn.Linear(16, 24), pc.Int8(activation_bits=7))
    made[4] = nn.Linear(8, 40)
    records = by_name(made)
    assert (records["0"].method, records["0"].error) == ("int8", None)
    assert records["2"].error is not None
    assert (records["4"].method, records["4"].shape, records["4"].bytes) == (None, (40, 8), 4 * 360)


def test_other_weights_have_another_error() -> None:
    made, other = pc.compress(mlp(), pc.Int8()), pc.compress(mlp(), pc.Int8())
    expected = by_name(made)["0"].error
    made.load_state_dict(made.state_dict())
    assert by_name(made)["0"].error == expected
    made.load_state_dict(other.state_dict())
    assert {record.error for record in by_name(made).values()} == {None}
    assert pc.summary(made).dense_bytes == pc.summary(mlp()).bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_put_in_by_hand_has_the_bytes_of_its_dense_layer(dtype: torch.dtype) -> None:
    dense = nn.Sequential(nn.Linear(16, 8)).to(dtype)
    made = nn.Sequential(Int8Linear.from_dense(dense[0]))
    assert pc.summary(made).dense_bytes == pc.summary(dense).bytes


def test_records_go_where_the_layers_go() -> None:
    """Into another model, under another name, into a copy and a pickle."""
    made = pc.compress(mlp(), {"4": None, "*": pc.Int8()})
    expected = by_name(made)
    other = nn.ModuleDict({"inner": made, "first": made[0]})
    for model in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        found = by_name(model)
        assert found["inner.0"].error == expected["0"].error
        assert found["inner.4"].reason == "the plan keeps '4' dense"
        assert "first" not in found, "it is there once, under its first name"
    assert pc.summary(made[2]).layers[0].error == expected["2"].error
    assert pc.summary(other).bytes == pc.summary(made).bytes


def test_a_second_plan_has_the_last_word() -> None:
    once = pc.compress(mlp(), {"0": pc.Int8()})
    twice = pc.compress(once, {"2": pc.Int8(), "4": None})
    assert {name: (r.method, r.reason) for name, r in by_name(twice).items()} == {
        "0": ("int8", ""), "2": ("int8", ""), "4": (None, "the plan keeps '4' dense")
    }  # fmt: skip
    assert by_name(once)["2"].reason == "no glob of the plan matches it"


def test_a_compiled_model() -> None:
    made = pc.compress(mlp(), pc.Int8())
    assert str(pc.summary(torch.compile(made))) == str(pc.summary(made))


# --- the error ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [pc.Int8(), pc.Sparse(0.5), pc.LowRank(4, rank_guard=False)], ids=repr)
@pytest.mark.parametrize("scale", [1e37, 1e20, 1e-20, 1e-30])
def test_the_error_is_relative_however_large_the_weights_are(scale: float, method: Any) -> None:
    """Powers of two do not change it: its squares overflow or vanish in float32."""
    dense = nn.Sequential(nn.Linear(32, 32, bias=False))
    scale = 2.0 ** round(float(torch.log2(torch.tensor(scale))))
    large = copy.deepcopy(dense)
    with torch.no_grad():
        large[0].weight.mul_(scale)
    expected, found = (pc.summary(pc.compress(model, method)).layers[0].error for model in (dense, large))
    assert expected
    assert found == pytest.approx(expected, rel=1e-3)


def test_the_error_of_denormals_is_none_of_zero() -> None:
    dense = nn.Sequential(nn.Linear(32, 32, bias=False))
    with torch.no_grad():
        dense[0].weight.mul_(2.0**-140)
    error = pc.summary(pc.compress(dense, pc.Sparse(0.5))).layers[0].error
    assert error is not None
    assert 0.1 < error < 0.9
