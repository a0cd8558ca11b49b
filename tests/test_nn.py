"""Int8Linear as a module: its state, its copies, its dtypes and devices, its gradient."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.methods.int8 import Int8, Int8Weight
from pycompress.nn import Int8Linear

Forked = Callable[..., Any]
Same = Callable[[Tensor, Tensor], bool]
K, N = 36, 24


def layer(activation: str = "none", *, bias: bool = True, bits: int = 8, weight_bits: int = 8) -> Int8Linear:
    return Int8Linear.from_dense(nn.Linear(K, N, bias=bias), Int8(bits, weight_bits), activation)


def state(module: nn.Module) -> dict[str, Tensor]:
    """Everything that decides what the layer computes."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- making one ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_from_dense(bits: int, bias: bool, same: Same) -> None:
    dense = nn.Linear(K, N, bias=bias)
    method = Int8(bits, bits)
    made = Int8Linear.from_dense(dense, method)
    weight = method.compress(dense.weight)
    assert (made.in_features, made.out_features) == (K, N)
    assert (made.activation_bits, made.weight_bits, made.activation) == (bits, bits, "none")
    assert torch.equal(made.weight, weight.values)
    assert torch.equal(made.weight_scale, weight.scale)
    assert (made.bias is None) is not bias
    x = torch.randn(5, K)
    packed = ops.int8_pack(weight.values, bits)
    assert same(made(x), ops.int8_linear(x, packed, weight.scale, dense.bias))
    assert not list(made.parameters())


def test_shares_no_memory_with_the_dense_layer() -> None:
    dense = nn.Linear(K, N)
    made = Int8Linear.from_dense(dense)
    before = state(made)
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    assert equal_states(state(made), before)


def test_canonical_round_trip(same: Same) -> None:
    first = layer("gelu", bits=7, weight_bits=7)
    weight = first.canonical()
    assert isinstance(weight, Int8Weight)
    second = Int8Linear.from_weight(weight, first.bias, "gelu")
    x = torch.randn(5, K)
    assert same(first(x), second(x))
    before = state(second)
    first.weight_scale.zero_()
    assert equal_states(state(second), before), "from_weight copies what it is given"


