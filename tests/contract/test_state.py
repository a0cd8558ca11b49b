"""State: made from a dense layer, copied, pickled, saved, loaded, moved; and what a bad state dict leaves as it was."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract.cases import (
    CASES,
    EACH_ROW,
    EVERY,
    ROWS,
    Case,
    Forked,
    Same,
    State,
    equal_states,
    equal_weights,
    over,
    state,
)
from pycompress.kinds import KINDS, kind_of
from pycompress.methods import Int8, Sparse
from pycompress.nn import LAYERS
from pycompress.weights import Weight
from pycompress.weights.rules import positive
from pycompress.weights.weight import Field, Settings

WITH_SCALES = [case for case in ROWS if any("scale" in name for name in case.layer()._expected())]


# --- making one ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@EVERY
def test_from_dense_holds_what_the_method_makes(case: Case, bias: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        dense = case.dense(bias=bias).to(dtype)
        made = case.layer_type.from_dense(dense, case.method)
        weight = case.kind.fitted(case.method, dense).compress(case.kind.matrix(dense))
        assert (type(made), made.activation, (made.n, made.k)) == (case.layer_type, "none", weight.shape)
        assert made.settings == weight.settings() and equal_weights(made.canonical(), weight)
        assert made.dense_shape == tuple(case.kind.stored(dense).shape)
        assert (made.bias is None) is not (bias and case.kind.epilogue)
        if made.bias is not None:
            assert torch.equal(made.bias, dense.bias.float())  # type: ignore[operator, union-attr]
        if made.op is not None:
            torch.testing.assert_close(made.op.dense(made.packed, made.form), weight.decompress())
        assert not list(made.parameters())


@EVERY
def test_shares_no_memory_with_what_it_is_made_of(case: Case, same: Same) -> None:
    dense, x = case.dense(), case.x()
    made = case.layer_type.from_dense(dense, case.method)
    before = state(made)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert equal_states(state(made), before)
    again = case.twin(made)
    assert again.same_weight(made) and same(again(x), made(x))
    for buffer in made.buffers():
        buffer.zero_()
    assert equal_states(state(again), before), "build copies what it is given"


@EACH_ROW
def test_the_row_names_its_weight_its_kind_and_a_method(case: Case) -> None:
    cls, dense = case.layer_type, case.dense()
    assert LAYERS[cls.kind.name, cls.weight_type.name] is cls and any(kind.name == cls.kind.name for kind in KINDS)
    assert cls.weight_type.name == cls.default_method.name
    made, kind = cls.from_dense(dense), kind_of(dense)
    assert kind is not None and kind.name == cls.kind.name
    weight = kind.fitted(cls.default_method, dense).compress(kind.matrix(dense))
    assert equal_weights(made.canonical(), weight), "without a method it is the default one's"
    assert made.state_dict().keys() >= made._expected().keys()


@EACH_ROW
def test_weights_and_dense_layers_of_another_kind_are_refused(case: Case) -> None:
    cls, name = case.layer_type, case.layer_type.__name__
    for other in {case.layer_type.weight_type: case for case in ROWS}.values():
        weight = other.layer().canonical()
        if other.layer_type.weight_type is not cls.weight_type:
            message = f"{name}: the weight is {type(weight).__name__}, expected {cls.weight_type.__name__}"
            with pytest.raises(TypeError, match=message):
                cls.replacing(case.dense(), weight)
    for method in (Int8(), Sparse()):
        if method.name != cls.weight_type.name:
            with pytest.raises(TypeError, match=f"the weight is {method.name.title()}Weight, expected"):
                cls.from_dense(case.dense(), method)
    for other in {case.kind.name: case for case in ROWS}.values():
        if other.kind.name != cls.kind.name:
            message = f"{name}: the dense layer is {type(other.dense()).__name__}, expected {cls.kind.title}"
            with pytest.raises(TypeError, match=message):
                cls.from_dense(other.dense())
            with pytest.raises(TypeError, match=message):
                cls.replacing(other.dense(), case.layer().canonical())
    dense = case.dense()
    with torch.no_grad():
        case.kind.stored(dense).view(-1)[5] = torch.nan
    with pytest.raises(ValueError, match=r"NaN|finite"):
        cls.from_dense(dense, case.method)


@over([case for case in ROWS if case.kind.epilogue])
def test_a_bias_or_an_activation_that_is_none_is_refused(case: Case) -> None:
    made, name = case.layer(), case.layer_type.__name__
    n, infinite = made.n, torch.full((made.n,), torch.inf)
    for bias, message in (
        (torch.zeros(n + 1), rf"{name}: bias is \[{n + 1}\], expected \[{n}\]"),
        (torch.zeros(n, 1), rf"{name}: bias is \[{n}, 1\], expected \[{n}\]"),
        (infinite, "the bias holds NaN or Inf"),
        (infinite - infinite, "the bias holds NaN or Inf"),
        (torch.full((n,), 1e300, dtype=torch.float64), "the bias holds NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=message):
            case.layer_type.build(made.canonical(), made.geometry, bias)
    with pytest.raises(ValueError, match=f"{name}: activation is 'tanh', expected one of none, relu"):
        case.twin(made, "tanh")


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
@EVERY
def test_copies(case: Case, duplicate: Callable[[nn.Module], nn.Module], same: Same) -> None:
    for activation, bias in (("gelu", True), ("none", False)):
        original, x = case.layer(activation, bias=bias).eval(), case.x()
        original.note = "kept"
        original.register_buffer("extra", torch.randn(3))
        copied = duplicate(original)
        assert type(copied) is type(original) and copied is not original
        assert equal_states(state(copied), state(original)) and repr(copied) == repr(original)
        assert (copied.training, copied.note, copied.label) == (False, "kept", original.label)
        assert copied.settings == original.settings and copied.settings is not original.settings
        assert list(copied.state_dict()) == list(original.state_dict())
        assert same(copied(x), original(x))
        before = state(copied)
        for buffer in original.buffers():
            buffer.zero_()
        assert equal_states(state(copied), before), "a copy shares no memory"


@EVERY
def test_a_pickle_holds_the_canonical_weight(case: Case) -> None:
    """Not the packed one, whose layout belongs to this processor."""
    original = case.layer()
    held, tensors = original.__getstate__(), original.canonical().tensors()
    assert set(held["_buffers"]) == {*tensors, "bias"} and "form" not in held
    assert equal_states({name: held["_buffers"][name] for name in tensors}, tensors)
    assert "packed" in original._buffers and hasattr(original, "form"), "and the layer itself is as it was"


@EACH_ROW
def test_a_model_around_it_and_one_module_under_two_names(case: Case, same: Same) -> None:
    model, x = nn.Sequential(case.layer(), nn.Dropout(0.5)), case.x()
    copied = copy.deepcopy(model).eval()
    assert model.training and not copied.training and not copied[0].training
    assert same(copied(x), model.eval()(x))
    one = case.layer()
    two = copy.deepcopy(nn.ModuleDict({"a": one, "b": one}))
    assert two["a"] is two["b"]


@EACH_ROW
def test_which_weights_are_the_same_and_may_be_shared(case: Case) -> None:
    variants = [one for one in CASES if one.layer_type is case.layer_type]
    dense = case.dense()
    made = [one.layer_type.from_dense(dense, one.method) for one in variants]
    for one, first in zip(variants, made, strict=True):
        for other, second in zip(variants, made, strict=True):
            assert first.same_weight(second) is (one is other), (one, other)
    for other in ROWS:
        assert made[0].same_weight(other.layer()) is False, "of other numbers, or another class"
    first = made[0]
    second = case.layer_type.build(
        first.canonical(), first.geometry, torch.randn(first.n) if case.kind.epilogue else None
    )
    assert first.same_weight(second) and copy.deepcopy(first).same_weight(second)
    second.share(first)
    model = copy.deepcopy(nn.ModuleList([first, second]))
    assert model[0].packed is model[1].packed, "layers that share a weight go on sharing it"
    assert model[0].packed is not first.packed
    assert equal_weights(model[1].canonical(), first.canonical())


@over(WITH_SCALES)
def test_weights_that_differ_in_a_scale_alone_are_not_the_same(case: Case) -> None:
    made = case.layer()
    other, found = copy.deepcopy(made), made.state_dict()
    name = next(name for name in found if "scale" in name)
    other.load_state_dict({**found, name: found[name] * 2})
    assert not other.same_weight(made)


# --- state_dict ---------------------------------------------------------------------------------------------------------


@EVERY
def test_a_state_dict_is_canonical(case: Case) -> None:
    for bias in (False, True):
        made = case.layer(bias=bias)
        found, tensors = made.state_dict(), made.canonical().tensors()
        rest = ["weight", *([] if made.bias is None else ["bias"])]
        assert list(found) == [*tensors, *rest] == [*case.layer_type.weight_type.names(made.settings).values(), *rest]
        assert (found["weight"].dtype, found["weight"].tolist()) == (torch.uint8, [case.layer_type.weight_type.version])
        assert equal_states({name: found[name] for name in tensors}, tensors)
        assert list(nn.Sequential(made).state_dict()) == [f"0.{name}" for name in found]
        assert made.canonical_bytes() == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("assign", [False, True])
@EVERY
def test_state_dict_round_trip(case: Case, assign: bool, same: Same) -> None:
    source, target = (nn.Sequential(case.layer("silu"), nn.Linear(4, 10)) for _ in range(2))
    file, x = io.BytesIO(), case.x()
    torch.save(source.state_dict(), file)
    file.seek(0)
    for found in (source.state_dict(), torch.load(file)):
        result = target.load_state_dict(found, strict=True, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert equal_states(state(target), state(source)) and target[0].same_weight(source[0])
        assert same(target[0](x), source[0](x))


def fields(weight_type: type[Weight], settings: Settings) -> Iterator[tuple[str, Field]]:
    """The stored names of a weight, and of one inside it, with what its table says of them."""
    for field in weight_type._there(settings):
        yield weight_type._stored_as(field.attribute), field
    for option in weight_type._nested(settings):
        inner, rest = option.table(settings)
        yield from ((weight_type._prefix(option) + name, field) for name, field in fields(inner, rest))


def filled(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[:1] = value
    return tensor


def other_numbers(name: str, tensor: Tensor) -> Tensor:
    """Good ones, in the same places."""
    return tensor * 2 if "scale" in name else -tensor if tensor.dtype.is_signed else tensor


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.bool)
FLOAT_RULES = "NaN or Inf|not a positive finite number|is not between|of the values are zero"


def bad_tensors(name: str, tensor: Tensor, field: Field) -> Iterator[tuple[object, str]]:
    """What a state dict might hold in a tensor's place, and what the error says."""
    shape = "is .*, expected|values, the mask has"
    changed = [
        tensor[:-1],
        torch.cat([tensor, tensor[:1]]),
        tensor[None],
        tensor[..., :-1],
        tensor[:0],
        tensor.flatten(),
    ]
    changed += [tensor.T] if tensor.dim() == 2 else []
    for other in changed:
        if other.shape != tensor.shape:
            yield other, shape
    if tensor.numel():
        yield tensor.view(-1)[0], rf"{shape}|0-d|dimension"
    for dtype in DTYPES:
        if dtype != tensor.dtype:
            yield tensor.to(dtype), rf"{name} is torch\..*, expected torch\."
    yield [1, 2], f"{name} is list, expected a tensor"
    yield tensor.numpy() if tensor.dtype != torch.bfloat16 else 1.5, f"{name} is .*, expected a tensor"
    yield tensor.to("meta"), ""
    if field.rule is None or not tensor.numel():
        return
    if tensor.is_floating_point():
        for value in (torch.nan, torch.inf, -torch.inf):
            yield filled(tensor, value), FLOAT_RULES
        if field.rule is positive or "scale" in name:
            for value in (0.0, -1.0):
                yield filled(tensor, value), "not a positive finite number|is not between"
    elif tensor.dtype == torch.int8:
        yield filled(tensor, -128), r"holds -128, expected \[-"
    elif tensor.dtype == torch.uint8 and "_input_" not in name:  # of which 255 is a good one
        yield torch.full_like(tensor, 255), "bits set behind|the mask has"


