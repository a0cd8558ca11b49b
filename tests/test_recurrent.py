"""Recurrent layers in whole models: what is taken and what is left, calibration, training, validation, ONNX, the numba twin."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pycompress as pc
from pycompress import Int8, Sparse
from pycompress.kinds import RecurrentGeometry
from pycompress.model import compressed_layers
from pycompress.nn import Int8GRU, Int8Linear, Int8LSTM
from pycompress.reference import recurrent as reference

Same = Callable[[Tensor, Tensor], bool]
Python = Callable[..., subprocess.CompletedProcess[str]]


class Tagger(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        options = {"num_layers": 2, "bidirectional": True, "batch_first": True, **options}
        self.rnn = kind(12, 19, **options)
        self.head = nn.Linear(38 if options["bidirectional"] else 19, 5)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])  # type: ignore[no-any-return]


# --- what is taken --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_model_and_its_summary(kind: type[nn.RNNBase]) -> None:
    dense, x = Tagger(kind).eval(), torch.randn(3, 7, 12)
    before = {name: one.clone() for name, one in dense.state_dict().items()}
    model = pc.compress(dense, Int8())
    assert [type(one) for one in compressed_layers(model).values()] == [
        Int8LSTM if kind is nn.LSTM else Int8GRU,
        Int8Linear,
    ]
    torch.testing.assert_close(model(x), dense(x), atol=0.03, rtol=0)
    found = pc.summary(model)
    record = found.layers[0]
    n = sum(one.numel() for name, one in dense.rnn.named_parameters() if name.startswith("weight"))
    rows = sum(len(one) for name, one in dense.rnn.named_parameters() if name.startswith("bias"))
    assert (record.name, record.kind, record.method, record.label) == ("rnn", kind.__name__, "int8", "int8")
    assert (record.dense_bytes, record.bytes) == (4 * (n + rows), n + 4 * rows + 4 * rows)
    assert record.error is not None and 0 < record.error < 0.02
    assert found.bytes == sum(one.bytes for one in found.layers)
    assert all(torch.equal(before[name], one) for name, one in dense.state_dict().items())
    loaded = pc.summary(pc.compress(Tagger(kind), Int8())).layers[0]
    assert loaded.dense_bytes == record.dense_bytes


class Own(nn.LSTM):
    pass


def shared() -> nn.Module:
    model = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    return model


def hooked() -> nn.Module:
    model = nn.ModuleList([nn.LSTM(4, 4)])
    model[0].register_forward_hook(lambda *_: None)
    return model


def decorated() -> nn.Module:
    model = nn.ModuleList([nn.LSTM(4, 4)])
    torch.nn.utils.parametrizations.weight_norm(model[0], "weight_hh_l0")
    return model


LEFT: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a projection": (lambda: nn.ModuleList([nn.LSTM(4, 4, proj_size=2)]), Int8(), "proj_size is 2, expected 0"),
    "a subclass": (lambda: nn.ModuleList([Own(4, 4)]), Int8(), "Own is a subclass of LSTM, which may do something else"),
    "a shared matrix": (shared, Int8(), "its weight is shared with 1: compressing it would add bytes"),
    "a hook": (hooked, Int8(), "it has hooks, which would be lost"),
    "a parametrized matrix": (decorated, Int8(), "is a subclass of LSTM"),
    "float64": (lambda: nn.ModuleList([nn.GRU(4, 4).double()]), Int8(), "its weight_ih_l0 is torch.float64, expected float32"),
    "static": (
        lambda: nn.ModuleList([nn.LSTM(4, 4)]),
        Int8(activation="static", observer=pc.Known(-1, 1)),
        "Int8 takes LSTMs with dynamic activations of 7 or 8 bits only, not with static ones",
    ),
    "16 bits": (lambda: nn.ModuleList([nn.GRU(4, 4)]), Int8(16), "Int8 takes GRUs with dynamic activations of 7 or 8 bits only"),
    "sparse": (lambda: nn.ModuleList([nn.LSTM(4, 4)]), Sparse(0.5), "sparse takes linear layers, convolutions and"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_dense_says_why(name: str) -> None:
    make, method, reason = LEFT[name]
    found = pc.summary(pc.compress(make(), method)).layers[0]
    assert found.method is None and reason in found.reason


def test_nan_is_refused_before_anything_is_replaced() -> None:
    model = Tagger()
    with torch.no_grad():
        model.rnn.weight_hh_l1_reverse[3, 2] = torch.nan
    with pytest.raises(ValueError, match="compress: the weight of rnn holds NaN or Inf"):
        pc.compress(model, Int8())


def test_geometry_from_a_file_is_checked() -> None:
    own = RecurrentGeometry(3, 4, 2, True, False, 0.5)
    assert RecurrentGeometry.from_settings(9, own.settings()) == own == RecurrentGeometry(3, 4, 2, True)
    for name, value in (
        ("hidden_size", 0),
        ("batch_first", 1),
        ("dropout", 2.0),
        ("num_layers", True),
        ("input_size", 2.0),
    ):
        with pytest.raises(ValueError, match=f"{name} is {value!r}, expected"):
            RecurrentGeometry.from_settings(9, {**own.settings(), name: value})
    with pytest.raises(ValueError, match=r"the settings are \['input_size'\], expected"):
        RecurrentGeometry.from_settings(9, {"input_size": 3})


# --- calibration, training, speed -------------------------------------------------------------------------------------------


def test_a_calibration_leaves_them_as_they_are(same: Same) -> None:
    dense, x = Tagger().eval(), torch.randn(4, 9, 12)
    seen = pc.calibrate(dense, [[x], [x, torch.tensor([9, 2, 4, 1])]])
    model = pc.compress(dense, Int8(), calibration=seen)
    assert same(model.rnn(x)[0], pc.compress(dense, Int8()).rnn(x)[0])
    assert "half of what its matrices meet is its own" in pc.summary(model).layers[0].note


def test_prepare_leaves_them_dense_and_says_so() -> None:
    model = Tagger()
    training = pc.prepare(model, Int8(), steps=1)
    assert training.left == {"rnn": "an LSTM cannot be trained as its compressed layer"}
    assert type(pc.compress(model.eval()).rnn) is nn.LSTM


def test_only_if_faster_measures_them() -> None:
    x = torch.randn(2, 6, 12)
    for inputs in ([x], [x, torch.tensor([6, 2])]):
        record = pc.summary(pc.compress(Tagger().eval(), Int8(), example_inputs=inputs, only_if_faster=True)).layers[0]
        assert record.dense_us is not None and record.us is not None


def test_fisher_looks_at_what_it_can() -> None:
    assert set(pc.fisher(Tagger(), [torch.randn(2, 3, 12)])) == {"head"}


# --- other implementations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{}, {"bias": False, "num_layers": 1}, {"bidirectional": False}], ids=str)
def test_onnx_runtime_and_numpy_agree_to_the_bit(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx")
    model, x = pc.compress(Tagger(kind, **options).eval(), Int8()), torch.randn(4, 9, 12)
    x[2, 4, 3] = torch.nan
    for inputs in ([x], [x * 1e3], [x.nan_to_num(), torch.tensor([9, 2, 4, 1])], [x[:1, :1]]):
        report = pc.validate(model, inputs)
        assert report.ok, str(report)
        assert report.layers[0].integers_equal and report.layers[0].max_ulp == 0
    half = pc.compress(Tagger(kind, **options).eval().bfloat16(), Int8())
    assert pc.validate(half, x.nan_to_num().bfloat16()).ok


def test_validate_sees_what_is_wrong() -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx")
    model, x = pc.compress(Tagger().eval(), Int8()), torch.randn(2, 3, 12)
    right = model.rnn.run

    def wrong(*arguments: Any) -> list[Tensor]:
        y, *last = right(*arguments)
        return [y + 1e-6, *last]

    model.rnn.run = wrong
    report = pc.validate(model, x)
    assert (
        not report.ok
        and report.layers[0].status == "diverged"
        and "native y and NumPy differ" in report.layers[0].reason
    )


def test_the_graph_runs_at_any_length_and_batch(same: Same) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx")
    from pycompress import onnx

    for layer in (Int8LSTM.from_dense(nn.LSTM(5, 7, bidirectional=True)), Int8GRU.from_dense(nn.GRU(5, 7, 2))):
        session = onnx.session(onnx.lower(layer))
        count = layer.num_layers * layer.geometry.directions
        names = [one.name for one in session.get_inputs()]
        for steps, batch in ((1, 1), (6, 3), (2, 9)):
            x, states = torch.randn(steps, batch, 5), [torch.randn(count, batch, 7) for _ in names[1:]]
            given = {name: one.numpy() for name, one in zip(names, (x, *states), strict=True)}
            y, h = (torch.from_numpy(one) for one in session.run(["y", "h_n"], given))
            own, last = layer(x, tuple(states) if len(states) == 2 else states[0])
            assert same(own, y) and same(last[0] if len(states) == 2 else last, h)


def test_integers_of_a_step_are_int64_numpys(same: Same) -> None:
    """Of every step, from the hidden state that the layer itself gave for the one before."""
    layer, x = Int8LSTM.from_dense(nn.LSTM(12, 33)), torch.randn(8, 4, 12)
    y, _ = layer(x)
    weight, bias = layer.canonical(), layer.bias32.numpy()
    c = np.zeros((4, 33), np.float32)

    def product(name: str, rows: Tensor, own: Any) -> Any:
        q, scale, zero_point = pc.ops.int8_quantize(rows, 8)
        centred = q.numpy().astype(np.int64) - zero_point.numpy().astype(np.int64)[:, None]
        acc = centred @ weight[name].values.numpy().astype(np.int64).T
        return acc.astype(np.float32) * scale.numpy()[:, None] * weight[name].scale.numpy() + own

    for t in range(8):
        h = y[t - 1] if t else torch.zeros(4, 33)
        gates = product("ih_l0", x[t], bias[:132]), product("hh_l0", h.contiguous(), bias[132:])
        expected, c = reference.lstm(*gates, c)
        assert same(y[t], torch.from_numpy(expected)), t


TWIN = """
import sys
sys.modules["pycompress._C"] = None
import warnings; warnings.simplefilter("ignore")
import torch
from torch.nn.utils.rnn import pack_sequence
from pycompress import ops
assert ops.extension_error()
for layer, x, hx, lengths, expected in torch.load(sys.argv[1], weights_only=False):
    for found, right in zip((layer(x, hx), layer(pack_sequence(lengths))), expected):
        assert torch.equal(found[0].data, right[0].data)
        for a, b in zip(found[1], right[1]):
            assert torch.equal(a, b)
try:
    ops.int8_recurrent(torch.zeros(3, 5), layer.packed, layer.form, None, torch.zeros(2, 2, 7), None, torch.tensor([2, 2]))
except ValueError as error:
    assert "x has 3 rows, expected 4" in str(error)
else:
    raise AssertionError
"""


def test_the_twin_gives_the_same_bits(python: Python, tmp_path: Any) -> None:
    cases = []
    for layer, count in (
        (Int8LSTM.from_dense(nn.LSTM(5, 7, bidirectional=True)), 2),
        (Int8GRU.from_dense(nn.GRU(5, 7, 2)), 1),
    ):
        x, states = torch.randn(4, 3, 5), [torch.randn(2, 3, 7) for _ in range(count)]
        hx = tuple(states) if count == 2 else states[0]
        lengths = [torch.randn(steps, 5) for steps in (5, 2)]
        cases.append((layer, x, hx, lengths, (layer(x, hx), layer(torch.nn.utils.rnn.pack_sequence(lengths)))))
    torch.save(cases, tmp_path / "cases.pt")
    result = python(TWIN, str(tmp_path / "cases.pt"))
    assert result.returncode == 0, result.stderr
