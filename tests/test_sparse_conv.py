"""The sparse convolution from the op to the whole model, on the native kernels and on their twin."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from contract.kinds import CONVS
from packing import backends, pack_sparse
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad
from torch.nn.utils import prune

import pycompress as pc
from pycompress import measure, ops, race, reference
from pycompress.methods import Int4, Int8, Sparse
from pycompress.model import compressed_layers
from pycompress.nn import Conv2dGeometry, Int8Linear, SparseConv2d, SparseLinear
from pycompress.weights import SparseWeight

Forked = Callable[..., Any]
Python = Callable[..., subprocess.CompletedProcess[str]]
Same = Callable[[Tensor, Tensor], bool]
Snapshot = Callable[[nn.Module], Callable[[], bool]]

EPS = float(torch.finfo(torch.float32).eps)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "twin"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backends(request.param):
        yield request.param


EVERY = pytest.mark.parametrize("name", CONVS)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:`torch.jit")


def dense(name: str = "3x3 padded", channels: int = 5, n: int = 19, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, n, **CONVS[name], bias=bias)


def layer(
    name: str = "3x3 padded",
    density: float = 0.3,
    pattern: str = "unstructured",
    activation: str = "none",
    **sizes: Any,
) -> SparseConv2d:
    return SparseConv2d.from_dense(dense(name, **sizes), Sparse(density, pattern), activation)


def exact_with_bound(x: Tensor, made: SparseConv2d) -> tuple[Tensor, Tensor]:
    """act(conv2d) in float64, and how far float32 may lie from it: as in test_sparse_ops, by the weights of a channel."""
    top, bottom, left, right = made.geometry.sides
    x, weight = pad(made.geometry.filled(x.double()), (left, right, top, bottom)), made.weight.double()
    bias = None if made.bias is None else made.bias.double()
    walk = {"stride": made.stride, "dilation": made.dilation}
    exact = conv2d(x, weight, bias, **walk)
    count = ((weight != 0).flatten(1).sum(1).double() + 2)[:, None, None]
    return exact, EPS * count * conv2d(x.abs(), weight.abs(), **walk) + EPS * exact.abs() + count * 2.0**-149


def within(y: Tensor, x: Tensor, made: SparseConv2d) -> bool:
    exact, bound = exact_with_bound(x, made)
    assert y.shape == exact.shape
    return bool(((y.double() - exact).abs() <= bound).all())


# --- the op -------------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_within_the_bound(name: str, density: float) -> None:
    for channels, n in ((1, 1), (3, 17), (8, 33)):
        made = layer(name, density, channels=channels, n=n, bias=n > 1)
        for size in ((7, 7), (9, 13), (8, 16)):
            x = torch.randn(2, channels, *size)
            assert within(made(x), x, made), (channels, n, size)


@EVERY
@pytest.mark.parametrize("pattern", ["unstructured", "16x1"])
def test_small_integers_are_exact(name: str, pattern: str) -> None:
    """Sums that float32 holds: whatever the order, one input too many, too few or from the next place shows."""
    conv = dense(name, 3, 20)
    with torch.no_grad():
        conv.weight.copy_(torch.randint(-9, 10, conv.weight.shape))
        conv.bias.copy_(torch.randint(-9, 10, (20,)))
    made = SparseConv2d.from_dense(conv, Sparse(0.4, pattern))
    conv.weight.data.copy_(made.weight)
    for images, size in product((1, 3), ((7, 7), (7, 12), (18, 9))):
        x = torch.randint(-99, 100, (images, 3, *size)).float()
        assert torch.equal(made(x), conv(x))


def test_both_formats_of_the_kernels(backend: str) -> None:
    found = {layer(pattern=pattern, density=0.2, n=64).format for pattern in ("unstructured", "16x1")}
    assert found == ({"rows"} if backend == "twin" else {"rows", "panels"})


def test_the_sums_are_the_chains_of_the_twin(backend: str, same: Same) -> None:
    if backend == "twin":
        pytest.skip("the twin is what the kernels are compared with")
    for name, pattern in product(CONVS, ("unstructured", "16x1")):
        made, x = layer(name, 0.4, pattern, "relu"), torch.randn(2, 5, 11, 14)
        y = made(x)
        mask, values = made.canonical().mask.numpy(), made.canonical().values.numpy()
        top, _, left, _ = made.geometry.sides
        for image, got in zip(made.geometry.filled(x), y, strict=True):
            rows = reference.sparse.patches(
                image.numpy(), made.kernel_size, made.stride, (top, left), made.dilation, tuple(y.shape[2:])
            )
            expected = reference.sparse.linear(rows, mask, values, made.bias.numpy(), code=1)
            assert same(got, torch.from_numpy(expected.T.reshape(got.shape)).contiguous()), (name, pattern)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_images_smaller_than_the_kernel(size: tuple[int, int]) -> None:
    for name in ("1x1", "3x3 padded", "7x7", "1x7", "4x2, same", "3x3, more padding than kernel"):
        made, x = layer(name), torch.randn(2, 5, *size)
        assert within(made(x), x, made), name


def test_one_position() -> None:
    made = SparseConv2d.from_dense(nn.Conv2d(6, 20, (4, 5)), Sparse(0.3))
    x = torch.randn(3, 6, 4, 5)
    assert made(x).shape == (3, 20, 1, 1)
    assert within(made(x), x, made)
    linear = SparseLinear.from_weight(made.canonical(), made.bias)
    torch.testing.assert_close(made(x).flatten(1), linear(x.flatten(1)))


@EVERY
def test_without_a_batch_dimension(name: str, same: Same) -> None:
    made, x = layer(name, activation="silu"), torch.randn(5, 9, 10)
    assert same(made(x), made(x[None])[0])


@EVERY
def test_no_images(name: str) -> None:
    made, conv = layer(name, activation="gelu"), dense(name)
    x = torch.randn(0, 5, 9, 8, requires_grad=True)
    assert made(x.detach()).shape == conv(x).shape
    made(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x + 1])[0],
        lambda x: pad(x, (3, 1, 2, 2))[:, :, 2:-2, 3:-1],
        lambda x: x.flip(0).repeat_interleave(2, 0)[::2].flip(0),
        lambda x: torch._neg_view(-x),
    ],
)
def test_strides(change: Callable[[Tensor], Tensor], same: Same) -> None:
    made, x = layer(), torch.randn(2, 5, 6, 7)
    changed = change(x)
    assert torch.equal(changed, x)
    y = made(changed)
    assert same(y, made(x))
    assert y.is_contiguous()
    expanded = x[:1].expand(4, -1, -1, -1)
    assert same(made(expanded), made(expanded.contiguous()))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype, same: Same) -> None:
    made = layer(name, activation="relu")
    for shape in ((2, 5, 9, 9), (5, 8, 13)):
        x = torch.randn(shape).to(dtype)
        assert same(made(x), made(x.float()).to(dtype)), "converted exactly, rounded once"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_show_where_a_weight_meets_them(bad: float) -> None:
    made = layer("3x3 padded with a stride", 0.2, n=33)
    x = torch.randn(2, 5, 9, 9)
    expected = made(x)
    where = torch.zeros_like(x)
    where[1, 3, 4, 5] = 1
    x[1, 3, 4, 5] = bad
    y = made(x)
    meets = conv2d(where, (made.weight != 0).float(), None, made.stride, made.padding) > 0
    assert torch.equal(~y.isfinite(), meets)
    assert torch.equal(y[~meets], expected[~meets])
    assert 0 < int(meets.sum()) < meets.numel() / 4


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations(activation: str) -> None:
    made = layer(activation=activation)
    x = torch.randn(2, 5, 8, 8) * torch.logspace(-2, 2, 8)
    exact, bound = exact_with_bound(x, made)
    function: Callable[[Tensor], Tensor] = {
        "none": lambda v: v,
        "relu": nn.functional.relu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
        "silu": nn.functional.silu,
        "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
        "relu6": nn.functional.relu6,
        "hardswish": nn.functional.hardswish,
    }[activation]
    # The slope is at most 1.13, of hardswish 1.5; an evaluation errs by at most 8 u |v| and may flush what is subnormal.
    error = (made(x).double() - function(exact)).abs()
    assert (error <= (1.5 if activation == "hardswish" else 1.13) * bound + 4 * EPS * exact.abs() + 2.0**-126).all()


def test_every_thread_count_gives_the_same_bits(same: Same) -> None:
    before = torch.get_num_threads()
    names, patterns = ("1x1", "3x3 padded with a stride"), ("unstructured", "16x1")
    cases = [
        (layer(name, pattern=pattern, n=n), torch.randn(images, 5, 19, 23))
        for name, pattern, n, images in product(names, patterns, (1, 70), (1, 3))
    ]
    try:
        torch.set_num_threads(1)
        expected = [made(x) for made, x in cases]
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(same(made(x), one) for (made, x), one in zip(cases, expected, strict=True))
    finally:
        torch.set_num_threads(before)


def arguments(made: SparseConv2d, x: Tensor) -> tuple[Any, ...]:
    walk = made.geometry
    return (
        x,
        made.packed,
        made.form,
        made.bias,
        walk.kernel_size,
        walk.stride,
        walk.sides,
        walk.dilation,
        made.activation,
    )


@pytest.mark.parametrize("name", ["1x1", "4x2, same", "3x3 padded with a stride"])
@pytest.mark.parametrize(
    ("dtype", "shape", "bias", "activation"),
    [
        (torch.float32, (2, 5, 8, 9), True, "none"),
        (torch.bfloat16, (5, 8, 9), False, "relu"),
        (torch.float16, (1, 5, 9, 8), True, "gelu"),
        (torch.float32, (0, 5, 8, 9), False, "silu"),
    ],
)
def test_opcheck(name: str, dtype: torch.dtype, shape: tuple[int, ...], bias: bool, activation: str) -> None:
    made = layer(name, bias=bias, activation=activation)
    for x in (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype).transpose(-1, -2)):
        torch.library.opcheck(torch.ops.pycompress.sparse_conv2d.default, arguments(made, x))


@EVERY
def test_fake_has_the_shape_and_strides_of_the_real_result(name: str) -> None:
    made = layer(name)
    x = torch.randn(2, 5, 10, 11).to(memory_format=torch.channels_last)
    real, fake = made(x), copy.deepcopy(made).to("meta")(x.to("meta"))
    assert fake.is_meta
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_vmap(same: Same) -> None:
    made, x = layer(activation="relu"), torch.randn(4, 3, 5, 6, 7)
    assert same(torch.func.vmap(made)(x), torch.stack([made(one) for one in x]))
    assert same(torch.func.vmap(made, in_dims=1)(x), torch.stack([made(x[:, i]) for i in range(3)]))
    assert same(torch.func.vmap(made)(x[0]), made(x[0]))
    values = list(arguments(made, x[0]))
    assert made.bias is not None
    values[3] = made.bias.expand(2, -1).contiguous()
    over_the_bias = torch.func.vmap(
        torch.ops.pycompress.sparse_conv2d.default, in_dims=(None, None, None, 0, *[None] * 5)
    )
    with pytest.raises(NotImplementedError, match="vmap over the weights"):
        over_the_bias(*values)


CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "float64": ({"x": torch.ones(1, 5, 4, 4, dtype=torch.float64)}, TypeError, "x is torch.float64"),
    "a matrix": ({"x": torch.ones(5, 4)}, ValueError, r"x is \[5, 4\], expected \[N, C, H, W\] or \[C, H, W\]"),
    "five dimensions": ({"x": torch.ones(1, 1, 5, 4, 4)}, ValueError, r"expected \[N, C, H, W\] or \[C, H, W\]"),
    "channels": ({"x": torch.ones(1, 6, 4, 4)}, ValueError, "6 channels.*the packed weight expects k = 45"),
    "no channels": ({"x": torch.ones(1, 0, 4, 4)}, ValueError, "0 channels.*the packed weight expects k = 45"),
    "too small": ({"x": torch.ones(1, 5, 4, 2)}, ValueError, "x with its padding is 4x2, expected at least 3x3"),
    "no pixels": ({"x": torch.ones(1, 5, 0, 0)}, ValueError, "x with its padding is 0x0, expected at least 3x3"),
    "n": ({"form": "n=18", "bias": None}, ValueError, "n is 18, the packed weight has 19 channels"),
    "kernel": ({"kernel_size": (3, 2)}, ValueError, "5 channels and a kernel of 3x2.*expects k = 45"),
    "kernel of one number": ({"kernel_size": (3,)}, ValueError, r"kernel_size is \(3,\), .*expected two numbers"),
    "kernel of zero": ({"kernel_size": (0, 3)}, ValueError, r"kernel_size is \(0, 3\)"),
    "an enormous kernel": ({"kernel_size": (2**40, 2**40)}, ValueError, "expected two numbers from 1 to 65536"),
    "stride": ({"stride": (1, 0)}, ValueError, r"stride \(1, 0\).*expected two numbers from 1"),
    "dilation": ({"dilation": (-1, 1)}, ValueError, r"dilation \(-1, 1\).*expected two numbers from 1"),
    "padding": ({"padding": (0, 0, -1, 0)}, ValueError, r"padding \(0, 0, -1, 0\).*of padding four from 0"),
    "padding of two numbers": ({"padding": (1, 1)}, ValueError, r"padding \(1, 1\).*of padding four from 0"),
    "activation": ({"activation": "tanh"}, ValueError, "activation is 'tanh', expected one of none, relu"),
    "bias": ({"bias": torch.ones(18)}, ValueError, r"sparse_conv2d: bias is \[18\], expected \[19\]"),
    "bias in float64": ({"bias": torch.ones(19).double()}, ValueError, r"bias is torch.float64 \[19\]"),
    "packed": ({"packed": torch.ones(64)}, ValueError, "packed is torch.float32"),
    "another packed": ({"packed": torch.ones(64, dtype=torch.uint8)}, ValueError, "unknown format|packed"),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_calls_are_refused(case: str) -> None:
    made = layer("3x3")
    names = ("x", "packed", "form", "bias", "kernel_size", "stride", "padding", "dilation", "activation")
    good = dict(zip(names, arguments(made, torch.ones(1, 5, 4, 4)), strict=True))
    change, error, message = CALLS[case]
    if "form" in change:
        change = {**change, "form": made.form.replace("n=19", change["form"])}
    with pytest.raises(error, match=message):
        ops.sparse_conv2d(**{**good, **change})
    with pytest.raises(error, match=message):
        torch.ops.pycompress.sparse_conv2d.default(*{**good, **change}.values())


def test_int8_weights_are_refused() -> None:
    weight = Sparse(0.5, bits=8).compress(torch.randn(4, 18))
    packed = pack_sparse(weight.mask, weight.values, 18, 7, scale=weight.scale)
    with pytest.raises(ValueError, match="sparse_conv2d: the packed weight is int8, expected float32"):
        ops.sparse_conv2d(torch.randn(1, 2, 5, 5), *packed, None, (3, 3))


# --- the module ---------------------------------------------------------------------------------------------------------


def test_importance_decides_what_stays() -> None:
    conv = dense()
    importance = torch.rand(conv.weight.shape)
    weight = Sparse(0.2).compress(conv.weight.flatten(1), importance.flatten(1))
    made = SparseConv2d.from_weight(weight, Conv2dGeometry(5, (3, 3), padding=(1, 1)), conv.bias)
    kept = importance >= importance.flatten().sort(descending=True).values[made.nnz - 1]
    assert torch.equal(made.weight, conv.weight * kept)
    x = torch.randn(1, 5, 6, 6)
    torch.testing.assert_close(made(x), conv2d(x, conv.weight * kept, conv.bias, padding=1))


def test_a_layer_whose_attributes_are_out_of_date() -> None:
    """As after pruning whole channels by hand: torch goes by the weight, and so does this."""
    conv, x = dense(), torch.randn(1, 4, 6, 6)
    conv.weight = nn.Parameter(conv.weight[:, :4].detach())
    made = SparseConv2d.from_dense(conv)
    assert made.in_channels == 4
    torch.testing.assert_close(made(x), conv(x))


def test_what_is_refused() -> None:
    weight, geometry = Sparse(0.5).compress(torch.randn(4, 18)), Conv2dGeometry(2, (3, 3))
    with pytest.raises(
        ValueError, match=r"the weight is \[4, 18\], expected k = 27 for in_channels=3, kernel_size=\(3, 3\)"
    ):
        SparseConv2d.from_weight(weight, Conv2dGeometry(3, (3, 3)))
    with pytest.raises(ValueError, match=r"SparseConv2d: bias is \[5\], expected \[4\]"):
        SparseConv2d.from_weight(weight, geometry, torch.zeros(5))
    with pytest.raises(ValueError, match="activation is 'tanh', expected one of"):
        SparseConv2d.from_weight(weight, geometry, None, "tanh")
    with pytest.raises(ValueError, match="the weight is int8, expected float32: int8 has no sparse convolution yet"):
        SparseConv2d.from_dense(nn.Conv2d(2, 4, 3), Sparse(0.5, bits=8))
    with pytest.raises(TypeError, match="the weight is Int8Weight, expected SparseWeight"):
        SparseConv2d.from_dense(nn.Conv2d(2, 4, 3), Int8())
    with pytest.raises(TypeError, match="SparseConv2d: the dense layer is Linear, expected Conv2d"):
        SparseConv2d.from_dense(nn.Linear(4, 4))
    for kind in (SparseLinear, Int8Linear):
        with pytest.raises(TypeError, match=f"{kind.__name__}: the dense layer is Conv2d, expected Linear"):
            kind.from_dense(nn.Conv2d(2, 4, 3))
    with pytest.raises(ValueError, match="groups is 2, expected 1"):
        SparseConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 0}, "in_channels is 0"),
        ({"in_channels": True}, "in_channels is True"),
        ({"kernel_size": (3, 0)}, r"kernel_size is \(3, 0\)"),
        ({"kernel_size": (3, 70000)}, "expected two numbers from 1 to 65536"),
        ({"kernel_size": 3}, "kernel_size is 3"),
        ({"stride": (1, 1, 1)}, r"stride is \(1, 1, 1\)"),
        ({"dilation": (1.0, 1)}, r"dilation is \(1.0, 1\)"),
        ({"padding": (-1, 0)}, r"padding is \(-1, 0\)"),
        ({"padding": "full"}, "padding is 'full'"),
        ({"padding": "same", "stride": (2, 1)}, r"stride is \(2, 1\), expected \(1, 1\) for padding 'same'"),
    ],
)
def test_geometries_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conv2dGeometry(**{"in_channels": 3, "kernel_size": (3, 3), **change})


def test_sharing_a_weight_between_geometries() -> None:
    conv, other = nn.Conv2d(5, 8, 3, padding=1), nn.Conv2d(5, 8, 3, stride=2)
    other.weight = conv.weight
    one, two = SparseConv2d.from_dense(conv), SparseConv2d.from_dense(other)
    assert one.same_weight(two)
    two.share(one)
    copied = copy.deepcopy(nn.ModuleList([one, two]))
    assert copied[0].packed is copied[1].packed
    x = torch.randn(1, 5, 9, 9)
    torch.testing.assert_close(copied[1](x), other(x))
    assert not one.same_weight(SparseLinear.from_weight(one.canonical()))


def network() -> nn.Sequential:
    second = layer("4x2, same", 0.2, channels=19, n=6, bias=False)
    return nn.Sequential(layer("3x3 padded with a stride", activation="gelu"), nn.BatchNorm2d(19), second).eval()


def test_export_with_free_sizes() -> None:
    model, dim = network(), torch.export.Dim
    sizes = {0: dim("images", min=1, max=64), 2: dim("height", min=4, max=512), 3: dim("width", min=4, max=512)}
    program = torch.export.export(model, (torch.randn(2, 5, 9, 8),), dynamic_shapes=(sizes,))
    found = [node.target for node in program.graph.nodes]
    assert found.count(torch.ops.pycompress.sparse_conv2d.default) == 2
    x = torch.randn(3, 5, 20, 31)
    torch.testing.assert_close(program.module()(x), model(x))


# --- compress and summary -----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A basic block of a ResNet, its batch norms folded into the convolutions."""

    def __init__(self, channels: int, n: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, n, 3, stride, 1)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(n, n, 3, 1, 1)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(channels, n, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu2(self.conv2(self.relu1(self.conv1(x))) + self.shortcut(x))
        return y


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return y


CONV_NAMES = [
    "stem.0", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "blocks.1.shortcut",
]  # fmt: skip


def resnet() -> ResNet:
    return ResNet().eval()


def pruned_by_hand(model: nn.Module, compressed: nn.Module) -> nn.Module:
    """The dense model with the weights that the compressed one kept."""
    model = copy.deepcopy(model)
    for name, one in compressed_layers(compressed).items():
        model.get_submodule(name).weight.data.copy_(one.weight)
    return model


def reasons(model: nn.Module) -> dict[str, str]:
    return {record.name: record.reason for record in pc.summary(model).layers if record.method is None}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_residual_network(inplace: bool) -> None:
    model, x = resnet(), torch.randn(2, 3, 33, 40)
    original = copy.deepcopy(model)
    result = pc.compress(model, Sparse(0.3), inplace=inplace)
    assert (result is model) is inplace
    layers = compressed_layers(result)
    assert list(layers) == [*CONV_NAMES, "head"]
    assert {name for name, one in layers.items() if type(one) is SparseConv2d} == set(CONV_NAMES)
    assert {name for name, one in layers.items() if one.activation == "relu"} == {
        "stem.0", "blocks.0.conv1", "blocks.1.conv1",
    }, "and conv2 adds the shortcut first"  # fmt: skip
    assert type(result.stem[1]) is nn.Identity
    with torch.no_grad():
        torch.testing.assert_close(result(x), pruned_by_hand(original, result)(x), rtol=1e-4, atol=1e-5)


def test_summary() -> None:
    model = resnet()
    result = pc.compress(model, {"blocks.0.*": None, "*": Sparse(0.25)})
    summary = pc.summary(result)
    assert [record.name for record in summary.layers] == [*CONV_NAMES, "head"]
    record = {one.name: one for one in summary.layers}["blocks.1.conv1"]
    made = result.blocks[1].conv1
    assert (record.kind, record.shape, record.method, record.label) == (
        "Conv2d",
        (16, 8, 3, 3),
        "sparse",
        "sparse 25 %",
    )
    assert (record.density, record.bits, record.activation) == (0.25, 32, "relu")
    assert record.dense_bytes == 4 * (16 * 8 * 9 + 16)
    assert record.bytes == 4 * (made.nnz + 16) + 16 * 9
    weight = model.blocks[1].conv1.weight
    assert record.error == pytest.approx(float((made.weight - weight).detach().norm() / weight.detach().norm()))
    assert "16x8x3x3" in str(summary)
    assert reasons(result) == dict.fromkeys(CONV_NAMES[1:3], "the plan keeps 'blocks.0.*' dense")
    assert summary.dense_bytes == sum(p.numel() * 4 for p in model.parameters())
    by_hand = pc.summary(nn.Sequential(made)).layers[0]
    assert (by_hand.kind, by_hand.shape, by_hand.dense_bytes) == ("Conv2d", (16, 8, 3, 3), record.dense_bytes)


def test_methods_that_take_no_convolutions(same: Same) -> None:
    model, x = resnet(), torch.randn(1, 3, 32, 32)
    for method, reason in (
        (Int4(), "int4 takes linear layers only"),
        (Sparse(0.5, bits=8), "int8 has no sparse convolution yet"),
    ):
        result = pc.compress(model, method)
        assert list(compressed_layers(result)) == ["head"]
        assert reasons(result) == dict.fromkeys(CONV_NAMES, reason)
        only = pc.compress(model, {"stem.*": method})
        assert not compressed_layers(only)
        assert reasons(only)["stem.0"] == reason
        assert same(only(x), model(x))


class Own:
    """A user's method, which does not say what it takes: everything for which its weights have a layer."""

    name = "sparse"

    def compress(self, weight: Tensor) -> SparseWeight:
        return Sparse(0.5).compress(weight)


class OwnForConvolutions(Own):
    def refuses(self, kind: str) -> str:
        return "" if kind == "Conv2d" else "this one is for convolutions"


def test_a_method_says_what_it_takes() -> None:
    model = resnet()
    assert list(compressed_layers(pc.compress(model, Own()))) == [*CONV_NAMES, "head"]
    result = pc.compress(model, OwnForConvolutions())
    assert list(compressed_layers(result)) == CONV_NAMES
    assert reasons(result) == {"head": "this one is for convolutions"}


class Special(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups is 2, expected 1: convolutions in groups have no kernel yet"),
        (nn.Conv2d(4, 4, 3, groups=4), "groups is 4, expected 1: convolutions in groups have no kernel yet"),
        (Special(4, 4, 3), "Special is a subclass of Conv2d, which may do something else"),
        (nn.LazyConv2d(4, 3), "its parameters are not initialized yet"),
        (nn.ConvTranspose2d(4, 6, 3), "ConvTranspose2d has no compressed layer"),
        (nn.Conv3d(4, 4, 3), "Conv3d has no compressed layer"),
        (nn.Conv2d(4, 4, 3).double(), "its weight is torch.float64, expected float32, bfloat16 or float16"),
        (nn.Conv2d(8, 2, (128, 65)), "its weight is [2, 66560], expected 1 to 65536 input features"),
        (nn.Conv2d(4, 4, 3, padding=-1), "padding is (-1, -1)"),
    ],
)
def test_convolutions_that_stay_dense(module: nn.Module, reason: str) -> None:
    model = nn.ModuleDict({"a": module, "b": nn.Linear(4, 4)})
    for plan in (Sparse(0.5), {"a": Sparse(0.5), "*": Int8()}):
        result = pc.compress(model, plan)
        assert list(compressed_layers(result)) == ["b"]
        assert reason in reasons(result)["a"]
        assert type(result["a"]) is type(module)
        str(pc.summary(result))


