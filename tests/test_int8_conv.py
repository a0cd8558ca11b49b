"""The int8 convolution: its integers on every kernel and at every edge, the op, the module, and what it becomes in ONNX."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from packing import backends
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import conv2d, pad

import pycompress as pc
from pycompress import ops
from pycompress.kinds import Conv2dGeometry
from pycompress.nn import Int8Conv2d
from pycompress.ops.cpu import int8_conv
from pycompress.weights import Int8Weight

Same = Callable[[Tensor, Tensor], bool]
Pair = tuple[int, int]
LAST = torch.channels_last
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # of torch, of NumPy
PRODUCTS = [row["name"] for row in ops.kernels() if row["op"] == "int8" and row["available"]]
KERNELS = [row["name"] for row in ops.kernels() if row["op"] == "int8_conv2d" and row["available"]]


def random_layer(
    n: int, channels: int, kernel: Pair, groups: int = 1, bits: int = 8, static: bool = False, **walk: Any
) -> tuple[Int8Conv2d, npt.NDArray[np.int64]]:
    """A layer, and its integers [n, channels / groups, *kernel]; those at the ends of int8 among them."""
    values = torch.randint(-127, 128, (n, channels // groups * kernel[0] * kernel[1]), dtype=torch.int8)
    values = torch.where(torch.rand(values.shape) < 0.2, torch.tensor(127, dtype=torch.int8), values)
    fixed = (torch.tensor([0.02]), torch.tensor([40], dtype=torch.uint8)) if static else (None, None)
    weight = Int8Weight(values, torch.rand(n) + 0.1, bits, 8, *fixed)
    layer = Int8Conv2d.from_weight(weight, Conv2dGeometry(channels, kernel, groups=groups, **walk), torch.randn(n))
    return layer, values.view(n, -1, *kernel).numpy().astype(np.int64)


def exact(x: Tensor, w: npt.NDArray[np.int64], layer: Int8Conv2d) -> tuple[npt.NDArray[np.int64], Tensor, Tensor]:
    """The sums int64 [N, n, ...], by NumPy from integers of the quantizer; scale and zero point [N]."""
    q, scale, zero = ops.int8_quantize(x.flatten(1).contiguous(), layer.activation_bits, layer.canonical().input_range)
    to = layer.geometry
    top, bottom, left, right = to.margins
    inside = q.view(x.shape).numpy().astype(np.int64) - zero.numpy().astype(np.int64)[:, None, None, None]
    v = np.pad(inside, ((0, 0), (0, 0), (top, bottom), (left, right)), MODES[to.padding_mode])  # type: ignore[call-overload]
    height, width = (
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(v.shape[2:], to.kernel_size, to.stride, to.dilation, strict=True)
    )
    found = np.zeros((len(x), layer.n, height, width), np.int64)
    own, made = to.in_channels // to.groups, layer.n // to.groups
    for r, s in product(range(to.kernel_size[0]), range(to.kernel_size[1])):
        y, z = r * to.dilation[0], s * to.dilation[1]
        part = v[:, :, y : y + (height - 1) * to.stride[0] + 1 : to.stride[0]]
        part = part[:, :, :, z : z + (width - 1) * to.stride[1] + 1 : to.stride[1]]
        for g in range(to.groups):
            rows = slice(g * made, (g + 1) * made)
            found[:, rows] += np.einsum("nchw,oc->nohw", part[:, g * own : (g + 1) * own], w[rows, :, r, s])
    return found, scale, zero


def accumulated(layer: Int8Conv2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    to = layer.geometry
    return ops.int8_conv2d_accumulate(
        to.filled(x), layer.packed, layer.form, to.kernel_size, to.stride, to.sides, to.dilation, to.groups
    )


def in_float32(acc: npt.NDArray[np.int64], scale: Tensor, layer: Int8Conv2d) -> Tensor:
    """The steps of the contract, each rounded; with ReLU where the layer has it."""
    weight = layer.canonical()
    v = torch.from_numpy(acc).float() * scale[:, None, None, None] * weight.scale[None, :, None, None]
    assert layer.bias32 is not None
    v = v + layer.bias32[None, :, None, None]
    return v.relu() if layer.activation == "relu" else v


def check(layer: Int8Conv2d, w: npt.NDArray[np.int64], x: Tensor) -> None:
    """Integers, and y, of both memory formats."""
    expected, scale, zero = exact(x, w, layer)
    for form in (torch.contiguous_format, LAST):
        given = x.contiguous(memory_format=form)
        acc, own_scale, own_zero = accumulated(layer, given)
        assert torch.equal(own_scale, scale)
        assert torch.equal(own_zero, zero)
        assert np.array_equal(acc.numpy(), expected), (layer, tuple(x.shape), form)
        assert torch.equal(layer(given), in_float32(expected, scale, layer))


# --- integers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(
    params=[*product(PRODUCTS, KERNELS[:1]), *product(PRODUCTS[:1], KERNELS[1:]), ("twin", "")], ids="-".join
)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kernel of the product, and each of what only convolutions do; and the twin."""
    name, own = request.param
    if name == "twin":
        with backends("twin"):
            yield name
    else:
        with ops.forced("int8", name), ops.forced("int8_conv2d", own):
            yield name


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (5, 4), (7, 7), (1, 6), (4, 1)])
def test_the_integers_are_exact(kernels: str, kernel: Pair) -> None:
    few = kernels in ("twin", "scalar_4x8")
    channels = (1, 5, 17) if few else (1, 2, 3, 4, 5, 8, 13, 16, 17)
    walks: list[dict[str, Any]] = [
        {}, {"stride": (2, 1), "padding": (1, 3)}, {"dilation": (2, 3), "padding": (4, 2)}, {"stride": (3, 4), "padding": (2, 0)},
    ]  # fmt: skip
    for i, (c, walk) in enumerate(product(channels, walks)):
        n, bits = (3, 40, 33)[i % 3], 8 if i % 4 else 7
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, walk.get("dilation", (1, 1)), strict=True)]
        x = torch.randn(1 + i % 2, c, reach[0] + i % 5, reach[1] + 6 - i % 7)
        check(*random_layer(n, c, kernel, bits=bits, static=i % 5 == 2, **walk), x)


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 15, 16, 17, 33])
def test_depthwise_integers_are_exact(kernels: str, channels: int) -> None:
    for i, (kernel, stride) in enumerate(product(((1, 1), (3, 3), (5, 2), (7, 7)), ((1, 1), (2, 2), (1, 3)))):
        walk = {"stride": stride, "padding": (i % 4, 2), "dilation": (1 + i % 2, 1)}
        x = torch.randn(2, channels, 14 + i, 19 - i % 6)
        check(*random_layer(channels, channels, kernel, channels, static=i % 3 == 1, **walk), x)


