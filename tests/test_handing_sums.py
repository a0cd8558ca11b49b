"""Sums behind static int8 convolutions, which these compute themselves: the same bits as with torch between, in every way to write
them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_handing import LAST, compressed, handed
from torch import Tensor, nn
from torch.nn import functional

import pycompress as pc
from pycompress.nn import handing
from pycompress.passes import whole

Same = Callable[[Tensor, Tensor], bool]
__all__ = ["handed"]


@pytest.fixture(autouse=True)
def _small_sums_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handing, "_FEW", 0)


class Bottleneck(nn.Module):
    """As ResNets have it; ``write`` says how the sum is written."""

    def __init__(self, channels: int, out: int, stride: int, write: str) -> None:
        super().__init__()
        middle = nn.Conv2d(8, 8, 3, stride, 1)
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(8, out, 1))
        self.act = nn.ReLU(inplace=True)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        if self.write == "shortcut first":
            return functional.relu(self.shortcut(x) + self.body(x))
        y = self.body(x)
        if self.write == "function":
            return torch.relu(torch.add(y, self.shortcut(x)))
        if self.write == "method":
            return y.add(self.shortcut(x)).relu_()
        y += self.shortcut(x)
        z: Tensor = self.act(y)
        return z


class Into(nn.Module):
    """Adds to its input, in place; no activation behind."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x += self.project(x)
        return x


