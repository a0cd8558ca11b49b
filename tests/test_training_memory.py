"""What training needs in memory besides the dense model's: one image of each weight, and of its input, at most."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pycompress import Int4, Int8, Ramp, Sparse, prepare
from pycompress.nn.trained import is_trained
from pycompress.train import Training

SIZE, ROWS, LAYERS = 256, 16, 5
IMAGE, INPUT = 4 * SIZE**2, 4 * SIZE * ROWS
PLANS: list[Any] = [Int8(), Int8(16), Int4(), Sparse(0.3), Sparse(pattern="4:16", bits=8)]


class Bytes(TorchDispatchMode):
    """Those of the tensors made within that are alive now, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        known = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is None or storage._cdata in known or storage._cdata in self.alive:
                continue
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def network(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(SIZE, SIZE), nn.Tanh())))


@contextmanager
def counted() -> Iterator[Bytes]:
    gc.collect()
    with Bytes() as found:
        yield found


def step(model: nn.Module, training: Training | None, found: Bytes | None = None) -> int:
    """One of the training, behind one that made the gradients; the bytes between forward and backward."""
    loss = model.train()(torch.ones(ROWS, SIZE)).square().mean()
    between = 0 if found is None else found.now
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    if training is not None:
        training.step()
    return between


def measured(layers: int, plan: Any, **options: Any) -> tuple[int, int]:
    """Bytes between forward and backward, and the most at any time of a step."""
    model = network(layers)
    training = None if plan is None else prepare(model, plan, steps=4, **options)
    step(model, training)
    with counted() as found:
        between = step(model, training, found)
    return between, found.peak


@pytest.mark.parametrize(("plan", "learn_scales"), [*((plan, False) for plan in PLANS), (Int4(), True)], ids=str)
def test_a_step_keeps_one_image_of_each_weight_and_input(plan: Any, learn_scales: bool) -> None:
    (dense, dense_peak), (own, peak) = measured(LAYERS, None), measured(LAYERS, plan, learn_scales=learn_scales)
    inputs = INPUT if getattr(plan, "activation_bits", 16) < 16 and getattr(plan, "bits", 8) == 8 else 0
    scales = 3 * IMAGE // 32 if learn_scales else 0  # of groups of 32: their gradients, too
    assert LAYERS / 2 * IMAGE < own - dense <= LAYERS * (IMAGE + inputs + scales)
    gradients = 3 * IMAGE if learn_scales else 0  # on their way, of one layer at a time
    assert peak - dense_peak <= LAYERS * (IMAGE + inputs + scales) + gradients


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_choosing_anew_needs_room_for_one_layer_at_a_time(plan: Any) -> None:
    peaks = []
    for layers in (2, 8):
        model = network(layers)
        training = prepare(model, plan, steps=4, ramp=Ramp(0, 4, every=1))
        step(model, training)
        with counted() as found:
            training._choose()
        peaks.append(found.peak - found.now)
    assert peaks[1] <= peaks[0] + 6 * IMAGE // 16  # what small things the others have kept meanwhile


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_what_an_evaluation_packed_is_gone_when_training_goes_on(plan: Any) -> None:
    model = network(LAYERS)
    training = prepare(model, plan, steps=4)
    step(model, training)
    with counted() as found:
        model.eval()
        with torch.no_grad():
            model(torch.ones(ROWS, SIZE))
        evaluated = found.now
        step(model, training)
    assert evaluated > LAYERS * IMAGE, "a copy to compare with, and the packed weight"
    assert found.now < IMAGE // 8
    assert is_trained(model[0])