@pytest.mark.parametrize(("channels", "n", "groups"), [(4, 8, 2), (6, 3, 3), (12, 48, 4), (5, 10, 5), (34, 2, 2)])
def test_integers_in_groups_are_exact(kernels: str, channels: int, n: int, groups: int) -> None:
    for kernel, stride in (((3, 3), (1, 1)), ((1, 1), (2, 1)), ((2, 5), (1, 2))):
        check(*random_layer(n, channels, kernel, groups, stride=stride, padding=(1, 2)), torch.randn(2, channels, 9, 8))


def test_sums_at_their_ends_are_exact(kernels: str) -> None:
    """All activations at an end and all weights, too: as far from 0 as sums come."""
    for groups, sign in product((1, 8), (1, -1)):
        layer, w = random_layer(8, 8, (7, 7), groups)
        values = torch.full((8, layer.k), 127 * sign, dtype=torch.int8)
        layer = Int8Conv2d.from_weight(Int8Weight(values, torch.ones(8), 8, 8), layer.geometry, torch.zeros(8))
        x = torch.full((1, 8, 9, 9), 5.0)
        x[:, :, 4:, 4:] = -5.0
        check(layer, np.full_like(w, 127 * sign), x)


@pytest.mark.parametrize("groups", [1, 2, 20])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
def test_bytes_are_what_the_layers_would_make_of_floats(kernels: str, groups: int, kernel: Pair, same: Same) -> None:
    """As x, with bytes behind them that may be read and without; and as y, whose activation the range may cut off."""
    walks: list[dict[str, Any]] = [{}, {"padding": (1, 2)}, {"stride": (2, 1)}]
    for walk, activation in zip(walks, ("none", "relu6", "silu"), strict=True):
        layer, _ = random_layer(20, 20, kernel, groups, static=True, **walk)
        layer = Int8Conv2d.from_weight(layer.canonical(), layer.geometry, layer.bias32, activation)
        to = layer.geometry
        operands = (to.kernel_size, to.stride, to.sides, to.dilation, to.groups, activation)

        def hand_on(x: Tensor, target: Any, last: bool) -> Tensor:
            y = int8_conv.hand_on(x, layer.packed, layer.form, layer.bias32, *operands, target, last)  # noqa: B023
            assert y is not None
            return y

        x = torch.randn(2, 20, 9, 8)
        q, _, _ = ops.int8_quantize(x.flatten(1).contiguous(), 8, layer.canonical().input_range)
        room = int8_conv._bytes(x.shape)
        room.copy_(q.view(x.shape))
        tight = torch.empty_like(x, dtype=torch.uint8, memory_format=LAST).copy_(room)
        target = (float(layer(x).detach().abs().amax()) / 90, 100, 255)
        wanted, _, _ = ops.int8_quantize(layer(x).flatten(1), 8, target[:2])
        for given in (x, x.to(memory_format=LAST), room, tight):
            for last in (False, True):
                y = hand_on(given, None, last)
                assert same(y, layer(x).contiguous(memory_format=LAST if last else torch.contiguous_format))
            assert torch.equal(hand_on(given, target, True).flatten(1), wanted)
        x[1, 3, 0, 0] = torch.nan
        assert int8_conv.hand_on(x, layer.packed, layer.form, layer.bias32, *operands, target, True) is None


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_what_is_added_before_the_activation_is_what_torch_adds(
    kernels: str, groups: int, kernel: Pair, same: Same
) -> None:
    """To floats, to bytes, and to floats with their bytes beside them; whatever is not finite is in the floats alone."""
    for n, activation in ((4, "relu"), (36, "none")):
        layer, _ = random_layer(n, 20, kernel, groups, static=True, padding=(1, 1))
        to = layer.geometry
        x = torch.randn(2, 20, 6, 5).contiguous(memory_format=LAST)
        plain = layer(x).detach()
        addend = torch.randn(plain.shape).contiguous(memory_format=LAST) * plain.abs().max()
        wanted = functional.relu(plain + addend) if activation == "relu" else plain + addend
        target = (float(wanted.abs().amax()) / 90, 100, 255)
        quantized, _, _ = ops.int8_quantize(wanted.flatten(1), 8, target[:2])
        walk = (to.kernel_size, to.stride, to.sides, to.dilation, to.groups)
        operands = (x, layer.packed, layer.form, layer.bias32, *walk, activation)
        assert same(int8_conv.hand_on(*operands, None, True, addend), wanted)
        assert same(int8_conv.hand_on(*operands, None, False, addend), wanted.contiguous())
        q = int8_conv.hand_on(*operands, target, True, addend)
        assert q is not None and torch.equal(q.flatten(1), quantized)
        y, q = int8_conv.hand_on_beside(*operands, target, addend)
        assert q is not None and same(y, wanted) and torch.equal(q.flatten(1), quantized)
        y, q = int8_conv.hand_on_beside(*operands[:-1], "none", target, None)
        assert q is not None and same(y, plain)
        addend[1, n - 1, 2, 3] = torch.inf
        assert int8_conv.hand_on(*operands, target, True, addend) is None
        y, q = int8_conv.hand_on_beside(*operands, target, addend)
        assert q is None and bool(y[1, n - 1, 2, 3].isinf())


