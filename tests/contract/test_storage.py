"""save() and load() of every row: the same bits back; a bad file is refused by its tables, and the model is as it was."""

from __future__ import annotations

import copy
import itertools
import json
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import Snapshot, drop, edit, equal_states, flipped, header_size, pieces, refused, write
from torch import Tensor, nn

import pycompress as pc
from contract.cases import CASES, EACH_ROW, EVERY, Case
from pycompress.model import compressed_layers
from pycompress.nn import LAYERS, CompressedLayer
from pycompress.nn.layers import weights_of
from pycompress.weights import MAX_IN_FEATURES, OPTIONAL, Setting, Weight
from pycompress.weights.low_rank_conv import DECOMPOSITIONS

Same = Callable[[Tensor, Tensor], bool]
Sample = Callable[[Sequence[int], int], Sequence[int]]
Hostile = tuple[object, Callable[[Any], object], str]  # what it is, a change of the good one, the message

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}


def model_of(case: Case) -> nn.Sequential:
    """The dense layer, an activation that it may take up, a parameter and a buffer."""
    model = nn.Sequential(OrderedDict(layer=case.dense(), act=nn.ReLU(), slope=nn.PReLU()))
    model.register_buffer("table", torch.randn(3, 4))
    return model.eval()


def compressed(case: Case, method: Any = None) -> nn.Sequential:
    made = pc.compress(model_of(case), {"layer": method or case.method, "*": None})
    assert type(made.layer) is case.layer_type or method is not None
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# --- there and back -----------------------------------------------------------------------------------------------------

TARGETS = ["random weights", "meta", "compressed otherwise", "compressed on meta"]


def described(model: nn.Module) -> list[Any]:
    found = pc.summary(model)
    layers = [(r.method, r.label, r.rank, r.bits, r.density, r.bytes, r.activation) for r in found.layers if r.method]
    return [found.bytes, found.dense_bytes, *layers]


@EVERY
@pytest.mark.parametrize("target", TARGETS)
def test_round_trip(case: Case, target: str, path: Path, same: Same) -> None:
    model = compressed(case)
    pc.save(model, path)
    with torch.device("meta" if target == "meta" else "cpu"):
        place: nn.Module = model_of(case)
    if target == "compressed otherwise":
        others = [other.method for other in CASES if other.kind is case.kind and other is not case]
        place = pc.compress(place, {"layer": others[CASES.index(case) % len(others)], "*": None})
    if target == "compressed on meta":
        place = compressed(case).to("meta")
    loaded = pc.load(place, path)
    assert loaded is place
    assert equal_states(loaded, model)
    assert type(loaded.layer) is type(model.layer) and repr(loaded) == repr(model)
    assert loaded.layer.settings == model.layer.settings
    epilogue = case.kind.epilogue
    assert (loaded.layer.activation, type(loaded.act)) == (
        ("relu", nn.Identity) if epilogue else ("none", nn.ReLU)
    )  # fmt: skip
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert not any(module.training for module in loaded.modules())
    x = case.x()
    assert same(loaded(x), model(x))
    assert described(loaded) == described(model)
    (record,) = [record for record in pc.summary(loaded).layers if record.method]
    assert (record.name, record.method) == ("layer", case.layer_type.weight_type.name)
    assert record.error is None, "which is not in the file"


@EACH_ROW
def test_a_model_partly_on_meta(case: Case, path: Path, same: Same) -> None:
    model, place = compressed(case), model_of(case)
    pc.save(model, path)
    place.slope.to("meta")
    loaded, x = pc.load(place, path), case.x()
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert same(loaded(x), model(x))


