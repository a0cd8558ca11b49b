"""LowRankLinear as a module: its state, its copies, its dtypes and devices, its gradient. What it computes: tests of the ops."""

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

from pycompress import ops
from pycompress.methods import Int4, Int8, LowRankWeight, Sparse
from pycompress.methods.dense import Dense
from pycompress.methods.low_rank import LowRank
from pycompress.methods.weight import Method
from pycompress.nn import Int8Linear, LowRankLinear, SparseLinear

Forked = Callable[..., Any]
Python = Callable[..., subprocess.CompletedProcess[str]]
Same = Callable[[Tensor, Tensor], bool]
K, N = 36, 24


def low_rank(rank: int = 6, bits: int = 32, residual: Method | None = None, **options: Any) -> LowRank:
    return LowRank(rank, bits=bits, residual=residual, rank_guard=False, **options)


METHODS = {
    "float32": low_rank(),
    "int8": low_rank(bits=8),
    "int8 in 8 bits": low_rank(bits=8, activation_bits=8),
    "rank 1": low_rank(1),
    "the whole rank": low_rank(N),
    "float32 + int8": low_rank(residual=Int8()),
    "float32 + int4": low_rank(residual=Int4()),
    "float32 + sparse": low_rank(residual=Sparse(0.2)),
    "float32 + dense": low_rank(residual=Dense()),
    "float32 + sparse int8": low_rank(residual=Sparse(0.2, bits=8)),
    "int8 + int8": low_rank(bits=8, residual=Int8(activation_bits=7)),
    "int8 + int4": low_rank(bits=8, residual=Int4(64, symmetric=True)),
    "int8 + sparse int8": low_rank(bits=8, residual=Sparse(0.2, "16x4", bits=8)),
    "int8 + sparse": low_rank(bits=8, residual=Sparse(0.2)),
    "int8 + dense": low_rank(bits=8, residual=Dense()),
    "a residual of nothing": low_rank(residual=Sparse(0.0)),
}
EVERY = pytest.mark.parametrize("name", METHODS)
SOME = pytest.mark.parametrize("name", ["float32", "int8 + int8", "float32 + sparse"])
LABELS = {
    "float32": "low rank 6", "int8": "low rank 6 int8", "the whole rank": "low rank 24", "int8 + dense": "low rank 6 int8 + dense",
    "float32 + int8": "low rank 6 + int8", "float32 + sparse int8": "low rank 6 + sparse",
    "float32 + int4": "low rank 6 + int4", "int8 + int4": "low rank 6 int8 + int4",
}  # fmt: skip


def layer(name: str = "float32", activation: str = "none", *, bias: bool = True) -> LowRankLinear:
    return LowRankLinear.from_dense(nn.Linear(K, N, bias=bias), METHODS[name], activation)