def test_a_convolution_with_hooks_stays_dense() -> None:
    model = resnet()
    model.stem[0].register_forward_hook(lambda *_: None)
    assert reasons(pc.compress(model, Sparse(0.5))) == {"stem.0": "it has hooks, which would be lost"}


def test_a_convolution_with_nan_is_refused(snapshot: Snapshot) -> None:
    model = resnet()
    with torch.no_grad():
        model.blocks[1].conv2.weight[3, 2, 1, 0] = torch.nan
    modules = list(model.modules())
    for inplace in (False, True):
        with pytest.raises(ValueError, match=r"the weight of blocks\.1\.conv2 holds NaN or Inf"):
            pc.compress(model, Sparse(0.5), inplace=inplace)
    assert list(model.modules()) == modules


def test_the_model_itself_is_a_convolution() -> None:
    conv, x = dense(), torch.randn(1, 5, 6, 6)
    made = pc.compress(conv, Sparse(0.5))
    assert isinstance(made, pc.SparseConv2d)
    torch.testing.assert_close(made(x), pruned_by_hand_alone(conv, made)(x))


def pruned_by_hand_alone(conv: nn.Conv2d, made: SparseConv2d) -> nn.Conv2d:
    conv = copy.deepcopy(conv)
    conv.weight.data.copy_(made.weight)
    return conv


