"""save() and load() of int4 layers, and of int8 ones with activations in floating point; files that are refused."""

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
from pycompress.methods import Int4, Int8
from pycompress.methods.weight import Method
from pycompress.model import compressed_layers
from pycompress.nn import Int4Linear

Same = Callable[[Tensor, Tensor], bool]
Snapshot = Callable[[nn.Module], Callable[[], bool]]
Plan = dict[str, Any]
Tensors = dict[str, Tensor]

METHODS: list[Method] = [
    Int4(), Int4(64, symmetric=True), Int4(128), Int4(activation_bits=16), Int4(symmetric=True, activation_bits=16), Int8(16),
]  # fmt: skip


def net() -> nn.Sequential:
    """Layer "0" has an odd number of inputs, and with groups of 32 an odd number of groups."""
    return nn.Sequential(nn.Linear(67, 32), nn.ReLU(), nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 8)).eval()


def compressed(first: Method | None = None, second: Method | None = None) -> nn.Sequential:
    return pc.compress(net(), {"0": first or Int4(), "2": second or Int4(64, symmetric=True), "4": None})


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


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("target", ["random weights", "meta", "int8", "int4", "int4 on meta"])
def test_round_trip(method: Method, target: str, path: Path, same: Same) -> None:
    model = compressed(method, method)
    pc.save(model, path)
    with torch.device("meta" if target == "meta" else "cpu"):
        dense = net()
    if target.startswith("int"):
        dense = pc.compress(dense, {"4": None, "*": Int8() if "int8" in target else Int4(128, symmetric=True)})
    if "on meta" in target:
        dense.to("meta")
    loaded = pc.load(dense, path)
    assert equal_states(loaded, model)
    assert [layer.settings for layer in compressed_layers(loaded).values()] == [model[0].settings, model[2].settings]
    assert (loaded[0].activation, type(loaded[1])) == ("relu", nn.Identity)
    x = torch.randn(5, 67)
    assert same(loaded(x), model(x))
    found, before = pc.summary(loaded), pc.summary(model)
    assert [(r.method, r.label, r.bytes) for r in found.layers] == [
        (r.method, r.label, r.bytes) for r in before.layers if r.method
    ]
    assert found.bytes == before.bytes


def test_what_is_in_the_file(path: Path) -> None:
    model = compressed()
    tensors, plan = pieces(path, model)
    assert set(tensors) == set(model.state_dict())
    assert set(tensors) >= {"0.weight", "0.group_scale", "0.group_zero_point", "2.weight", "2.group_scale"}
    weight = model[0].canonical()
    assert torch.equal(tensors["0.weight"], weight.values) and tensors["0.weight"].shape == (32, 34)
    assert torch.equal(tensors["0.group_scale"], weight.scale) and tensors["0.group_scale"].dtype == torch.bfloat16
    assert torch.equal(tensors["0.group_zero_point"], weight.zero_point)
    common = {"method": "int4", "bias": True, "activation_bits": 8}
    assert plan["layers"] == {
        "0": {**common, "shape": [32, 67], "activation": "relu", "group": 32, "symmetric": False},
        "2": {**common, "shape": [24, 32], "activation": "none", "group": 64, "symmetric": True},
    }


def test_the_size_of_the_file(path: Path) -> None:
    """4 bits a weight, a bfloat16 scale and 4 bits of zero point for each 32 of them."""
    dense = nn.Sequential(nn.Linear(1024, 512, bias=False))
    pc.save(pc.compress(dense, Int4()), path)
    assert 0 <= path.stat().st_size - 1024 * 512 * (4 + 20 / 32) / 8 < 1024


def test_saving_twice_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    tensors, plan = pieces(path, compressed())
    again, second = pieces(tmp_path / "again.safetensors", pc.load(net(), path))
    assert plan == second and tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_tied_layers(method: Method, path: Path, same: Same) -> None:
    model = pc.compress(Tied(), method)
    tensors, _ = pieces(path, model)
    stored = [*model.first.canonical().tensors(), "bias", "bias"]
    assert sorted(name.rpartition(".")[2] for name in tensors) == sorted(stored), "a shared weight is stored once"
    loaded, x = pc.load(Tied(), path), torch.randn(3, 48)
    assert loaded.first.packed is loaded.second.packed
    found, before = pc.summary(loaded), pc.summary(model)
    assert (found.bytes, found.dense_bytes) == (before.bytes, before.dense_bytes)
    assert same(loaded(x), model(x))


# --- files that are refused ---------------------------------------------------------------------------------------------


def refused(path: Path, message: str, snapshot: Snapshot) -> None:
    """load() says what is wrong and where, for a dense and for a compressed model, and changes neither."""
    for target in (net(), compressed()):
        unchanged = snapshot(target)
        with pytest.raises(ValueError, match=message) as error:
            pc.load(target, path)
        assert str(path) in str(error.value)
        assert unchanged()


def write(path: Path, tensors: Tensors, plan: Plan) -> None:
    path.unlink(missing_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"pycompress": json.dumps(plan)})


def edit(layer: str, key: str, value: Any) -> Callable[[Plan], None]:
    return lambda plan: plan["layers"][layer].update({key: value})


def drop(layer: str, key: str) -> Callable[[Plan], None]:
    return lambda plan: plan["layers"][layer].pop(key)


