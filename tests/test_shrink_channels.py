"""``shrink`` of channels: which go together, by following them through a model; the smaller model equals one that ignores them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pycompress as pc
from pycompress.structure.channels import units_of
from pycompress.structure.cut import Cut, masked

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers by name, and how they are called."""

    def __init__(self, call: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def conv(inner: int, outer: int, size: int = 1, **other: Any) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, size, padding=size // 2, **other)


def pooled(y: Tensor) -> Tensor:
    return y.mean((2, 3))


def residual(groups: int) -> Net:
    """A bottleneck beside its skip connection."""

    def call(net: Any, x: Tensor) -> Tensor:
        x = functional.relu(net.norm(net.stem(x)))
        y = functional.relu(net.norm1(net.first(x)))
        y = functional.relu(net.norm2(net.second(y)))
        return net.head(pooled(functional.relu(x + net.norm3(net.third(y)))))  # type: ignore[no-any-return]

    return Net(
        call, stem=conv(3, 16, 3), norm=nn.BatchNorm2d(16), first=conv(16, 16, bias=False), norm1=nn.BatchNorm2d(16),
        second=conv(16, 16, 3, groups=groups), norm2=nn.BatchNorm2d(16), third=conv(16, 16), norm3=nn.BatchNorm2d(16),
        head=nn.Linear(16, 5),
    )  # fmt: skip


def shuffled(net: Any, x: Tensor) -> Tensor:
    y = functional.relu(net.a(x))
    n, c, h, w = y.shape
    y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return pooled(net.b(y))


def chunked(net: Any, x: Tensor) -> Tensor:
    u, v = net.a(x).chunk(2, 1)
    return pooled(net.c(torch.cat([u, functional.relu(net.b(v))], 1)))


def gated(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return pooled(net.d(y * net.c(functional.relu(net.b(y.mean((2, 3), keepdim=True)))).sigmoid()))


def scaled(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).permute(0, 2, 3, 1)
    return pooled(net.b((y * net.norm.weight).permute(0, 3, 1, 2)))


def in_place(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).add_(0.5).relu_()
    z = net.act(net.b(y))
    z += y
    return net.head(functional.max_pool2d(z, 4).flatten(1))  # type: ignore[no-any-return]


def twice(net: Any, x: Tensor) -> Tensor:
    return pooled(net.c(net.b(functional.relu(net.b(net.a(x))))))


# The net, and of each layer that is named first in its group how many channels can go each by itself.
NETS: dict[str, tuple[Callable[[], Net], dict[str, int]]] = {
    "residual": (lambda: residual(1), {"stem": 16, "first": 16, "second": 16}),
    "depthwise": (lambda: residual(16), {"stem": 16, "first": 16}),
    "grouped": (lambda: residual(4), {"stem": 16, "first": 4, "second": 4}),
    "flattened": (
        lambda: Net(lambda net, x: net.c(net.b(net.a(x)).flatten(1)), a=conv(3, 8), b=conv(8, 6), c=nn.Linear(6 * 64, 5)),
        {"a": 8, "b": 6},
    ),
    "joined": (
        lambda: Net(lambda net, x: pooled(net.c(torch.cat([net.a(x), x, net.b(x)], 1))), a=conv(3, 8), b=conv(3, 4), c=conv(15, 5)),
        {"a": 8, "b": 4},
    ),
    "shuffled": (lambda: Net(shuffled, a=conv(3, 8), b=conv(8, 5)), {"a": 4}),
    "chunked": (lambda: Net(chunked, a=conv(3, 8), b=conv(4, 4), c=conv(8, 5)), {"a": 4, "b": 4}),
    "gated": (lambda: Net(gated, a=conv(3, 8), b=conv(8, 4), c=conv(4, 8), d=conv(8, 5)), {"a": 8, "b": 4}),
    "scaled": (lambda: Net(scaled, a=conv(3, 8), norm=nn.LayerNorm(8), b=conv(8, 5)), {"a": 8}),
    "in place": (
        lambda: Net(in_place, a=conv(3, 8, 3), b=conv(8, 8), act=nn.PReLU(8), head=nn.Linear(32, 5)), {"a": 8},
    ),
    "called twice": (lambda: Net(twice, a=conv(3, 8), b=conv(8, 8), c=conv(8, 5)), {"a": 8}),
    "linear": (lambda: Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(8, 12), b=nn.Linear(12, 3, bias=False)), {"a": 12}),
}  # fmt: skip


def drawn(make: Callable[[], Net]) -> Net:
    """With norms that do something."""
    torch.manual_seed(0)
    net = make().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
        if isinstance(module, nn.LayerNorm | nn.PReLU):
            nn.init.normal_(module.weight)
    return net


@pytest.mark.parametrize("name", NETS)
def test_without_channels_it_is_as_if_nothing_used_them(name: str) -> None:
    make, sizes = NETS[name]
    net = drawn(make)
    units, _ = units_of(net, X)
    assert {one.name: one.size for one in units} == sizes
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        stay = {one: torch.rand(one.size, generator=generator) < 0.6 for one in units}
        for kept in stay.values():
            kept[0] = True
        small, unused = copy.deepcopy(net), copy.deepcopy(net)
        Cut.leaving(small, stay).apply(small)
        masked(unused, stay)
        with torch.no_grad():
            y, expected = small(X), unused(X)
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
        small.train()(X).sum().backward()  # its modules say what their tensors are
        assert "=16" not in repr(small.get_submodule(units[0].name)) or bool(stay[units[0]].all())


def softmax(net: Any, x: Tensor) -> Tensor:
    return pooled(net.b(net.a(x).softmax(1)))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (softmax, "softmax meets it"),
        (lambda net, x: net.a(x), "the model returns it"),
        (lambda net, x: pooled(net.b(functional.group_norm(net.a(x), 2))), "group_norm meets it"),
        (lambda net, x: pooled(net.b(functional.layer_norm(net.a(x), (8, 8, 8)))), "layer_norm meets it"),
        (lambda net, x: pooled(net.c(net.a(x)[:, :4])), "slice meets it"),
        (lambda net, x: pooled(net.b(net.a(x) + torch.ones(8, 1, 1))), "combined with what has no channels"),
        (lambda net, x: pooled(net.b(net.a(x))) + net.a.weight.sum(), "a.weight is used otherwise, too"),
    ],
)
def test_what_cannot_be_followed_stays(call: Any, reason: str) -> None:
    net = Net(call, a=conv(3, 8), b=conv(8, 5), c=conv(4, 5)).eval()
    units, left = units_of(net, X)
    assert not units
    assert [reason in one.reason for one in left if one.name == "a"] == [True]
    with pytest.raises(ValueError, match="no channels that can go"):
        pc.shrink(net, channels=0.5, example_inputs=X)