def test_layers_that_torch_pruned() -> None:
    model, x = resnet(), torch.randn(1, 3, 32, 32)
    for name in CONV_NAMES:
        prune.random_unstructured(model.get_submodule(name), "weight", amount=0.7)
    prune.ln_structured(model.blocks[0].conv2, "weight", amount=0.5, n=2, dim=0)
    prune.l1_unstructured(model.stem[0], "bias", amount=0.5)
    with torch.no_grad():
        expected = model(x)
        model.stem[0].weight_orig *= 2  # `weight` is out of date now, until the next call
        changed = pc.compress(model, Sparse())
        model.stem[0].weight_orig /= 2
        result = pc.compress(model, Sparse())
        torch.testing.assert_close(result(x), expected)
        torch.testing.assert_close(changed.stem[0].weight, 2 * result.stem[0].weight)
    for name in CONV_NAMES:
        conv, made = model.get_submodule(name), result.get_submodule(name)
        assert type(made) is SparseConv2d
        assert made.nnz == int((conv.weight_orig * conv.weight_mask != 0).sum())


class TiedConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.far.weight = self.near.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.far(self.near(x).tanh())
        return y


def test_a_shared_weight_stays_shared() -> None:
    model, x = TiedConvs(), torch.randn(1, 4, 8, 8)
    result = pc.compress(model, Sparse(0.5))
    assert result.near.packed is result.far.packed
    assert (result.near.dilation, result.far.dilation) == ((1, 1), (2, 2))
    torch.testing.assert_close(result(x), pruned_by_hand(model, result)(x))
    records = {record.name: record for record in pc.summary(result).layers}
    assert (records["far"].dense_bytes, records["far"].bytes) == (16, 16), "its bias alone"