@EVERY
def test_what_is_in_the_file_follows_from_the_table(case: Case, path: Path, snapshot: Snapshot) -> None:
    model = compressed(case)
    unchanged = snapshot(model)
    tensors, plan = pieces(path, model)
    assert unchanged()
    layer, weight = model.layer, model.layer.canonical()
    assert set(tensors) == set(model.state_dict()) - {"layer.weight"} and not [
        name for name in tensors if "packed" in name
    ]
    stored = {name.removeprefix("layer."): t for name, t in tensors.items() if name.startswith("layer.")}
    bias = {} if layer.bias is None else {"bias": layer.bias}
    expected = {**weight.tensors(), **bias}
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    forms = type(weight).expected(weight.shape, weight.settings())
    assert {name: (tuple(stored[name].shape), stored[name].dtype) for name in forms} == forms
    geometry = {} if layer.geometry is None else {"geometry": layer.geometry.settings()}
    assert plan["version"] == 4
    assert plan["layers"] == {
        "layer": {
            "kind": case.kind.name, **geometry, "weight": case.layer_type.weight_type.name, "version": type(weight).version,
            "settings": weight.settings(), "shape": list(weight.shape), "bias": layer.bias is not None,
            "activation": layer.activation,
        }
    }  # fmt: skip


@EVERY
def test_saving_twice_gives_the_same_file(case: Case, path: Path, tmp_path: Path) -> None:
    tensors, plan = pieces(path, compressed(case))
    again, second = pieces(tmp_path / "again.safetensors", pc.load(model_of(case), path))
    assert plan == second and tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


@EVERY
def test_the_layer_itself(case: Case, path: Path, same: Same) -> None:
    layer, x = pc.compress(case.dense(), {"": case.method}), case.x()
    pc.save(layer, path)
    loaded = pc.load(case.dense(), path)
    assert type(loaded) is type(layer) and loaded.kind is case.kind
    assert same(loaded(x), layer(x))


@EACH_ROW
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(case: Case, dtype: torch.dtype, path: Path, same: Same) -> None:
    model = pc.compress(model_of(case).to(dtype), {"layer": case.method, "*": None})
    pc.save(model, path)
    loaded, x = pc.load(model_of(case).to(dtype), path), case.x()
    x = x.to(dtype) if x.is_floating_point() else x
    assert loaded.slope.weight.dtype == loaded(x).dtype == dtype
    assert same(loaded(x), model(x))


@EACH_ROW
def test_training_flags_follow_the_model(case: Case, path: Path) -> None:
    pc.save(compressed(case), path)
    for training in (False, True):
        loaded = pc.load(model_of(case).train(training), path)
        assert all(module.training is training for module in loaded.modules())


class Two(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) - 2 * self.second(x)
        return y


def tied(case: Case) -> Two:
    model = Two(case.dense(), case.dense())
    model.second.weight = model.first.weight
    return model.eval()


@pytest.mark.parametrize("meta", [False, True])
@EVERY
def test_tied_layers(case: Case, meta: bool, path: Path, same: Same) -> None:
    model = pc.compress(tied(case), {"*": case.method})
    if not case.kind.shares:
        assert not compressed_layers(model)
        return
    tensors, _ = pieces(path, model)
    biases = [] if model.first.bias is None else ["bias", "bias"]
    stored = [*model.first.canonical().tensors(), *biases]
    assert sorted(name.rpartition(".")[2] for name in tensors) == sorted(stored), "a shared weight is stored once"
    with torch.device("meta" if meta else "cpu"):
        place = tied(case)
    loaded, x = pc.load(place, path), case.x()
    assert loaded.first.packed is loaded.second.packed and loaded.first.form == loaded.second.form
    assert described(loaded) == described(model)
    assert same(loaded(x), model(x))


@EACH_ROW
def test_one_module_under_two_names(case: Case, path: Path, same: Same) -> None:
    def build() -> Two:
        dense = case.dense()
        return Two(dense, dense).eval()

    model, x = pc.compress(build(), {"*": case.method}), case.x()
    pc.save(model, path)
    loaded = pc.load(build(), path)
    assert loaded.first is loaded.second and type(loaded.first) is case.layer_type
    assert same(loaded(x), model(x))


