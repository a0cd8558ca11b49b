"""Channels between two layers get the scale that makes weights alike; the model computes what it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pycompress as pc
from pycompress.passes import equalize as passes_equalize


def uneven(model: nn.Module) -> Any:
    """With channels of very different ranges, and biases."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            weight = module.weight.data
            weight *= (
                torch.exp2(6 * torch.rand(len(weight), generator=generator)).view(-1, *[1] * (weight.dim() - 1)) / 8
            )
    return model.eval()


def notes(model: nn.Module) -> dict[str, str]:
    return {one.name: one.note for one in pc.summary(model).others if "equalized" in one.note}


def ranges(first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """Of the rows of a convolution's weight, and of the columns of the depthwise or plain one behind it."""
    columns = second.weight if second.groups == 1 else second.weight.transpose(0, 1)
    return first.weight.detach().abs().amax((1, 2, 3)), columns.detach().abs().amax((0, 2, 3))


def depthwise() -> Any:
    """As in MobileNet: 1x1, depthwise, 1x1."""
    return uneven(nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 1, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 3),
    ))  # fmt: skip


def check(model: nn.Module, x: Tensor, count: int, *, seen: bool = False, rounding: float = 1e-6) -> Any:
    """Equalizes; the model computes what it did, and the one passed in is as it was."""
    expected, before = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = pc.equalize(model, x if seen else None)
    assert sum(note.startswith("equalized with") for note in notes(result).values()) == count, notes(result)
    torch.testing.assert_close(result(x), expected, rtol=0, atol=rounding * float(expected.abs().max()))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    return result


@pytest.mark.parametrize("seen", [False, True])
@torch.no_grad()
def test_a_depthwise_network(seen: bool) -> None:
    result = check(depthwise(), torch.randn(2, 3, 9, 9), 3, seen=seen)
    for first, second in ((0, 2), (2, 4), (4, 6)):
        rows, columns = ranges(result[first], result[second])
        torch.testing.assert_close(rows, columns, rtol=1e-2, atol=0)
    assert notes(result) == {
        "0": "not equalized: no layer stands before it", "2": "equalized with 0", "4": "equalized with 2", "6": "equalized with 4"
    }  # fmt: skip
    again = pc.equalize(result)
    assert all(torch.allclose(a, b, rtol=1e-2) for a, b in zip(again.parameters(), result.parameters(), strict=True))


@torch.no_grad()
def test_one_scale_for_a_whole_weight_fits_then() -> None:
    """What the paper is about: rounded with one scale, the depthwise network loses most of its channels."""
    model, x = depthwise(), torch.randn(4, 3, 9, 9)
    expected = model(x)

    def lost(net: Any) -> float:
        for layer in net:
            if isinstance(layer, nn.Conv2d):
                step = layer.weight.abs().max() / 31
                layer.weight.copy_((layer.weight / step).round() * step)
        return float((net(x) - expected).norm() / expected.norm())

    equalized = pc.equalize(model)
    assert lost(equalized) < 0.7 * lost(model)


@pytest.mark.parametrize(("between", "count"), [
    (nn.LeakyReLU(0.1), 1), (nn.PReLU(6, 0.3), 1), (nn.MaxPool2d(2), 1), (nn.AvgPool2d(3, padding=1), 1), (nn.Dropout(), 1),
    (nn.ZeroPad2d(1), 1), (nn.Upsample(scale_factor=2), 1), (nn.ReLU6(), 0), (nn.GELU(), 0), (nn.Hardswish(), 0),
    (nn.BatchNorm2d(6), 0), (nn.Flatten(0, 0), 0),
], ids=lambda value: type(value).__name__)  # fmt: skip
@torch.no_grad()
def test_what_may_stand_between(between: nn.Module, count: int) -> None:
    model = uneven(nn.Sequential(nn.Conv2d(3, 6, 3), between, nn.Conv2d(6, 4, 1)))
    result = check(model, torch.randn(2, 3, 8, 8), count)
    if not count:
        assert (
            notes(result)["2"] == f"not equalized: the {type(between).__name__} before it does not scale with its input"
        )


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1, groups=2)
        self.third, self.head = nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.first(x)), 2)
        x = functional.leaky_relu(functional.avg_pool2d(self.second(x).relu_(), 2), 0.1)
        return self.head(torch.relu(self.third(x)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """What is added has the scale of what it is added to: only the pair inside is free."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return x + self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


class Branching(Functions):
    """Read, since it cannot be traced: what stands between two layers has to be a module there."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = self.second(x)
        return x if x.mean() > 0 else self.third(x)  # type: ignore[no-any-return]


@torch.no_grad()
def test_graphs() -> None:
    x = torch.randn(2, 3, 16, 16)
    check(uneven(Functions()), x, 3, seen=True)
    check(uneven(Residual()), x, 1)
    check(uneven(Branching()), x, 1)


@torch.no_grad()
def test_linear_layers() -> None:
    model = uneven(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 3)))
    check(model, torch.randn(2, 5, 6), 2, seen=True)
    rows = nn.Sequential(nn.Linear(6, 8), nn.MaxPool1d(2), nn.Linear(4, 3)).eval()
    assert "does not scale" in notes(check(rows, torch.randn(2, 5, 6), 0))["2"], "a maximum over its channels"
    mixed = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Conv1d(8, 4, 3)).eval()
    assert "are not its own" in notes(check(mixed, torch.randn(8, 6), 0))["2"]


