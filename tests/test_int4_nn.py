"""Int4Linear as a module, Int8Linear with activations in floating point, models of both. What they compute: tests of the ops."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress import ops
from pycompress.methods import Int4, Int4Weight, Int8
from pycompress.methods.weight import Method
from pycompress.model import compressed_layers
from pycompress.nn import LAYERS, CompressedLinear, Int4Linear, Int8Linear

Build = Callable[..., nn.Module]
Python = Callable[..., subprocess.CompletedProcess[str]]
Same = Callable[[Tensor, Tensor], bool]
K, N = 71, 24  # an odd width, and with groups of 32 an odd number of groups

METHODS: dict[str, Int4] = {
    "g32": Int4(),
    "g64 symmetric": Int4(64, symmetric=True),
    "g128": Int4(128),
    "g32 a16": Int4(activation_bits=16),
    "g128 symmetric a16": Int4(128, symmetric=True, activation_bits=16),
}
EVERY = pytest.mark.parametrize("name", METHODS)


def layer(name: str = "g32", activation: str = "none", *, bias: bool = True) -> Int4Linear:
    return Int4Linear.from_dense(nn.Linear(K, N, bias=bias), METHODS[name], activation)


def weight_only(activation: str = "none") -> Int8Linear:
    return Int8Linear.from_dense(nn.Linear(K, N), Int8(16), activation)


def state(module: nn.Module) -> dict[str, Tensor]:
    """Everything that decides what the layer computes."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal_weights(a: Int4Weight, b: Int4Weight) -> bool:
    return equal_states(a.tensors(), b.tensors()) and a.settings() == b.settings() and a.shape == b.shape


# --- making one ---------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("bias", [False, True])
def test_from_dense(name: str, bias: bool, same: Same) -> None:
    dense, method = nn.Linear(K, N, bias=bias), METHODS[name]
    made, weight = Int4Linear.from_dense(dense, method), method.compress(dense.weight)
    assert (made.in_features, made.out_features, made.activation) == (K, N, "none")
    assert (made.group, made.symmetric, made.activation_bits) == (
        method.group,
        method.symmetric,
        method.activation_bits,
    )
    assert made.weight_scale is None and (made.bias is None) is not bias
    assert equal_weights(made.canonical(), weight)
    assert torch.equal(made.weight, weight.decompress())
    assert not list(made.parameters())
    assert torch.equal(Int4Linear._dense(made.packed, (N, K), None), made.weight)
    x, tensors = torch.randn(5, K), weight.tensors()
    packed = ops.int4_pack(
        tensors["weight"], tensors["group_scale"], weight.zero_point, K, method.group, method.activation_bits
    )
    assert same(made(x), ops.int4_linear(x, packed, N, dense.bias))
    assert made.label == f"int4 {name}"


@EVERY
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_it_computes_what_the_weight_says(name: str, activation: str) -> None:
    made, x = layer(name, activation), torch.randn(7, K)
    weight, bias = made.canonical().decompress().double(), made.bias
    assert bias is not None
    exact = x.double() @ weight.T + bias.double()
    magnitude = x.double().abs() @ weight.abs().T + bias.double().abs()
    slack = (K + 8) * 2.0**-23 * magnitude
    if (
        made.activation_bits == 8
    ):  # a quantized row lies within a step of itself: half by rounding, half by the zero point
        step = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / 255
        slack = slack + step.double()[:, None] * weight.abs().sum(1)
    expected = nn.functional.gelu(exact) if activation == "gelu" else exact
    assert ((made(x) - expected).abs() <= 1.13 * slack + 1e-6).all(), "GELU's slope is at most 1.13"


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_int8_with_activations_in_floating_point(activation: str) -> None:
    made, x = weight_only(activation), torch.randn(7, K)
    assert (made.activation_bits, made.label, made.settings["weight_bits"]) == (16, "int8 a16", 8)
    weight = made.canonical().decompress().double()
    exact = nn.functional.linear(x.double(), weight, made.bias.double())  # type: ignore[union-attr]
    expected = nn.functional.gelu(exact) if activation == "gelu" else exact
    bound = (K + 8) * 2.0**-23 * (x.double().abs() @ weight.abs().T + 1)
    assert ((made(x) - expected).abs() <= 1.13 * bound).all(), "far closer than any rounding of activations would be"