@EVERY
def test_a_loaded_model_does_not_depend_on_its_file(case: Case, path: Path, same: Same) -> None:
    pc.save(compressed(case), path)
    with torch.device("meta"):
        place = model_of(case)
    loaded, x = pc.load(place, path), case.x()
    state, y = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}, loaded(x)
    with path.open("r+b") as file:  # the same file, which may still be mapped
        file.write(b"\x55" * path.stat().st_size)
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
    assert same(loaded(x), y)


class Steps(nn.Module):
    """Walks a plain list of its layers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layer, self.act = case.dense(), nn.Tanh()
        self.steps = [self.layer, self.act]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


@EACH_ROW
def test_a_model_that_walks_a_list_of_its_layers(case: Case, path: Path, same: Same) -> None:
    model, place, x = pc.compress(Steps(case).eval(), {"layer": case.method}), Steps(case).eval(), case.x()
    pc.save(model, path)
    loaded = pc.load(place, path)
    assert loaded.steps == [loaded.layer, loaded.act] and type(loaded.layer) is case.layer_type
    assert same(loaded(x), model(x))


@EACH_ROW
@pytest.mark.parametrize("target", ["dense", "compressed"])
def test_a_load_that_fails_late_leaves_the_model_as_it_was(
    case: Case, target: str, path: Path, snapshot: Snapshot
) -> None:
    pc.save(compressed(case), path)
    place: nn.Module = model_of(case) if target == "dense" else compressed(case)

    def late(*_: Any) -> None:
        raise RuntimeError("too late")

    place.register_load_state_dict_post_hook(late)
    unchanged = snapshot(place)
    with pytest.raises(RuntimeError, match="too late"):
        pc.load(place, path)
    assert unchanged()


@EACH_ROW
@pytest.mark.parametrize("target", ["dense", "compressed"])
def test_hooks_of_a_layer_are_not_lost(case: Case, target: str, path: Path, snapshot: Snapshot) -> None:
    pc.save(compressed(case), path)
    place: nn.Sequential = model_of(case) if target == "dense" else compressed(case)
    place.layer.register_forward_hook(lambda *_: None)
    refused(path, "layer cannot be replaced in the model: it has hooks, which would be lost", snapshot, place)


# --- files that are refused ---------------------------------------------------------------------------------------------


def all_refused(
    case: Case,
    saved: nn.Module,
    path: Path,
    snapshot: Snapshot,
    plans: Iterable[Hostile] = (),
    others: Iterable[Hostile] = (),
) -> None:
    """Each change of the plan, and each one of the tensors, for a dense and a compressed model in turn."""
    tensors, plan = pieces(path, saved)
    targets = itertools.cycle((model_of(case), compressed(case)))
    for what, change, message in plans:
        bad = copy.deepcopy(plan)
        change(bad)
        write(path, tensors, bad)
        refused(path, message, snapshot, next(targets), what=what)
    for what, change, message in others:
        bad = dict(tensors)
        change(bad)
        write(path, bad, plan)
        refused(path, message, snapshot, next(targets), what=what)


WRONG = [None, True, "text", 1.5, [8], {}, -1, 2**70]


def wrong(value: Any) -> list[Any]:
    """Nothing that could stand for a value: of another type, or out of any range."""
    others = [float(value), str(value), [value]] if type(value) is int else [int(value)] if type(value) is bool else []
    return [*(bad for bad in WRONG if not (type(bad) is type(value) is bool)), *others]


def tables(weight: type[Weight], settings: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Setting, Any]]:
    """Where each setting stands, its line of the table, and its value; of a weight inside the weight too."""
    for option in weight.options:
        if option.name in settings:
            yield (option.name,), option, settings[option.name]
            for nested in weight._nested(settings) if isinstance(settings[option.name], dict) else ():
                inner, rest = nested.table(settings)
                for keys, line, value in tables(inner, rest):
                    yield (option.name, *keys), line, value


@EVERY
def test_hostile_settings(case: Case, path: Path, snapshot: Snapshot) -> None:
    model = compressed(case)
    layer = model.layer
    here = ("layers", "layer", "settings")

    def plans() -> Iterator[Hostile]:
        for keys, option, value in tables(layer.weight_type, layer.settings):
            at, name = (*here, *keys), option.name
            gone = (
                "the model has no tensor 'layer.(low_rank_residual|int8_input)_"
                if option.default is OPTIONAL
                else f"{name} is None"
            )
            yield f"{keys} missing", drop(*at), f"layer layer: .*{gone}" if option.default is not OPTIONAL else gone
            for bad in wrong(value):
                yield f"{keys} {bad!r}", edit(*at, value=bad), f"layer layer: .*{name}('s method)? is "
            if isinstance(value, dict):
                yield f"{keys} unknown", edit(*at, "code", value="import os"), r"layer layer: .*not \['code'\]"
                yield f"{keys} newer", edit(*at, "version", value=3), "layer layer: .*the version is 3, expected 1 to 2"
                for method in (["int8"], "os.system", "low_rank"):
                    yield f"{keys} {method}", edit(*at, "method", value=method), "method is .*, expected one of"
        for extra in ({"code": "import os"}, {"version": 1}, {"residuals": {}}):
            ((name, value),) = extra.items()
            yield extra, edit(*here, name, value=value), rf"layer layer: .*settings are .*not \['{name}'\]"

    all_refused(case, model, path, snapshot, plans())


@EVERY
def test_settings_of_another_weight_are_refused_or_mean_what_they_say(
    case: Case, path: Path, snapshot: Snapshot
) -> None:
    """Values that the table knows, but that the weight does not have: most want other tensors."""
    model = compressed(case)
    tensors, plan = pieces(path, model)
    weight, shape = model.layer.weight_type, (model.layer.n, model.layer.k)
    own = model.layer.canonical().tensors()
    targets = itertools.cycle((model_of(case), compressed(case)))
    for keys, _, value in tables(weight, model.layer.settings):
        near = [value - 1, value + 1] if type(value) is int else []
        for other in [7, 8, 16, 32, 64, 128, True, False, *DECOMPOSITIONS, [1, 2], [3, 3], [9, 1], *near]:
            if type(other) is not type(value) or other == value:
                continue
            bad = copy.deepcopy(plan)
            edit("layers", "layer", "settings", *keys, value=other)(bad)
            settings = bad["layers"]["layer"]["settings"]
            write(path, tensors, bad)
            try:
                known = weight.expected(shape, settings) == weight.expected(shape, model.layer.settings)
                message = "load: .*(expected|the model has no tensor|is missing)"
                if known:
                    weight.from_tensors(shape, own, settings)
                    if reason := type(model.layer).misfit(model.layer.geometry, settings):
                        raise ValueError(reason)
            except ValueError as error:
                known, message = False, f"layer layer: {re.escape(str(error))}"
            if not known:
                refused(path, message, snapshot, next(targets), what=settings)
                continue
            loaded = pc.load(model_of(case), path).layer
            assert loaded.settings == settings
            assert all(torch.equal(own[name], t) for name, t in loaded.canonical().tensors().items())


def entries(layer: CompressedLayer) -> list[tuple[str, list[Any], str]]:
    """A key of the layer's entry, values that it may not have, and what load() says of them."""
    n, k, own, kind = layer.n, layer.k, layer.weight_type, layer.kind
    kinds, weights = ({row[i] for row in LAYERS} for i in (0, 1))
    known = " or ".join(map(repr, weights_of(kind.name)))
    other_bias = layer.bias is None
    some_bias = rf"layer is .*bias={not other_bias}.* in the model" if kind.epilogue else "bias is True, expected false"
    geometries: tuple[list[Any], str] = ([{}, [], 1, "3x3"], "layer layer: geometry is .*, expected none")
    if layer.geometry is not None:
        geometries = [None, [], 1, "3x3"], f"layer layer: geometry is .*, expected that of {kind.phrase}"
    return [
        ("kind", ["conv9d", ["linear"], None, 3], "layer layer: kind is .*, expected 'linear' or"),
        ("kind", [*(kinds - {kind.name})], "layer layer: "),
        (
            "weight",
            ["int3", "os.system", "dense", [own.name], None, {}],
            f"layer layer: weight is .*, expected {known}",
        ),
        ("weight", [*(weights - {own.name})], "layer layer: "),
        ("version", [None, 0, own.version + 1, True, "1", 1.0, [1]], "layer layer: .*the version is .*, expected 1"),
        ("settings", [None, [8, 8], "{}", 3], "layer layer: settings is .*, expected those"),
        ("bias", [1, None, "true", []], "layer layer: bias is .*, expected .*false"),
        ("bias", [other_bias], some_bias),
        ("activation", ["tanh", None, ["relu"], {}], "layer layer: activation is .*, expected one"),
        ("activation", [] if kind.epilogue else ["relu"], "layer layer: activation is 'relu', expected one"),
        ("shape", [None, 512, [512], [n, k, 1], "8x8", {}], "layer layer: shape is "),
        ("shape", [[-n, -k], [0, k], [float(n), float(k)], [True, True]], "layer layer: shape is "),
        ("shape", [[k, n], [n + 1, k], [n, k + 1]], "load: .*(in the model|layer layer: |expected)"),
        ("shape", [[n, MAX_IN_FEATURES + 1], [10**9, 10**9], [2**70, 2**70]], "layer layer: .*the shape is"),
        ("geometry", *geometries),
    ]


