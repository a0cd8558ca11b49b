"""Whatever a file and a model do not agree in is refused by its name, whichever of them has more."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import Plan, Snapshot, edit, equal_states, pieces, refused, write
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn import Int8Linear

Build = Callable[[], nn.Module]
INT8 = pc.Int8()
X = torch.linspace(-2, 2, 48).view(3, 16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def net(**others: nn.Module) -> Any:
    """Layers with an activation each, a dense one, and an Identity of its own; some of them may be others."""
    layers: dict[str, nn.Module] = OrderedDict(
        one=nn.Linear(16, 16), act=nn.ReLU(), two=nn.Linear(16, 16), act2=nn.GELU(), nothing=nn.Identity(),
        norm=nn.LayerNorm(16), three=nn.Linear(16, 16), act3=nn.SiLU(), last=nn.Linear(16, 16),
    )  # fmt: skip
    layers.update(others)
    return nn.Sequential(layers).eval()


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


PLAN = {"last": None, "*": INT8}


def compressed(**others: nn.Module) -> Any:
    return pc.compress(net(**others), PLAN)


def square(module: type[nn.Module], **options: Any) -> nn.Module:
    return module(16, 16, **options)


def conv1d() -> nn.Module:
    utils = pytest.importorskip("transformers.pytorch_utils")
    module: nn.Module = utils.Conv1D(16, 16)
    return module


# --- activations and Identities -----------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[Build, Build, str]] = {
    "one that stayed, gone in the model": (
        lambda: compressed(act=hooked(nn.ReLU())), compressed, "act is an Identity in the model, in the file it is none",
    ),
    "one that stayed, an Identity of the model's own": (
        lambda: compressed(act=hooked(nn.ReLU())), lambda: net(act=nn.Identity()), "act is an Identity in the model",
    ),
    "one that stayed, another in the model": (
        lambda: compressed(act=hooked(nn.ReLU())), lambda: net(act=nn.GELU()),
        "act is a GELU in the model, in the file its activation is relu",
    ),
    "one that stayed, none in the model": (
        lambda: compressed(act=hooked(nn.ReLU())), lambda: net(act=nn.Tanh()),
        "act is a Tanh in the model, in the file its activation is relu",
    ),
    "one that stayed, of another form": (
        lambda: compressed(act2=hooked(nn.GELU())), lambda: net(act2=nn.GELU("tanh")),
        "act2 is a GELU in the model, in the file its activation is gelu",
    ),
    "none, one in the model": (
        lambda: compressed(act=nn.Tanh()), net, "act is a ReLU in the model, in the file its activation is none",
    ),
    "none, an Identity in the model": (
        lambda: compressed(act=nn.Tanh()), lambda: net(act=nn.Identity()), "act is an Identity in the model",
    ),
    "taken over, another in the model": (compressed, lambda: net(act=nn.Tanh()), "act is a Tanh in the model"),
    "taken over, one that another layer applies": (
        compressed, lambda: net(act=nn.GELU()),
        "the activations gelu, relu, silu in the file, of which the model has gelu, gelu, silu",
    ),
    "taken over, twice another": (
        compressed, lambda: net(act3=nn.GELU()), "apply the activations gelu, relu, silu in the file",
    ),
    "taken over, gone in the model": (
        compressed, lambda: net(act=nn.Identity()), "activations gelu, relu, silu in the file, of which the model has gelu, silu",
    ),
    "taken over, in the model with a hook": (compressed, lambda: net(act=hooked(nn.ReLU())), "with hooks"),
    "an Identity, none in the model": (compressed, lambda: net(nothing=nn.Dropout(0.5)), "nothing is a Dropout in the model"),
    "an Identity, an activation in the model": (compressed, lambda: net(nothing=nn.ReLU()), "relu, relu"),
    "no Identity, one in the model": (
        lambda: compressed(nothing=nn.Dropout(0.5)), net, "nothing is an Identity in the model, in the file it is none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations(case: str, path: Path, snapshot: Snapshot) -> None:
    saved, target, message = ACTIVATIONS[case]
    pc.save(saved(), path)
    pc.load(pc.compress(net(), PLAN) if saved is compressed else saved(), path)
    refused(path, message, snapshot, target(), what=case)


def test_a_file_that_leaves_an_activation_alone(path: Path) -> None:
    """It stays, in a model that has it; hooks of the model's modules are the model's."""
    pc.save(compressed(act=hooked(nn.ReLU())), path)
    loaded = pc.load(net(), path)
    assert type(loaded.act) is nn.ReLU and loaded.one.activation == "none"
    assert type(loaded.act2) is nn.Identity and loaded.two.activation == "gelu"


def as_version_2(path: Path) -> None:
    tensors, plan = pieces(path)
    write(path, tensors, {**{k: plan[k] for k in ("layers", "aliases", "identities")}, "version": 2})


def test_what_an_older_file_says_is_compared_too(path: Path, snapshot: Snapshot) -> None:
    pc.save(compressed(act=hooked(nn.ReLU())), path)
    as_version_2(path)
    refused(path, "act is an Identity in the model, in the file it is none", snapshot, compressed())
    assert type(pc.load(net(), path).act) is nn.ReLU
    pc.save(compressed(), path)
    as_version_2(path)
    refused(path, "act is a Tanh", snapshot, net(act=nn.Tanh()))
    refused(path, "of which the model has gelu, silu", snapshot, net(act=nn.Identity()))
    refused(path, "of which the model has", snapshot, net(act=nn.SiLU()))
    pc.load(net(), path)


def test_activations_are_counted_below_each_parent(path: Path, snapshot: Snapshot) -> None:
    def two(first: str, second: str) -> nn.Module:
        kinds = {"relu": nn.ReLU, "gelu": nn.GELU}
        blocks = {name: nn.Sequential(nn.Linear(16, 16), kinds[kind]()) for name, kind in (("a", first), ("b", second))}
        return nn.Sequential(OrderedDict(blocks)).eval()

    pc.save(pc.compress(two("relu", "gelu"), INT8), path)
    refused(path, "a.1 is a GELU in the model", snapshot, two("gelu", "relu"))
    pc.load(two("relu", "gelu"), path)


# --- layers -------------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Build, Build, str]] = {
    "a hook": (compressed, lambda: net(one=hooked(square(nn.Linear))), "one cannot be replaced .* hooks"),
    "a subclass": (
        compressed, lambda: net(one=type("Mine", (nn.Linear,), {})(16, 16)), "one cannot be replaced .* Mine is a subclass",
    ),
    "a dense layer turned round": (
        lambda: compressed(last=conv1d()), net, "last is .*Linear.* in the model, .*Conv1D.* in the file",
    ),
    "a dense layer turned back": (
        compressed, lambda: net(last=conv1d()), "last is .*Conv1D.* in the model, .*Linear.* in the file",
    ),
    "a dense convolution in larger steps": (
        lambda: compressed(more=nn.Conv2d(2, 2, 3, padding=1)), lambda: net(more=nn.Conv2d(2, 2, 3, 2)), "more is .*stride",
    ),
    "a dense embedding with padding": (
        lambda: compressed(more=nn.Embedding(8, 4)), lambda: net(more=nn.Embedding(8, 4, padding_idx=1)),
        "more is .*'padding_idx': 1.* in the model, .*'padding_idx': None.* in the file",
    ),
    "a layer more": (compressed, lambda: net(more=nn.Linear(3, 3)), "the tensor more.weight is missing"),
    "a layer less": (lambda: compressed(more=nn.Linear(3, 3)), net, "the model has no layer 'more'"),
    "a dense layer less": (lambda: compressed(more=nn.LayerNorm(3)), net, "the model has no tensor 'more.bias'"),
    "no bias": (compressed, lambda: net(one=square(nn.Linear, bias=False)), "one is .*bias=False in the model, .*bias=True"),
    "no bias in a dense layer": (
        compressed, lambda: net(last=square(nn.Linear, bias=False)), "the model has no tensor 'last.bias'",
    ),
    "a bias in a dense layer": (
        lambda: compressed(last=square(nn.Linear, bias=False)), net, "the tensor last.bias is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case: str, path: Path, snapshot: Snapshot) -> None:
    saved, target, message = LAYERS[case]
    pc.save(saved(), path)
    refused(path, message, snapshot, target(), what=case)


def test_a_compressed_layer_with_a_conv1d_in_its_place(path: Path) -> None:
    """Both multiply with the same matrix, however they keep it."""
    model = compressed()
    pc.save(model, path)
    assert torch.equal(pc.load(net(one=conv1d()), path)(X), model(X))


STATE_HOOKS = ("_register_state_dict_hook", "_register_load_state_dict_pre_hook", "register_load_state_dict_post_hook")


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_full_backward_hook", *STATE_HOOKS])
@pytest.mark.parametrize("build", [net, compressed])
def test_hooks_of_a_layer_would_be_lost(register: str, build: Build, path: Path, snapshot: Snapshot) -> None:
    pc.save(compressed(), path)
    place: Any = build()
    getattr(place.one, register)(lambda *_: None)
    refused(path, "one cannot be replaced in the model: it has hooks", snapshot, place)


@pytest.mark.parametrize("build", [net, compressed])
def test_a_forward_of_its_own_would_be_lost(build: Build, path: Path, snapshot: Snapshot) -> None:
    pc.save(compressed(), path)
    place: Any = build()
    place.one.forward = lambda x: x
    refused(path, "one cannot be replaced in the model: its forward is its own", snapshot, place)
    place = net()
    place.act.forward = lambda x: x
    refused(path, "act is a ReLU in the model with hooks or a forward of its own", snapshot, place)


def test_weight_norm_is_no_layer_of_the_file(path: Path, snapshot: Snapshot) -> None:
    pc.save(compressed(), path)
    refused(
        path,
        "one cannot be replaced",
        snapshot,
        net(one=torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))),
    )
    with pytest.warns(FutureWarning):
        old = torch.nn.utils.weight_norm(nn.Linear(16, 16))
    refused(path, "one cannot be replaced", snapshot, net(one=old))


# --- ties ---------------------------------------------------------------------------------------------------------------


def test_one_tensor_in_the_model_and_two_in_the_file(path: Path, snapshot: Snapshot) -> None:
    saved = compressed(more=nn.LayerNorm(16))
    saved.more.weight.data.add_(1)
    pc.save(saved, path)
    place = net(more=nn.LayerNorm(16))
    place.more.weight = place.norm.weight
    refused(path, "norm.weight and more.weight are one tensor in the model, in the file they are two", snapshot, place)
    saved.more.weight.data.sub_(1)  # two that are equal may be one
    pc.save(saved, path)
    loaded = pc.load(place, path)
    assert loaded.more.weight is loaded.norm.weight


def test_two_tensors_in_the_model_and_one_in_the_file(path: Path) -> None:
    saved = compressed(more=nn.LayerNorm(16))
    saved.more.weight = saved.norm.weight
    pc.save(saved, path)
    loaded = pc.load(net(more=nn.LayerNorm(16)), path)
    assert torch.equal(loaded.more.weight, loaded.norm.weight) and loaded.more.weight is not loaded.norm.weight


def test_a_tensor_inside_another(path: Path, snapshot: Snapshot) -> None:
    def build(tied: bool) -> Any:
        model = net()
        model.register_buffer("table", torch.zeros(4, 4))
        model.register_buffer("rows", model.table[:2] if tied else torch.ones(2, 4))
        return model

    pc.save(pc.compress(build(False), PLAN), path)
    refused(path, "table is not what the file has once it is loaded: it shares memory", snapshot, build(True))
    pc.save(pc.compress(build(True), PLAN), path)
    assert equal_states(pc.load(build(True), path), pc.compress(pc.load(build(False), path), {"last": None, "*": None}))


class Twice(nn.Module):
    def __init__(self, *, one: bool) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first if one else nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) - 2 * self.second(x)
        return y


def test_one_module_in_the_model_and_two_in_the_file(path: Path, snapshot: Snapshot) -> None:
    message = "first and second are one module in the model, in the file they are several"
    for plan in (INT8, {"first": INT8, "second": None}, {"second": INT8, "first": None}):
        pc.save(pc.compress(Twice(one=False), plan), path)
        refused(path, message, snapshot, Twice(one=True), pc.compress(Twice(one=True), INT8))
    model = pc.compress(Twice(one=True), INT8)
    pc.save(model, path)
    loaded = pc.load(Twice(one=False), path)
    assert torch.equal(loaded(X), model(X))


def test_layers_that_share_a_weight_in_the_model_may_have_their_own_in_the_file(path: Path) -> None:
    def tied() -> Twice:
        model = Twice(one=False)
        model.second.weight = model.first.weight
        return model

    model = pc.compress(tied(), {"first": INT8, "second": pc.Int4()})
    pc.save(model, path)
    assert torch.equal(pc.load(tied(), path)(X), model(X))


# --- tensors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("here", [torch.int32, torch.int64, torch.bool, torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("there", [torch.int32, torch.int64, torch.bool, torch.uint8, torch.float32, torch.float64])
def test_dtypes_of_buffers(here: torch.dtype, there: torch.dtype, path: Path, snapshot: Snapshot) -> None:
    def build(dtype: torch.dtype) -> Any:
        model = net()
        model.register_buffer("table", torch.ones(3, dtype=dtype))
        return model

    pc.save(pc.compress(build(there), PLAN), path)
    if here == there or (here.is_floating_point and there.is_floating_point):
        assert pc.load(build(here), path).table.dtype == here
    else:
        refused(path, r"table is \w+ \[3\], expected ", snapshot, build(here))


def test_state_that_no_file_has(path: Path, snapshot: Snapshot) -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    pc.save(compressed(), path)
    refused(path, r"the model's state dict holds more\._extra_state of type dict", snapshot, net(more=Extra()))
    for lazy in (nn.LazyLinear(3), nn.LazyConv2d(3, 3)):
        with pytest.raises(ValueError, match=r"more\.weight is not initialized in the model yet"):
            pc.load(net(more=lazy), path)


# --- hostile plans ------------------------------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[Callable[[Plan], object], str]] = {
    "activations missing": (lambda plan: plan.pop("activations"), "no activations"),
    "activations a list": (edit("activations", value=["act"]), "no activations"),
    "an activation a number": (edit("activations", value={"act": 1}), "no activations"),
    "an activation that the model lacks": (edit("activations", value={"nowhere": "relu"}), "nowhere is a NoneType in the model"),
    "dense missing": (lambda plan: plan.pop("dense"), "no dense"),
    "dense a number": (edit("dense", value=3), "no dense"),
    "a dense layer null": (edit("dense", value={"last": None}), "no dense"),
    "a dense layer of another kind": (edit("dense", value={"last": {"kind": "Conv9d"}}), "last is .*Linear.*Conv9d"),
    "buffers missing": (lambda plan: plan.pop("buffers"), "no buffers"),
    "buffers a mapping": (edit("buffers", value={}), "no buffers"),
    "a buffer a number": (edit("buffers", value=[3]), "no buffers"),
    "a buffer that the file lacks": (edit("buffers", value=["nowhere"]), "the buffer 'nowhere' is no tensor of the file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_plans(case: str, path: Path, snapshot: Snapshot) -> None:
    tensors, plan = pieces(path, compressed())
    change, message = HOSTILE[case]
    change(plan)
    write(path, tensors, plan)
    refused(path, message, snapshot, net(), compressed(), what=case)


def test_a_buffer_may_not_be_a_tensor_of_the_state(path: Path, snapshot: Snapshot) -> None:
    """Whatever a plan calls it, the values that the state dict names come from there."""
    tensors, plan = pieces(path, compressed())
    write(path, tensors, {**plan, "buffers": ["last.weight"]})
    assert torch.equal(pc.load(net(), path).last.weight, tensors["last.weight"])
    write(path, {name: tensor for name, tensor in tensors.items() if name != "last.weight"}, plan)
    refused(path, "the tensor last.weight is missing", snapshot, net())


def test_a_layer_by_hand(path: Path, snapshot: Snapshot) -> None:
    """One that applies an activation which the model has not to give up."""
    model = nn.Sequential(Int8Linear.from_dense(nn.Linear(16, 16), activation="relu"))
    pc.save(model, path)
    assert torch.equal(pc.load(copy.deepcopy(model), path)(X), model(X))
    refused(
        path,
        "apply the activations relu in the file, of which the model has none",
        snapshot,
        nn.Sequential(nn.Linear(16, 16)),
    )
