"""SparseLinear as a module: its state, its copies, its dtypes and devices, its gradient. What it computes: tests of the ops."""

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
from torch.nn.utils import prune

from pycompress import ops
from pycompress.methods import Int4Weight, Int8, Int8Weight, LowRankWeight, Sparse, SparseWeight
from pycompress.nn import LAYERS, CompressedLinear, Int4Linear, Int8Linear, LowRankLinear, SparseLinear

Forked = Callable[..., Any]
Python = Callable[..., subprocess.CompletedProcess[str]]
Same = Callable[[Tensor, Tensor], bool]
K, N = 36, 24
METHODS = {
    "float32": Sparse(density=0.25),
    "int8": Sparse(density=0.25, bits=8, activation_bits=8),
    "int8 in 7 bits": Sparse(density=0.25, bits=8),
    "16x1": Sparse(density=0.25, pattern="16x1"),
    "16x4": Sparse(density=0.25, pattern="16x4", bits=8),
    "16x16": Sparse(density=0.5, pattern="16x16"),
    "16x16 in int8": Sparse(density=0.5, pattern="16x16", bits=8),
    "32x32": Sparse(density=0.5, pattern="32x32", bits=8),
    "4:16": Sparse(pattern="4:16", bits=8),
    "density 0": Sparse(density=0.0),
    "density 0 in int8": Sparse(density=0.0, bits=8),
    "density 1": Sparse(density=1.0),
    "density 1 in int8": Sparse(density=1.0, bits=8),
    "one weight": Sparse(density=1 / (N * K)),
    "rows without weights": Sparse.from_mask((torch.arange(N) % 3 == 1)[:, None].expand(N, K)),
}
EVERY = pytest.mark.parametrize("name", METHODS)
BOTH = pytest.mark.parametrize("name", ["float32", "int8"])


def layer(name: str = "float32", activation: str = "none", *, bias: bool = True) -> SparseLinear:
    return SparseLinear.from_dense(nn.Linear(K, N, bias=bias), METHODS[name], activation)