def test_an_addend_that_does_not_fit_is_refused() -> None:
    layer, _ = random_layer(8, 8, (1, 1), static=True)
    x, walk = torch.randn(1, 8, 4, 4), ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    for addend in (torch.ones(1, 8, 4, 3), torch.ones(1, 8, 4, 4), torch.ones(1, 8, 4, 4, dtype=torch.float64)):
        with pytest.raises(
            ValueError, match=r"the addend is .*, expected torch.float32 \[1, 8, 4, 4\] with the channels last"
        ):
            int8_conv.hand_on(x, layer.packed, layer.form, layer.bias32, *walk, "none", None, True, addend)


def test_images_larger_than_what_stays_in_a_cache() -> None:
    """Several bands, several images at once and one behind the other, as many tasks as there are."""
    for groups, images in product((1, 24), (1, 5)):
        check(*random_layer(24, 24, (3, 3), groups, padding=(1, 1)), torch.randn(images, 24, 112, 95))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_thread_counts_change_nothing(threads: int, same: Same) -> None:
    before = torch.get_num_threads()
    for groups in (1, 2, 20):
        layer, _ = random_layer(40 if groups < 20 else 20, 20, (3, 3), groups, padding=(1, 1))
        x = torch.randn(3, 20, 31, 17)
        torch.set_num_threads(1)
        expected = layer(x)
        try:
            torch.set_num_threads(threads)
            assert same(layer(x), expected)
        finally:
            torch.set_num_threads(before)


