"""Layers that are not, or not only, what their class says stay as they are, with a reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import pycompress as pc
from pycompress.model import compressed_layers
from pycompress.nn import Int8Linear


def net() -> Any:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval()


def reasons(model: nn.Module) -> dict[str, str]:
    return {record.name: record.reason for record in pc.summary(model).layers}


def check(model: Any, reason: str, *, inplace: bool) -> None:
    """Layer "0" stays dense, "2" does not, and the model computes what it did."""
    x = torch.randn(4, 8)
    expected = model(x)
    result = pc.compress(model, pc.Int8(activation_bits=16), inplace=inplace)
    assert list(compressed_layers(result)) == ["2"]
    assert reason in reasons(result)["0"]
    torch.testing.assert_close(result(x), expected, rtol=0.05, atol=0.05)


# --- forwards ---------------------------------------------------------------------------------------------------------


def a_function(layer: nn.Linear) -> None:
    layer.forward = lambda x: nn.Linear.forward(layer, x) * 2  # type: ignore[method-assign]


def a_method(layer: nn.Linear) -> None:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 2)

    layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


def as_accelerate_does(layer: nn.Linear) -> None:
    old = layer.forward
    layer._old_forward = old  # type: ignore[assignment]

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        return module._old_forward(x) + 1  # type: ignore[operator]

    layer.forward = functools.update_wrapper(functools.partial(forward, layer), old)  # type: ignore[method-assign]


def a_class(layer: nn.Linear) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    layer.__class__ = Doubled


def its_state_dict(layer: nn.Linear) -> None:
    layer.state_dict = lambda *_, **__: {}  # type: ignore[method-assign]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (a_function, "its forward is its own, not that of its class"),
        (a_method, "its forward is its own, not that of its class"),
        (as_accelerate_does, "its forward is its own, not that of its class"),
        (a_class, "Doubled is a subclass of Linear, which may do something else"),
        (its_state_dict, "its state_dict is its own, not that of its class"),
    ],
)
def test_code_of_its_own(change: Callable[[nn.Linear], None], reason: str, inplace: bool) -> None:
    model = net()
    change(model[0])
    check(model, reason, inplace=inplace)


@pytest.mark.parametrize("name", ["forward", "__call__", "_call_impl"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_class_that_was_patched(name: str, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = getattr(nn.Linear, name)

    @functools.wraps(genuine)
    def doubled(self: nn.Linear, x: Tensor) -> Tensor:
        return genuine(self, x) * 2  # type: ignore[no-any-return]

    model, x = net(), torch.randn(4, 8)
    monkeypatch.setattr(nn.Linear, name, doubled)
    expected = model(x)
    result = pc.compress(model, pc.Int8(), inplace=inplace)
    assert not compressed_layers(result)
    assert all("of Linear" in reason or "Linear is called" in reason for reason in reasons(result).values())
    assert torch.equal(result(x), expected)


def test_its_class_own_forward_left_on_it_is_no_other() -> None:
    """As accelerate leaves it when it takes its hooks away."""
    model = net()
    model[0].forward = model[0].forward
    assert list(compressed_layers(pc.compress(model, pc.Int8()))) == ["0", "2"]


# --- hooks of any sort ------------------------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "forward always": lambda m: m.register_forward_hook(lambda *_: None, always_call=True),
    "forward with keywords": lambda m: m.register_forward_hook(lambda *_: None, with_kwargs=True),
    "before forward": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "before backward": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "state dict": lambda m: m.register_state_dict_post_hook(lambda *_: None),
    "before state dict": lambda m: m.register_state_dict_pre_hook(lambda *_: None),
    "loading": lambda m: m.register_load_state_dict_post_hook(lambda *_: None),
    "before loading": lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("sort", HOOKS)
def test_hooks(sort: str) -> None:
    model = net()
    HOOKS[sort](model[0])
    check(model, "it has hooks, which would be lost", inplace=False)


# --- weights ----------------------------------------------------------------------------------------------------------


class Marked(Tensor):
    """A tensor of another class, as DTensors and quantized weights are."""


def subclass(weight: Tensor) -> Tensor:
    return weight.as_subclass(Marked)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (subclass, "is a Marked, expected a plain tensor"),
        (lambda t: t.to_sparse(), "is laid out as torch.sparse_coo, expected torch.strided"),
        (Tensor.double, "is torch.float64, expected float32, bfloat16 or float16"),
        (lambda t: t.to(torch.complex64), "is torch.complex64, expected"),
        (lambda t: t.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, expected"),
    ],
)
def test_tensors_that_no_kernel_reads(change: Callable[[Tensor], Tensor], reason: str, name: str) -> None:
    model = net()
    setattr(model[0], name, nn.Parameter(change(getattr(model[0], name).detach()), requires_grad=False))
    plan: dict[str, Any] = {"0": pc.Int8(), "*": pc.Int8()}
    result = pc.compress(model, plan, inplace=True)
    assert list(compressed_layers(result)) == ["2"]
    assert reasons(result)["0"].startswith(f"its {name} {reason}")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantized_weight() -> None:
    model = net()
    weight = torch.quantize_per_tensor(model[0].weight.detach(), 0.1, 0, torch.qint8)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    assert reasons(pc.compress(model, pc.Int8(), inplace=True))["0"].startswith("its weight is torch.qint8, expected")


DISTRIBUTED = """
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import distribute_module, init_device_mesh
import pycompress as pc

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = distribute_module(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), init_device_mesh("cpu", (1,)))
print({record.reason for record in pc.summary(pc.compress(model, pc.Int8(), inplace=True)).layers})
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_distributed_tensors(python: Callable[..., Any]) -> None:
    done = python(DISTRIBUTED)
    assert done.stdout.strip() == "{'its weight is a DTensor, expected a plain tensor'}", done.stderr


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("inplace", [False, True])
def test_weights_that_are_computed(norm: Callable[[nn.Module], nn.Module], inplace: bool) -> None:
    """After a call they have a history, which deepcopy refuses."""
    model = net()
    model[0] = norm(model[0]).eval()
    model(torch.randn(4, 8))
    check(model, "", inplace=inplace)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_weight_that_somebody_sets(inplace: bool) -> None:
    model = net()
    weight = model[0].weight
    del model[0].weight
    model[0].weight = weight * 2
    check(model, "its weight is neither a parameter nor a buffer", inplace=inplace)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("what", ["parameter", "buffer", "module"])