def test_a_weight_shared_with_a_transposed_convolution_stays_dense() -> None:
    model = nn.ModuleDict({"encode": nn.Conv2d(4, 4, 3), "decode": nn.ConvTranspose2d(4, 4, 3)})
    model["decode"].weight = model["encode"].weight
    assert reasons(pc.compress(model, Sparse(0.5)))["encode"] == (
        "its weight is shared with decode: compressing it would add bytes"
    )


@pytest.mark.parametrize("pattern", ["unstructured", "16x1"])
def test_one_density_for_convolutions_and_linear_layers(pattern: str) -> None:
    model = resnet()
    with torch.no_grad():
        model.head.weight *= 10
    result = pc.compress(model, Sparse(0.2, pattern, scope="model"))
    layers = compressed_layers(result)
    assert list(layers) == [*CONV_NAMES, "head"]
    weights = {name: model.get_submodule(name).weight.detach().flatten(1) for name in layers}
    if pattern == "unstructured":
        magnitudes = torch.cat([weight.abs().flatten() for weight in weights.values()])
        threshold = magnitudes.sort(descending=True).values[round(0.2 * len(magnitudes)) - 1]
        expected = {name: int((weight.abs() >= threshold).sum()) for name, weight in weights.items()}
        assert {name: one.nnz for name, one in layers.items()} == expected
    assert layers["head"].density > 0.9
    assert len({one.density for one in layers.values()}) > 3