def state(module: nn.Module) -> dict[str, Tensor]:
    """Everything that decides what the layer computes."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal_weights(a: SparseWeight, b: SparseWeight) -> bool:
    first, second = a.tensors(), b.tensors()
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return same and a.settings() == b.settings() and a.shape == b.shape


# --- making one ---------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("bias", [False, True])
def test_from_dense(name: str, bias: bool, same: Same) -> None:
    dense, method = nn.Linear(K, N, bias=bias), METHODS[name]
    made = SparseLinear.from_dense(dense, method)
    weight = method.compress(dense.weight)
    assert (made.in_features, made.out_features, made.activation) == (K, N, "none")
    assert (made.bits, made.nnz, made.density) == (weight.bits, weight.nnz, weight.density)
    assert made.activation_bits == weight.activation_bits
    assert (made.weight_scale is None) is (made.bits == 32)
    assert (made.bias is None) is not bias
    assert made.format in ops.SPARSE_FORMATS
    assert equal_weights(made.canonical(), weight)
    assert torch.equal(made.weight, weight.decompress())
    assert not list(made.parameters())
    x = torch.randn(5, K)
    packed = ops.sparse_pack(weight.mask, weight.values, K, weight.activation_bits or 0)
    assert same(made(x), ops.sparse_linear(x, packed, N, weight.scale, dense.bias))


@EVERY
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_it_computes_what_the_weight_says(name: str, activation: str) -> None:
    made, x = layer(name, activation), torch.randn(7, K)
    exact = x.double() @ made.weight.double().T
    assert made.bias is not None
    expected = (nn.functional.gelu if activation == "gelu" else lambda y: y)(exact + made.bias.double())
    # float32: rounding alone. int8: up to a step of the activations (max - min over 127 or 255) for each weight, half of it by
    # rounding them, half by rounding the zero point; GELU's slope is at most 1.13.
    step = 0.0 if made.activation_bits is None else 2 * float(x.abs().max()) / (2**made.activation_bits - 1)
    bound = 1.13 * (step * made.weight.abs().sum(1).double() + 1e-5)
    assert ((made(x).double() - expected).abs() <= bound).all()


def test_without_a_method_the_zeros_stay() -> None:
    dense = nn.Linear(K, N)
    with torch.no_grad():
        dense.weight[torch.rand(N, K) < 0.7] = 0
    made = SparseLinear.from_dense(dense)
    assert torch.equal(made.weight, dense.weight)
    assert made.nnz == int((dense.weight != 0).sum())


def test_a_layer_that_torch_pruned_is_taken_as_it_is(same: Same) -> None:
    dense, x = nn.Linear(K, N), torch.randn(3, K)
    prune.l1_unstructured(dense, "weight", amount=0.8)
    prune.l1_unstructured(dense, "bias", amount=0.5)
    with torch.no_grad():
        dense.weight_orig *= 2  # `weight` is out of date now, until the next call
    made = SparseLinear.from_dense(dense, activation="relu")
    assert torch.equal(made.weight, dense.weight_orig * dense.weight_mask)
    assert made.bias is not None
    assert int((made.bias == 0).sum()) == N // 2
    torch.testing.assert_close(made(x), dense(x).relu())


def test_shares_no_memory_with_the_dense_layer() -> None:
    for method in (Sparse(), Sparse(bits=8)):
        dense = nn.Linear(K, N)
        made = SparseLinear.from_dense(dense, method)
        before = state(made)
        with torch.no_grad():
            dense.weight.zero_()
            dense.bias.zero_()
        assert equal_states(state(made), before)


@BOTH
def test_canonical_round_trip(name: str, same: Same) -> None:
    first = layer(name, "gelu")
    second = SparseLinear.from_weight(first.canonical(), first.bias, "gelu")
    x = torch.randn(5, K)
    assert same(first(x), second(x))
    before = state(second)
    for buffer in first.buffers():
        buffer.zero_()
    assert equal_states(state(second), before), "from_weight copies what it is given"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "tanh"}, "SparseLinear: activation is 'tanh', expected one of none, relu"),
        ({"bias": torch.zeros(N + 1)}, rf"SparseLinear: bias is \[{N + 1}\], expected \[{N}\]"),
        ({"bias": torch.full((N,), torch.nan)}, "the bias holds NaN or Inf"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLinear.from_weight(Sparse().compress(torch.randn(N, K)), **arguments)


def test_weights_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="SparseLinear: the weight is Int8Weight, expected SparseWeight"):
        SparseLinear.from_dense(nn.Linear(K, N), Int8())
    with pytest.raises(TypeError, match="Int8Linear: the weight is SparseWeight, expected Int8Weight"):
        Int8Linear.from_dense(nn.Linear(K, N), Sparse())
    with pytest.raises(ValueError, match="NaN"):
        SparseLinear.from_weight(Sparse().compress(torch.full((N, K), torch.nan)))


def test_one_kind_of_layer_for_each_method() -> None:
    assert {"int4": Int4Linear, "int8": Int8Linear, "low_rank": LowRankLinear, "sparse": SparseLinear} == LAYERS
    types = {"int4": Int4Weight, "int8": Int8Weight, "low_rank": LowRankWeight, "sparse": SparseWeight}
    assert {name: kind.weight_type for name, kind in LAYERS.items()} == types
    for name, kind in LAYERS.items():
        assert issubclass(kind, CompressedLinear)
        assert name == kind.weight_type.name == kind.default_method.name
        assert set(kind.from_dense(nn.Linear(K, N)).state_dict()) >= set(kind.from_dense(nn.Linear(K, N))._expected())


def test_repr_and_label() -> None:
    assert repr(layer()) == "SparseLinear(in_features=36, out_features=24, bias=True, density=0.25, bits=32)"
    assert repr(layer("int8", "silu", bias=False)) == (
        "SparseLinear(in_features=36, out_features=24, bias=False, density=0.25, bits=8, activation_bits=8, activation=silu)"
    )
    assert "density=0.25" in repr(layer().to("meta"))
    assert (layer().label, layer("int8").label, layer("density 1").label) == (
        "sparse 25 %", "sparse 25 % int8", "sparse 100 %",
    )  # fmt: skip


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
    original = layer(name, "gelu", bias=name != "16x1").eval()
    original.note = "kept"  # type: ignore[assignment]
    original.register_buffer("extra", torch.randn(3))
    copied = duplicate(original)
    assert type(copied) is SparseLinear
    assert equal_states(state(copied), state(original))
    assert repr(copied) == repr(original)
    assert (copied.training, copied.note, copied.nnz) == (False, "kept", original.nnz)
    assert set(copied.state_dict()) == set(original.state_dict())
    x = torch.randn(3, K)
    assert same(copied(x), original(x))
    before = state(copied)
    for buffer in original.buffers():
        buffer.zero_()
    assert equal_states(state(copied), before), "a copy shares no memory"


@BOTH
def test_a_pickle_holds_the_canonical_weight(name: str) -> None:
    """Not the packed one, whose layout belongs to this processor."""
    original = layer(name)
    buffers = original.__getstate__()["_buffers"]
    assert set(buffers) == {"weight_mask", "weight_values", "weight_scale", "bias"}
    assert "packed" in original._buffers, "and the layer itself is as it was"


def test_layers_that_share_a_weight_go_on_sharing_it() -> None:
    first = layer("int8", bias=False)
    second = SparseLinear.from_weight(first.canonical(), torch.randn(N))
    assert first.same_weight(second)
    second.share(first)
    model = copy.deepcopy(nn.ModuleList([first, second]))
    assert model[0].packed is model[1].packed
    assert model[0].weight_scale is model[1].weight_scale
    assert model[0].packed is not first.packed


def test_which_weights_are_the_same() -> None:
    dense = nn.Linear(K, N)
    made = {name: SparseLinear.from_dense(dense, METHODS[name]) for name in METHODS}
    for name, one in made.items():
        for other, two in made.items():
            assert one.same_weight(two) is (name == other), (name, other)
    assert not made["int8"].same_weight(Int8Linear.from_dense(dense))
    assert not made["float32"].same_weight(layer("float32"))
    scaled = copy.deepcopy(made["int8"])
    assert scaled.same_weight(made["int8"])
    scaled.weight_scale *= 2  # type: ignore[operator]
    assert not scaled.same_weight(made["int8"])


# --- state_dict ---------------------------------------------------------------------------------------------------------


@EVERY
def test_state_dict_is_canonical(name: str) -> None:
    made = layer(name)
    found, weight = made.state_dict(), made.canonical()
    assert list(found) == ["weight_mask", "weight_values", *(["weight_scale"] if made.bits == 8 else []), "bias"]
    assert torch.equal(found["weight_mask"], weight.mask)
    assert torch.equal(found["weight_values"], weight.values)
    assert found["weight_values"].dtype == (torch.float32 if made.bits == 32 else torch.int8)
    assert set(nn.Sequential(made).state_dict()) == {f"0.{key}" for key in found}
    assert made.canonical_bytes() == sum(t.numel() * t.element_size() for t in weight.tensors().values())


@EVERY
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool, name: str, same: Same) -> None:
    source, target = (nn.Sequential(layer(name), nn.Linear(N, 10)) for _ in range(2))
    result = target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert equal_states(state(target), state(source))
    x = torch.randn(3, K)
    assert same(target(x), source(x))


def test_a_state_dict_with_another_number_of_weights(same: Same) -> None:
    """As layers have them that one threshold for the whole model pruned."""
    for bits in (32, 8):
        dense = nn.Linear(K, N)
        source = SparseLinear.from_dense(dense, Sparse(0.5, bits=bits))
        target = SparseLinear.from_dense(nn.Linear(K, N), Sparse(0.1, bits=bits))
        target.load_state_dict(source.state_dict())
        assert target.nnz == source.nnz
        assert target.same_weight(source)
        x = torch.randn(3, K)
        assert same(target(x), source(x))


def test_state_dict_through_a_file(same: Same) -> None:
    source, target, file = layer(), layer(), io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file))
    x = torch.randn(3, K)
    assert same(target(x), source(x))


State = dict[str, Any]


def put(name: str, make: Callable[[Tensor], Any]) -> Callable[[State], State]:
    return lambda found: {**found, name: make(found[name])}


def without(*names: str) -> Callable[[State], State]:
    return lambda found: {key: value for key, value in found.items() if key not in names}


def with_first(name: str, value: float) -> Callable[[State], State]:
    def change(found: State) -> State:
        tensor = found[name].clone()
        tensor.view(-1)[0] = value
        return {**found, name: tensor}

    return change


BROKEN: dict[str, tuple[Callable[[State], State], str]] = {
    "one value too few": (put("weight_values", lambda t: t[:-1]), "values, the mask has"),
    "one value too many": (put("weight_values", lambda t: torch.cat([t, t[:1]])), "values, the mask has"),
    "no values": (put("weight_values", lambda t: t[:0]), "0 values, the mask has"),
    "one more bit": (
        put("weight_mask", lambda t: t | torch.tensor([[128], *[[0]] * (N - 1)], dtype=torch.uint8)),
        "bits",
    ),
    "padding bits": (put("weight_mask", lambda t: t | 128), "bits set behind k = 36"),
    "mask of zeros": (put("weight_mask", torch.zeros_like), "the mask has 0 bits set"),
    "mask of another shape": (put("weight_mask", lambda t: t[:-1]), "weight_mask is"),
    "mask as bool": (put("weight_mask", lambda t: t > 0), "weight_mask is torch.bool"),
    "mask in int8": (put("weight_mask", lambda t: t.view(torch.int8)), "weight_mask is torch.int8"),
    "mask missing": (without("weight_mask"), "Missing key.*weight_mask"),
    "values missing": (without("weight_values"), "Missing key.*weight_values"),
    "mask and values missing": (without("weight_mask", "weight_values"), "Missing key.*weight_mask"),
    "scale missing": (without("weight_scale"), "Missing key.*weight_scale"),
    "bias missing": (without("bias"), "Missing key.*bias"),
    "a value of zero": (with_first("weight_values", 0), "1 of the values are zero"),
    "a value of -128": (with_first("weight_values", -128), "-128"),
    "values in float64": (put("weight_values", lambda t: t.double()), "weight_values is torch.float64"),
    "values a matrix": (put("weight_values", lambda t: t[None]), "weight_values is"),
    "values are no tensor": (put("weight_values", lambda _: [1, 2]), "weight_values is list"),
    "scale of another shape": (put("weight_scale", lambda t: t[:-1]), "weight_scale is"),
    "scale of zero": (with_first("weight_scale", 0.0), "scale is not a positive finite number"),
    "scale NaN": (with_first("weight_scale", torch.nan), "scale is not a positive finite number"),
    "bias of another shape": (put("bias", lambda t: t[:-1]), "bias is"),
    "bias NaN": (with_first("bias", torch.nan), "the bias holds NaN"),
    "something unknown": (lambda found: {**found, "zero_point": torch.zeros(3)}, "Unexpected key.*zero_point"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_bad_state_dict_is_refused_and_the_layer_unchanged(case: str, inside: bool, strict: bool) -> None:
    target = layer("int8")
    change, message = BROKEN[case]
    model: nn.Module = nn.Sequential(target) if inside else target
    broken = change(layer("int8").state_dict())
    if inside:
        broken = {f"0.{name}": value for name, value in broken.items()}
    before = state(target)
    if not strict and "key" in message:
        try:
            model.load_state_dict(broken, strict=False)
        except RuntimeError:
            assert case in {"mask missing", "values missing"}, "what came does not fit what was there"
    else:
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(broken, strict=strict)
    if case != "something unknown":  # there torch has loaded the rest by the time it complains, as with any module
        assert equal_states(state(target), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_bad_float_values_are_refused(value: float) -> None:
    target = layer()
    before = state(target)
    with pytest.raises(RuntimeError, match="of the values are"):
        target.load_state_dict(with_first("weight_values", value)(layer().state_dict()))
    assert equal_states(state(target), before)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("float32", layer("int8")),
        ("int8", layer("float32")),
        ("float32", nn.Linear(K, N)),
        ("int8", Int8Linear.from_dense(nn.Linear(K, N))),
        ("float32", SparseLinear.from_dense(nn.Linear(K + 1, N))),
        ("float32", SparseLinear.from_dense(nn.Linear(K, N + 1))),
    ],
)
def test_the_state_of_another_layer_is_refused(name: str, other: nn.Module) -> None:
    target = layer(name)
    before = state(target)
    with pytest.raises(RuntimeError, match="weight_"):
        target.load_state_dict(other.state_dict())
    assert equal_states(state(target), before)


# --- dtypes and devices -------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.cpu(),
        lambda m: m.share_memory(),
        lambda m: m.requires_grad_(False).train().eval(),
    ],
)
def test_moving_keeps_the_numbers(move: Callable[[nn.Module], nn.Module], name: str, same: Same) -> None:
    made, x = layer(name), torch.randn(3, K)
    expected, half = made(x), made(x.bfloat16())
    before = state(made)
    moved = move(nn.Sequential(made))
    assert moved[0] is made  # type: ignore[index]
    assert equal_states(state(made), before)
    assert same(made(x), expected)
    assert same(made(x.bfloat16()), half)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, name: str, same: Same) -> None:
    made, x = layer(name, "relu"), torch.randn(2, 3, K).to(dtype)
    y = made(x)
    assert (y.shape, y.dtype) == ((2, 3, N), dtype)
    assert same(y, made(x.float()).to(dtype)), "converted exactly, rounded once"


def test_a_dense_layer_in_half_precision() -> None:
    dense = nn.Linear(K, N).bfloat16()
    made = SparseLinear.from_dense(dense)
    assert torch.equal(made.weight, dense.weight.float())
    assert made.bias is not None
    assert torch.equal(made.bias, dense.bias.float())


@EVERY
def test_meta_device_and_back(name: str, same: Same) -> None:
    source, target = layer(name), layer(name)
    nnz = target.nnz
    target.to("meta")
    assert target.packed.is_meta
    assert target(torch.empty(3, K, device="meta")).shape == (3, N)
    assert (target.format, target.nnz) == ("", nnz)
    target.to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, K)
    assert same(target(x), source(x))


@pytest.mark.parametrize("use", ["weight", "canonical", "state_dict", "deepcopy", "pickle", "label", "bytes"])
def test_the_weight_of_a_layer_on_meta(use: str, forked: Forked) -> None:
    """There is none: an error or a tensor on meta, never a read of memory that is not there."""
    target = layer("int8").to("meta")
    uses: dict[str, Callable[[], object]] = {
        "weight": lambda: target.weight.is_meta,
        "canonical": target.canonical,
        "state_dict": lambda: all(tensor.is_meta for tensor in target.state_dict().values()),
        "deepcopy": lambda: copy.deepcopy(target).packed.is_meta,
        "pickle": lambda: bool(pickle.dumps(target)),
        "label": lambda: target.label == "sparse 25 % int8",
        "bytes": lambda: target.canonical_bytes() == layer("int8").canonical_bytes(),
    }

    def run() -> str:
        try:
            return str(uses[use]() is True)
        except Exception as error:
            return type(error).__name__

    assert forked(run) in {"True", "ValueError", "RuntimeError", "NotImplementedError"}


def test_an_input_on_another_device_than_the_layer() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        layer().to("meta")(torch.randn(3, K))


# --- modes --------------------------------------------------------------------------------------------------------------


@BOTH
def test_inference_mode(name: str, same: Same) -> None:
    dense, x = nn.Linear(K, N), torch.randn(3, K)
    made = SparseLinear.from_dense(dense, METHODS[name], "gelu")
    expected = made(x)
    with torch.inference_mode():
        assert same(made(x), expected)
        assert made(x.clone()).is_inference()
        inside = SparseLinear.from_dense(dense, METHODS[name], "gelu")
    assert same(inside(x), expected)
    assert same(copy.deepcopy(inside)(x), expected)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, name: str, same: Same) -> None:
    first, made, x = nn.Linear(K, K), layer(name), torch.randn(3, K)
    with torch.autocast("cpu", dtype):
        hidden = first(x)
        y = made(hidden)
    assert y.dtype == dtype
    assert same(y, made(hidden))


@EVERY
def test_no_rows(name: str) -> None:
    made = layer(name, "gelu")
    assert made(torch.randn(0, K)).shape == (0, N)
    assert made(torch.randn(4, 0, K)).shape == (4, 0, N)
    x = torch.randn(0, K, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, K)


def test_bad_input_names_what_was_expected(same: Same) -> None:
    made, good = layer(), torch.randn(2, K)
    expected = made(good)
    with pytest.raises(ValueError, match=rf"sparse_linear: x is \[3, 100\], the packed weight expects k = {K}"):
        made(torch.randn(3, 100))
    with pytest.raises(TypeError, match=r"sparse_linear: x is torch\.float64"):
        made(torch.ones(3, K, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        made(torch.ones(3, K, dtype=torch.float64, requires_grad=True))
    with pytest.raises(ValueError, match="x is a scalar"):
        made(torch.tensor(1.0))
    assert same(made(input=good), expected), "and the keyword of nn.Linear"


def test_a_row_without_weights_gives_the_bias_alone() -> None:
    made, x = layer("rows without weights"), torch.randn(3, K)
    x[1] = torch.nan
    assert made.bias is not None
    empty = torch.arange(N) % 3 != 1
    assert torch.equal(made(x)[:, empty], made.bias[empty].expand(3, -1)), "zeros are not multiplied, not even by NaN"
    assert made(x)[1, ~empty].isnan().all()


# --- gradient -----------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("shape", [(5, K), (2, 3, K), (K,)])
def test_gradient_of_the_input_is_that_of_the_dense_weight(name: str, shape: tuple[int, ...]) -> None:
    made, x = layer(name), torch.randn(shape, requires_grad=True)
    seed = torch.randn(*shape[:-1], N)
    (gradient,) = torch.autograd.grad(made(x), x, seed)
    (expected,) = torch.autograd.grad(nn.functional.linear(x, made.weight, made.bias), x, seed)
    torch.testing.assert_close(gradient, expected)


@BOTH
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gradient_through_the_activation(activation: str, name: str) -> None:
    made, x = layer(name, activation), torch.randn(5, K, requires_grad=True)
    y = made(x)
    seed = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, seed)
    sums = SparseLinear.from_weight(made.canonical(), made.bias)(x.detach()).requires_grad_()
    function = {
        "none": lambda v: v,
        "relu": nn.functional.relu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
        "silu": nn.functional.silu,
    }[activation]
    (inner,) = torch.autograd.grad(function(sums), sums, seed)
    torch.testing.assert_close(gradient, inner @ made.weight)
    torch.testing.assert_close(y, made(x.detach()), rtol=1e-5, atol=1e-5)


@BOTH
def test_training_a_layer_before_it_lowers_the_loss(name: str) -> None:
    model = nn.Sequential(nn.Linear(K, K), layer(name, "gelu"), nn.Linear(N, 1))
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
    assert equal_states(state(model[1]), before), "the sparse layer itself is not trained"


# --- torch.compile and torch.export -------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> nn.Sequential:
    second = SparseLinear.from_dense(nn.Linear(N, 20, bias=False), Sparse(0.3, bits=8))
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
    model, x = layer("int8", "relu").eval(), torch.randn(5, K)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert same(compiled(x), model(x))
        assert same(compiled(x.T.contiguous().T), model(x)), "strides that only the op knows how to walk"


def test_export_save_and_load_elsewhere(tmp_path: Path, python: Python) -> None:
    model, x = network(), torch.randn(3, K)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    found = [node.target for node in program.graph.nodes]
    assert found.count(torch.ops.pycompress.sparse_linear.default) == 2
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
