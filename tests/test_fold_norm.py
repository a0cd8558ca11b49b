"""Batch norms go into the layers beside them where these then compute both, and stay wherever that is not sure."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import pycompress as pc
from pycompress.kinds.folded import LAYERS, affine, folded
from pycompress.passes import fold_norm
from pycompress.surgery import compressed_layers


def settled(model: nn.Module) -> Any:
    """In evaluation, its norms with numbers as after a training; half of the gains are negative."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            tensors = [module.running_mean, module.weight, module.bias]
            for tensor in (tensor for tensor in tensors if tensor is not None):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            if module.running_var is not None:
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def reasons(model: nn.Module) -> dict[str, str]:
    """Why norms stay."""
    return {one.name: one.note.removeprefix("not folded: ") for one in pc.summary(model).others if "Norm" in one.kind}


def check(model: nn.Module, x: Tensor, left: int = 0, *, seen: bool = False, atol: float = 1e-5) -> Any:
    """Folds the norms of a model, which afterwards computes what it did; the model passed in is as it was."""
    expected, before = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = pc.fold_norms(model, x if seen else None)
    assert len(norms(result)) == left, reasons(result)
    assert all(reasons(result).values())
    size = float(expected.abs().max().detach())
    torch.testing.assert_close(result(x), expected, rtol=0, atol=atol * size)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    return result


# --- the arithmetic -------------------------------------------------------------------------------------------------------

PAIRS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "without a bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, dilation=2), nn.BatchNorm2d(8), (2, 4, 9, 9)),
    "reflecting": (nn.Conv2d(4, 6, 5, padding=3, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "same": (nn.Conv2d(4, 6, (3, 2), padding="same"), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), (2, 4, 9)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed3d in groups": (nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    "not affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
    "synchronized": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 9, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_a_norm_behind_a_layer(name: str) -> None:
    layer, norm, shape = PAIRS[name]
    model = settled(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm), nn.ReLU()))
    result = check(model, torch.randn(shape), seen=True)
    assert type(result[0]) is type(layer) and type(result[1]) is nn.Identity
    assert isinstance(result[0].bias, nn.Parameter)


@pytest.mark.parametrize("layer", [
    nn.Conv1d(6, 4, 3), nn.Conv2d(6, 4, 3, bias=False), nn.Conv2d(6, 4, 3, padding="valid", groups=2), nn.Conv3d(6, 6, 2, groups=6),
    nn.Conv2d(6, 4, 1, padding="same"), nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), nn.Linear(6, 4),
], ids=str)  # fmt: skip
@torch.no_grad()
def test_a_norm_before_a_layer(layer: Any) -> None:
    dims = layer.weight.dim() - 2
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims](6)
    model = settled(nn.Sequential(nn.ReLU(), norm, nn.Dropout(), copy.deepcopy(layer)))
    check(model, torch.randn(3, 6, *[7] * dims), seen=True)


@torch.no_grad()
def test_norms_on_both_sides() -> None:
    model = settled(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    result = check(model, torch.randn(2, 3, 8, 8))
    assert "folded in: 2, 0" in str(pc.summary(result))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtypes(dtype: torch.dtype) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))).to(dtype)
    eps = torch.finfo(dtype).eps
    result = check(model, torch.randn(2, 3, 8, 8).to(dtype), seen=True, atol=4 * eps)
    assert {tensor.dtype for tensor in result.parameters()} == {dtype}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
def test_it_follows_no_default(default: Any) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    expected, before = pc.fold_norms(model), torch.get_default_dtype()
    try:
        if default == "meta":
            with torch.device("meta"):
                result = pc.fold_norms(model)
        else:
            torch.set_default_dtype(default)
            result = pc.fold_norms(model)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(result[0].weight, expected[0].weight) and torch.equal(result[0].bias, expected[0].bias)


def test_in_float64() -> None:
    """The stored numbers are the exact ones, rounded once."""
    layer, norm = nn.Conv2d(3, 5, 3), settled(nn.BatchNorm2d(5))
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    fresh: Any = folded(layer, norm)
    torch.testing.assert_close(
        fresh.weight.double(), layer.weight.double() * gain.view(-1, 1, 1, 1), rtol=2**-24, atol=0
    )
    assert affine(norm)[0].dtype == torch.float64


# --- on the graph ---------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A block of a ResNet, as torchvision has it: its ReLU is called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)  # type: ignore[no-any-return]