@EACH_ROW
def test_hostile_entries(case: Case, path: Path, snapshot: Snapshot) -> None:
    model, entry = compressed(case), ("layers", "layer")
    layer = model.layer

    def plans() -> Iterator[Hostile]:
        for key, values, message in entries(layer):
            for bad in values:
                yield f"{key} {bad!r}", edit(*entry, key, value=bad), message
        for key in ("kind", "weight", "version", "settings", "bias", "activation", "shape"):
            yield f"{key} missing", drop(*entry, key), f"layer layer: .*{key} is None"
        for name, value in {} if layer.geometry is None else layer.geometry.settings().items():
            yield f"{name} missing", drop(*entry, "geometry", name), "layer layer: .*the settings are "
            for bad in (bad for bad in wrong(value) if bad is not value):
                shown = rf"\({bad[0]},\)" if isinstance(bad, list) else repr(bad)
                message = rf"layer layer: .*{name} is |in the model, .*{name}={shown}.* in the file"
                yield f"{name} {bad!r}", edit(*entry, "geometry", name, value=bad), message
        if layer.geometry is not None:
            yield "geometry", edit(*entry, "geometry", "code", value=1), "layer layer: .*the settings are .*'code'"

    all_refused(case, model, path, snapshot, plans())


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "one less": lambda t: t[:-1], "none": lambda t: t[:0], "twice": lambda t: torch.cat([t, t]), "turned": lambda t: t.mT,
    "flat": lambda t: t.flatten(), "one dimension more": lambda t: t[None], "narrower": lambda t: t[..., 1:],
}  # fmt: skip
OTHER_DTYPES = [*DTYPES, torch.float64, torch.float16, torch.int32, torch.bool]


