"""The promises of recurrent layers, which give a tuple and take states: numbers, calls, state, dense meaning, what looks on."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import pycompress as pc
from contract.cases import CASES as OTHERS
from contract.cases import Same, equal_states, equal_weights, state
from pycompress import Int8, ops
from pycompress.nn import LAYERS, CompressedLayer, Int8GRU, Int8LSTM, RecurrentGeometry
from pycompress.reference import recurrent as reference

K, SIZE, STEPS, BATCH = 13, 21, 6, 5  # odd widths: no vector and no tile is full


BY_DEFAULT = Int8()


@dataclass(frozen=True)
class Case:
    """A row of the table, and the arguments of its dense layer."""

    dense_type: type[nn.RNNBase]
    layer_type: type[CompressedLayer]
    options: tuple[tuple[str, Any], ...]
    method: Int8 = BY_DEFAULT

    def __repr__(self) -> str:
        own = ", ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.dense_type.__name__}({own}) by {self.method}"

    @property
    def directions(self) -> int:
        return 2 if dict(self.options).get("bidirectional") else 1

    @property
    def is_lstm(self) -> bool:
        return self.dense_type is nn.LSTM

    def dense(self) -> Any:
        return self.dense_type(K, SIZE, **dict(self.options)).eval()

    def layer(self) -> Any:
        return self.layer_type.from_dense(self.dense(), self.method).eval()  # type: ignore[attr-defined]

    def x(self, batch: int = BATCH, steps: int = STEPS) -> Tensor:
        return torch.randn(batch, steps, K) if dict(self.options).get("batch_first") else torch.randn(steps, batch, K)

    def states(self, batch: int = BATCH) -> Any:
        shape = dict(self.options).get("num_layers", 1) * self.directions, batch, SIZE
        return (torch.randn(shape), torch.randn(shape)) if self.is_lstm else torch.randn(shape)

    def as_dense(self, layer: Any) -> Any:
        """The dense layer with the numbers of a compressed one."""
        dense = self.dense()
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                parameter.copy_(getattr(layer, name))
        return dense


PAIRS = ((nn.LSTM, Int8LSTM), (nn.GRU, Int8GRU))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.1},
    {"num_layers": 2, "bidirectional": True, "bias": False},
]
CASES = [Case(*pair, tuple(options.items())) for pair in PAIRS for options in OPTIONS]  # type: ignore[arg-type]
CASES += [Case(*pair, (), Int8(7, 7)) for pair in PAIRS]  # type: ignore[arg-type]
ROWS = [Case(*pair, (("num_layers", 2), ("bidirectional", True))) for pair in PAIRS]  # type: ignore[arg-type]
EVERY = pytest.mark.parametrize("case", CASES, ids=repr)
EACH_ROW = pytest.mark.parametrize("case", ROWS, ids=repr)


def flat(found: Any) -> list[Tensor]:
    """All tensors that a call gave."""
    if isinstance(found, PackedSequence):
        return [found.data]
    return [found] if isinstance(found, Tensor) else [one for part in found for one in flat(part)]


def same_all(same: Same, a: Any, b: Any) -> bool:
    first, second = flat(a), flat(b)
    return len(first) == len(second) and all(same(*pair) for pair in zip(first, second, strict=True))


def test_every_row_is_in_one_of_both_suites() -> None:
    here = {(case.layer_type.kind.name, case.layer_type.weight_type.name) for case in CASES}
    there = {(case.kind.name, case.layer_type.weight_type.name) for case in OTHERS}
    assert here | there == set(LAYERS) and not here & there


# --- numbers --------------------------------------------------------------------------------------------------------------


def by_numpy(case: Case, layer: Any, rows: Tensor, sizes: list[int], hx: Any) -> list[Any]:
    """y, h and c of rows as a packed sequence has them: int64 sums, and float32 step by float32 step."""
    weight = layer.canonical()
    bias = None if layer.bias32 is None else layer.bias32.numpy()
    states = [one.clone().numpy() for one in (hx if case.is_lstm else (hx,))]
    x = rows.numpy()
    for number in range(layer.num_layers):
        outputs = []
        for direction in range(case.directions):
            at = number * case.directions + direction
            pair = [
                (weight[m.name].values.numpy(), weight[m.name].scale.numpy(), None if bias is None else bias[m.rows])
                for m in weight.matrices[2 * at : 2 * at + 2]
            ]
            h, c = states[0][at], states[1][at] if case.is_lstm else None
            outputs.append(
                reference.run(x, (pair[0], pair[1]), np.array(sizes), h, c, weight.activation_bits, direction == 1)
            )
        x = np.concatenate(outputs, axis=1)
    return [torch.from_numpy(one) for one in (x, *states)]


@EVERY
def test_everything_is_numpys_to_the_bit(case: Case, same: Same) -> None:
    layer, x, hx = case.layer(), case.x(), case.states()
    y, last = layer(x, hx)
    first = x.transpose(0, 1) if layer.batch_first else x
    expected = by_numpy(case, layer, first.reshape(-1, K), [BATCH] * STEPS, hx)
    found = y.transpose(0, 1) if layer.batch_first else y
    assert same_all(same, [found.reshape(STEPS * BATCH, -1), last], expected)
    zeros = torch.zeros_like(hx[0] if case.is_lstm else hx)
    assert same_all(same, layer(x), layer(x, (zeros, zeros) if case.is_lstm else zeros))


@EVERY
def test_packed_sequences_are_numpys_to_the_bit(case: Case, same: Same) -> None:
    layer, hx = case.layer(), case.states(4)
    packed = pack_sequence([torch.randn(steps, K) for steps in (7, 5, 5, 1)])
    y, last = layer(packed, hx)
    assert isinstance(y, PackedSequence) and torch.equal(y.batch_sizes, packed.batch_sizes)
    expected = by_numpy(case, layer, packed.data, packed.batch_sizes.tolist(), hx)
    assert same_all(same, [y.data, last], expected)


@EVERY
def test_a_sequence_is_what_it_is_alone(case: Case, same: Same) -> None:
    """Whatever else is in the batch, sorted or not, padded or not."""
    layer, lengths = case.layer(), [3, 7, 1, 5]
    sequences = [torch.randn(steps, K) for steps in lengths]
    alone = [layer(one) for one in sequences]
    y, last = layer(pack_sequence(sequences, enforce_sorted=False))
    padded, found = pad_packed_sequence(y)
    assert found.tolist() == lengths
    for b, (one, own) in enumerate(alone):
        assert one.shape == (lengths[b], SIZE * case.directions)
        assert same(padded[: lengths[b], b], one)
        assert same_all(same, [state[:, b] for state in flat(last)], own)


@EVERY
def test_every_kernel_and_thread_count_gives_the_same_bits(case: Case, same: Same, two_threads: None) -> None:
    layer, x = case.layer(), case.x(40, 7)
    expected = layer(x)
    for row in ops.kernels():
        if row["op"] == "recurrent" and row["available"]:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                with ops.forced("recurrent", row["name"]):
                    assert same_all(same, layer(x), expected), (row["name"], threads)


def test_long_sequences_and_many_rows_are_cut_without_a_trace(same: Same, two_threads: None) -> None:
    """The input's product is taken for some steps at a time, its rows and channels by several threads."""
    for pair in PAIRS:
        layer = pair[1].from_dense(pair[0](K, 67, bidirectional=True))
        for steps, batch in ((301, 1), (70, 3), (2, 150), (3, 129)):
            x = torch.randn(steps, batch, K)
            y, _ = layer(x)
            assert same(y[:, -1], layer(x[:, -1])[0])