@pytest.mark.parametrize("faster", [False, True])
def test_only_if_faster(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Size, torch.Size]] = []

    def times(first: Callable[[], Tensor], second: Callable[[], Tensor], **_: Any) -> tuple[float, float]:
        seen.append((first().shape, second().shape))
        return (2.0, 1.0) if faster else (1.0, 2.0)

    monkeypatch.setattr(race, "interleaved_us", times)
    monkeypatch.setattr(race, "model_us", lambda *_: (2.0, 1.0))
    model, x = resnet(), torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    result = pc.compress(model, {"head": None, "*": Sparse(0.2)}, example_inputs=x, only_if_faster=True)
    assert len(seen) == len(CONV_NAMES)
    assert all(first == second for first, second in seen)
    assert list(compressed_layers(result)) == (CONV_NAMES if faster else [])
    if not faster:
        assert set(reasons(result).values()) == {
            "the plan keeps 'head' dense",
            "dense is faster here: 1 us against 2 us",
        }


def test_layers_are_measured_in_the_memory_format_of_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    conv2d = nn.functional.conv2d

    def watched(x: Tensor, *arguments: Any) -> Tensor:
        seen.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        return conv2d(x, *arguments)

    monkeypatch.setattr(nn.functional, "conv2d", watched)
    monkeypatch.setattr(race, "interleaved_us", lambda first, second, **_: (first() is None, 1.0))
    x = torch.randn(2, 5, 8, 8)
    for channels_last in (False, True):
        seen.clear()
        given = x.to(memory_format=torch.channels_last) if channels_last else x
        pc.compress(nn.Sequential(dense()), Sparse(0.2), example_inputs=given, only_if_faster=True)
        assert seen == [channels_last] * 2, "once in the model, once to be measured"