def state(module: nn.Module) -> dict[str, Tensor]:
    """Everything that decides what the layer computes."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal_weights(a: LowRankWeight, b: LowRankWeight) -> bool:
    return equal_states(a.tensors(), b.tensors()) and a.settings() == b.settings() and a.shape == b.shape


# --- making one ---------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("bias", [False, True])
def test_from_dense(name: str, bias: bool, same: Same) -> None:
    dense, method = nn.Linear(K, N, bias=bias), METHODS[name]
    made, weight = LowRankLinear.from_dense(dense, method), method.compress(dense.weight)
    assert (made.in_features, made.out_features, made.activation) == (K, N, "none")
    assert (made.rank, made.bits, made.activation_bits) == (weight.rank, weight.bits, weight.activation_bits)
    assert made.residual == ("" if weight.residual is None else weight.residual.name)
    assert made.weight_scale is None
    assert (made.bias is None) is not bias
    assert equal_weights(made.canonical(), weight)
    assert torch.equal(made.weight, weight.decompress())
    assert not list(made.parameters())
    torch.testing.assert_close(LowRankLinear._dense(made.packed, (N, K), None), made.weight)
    x = torch.randn(5, K)
    assert same(made(x), ops.low_rank_linear(x, made.packed, N, dense.bias))


@EVERY
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_it_computes_what_the_weight_says(name: str, activation: str) -> None:
    made, x = layer(name, activation), torch.randn(7, K)
    weight, bias = made.canonical(), made.bias
    assert bias is not None
    down, up = (factor.double() for factor in weight.factors())
    t = x.double() @ down.T
    exact = t @ up.T + bias.double()
    slack = torch.full((7, N), 1e-5, dtype=torch.float64)

    # A quantized row lies within a step of itself: half of it by rounding, half by the zero point.
    def step(rows: Tensor, bits: int) -> Tensor:
        span = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
        return (span / (2**bits - 1)).double()[:, None]

    if weight.activation_bits is not None:
        first = step(x, weight.activation_bits) * down.abs().sum(1)
        second = step(t, weight.activation_bits) + 2 * first.amax(1, keepdim=True)  # t itself is off by `first`
        slack += first @ up.abs().T + second * up.abs().sum(1)
    if weight.residual is not None:
        rest = weight.residual.decompress().double()
        exact += x.double() @ rest.T
        bits = made.settings["residual"].get("activation_bits")
        slack += 0 if bits is None else step(x, bits) * rest.abs().sum(1)
    expected = nn.functional.gelu(exact) if activation == "gelu" else exact
    assert ((made(x) - expected).abs() <= 1.13 * slack).all(), "GELU's slope is at most 1.13"


def test_without_a_method_all_of_the_weight_stays() -> None:
    dense = nn.Linear(K, N)
    torch.testing.assert_close(LowRankLinear.from_dense(dense).weight, dense.weight.detach())
    thin = nn.Linear(K, N)
    with torch.no_grad():
        thin.weight.copy_(torch.randn(N, 3) @ torch.randn(3, K))
    assert LowRankLinear.from_dense(thin).rank == 3


@SOME
def test_shares_no_memory_with_the_dense_layer(name: str) -> None:
    dense = nn.Linear(K, N)
    made = LowRankLinear.from_dense(dense, METHODS[name])
    before = state(made)
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    assert equal_states(state(made), before)


@EVERY
def test_canonical_round_trip(name: str, same: Same) -> None:
    first = layer(name, "gelu")
    second = LowRankLinear.from_weight(first.canonical(), first.bias, "gelu")
    x = torch.randn(5, K)
    assert same(first(x), second(x)) and first.same_weight(second)
    before = state(second)
    for buffer in first.buffers():
        buffer.zero_()
    assert equal_states(state(second), before), "from_weight copies what it is given"


def test_what_is_refused() -> None:
    weight = METHODS["float32"].compress(torch.randn(N, K))
    for arguments, message in (
        ({"activation": "tanh"}, "LowRankLinear: activation is 'tanh', expected one of none, relu"),
        ({"bias": torch.zeros(N + 1)}, rf"LowRankLinear: bias is \[{N + 1}\], expected \[{N}\]"),
        ({"bias": torch.full((N,), torch.nan)}, "the bias holds NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=message):
            LowRankLinear.from_weight(weight, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LowRankLinear: the weight is Int8Weight, expected LowRankWeight"):
        LowRankLinear.from_dense(nn.Linear(K, N), Int8())
    with pytest.raises(TypeError, match="SparseLinear: the weight is LowRankWeight, expected SparseWeight"):
        SparseLinear.from_dense(nn.Linear(K, N), METHODS["float32"])


def test_repr_and_label() -> None:
    assert repr(layer()) == "LowRankLinear(in_features=36, out_features=24, bias=True, rank=6, bits=32)"
    assert repr(layer("int8 + int8", "silu", bias=False)) == (
        "LowRankLinear(in_features=36, out_features=24, bias=False, rank=6, bits=8, activation_bits=7, residual=int8, "
        "activation=silu)"
    )
    assert {name: layer(name).label for name in LABELS} == LABELS
    assert layer("int8 + dense").to("meta").label == LABELS["int8 + dense"]


# --- copies -------------------------------------------------------------------------------------------------------------


def through_pickle(module: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(module))
    return copied


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


@EVERY
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies(duplicate: Callable[[nn.Module], nn.Module], name: str, same: Same) -> None:
    original = layer(name, "gelu", bias=name != "rank 1").eval()
    original.note = "kept"  # type: ignore[assignment]
    original.register_buffer("extra", torch.randn(3))
    copied = duplicate(original)
    assert type(copied) is LowRankLinear
    assert equal_states(state(copied), state(original))
    assert repr(copied) == repr(original)
    assert (copied.training, copied.note, copied.settings) == (False, "kept", original.settings)
    assert copied.settings is not original.settings
    assert list(copied.state_dict()) == list(original.state_dict())
    x = torch.randn(3, K)
    assert same(copied(x), original(x))
    before = state(copied)
    for buffer in original.buffers():
        buffer.zero_()
    assert equal_states(state(copied), before), "a copy shares no memory"


@EVERY
def test_a_pickle_holds_the_canonical_weight(name: str) -> None:
    """Not the packed one, whose layout belongs to this processor."""
    original = layer(name)
    buffers = original.__getstate__()["_buffers"]
    assert set(buffers) == {*original.canonical().tensors(), "weight_scale", "bias"}
    assert "packed" in original._buffers, "and the layer itself is as it was"


def test_which_weights_are_the_same_and_may_be_shared() -> None:
    dense = nn.Linear(K, N)
    made = {name: LowRankLinear.from_dense(dense, METHODS[name]) for name in METHODS}
    for name, one in made.items():
        for other, two in made.items():
            assert one.same_weight(two) is (name == other), (name, other)
    assert not made["float32"].same_weight(Int8Linear.from_dense(dense))
    first = made["int8 + int8"]
    second = LowRankLinear.from_weight(first.canonical(), torch.randn(N))
    second.share(first)
    model = copy.deepcopy(nn.ModuleList([first, second]))
    assert model[0].packed is model[1].packed, "layers that share a weight go on sharing it"
    assert model[0].packed is not first.packed


# --- state_dict ---------------------------------------------------------------------------------------------------------


@EVERY
def test_state_dict_is_canonical(name: str) -> None:
    made = layer(name)
    found, tensors = made.state_dict(), made.canonical().tensors()
    scales = ["down_scale", "up_scale"] if made.bits == 8 else []
    kind = made.residual
    rest = {"": [], "sparse": ["weight_mask", "weight_values"], "int4": ["weight", "group_scale"]}.get(kind, ["weight"])
    rest += [one for one in ("weight_scale", "group_zero_point") if f"residual_{one}" in tensors]
    assert list(found) == ["down", "up", *scales, *(f"residual_{one}" for one in rest), "bias"]
    assert equal_states({key: value for key, value in found.items() if key != "bias"}, tensors)
    assert set(nn.Sequential(made).state_dict()) == {f"0.{key}" for key in found}
    assert made.canonical_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())


@EVERY
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool, name: str, same: Same) -> None:
    source, target = (nn.Sequential(layer(name), nn.Linear(N, 10)) for _ in range(2))
    result = target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert equal_states(state(target), state(source))
    x = torch.randn(3, K)
    assert same(target(x), source(x))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (low_rank(6), low_rank(11)),
        (low_rank(6, 8, Int8()), low_rank(2, 8, Int8())),
        (low_rank(6, residual=Int4()), low_rank(2, residual=Int4())),
        (low_rank(6, residual=Sparse(0.1)), low_rank(6, residual=Sparse(0.5))),
        (low_rank(3, 8, Sparse(0.5, bits=8)), low_rank(9, 8, Sparse(0.0, bits=8))),
    ],
)
def test_a_state_dict_with_other_sizes(one: LowRank, other: LowRank, same: Same) -> None:
    """As layers have them whose rank, or whose residual, the weights decide."""
    source, target = (LowRankLinear.from_dense(nn.Linear(K, N), method) for method in (one, other))
    target.load_state_dict(source.state_dict())
    assert (target.rank, target.settings) == (source.rank, source.settings)
    x = torch.randn(3, K)
    assert target.same_weight(source) and same(target(x), source(x))


State = dict[str, Any]


def put(name: str, make: Callable[[Tensor], Any]) -> Callable[[State], State]:
    return lambda found: {**found, name: make(found[name])}


def without(*names: str) -> Callable[[State], State]:
    return lambda found: {key: value for key, value in found.items() if key not in names}


def with_first(name: str, value: float) -> Callable[[State], State]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return put(name, change)


BROKEN: dict[str, tuple[Callable[[State], State], str]] = {
    "a row of down too few": (put("down", lambda t: t[:-1]), "up is|down_scale is"),
    "down too narrow": (put("down", lambda t: t[:, 1:]), "down is"),
    "down in float32": (put("down", lambda t: t.float()), "down is torch.float32"),
    "down a number": (put("down", lambda t: t[0, 0]), "down"),
    "down no tensor": (put("down", lambda _: [1, 2]), "down is list"),
    "up turned": (put("up", lambda t: t.T), "up is"),
    "up of -128": (with_first("up", -128), "up holds -128"),
    "a scale of zero": (with_first("up_scale", 0.0), "up_scale is not a positive finite number"),
    "a scale of NaN": (with_first("down_scale", torch.nan), "down_scale is not a positive finite number"),
    "a residual too short": (put("residual_weight", lambda t: t[:-1]), "weight is"),
    "a residual in float32": (put("residual_weight", lambda t: t.float()), "weight is torch.float32"),
    "a residual's scale of Inf": (with_first("residual_weight_scale", torch.inf), "a scale is not a positive finite number"),
    "no up": (without("up"), "Missing key.*up"),
    "no residual": (without("residual_weight"), "Missing key.*residual_weight"),
    "no bias": (without("bias"), "Missing key.*bias"),
    "a bias of NaN": (with_first("bias", torch.nan), "the bias holds NaN"),
    "something unknown": (lambda found: {**found, "zero_point": torch.zeros(3)}, "Unexpected key.*zero_point"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("strict", [False, True])
def test_a_bad_state_dict_is_refused_and_the_layer_unchanged(case: str, strict: bool) -> None:
    model, (change, message) = nn.Sequential(layer("int8 + int8")), BROKEN[case]
    broken = {f"0.{name}": value for name, value in change(layer("int8 + int8").state_dict()).items()}
    before = state(model)
    if not strict and "key" in message:
        model.load_state_dict(broken, strict=False)
    else:
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(broken, strict=strict)
    if case != "something unknown":  # there torch has loaded the rest by the time it complains, as with any module
        assert equal_states(state(model), before)


@pytest.mark.parametrize("name", ["int8", "float32 + int8", "float32 + sparse"])
def test_the_state_of_another_layer_is_refused(name: str) -> None:
    target = layer(name)
    before = state(target)
    others = [layer("float32"), nn.Linear(K, N), Int8Linear.from_dense(nn.Linear(K, N))]
    for other in (*others, LowRankLinear.from_dense(nn.Linear(K + 1, N), METHODS[name])):
        with pytest.raises(RuntimeError, match=r"down|residual_"):
            target.load_state_dict(other.state_dict())
        assert equal_states(state(target), before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Int4(64), "residual_group_scale"),  # fewer of them
        (Int4(symmetric=True), "residual_group_zero_point"),
        (Int8(), "residual_group_scale"),
    ],
)
def test_another_grid_of_int4_is_refused(other: Method, message: str) -> None:
    target = layer("float32 + int4")
    before = state(target)
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(LowRankLinear.from_dense(nn.Linear(K, N), low_rank(residual=other)).state_dict())
    assert equal_states(state(target), before)


# --- dtypes, devices and modes ------------------------------------------------------------------------------------------


@SOME
def test_moving_keeps_the_numbers(name: str, same: Same) -> None:
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
        inside = LowRankLinear.from_weight(made.canonical(), made.bias, "relu")
    assert same(inside(x), made(x)) and same(copy.deepcopy(inside)(x), made(x))


@EVERY
def test_meta_device_and_back(name: str, same: Same) -> None:
    source, target = layer(name), layer(name)
    settings = copy.deepcopy(target.settings)
    target.to("meta")
    assert target.packed.is_meta and target.weight.is_meta
    assert target(torch.empty(3, K, device="meta")).shape == (3, N)
    assert all(tensor.is_meta for tensor in target.state_dict().values())
    assert target.settings == settings and target.canonical_bytes() == source.canonical_bytes()
    target.to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, K)
    assert same(target(x), source(x))


@pytest.mark.parametrize("use", ["canonical", "deepcopy", "pickle", "call"])
def test_the_weight_of_a_layer_on_meta(use: str, forked: Forked) -> None:
    """There is none: an error or a tensor on meta, never a read of memory that is not there."""
    target = layer("int8 + int8").to("meta")
    uses: dict[str, Callable[[], object]] = {
        "canonical": target.canonical,
        "deepcopy": lambda: copy.deepcopy(target).packed.is_meta,
        "pickle": lambda: bool(pickle.dumps(target)),
        "call": lambda: target(torch.randn(3, K)),
    }

    def run() -> str:
        try:
            return str(uses[use]() is True)
        except Exception as error:
            return type(error).__name__

    assert forked(run) in {"True", "ValueError", "RuntimeError", "NotImplementedError"}


@EVERY
def test_no_rows_and_bad_input(name: str, same: Same) -> None:
    made, good = layer(name, "gelu"), torch.randn(2, K)
    expected = made(good)
    assert made(torch.randn(0, K)).shape == (0, N) and made(torch.randn(4, 0, K)).shape == (4, 0, N)
    x = torch.randn(0, K, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, K)
    with pytest.raises(ValueError, match=rf"low_rank_linear: x is \[3, 100\], the packed weight expects k = {K}"):
        made(torch.randn(3, 100))
    for requires_grad in (False, True):
        with pytest.raises(TypeError, match=r"low_rank_linear: x is torch\.float64"):
            made(torch.ones(3, K, dtype=torch.float64, requires_grad=requires_grad))
    with pytest.raises(ValueError, match="x is a scalar"):
        made(torch.tensor(1.0))
    assert same(made(input=good), expected), "and the keyword of nn.Linear"


# --- gradient -----------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("shape", [(5, K), (2, 3, K), (K,)])
def test_gradient_of_the_input_is_that_of_the_dense_weight(name: str, shape: tuple[int, ...]) -> None:
    made, x = layer(name), torch.randn(shape, requires_grad=True)
    seed = torch.randn(*shape[:-1], N)
    (gradient,) = torch.autograd.grad(made(x), x, seed)
    (expected,) = torch.autograd.grad(nn.functional.linear(x, made.weight, made.bias), x, seed)
    torch.testing.assert_close(gradient, expected)


@SOME
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gradient_through_the_activation(activation: str, name: str) -> None:
    made, x = layer(name, activation), torch.randn(5, K, requires_grad=True)
    y = made(x)
    seed = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, seed)
    sums = LowRankLinear.from_weight(made.canonical(), made.bias)(x.detach()).requires_grad_()
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda v: v, "relu": nn.functional.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu,
        "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
    }  # fmt: skip
    (inner,) = torch.autograd.grad(functions[activation](sums), sums, seed)
    torch.testing.assert_close(gradient, inner @ made.weight)
    torch.testing.assert_close(y, made(x.detach()), rtol=1e-5, atol=1e-5)


# --- torch.compile, torch.export, vmap ----------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> nn.Sequential:
    second = LowRankLinear.from_dense(nn.Linear(N, 20, bias=False), low_rank(5, 8, Int8()))
    return nn.Sequential(layer(activation="gelu"), nn.LayerNorm(N), second).eval()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compile_fullgraph(dtype: torch.dtype, same: Same) -> None:
    model = network().to(dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, K).to(dtype)
    with torch.no_grad():
        assert same(compiled(x), model(x))
        assert same(compiled(x.transpose(0, 1)), model(x.transpose(0, 1)))


@pytest.mark.usefixtures("fresh_dynamo")
@EVERY
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
    model, x = layer("int8 + int8", "relu").eval(), torch.randn(5, K)
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
    assert found.count(torch.ops.pycompress.low_rank_linear.default) == 2
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