def residuals(write: str) -> nn.Sequential:
    blocks = [Bottleneck(12, 20, 1, write), Bottleneck(20, 20, 1, write), Bottleneck(20, 24, 2, write), Into(24)]
    layers = [nn.Conv2d(3, 12, 3), nn.ReLU(), nn.MaxPool2d(2), *blocks, nn.Conv2d(24, 5, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def plain(model: nn.Module, x: Tensor) -> Tensor:
    with whole.without(model):
        y: Tensor = model(x)
    return y


WRITTEN = ["operator", "function", "method", "shortcut first"]


def sums(calls: list[str]) -> int:
    return sum("+skip" in call for call in calls)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("write", WRITTEN)
def test_sums_are_what_torch_adds(write: str, threads: int, handed: list[str], same: Same) -> None:
    x, before = torch.randn(2, 3, 19, 22), torch.get_num_threads()
    model = compressed(residuals(write)[:-2], x)
    torch.set_num_threads(threads)
    try:
        for given in (x, x.to(memory_format=LAST), x[:1, :, :, :13]):
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    expected = plain(model, given)
                    handed.clear()
                    y = model(given)
                    assert same(y, expected) and y.stride() == expected.stride() and type(y) is Tensor
                    assert sums(handed) == 4 and sum(call.startswith("bytes") for call in handed) >= 8, handed
    finally:
        torch.set_num_threads(before)


def test_sums_of_blocks_alone_are_floats_as_they_lie_elsewhere(handed: list[str], same: Same) -> None:
    """Where the way of the whole model cannot be traced, the result of each block is read by others."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                [Bottleneck(12, 20, 1, "operator"), Bottleneck(20, 20, 1, "operator"), Into(20)]
            )

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) if x.sum() > -1e9 else x
            return x

    x = torch.randn(2, 12, 9, 8)
    model = compressed(Steps().eval(), x)
    for form, count in (
        (LAST, 2),
        (torch.contiguous_format, 1),
    ):  # channels first: of what never leaves the block alone
        with torch.no_grad():
            given = x.contiguous(memory_format=form)
            expected = plain(model, given.clone())
            handed.clear()
            y = model(given.clone(memory_format=torch.preserve_format))
            assert same(y, expected) and y.stride() == expected.stride() and sums(handed) == count, handed


def test_few_numbers_are_left_to_torch(handed: list[str], same: Same, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handing, "_FEW", 1 << 16)
    x = torch.randn(1, 3, 12, 12).contiguous(memory_format=LAST)
    model = compressed(residuals("operator"), x)
    with torch.no_grad():
        assert same(model(x), plain(model, x)) and handed and not sums(handed)


def test_the_summary_says_which_layers_add() -> None:
    notes = {
        row.name: row.note for row in pc.summary(compressed(residuals("operator"), torch.randn(1, 3, 12, 12))).layers
    }
    assert (
        notes["4.body.4"] == "adds what is added behind it, then relu"
        and notes["6.project"] == "adds what is added behind it"
    )
    assert not notes["4.body.2"]


def test_what_is_not_finite_is_where_torch_has_it(same: Same) -> None:
    x = torch.randn(3, 3, 16, 16)
    model = compressed(residuals("operator")[:-2], x)
    x[1, 0, 5, 5] = torch.inf
    with torch.no_grad():
        y = model(x)
        assert same(y, plain(model, x)) and bool(y[1].isnan().all()) and not bool(y[[0, 2]].isnan().any())


class Shared(nn.Module):
    """``use`` does something with the result of a convolution before, and after, it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.last(self.use(self.second(x), x))
        return y

    def use(self, y: Tensor, x: Tensor) -> Tensor:
        return functional.relu(y + x)


INTO = "into what others read"
USES: dict[str, Callable[[Shared, Tensor, Tensor], Tensor]] = {
    "another function": lambda _, y, x: torch.sigmoid(y) * x,
    "another one behind the sum": lambda _, y, x: (y + x).tanh(),
    "no function behind the sum": lambda _, y, x: y + x,
    "the sum once more": lambda _, y, x: functional.relu((y + x) + x),
    "a factor": lambda _, y, x: functional.relu(torch.add(y, x, alpha=2)),
    "a number": lambda _, y, x: functional.relu(y + 1),
    "one for each channel": lambda _, y, x: functional.relu(y + x.mean((2, 3), keepdim=True)),
    "other numbers": lambda _, y, x: functional.relu(y + x.double()).float(),
    INTO: lambda _, y, x: functional.relu(x.add_(y)) + x,
    "its attributes": lambda _, y, x: functional.relu((y + x).view(y.shape)) if y.dim() == x.dim() and y.is_cpu else y,
    "its results kept": lambda m, y, x: functional.relu(vars(m).setdefault("kept", y) + x),
}


@pytest.mark.parametrize("form", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("use", USES)
def test_other_code_gets_what_it_would(use: str, form: Any, monkeypatch: pytest.MonkeyPatch, same: Same) -> None:
    """Of a model that was traced as it is, and of one that was changed behind that."""
    given = torch.randn(2, 4, 7, 6)
    x, traced = given.contiguous(memory_format=form), compressed(Shared().eval(), given)
    monkeypatch.setattr(Shared, "use", USES[use])
    models = [compressed(Shared().eval(), given), *([traced] if use != INTO else [])]
    with torch.no_grad():
        for model in models:
            vars(model).pop("kept", None)
            expected = plain(model, x)
            before = vars(model).pop("kept", None)
            assert same(model(x), expected)
            if before is not None:
                assert same(vars(model).pop("kept") * 1, before)


def test_two_take_the_bytes_of_one(handed: list[str], same: Same) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z: Tensor = self.b(y) + self.c(y)
            return z

    x = torch.randn(2, 3, 8, 8)
    model = compressed(Branches().eval(), x)
    with torch.no_grad():
        expected = plain(model, x)
        handed.clear()
        assert same(model(x), expected) and handed == ["floats>bytes", "bytes>floats", "bytes+skip>floats"]


def test_sums_are_undone_where_somebody_looks_and_copied_with_the_model(
    handed: list[str], same: Same, tmp_path: Any
) -> None:  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    model = compressed(residuals("operator"), x)
    pc.save(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        expected = model(x)
        for again in (
            copy.deepcopy(model), pickle.loads(pickle.dumps(model)), pc.load(residuals("operator"), tmp_path / "m.safetensors"),
        ):  # fmt: skip
            handed.clear()
            assert same(again(x), expected) and sums(handed) == 4
        seen: list[type] = []
        handle = model[3].body[4].register_forward_hook(lambda _, __, y: seen.append(type(y)))
        handed.clear()
        assert same(model(x), expected) and seen == [Tensor] and not handed
        handle.remove()
    graded = x.clone().requires_grad_()
    model = compressed(nn.Sequential(Bottleneck(3, 3, 1, "function"), nn.Conv2d(3, 2, 1)).eval(), x)
    handed.clear()
    model(graded).sum().backward()
    assert not handed and graded.grad is not None
    assert pc.validate(model, x).ok
