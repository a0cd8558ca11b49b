"""Models of int4, and of int8 with activations in floating point: compressed, tied, calibrated, measured."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable

import pytest
import torch
from contract.cases import equal_weights
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods import Int4, Int8
from pycompress.methods.method import Method
from pycompress.model import compressed_layers
from pycompress.nn import Int4Linear, Int8Linear

Build = Callable[..., nn.Module]
Python = Callable[..., subprocess.CompletedProcess[str]]
Same = Callable[[Tensor, Tensor], bool]
K, N = 71, 24

METHODS = [
    Int4(),
    Int4(64, symmetric=True),
    Int4(128),
    Int4(activation_bits=16),
    Int4(128, symmetric=True, activation_bits=16),
]


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


@pytest.mark.parametrize("method", [*METHODS, Int8(16)], ids=repr)
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
    unasked = pc.Sparse(0.5, choose="magnitude")
    assert isinstance(pc.compress(model, unasked, calibration={})[0], pc.SparseLinear)


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("method", [Int4(), Int4(activation_bits=16), Int8(16)], ids=repr)
def test_only_if_faster(faster: bool, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(dense: Callable[[], Tensor], compressed: Callable[[], Tensor], **_: object) -> tuple[float, float]:
        assert dense().shape == compressed().shape
        return (20.0, 10.0) if faster else (10.0, 20.0)

    monkeypatch.setattr("pycompress.race.interleaved_us", clock)
    monkeypatch.setattr("pycompress.race.model_us", lambda *_: (20.0, 10.0))
    model, x = nn.Sequential(nn.Linear(K, N)), torch.randn(2, K)
    result = pc.compress(model, method, example_inputs=x, only_if_faster=True)
    (record,) = pc.summary(result).layers
    assert (record.method, record.dense_us, record.us) == (
        (method.name, 20.0, 10.0) if faster else (None, 10.0, 20.0)
    )  # fmt: skip
    assert bool(compressed_layers(result)) is faster