# --- the op -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_an_image_with_nan_or_inf_gives_nan_and_no_other_one(
    bad: float, groups: int, static: bool, stride: int, same: Same
) -> None:
    """Also where it stands in a row that no position of the result reaches."""
    layer, _ = random_layer(6, 6, (3, 3), groups, static=static, stride=(stride, stride))
    x = torch.randn(3, 6, 8, 8)
    expected = layer(x)
    x[1, 4, 7, 7] = bad
    for given in (x, x.to(memory_format=LAST)):
        y = layer(given)
        assert bool(y[1].isnan().all())
        assert same(y[[0, 2]].contiguous(), expected[[0, 2]])
        acc, scale, zero = accumulated(layer, given)
        assert not acc[1].any()
        assert bool(scale[1].isnan()) and int(zero[1]) == (40 if static else 0)


@pytest.mark.parametrize("value", [0.0, 1e-38, 3.0, -3.0, 3.4e38])
def test_constant_images(value: float) -> None:
    for groups in (1, 4):
        layer, w = random_layer(4, 4, (3, 3), groups, padding=(1, 1))
        check(layer, w, torch.full((1, 4, 6, 6), value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2, 18])
def test_half_precision_is_converted_exactly_and_rounded_once(dtype: torch.dtype, groups: int, same: Same) -> None:
    layer, _ = random_layer(18, 18, (3, 3), groups, padding=(1, 0))
    for x in (torch.randn(2, 18, 9, 11).to(dtype), torch.randn(18, 5, 40).to(dtype)):
        assert same(layer(x), layer(x.float()).to(dtype))
        last = x.to(memory_format=LAST) if x.dim() == 4 else x
        assert same(layer(last).contiguous(), layer(x))