@EVERY
def test_hostile_tensors(case: Case, path: Path, snapshot: Snapshot) -> None:
    model = compressed(case)
    layer = model.layer
    weight, names = (
        layer.weight_type,
        {layer.weight_type._stored_as(field.attribute) for field in layer.weight_type.fields},
    )
    forms = weight.expected((layer.n, layer.k), layer.settings)
    if layer.bias is not None:
        forms["bias"] = ((layer.n,), torch.float32)

    def tensors() -> Iterator[Hostile]:
        for name, (shape, dtype) in forms.items():
            full = f"layer.{name}"
            expected = rf"expected {DTYPES[dtype]} {re.escape(str(list(shape)))}"
            yield f"{name} missing", lambda ts, full=full: ts.__delitem__(full), f"the tensor {full} is missing"
            for what, change in SHAPES.items():
                if len(shape) == 1 and what == "turned":
                    continue
                found = tuple(change(torch.empty(shape)).shape)
                if found != shape:
                    message = rf"{full} is {DTYPES[dtype]} {re.escape(str(list(found)))}, {expected}"
                    yield f"{name} {what}", lambda ts, f=full, c=change: ts.update({f: c(ts[f])}), message
            for other in OTHER_DTYPES:
                if other != dtype:
                    message = rf"{full} is \w+ .*, {expected}"
                    yield f"{name} {other}", lambda ts, f=full, d=other: ts.update({f: ts[f].to(d)}), message
        for name in {*names, "bias", "weight", "zero_point", "low_rank_residual_dense_weight"} - forms.keys():
            message = f"the model has no tensor 'layer.{name}'"
            yield f"{name}, too", lambda ts, n=name: ts.update({f"layer.{n}": torch.ones(3)}), message

    all_refused(case, model, path, snapshot, others=tensors())