# What the table of fields does not say: of a weight's name and, where there is one, its settings' bits.
OWN: dict[str, list[tuple[str, Callable[[Tensor], Tensor], str]]] = {
    "linear int8: 7": [("int8_values", lambda t: torch.full_like(t, 64), r"\[-63, 63\]")],
    "linear int8: static a7": [("int8_input_zero_point", lambda t: filled(t, 128), "is 128, expected 0 to 127")],
    "linear int4: g32": [
        ("int4_values", lambda t: t.repeat(1, 2)[:, : 2 * t.shape[1] - 1], "int4_values is"),  # one value a byte
        ("int4_values", lambda t: t | 0xF0, "values has bits set behind"),
        ("int4_zero_point", lambda t: t | 0xF0, "zero_point has bits set behind"),
        ("int4_scale", lambda t: filled(t, 2.0**125), "a scale is not between"),
    ],
    "linear sparse: int8": [
        ("sparse_mask", lambda t: t | torch.tensor([[64], *[[0]] * (len(t) - 1)], dtype=torch.uint8), "bits"),
        ("sparse_mask", lambda t: t | 128, "bits set behind k = 71"),
        ("sparse_mask", torch.zeros_like, "the mask has 0 bits set"),
        ("sparse_values", lambda t: t[:0], "0 values, the mask has"),
        ("sparse_values", lambda t: filled(t, 0), "1 of the values are zero"),
    ],
    "linear sparse: float32": [("sparse_values", lambda t: filled(t, 0), "1 of the values are zero")],
    "conv2d sparse: float32": [("sparse_values", lambda t: t.to(torch.int8), "sparse_values is torch.int8")],
}


