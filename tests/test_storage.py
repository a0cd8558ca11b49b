"""save() and load(): the same bits back, on any processor; a bad file is refused and the model as it was."""

from __future__ import annotations

import copy
import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods import Int8, Sparse
from pycompress.model import compressed_layers
from pycompress.nn import Int8Linear, SparseLinear

Build = Callable[..., nn.Module]
Python = Callable[..., subprocess.CompletedProcess[str]]
Same = Callable[[Tensor, Tensor], bool]
Snapshot = Callable[[nn.Module], Callable[[], bool]]

INT8 = pc.Int8()


def net(*, fused: bool = True) -> nn.Sequential:
    """Two int8 layers "0" and "2", an embedding-like buffer, a dense layer "4"."""
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU() if fused else nn.Tanh(), nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 8)
    )
    model.register_buffer("table", torch.randn(3, 4))
    return model.eval()


def compressed() -> nn.Sequential:
    return pc.compress(net(), {"4": None, "2": Int8(activation_bits=7, weight_bits=7), "*": INT8})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# --- there and back -----------------------------------------------------------------------------------------------------


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("target", ["random weights", "meta", "compressed", "compressed otherwise", "partly meta"])
def test_round_trip(target: str, path: Path, same: Same) -> None:
    model = compressed()
    pc.save(model, path)
    if target == "meta":
        with torch.device("meta"):
            dense = net()
    else:
        dense = net()
    if target.startswith("compressed"):
        dense = pc.compress(dense, INT8 if target == "compressed otherwise" else {"[02]": INT8})
    if target == "compressed otherwise":
        with pytest.raises(ValueError, match="the model's layer 4 is compressed, in the file it is dense"):
            pc.load(dense, path)
        return
    if target == "partly meta":
        dense[4].to("meta")
    loaded = pc.load(dense, path)
    assert loaded is dense
    assert equal_states(loaded, model)
    assert [
        (layer.activation_bits, layer.weight_bits, layer.activation) for layer in compressed_layers(loaded).values()
    ] == [
        (8, 8, "relu"),
        (7, 7, "none"),
    ]
    assert type(loaded[1]) is nn.Identity
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert not any(module.training for module in loaded.modules())
    x = torch.randn(5, 16)
    assert same(loaded(x), model(x))


@pytest.mark.parametrize("kind", [str, Path])
def test_kinds_of_paths(kind: Callable[[Path], Any], path: Path) -> None:
    pc.save(compressed(), kind(path))
    pc.load(net(), kind(path))


def test_saving_does_not_change_the_model(path: Path, snapshot: Snapshot) -> None:
    model = compressed()
    unchanged = snapshot(model)
    pc.save(model, path)
    assert unchanged()


def test_saving_twice_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    model = compressed()
    pc.save(model, path)
    pc.save(pc.load(net(), path), tmp_path / "again.safetensors")
    with safe_open(path, "pt") as first, safe_open(tmp_path / "again.safetensors", "pt") as second:
        assert json.loads(first.metadata()["pycompress"]) == json.loads(second.metadata()["pycompress"])
        assert set(first.keys()) == set(second.keys())
        assert all(torch.equal(first.get_tensor(name), second.get_tensor(name)) for name in first.keys())  # noqa: SIM118


def test_what_is_in_the_file(path: Path) -> None:
    model = compressed()
    pc.save(model, path)
    with safe_open(path, "pt") as file:
        plan = json.loads(file.metadata()["pycompress"])
        assert plan["version"] == 1
        assert set(plan["layers"]) == {"0", "2"}
        assert file.get_tensor("0.weight").dtype == torch.int8
        assert torch.equal(file.get_tensor("0.weight"), model[0].weight)
        assert set(file.keys()) == set(model.state_dict())
        assert not [name for name in file.keys() if "packed" in name]  # noqa: SIM118


