"""Convolutions of sequences: their integers at every edge, and a network of them from calibration to file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from packing import backends
from torch import Tensor, nn

import pycompress as pc
from pycompress import ops
from pycompress.kinds import Conv1dGeometry
from pycompress.nn import Int8Conv1d, SparseConv1d
from pycompress.weights import Int8Weight

Same = Callable[[Tensor, Tensor], bool]
Integers = npt.NDArray[np.int64]
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # of torch, of NumPy
KERNELS = [row["name"] for row in ops.kernels() if row["op"] == "int8" and row["available"]]


@pytest.fixture(params=[*KERNELS, "twin"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "twin":
        with backends("twin"):
            yield "twin"
    else:
        with ops.forced("int8", request.param):
            yield request.param


def random_layer(
    n: int, channels: int, size: int, groups: int = 1, static: bool = False, **walk: Any
) -> tuple[Int8Conv1d, Integers]:
    """A layer, and its integers [n, channels / groups, size]."""
    values = torch.randint(-127, 128, (n, channels // groups * size), dtype=torch.int8)
    fixed = (torch.tensor([0.02]), torch.tensor([40], dtype=torch.uint8)) if static else (None, None)
    weight = Int8Weight(values, torch.rand(n) + 0.1, 8, 8, *fixed)
    layer = Int8Conv1d.from_weight(weight, Conv1dGeometry(channels, (size,), groups=groups, **walk), torch.randn(n))
    return layer, values.view(n, -1, size).numpy().astype(np.int64)


def exact(x: Tensor, w: Integers, layer: Int8Conv1d) -> tuple[Integers, Tensor]:
    """The sums int64 [N, n, positions] from the quantizer's integers, position by position; scale [N]."""
    q, scale, zero = ops.int8_quantize(x.flatten(1).contiguous(), layer.activation_bits, layer.canonical().input_range)
    to = layer.geometry
    inside = q.view(x.shape).numpy().astype(np.int64) - zero.numpy().astype(np.int64)[:, None, None]
    v = np.pad(inside, ((0, 0), (0, 0), to.margins), MODES[to.padding_mode])  # type: ignore[call-overload]
    (size,), (step,), (stride,) = to.kernel_size, to.dilation, to.stride
    own, made = to.in_channels // to.groups, layer.n // to.groups
    starts = range(0, v.shape[2] - step * (size - 1), stride)
    found = np.zeros((len(x), layer.n, len(starts)), np.int64)
    for at, start in enumerate(starts):
        window = v[:, :, start : start + step * (size - 1) + 1 : step]
        for g in range(to.groups):
            part, rows = window[:, g * own : (g + 1) * own], slice(g * made, (g + 1) * made)
            found[:, rows, at] = np.einsum("nck,ock->no", part, w[rows])
    return found, scale


def check(layer: Int8Conv1d, w: Integers, x: Tensor) -> None:
    """Integers, and y, of both memory formats."""
    expected, scale = exact(x, w, layer)
    v = torch.from_numpy(expected).float() * scale[:, None, None] * layer.canonical().scale[None, :, None]
    assert layer.bias32 is not None
    to = layer.geometry
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        wide = to.as_image(to.filled(given))
        acc = ops.int8_conv2d_accumulate(wide, layer.packed, layer.form, *to.plane, to.groups)[0]
        assert np.array_equal(to.from_image(acc).numpy(), expected), (layer, tuple(x.shape))
        assert torch.equal(layer(given), v + layer.bias32[None, :, None])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_the_integers_are_exact(kernel: str, size: int) -> None:
    walks: list[dict[str, Any]] = [
        {}, {"stride": (2,), "padding": (3,)}, {"dilation": (3,), "padding": "same"}, {"stride": (4,), "around": (1, 2)},
        {"padding": (2,), "padding_mode": "reflect"}, {"padding": (1,), "padding_mode": "circular"},
        {"padding": (4,), "padding_mode": "replicate"},
    ]  # fmt: skip
    for i, (channels, walk) in enumerate(product((1, 4, 5, 17), walks)):
        reach = (size - 1) * walk.get("dilation", (1,))[0] + 1
        x = torch.randn(1 + i % 2, channels, reach + 4 + i % 5)
        check(*random_layer((3, 40, 33)[i % 3], channels, size, static=i % 4 == 1, **walk), x)


@pytest.mark.parametrize(("channels", "n", "groups"), [(4, 8, 2), (6, 3, 3), (16, 16, 16), (33, 33, 33), (5, 10, 5)])
def test_integers_in_groups_are_exact(kernel: str, channels: int, n: int, groups: int) -> None:
    for size, stride in ((1, 1), (3, 2), (4, 1), (7, 3)):
        check(*random_layer(n, channels, size, groups, stride=(stride,), padding=(2,)), torch.randn(2, channels, 21))


