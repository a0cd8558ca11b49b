"""load() as one change: right wherever the model holds its parts, undone where anything fails, and nothing depends on the file."""

from __future__ import annotations

import copy
import os
import subprocess
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import Snapshot, equal_states, pieces, refused, write
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn import CompressedLayer

Python = Callable[..., subprocess.CompletedProcess[str]]
Same = Callable[[Tensor, Tensor], bool]
INT8 = pc.Int8()


class Rotary(nn.Module):
    """Turns features by angles that are no part of the state dict, and adds a table that is."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequency", 1.0 / 100 ** torch.linspace(0, 1, width), persistent=False)
        self.register_buffer("table", torch.linspace(0, 1, width))
        self.gain = nn.Parameter(torch.linspace(1, 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.cos(self.frequency) * self.gain + self.table


def net(**more: nn.Module) -> nn.Sequential:
    layers = OrderedDict(one=nn.Linear(16, 16), act=nn.ReLU(), turn=Rotary(), two=nn.Linear(16, 16), **more)
    return nn.Sequential(layers).eval()


def on_meta(build: Callable[[], nn.Module] = net) -> Any:
    with torch.device("meta"):
        return build()


def saved(path: Path, build: Callable[[], nn.Module] = net, plan: Any = INT8) -> Any:
    model = pc.compress(build(), plan)
    pc.save(model, path)
    return model


def left_on_meta(model: nn.Module) -> list[str]:
    return [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


X = torch.linspace(-2, 2, 48).view(3, 16)

# --- the file may change ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["written over", "truncated", "deleted"])
@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_what_is_loaded_does_not_depend_on_the_file(change: str, where: str, path: Path, python: Python) -> None:
    """In another process, because a page of a file that is gone ends it by a signal."""
    code = f"""
import copy, os, sys, torch, pycompress as pc
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_loading import X, net
with torch.device({where!r}):
    model = net()
pc.load(model, sys.argv[1])
before = {{name: tensor.clone() for name, tensor in (*model.state_dict().items(), *model.named_buffers())}}
y = model(X)
if "written" in {change!r}:
    size = os.path.getsize(sys.argv[1])
    with open(sys.argv[1], "r+b") as file:
        file.write(os.urandom(size))
elif "truncated" in {change!r}:
    os.truncate(sys.argv[1], 0)
else:
    os.unlink(sys.argv[1])