PLANS: dict[str, tuple[Callable[[Plan], None], str]] = {
    "group 16": (edit("0", "group", 16), "layer 0: .*group is 16, expected one of 32, 64, 128"),
    "group 0": (edit("0", "group", 0), "layer 0: .*group is 0"),
    "group huge": (edit("0", "group", 2**70), "layer 0: .*group is 1180"),
    "group a float": (edit("0", "group", 32.0), "layer 0: .*group is 32.0"),
    "group text": (edit("0", "group", "32"), "layer 0: .*group is '32'"),
    "group missing": (drop("0", "group"), "layer 0: .*group is None"),
    "another group": (edit("0", "group", 64), r"0.group_scale is BF16 \[32, 3\], expected BF16 \[32, 2\]"),
    "symmetric": (edit("0", "symmetric", True), "the model has no tensor '0.group_zero_point'"),
    "not symmetric": (edit("2", "symmetric", False), "the tensor 2.group_zero_point is missing"),
    "symmetric a number": (edit("0", "symmetric", 0), "layer 0: .*symmetric is 0, expected True or False"),
    "symmetric missing": (drop("0", "symmetric"), "layer 0: .*symmetric is None"),
    "activation_bits 7": (edit("0", "activation_bits", 7), "layer 0: .*activation_bits is 7, expected 8 or 16"),
    "activation_bits true": (edit("0", "activation_bits", True), "layer 0: .*activation_bits is True"),
    "activation_bits missing": (drop("0", "activation_bits"), "layer 0: .*activation_bits is None"),
    "something unknown": (edit("0", "code", "import os"), "layer 0: .*settings"),
    "method int8": (edit("0", "method", "int8"), "layer 0: .*weight_bits is None"),
    "method sparse": (edit("0", "method", "sparse"), "layer 0: .*bits is None"),
    "shape transposed": (edit("0", "shape", [67, 32]), r"\[32, 67\].*in the model, \[67, 32\]"),
    "a pair more": (edit("0", "shape", [32, 68]), r"\[32, 67\].*in the model, \[32, 68\]"),
    "shape too wide": (edit("0", "shape", [32, 65537]), r"layer 0: .*the shape is \[32, 65537\]"),
    "shape huge": (edit("0", "shape", [2**70, 2**70]), "load: "),
    "an embedding": (edit("2", "embedding", True), "layer 2: method is 'int4', expected 'low_rank'"),
    "a convolution": (edit("2", "conv2d", {}), "layer 2: method is 'int4', expected 'low_rank' or 'sparse'"),
}


@pytest.mark.parametrize("case", PLANS)
def test_hostile_plans(case: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed())
    change, message = PLANS[case]
    change(plan)
    write(path, tensors, plan)
    refused(path, message, snapshot)


def patch(name: str, index: int, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[index] = value

    return change


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "a scale of zero": (patch("0.group_scale", 5, 0.0), "layer 0: .*a scale is not between"),
    "a scale of NaN": (patch("0.group_scale", 5, torch.nan), "layer 0: .*a scale is not between"),
    "a scale of Inf": (patch("2.group_scale", 5, torch.inf), "layer 2: .*a scale is not between"),
    "a scale below zero": (patch("2.group_scale", 5, -1), "layer 2: .*a scale is not between"),
    "a subnormal scale": (patch("2.group_scale", 5, 2.0**-127), "layer 2: .*a scale is not between"),
    "a scale that overflows": (patch("2.group_scale", 5, 2.0**125), "layer 2: .*a scale is not between"),
    "a nibble behind the last": (patch("0.weight", 33, 255), "layer 0: .*values has bits set behind the last of 67"),
    "a zero point behind the last": (patch("0.group_zero_point", 1, 255), "layer 0: .*zero_point has bits set behind"),
    "values too narrow": (put("0.weight", lambda t: t[:, 1:]), r"0.weight is U8 \[32, 33\], expected U8 \[32, 34\]"),
    "values turned": (put("0.weight", lambda t: t.T), r"0.weight is U8 \[34, 32\]"),
    "values in int8": (put("0.weight", lambda t: t.to(torch.int8)), "0.weight is I8"),
    "scales in float32": (put("0.group_scale", lambda t: t.float()), r"0.group_scale is F32 \[32, 3\], expected BF16"),
    "scales in float16": (put("0.group_scale", lambda t: t.half()), "0.group_scale is F16"),
    "zero points unpacked": (put("0.group_zero_point", lambda t: t.repeat(1, 2)), r"0.group_zero_point is U8 \[32, 4\]"),
    "values missing": (lambda tensors: tensors.__delitem__("0.weight"), "the tensor 0.weight is missing"),
    "scales missing": (lambda tensors: tensors.__delitem__("2.group_scale"), "the tensor 2.group_scale is missing"),
    "zero points beside a symmetric weight": (
        lambda tensors: tensors.update({"2.group_zero_point": torch.zeros(24, 1, dtype=torch.uint8)}),
        "no tensor '2.group_zero_point'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_hostile_tensors(case: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed())
    change, message = TENSORS[case]
    change(tensors)
    write(path, tensors, plan)
    refused(path, message, snapshot)


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
            assert {type(layer) for layer in compressed_layers(model).values()} == {Int4Linear}
            assert model(torch.randn(2, 67)).shape == (2, 8)
    assert refusals > 75