class PreActivated(nn.Module):
    """As in the second kind of ResNets: what the norm takes goes elsewhere, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(x))
        return self.conv2(torch.relu(self.bn2(self.conv1(y)))) + x  # type: ignore[no-any-return]


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 4, 8, 8))


@torch.no_grad()
def test_blocks_with_skip_connections() -> None:
    check(settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Residual(4), Residual(4))), image(2, 3, 9, 9))
    result = check(settled(PreActivated(4)), image(), left=1)
    assert reasons(result) == {"bn1": "no layer stands before it"}


class Calls(nn.Module):
    """A layer and a norm; the classes below call them in their ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)


class Twice(Calls):
    """The two together, again and again: still one layer."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.bn(self.conv(x))
        return x


class NormTwice(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(self.other(x))  # type: ignore[no-any-return]


class LayerTwice(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x)  # type: ignore[no-any-return]


class ResultTwice(Calls):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y  # type: ignore[no-any-return]


class InPlace(Calls):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.mul_(2)
        return self.bn(y)  # type: ignore[no-any-return]


class Keeps(Calls):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.conv(x)
        return self.bn(self.seen)  # type: ignore[no-any-return]


class ReadsTheWeight(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv.weight.mean()  # type: ignore[no-any-return]


class ReadsTheStatistics(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.bn.running_var.mean()  # type: ignore[no-any-return, union-attr, operator]


class AsksTheNorm(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.bn.num_features  # type: ignore[no-any-return]


class AsksForBoth(nn.Module):
    """Each alone would go unnoticed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = (
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return x if any(isinstance(bn, nn.BatchNorm2d) for bn in (self.bn1, self.bn2)) else x + 1


class AsksForTheClass(Calls):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y + 1 if isinstance(self.bn, nn.BatchNorm2d) else y  # type: ignore[no-any-return]


class LeftOut(Calls):
    def forward(self, x: Tensor, raw: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if raw is None else y  # type: ignore[no-any-return]


class LeftOutTheOtherWay(Calls):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if mask is not None else y  # type: ignore[no-any-return]


class OnlyWithGradients(Calls):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) if torch.is_grad_enabled() else x  # type: ignore[no-any-return]


class Functional(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.relu(self.conv(x)))  # type: ignore[no-any-return]


class Pooled(Calls):
    """A maximum of what a negative gain turns round is another one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.other(nn.functional.max_pool2d(self.bn(torch.relu(self.conv(x))), 2))  # type: ignore[no-any-return]


class AsksForATensor(Calls):
    """A tracer's stand-in is none, but has to be taken for one."""

    def forward(self, x: Any) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + torch.ones(1) if isinstance(y, Tensor) else y  # type: ignore[no-any-return]


class AsksForAList(Calls):
    def forward(self, x: Any) -> Tensor:
        y = self.conv(x)
        return y if isinstance(x, Tensor) else self.bn(y)  # type: ignore[no-any-return]


class Unpacks(Calls):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        first, second = self.bn(self.conv(x)).chunk(2, dim=1)
        return torch.cat([second, first], dim=1).view(n, c, h * w)


class Catches(Calls):
    """What fails when it is traced does not fail in a run."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        try:
            return y if y.mean() < 1e9 else y + 1  # type: ignore[no-any-return]
        except Exception:
            return self.bn(y)  # type: ignore[no-any-return]


LEFT: dict[type[nn.Module], int] = {
    AsksForATensor: 0, AsksForAList: 1, Unpacks: 0, Catches: 1, Twice: 0, NormTwice: 1, LayerTwice: 1, ResultTwice: 1, InPlace: 1,
    Keeps: 1, ReadsTheWeight: 1, ReadsTheStatistics: 1, AsksTheNorm: 1, AsksForTheClass: 1, AsksForBoth: 2, LeftOut: 1,
    LeftOutTheOtherWay: 1, OnlyWithGradients: 1, Functional: 1, Pooled: 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT, ids=lambda kind: kind.__name__)
def test_how_they_are_called(kind: type[nn.Module]) -> None:
    check(settled(kind()), image(), left=LEFT[kind])
    with torch.no_grad():
        model = settled(kind())
        expected = model(image(1, 4, 3, 3).fill_(0.5))
        compressed = pc.compress(model, pc.Sparse(0.95))
        assert len(norms(compressed)) == LEFT[kind]
        assert compressed(image(1, 4, 3, 3).fill_(0.5)).shape == expected.shape


# --- read, where it cannot be traced --------------------------------------------------------------------------------------


class Branching(Calls):
    """A way that depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout2d(), nn.BatchNorm2d(4), nn.ReLU())
        self.block = Residual(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = self.bn(self.conv(x))
        return x if x.mean() > 0 else self.other(x)  # type: ignore[no-any-return]


class BranchesBetween(Calls):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.mean() > 0:
            x = self.bn(x)
        return x


class BranchesAndAsks(Calls):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y * self.bn.eps if y.mean() > 100 else y  # type: ignore[no-any-return]


class Flagged(Calls):
    def forward(self, x: Tensor, normalized: bool = True) -> Tensor:
        x = self.conv(x)
        if normalized:
            x = self.bn(x)
        return x


@torch.no_grad()
def test_control_flow() -> None:
    check(settled(Branching()), image())
    for kind in (BranchesBetween, BranchesAndAsks, Flagged):
        check(settled(kind()), image(), left=1)


# --- what stays -----------------------------------------------------------------------------------------------------------


def pair() -> Any:
    return settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))