def test_geometries() -> None:
    made = Conv1dGeometry(6, (3,), (2,), (1,), (1,), 2)
    assert (made.in_features, made.sides, made.positions((9,)), str(made).count("groups=2")) == (9, (1, 1), (5,), 1)
    assert Conv1dGeometry.from_settings(9, made.settings()) == made
    assert Conv1dGeometry(1, (4,), padding="same").sides == (1, 2)
    for wrong, message in (
        ({"kernel_size": (3, 3)}, "kernel_size is \\(3, 3\\), expected one number from 1"),
        ({"stride": 1}, "stride is 1, expected one number"),
        ({"around": (1,)}, "around is \\(1,\\), expected two numbers from 0"),
        ({"padding": "full"}, "padding is 'full', expected one number from 0"),
        ({"groups": 4}, "groups is 4, expected a divisor of in_channels = 6"),
    ):
        with pytest.raises(ValueError, match=message):
            Conv1dGeometry(**{"in_channels": 6, "kernel_size": (3,), **wrong})


@pytest.mark.parametrize("make", [Int8Conv1d, SparseConv1d])
def test_bad_input(make: Any) -> None:
    made = make.from_dense(nn.Conv1d(4, 6, 3))
    for x, error, message in (
        (torch.ones(2, 3, 4, 9), ValueError, r"x is \[2, 3, 4, 9\], expected \[N, in_channels, \*sizes\]"),
        (torch.ones(9), ValueError, r"x is \[9\], expected"),
        (torch.ones(2, 5, 9), ValueError, "5 channels"),
        (torch.ones(2, 4, 2), ValueError, "1x2, expected at least 1x3"),
    ):
        with pytest.raises(error, match=message):
            made(x)


class Speech(nn.Module):
    """Features of a frame to a score: a strided front, depthwise separable layers, a gap of one frame behind."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.ZeroPad1d((0, 2)), nn.Conv1d(12, 16, 4, stride=2, bias=False), nn.BatchNorm1d(16), nn.ReLU6()
        )
        self.deep, self.wide = nn.Conv1d(16, 16, 5, padding="same", groups=16), nn.Conv1d(16, 32, 1)
        self.act, self.head = nn.Hardswish(), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.wide(self.deep(self.front(x))))
        return self.head(x.mean(-1))


@pytest.fixture
def speech() -> Speech:
    torch.manual_seed(0)
    model = Speech().eval()
    nn.init.normal_(model.front[2].running_mean)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("static", [False, True])
def test_a_network(speech: Speech, static: bool, tmp_path: Path, same: Same) -> None:
    x = torch.randn(4, 12, 50)
    plan = pc.Int8(activation="static") if static else pc.Int8()
    seen = pc.calibrate(speech, [x, x * 1.1], plan=plan)
    made = pc.compress(speech, {"head": None, "*": plan}, calibration=seen, example_inputs=x)
    convs = [made.front[1], made.deep, made.wide]
    assert all(isinstance(layer, Int8Conv1d) and bool(layer.static) == static for layer in convs)
    assert [type(made.front[i]) for i in (0, 2, 3)] == [nn.Identity] * 3
    assert (convs[0].geometry.around, convs[0].activation, convs[2].activation) == ((0, 2), "relu6", "hardswish")
    text = str(pc.summary(made))
    assert "folded in: front.2; pads its input itself: 0x2 zeros" in text and "16x12x4" in text
    report = pc.validate(made, x)
    assert report.ok, str(report)
    assert [record.integers_equal for record in report.layers] == [True] * 3
    error = (made(x) - speech(x)).norm() / speech(x).norm()
    assert 1e-5 < float(error.detach()) < 0.1
    pc.save(made, tmp_path / "m.safetensors")
    for target in (speech, made):
        assert same(pc.load(copy.deepcopy(target), tmp_path / "m.safetensors")(x), made(x))


def test_sparse(speech: Speech) -> None:
    x = torch.randn(2, 12, 50)
    made = pc.compress(speech, {"head": None, "*": pc.Sparse(0.5)})
    assert isinstance(made.front[1], SparseConv1d) and type(made.deep) is nn.Conv1d
    assert "groups is 16, expected 1: convolutions in groups have no kernel yet" in str(pc.summary(made))
    assert pc.validate(made, x).ok


def test_trained(speech: Speech, same: Same) -> None:
    x = torch.randn(2, 12, 50)
    pc.prepare(speech, {"head": None, "*": pc.Int8()}, steps=1)
    assert all(bool(parameter.grad is None) for parameter in speech.parameters())
    speech.train()
    speech.front[2].eval()
    speech(x).square().sum().backward()
    assert speech.deep.weight.grad is not None and bool(speech.deep.weight.grad.any())
    expected = speech.eval()(x)
    assert same(pc.compress(speech)(x), expected)


def test_no_low_rank(speech: Speech) -> None:
    made = pc.compress(speech, pc.LowRank(2, rank_guard=False))
    assert type(made.wide) is nn.Conv1d
    assert "low_rank takes linear layers, convolutions and embeddings only" in str(pc.summary(made))