def test_the_layer_itself(path: Path, same: Same) -> None:
    layer = pc.compress(nn.Linear(16, 8), INT8)
    pc.save(layer, path)
    loaded = pc.load(nn.Linear(16, 8), path)
    x = torch.randn(3, 16)
    assert isinstance(loaded, Int8Linear)
    assert same(loaded(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, path: Path, same: Same) -> None:
    model = pc.compress(net().to(dtype), {"4": None, "*": INT8})
    pc.save(model, path)
    loaded = pc.load(net().to(dtype), path)
    assert loaded[4].weight.dtype == dtype
    x = torch.randn(5, 16).to(dtype)
    assert same(loaded(x), model(x))


def test_training_flags_follow_the_model(path: Path) -> None:
    pc.save(compressed(), path)
    for training in (False, True):
        loaded = pc.load(net().train(training), path)
        assert all(module.training is training for module in loaded.modules())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


@pytest.mark.parametrize("meta", [False, True])
def test_tied_linear_layers(meta: bool, path: Path, same: Same) -> None:
    model = pc.compress(Tied(), INT8)
    pc.save(model, path)
    with safe_open(path, "pt") as file:
        stored = [name for name in file.keys() if name.endswith(".weight")]  # noqa: SIM118
    assert len(stored) == 1, "a shared weight is stored once"
    with torch.device("meta" if meta else "cpu"):
        target = Tied()
    loaded = pc.load(target, path)
    assert loaded.first.packed is loaded.second.packed
    assert loaded.first.weight_scale is loaded.second.weight_scale
    x = torch.randn(3, 24)
    assert same(loaded(x), model(x))


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


def test_one_module_under_two_names(path: Path, same: Same) -> None:
    def build() -> nn.Sequential:
        shared = nn.Linear(16, 16)
        return nn.Sequential(shared, nn.Tanh(), shared)

    model = pc.compress(build(), INT8)
    pc.save(model, path)
    loaded = pc.load(build(), path)
    assert loaded[0] is loaded[2]
    x = torch.randn(3, 16)
    assert same(loaded(x), model(x))


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


def test_the_file_is_a_quarter_of_what_was_compressed(path: Path) -> None:
    dense = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 512))
    fp32 = sum(p.numel() * 4 for p in dense.parameters())
    pc.save(pc.compress(dense, Int8(activation_bits=7)), path)
    assert path.stat().st_size <= 0.27 * fp32


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


# --- files that are refused ---------------------------------------------------------------------------------------------


def refused(path: Path, message: str, snapshot: Snapshot, model: nn.Module | None = None) -> None:
    """load() says what is wrong and where, for a dense and for a compressed model, and changes neither."""
    for target in [model] if model is not None else [net(), compressed()]:
        unchanged = snapshot(target)
        with pytest.raises(ValueError, match=message) as error:
            pc.load(target, path)
        assert str(path) in str(error.value)
        assert unchanged()