after = dict((*model.state_dict().items(), *model.named_buffers()))
assert all(torch.equal(before[name], after[name]) for name in before)
assert torch.equal(model(X), y)
"""
    net_with_much = net()
    net_with_much.register_buffer("much", torch.zeros(1))
    saved(path)
    result = python(code, path)
    assert result.returncode == 0, result.stderr


# --- the meta device ----------------------------------------------------------------------------------------------------


def test_buffers_outside_of_the_state_dict(path: Path, same: Same) -> None:
    model = saved(path)
    loaded = pc.load(on_meta(), path)
    assert not left_on_meta(loaded)
    assert "turn.frequency" not in loaded.state_dict()
    assert same(loaded(X), model(X)) and same(pc.load(net(), path)(X), model(X))


def test_they_stay_where_the_model_has_them(path: Path) -> None:
    """It may have been made for longer inputs, say."""
    saved(path)
    other = net()
    other.turn.frequency = torch.rand(99)
    mine = other.turn.frequency.clone()
    assert torch.equal(pc.load(other, path).turn.frequency, mine)


def test_equal_ones_are_stored_once(path: Path) -> None:
    def build() -> nn.Sequential:
        return net(again=Rotary(), more=Rotary())

    tensors, plan = pieces(path, saved(path, build))
    names = ["turn.frequency", "again.frequency", "more.frequency"]
    assert plan["buffers"] == names
    assert plan["aliases"] == dict.fromkeys(names[1:], names[0]) and names[0] in tensors
    loaded = pc.load(on_meta(build), path)
    assert not left_on_meta(loaded)
    loaded.turn.frequency.zero_()
    assert loaded.again.frequency.any(), "no more than stored together"


def without_buffers(path: Path) -> None:
    """The file as version 2 wrote it."""
    tensors, plan = pieces(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in plan["buffers"]}
    aliases = {name: target for name, target in plan["aliases"].items() if target in tensors}
    old = {key: plan[key] for key in ("layers", "identities")}
    write(path, tensors, {**old, "version": 2, "aliases": aliases})


def test_an_older_file_has_none_of_them(path: Path, snapshot: Snapshot, same: Same) -> None:
    def build() -> nn.Sequential:
        return net(again=Rotary())

    model = saved(path, build)
    without_buffers(path)
    assert same(pc.load(build(), path)(X), model(X))
    message = "no values for what the model has on the meta device: again.frequency, turn.frequency"
    place = on_meta(build)
    with pytest.raises(ValueError, match=message):
        pc.load(place, path)
    assert all(tensor.is_meta for tensor in (*place.parameters(), *place.buffers()))
    assert type(place.one) is nn.Linear and type(place.act) is nn.ReLU


def test_one_of_another_shape(path: Path) -> None:
    saved(path)
    place = on_meta()
    with torch.device("meta"):
        place.turn.frequency = torch.rand(17)
    with pytest.raises(ValueError, match=r"turn.frequency is F32 \[16\], expected floating point \[17\]"):
        pc.load(place, path)
    assert type(place.one) is nn.Linear


@pytest.mark.parametrize("where", ["attribute", "list", "closure", "tuple"])
def test_tensors_on_meta_that_are_neither(where: str, path: Path) -> None:
    """A plain tensor is in no file."""
    saved(path)
    place = on_meta()
    lost = torch.ones(3, device="meta")
    held: Any = {"attribute": lost, "list": [{"deep": lost}], "closure": lambda: lost, "tuple": (1, lost)}[where]
    place.turn.extra = held
    with pytest.raises(ValueError, match=r"no values for what the model has on the meta device: .*turn\.extra"):
        pc.load(place, path)
    assert type(place.one) is nn.Linear and left_on_meta(place)


def test_tensors_are_filled_wherever_the_model_holds_them(path: Path, same: Same) -> None:
    model = saved(path)
    place = on_meta()
    place.turn.same = place.turn.frequency
    place.turn.all = [place.turn.gain, {"table": place.turn.table}]
    loaded = pc.load(place, path)
    turn = loaded.turn
    assert turn.same is turn.frequency and turn.all[0] is turn.gain and turn.all[1]["table"] is turn.table
    assert same(loaded(X), model(X))


def test_ties_and_flags_on_meta(path: Path) -> None:
    def build() -> nn.Sequential:
        model = net(again=Rotary())
        model.again.gain = model.turn.gain
        model.turn.table = model.again.table
        model.turn.gain.requires_grad_(False)
        model.turn.gain.label = "tied"
        return model

    saved(path, build)
    loaded = pc.load(on_meta(build), path)
    assert loaded.again.gain is loaded.turn.gain and loaded.again.table is loaded.turn.table
    assert isinstance(loaded.turn.gain, nn.Parameter) and not loaded.turn.gain.requires_grad
    assert loaded.turn.gain.label == "tied"


def test_buffers_that_overlap_on_meta(path: Path) -> None:
    def build() -> nn.Sequential:
        model = net()
        model.register_buffer("rows", model.turn.table[:3])
        return model

    model = saved(path, build)
    assert equal_states(pc.load(on_meta(build), path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_precision_is_the_models(dtype: torch.dtype, path: Path, same: Same) -> None:
    saved(path)
    places = net().to(dtype), on_meta().to(dtype)
    first, second = (pc.load(place, path) for place in places)
    own = [(name, t) for name, t in (*first.named_parameters(), *first.named_buffers()) if name.startswith("turn")]
    assert {tensor.dtype for _, tensor in own} == {dtype}
    for name, tensor in own:
        there = dict((*second.named_parameters(), *second.named_buffers()))[name]
        if (
            name != "turn.frequency"
        ):  # of the model that was saved, in its precision: made here, it was rounded another time
            assert same(tensor, there), name
        assert there.dtype == dtype


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_models_of_transformers(name: str, path: Path, same: Same) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
    }
    narrow = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1}
    config: Any = {
        "bert": lambda: transformers.BertConfig(**sizes),
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "gpt2": lambda: transformers.GPT2Config(**narrow, n_embd=32, n_layer=2, n_head=2),
        "t5": lambda: transformers.T5Config(**narrow, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2),
    }[name]()
    kinds = {"bert": "BertModel", "llama": "LlamaModel", "gpt2": "GPT2LMHeadModel", "t5": "T5ForConditionalGeneration"}
    inputs = {"input_ids": torch.randint(64, (2, 7))}
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]

    def build() -> nn.Module:
        model: nn.Module = getattr(transformers, kinds[name])(copy.deepcopy(config))
        return model.eval()

    model = saved(path, build)
    for dtype in (torch.float32, torch.bfloat16):
        loaded, usual = pc.load(on_meta(build).to(dtype), path), pc.load(build().to(dtype), path)
        assert not left_on_meta(loaded)
        tensors = dict((*usual.named_parameters(), *usual.named_buffers()))
        assert all(t.dtype == tensors[name].dtype for name, t in (*loaded.named_parameters(), *loaded.named_buffers()))
        assert same(loaded(**inputs)[0], usual(**inputs)[0])
        if dtype == torch.float32:
            assert same(loaded(**inputs)[0], model(**inputs)[0])


# --- whoever else holds the modules -------------------------------------------------------------------------------------


class Walks(nn.Module):
    """Calls its layers by what else holds them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)
        self.steps: Any = {
            "list": lambda: [self.a, self.act, self.b],
            "tuple": lambda: (self.a, self.act, self.b),
            "dict": lambda: {"a": self.a, "act": self.act, "b": self.b},
            "partial": lambda: [partial(self.a), self.act, partial(self.b)],
            "bound method": lambda: [self.a.forward, self.act.forward, self.b.__call__],
        }[how]()

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps.values() if isinstance(self.steps, dict) else self.steps:
            x = step(x)
        return x