def test_bf16_dense_layer() -> None:
    dense = nn.Linear(K, N).bfloat16()
    made = Int8Linear.from_dense(dense)
    assert made.weight_scale.dtype == torch.float32
    assert made.bias is not None
    assert torch.equal(made.bias, dense.bias.float())
    assert made(torch.randn(2, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "tanh"}, "activation is 'tanh', expected one of none, relu"),
        ({"bias": torch.zeros(N + 1)}, rf"bias is \[{N + 1}\], expected \[{N}\]"),
        ({"bias": torch.zeros(N, 1)}, "bias is"),
        ({"bias": torch.full((N,), torch.nan)}, "the bias holds NaN or Inf"),
        ({"bias": torch.full((N,), torch.inf)}, "the bias holds NaN or Inf"),
        ({"bias": torch.full((N,), 1e300, dtype=torch.float64)}, "the bias holds NaN or Inf"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    weight = Int8().compress(torch.randn(N, K))
    with pytest.raises(ValueError, match=message):
        Int8Linear.from_weight(weight, **arguments)


def test_a_dense_layer_with_nan_is_refused() -> None:
    dense = nn.Linear(K, N)
    with torch.no_grad():
        dense.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        Int8Linear.from_dense(dense)


def test_takes_the_keyword_of_nn_linear(same: Same) -> None:
    """Models that call ``self.fc(input=x)`` go on working."""
    made, x = layer(), torch.randn(2, K)
    assert same(made(input=x), made(x))


def test_repr() -> None:
    assert repr(layer()) == ("Int8Linear(in_features=36, out_features=24, bias=True, activation_bits=8, weight_bits=8)")
    assert repr(layer("silu", bias=False, bits=7, weight_bits=7)) == (
        "Int8Linear(in_features=36, out_features=24, bias=False, activation_bits=7, weight_bits=7, activation=silu)"
    )
    assert "in_features" in repr(layer().to("meta"))


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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("arguments", [{}, {"bias": False, "activation": "gelu", "bits": 7, "weight_bits": 7}])
def test_copies(duplicate: Callable[[nn.Module], nn.Module], arguments: dict[str, Any], same: Same) -> None:
    original = layer(**arguments).eval()
    original.note = "kept"  # type: ignore[assignment]
    copied = duplicate(original)
    assert type(copied) is Int8Linear
    assert copied is not original
    assert equal_states(state(copied), state(original))
    assert repr(copied) == repr(original)
    assert (copied.training, copied.note) == (False, "kept")
    x = torch.randn(3, K)
    assert same(copied(x), original(x))
    before = state(copied)
    original.weight_scale.zero_()
    assert equal_states(state(copied), before), "a copy shares no memory"


def test_a_pickle_holds_the_canonical_weight() -> None:
    """Not the packed one, whose layout belongs to this processor."""
    original = layer()
    assert original.__getstate__()["_buffers"]["weight"].dtype == torch.int8
    assert torch.equal(original.__getstate__()["_buffers"]["weight"], original.weight)
    assert "packed" not in original.__getstate__()["_buffers"]
    assert original.packed.dtype == torch.uint8, "and the layer itself is as it was"


def test_layers_that_share_a_weight_go_on_sharing_it() -> None:
    first = layer(bias=False)
    second = Int8Linear.from_weight(first.canonical(), torch.randn(N))
    second.share(first)
    model = copy.deepcopy(nn.ModuleList([first, second]))
    assert model[0].packed is model[1].packed
    assert model[0].weight_scale is model[1].weight_scale
    assert model[0].packed is not first.packed


def test_one_module_under_two_names_stays_one() -> None:
    one = layer()
    model = copy.deepcopy(nn.ModuleDict({"a": one, "b": one}))
    assert model["a"] is model["b"]


def test_a_model_around_it(same: Same) -> None:
    model = nn.Sequential(layer(), nn.LayerNorm(N), nn.Dropout(0.5))
    copied = copy.deepcopy(model).eval()
    assert model.training
    assert not copied.training
    assert not copied[0].training
    x = torch.randn(3, K)
    assert same(copied(x), model.eval()(x))


# --- state_dict ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_is_canonical(bias: bool) -> None:
    made = layer(bias=bias)
    found = made.state_dict()
    assert set(found) == {"weight", "weight_scale", *(["bias"] if bias else [])}
    assert found["weight"].dtype == torch.int8
    assert torch.equal(found["weight"], made.weight)
    assert found["weight_scale"].dtype == torch.float32
    assert set(nn.Sequential(made).state_dict()) == {f"0.{name}" for name in found}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bits", [7, 8])
def test_state_dict_round_trip(assign: bool, bits: int, same: Same) -> None:
    source = nn.Sequential(layer(bits=bits), layer_of(N, 10))
    target = nn.Sequential(layer(bits=bits), layer_of(N, 10))
    x = torch.randn(3, K)
    assert not torch.equal(source(x), target(x))
    result = target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert equal_states(state(target), state(source))
    assert same(target(x), source(x))


def layer_of(k: int, n: int) -> Int8Linear:
    return Int8Linear.from_dense(nn.Linear(k, n))


def test_state_dict_through_a_file(same: Same) -> None:
    source, target, file = layer(), layer(), io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file))
    x = torch.randn(3, K)
    assert same(target(x), source(x))


def changed(found: dict[str, Tensor], name: str, value: Any) -> dict[str, Any]:
    return {**found, name: value}


def without(found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in found.items() if key != name}