def hooked(index: int) -> Any:
    model = pair()
    model[index].register_forward_hook(lambda *_: None)
    return model


def hooked_between() -> Any:
    model = pair()
    inner = nn.Sequential(nn.Sequential(model[0]), model[1])
    inner[0].register_forward_hook(lambda *_: None)
    return inner.eval()


def replaced() -> Any:
    model = pair()
    model[1].forward = lambda x: x + 1
    return model


def tied() -> Any:
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, padding=1)))
    model[2].weight = model[0].weight
    return model


def pruned() -> Any:
    model = pair()
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def normalized_weight() -> Any:
    model = pair()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def closure() -> Any:
    model = pair()
    norm = model[1]
    model.run = lambda x: norm(x) + 0
    return model


def without_statistics() -> Any:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()


def not_finite() -> Any:
    model = pair()
    model[1].running_var[0] = -1.0
    return model


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def own_class() -> Any:
    return settled(nn.Sequential(nn.Conv2d(4, 4, 3), OwnNorm(4)))


def random_between() -> Any:
    """Dropout that stays on in evaluation, for the sake of its randomness."""
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout(), nn.BatchNorm2d(4)))
    model[1].train()
    return model


def padded() -> Any:
    return settled(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)))


def before_transposed() -> Any:
    return settled(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3)))


STAYS: list[tuple[Callable[[], Any], str]] = [
    (lambda: hooked(0), "hooks"), (lambda: hooked(1), "hooks"), (hooked_between, "0 has hooks"), (replaced, "forward is its own"),
    (tied, "shares its weight"), (pruned, "pruned"), (normalized_weight, "ParametrizedConv2d"), (closure, "the closure of run"),
    (without_statistics, "no running statistics"), (not_finite, "NaN or Inf"), (own_class, "subclass"), (padded, "zeros"),
    (before_transposed, "edges"), (random_between, "the Dropout before it"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "reason"), STAYS)
def test_what_stays_says_why(make: Callable[[], Any], reason: str) -> None:
    model = make()
    result = pc.fold_norms(model)
    (told,) = reasons(result).values()
    assert reason in told
    assert f"not folded: {told}" in str(pc.summary(result))
    if reason not in ("NaN or Inf", "the Dropout before it"):
        torch.testing.assert_close(result(x := image()), model(x))


@torch.no_grad()
def test_a_linear_layer_needs_example_inputs() -> None:
    """Of three dimensions a norm takes the second, the layer the last."""
    model = settled(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    flat, deep = torch.randn(5, 6), torch.randn(5, 6, 6)
    assert "example_inputs would tell" in reasons(check(model, flat, left=1))["1"]
    check(model, flat, seen=True)
    assert "computes something else" in reasons(check(model, deep, left=1, seen=True))["1"]


@torch.no_grad()
def test_what_changes_the_model_is_undone_alone() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
            self.deep = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.flat(x.mean(1)) + self.deep(x).mean(1)  # type: ignore[no-any-return]

    assert norms(check(settled(Both()), torch.randn(5, 6, 6), left=1, seen=True)) == ["deep.1"]


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="fold_norms: model is int, expected"):
        pc.fold_norms(3)  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"the model is in training mode, expected model\.eval"):
        pc.fold_norms(pair().train())
    model = pair()
    model[1].train()
    with pytest.raises(ValueError, match="fold_norms: 1 is in training mode"):
        pc.fold_norms(model)
    model = pair()
    monkeypatch.setattr(
        fold_norm, "folded", lambda layer, norm, behind: folded(layer, nn.BatchNorm2d(4), behind=behind)
    )
    with pytest.raises(RuntimeError, match="0 with 1 folded in does not compute what the two compute"):
        pc.fold_norms(model, inplace=True)
    assert norms(model) == ["1"]