@pytest.mark.parametrize("how", ["list", "tuple", "dict", "partial", "bound method"])
@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_models_that_hold_their_layers_elsewhere(how: str, where: str, path: Path, same: Same) -> None:
    model = saved(path, lambda: Walks("list").eval())
    with torch.device(where):
        place = Walks(how).eval()
    loaded = pc.load(place, path)
    assert isinstance(loaded.a, CompressedLayer)
    assert same(loaded(X), model(X))


def test_a_layer_in_a_closure_is_refused(path: Path, snapshot: Snapshot) -> None:
    saved(path)
    place = net()
    layer = place.one
    place.run = lambda x: 2 * layer(x)
    refused(path, "Linear cannot be replaced in the closure of run", snapshot, place)
    assert place.one is layer and type(place.act) is nn.ReLU


# --- failing late -------------------------------------------------------------------------------------------------------


def raises(*_: Any, **__: Any) -> None:
    raise RuntimeError("too late")


class Stubborn(Rotary):
    """Its state dict is more than tensors of its own."""

    def get_extra_state(self) -> Tensor:
        return torch.zeros(2)

    def set_extra_state(self, state: Tensor) -> None:
        self.kept = state
        if not self.__dict__.get("willing"):
            raise RuntimeError("too late")


def stubborn() -> nn.Sequential:
    return net(more=Stubborn())


def before_loading(model: Any) -> None:
    model.turn._register_load_state_dict_pre_hook(raises)


def after_loading(model: Any) -> None:
    model.register_load_state_dict_post_hook(raises)


def after_some_are_loaded(model: Any) -> None:
    model.turn.register_load_state_dict_post_hook(raises)


def changed_by_a_hook(model: Any) -> None:
    def hook(module: nn.Module, _: Any) -> None:
        module.gain.data.add_(1)

    model.turn.register_load_state_dict_post_hook(hook)


def added_by_a_hook(model: Any) -> None:
    def hook(module: nn.Module, _: Any) -> None:
        module.register_buffer("new", torch.ones(1))
        module.note = "loaded"
        raise RuntimeError("too late")

    model.turn.register_load_state_dict_post_hook(hook)