@torch.no_grad()
def test_what_stays() -> None:
    tied, hooked = depthwise(), depthwise()
    tied[4].weight = nn.Parameter(tied[4].weight.detach())
    tied.append(nn.Conv2d(8, 6, 1, bias=False))
    tied[7].weight = tied[4].weight
    hooked[1].register_forward_hook(lambda *_: None)
    assert "shares its weight" in notes(pc.equalize(tied))["4"]
    assert notes(pc.equalize(hooked))["2"].endswith("has hooks or a forward of its own")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtypes(dtype: torch.dtype) -> None:
    result = check(
        depthwise().to(dtype), torch.randn(2, 3, 9, 9).to(dtype), 3, seen=True, rounding=8 * torch.finfo(dtype).eps
    )
    assert {tensor.dtype for tensor in result.parameters()} == {dtype}


@torch.no_grad()
def test_channels_without_weights() -> None:
    """A bias is all that is left of one: it must not grow without bounds, nor become NaN."""
    model = depthwise()
    model[0].weight[0] = 0
    model[2].weight[1] = 0
    model[0].weight[2] *= 1e-12
    result = check(model, torch.randn(2, 3, 9, 9), 3)
    assert torch.equal(result[0].bias[0], model[0].bias[0])
    assert float(result[0].bias[2].abs()) <= 256.1 * float(model[0].bias[2].abs())


@torch.no_grad()
def test_in_place() -> None:
    model = depthwise()
    weight, before = model[0].weight, model[0].weight.clone()
    assert pc.equalize(model, inplace=True) is model
    assert model[0].weight is weight and not torch.equal(weight, before)


@torch.no_grad()
def test_memory_that_is_shared_stays_as_it_is() -> None:
    """Two parameters may be one piece of memory, which nobody can tell from the model."""
    model, x = (
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1)).eval(),
        torch.randn(1, 4, 5, 5),
    )
    model[0].weight.data *= torch.tensor([1.0, 9.0, 0.1, 3.0]).view(-1, 1, 1, 1)
    model[4].weight.data = model[0].weight.data
    expected = model(x)
    torch.testing.assert_close(pc.equalize(model, inplace=True)(x), expected)


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="equalize: model is int, expected"):
        pc.equalize(3)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="training mode"):
        pc.equalize(depthwise().train())
    monkeypatch.setattr(
        passes_equalize, "as_weight", lambda layer, grouped: grouped.reshape(layer.weight.shape).flip(0)
    )
    model = depthwise()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="with scaled channels does not compute what it did"):
        pc.equalize(model, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@torch.no_grad()
def test_folded_equalized_compressed_and_corrected() -> None:
    """The whole way of the paper; the summary tells of each step."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 1),
    ).eval()  # fmt: skip
    batches = [torch.randn(4, 3, 9, 9) + 1 for _ in range(3)]
    expected = torch.cat([model(batch) for batch in batches])
    ready = pc.equalize(pc.fold_norms(model, batches[0]), batches[0])
    torch.testing.assert_close(torch.cat([ready(batch) for batch in batches]), expected, rtol=1e-4, atol=1e-5)
    plan = {"6": pc.Sparse(0.3, choose="magnitude"), "*": None}
    result = pc.compress(ready, plan, calibration=pc.calibrate(ready, batches))
    drift = (torch.cat([result(batch) for batch in batches]) - expected).mean((0, 2, 3)).abs().max()
    assert float(drift) < 1e-5
    told = str(pc.summary(result))
    assert "equalized with 0; folded in: 4" in told and "equalized with 3" in told