def test_in_place() -> None:
    model, x = pair(), image()
    model.held = [model[1]]
    expected = model[1](model[0](x))
    assert pc.fold_norms(model, inplace=True) is model
    assert type(model[1]) is nn.Identity is type(model.held[0])
    torch.testing.assert_close(model[0](x), expected)


def test_a_model_without_norms() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    assert torch.equal(pc.fold_norms(model)[0].weight, model[0].weight)


# --- compressed -----------------------------------------------------------------------------------------------------------


def network() -> Any:
    return settled(nn.Sequential(
        nn.Conv2d(4, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Residual(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4),
    ))  # fmt: skip


EXACT = pc.Sparse(0.999, choose="magnitude")


@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_compress_folds_first(inplace: bool) -> None:
    model, x = network(), image()
    expected = model(x)
    result = pc.compress(model, EXACT, example_inputs=x, inplace=inplace)
    assert not norms(result) and len(norms(model)) == (0 if inplace else 4)
    torch.testing.assert_close(result(x), expected, rtol=0, atol=0.01 * float(expected.abs().max()))
    assert result[0].activation == "relu" and result[6].activation == "relu", "an activation follows the norm"
    records = {record.name: record for record in pc.summary(result).layers}
    assert records["0"].note.startswith("folded in: 1")
    assert records["0"].error < 0.01, "of the folded weight"
    assert pc.summary(result).dense_bytes == sum(t.numel() * t.element_size() for t in network().state_dict().values())
    assert pc.validate(result, x).ok


@torch.no_grad()
def test_compress_does_not_where_it_should_not() -> None:
    model, x = network(), image()
    plain = pc.compress(model, EXACT, example_inputs=x, fold_norms=False)
    assert len(norms(plain)) == 4
    part = pc.compress(model, {"0": EXACT, "*": None}, example_inputs=x)
    assert norms(part) == ["3.bn1", "3.bn2", "7"]
    assert set(reasons(part).values()) == {"the Conv2d before it stays dense", "the Linear before it stays dense"}
    frozen = model.train()
    for module in frozen.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    assert len(norms(pc.compress(frozen, EXACT))) == 4
    training = pc.compress(model.train(), EXACT)
    assert len(norms(training)) == 4 and all("training mode" in reason for reason in reasons(training).values())


@torch.no_grad()
def test_layers_that_go_back_keep_their_norms() -> None:
    """LowRank refuses what it would not make faster."""
    model, x = settled(nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))), image()
    result = pc.compress(model, pc.LowRank(4))
    assert not compressed_layers(result) and norms(result) == ["1"]
    assert reasons(result) == {"1": "the layer beside it stays dense"}
    assert torch.equal(result(x), model(x))


@torch.no_grad()
def test_only_if_faster_folds_or_leaves_both() -> None:
    model, x = network(), image()
    result = pc.compress(model, EXACT, example_inputs=x, only_if_faster=True)
    for layer, norm in (("0", "1"), ("3.conv1", "3.bn1"), ("3.conv2", "3.bn2"), ("6", "7")):
        assert (layer in compressed_layers(result)) == (norm not in norms(result))
    torch.testing.assert_close(result(x), model(x), rtol=0, atol=0.05)


@torch.no_grad()
def test_a_pruned_layer() -> None:
    model, x = pruned(), image()
    expected = model(x)
    result = pc.compress(model, EXACT)
    assert not norms(result)
    torch.testing.assert_close(result(x), expected, rtol=0, atol=0.01)


@torch.no_grad()
def test_a_failure_leaves_the_model_whole() -> None:
    model = network()
    model[9].weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the weight of 9 holds NaN"):
        pc.compress(model, EXACT, example_inputs=image(), inplace=True)
    after = model.state_dict()
    assert [*after] == [*before] and all(torch.equal(after[n].nan_to_num(), before[n].nan_to_num()) for n in before)