def with_scale(found: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    scale = found["weight_scale"].clone()
    scale[3] = value
    return {**found, "weight_scale": scale}


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], str]] = {
    "weight of another shape": (lambda s: changed(s, "weight", s["weight"][:-1]), "weight"),
    "weight transposed": (lambda s: changed(s, "weight", s["weight"].T), "weight"),
    "weight in float32": (lambda s: changed(s, "weight", s["weight"].float()), "weight"),
    "weight in int32": (lambda s: changed(s, "weight", s["weight"].int()), "weight"),
    "weight of -128": (lambda s: changed(s, "weight", torch.full_like(s["weight"], -128)), "weight"),
    "weight is no tensor": (lambda s: changed(s, "weight", [1, 2, 3]), "weight"),
    "weight missing": (lambda s: without(s, "weight"), "Missing key.*weight"),
    "scale missing": (lambda s: without(s, "weight_scale"), "Missing key.*weight_scale"),
    "bias missing": (lambda s: without(s, "bias"), "Missing key.*bias"),
    "scale of another shape": (lambda s: changed(s, "weight_scale", s["weight_scale"][:-1]), "scale"),
    "scale in float64": (lambda s: changed(s, "weight_scale", s["weight_scale"].double()), "scale"),
    "scale of zero": (lambda s: with_scale(s, 0.0), "scale"),
    "scale negative": (lambda s: with_scale(s, -1.0), "scale"),
    "scale NaN": (lambda s: with_scale(s, float("nan")), "scale"),
    "scale infinite": (lambda s: with_scale(s, float("inf")), "scale"),
    "bias of another shape": (lambda s: changed(s, "bias", s["bias"][:-1]), "bias"),
    "something unknown": (lambda s: changed(s, "zero_point", torch.zeros(3)), "Unexpected key.*zero_point"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("inside", [False, True])
def test_a_bad_state_dict_is_refused_and_the_layer_unchanged(case: str, inside: bool) -> None:
    target = layer()
    change, message = BROKEN[case]
    model: nn.Module = nn.Sequential(target) if inside else target
    broken = change(layer().state_dict())
    if inside:
        broken = {f"0.{name}": value for name, value in broken.items()}
    before = state(target)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(broken)
    if case != "something unknown":  # there torch has loaded the rest by the time it complains, as with any module
        assert equal_states(state(target), before)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_scale_is_refused_without_a_weight_beside_it(value: float) -> None:
    target = layer()
    before = state(target)
    with pytest.raises(RuntimeError, match="scale"):
        target.load_state_dict({"weight_scale": torch.full((N,), value)}, strict=False)
    assert equal_states(state(target), before)


def test_weights_beyond_seven_bits_are_refused() -> None:
    target = layer(weight_bits=7)
    found = target.state_dict()
    found["weight"] = torch.full_like(found["weight"], 64)
    with pytest.raises(RuntimeError, match=r"\[-63, 63\]"):
        target.load_state_dict(found)


def test_a_dense_state_dict_is_refused() -> None:
    target = layer()
    before = state(target)
    with pytest.raises(RuntimeError, match="weight"):
        target.load_state_dict(nn.Linear(K, N).state_dict())
    assert torch.equal(target.packed, before["packed"])
    assert torch.equal(target.weight_scale, before["weight_scale"])


# --- dtypes and devices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.cpu(),
        lambda m: m.share_memory(),
        lambda m: m.requires_grad_(False).train().eval(),
    ],
)
def test_moving_keeps_the_numbers(move: Callable[[nn.Module], nn.Module], same: Same) -> None:
    made, x = layer(), torch.randn(3, K)
    expected, half = made(x), made(x.bfloat16())
    before = state(made)
    moved = move(nn.Sequential(made))
    assert moved[0] is made  # type: ignore[index]
    assert equal_states(state(made), before)
    assert same(made(x), expected)
    assert same(made(x.bfloat16()), half)