def renamed_by_a_hook(model: Any) -> None:
    def hook(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
        state[prefix + "table"] = state.pop(prefix + "table")
        state[prefix + "gain"], state[prefix + "table"] = state[prefix + "table"], state[prefix + "gain"]

    model.turn._register_state_dict_hook(hook)


def spread_over_one_number(model: Any) -> None:
    model.turn.table = model.turn.table[:1].expand(16)


LATE = [
    before_loading, after_loading, after_some_are_loaded, changed_by_a_hook, added_by_a_hook, renamed_by_a_hook,
    spread_over_one_number,
]  # fmt: skip


def everything(model: nn.Module) -> dict[str, Any]:
    """What a model is made of, by identity, and its numbers."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = id(module), module.training, sorted(vars(module))
        for kind, tensor in {**module._parameters, **module._buffers}.items():
            bits = None if tensor is None or tensor.is_meta else tensor.detach().reshape(-1).tolist()
            found[f"{name}.{kind}"] = id(tensor), bits
    return found


@pytest.mark.parametrize("spoil", LATE)
@pytest.mark.parametrize("target", ["dense", "compressed", "meta"])
def test_a_model_is_as_it_was(spoil: Callable[[Any], None], target: str, path: Path) -> None:
    saved(path)
    place = {"dense": net, "compressed": lambda: pc.compress(net(), pc.Int4()), "meta": on_meta}[target]()
    place.steps = [place.one, place.turn, place.turn.gain]
    spoil(place)
    before, steps = everything(place), [*place.steps]
    if target == "meta" and spoil is spread_over_one_number:
        pc.load(place, path)  # there each number has a place of its own
        return
    with pytest.raises((ValueError, RuntimeError)):
        pc.load(place, path)
    assert everything(place) == before
    assert all(now is then for now, then in zip(place.steps, steps, strict=True))
    if target != "meta":
        place.eval()(X)


def test_state_that_is_no_tensor_of_the_module(path: Path) -> None:
    model = pc.compress(stubborn(), INT8)
    pc.save(model, path)
    place = stubborn()
    place.more.willing = True
    place.more.set_extra_state("as it was")
    place.more.willing = False
    before = everything(place)
    with pytest.raises(RuntimeError, match="too late"):
        pc.load(place, path)
    assert everything(place) == before
    place.more.willing = True
    assert torch.equal(pc.load(place, path).more.kept, torch.zeros(2))


def test_an_encoder_keeps_its_fast_path_when_loading_fails(path: Path) -> None:
    def build() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1).eval()

    saved(path, build)
    place = build()
    switches = place.enable_nested_tensor, place.layers[0].activation_relu_or_gelu
    after_loading(place)
    with pytest.raises(RuntimeError, match="too late"):
        pc.load(place, path)
    assert switches == (place.enable_nested_tensor, place.layers[0].activation_relu_or_gelu)


def test_a_module_that_lets_no_attribute_be_set(path: Path, same: Same) -> None:
    class Locked(nn.Sequential):
        def __setattr__(self, name: str, value: Any) -> None:
            if "locked" in self.__dict__:
                raise AttributeError(f"{name} cannot be set")
            super().__setattr__(name, value)

    model = saved(path)
    place = Locked(OrderedDict(net().named_children())).eval()
    place.__dict__["locked"] = True
    before = everything(place)
    try:
        loaded = pc.load(place, path)
    except Exception:
        assert everything(place) == before
    else:
        assert same(loaded(X), model(X))


# --- where it is called -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [False, True])
def test_a_model_made_under_inference_mode(meta: bool, path: Path, same: Same) -> None:
    model = saved(path)
    with torch.inference_mode():
        place = on_meta() if meta else net()
    loaded = pc.load(place, path)
    with torch.inference_mode():
        assert same(loaded(X), model(X))
    with torch.inference_mode():
        place = net()
    before_loading(place)
    before = everything(place)
    with pytest.raises(RuntimeError, match="too late"):
        pc.load(place, path)
    assert everything(place) == before


def surroundings() -> Iterator[Any]:
    yield torch.inference_mode()
    yield torch.no_grad()
    yield torch.device("meta")


@pytest.mark.parametrize("index", range(3))
def test_wherever_it_is_called(index: int, path: Path, same: Same) -> None:
    model, place = saved(path), net()
    with list(surroundings())[index]:
        pc.save(model, path)
        pc.load(place, path)
    assert not any(t.is_inference() or t.is_meta for t in (*place.parameters(), *place.buffers()))
    assert same(place(X), model(X))
    x = X.clone().requires_grad_()
    place(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())


def test_under_another_default_dtype(path: Path, same: Same) -> None:
    model, place = saved(path), net()
    torch.set_default_dtype(torch.bfloat16)
    try:
        pc.save(model, path)
        pc.load(place, path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(place(X), model(X))