def test_measuring_for_real() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    result = pc.compress(model, Sparse(0.01), example_inputs=torch.randn(1, 8, 12, 12), only_if_faster=True)
    record = pc.summary(result).layers[0]
    assert record.dense_us > 0 and record.us > 0
    assert record.method is None or record.us < record.dense_us
    assert measure.interleaved_us is race.interleaved_us


# --- onnx and validation ------------------------------------------------------------------------------------------------


def onnx_extra() -> Any:
    pytest.importorskip("onnx", reason="the extra pycompress[onnx] is not installed")
    pytest.importorskip("onnxruntime", reason="the extra pycompress[onnx] is not installed")
    from pycompress import onnx

    return onnx


@EVERY
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_lowered_to_onnx(name: str, activation: str, bias: bool) -> None:
    onnx = onnx_extra()
    made = layer(name, activation=activation, bias=bias)
    model = onnx.lower(made)
    assert {node.domain for node in model.graph.node} == {""}
    run = onnx.session(model).run
    for shape in ((1, 5, 9, 9), (3, 5, 12, 7)):
        x = torch.randn(shape)
        y = torch.from_numpy(run(["y"], {"x": x.numpy()})[0])
        exact, _ = exact_with_bound(x, made)
        expected = nn.functional.gelu(exact) if activation == "gelu" else exact
        torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)