@EVERY
def test_a_bad_state_dict_is_refused_and_the_layer_unchanged(case: Case) -> None:
    target = case.layer()
    good = {name: other_numbers(name, tensor) for name, tensor in target.state_dict().items()}
    model, before = nn.Sequential(target), state(target)
    form, settings = target.form, target.settings
    bad = [
        (name, wrong, message)
        for name, field in fields(case.layer_type.weight_type, target.settings)
        for wrong, message in bad_tensors(name, good[name], field)
    ]
    bad += [(name, change(good[name]), message) for name, change, message in OWN.get(repr(case), [])]
    if target.bias is not None:
        bias = good["bias"]
        bad += [("bias", bias[:-1], "bias is"), ("bias", [1.0], "bias is list"), ("bias", bias[None], "bias is")]
        bad += [("bias", bias * value, "the bias holds NaN") for value in (torch.nan, torch.inf)]

    def refused(module: nn.Module, found: State, message: str, strict: bool = True) -> None:
        with pytest.raises(RuntimeError) as error:
            module.load_state_dict(found, strict=strict)
        assert re.search(message, str(error.value)), (list(found), message, str(error.value))

    for name, wrong, message in bad:
        for strict in (False, True):
            refused(target, {**good, name: wrong}, message, strict)
        refused(model, {f"0.{key}": value for key, value in {**good, name: wrong}.items()}, message)
        refused(
            target, {name: wrong}, message if name == "bias" else f"there are {name}, expected all of", strict=False
        )
        assert equal_states(state(target), before), (name, message)
    for name in good:
        rest = {key: value for key, value in good.items() if key != name}
        refused(target, rest, rf"Missing key.*{name}")
        refused(model, {f"0.{key}": value for key, value in rest.items()}, rf"Missing key.*0\.{name}")
    assert equal_states(state(target), before) and (target.form, target.settings) == (form, settings)
    target.load_state_dict({**good, "unknown": torch.zeros(3)}, strict=False)
    assert equal_states(target.state_dict(), good)
    # There torch has loaded the rest by the time it complains, as with any module.
    for module, prefix in ((model, "0."), (target, "")):
        found = {prefix + key: value for key, value in {**good, "unknown": torch.zeros(3)}.items()}
        refused(module, found, rf"Unexpected key.*{prefix}unknown")