def test_without_a_method() -> None:
    dense = nn.Linear(K, N)
    assert Int4Linear.from_dense(dense).same_weight(Int4Linear.from_dense(dense, Int4()))
    assert LAYERS["int4"] is Int4Linear


@EVERY
def test_canonical_round_trip(name: str, same: Same) -> None:
    first = layer(name, "gelu")
    second = Int4Linear.from_weight(first.canonical(), first.bias, "gelu")
    x = torch.randn(5, K)
    assert same(first(x), second(x)) and first.same_weight(second)
    before = state(second)
    for buffer in first.buffers():
        buffer.zero_()
    assert equal_states(state(second), before), "from_weight copies what it is given"


def test_what_is_refused() -> None:
    weight = Int4().compress(torch.randn(N, K))
    for arguments, message in (
        ({"activation": "tanh"}, "Int4Linear: activation is 'tanh', expected one of none, relu"),
        ({"bias": torch.zeros(N + 1)}, rf"Int4Linear: bias is \[{N + 1}\], expected \[{N}\]"),
        ({"bias": torch.full((N,), torch.nan)}, "the bias holds NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=message):
            Int4Linear.from_weight(weight, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Int4Linear: the weight is Int8Weight, expected Int4Weight"):
        Int4Linear.from_dense(nn.Linear(K, N), Int8())
    with pytest.raises(TypeError, match="Int8Linear: the weight is Int4Weight, expected Int8Weight"):
        Int8Linear.from_dense(nn.Linear(K, N), Int4())


def test_repr() -> None:
    assert repr(layer("g64 symmetric", "silu", bias=False)) == (
        "Int4Linear(in_features=71, out_features=24, bias=False, group=64, symmetric=True, activation_bits=8, activation=silu)"
    )


# --- copies and state ---------------------------------------------------------------------------------------------------


def through_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("name", [*METHODS, "int8 a16"])
def test_copies(duplicate: Callable[[nn.Module], Any], name: str, same: Same) -> None:
    original: CompressedLinear = weight_only("relu") if name == "int8 a16" else layer(name, "relu")
    made, x = duplicate(original), torch.randn(3, K)
    assert type(made) is type(original) and made.settings == original.settings
    assert equal_states(state(made), state(original)) and same(made(x), original(x))
    made.packed.zero_()
    assert bool(original.packed.any()), "a copy shares no memory"


@EVERY
def test_a_pickle_holds_the_canonical_weight(name: str) -> None:
    original = layer(name)
    assert set(original.__getstate__()["_buffers"]) == {*original.canonical().tensors(), "weight_scale", "bias"}
    assert "packed" in original._buffers, "and the layer itself is as it was"


def test_which_weights_are_the_same_and_may_be_shared() -> None:
    dense = nn.Linear(K, N)
    made = {name: Int4Linear.from_dense(dense, METHODS[name]) for name in METHODS}
    for name, one in made.items():
        for other, two in made.items():
            assert one.same_weight(two) is (name == other), (name, other)
    first = made["g32"]
    second = Int4Linear.from_weight(first.canonical(), torch.randn(N))
    second.share(first)
    model = copy.deepcopy(nn.ModuleList([first, second]))
    assert model[0].packed is model[1].packed, "layers that share a weight go on sharing it"
    assert model[0].packed is not first.packed


@EVERY
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign: bool, name: str, same: Same) -> None:
    source, target = (nn.Sequential(layer(name), nn.Linear(N, 10)) for _ in range(2))
    names = ["weight", "group_scale", *([] if source[0].symmetric else ["group_zero_point"]), "bias"]
    assert [key for key in source.state_dict() if key.startswith("0.")] == [f"0.{name}" for name in names]
    tensors = source[0].canonical().tensors()
    assert equal_states({key: source.state_dict()[f"0.{key}"] for key in tensors}, tensors)
    assert source[0].canonical_bytes() == sum(t.nbytes for t in tensors.values())
    result = target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert equal_states(state(target), state(source))
    x = torch.randn(3, K)
    assert same(target(x), source(x))


State = dict[str, Any]


def put(name: str, make: Callable[[Tensor], Any]) -> Callable[[State], State]:
    return lambda found: {**found, name: make(found[name])}


def without(name: str) -> Callable[[State], State]:
    return lambda found: {key: value for key, value in found.items() if key != name}


def with_first(name: str, value: float) -> Callable[[State], State]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return put(name, change)


BROKEN: dict[str, tuple[Callable[[State], State], str]] = {
    "a row too few": (put("weight", lambda t: t[:-1]), "weight is"),
    "one value a byte": (put("weight", lambda t: t.repeat(1, 2)[:, :K]), "weight is"),
    "a nibble behind the last": (put("weight", lambda t: t | 0xF0), "values has bits set"),
    "a zero point behind the last": (put("group_zero_point", lambda t: t | 0xF0), "zero_point has bits set"),
    "scales in float32": (put("group_scale", lambda t: t.float()), "group_scale is torch.float32"),
    "scales of another group": (put("group_scale", lambda t: t[:, :2]), "group_scale is"),
    "a scale of zero": (with_first("group_scale", 0.0), "a scale is not between"),
    "a scale of NaN": (with_first("group_scale", torch.nan), "a scale is not between"),
    "a scale too large": (with_first("group_scale", 2.0**125), "a scale is not between"),
    "no tensor": (put("weight", lambda _: [1, 2]), "weight is list"),
    "no weight": (without("weight"), "Missing key.*weight"),
    "no scales": (without("group_scale"), "Missing key.*group_scale"),
    "no zero points": (without("group_zero_point"), "Missing key.*group_zero_point"),
    "no bias": (without("bias"), "Missing key.*bias"),
    "something unknown": (lambda found: {**found, "weight_scale": torch.ones(N)}, "Unexpected key.*weight_scale"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("strict", [False, True])
def test_a_bad_state_dict_is_refused_and_the_layer_unchanged(case: str, strict: bool) -> None:
    model, (change, message) = nn.Sequential(layer()), BROKEN[case]
    broken = {f"0.{name}": value for name, value in change(layer().state_dict()).items()}
    before = state(model)
    if not strict and "key" in message:
        model.load_state_dict(broken, strict=False)
    else:
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(broken, strict=strict)
    if case != "something unknown":  # there torch has loaded the rest by the time it complains, as with any module
        assert equal_states(state(model), before)


@EVERY
def test_the_state_of_another_layer_is_refused(name: str) -> None:
    target = layer(name)
    before = state(target)
    others = [layer(other) for other in METHODS if METHODS[other].group != METHODS[name].group]
    for other in (*others, nn.Linear(K, N), Int8Linear.from_dense(nn.Linear(K, N))):
        with pytest.raises(RuntimeError, match=r"weight|group_"):
            target.load_state_dict(other.state_dict())
        assert equal_states(state(target), before)


# --- dtypes, devices and modes ------------------------------------------------------------------------------------------


@EVERY
def test_moving_keeps_the_numbers(name: str, same: Same) -> None:
    """The scales are bfloat16 whatever is asked for: they are inside the packed weight."""
    made, x = layer(name), torch.randn(3, K)
    expected, half, before = made(x), made(x.bfloat16()), state(made)
    moves: list[Callable[[nn.Module], nn.Module]] = [
        lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.cpu(),
        lambda m: m.share_memory(), lambda m: m.requires_grad_(False).train().eval(),
    ]  # fmt: skip
    for move in moves:
        move(nn.Sequential(made))
        assert equal_states(state(made), before)
        assert same(made(x), expected) and same(made(x.bfloat16()), half)


@EVERY
def test_half_precision_autocast_and_inference_mode(name: str, same: Same) -> None:
    made, first = layer(name, "relu"), nn.Linear(K, K)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(2, 3, K).to(dtype)
        y = made(x)
        assert (y.shape, y.dtype) == ((2, 3, N), dtype)
        assert same(y, made(x.float()).to(dtype)), "converted exactly, rounded once"
        with torch.autocast("cpu", dtype):
            assert made(first(x.float())).dtype == dtype
    x = torch.randn(3, K)
    with torch.inference_mode():
        assert same(made(x), made(x.clone())) and made(x).is_inference()
        inside = Int4Linear.from_weight(made.canonical(), made.bias, "relu")
    assert same(inside(x), made(x)) and same(copy.deepcopy(inside)(x), made(x))


@EVERY
def test_meta_device_and_back(name: str, same: Same) -> None:
    source, target = layer(name), layer(name)
    target.to("meta")
    assert target.packed.is_meta and target.weight.is_meta and target.weight.shape == (N, K)
    assert target(torch.empty(3, K, device="meta")).shape == (3, N)
    assert all(tensor.is_meta for tensor in target.state_dict().values())
    assert target.canonical_bytes() == source.canonical_bytes()
    with pytest.raises(NotImplementedError, match="meta tensor"):
        target.canonical()
    target.to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, K)
    assert same(target(x), source(x))


@EVERY
def test_no_rows_and_bad_input(name: str, same: Same) -> None:
    made, good = layer(name, "gelu"), torch.randn(2, K)
    expected = made(good)
    assert made(torch.randn(0, K)).shape == (0, N) and made(torch.randn(4, 0, K)).shape == (4, 0, N)
    x = torch.randn(0, K, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, K)
    with pytest.raises(ValueError, match=rf"int4_linear: x is \[3, 100\], the packed weight expects k = {K}"):
        made(torch.randn(3, 100))
    for requires_grad in (False, True):
        with pytest.raises(TypeError, match=r"int4_linear: x is torch\.float64"):
            made(torch.ones(3, K, dtype=torch.float64, requires_grad=requires_grad))
    with pytest.raises(ValueError, match="x is a scalar"):
        made(torch.tensor(1.0))
    assert same(made(input=good), expected), "and the keyword of nn.Linear"


# --- gradient, torch.compile, torch.export, vmap ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, "int8 a16"])
@pytest.mark.parametrize("shape", [(5, K), (2, 3, K), (K,)])
def test_gradient_of_the_input_is_that_of_the_dense_weight(name: str, shape: tuple[int, ...]) -> None:
    made: CompressedLinear = weight_only() if name == "int8 a16" else layer(name)
    x = torch.randn(shape, requires_grad=True)
    seed = torch.randn(*shape[:-1], N)
    (gradient,) = torch.autograd.grad(made(x), x, seed)
    torch.testing.assert_close(gradient, seed @ made.canonical().decompress())


def network() -> nn.Sequential:
    second = Int4Linear.from_dense(nn.Linear(N, 20, bias=False), Int4(symmetric=True, activation_bits=16))
    return nn.Sequential(layer(activation="gelu"), nn.LayerNorm(N), second).eval()


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_fullgraph(dtype: torch.dtype, same: Same) -> None:
    model = network().to(dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, K).to(dtype)
    with torch.no_grad():
        assert same(compiled(x), model(x))
        assert same(compiled(x.transpose(0, 1)), model(x.transpose(0, 1)))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["g32", "g128 symmetric a16"])
def test_compile_with_a_gradient(name: str) -> None:
    model = layer(name, "silu")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, K, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor(same: Same) -> None:
    model, x = layer(activation="relu").eval(), torch.randn(5, K)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert same(compiled(x), model(x))
        assert same(compiled(x.T.contiguous().T), model(x)), "strides that only the op knows how to walk"


@EVERY
def test_vmap(name: str, same: Same) -> None:
    made, x = layer(name), torch.randn(4, 5, K)
    assert same(torch.func.vmap(made, in_dims=1, out_dims=1)(x), made(x))


def test_export_save_and_load_elsewhere(tmp_path: Path, python: Python) -> None:
    model, x = network(), torch.randn(3, K)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    found = [node.target for node in program.graph.nodes]
    assert found.count(torch.ops.pycompress.int4_linear.default) == 2
    torch.export.save(program, tmp_path / "model.pt2")
    x = torch.randn(9, K)
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    code = """
import sys, torch, pycompress
x, expected = torch.load(sys.argv[2])
y = torch.export.load(sys.argv[1]).module()(x)
torch.testing.assert_close(y, expected)
"""
    result = python(code, tmp_path / "model.pt2", tmp_path / "expected.pt")
    assert result.returncode == 0, result.stderr


# --- in a model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_compress(inplace: bool, block: Build, same: Same) -> None:
    model, x = block(), torch.randn(5, 48)
    dense, weight = model(x), Int4().compress(model.up.weight)  # type: ignore[arg-type, union-attr]
    result = pc.compress(model, {"up": pc.Int4(), "down": pc.Int8(activation_bits=16)}, inplace=inplace)
    assert isinstance(result.up, Int4Linear) and isinstance(result.down, Int8Linear)
    assert equal_weights(result.up.canonical(), weight) and result.up.activation == "gelu"
    up, down = pc.summary(result).layers
    assert (up.method, up.label, up.bits, up.rank, up.density) == ("int4", "int4 g32", None, None, None)
    # 96 x 48 nibbles, 2 groups a row with a bfloat16 scale and half a byte, a float32 bias
    assert up.bytes == 96 * (24 + 4 + 1) + 4 * 96 == result.up.canonical_bytes() + 4 * 96
    assert (down.method, down.label) == ("int8", "int8 a16")
    assert up.error is not None and 0.05 < up.error < 0.15
    assert "int4 g32+gelu" in str(pc.summary(result)) and "int8 a16" in str(pc.summary(result))
    assert (result(x) - dense).norm() < 0.1 * dense.norm() and same(result(x), copy.deepcopy(result)(x))


def test_what_stays_dense() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "tokens": nn.Embedding(9, 8), "head": nn.Linear(8, 3)})
    result = pc.compress(model, pc.Int4())
    assert set(compressed_layers(result)) == {"head"}
    reasons = {record.name: record.reason for record in pc.summary(result).layers}
    assert reasons == {"conv": "int4 takes linear layers only", "head": ""}