FLOATS = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, -1.0, 2.0**-127, 2.0**125]
POISON = {torch.int8: [-128, 0, 64, -64, 127], torch.uint8: [0, 255, 16]}


def never(name: str, value: float, dtype: torch.dtype) -> bool:
    """What no tensor of a weight may hold."""
    broken = not abs(value) < torch.inf
    return broken or (dtype == torch.int8 and value == -128) or (name.endswith("scale") and value <= 0)


@EVERY
def test_hostile_values(case: Case, path: Path, snapshot: Snapshot) -> None:
    """What the weight itself refuses, and only that."""
    model = compressed(case)
    tensors, plan = pieces(path, model)
    layer, targets = model.layer, itertools.cycle((model_of(case), compressed(case)))
    own = {name: tensor.clone() for name, tensor in layer.canonical().tensors().items()}
    for name, tensor in own.items():
        for value in FLOATS if tensor.is_floating_point() else POISON[tensor.dtype]:
            for place in [-1, slice(None)] if tensor.numel() else [slice(None)]:
                bad = tensor.clone()
                bad.view(-1)[place] = value
                changed, message = {**own, name: bad}, ""
                try:
                    layer.weight_type.from_tensors((layer.n, layer.k), changed, layer.settings)
                except ValueError as error:
                    message = f"layer layer: {re.escape(str(error))}"
                assert message or not never(name, value, tensor.dtype) or not tensor.numel()
                write(path, {**tensors, f"layer.{name}": bad}, plan)
                if message:
                    refused(path, message, snapshot, next(targets), what=f"{name} {value}")
                elif place == -1:
                    found = pc.load(model_of(case), path).layer.canonical().tensors()
                    assert all(torch.equal(found[key], t) for key, t in changed.items()), f"{name} {value}"
    for value in (torch.nan, torch.inf, -torch.inf) if layer.bias is not None else ():
        bad = layer.bias.clone()
        bad[3] = value
        write(path, {**tensors, "layer.bias": bad}, plan)
        refused(path, "layer layer: .*bias holds NaN or Inf", snapshot, next(targets), what=f"bias {value}")