@EVERY
def test_a_dense_layer_and_a_compressed_one_refuse_each_others_state(case: Case) -> None:
    dense, made = case.dense(), case.layer()
    for strict in (True, False):
        for assign in (False, True):
            for target, source in ((made, dense), (dense, made)):
                before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
                for module, found in ((target, source), (nn.Sequential(target), nn.Sequential(source))):
                    with pytest.raises(
                        RuntimeError, match=r"weight: it is torch.float32|size mismatch for (0\.)?weight"
                    ):
                        module.load_state_dict(found.state_dict(), strict=strict, assign=assign)
                now = target.state_dict()
                same = {name for name in now if target is made or name != "bias"}  # which torch has loaded by then
                assert equal_states({name: now[name] for name in same}, {name: before[name] for name in same})
    given = {name: tensor.half() for name, tensor in dense.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=f"weight: it is torch.float16 .*, expected the state of a {type(made).__name__}"
    ):
        made.load_state_dict(given, strict=False)


@EVERY
def test_a_state_dict_of_version_1_is_loaded(case: Case, same: Same) -> None:
    """Of a weight that has one: canonical tensors by other names, and no mark."""
    made, target = case.layer(), case.layer()
    older = case.layer_type.weight_type.of_version(1)
    if older is case.layer_type.weight_type:
        pytest.skip("its first version is the present one")
    if made.settings.get("static"):
        pytest.skip("its first version knew no static weights")
    parts, x = made.canonical().parts(), case.x()
    found = {stored: parts[part] for part, stored in older.names(made._settings_of(older)).items()}
    assert not found.keys() & made._expected().keys()
    found |= {} if made.bias is None else {"bias": made.bias}
    result = target.load_state_dict(found)
    assert (
        not result.missing_keys and not result.unexpected_keys and equal_states(target.state_dict(), made.state_dict())
    )
    assert same(target(x), made(x)) and target.settings == made.settings
    before = state(target)
    for name in found.keys() - {"bias"}:
        rest = {key: tensor for key, tensor in found.items() if key != name}
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=r"expected (all of|the state of a)|Missing key"):
                target.load_state_dict(rest, strict=strict)
    assert equal_states(state(target), before)
    pickled = made.__getstate__()
    for name in made._expected():
        del pickled["_buffers"][name]
    for name in ("kind", "dtype", *made.kind.attributes(made.n, made.k, made.geometry)):
        del pickled[name]
    pickled["_buffers"] |= {"weight_scale": None, **found}
    pickled["settings"] = {
        name: {key: v for key, v in value.items() if key != "version"} if isinstance(value, dict) else value
        for name, value in made.settings.items()
    }
    again = type(made).__new__(type(made))
    again.__setstate__(pickled)
    assert equal_states(again.state_dict(), made.state_dict()) and again.settings == made.settings
    assert repr(again) == repr(made) and again.dtype == torch.float32 and same(again(x), made(x))