@pytest.mark.parametrize("method", [*METHODS.values(), Int8(16)], ids=repr)
def test_tied_layers_stay_tied(method: Method, same: Same) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    result = pc.compress(model, method)
    assert result[0].packed is result[2].packed
    first, second = (record.bytes for record in pc.summary(result).layers)
    assert first == result[0].canonical_bytes() + 64 and second == 64
    mixed = pc.compress(model, {"0": method, "2": Int8(7)})
    assert mixed[0].packed is not mixed[2].packed


@pytest.mark.parametrize("inplace", [False, True])
def test_calibration_reaches_the_layers(inplace: bool) -> None:
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K), nn.Tanh(), nn.Linear(K, N)).eval()
    model[4].weight = model[0].weight  # told of the inputs of both, so that they go on sharing it
    x = torch.randn(300, K) @ torch.randn(K, K)
    with pc.calibrate(model) as calibration:
        model(x)
    own, rounded = (method.compress(model[2].weight) for method in (Int4(inputs=calibration["2"]), Int4()))
    plan = {"2": pc.Int4(), "*": pc.Int4(activation_bits=16)}
    dense, plain = model(x), pc.compress(model, plan)(x)
    result = pc.compress(model, plan, calibration=calibration, inplace=inplace)
    assert equal_weights(result[2].canonical(), own)
    assert not equal_weights(own, rounded)
    assert result[0].packed is result[4].packed
    assert (result(x) - dense).norm() < (plain - dense).norm()


def test_a_layer_that_calibration_never_saw() -> None:
    model = nn.Sequential(nn.Linear(K, N))
    with pytest.raises(ValueError, match="the calibration never saw 0"):
        pc.compress(model, pc.Int4(), calibration={})
    assert isinstance(pc.compress(model, pc.Int8(16), calibration={})[0], Int8Linear)


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("method", [Int4(), Int4(activation_bits=16), Int8(16)], ids=repr)
def test_only_if_faster(faster: bool, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(dense: Callable[[], Tensor], compressed: Callable[[], Tensor]) -> tuple[float, float]:
        assert dense().shape == compressed().shape
        return (20.0, 10.0) if faster else (10.0, 20.0)

    monkeypatch.setattr("pycompress.model.interleaved_us", clock)
    model, x = nn.Sequential(nn.Linear(K, N)), torch.randn(2, K)
    result = pc.compress(model, method, example_inputs=x, only_if_faster=True)
    (record,) = pc.summary(result).layers
    assert (record.method, record.dense_us, record.us) == (
        (method.name, 20.0, 10.0) if faster else (None, 10.0, 20.0)
    )  # fmt: skip
    assert bool(compressed_layers(result)) is faster