@torch.no_grad()
def test_biases_are_corrected_for_the_folded_weight() -> None:
    """The mean of what the layer and its norm gave stays, though most of the weight is gone."""
    model = settled(nn.Sequential(nn.Conv2d(4, 16, 3, bias=False), nn.BatchNorm2d(16)))
    batches = [image(4, 4, 12, 12) + 1 for _ in range(3)]
    seen, x = pc.calibrate(model, batches), torch.cat(batches)
    drift = {}
    for correct in (True, False):
        method = pc.Sparse(0.2, choose="magnitude")
        result = pc.compress(model, method, calibration=seen, correct_bias=correct)
        assert not norms(result)
        drift[correct] = float((result(x) - model(x)).mean((0, 2, 3)).abs().max())
    assert drift[True] < 1e-5 < 1e-2 < drift[False]


def test_prepared_and_reconstructed_models_keep_their_norms() -> None:
    model, x = network(), image()
    pc.prepare(model, EXACT, steps=0)
    frozen = pc.compress(model.eval())
    assert len(norms(frozen)) == 4
    batches = [image() for _ in range(3)]
    folded_first = pc.fold_norms(network(), x)
    result = pc.reconstruct(folded_first, pc.Sparse(0.5), batches, steps=2, progress=False)
    assert not norms(result) and "folded in: 1" in str(pc.summary(result))
    assert len(norms(pc.reconstruct(network(), pc.Sparse(0.5), batches, steps=2, progress=False))) == 4


# --- saved ----------------------------------------------------------------------------------------------------------------


def saved(model: nn.Module, folder: Path) -> Path:
    pc.save(model, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@torch.no_grad()
def test_a_folded_model_is_loaded_into_a_dense_one(device: str, tmp_path: Path) -> None:
    x = image()
    result = pc.compress(network(), EXACT, example_inputs=x)
    with torch.device(device):
        fresh = network() if device == "cpu" else nn.Sequential(*network().to("meta")).eval()
    loaded = pc.load(fresh, saved(result, tmp_path))
    assert torch.equal(loaded(x), result(x)) and not norms(loaded)
    assert "folded in: 1" in str(pc.summary(loaded))
    again = pc.load(network(), saved(loaded, tmp_path))  # and back
    assert torch.equal(again(x), result(x))
    assert torch.equal(pc.load(loaded, saved(result, tmp_path))(x), result(x)), "a compressed one"
    unfolded = pc.compress(network(), EXACT, fold_norms=False)
    assert torch.equal(pc.load(unfolded, saved(result, tmp_path))(x), result(x)), "one with its norms"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@torch.no_grad()
def test_dense_layers_that_are_folded_are_loaded_too(device: str, tmp_path: Path) -> None:
    x = image()
    result = pc.compress(pc.fold_norms(network(), x), {"9": EXACT, "*": None})
    loaded = pc.load(network().to(device).eval(), saved(nn.Sequential(*result), tmp_path))
    assert torch.equal(loaded(x), result(x)) and isinstance(loaded[0].bias, nn.Parameter)
    assert torch.equal(pc.load(network(), saved(loaded, tmp_path))(x), result(x))


@torch.no_grad()
def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    x = image()
    path = saved(pc.compress(pc.fold_norms(network(), x), {"9": EXACT, "*": None}), tmp_path)
    other, wider, watched = network(), network(), network()
    other[1] = nn.GroupNorm(4, 16)
    wider[1] = nn.BatchNorm2d(32).eval()
    watched[1].register_forward_hook(lambda *_: None)
    for model, what in ((other, "GroupNorm"), (wider, "norm of 16 channels"), (watched, "hooks")):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=f"1 is a .*{what}"):
            pc.load(model, path)
        assert before.keys() == model.state_dict().keys() and model[0].bias is None
    plain = saved(pc.compress(network(), EXACT, fold_norms=False), tmp_path)
    with pytest.raises(ValueError, match=r"0 is .* in the model, .*bias=False.* in the file"):
        pc.load(pc.fold_norms(network(), x), plain)


def test_what_is_folded_can_be_copied_and_pickled() -> None:
    model = pc.fold_norms(pair())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert str(pc.summary(other)) == str(pc.summary(model))
    assert type(model[0]) in LAYERS and all(parameter.requires_grad for parameter in model.parameters())