def pieces(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plan of a good file."""
    pc.save(compressed(), path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["pycompress"])


def write(path: Path, tensors: dict[str, Tensor], plan: Any) -> None:
    path.unlink(missing_ok=True)
    text = plan if isinstance(plan, str) else json.dumps(plan)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"pycompress": text})


def test_no_such_file(path: Path, snapshot: Snapshot) -> None:
    model = net()
    unchanged = snapshot(model)
    with pytest.raises(FileNotFoundError):
        pc.load(model, path)
    assert unchanged()


def test_a_directory(tmp_path: Path, snapshot: Snapshot) -> None:
    refused(tmp_path, "load: ", snapshot)


def test_every_truncation_is_refused(path: Path, snapshot: Snapshot) -> None:
    pieces(path)
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    model = net()
    unchanged = snapshot(model)
    sizes = [*range(12), header // 2, header + 7, header + 8, header + 9, *range(header + 10, len(whole), 499)]
    for size in [*sizes, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"load: .*not a whole safetensors file"):
            pc.load(model, path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="load: "):
        pc.load(model, path)
    assert unchanged()


def test_random_bytes_are_refused(path: Path, snapshot: Snapshot) -> None:
    generator = torch.Generator().manual_seed(3)
    for size in (1, 8, 9, 64, 1000, 100_000):
        noise = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        path.write_bytes(bytes(noise.tolist()))
        refused(path, "load: ", snapshot, net())
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}" * 100)
    refused(path, "load: ", snapshot)


def test_flipped_bytes_give_an_error_or_a_whole_model(path: Path) -> None:
    """Bits that flip in a number cannot be told from another number; anything else has to be noticed."""
    pieces(path)
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    generator = torch.Generator().manual_seed(4)
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
    assert refusals > 100


def test_a_file_of_another_program(path: Path, snapshot: Snapshot) -> None:
    save_file(net().state_dict(), path)
    refused(path, "no pycompress plan in its metadata, expected a file that pycompress.save wrote", snapshot)
    save_file(net().state_dict(), path, metadata={"format": "pt"})
    refused(path, "no pycompress plan", snapshot)


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
        ('{"version": NaN}', "version nan"),
    ],
)
def test_plans_that_are_none(text: str, message: str, path: Path, snapshot: Snapshot) -> None:
    tensors, _ = pieces(path)
    write(path, tensors, text)
    refused(path, message, snapshot)


@pytest.mark.parametrize("version", [0, 2, 99, -1, "1", None, [1], True, 1.0])
def test_unknown_versions(version: Any, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path)
    write(path, tensors, {**plan, "version": version})
    refused(path, "its plan has version .*, expected 1", snapshot)


Plan = dict[str, Any]


def edit(*keys: str, value: Any) -> Callable[[Plan], None]:
    def change(plan: Plan) -> None:
        for key in keys[:-1]:
            plan = plan[key]
        plan[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[Plan], None]:
    def change(plan: Plan) -> None:
        for key in keys[:-1]:
            plan = plan[key]
        del plan[keys[-1]]

    return change


PLANS: dict[str, tuple[Callable[[Plan], None], str]] = {
    "layers a list": (edit("layers", value=[]), "no layers"),
    "layers null": (edit("layers", value=None), "no layers"),
    "a layer null": (edit("layers", "0", value=None), "no layers"),
    "a layer a number": (edit("layers", "0", value=3), "no layers"),
    "aliases missing": (drop("aliases"), "no aliases"),
    "aliases a list": (edit("aliases", value=["0"]), "no aliases"),
    "an alias to a number": (edit("aliases", value={"0.weight": 3}), "no aliases"),
    "an alias to nothing": (edit("aliases", value={"x": "nowhere"}), "alias 'x' stands for 'nowhere'"),
    "an alias to itself": (edit("aliases", value={"x": "x"}), "alias 'x' stands for 'x'"),
    "an alias over a tensor": (edit("aliases", value={"0.weight": "2.weight"}), "alias '0.weight'"),
    "an alias that the model lacks": (edit("aliases", value={"x": "0.weight"}), "the model has no tensor 'x'"),
    "identities missing": (drop("identities"), "no identities"),
    "identities a number": (edit("identities", value=1), "no identities"),
    "an identity a number": (edit("identities", value=[1]), "no identities"),
    "an identity nowhere": (edit("identities", value=["9"]), "the model has no module '9'"),
    "an identity in the place of the model": (edit("identities", value=[""]), "load: "),
    "an identity in the place of a dense layer": (edit("identities", value=["1", "4"]), "load: "),
    "an identity in the place of an int8 layer": (edit("identities", value=["1", "0"]), "load: "),
    "an identity in the place of a norm": (edit("identities", value=["1", "3"]), "load: "),
    "method unknown": (edit("layers", "0", "method", value="int3"), "method is 'int3', expected 'int4' or 'int8'"),
    "method missing": (drop("layers", "0", "method"), "method is None"),
    "activation_bits 6": (edit("layers", "0", "activation_bits", value=6), "activation_bits is 6"),
    "activation_bits true": (edit("layers", "0", "activation_bits", value=True), "activation_bits is True"),
    "activation_bits 8.0": (edit("layers", "0", "activation_bits", value=8.0), "activation_bits is 8.0"),
    "activation_bits missing": (drop("layers", "0", "activation_bits"), "activation_bits is None"),
    "weight_bits huge": (edit("layers", "0", "weight_bits", value=10**30), "weight_bits is 1000"),
    "weight_bits a list": (edit("layers", "0", "weight_bits", value=[8]), "weight_bits is"),
    "bias a number": (edit("layers", "0", "bias", value=1), "bias is 1"),
    "bias false": (edit("layers", "0", "bias", value=False), "bias=True in the model"),
    "activation unknown": (edit("layers", "0", "activation", value="tanh"), "activation is 'tanh'"),
    "activation null": (edit("layers", "0", "activation", value=None), "activation is None"),
    "activation a list": (edit("layers", "0", "activation", value=["relu"]), "activation is"),
    "activation a mapping": (edit("layers", "0", "activation", value={}), "activation is"),
    "shape missing": (drop("layers", "0", "shape"), "shape is None"),
    "shape a number": (edit("layers", "0", "shape", value=512), "shape is 512"),
    "shape of one": (edit("layers", "0", "shape", value=[512]), "shape is"),
    "shape of three": (edit("layers", "0", "shape", value=[32, 16, 1]), "shape is"),
    "shape negative": (edit("layers", "0", "shape", value=[-32, -16]), "shape is"),
    "shape zero": (edit("layers", "0", "shape", value=[0, 16]), "shape is"),
    "shape of floats": (edit("layers", "0", "shape", value=[32.0, 16.0]), "shape is"),
    "shape of booleans": (edit("layers", "0", "shape", value=[True, True]), "shape is"),
    "shape transposed": (edit("layers", "0", "shape", value=[16, 32]), r"\[32, 16\].*in the model, \[16, 32\]"),
    "shape huge": (edit("layers", "0", "shape", value=[10**9, 10**9]), "in the model"),
    "shape beyond int64": (edit("layers", "0", "shape", value=[2**70, 2**70]), "in the model"),
    "a layer that the model lacks": (edit("layers", "7", value=None), "load: "),
    "one layer too few": (drop("layers", "0"), "load: "),
    "no layer": (edit("layers", value={}), "load: "),
}


@pytest.mark.parametrize("case", PLANS)
def test_hostile_plans(case: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path)
    change, message = PLANS[case]
    change(plan)
    write(path, tensors, plan)
    refused(path, message, snapshot)


@pytest.mark.parametrize("name", ["7", "nowhere.deep", "", "0.weight", "..", "0.", "__class__", "forward"])
def test_layers_that_the_model_does_not_have(name: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path)
    plan["layers"][name] = plan["layers"]["0"]
    write(path, tensors, plan)
    refused(path, "load: ", snapshot)


@pytest.mark.parametrize("name", ["1", "3"])
def test_layers_that_are_not_linear(name: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path)
    plan["layers"][name] = plan["layers"]["0"]
    write(path, tensors, plan)
    refused(path, f"{name} is a .* in the model, expected a linear layer", snapshot)


def patch(name: str, index: int, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[index] = value

    return change


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = make(tensors[name])

    return change


def remove(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "scale NaN": (patch("0.weight_scale", 3, float("nan")), "layer 0: .*scale"),
    "scale infinite": (patch("0.weight_scale", 3, float("inf")), "layer 0: .*scale"),
    "scale zero": (patch("0.weight_scale", 3, 0.0), "layer 0: .*scale"),
    "scale negative": (patch("0.weight_scale", 3, -1.0), "layer 0: .*scale"),
    "bias NaN": (patch("0.bias", 3, float("nan")), "layer 0: .*bias"),
    "bias infinite": (patch("2.bias", 3, float("-inf")), "layer 2: .*bias"),
    "weight -128": (patch("0.weight", 5, -128), r"layer 0: .*expected \[-127, 127\]"),
    "weight 64 of seven bits": (patch("2.weight", 5, 64), r"layer 2: .*expected \[-63, 63\]"),
    "weight -64 of seven bits": (patch("2.weight", 5, -64), r"layer 2: .*expected \[-63, 63\]"),
    "weight float32": (put("0.weight", lambda t: t.float()), "0.weight is F32"),
    "weight uint8": (put("0.weight", lambda t: t.view(torch.uint8)), "0.weight is U8"),
    "weight transposed": (put("0.weight", lambda t: t.T), r"0.weight is I8 \[16, 32\], expected I8 \[32, 16\]"),
    "weight flat": (put("0.weight", lambda t: t.flatten()), "0.weight is I8"),
    "weight with fewer rows": (put("0.weight", lambda t: t[:-1]), "0.weight is I8"),
    "weight empty": (put("0.weight", lambda t: t[:0]), "0.weight is I8"),
    "scale float64": (put("0.weight_scale", lambda t: t.double()), "0.weight_scale is F64"),
    "scale bfloat16": (put("0.weight_scale", lambda t: t.bfloat16()), "0.weight_scale is BF16"),
    "scale too short": (put("0.weight_scale", lambda t: t[:-1]), "0.weight_scale is F32"),
    "scale a column": (put("0.weight_scale", lambda t: t[:, None]), "0.weight_scale is F32"),
    "bias float64": (put("0.bias", lambda t: t.double()), "0.bias is F64"),
    "bias too long": (put("0.bias", lambda t: torch.cat([t, t])), "0.bias is F32"),
    "dense weight of another shape": (put("4.weight", lambda t: t[:, :-1]), "4.weight is F32"),
    "dense weight of integers": (put("4.weight", lambda t: t.to(torch.int32)), "4.weight is I32"),
    "dense weight of booleans": (put("4.weight", lambda t: t > 0), "4.weight is BOOL"),
    "norm of another shape": (put("3.weight", lambda t: t[None]), "3.weight is F32"),
    "buffer of another shape": (put("table", lambda t: t[:2]), "table is F32"),
    "weight missing": (remove("0.weight"), "0.weight is missing"),
    "scale missing": (remove("2.weight_scale"), "2.weight_scale is missing"),
    "bias missing": (remove("0.bias"), "0.bias is missing"),
    "dense weight missing": (remove("4.weight"), "4.weight is missing"),
    "buffer missing": (remove("table"), "table is missing"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_hostile_tensors(case: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path)
    change, message = TENSORS[case]
    change(tensors)
    write(path, tensors, plan)
    refused(path, message, snapshot)


def test_tensors_that_the_model_lacks(path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path)
    write(path, {**tensors, "9.weight": torch.zeros(3)}, plan)
    refused(path, "the model has no tensor '9.weight'", snapshot)
    write(path, {**tensors, "0.zero_point": torch.zeros(3)}, plan)
    refused(path, "the model has no tensor '0.zero_point'", snapshot)


def test_an_alias_may_not_give_one_weight_to_layers_of_different_bits(path: Path, snapshot: Snapshot) -> None:
    """They would run with one packed weight, which knows one range of activations."""
    pc.save(pc.compress(Tied(), INT8), path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        plan = json.loads(file.metadata()["pycompress"])
    plan["layers"]["second"]["activation_bits"] = 7
    write(path, tensors, plan)
    try:
        loaded = pc.load(Tied(), path)
    except ValueError:
        return
    assert loaded.second.packed is not loaded.first.packed


def test_huge_claims_in_the_header_are_refused(path: Path, snapshot: Snapshot) -> None:
    """Before anything is allocated."""
    _, plan = pieces(path)
    size = 2**40
    header = {
        "__metadata__": {"pycompress": json.dumps(plan)},
        "0.weight": {"dtype": "I8", "shape": [2**20, 2**20], "data_offsets": [0, size]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(1000))
    refused(path, "not a whole safetensors file", snapshot)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(16, 32)), "load: "),
        (lambda: nn.Linear(16, 32), "load: "),
        (lambda: nn.Sequential(nn.Linear(16, 33), *list(net())[1:]), "load: "),
        (lambda: nn.Sequential(nn.Linear(16, 32, bias=False), *list(net())[1:]), "bias"),
        (lambda: nn.Sequential(*net(), nn.Linear(8, 8)), "load: "),
    ],
)
def test_models_of_another_architecture(
    other: Callable[[], nn.Module], message: str, path: Path, snapshot: Snapshot
) -> None:
    pc.save(compressed(), path)
    refused(path, message, snapshot, other())


def test_a_model_whose_activation_is_not_the_one_that_was_fused(path: Path, snapshot: Snapshot) -> None:
    """A dense model with Tanh where the file's layer has ReLU inside is another model."""
    pc.save(compressed(), path)
    refused(path, "load: ", snapshot, net(fused=False))


# --- sparse layers ------------------------------------------------------------------------------------------------------


def sparse() -> nn.Sequential:
    """Layer "0" in float32, "2" in int8."""
    return pc.compress(net(), {"4": None, "2": Sparse(0.5, bits=8), "*": Sparse(0.25)})


def sparse_pieces(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    pc.save(sparse(), path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["pycompress"])  # noqa: SIM118


METHODS = [
    Sparse(), Sparse(0.3, bits=8), Sparse(0.3, bits=8, activation_bits=8), Sparse(0.5, "16x1"), Sparse(0.5, "16x4", bits=8),
    Sparse(None, "2:4"), Sparse(0.0), Sparse(0.0, bits=8), Sparse(0.2, scope="model"), Sparse(0.5, "16x16"),
    Sparse(0.5, "32x32", bits=8), Sparse(1.0, "64x64"),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", ["random weights", "meta", "compressed by int8", "compressed", "compressed on meta"])
def test_sparse_round_trip(method: Sparse, target: str, path: Path, same: Same) -> None:
    model = pc.compress(net(), {"4": None, "*": method})
    pc.save(model, path)
    with torch.device("meta" if target == "meta" else "cpu"):
        dense = net()
    if target.startswith("compressed"):
        dense = pc.compress(dense, {"4": None, "*": INT8 if "int8" in target else Sparse(0.9, bits=method.bits)})
    if "on meta" in target:
        dense.to("meta")
    loaded = pc.load(dense, path)
    assert equal_states(loaded, model)
    assert all(type(layer) is SparseLinear for layer in compressed_layers(loaded).values())
    assert [layer.settings for layer in compressed_layers(loaded).values()] == [model[0].settings, model[2].settings]
    assert (loaded[0].activation, type(loaded[1])) == ("relu", nn.Identity)
    x = torch.randn(5, 16)
    assert same(loaded(x), model(x))
    assert str(pc.summary(loaded)).count("sparse") == 2
    assert pc.summary(loaded).bytes == pc.summary(model).bytes


def test_what_is_in_the_file_of_a_sparse_model(path: Path) -> None:
    model = sparse()
    pc.save(model, path)
    with safe_open(path, "pt") as file:
        plan = json.loads(file.metadata()["pycompress"])
        assert set(file.keys()) == set(model.state_dict())
        assert torch.equal(file.get_tensor("0.weight_values"), model[0].canonical().values)
    common = {"method": "sparse", "bias": True}
    assert plan["version"] == 1
    assert plan["layers"] == {
        "0": {**common, "shape": [32, 16], "activation": "relu", "bits": 32, "nnz": 128},
        "2": {**common, "shape": [24, 32], "activation": "none", "bits": 8, "nnz": model[2].nnz, "activation_bits": 7},
    }


def test_a_file_of_both_methods(path: Path, same: Same) -> None:
    model = pc.compress(net(), {"0": Sparse(0.5), "2": INT8, "4": None})
    pc.save(model, path)
    loaded, x = pc.load(net(), path), torch.randn(3, 16)
    assert [type(loaded[i]) for i in (0, 2)] == [SparseLinear, Int8Linear]
    assert same(loaded(x), model(x))


@pytest.mark.parametrize("method", [Sparse(0.3), Sparse(0.3, bits=8), Sparse(0.0)])
def test_tied_sparse_layers(method: Sparse, path: Path, same: Same) -> None:
    model = pc.compress(Tied(), method)
    pc.save(model, path)
    with safe_open(path, "pt") as file:
        names = [name.rpartition(".")[2] for name in file.keys()]  # noqa: SIM118
    stored = ["weight_mask", "weight_values", *(["weight_scale"] if method.bits == 8 else [])]
    assert sorted(names) == sorted(["bias", "bias", *stored]), "a shared weight is stored once"
    loaded, x = pc.load(Tied(), path), torch.randn(3, 24)
    found, before = pc.summary(loaded), pc.summary(model)
    assert (found.bytes, found.dense_bytes) == (before.bytes, before.dense_bytes)
    assert loaded.first.packed is loaded.second.packed
    assert loaded.first.weight_scale is loaded.second.weight_scale
    assert same(loaded(x), model(x))


def sparse_plan(*keys: str, value: Any) -> tuple[Callable[[Plan], None], str]:
    return edit("layers", *keys, value=value), rf"layer {keys[0]}: .*{keys[1]} is "


SPARSE_PLANS: dict[str, tuple[Callable[[Plan], None], str]] = {
    "method int8": (edit("layers", "0", "method", value="int8"), "layer 0: .*activation_bits is None"),
    "method a list": (
        edit("layers", "0", "method", value=["sparse"]),
        r"method is \['sparse'\], expected 'int4' or 'int8' or 'low_rank' or 'sparse'",
    ),
    "method unknown": (edit("layers", "0", "method", value="os.system"), "method is 'os.system', expected"),
    "bits 16": sparse_plan("0", "bits", value=16),
    "bits 8": (edit("layers", "0", "bits", value=8), "layer 0: .*settings"),
    "bits true": sparse_plan("0", "bits", value=True),
    "bits missing": (drop("layers", "0", "bits"), "layer 0: .*bits is None"),
    "nnz missing": (drop("layers", "0", "nnz"), "layer 0: .*nnz is None"),
    "nnz negative": sparse_plan("0", "nnz", value=-1),
    "nnz a float": sparse_plan("0", "nnz", value=128.0),
    "nnz true": sparse_plan("0", "nnz", value=True),
    "nnz beyond the weight": sparse_plan("0", "nnz", value=513),
    "nnz huge": sparse_plan("0", "nnz", value=10**30),
    "nnz less by one": (edit("layers", "0", "nnz", value=127), r"0.weight_values is F32 \[128\], expected F32 \[127\]"),
    "nnz more by one": (edit("layers", "0", "nnz", value=129), r"0.weight_values is F32 \[128\], expected F32 \[129\]"),
    "activation_bits missing": (drop("layers", "2", "activation_bits"), "layer 2: .*settings"),
    "activation_bits 6": sparse_plan("2", "activation_bits", value=6),
    "activation_bits beside floats": (edit("layers", "0", "activation_bits", value=8), "layer 0: .*settings"),
    "something unknown": (edit("layers", "2", "code", value="import os"), "layer 2: .*settings"),
    "shape transposed": (edit("layers", "0", "shape", value=[16, 32]), r"\[32, 16\].*in the model, \[16, 32\]"),
    "shape huge": (edit("layers", "0", "shape", value=[10**9, 10**9]), "load: "),
    "shape beyond int64": (edit("layers", "0", "shape", value=[2**70, 2**70]), "load: "),
    "the other layer": (lambda plan: plan["layers"].update({"0": plan["layers"]["2"]}), "load: "),
}


@pytest.mark.parametrize("case", SPARSE_PLANS)
def test_hostile_plans_of_sparse_layers(case: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = sparse_pieces(path)
    change, message = SPARSE_PLANS[case]
    change(plan)
    write(path, tensors, plan)
    for target in (net(), sparse()):
        refused(path, message, snapshot, target)


def more_bits(mask: Tensor) -> Tensor:
    """The first zero bit of the mask becomes one."""
    changed = mask.clone()
    first = int((changed.view(-1) != 255).nonzero()[0, 0])
    changed.view(-1)[first] |= changed.view(-1)[first] + 1
    return changed


SPARSE_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "one bit more": (put("0.weight_mask", more_bits), "layer 0: .*128 values, the mask has 129 bits"),
    "no bits": (put("2.weight_mask", torch.zeros_like), "layer 2: .*the mask has 0 bits"),
    "all bits": (put("0.weight_mask", lambda t: torch.full_like(t, 255)), "layer 0: .*the mask has 512 bits"),
    "a value of zero": (patch("0.weight_values", 5, 0.0), "layer 0: .*1 of the values are zero"),
    "a value of -0": (patch("0.weight_values", 5, -0.0), "layer 0: .*1 of the values are zero"),
    "a value of zero in int8": (patch("2.weight_values", 5, 0), "layer 2: .*1 of the values are zero"),
    "a value of -128": (patch("2.weight_values", 5, -128), "layer 2: .*-128"),
    "a value NaN": (patch("0.weight_values", 5, float("nan")), "layer 0: .*NaN or Inf"),
    "a value infinite": (patch("0.weight_values", 5, float("-inf")), "layer 0: .*NaN or Inf"),
    "scale NaN": (patch("2.weight_scale", 3, float("nan")), "layer 2: .*scale"),
    "scale zero": (patch("2.weight_scale", 3, 0.0), "layer 2: .*scale"),
    "bias infinite": (patch("2.bias", 3, float("-inf")), "layer 2: .*bias"),
    "values too few": (
        put("0.weight_values", lambda t: t[:-1]),
        r"0.weight_values is F32 \[127\], expected F32 \[128\]",
    ),
    "values in int8": (put("0.weight_values", lambda t: t.to(torch.int8)), "0.weight_values is I8"),
    "values in float64": (put("0.weight_values", lambda t: t.double()), "0.weight_values is F64"),
    "values a matrix": (put("0.weight_values", lambda t: t[None]), "0.weight_values is F32"),
    "mask in int8": (put("0.weight_mask", lambda t: t.view(torch.int8)), "0.weight_mask is I8"),
    "mask of booleans": (put("0.weight_mask", lambda t: t > 0), "0.weight_mask is BOOL"),
    "mask too narrow": (put("0.weight_mask", lambda t: t[:, :-1]), "0.weight_mask is U8"),
    "mask transposed": (put("0.weight_mask", lambda t: t.T), "0.weight_mask is U8"),
    "mask empty": (put("0.weight_mask", lambda t: t[:0]), "0.weight_mask is U8"),
    "mask missing": (remove("0.weight_mask"), "0.weight_mask is missing"),
    "values missing": (remove("0.weight_values"), "0.weight_values is missing"),
    "scale missing": (remove("2.weight_scale"), "2.weight_scale is missing"),
    "a scale beside floats": (
        lambda tensors: tensors.update({"0.weight_scale": torch.ones(32)}),
        "the model has no tensor '0.weight_scale'",
    ),
    "a dense weight, too": (
        lambda tensors: tensors.update({"0.weight": torch.ones(32, 16)}),
        "the model has no tensor '0.weight'",
    ),
}


@pytest.mark.parametrize("case", SPARSE_TENSORS)
def test_hostile_tensors_of_sparse_layers(case: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = sparse_pieces(path)
    change, message = SPARSE_TENSORS[case]
    change(tensors)
    write(path, tensors, plan)
    for target in (net(), sparse()):
        refused(path, message, snapshot, target)


def test_padding_bits_are_refused(path: Path, snapshot: Snapshot) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(12, 5))

    pc.save(pc.compress(build(), Sparse(0.5)), path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        plan = json.loads(file.metadata()["pycompress"])
    tensors["0.weight_mask"][3, 1] |= 16
    write(path, tensors, plan)
    refused(path, "layer 0: .*row 3 of the mask has bits set behind k = 12", snapshot, build())


def test_flipped_bytes_of_a_sparse_file(path: Path) -> None:
    """A flipped bit of the mask never fits the number of values: everything but a flip within a number is noticed."""
    sparse_pieces(path)
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    generator = torch.Generator().manual_seed(5)
    refusals = 0
    for _ in range(150):
        position = int(torch.randint(0, 8 + header + 512, (1,), generator=generator))
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


def test_not_a_path() -> None:
    with pytest.raises((TypeError, ValueError)):
        pc.load(net(), 3)  # type: ignore[arg-type]
