"""The copy that compress() makes: all of the model but what is replaced, and nothing shared with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import pycompress as pc
from pycompress.copying import copied
from pycompress.model import compressed_layers
from pycompress.nn import Int8Linear

Snapshot = Callable[[nn.Module], Callable[[], bool]]


def test_what_is_left_out_is_a_shell_with_its_attributes() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].tag = ["a"]
    model.steps = [model[0], (model[1], model[0].forward)]
    result: Any = copied(model, [model[0]])
    shell = result[0]
    assert type(shell) is nn.Linear
    assert not list(shell.parameters())
    assert (shell.tag, shell.in_features) == (["a"], 4)
    assert shell.tag is not model[0].tag
    assert result.steps[0] is shell
    assert result.steps[1][1].__self__ is shell
    assert torch.equal(result[1].weight, model[1].weight)
    assert result[1].weight is not model[1].weight


class Keeping(nn.Module):
    """Keeps what it computed: tensors with a history, which deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        self.last = {"y": [y, (y.sum(),)], "x": x}
        return y


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_that_were_kept(inplace: bool) -> None:
    model = nn.Sequential(Keeping(), nn.Linear(8, 8))
    model(torch.randn(3, 8))
    kept = model[0].last["y"][0]
    result: Any = pc.compress(model, pc.Int8(), inplace=inplace)
    assert isinstance(result[0].fc, Int8Linear)
    assert torch.equal(result[0].last["y"][0], kept)
    assert (result[0].last["y"][0] is kept) is inplace
    assert model[0].last["y"][0].grad_fn is not None, "the original keeps its history"


def test_pruned_between_two_calls() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    x = torch.randn(3, 8)
    model(x)
    result = pc.compress(model, {"1": pc.Int8(), "*": None})
    torch.testing.assert_close(result[0](x), model[0](x))  # type: ignore[operator]


class Closing(nn.Module):
    """Functions that lead to its layers over itself, in the places in which people keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.count = nn.Linear(8, 8), nn.Linear(8, 8), 0

        def noted(x: Tensor) -> Tensor:
            self.count += 1
            return x

        self.steps = [lambda x: self.up(x) + 0, functools.partial(lambda this, x: this.down(x), self)]
        self.table = {"noted": noted}
        self.twice: Any = lambda x, own=self: self.steps[0](self.table["noted"](own.down(x)))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return self.twice(x)  # type: ignore[no-any-return]


def test_functions_that_lead_to_the_model_lead_to_its_copy() -> None:
    model, x = nn.Sequential(Closing()), torch.randn(3, 8)
    expected = model(x)
    result: Any = pc.compress(model, pc.Int8(activation_bits=16))
    assert set(compressed_layers(result)) == {"0.up", "0.down"}
    torch.testing.assert_close(result(x), expected, rtol=0.05, atol=0.05)
    assert (model[0].count, result[0].count) == (1, 2), "counted where it was called"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(result(x), expected, rtol=0.05, atol=0.05)


def test_other_functions_are_taken_over_as_they_are() -> None:
    counter: list[int] = []

    def outside(x: Tensor) -> Tensor:
        counter.append(1)
        return x

    model: Any = nn.Sequential(nn.Linear(8, 8))
    model.outside = outside
    result: Any = pc.compress(model, pc.Int8())
    assert result.outside is outside


class Rebuilt(nn.Module):
    """Copies itself its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Rebuilt:
        fresh = Rebuilt()
        fresh.load_state_dict(self.state_dict())
        return fresh


def test_modules_that_copy_themselves() -> None:
    model, x = nn.Sequential(Rebuilt(), nn.Linear(8, 8)), torch.randn(3, 8)
    result = pc.compress(model, pc.Int8(activation_bits=16))
    assert set(compressed_layers(result)) == {"0.fc", "1"}
    torch.testing.assert_close(result(x), model(x), rtol=0.05, atol=0.05)


def test_many_layers_with_one_weight_are_compressed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    genuine = pc.Int8.compress
    monkeypatch.setattr(pc.Int8, "compress", lambda self, weight: calls.append(1) or genuine(self, weight))
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(300)))
    for layer in model:
        layer.weight = model[0].weight  # type: ignore[assignment, union-attr]
    result: Any = pc.compress(model, pc.Int8())
    assert len(calls) == 1
    assert len({id(layer.packed) for layer in result}) == 1
    assert not any(torch.equal(result[0].bias, layer.bias) for layer in result[1:])