def test_the_weight_is_stored_once_in_onnx() -> None:
    onnx = onnx_extra()
    made = layer()
    stored = {tensor.name: tuple(tensor.dims) for tensor in onnx.lower(made).graph.initializer}
    assert stored == {"weight": (19, 5, 3, 3), "bias": (19,)}


@EVERY
@pytest.mark.parametrize("dtype", FLOATS)
def test_validate_every_geometry(name: str, dtype: torch.dtype) -> None:
    onnx_extra()
    model = nn.Sequential(layer(name, activation="relu"))
    for shape in ((2, 5, 9, 9), (5, 9, 10)):
        x = torch.randn(shape).to(dtype)
        report = pc.validate(model, x)
        assert report.ok, str(report)
        rows = model(x).numel() // 19
        (record,) = report.layers
        assert (record.rows, record.rows_seen, record.integers_equal, record.max_ulp) == (rows, rows, None, None)
        assert record.share_of_bound <= 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_validate_a_residual_network(memory_format: torch.memory_format) -> None:
    onnx_extra()
    result = pc.compress(resnet(), {"head": Int8(), "*": Sparse(0.3)})
    x = torch.randn(2, 3, 40, 40).to(memory_format=memory_format)
    report = pc.validate(result, x)
    assert report.ok, str(report)
    assert [record.name for record in report.layers] == [*CONV_NAMES, "head"]
    assert report.layers[0].rows == 2 * 20 * 20


def test_validate_sees_the_last_row_of_a_large_image(monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_extra()
    from pycompress.validation import checks

    monkeypatch.setattr(checks, "MAX_ROWS", 50)
    made = layer()
    forward = made.forward

    def wrong(x: Tensor) -> Tensor:
        y = forward(x)
        y[:, :, -1] += 1
        return y

    made.forward = wrong
    report = pc.validate(nn.Sequential(made), torch.randn(2, 5, 20, 20))
    (record,) = report.layers
    assert (record.rows, record.rows_seen, record.status) == (50, 800, "diverged")