@EACH_ROW
def test_a_newer_version_is_refused(case: Case) -> None:
    made = case.layer()
    for version in (0, 3, 255):
        with pytest.raises(RuntimeError, match=f"weight: .*the version is {version}, expected 1"):
            made.load_state_dict(
                {**made.state_dict(), "weight": torch.tensor([version], dtype=torch.uint8)}, strict=False
            )


@EACH_ROW
def test_hooks_on_loading_and_saving_run(case: Case) -> None:
    made, calls = case.layer(), []
    made.register_load_state_dict_pre_hook(lambda _module, _state, prefix, *_: calls.append(f"before {prefix}"))
    made.register_load_state_dict_post_hook(lambda *_: calls.append("after"))

    def without_bias(_module: nn.Module, found: State, *_: Any) -> None:
        found.pop("bias", None)

    made.register_state_dict_post_hook(without_bias)
    assert "bias" not in made.state_dict()
    nn.Sequential(made).load_state_dict(nn.Sequential(case.layer()).state_dict())
    assert calls == ["before 0.", "after"]


def unmeasured(settings: Settings) -> State:
    """Those that do not follow from the tensors."""
    rest = {name: value for name, value in settings.items() if name not in ("rank", "ranks", "nnz")}
    return {name: unmeasured(value) if isinstance(value, dict) else value for name, value in rest.items()}


@cache
def layers_of(kind: str) -> list[Any]:
    """One of each variant."""
    return [case.layer() for case in CASES if case.kind.name == kind]