def test_what_a_plain_layer_does_not_have(what: str, inplace: bool) -> None:
    model = net()
    if what == "parameter":
        model[0].extra = nn.Parameter(torch.ones(1))
    elif what == "buffer":
        model[0].register_buffer("extra", torch.ones(1))
    else:
        model[0].extra = nn.Identity()
    check(model, "it has a extra besides, which would be lost", inplace=inplace)


# --- marks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_what_somebody_wrote_on_a_layer_goes_over_to_the_compressed_one(inplace: bool) -> None:
    model = net()
    model[0].tag, model[0].notes = "first", ["a"]
    notes = model[0].notes
    result: Any = pc.compress(model, pc.Int8(), inplace=inplace)
    assert isinstance(result[0], Int8Linear)
    assert (result[0].tag, result[0].notes, result[0].in_features) == ("first", ["a"], 8)
    assert (result[0].notes is notes) is inplace, "a copy shares nothing"


# --- held elsewhere ---------------------------------------------------------------------------------------------------


class Closing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        layer = self.first
        self.run = lambda x: layer(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.run(x) + self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_in_a_closure_stays_dense(inplace: bool) -> None:
    model, x = nn.Sequential(Closing()), torch.randn(4, 8)
    expected = model(x)
    result = pc.compress(model, pc.Int8(activation_bits=16), inplace=inplace)
    assert list(compressed_layers(result)) == ["0.second"]
    assert reasons(result)["0.first"] == "the closure of 0.run holds it, where it cannot be replaced"
    torch.testing.assert_close(result(x), expected, rtol=0.05, atol=0.05)


def test_one_refusal_does_not_hide_another() -> None:
    """A pruned layer with a hook of its own, in a closure: the first reason that is found is told."""
    model = nn.Sequential(Closing())
    prune.l1_unstructured(model[0].first, "weight", amount=0.5)
    model[0].first.register_forward_hook(lambda *_: None)
    assert reasons(pc.compress(model, pc.Int8()))["0.first"] == "it has hooks, which would be lost"