def test_a_model_in_bfloat16(same: Same) -> None:
    model = nn.Sequential(nn.LayerNorm(K), layer(), nn.Linear(N, 3)).bfloat16()
    assert model(torch.randn(3, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_meta_device_and_back(forked: Forked, same: Same) -> None:
    source = layer()
    target = layer().to("meta")
    assert target.packed.is_meta
    assert target(torch.empty(3, K, device="meta")).shape == (3, N)
    target.to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, K)
    assert same(target(x), source(x))


@pytest.mark.parametrize("use", ["weight", "canonical", "state_dict", "deepcopy", "pickle"])
def test_the_weight_of_a_layer_on_meta(use: str, forked: Forked) -> None:
    """There is none: an error or a tensor on meta, never a read of memory that is not there."""
    target = layer().to("meta")
    uses: dict[str, Callable[[], object]] = {
        "weight": lambda: target.weight.is_meta,
        "canonical": target.canonical,
        "state_dict": lambda: target.state_dict()["weight"].is_meta,
        "deepcopy": lambda: copy.deepcopy(target).packed.is_meta,
        "pickle": lambda: bool(pickle.dumps(target)),
    }

    def run() -> str:
        try:
            return str(uses[use]() is True)
        except Exception as error:
            return type(error).__name__

    assert forked(run) in {"True", "ValueError", "RuntimeError", "NotImplementedError"}


def test_an_input_on_another_device_than_the_layer() -> None:
    """A result of real memory that nothing was written to would be the worst answer."""
    with pytest.raises((RuntimeError, ValueError)):
        layer().to("meta")(torch.randn(3, K))


def test_kernels_for_cuda_name_the_devices() -> None:
    """What torch calls for tensors on CUDA, called with the tensors at hand (a machine without CUDA has no others)."""
    made = layer()
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    operation = torch.ops.pycompress.int8_linear.default
    with pytest.raises(RuntimeError, match="on cpu, expected all of them on one CUDA device or on the CPU"):
        operation.redispatch(cuda, torch.randn(3, K), made.packed, made.weight_scale, made.bias, "none")


# --- modes --------------------------------------------------------------------------------------------------------------


def test_inference_mode(same: Same) -> None:
    made, x = layer("gelu"), torch.randn(3, K)
    expected = made(x)
    with torch.inference_mode():
        assert same(made(x), expected)
        inside = torch.randn(3, K)
        y = made(inside)
        assert y.is_inference()
    assert same(made(inside.clone()), y)


def test_a_layer_made_in_inference_mode(same: Same) -> None:
    dense, x = nn.Linear(K, N), torch.randn(3, K)
    with torch.inference_mode():
        made = Int8Linear.from_dense(dense)
    assert same(made(x), Int8Linear.from_dense(dense)(x))
    assert copy.deepcopy(made)(x).shape == (3, N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, same: Same) -> None:
    """Under autocast the dense layers before it emit half precision; the layer takes what comes."""
    first, made = nn.Linear(K, K), layer()
    x = torch.randn(3, K)
    with torch.autocast("cpu", dtype):
        hidden = first(x)
        assert hidden.dtype == dtype
        y = made(hidden)
        assert y.dtype == dtype
        assert same(made(x).float(), made(x).float())
    assert same(y, made(hidden))


def test_no_grad_and_detached_results() -> None:
    made, x = layer(), torch.randn(3, K, requires_grad=True)
    with torch.no_grad():
        assert not made(x).requires_grad
    assert made(x).requires_grad
    assert not made(x.detach()).requires_grad


# --- gradient -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, K), (2, 3, K), (K,)])
def test_gradient_of_the_input_passes_straight_through(activation: str, shape: tuple[int, ...]) -> None:
    made = layer(activation)
    x = torch.randn(shape, requires_grad=True)
    y = made(x)
    seed = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, seed)

    preactivation = layer_with(made, "none")(x.detach()).requires_grad_()
    function = {
        "none": lambda v: v,
        "relu": nn.functional.relu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
        "silu": nn.functional.silu,
    }[activation]
    (inner,) = torch.autograd.grad(function(preactivation), preactivation, seed)
    torch.testing.assert_close(gradient, inner @ made.canonical().decompress())
    torch.testing.assert_close(y, made(x.detach()), rtol=1e-5, atol=1e-5)


def layer_with(made: Int8Linear, activation: str) -> Int8Linear:
    return Int8Linear.from_weight(made.canonical(), made.bias, activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_in_half_precision(dtype: torch.dtype) -> None:
    made = layer()
    x = torch.randn(3, K, dtype=dtype, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    expected = made.canonical().decompress().sum(0).expand(3, K)
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.05, atol=0.05)


def test_training_a_layer_before_it_lowers_the_loss() -> None:
    model = nn.Sequential(nn.Linear(K, K), layer("gelu"), nn.Linear(N, 1))
    x, target = torch.randn(64, K), torch.randn(64, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = state(model[1])
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert equal_states(state(model[1]), before), "the int8 layer itself is not trained"


def test_gradient_through_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    made, x = layer("silu"), torch.randn(3, K, requires_grad=True)
    (expected,) = torch.autograd.grad(made(x).sum(), x)
    (got,) = torch.autograd.grad(checkpoint(made, x, use_reentrant=False).sum(), x)
    torch.testing.assert_close(got, expected)


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_input_names_what_was_expected(same: Same) -> None:
    made, good = layer(), torch.randn(2, K)
    expected = made(good)
    with pytest.raises(ValueError, match=rf"x is \[3, 100\], the packed weight expects k = {K}"):
        made(torch.randn(3, 100))
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        made(torch.ones(3, K, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        made(torch.ones(3, K, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        made(torch.ones(3, K, dtype=torch.float64, requires_grad=True))
    with pytest.raises(ValueError, match="x is a scalar"):
        made(torch.tensor(1.0))
    with pytest.raises(ValueError, match="expects k"):
        made(torch.randn(3, 100, requires_grad=True))
    assert same(made(good), expected)


def test_no_rows() -> None:
    made = layer("gelu")
    assert made(torch.randn(0, K)).shape == (0, N)
    assert made(torch.randn(4, 0, K)).shape == (4, 0, N)
    x = torch.randn(0, K, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, K)