@EACH_ROW
def test_every_truncation_is_refused(case: Case, path: Path, snapshot: Snapshot) -> None:
    pc.save(compressed(case), path)
    whole, targets = path.read_bytes(), (model_of(case), compressed(case))
    header, size = header_size(whole), len(whole)
    sizes = [*range(10), header // 2, header + 7, header + 8, header + 9]
    for length in [*sizes, *range(header + 10, size, (size - header) // 6), size - 1]:
        path.write_bytes(whole[:length])
        refused(path, "load: .*not a whole safetensors file", snapshot, *targets, what=length)
    path.write_bytes(whole + b"\0")
    refused(path, "load: ", snapshot, *targets)


@EACH_ROW
def test_flipped_bytes_give_an_error_or_a_whole_model(case: Case, path: Path, sample: Sample) -> None:
    """Bits that flip in a number cannot be told from another number; anything else has to be noticed."""
    pc.save(compressed(case), path)
    files = list(flipped(path.read_bytes(), 150, 4))
    chosen = sample(range(150), 16)
    refusals = 0
    for index in chosen:
        path.write_bytes(files[index])
        model = model_of(case)
        before = copy.deepcopy(model)
        try:
            pc.load(model, path)
        except ValueError:
            refusals += 1
            assert equal_states(model, before)
        else:
            assert [type(layer) for layer in compressed_layers(model).values()] == [case.layer_type]
            assert model(case.x()).shape == before(case.x()).shape
    assert refusals > len(chosen) / 2


@EACH_ROW
def test_bytes_that_are_no_file(case: Case, path: Path, snapshot: Snapshot) -> None:
    """Noise, a header longer than any file, and tensors that nobody could hold: refused before anything is allocated."""
    _, plan = pieces(path, compressed(case))
    targets = model_of(case), compressed(case)
    generator = torch.Generator().manual_seed(3)
    for size in (0, 1, 8, 9, 64, 1000, 100_000):
        path.write_bytes(torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).numpy().tobytes())
        refused(path, "load: ", snapshot, *targets, what=f"{size} bytes of noise")
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}" * 100)
    refused(path, "load: ", snapshot, *targets, what="a header of 2^63 bytes")
    for name in compressed(case).layer.canonical().tensors():
        claim = {"dtype": "U8", "shape": [2**20, 2**20], "data_offsets": [0, 2**40]}
        text = json.dumps({"__metadata__": {"pycompress": json.dumps(plan)}, f"layer.{name}": claim}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(1000))
        refused(path, "not a whole safetensors file", snapshot, *targets, what=name)


# --- models that are others ---------------------------------------------------------------------------------------------


def otherwise(case: Case) -> Iterator[tuple[str, nn.Module, str]]:
    """What may stand in the place of the layer, and what load() says of it."""
    own = case.kind
    for other in {other.kind: other for other in CASES if other.kind is not case.kind}.values():
        for there in (other.dense(), compressed(other).layer):
            yield other.kind.name, there, f"layer is a {type(there).__name__} in the model, expected {own.phrase}"
    for there in (nn.ReLU(), nn.ConvTranspose2d(5, 8, 3), nn.LayerNorm(8)):
        yield repr(there), there, f"layer is a {type(there).__name__} in the model, expected {own.phrase}"
    taller, other_bias = case.dense(), case.dense()
    taller.weight = nn.Parameter(torch.cat([taller.weight, taller.weight[:1]]))
    if getattr(taller, "bias", None) is not None:
        taller.bias = nn.Parameter(torch.cat([taller.bias, taller.bias[:1]]))
    n, k = own.shape(case.dense())
    yield "taller", taller, rf"layer is \[{n + 1}, {k}\] .* in the model, \[{n}, {k}\] .* in the file"
    if own.epilogue:
        there = own.bias(other_bias) is None
        other_bias.bias = nn.Parameter(torch.zeros(n)) if there else None
        yield "bias", other_bias, f"bias={there}.* in the model, .*bias={not there}.* in the file"


@EACH_ROW
def test_models_of_another_architecture(case: Case, path: Path, snapshot: Snapshot) -> None:
    pc.save(compressed(case), path)
    for what, layer, message in otherwise(case):
        model = model_of(case)
        model.layer = layer
        refused(path, message, snapshot, model, what=what)
    model = model_of(case)
    refused(path, "the model has no layer 'layer'", snapshot, nn.Sequential(*model), nn.Sequential(), what="others")
    refused(path, "load: ", snapshot, case.dense(), model.slope, what="a part of it")
    model.more = nn.Linear(8, 8)
    refused(path, "the tensor more.* is missing", snapshot, model, what="more of it")
    if case.kind.epilogue:
        model = model_of(case)
        model.act = nn.Tanh()
        message = "act is a Tanh in the model, in the file an activation that a layer applies itself"
        refused(path, message, snapshot, model, what="another activation")