@pytest.mark.parametrize("steps", [1, 8])
@EVERY
def test_close_to_the_dense_layer(case: Case, steps: int) -> None:
    layer, x, hx = case.layer(), case.x(steps=steps), case.states()
    for one, other in zip(flat(layer(x, hx)), flat(case.as_dense(layer)(x, hx)), strict=True):
        cosine = nn.functional.cosine_similarity(one.flatten(), other.flatten(), 0)
        assert one.shape == other.shape and cosine > 0.999


UNIT = 2.0**-24


def through_gates(u: Tensor, tanh: bool) -> Tensor:
    """Of a few hundred units at a time."""
    return torch.cat([through_units(some, tanh) for some in u.split(501)])


def through_units(u: Tensor, tanh: bool) -> Tensor:
    """A gate function as the kernels have it: of an LSTM without weights c is sigmoid(i) * tanh(g), and far out both are 1."""
    dense = nn.LSTM(1, len(u))
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.zero_()
            if name == "bias_ih_l0":
                parameter.fill_(200.0)
                parameter.view(4, -1)[2 if tanh else 0] = u
    _, (_, c) = Int8LSTM.from_dense(dense)(torch.zeros(1, 1))
    return c[0]


@pytest.mark.parametrize("tanh", [False, True])
def test_gates_lie_within_the_derived_bound_of_float64(tanh: bool) -> None:
    """The contract says 5 * 2^-24.

    With u = 2^-24, and e = exp(-|x|) within 4 u of its value: 1 / (1 + e) errs by (4 u e + u (1 + e)) / (1 + e)^2 for the sum and u
    for the quotient, at most 3 u; times e by 4 u + 4 u + u of a number up to 1/2; and (1 - e) / (1 + e) by 8 u e / (1 + e)^2 + 3 u,
    at most 5 u.
    """
    u = torch.cat(
        [torch.linspace(-30, 30, 4001), torch.randn(2000) * 0.01, torch.tensor([0.0, -0.0, 88.0, -88.0, -1e-38])]
    )
    exact = torch.tanh(u.double()) if tanh else torch.sigmoid(u.double())
    for row in ops.kernels():
        if row["op"] == "recurrent" and row["available"]:
            with ops.forced("recurrent", row["name"]):
                assert ((through_gates(u, tanh).double() - exact).abs() <= 5 * UNIT).all(), row["name"]
    ends = through_gates(torch.tensor([300.0, -300.0, 3e38, -3e38]), tanh)
    assert ends.tolist() == ([1.0, -1.0, 1.0, -1.0] if tanh else [1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@EVERY
def test_nan_and_inf_stay_in_their_sequence(case: Case, bad: float, same: Same) -> None:
    layer, x = case.layer(), case.x()
    expected = layer(x)
    (x if layer.batch_first else x.transpose(0, 1))[2, 3, 4] = bad
    found = layer(x)
    y, clean = (one[0] if layer.batch_first else one[0].transpose(0, 1) for one in (found, expected))
    others = [b for b in range(BATCH) if b != 2]
    assert same(y[others], clean[others])
    assert y[2, 3:, :SIZE].isnan().all() and all(one[-1, 2].isnan().all() for one in flat(found[1]))
    if case.directions == 1:
        assert same(y[2, :3], clean[2, :3])


# --- calls ----------------------------------------------------------------------------------------------------------------


@EVERY
def test_what_comes_out_has_the_shape_that_the_dense_layer_gives(case: Case) -> None:
    layer, dense = case.layer(), case.dense()
    hx = case.states()
    alone = tuple(one[:, 0] for one in hx) if case.is_lstm else hx[:, 0]
    calls: list[tuple[Any, ...]] = [(case.x(),), (case.x(), hx), (torch.randn(4, K),), (torch.randn(4, K), alone)]
    packed = pack_padded_sequence(torch.randn(4, 3, K), [4, 1, 2], enforce_sorted=False)
    for arguments in (*calls, (packed,), (packed, case.states(3))):
        found, expected = flat(layer(*arguments)), flat(dense(*arguments))
        assert [one.shape for one in found] == [one.shape for one in expected]
        assert type(layer(*arguments)[0]) is type(dense(*arguments)[0])
        assert type(layer(*arguments)[1]) is type(dense(*arguments)[1])
    assert layer(input=case.x(), hx=hx)[0].shape == dense(input=case.x(), hx=hx)[0].shape


@EVERY
def test_states_carry_a_sequence_on(case: Case, same: Same) -> None:
    if case.directions == 2:
        pytest.skip("two directions begin at both ends")
    layer, x = case.layer(), case.x()
    axis = 1 if layer.batch_first else 0
    y, last = layer(x)
    first, middle = layer(x.narrow(axis, 0, 2))
    second, end = layer(x.narrow(axis, 2, STEPS - 2), middle)
    assert same(torch.cat([first, second], axis), y) and same_all(same, end, last)


@EACH_ROW
def test_an_input_of_any_strides_and_a_state_are_only_read(case: Case, same: Same) -> None:
    layer, x, hx = case.layer(), case.x(), case.states()
    before = [one.clone() for one in (x, *flat(hx))]
    expected = layer(x, hx)
    for other in (x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([x, x], -1)[..., 0], torch._neg_view(-x)):
        assert same_all(same, layer(other, hx), expected)
    assert all(same(*pair) for pair in zip((x, *flat(hx)), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY
def test_half_precision_is_the_rounded_float32(case: Case, dtype: torch.dtype, same: Same) -> None:
    layer, x = case.layer(), case.x().to(dtype)
    expected = [one.to(dtype) for one in flat(layer(x.float()))]
    assert same_all(same, layer(x), expected)
    with torch.autocast("cpu", dtype):
        assert same_all(same, layer(x), expected)


@EVERY
def test_an_empty_batch(case: Case) -> None:
    layer, dense, x = case.layer(), case.dense(), case.x(0)
    assert [one.shape for one in flat(layer(x))] == [one.shape for one in flat(dense(x))]


@EACH_ROW
def test_bad_input_names_what_was_expected(case: Case) -> None:
    layer, name = case.layer(), case.layer_type.__name__
    for x, message in (
        (torch.randn(STEPS, BATCH, K + 1), rf"{name}: x is \[6, 5, 14\], expected \[steps, batch, 13\]"),
        (torch.randn(K), rf"{name}: x is \[13\], expected"),
        (torch.randn(0, BATCH, K), rf"{name}: x is \[0, 5, 13\], expected"),
        (torch.randn(0, K), rf"{name}: x is \[0, 13\], expected"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x)
    with pytest.raises(TypeError, match=r"x is torch.float64, expected float32, bfloat16 or float16"):
        layer(case.x().double())
    with pytest.raises(TypeError, match="x is list, expected a tensor"):
        layer([1.0])
    wide = torch.randn(4, BATCH, SIZE + 1)
    with pytest.raises(
        ValueError, match=r"a state in hx is torch.float32 \[4, 5, 22\], expected torch.float32 \[4, 5, 21\]"
    ):
        layer(case.x(), (wide, wide) if case.is_lstm else wide)
    with pytest.raises(ValueError, match=r"expected torch.float32 \[4, 21\]"):
        layer(torch.randn(3, K), case.states())
    with pytest.raises(
        TypeError, match="hx is Tensor, expected a tuple" if case.is_lstm else "hx is tuple, expected a tensor h"
    ):
        layer(case.x(), case.states()[0] if case.is_lstm else (case.states(),))
    with pytest.raises(RuntimeError, match="meta"):
        layer(case.x().to("meta"))
    with pytest.raises(ValueError, match="batch_sizes"):
        ops.int8_recurrent(
            torch.randn(4, K), layer.packed, layer.form, None, torch.zeros(4, 2, SIZE),
            torch.zeros(4, 2, SIZE) if case.is_lstm else None, torch.tensor([1, 3]),
        )  # fmt: skip


def test_dropout_between_layers_is_refused_in_training() -> None:
    made = Int8LSTM.from_dense(nn.LSTM(K, SIZE, 2, dropout=0.5)).train()
    with pytest.raises(RuntimeError, match=r"in training mode, with dropout 0.5 between its layers, expected eval\(\)"):
        made(torch.randn(2, K))
    made.eval()(torch.randn(2, K))
    Int8LSTM.from_dense(nn.LSTM(K, SIZE, 2)).train()(torch.randn(2, K))


# --- state ----------------------------------------------------------------------------------------------------------------


def through_pickle(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@EVERY
def test_copies(case: Case, duplicate: Callable[[Any], Any], same: Same) -> None:
    layer, x = case.layer(), case.x()
    layer.note = "kept"
    copied = duplicate(layer)
    assert type(copied) is type(layer) and repr(copied) == repr(layer) and copied.note == "kept"
    assert equal_states(state(copied), state(layer)) and same_all(same, copied(x), layer(x))
    before = state(copied)
    for buffer in layer.buffers():
        buffer.zero_()
    assert equal_states(state(copied), before)


@EVERY
def test_a_state_dict_is_canonical(case: Case, same: Same) -> None:
    layer, other, x = case.layer(), case.layer(), case.x()
    found, tensors = layer.state_dict(), layer.canonical().tensors()
    assert list(found) == [*tensors, "weight", *(["bias"] if layer.bias else [])]
    assert equal_states({name: found[name] for name in tensors}, tensors)
    assert layer.canonical_bytes() == sum(tensor.nbytes for tensor in tensors.values())
    other.load_state_dict(found)
    assert same_all(same, other(x), layer(x)) and other.same_weight(layer)
    with pytest.raises(RuntimeError):
        other.load_state_dict(case.dense().state_dict())
    with pytest.raises(RuntimeError):
        case.dense().load_state_dict(found)
    with pytest.raises(RuntimeError, match="expected all of"):
        other.load_state_dict({name: one for name, one in found.items() if "hh_l0_scale" not in name}, strict=False)
    bad = {**found, "int8_hh_l0_values": found["int8_hh_l0_values"].clone().fill_(-128)}
    with pytest.raises(RuntimeError, match="-128"):
        other.load_state_dict(bad)
    assert same_all(same, other(x), layer(x))


@EVERY
def test_each_matrix_is_rounded_as_that_of_a_linear_layer(case: Case) -> None:
    dense = case.dense()
    weight = case.layer_type.from_dense(dense, case.method).canonical()
    for matrix in weight.matrices:
        expected = case.method.compress(getattr(dense, f"weight_{matrix.name}"))
        assert equal_weights(weight[matrix.name], expected)
    with pytest.raises(KeyError):
        weight["hh_l9"]


@EVERY
def test_files(case: Case, same: Same, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = case.dense(), nn.Linear(SIZE * case.directions, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]

    model, path, x = pc.compress(Model().eval(), case.method), tmp_path / "model.safetensors", case.x()
    pc.save(model, path)
    for fresh in (Model(), pc.compress(Model(), case.method)):
        assert same(pc.load(fresh, path).eval()(x), model(x))
    if case.is_lstm:
        other = Model()
        other.rnn = nn.GRU(K, SIZE, **dict(case.options))
        with pytest.raises(ValueError, match="rnn is a GRU in the model, expected an LSTM"):
            pc.load(other, path)
    other = Model()
    other.rnn = case.dense_type(K, SIZE, **{**dict(case.options), "num_layers": 4})
    with pytest.raises(ValueError, match=r"rnn is .* in the model, .* in the file"):
        pc.load(other, path)


@EACH_ROW
def test_a_weight_of_another_geometry_is_refused(case: Case) -> None:
    weight = case.layer().canonical()
    with pytest.raises(ValueError, match="the weight is that of"):
        case.layer_type.build(weight, RecurrentGeometry(K, SIZE, 2))
    with pytest.raises(TypeError, match="the weight is Int8Weight, expected Int8RecurrentWeight"):
        case.layer_type.build(weight["ih_l0"], RecurrentGeometry(K, SIZE, 2, bidirectional=True))
    with pytest.raises(ValueError, match="activation is 'relu', expected 'none'"):
        case.layer_type.build(weight, case.layer().geometry, None, "relu")
    made = case.layer_type.from_weight(weight)  # type: ignore[attr-defined]
    assert made.geometry == RecurrentGeometry(K, SIZE, 2, bidirectional=True) and not made.bias


# --- read as the dense layer ------------------------------------------------------------------------------------------------


@EVERY
def test_attributes_mean_what_they_do_in_the_dense_layer(case: Case) -> None:
    layer, dense = case.layer(), case.dense()
    for name in (
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    ):
        assert getattr(layer, name) == getattr(dense, name), name
    weight = layer.canonical()
    assert layer._flat_weights_names == dense._flat_weights_names and layer._all_weights == dense._all_weights
    assert [[one.shape for one in part] for part in layer.all_weights] == [
        [one.shape for one in p] for p in dense.all_weights
    ]
    for matrix in weight.matrices:
        assert torch.equal(getattr(layer, f"weight_{matrix.name}"), weight[matrix.name].decompress())
        if layer.bias:
            assert torch.equal(getattr(layer, f"bias_{matrix.name}"), layer.bias32[matrix.rows])
        else:
            assert not hasattr(layer, f"bias_{matrix.name}")
    assert not hasattr(layer, "weight") and not hasattr(layer, "weight_ih_l7") and not list(layer.parameters())
    layer.flatten_parameters()
    half = copy.deepcopy(layer).half()
    assert half.weight_hh_l0.dtype == torch.float16 and (half.bias32 is None or half.bias32.dtype == torch.float32)
    assert layer.to("meta").weight_hh_l0.is_meta


@EACH_ROW
def test_nobody_writes_into_the_weights(case: Case) -> None:
    layer = case.layer()
    before = state(layer)
    for name in ("weight_ih_l0", "bias_hh_l1_reverse"):
        with pytest.raises(RuntimeError, match="which keeps it compressed: the change would be lost"):
            getattr(layer, name).zero_()
        with pytest.raises(AttributeError, match=f"{name} is compressed and cannot be set"):
            setattr(layer, name, nn.Parameter(torch.zeros(1)))
    assert equal_states(state(layer), before)


# --- what looks on ----------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model whose inputs are tensors alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *states: Tensor) -> list[Tensor]:
        y, last = self.layer(x, states if len(states) == 2 else states[0] if states else None)
        return [y, *last] if isinstance(last, tuple) else [y, last]


@EVERY
def test_compiled_and_exported(case: Case, same: Same) -> None:
    torch._dynamo.reset()
    model, x = Wrapped(case.layer()), case.x()
    states = list(flat(case.states()))
    with torch.no_grad():
        for arguments in ((x,), (x, *states)):
            expected = model(*arguments)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert same_all(same, compiled(*arguments), expected)
            assert same_all(same, torch.export.export(model, arguments).module()(*arguments), expected)


@EVERY
def test_gradients_are_those_of_the_dense_layer_with_its_weights(case: Case, same: Same) -> None:
    layer, x, hx = case.layer(), case.x().requires_grad_(), case.states()
    dense, states = case.as_dense(layer), [one.requires_grad_() for one in flat(hx)]
    found = flat(layer(x, hx))
    assert same_all(same, [one.detach() for one in found], layer(x.detach(), _detached(hx)))
    expected = flat(dense(x, hx))
    signs = [torch.randn_like(one) for one in expected]
    own = torch.autograd.grad(found, [x, *states], signs)
    right = torch.autograd.grad(expected, [x, *states], signs)
    for a, b in zip(own, right, strict=True):
        torch.testing.assert_close(a, b)
    packed = pack_sequence([torch.randn(steps, K, requires_grad=True) for steps in (4, 2)])
    (gradient,) = torch.autograd.grad(layer(packed)[0].data.sum(), packed.data)
    (wanted,) = torch.autograd.grad(dense(packed)[0].data.sum(), packed.data)
    torch.testing.assert_close(gradient, wanted)
    with torch.no_grad():
        assert not layer(x)[0].requires_grad


def _detached(hx: Any) -> Any:
    return tuple(one.detach() for one in hx) if isinstance(hx, tuple) else hx.detach()


@EACH_ROW
def test_inference_mode_and_vmap(case: Case, same: Same) -> None:
    layer, x = case.layer(), case.x()
    expected = layer(x)
    with torch.inference_mode():
        assert same_all(same, layer(x), expected)
    with pytest.raises(NotImplementedError, match="int8_recurrent: vmap"):
        torch.func.vmap(lambda one: layer(one)[0])(torch.stack([x, x]))