@EVERY
def test_the_state_of_another_layer_is_taken_whole_or_not_at_all(case: Case, same: Same) -> None:
    """Of one with another rank, or another number of non-zeros, it is; of one with other names or dtypes it is not."""
    x = case.x()
    made, narrow = case.layer(), nn.Linear(3, 2) if case.kind.name != "linear" else nn.Linear(70, 24)
    for other in (*layers_of(case.kind.name), case.dense(), narrow):
        target = copy.deepcopy(made)
        before, settings, found = state(target), target.settings, other.state_dict()
        mine = {name: tensor.dtype for name, tensor in target.state_dict().items()}
        alike = {name: tensor.dtype for name, tensor in found.items()} == mine
        alike_in_mine = not alike and {name: found[name].dtype for name in mine if name in found} == mine
        try:
            target.load_state_dict(found)
        except RuntimeError as error:
            assert any(name in str(error) for name in {*mine, *found})  # noqa: PT017
            if (
                not alike_in_mine
            ):  # else torch complains of names that it does not know, and has loaded the rest by then
                assert equal_states(state(target), before) and target.settings == settings
            assert type(other) is not type(target) or unmeasured(other.settings) != unmeasured(settings)
        else:
            assert alike and type(other) is type(target), "names and dtypes say that it is of another kind"
            assert equal_states(target.state_dict(), found)
            assert same(target(x), case.twin(target)(x)), "with the other settings that it had"
            if other.settings == target.settings:
                assert target.same_weight(other) and same(target(x), other(x))
                assert (target.label, repr(target)) == (other.label, repr(other))


# --- dtypes and devices -------------------------------------------------------------------------------------------------

MOVES: list[Callable[[nn.Module], nn.Module]] = [
    lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.float(), lambda m: m.cpu(),
    lambda m: m.to("cpu", torch.float16), lambda m: m.to(memory_format=torch.channels_last), lambda m: m.share_memory(),
    lambda m: m.requires_grad_(False).train().eval(),
]  # fmt: skip


@EVERY
def test_moving_keeps_the_numbers(case: Case, same: Same) -> None:
    made, x = case.layer(), case.x()
    half = x if case.kind.tokens else x.bfloat16()
    expected, expected_half, before = made(x), made(half), state(made)
    for move in MOVES:
        model = move(nn.Sequential(made))
        assert model[0] is made and equal_states(state(made), before)  # type: ignore[index]
        y = made(x)
        assert same(y, expected.to(y.dtype)) and same(made(half), expected_half.to(made(half).dtype))
        assert case.kind.tokens or y.dtype == x.dtype


@EVERY
def test_meta_device_and_back(case: Case, same: Same) -> None:
    source, target, x = case.layer("relu"), case.layer("relu"), case.x()
    shown = repr(target), target.label, target.canonical_bytes(), copy.deepcopy(target.settings)
    target.to("meta")
    assert target.packed.is_meta and target.weight.is_meta and target.weight.shape == source.weight.shape
    y = target(x.to("meta"))
    assert y.is_meta and y.shape == source(x).shape and y.dtype == source(x).dtype
    assert all(tensor.is_meta for tensor in target.state_dict().values())
    assert list(target.state_dict()) == list(source.state_dict())
    for one in (target, copy.deepcopy(target)):
        assert (repr(one), one.label, one.canonical_bytes(), one.settings) == shown
    with pytest.raises(NotImplementedError, match="meta tensor"):
        target.canonical()
    target.to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    assert same(target(x), source(x))


@EVERY
def test_no_use_of_a_layer_on_meta_reads_memory_that_is_not_there(case: Case, forked: Forked) -> None:
    """An error, or a tensor on meta: a result of real memory that nothing was written to would be the worst answer."""
    target, x = case.layer(), case.x()
    label, size = target.label, target.canonical_bytes()
    target.to("meta")
    uses: dict[str, Callable[[], object]] = {
        "weight": lambda: target.weight.is_meta,
        "canonical": lambda: target.canonical() and False,
        "state_dict": lambda: all(tensor.is_meta for tensor in target.state_dict().values()),
        "deepcopy": lambda: copy.deepcopy(target).packed.is_meta,
        "pickle": lambda: bool(pickle.dumps(target)),
        "label": lambda: target.label == label,
        "bytes": lambda: target.canonical_bytes() == size,
        "call": lambda: target(x).is_meta and case.runs_in_torch,
    }

    def run() -> dict[str, object]:
        found: dict[str, object] = {}
        for name, use in uses.items():
            try:
                found[name] = use()
            except (ValueError, RuntimeError) as error:
                found[name] = type(error).__name__
        return found

    found = forked(run)
    assert all(found[name] is True for name in ("weight", "state_dict", "deepcopy", "label", "bytes"))
    assert all(value in {True, "ValueError", "RuntimeError", "NotImplementedError"} for value in found.values()), found