def test_shrunk_by_what_was_seen() -> None:
    """Half of the channels are copies of the others, or never on: without them the model gives what it gave."""
    net = drawn(lambda: residual(1))
    with torch.no_grad():
        net.third.weight[:, 8:] = 0.0  # of `second`, nothing looks at half
        for layer in (net.first, net.norm1):
            for own in (*layer.parameters(), *layer.buffers()):
                if own.dim():
                    own[8:] = own[:8]
    batches = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    seen = pc.calibrate(net, batches)
    small = pc.shrink(net, channels={"stem": None, "*": 0.5}, calibration=seen, example_inputs=X)
    assert [(r.name, r.after) for r in pc.Cut.of(small).records] == [("first", 8), ("second", 8)]
    with torch.no_grad():
        y, expected = small(X), net(X)
    assert (y - expected).norm() < 0.05 * expected.norm()
    assert small.second.weight.shape == (8, 8, 3, 3)
    packed = pc.compress(small, pc.Int8())
    assert packed(X).shape == expected.shape


def test_a_model_that_counts_its_channels_itself_is_an_error() -> None:
    def call(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        return pooled(net.b(y.view(y.shape[0], 8, *y.shape[2:])))

    net = Net(call, a=conv(3, 8), b=conv(8, 5)).eval()
    with pytest.raises(RuntimeError, match="smaller model"):
        pc.shrink(net, channels=0.5, example_inputs=X)


def test_sharing_a_parameter_holds_it() -> None:
    net = Net(lambda net, x: pooled(net.c(net.a(x) + net.b(x))), a=conv(3, 8), b=conv(3, 8), c=conv(8, 5)).eval()
    net.b.weight = net.a.weight
    _, left = units_of(net, X)
    assert "shared by several modules" in next(one.reason for one in left if one.name == "a")