def test_the_result_lies_as_x_does() -> None:
    layer, _ = random_layer(6, 4, (3, 3))
    conv = nn.Conv2d(4, 6, 3)
    for x in (torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8).to(memory_format=LAST), torch.randn(4, 7, 8)):
        fake = copy.deepcopy(layer).to("meta")(x.to("meta"))
        assert layer(x).stride() == fake.stride() == conv(x).stride()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_opcheck(groups: int) -> None:
    layer, _ = random_layer(4, 4, (3, 2), groups, padding=(1, 0), stride=(1, 2))
    to = layer.geometry
    walk = (to.kernel_size, to.stride, to.sides, to.dilation, to.groups)
    for x in (torch.randn(2, 4, 8, 9), torch.randn(2, 4, 8, 9).to(memory_format=LAST), torch.randn(4, 8, 9).bfloat16()):
        arguments = (x, layer.packed, layer.form, layer.bias32, *walk, "silu")
        torch.library.opcheck(torch.ops.pycompress.int8_conv2d.default, arguments)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_derivatives_are_those_of_the_weight(groups: int) -> None:
    layer, _ = random_layer(6, 6, (3, 2), groups, padding=(1, 2), stride=(2, 1))
    x = torch.randn(2, 6, 7, 8, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    top, bottom, left, right = layer.geometry.sides
    wide = pad(x, (left, right, top, bottom))
    plain = conv2d(wide, layer.weight.detach(), layer.bias, layer.stride, 0, layer.dilation, groups)
    (ours,), (theirs,) = (torch.autograd.grad(z, x, dy) for z in (y, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "float64": ({"x": torch.ones(1, 5, 4, 4, dtype=torch.float64)}, TypeError, "x is torch.float64"),
    "a matrix": ({"x": torch.ones(5, 4)}, ValueError, r"x is \[5, 4\], expected \[N, C, H, W\] or \[C, H, W\]"),
    "channels": ({"x": torch.ones(1, 6, 4, 4)}, ValueError, "x has 6 channels, the packed weight expects 5"),
    "too small": ({"x": torch.ones(1, 5, 4, 2)}, ValueError, "x with its padding is 4x2, expected at least 3x3"),
    "kernel": ({"kernel_size": (3, 2)}, ValueError, r"kernel_size is \(3, 2\) and groups 1, the packed weight is"),
    "groups": ({"groups": 5}, ValueError, "groups 5, the packed weight is"),
    "stride": ({"stride": (1, 0)}, ValueError, r"stride \(1, 0\).*expected two numbers from 1"),
    "activation": ({"activation": "tanh"}, ValueError, "activation is 'tanh', expected one of none, relu"),
    "bias": ({"bias": torch.ones(18)}, ValueError, r"int8_conv2d: bias is \[18\], expected \[19\]"),
    "packed": ({"packed": torch.ones(64)}, ValueError, "packed is torch.float32"),
    "another packed": ({"packed": torch.ones(256, dtype=torch.uint8)}, ValueError, "unknown format"),
    "a linear form": ({"form": "dot4 n=19 k=45 activation_bits=8"}, ValueError, "form|packed"),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_calls_are_refused(case: str) -> None:
    layer, _ = random_layer(19, 5, (3, 3))
    good = {
        "x": torch.ones(1, 5, 4, 4), "packed": layer.packed, "form": layer.form, "bias": layer.bias32, "kernel_size": (3, 3),
        "stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1, "activation": "none",
    }  # fmt: skip
    change, error, message = CALLS[case]
    with pytest.raises(error, match=message):
        ops.int8_conv2d(**{**good, **change})
    with pytest.raises(error, match=message):
        torch.ops.pycompress.int8_conv2d.default(*{**good, **change}.values())


# --- the module ---------------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    weight = pc.Int8(16).compress(torch.randn(4, 18))
    with pytest.raises(ValueError, match="activation_bits is 16, expected 8 or 7"):
        Int8Conv2d.from_weight(weight, Conv2dGeometry(2, (3, 3)))
    with pytest.raises(ValueError, match=r"padding_mode is 'mirror', expected one of zeros, reflect"):
        Conv2dGeometry(2, (3, 3), padding_mode="mirror")
    with pytest.raises(ValueError, match=r"around is \(0, 1, 0, 0\), expected no zeros: the mode is reflect"):
        Conv2dGeometry(2, (3, 3), around=(0, 1, 0, 0), padding_mode="reflect")
    with pytest.raises(ValueError, match="expected at most 518 weights"):
        Int8Conv2d.from_dense(nn.Conv2d(2, 2, 23, groups=2))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_padding_modes(mode: str, groups: int, same: Same) -> None:
    """What is repeated is quantized as what it repeats; ONNX Runtime has the integers, too."""
    for i, walk in enumerate(
        ({"padding": (2, 1)}, {"padding": "same", "dilation": (2, 1)}, {"padding": (1, 3), "stride": (2, 3)})
    ):
        layer, w = random_layer(6, 6, (3, 2), groups, static=i == 1, padding_mode=mode, **walk)
        x = torch.randn(2, 6, 9, 8)
        check(layer, w, x)
        assert same(layer(x[0]), layer(x)[0])
        last = x.to(memory_format=LAST)
        assert layer(last).is_contiguous(memory_format=LAST)
        report = pc.validate(nn.Sequential(layer), x)
        assert report.ok, str(report)
        fake = copy.deepcopy(layer).to("meta")(x.to("meta"))
        assert fake.shape == layer(x).shape


def test_int8_weights_alone_leave_convolutions_dense() -> None:
    model = pc.compress(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv1d(4, 4, 3), nn.Linear(4, 4)).eval(), pc.Int8(16))
    reasons = [record.reason for record in pc.summary(model).layers]
    assert reasons == ["Int8 takes convolutions with activations of 7 or 8 bits only, not with 16-bit ones"] * 2 + [""]


def test_depthwise_weights_take_their_whole_range() -> None:
    """No kernel gains by the range that a profile leaves, and a filter of nine equal weights would lose a bit and more."""
    conv = nn.Conv2d(8, 8, 3, groups=8)
    nn.init.constant_(conv.weight, 0.3)
    made = Int8Conv2d.from_dense(conv, pc.Int8())
    assert int(made.canonical().values.abs().amax()) == 127


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_a_network_against_onnx_runtime(groups: int) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act = nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.ReLU()
            self.second, self.gate = nn.Conv2d(16, 16, (3, 5), padding="same", groups=groups), nn.SiLU()
            self.last = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.gate(self.second(self.act(self.first(x))))
            return self.last(x.mean((2, 3)))

    dense = Network().eval()
    model = pc.compress(dense, pc.Int8())
    assert isinstance(model.second, Int8Conv2d) and model.second.activation == "silu"
    x = torch.randn(3, 3, 21, 18)
    report = pc.validate(model, x)
    assert report.ok, report
    x[1, 0, 0, 0] = torch.nan
    assert pc.validate(model, x).ok
    error = (model(x[[0, 2]]) - dense(x[[0, 2]])).norm() / dense(x[[0, 2]]).norm()
    assert 1e-5 < float(error.detach()) < 0.05


def test_calibrated_groups_are_rounded_plainly() -> None:
    """What a group's rows look like is not gathered: they are compressed as without a calibration, and nothing fails."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8)
    ).eval()
    seen = pc.calibrate(model, [torch.randn(4, 4, 12, 12) for _ in range(3)])
    calibrated, plain = pc.compress(model, pc.Int8(), calibration=seen), pc.compress(model, pc.Int8())
    assert "not calibrated" in str(pc.summary(calibrated))
    assert not torch.equal(calibrated[0].canonical().values, plain[0].canonical().values)
    for i in (2, 3):
        assert torch.equal(calibrated[i].canonical().values, plain[i].canonical().values)


@pytest.mark.parametrize("observer", [pc.MinMax(), pc.Percentile(99.9), pc.MeanSquaredError()])
def test_static_ranges_from_a_calibration(observer: Any) -> None:
    """Of every layer, those in groups too; and ONNX Runtime agrees."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 1, groups=2)
    ).eval()  # fmt: skip
    plan, batches = pc.Int8(activation="static", observer=observer), [torch.randn(4, 3, 17, 19) for _ in range(3)]
    made = pc.compress(model, plan, calibration=pc.calibrate(model, batches, plan=plan))
    layers = [made[i] for i in (0, 2, 4)]
    assert all(isinstance(layer, Int8Conv2d) and layer.static and layer.label == "int8 static" for layer in layers)
    low, scale = min(float(x.min()) for x in batches), layers[0].canonical().input_range[0]
    assert not isinstance(observer, pc.MinMax) or abs(layers[0].canonical().input_range[1] * scale + low) < scale
    x = torch.randn(2, 3, 17, 19)
    assert pc.validate(made, x).ok
    error = (made(x) - model(x)).norm() / model(x).norm()
    assert 1e-4 < float(error.detach()) < 0.1
    with pytest.raises(ValueError, match=r"0: .*calibration"):
        pc.compress(model, plan)


def test_a_static_convolution_is_saved_and_trained(tmp_path: Any, same: Same) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)).eval()
    plan, x = pc.Int8(activation="static", observer=pc.Known(-2.0, 3.0)), torch.randn(2, 3, 9, 9)
    made = pc.compress(model, plan)
    pc.save(made, tmp_path / "m.safetensors")
    assert same(pc.load(copy.deepcopy(model), tmp_path / "m.safetensors")(x), made(x))
    assert same(copy.deepcopy(made)(x), made(x))
    prepared = copy.deepcopy(model)
    pc.prepare(prepared, plan, steps=1)
    assert same(prepared.eval()(x), made(x))
    torch.testing.assert_close(prepared.train()(x), made(x), rtol=1e-4, atol=1e-5)
