"""Static int8 convolutions that hand on bytes: the same bits as with floats between them, and only where nobody looks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn import Int8Conv2d, handing
from pycompress.nn.assigned import assigned
from pycompress.nn.handing import HandOn
from pycompress.ops.cpu import int8_conv
from pycompress.passes import whole

Same = Callable[[Tensor, Tensor], bool]
LAST = torch.channels_last
PLAN = pc.Int8(activation="static")


class Residual(nn.Module):
    """A bottleneck, whose input is used twice."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.expand, self.act = nn.Conv2d(channels, wide, 1), nn.ReLU6()
        self.depthwise, self.gate = nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.SiLU()
        self.project = nn.Conv2d(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.expand(x))
        return x + self.project(self.gate(self.depthwise(y)))


def network() -> nn.Sequential:
    layers = [
        nn.Conv2d(3, 12, 3, 2, 1),
        nn.ReLU(),
        Residual(12, 24),
        Residual(12, 40),
        nn.Conv2d(12, 8, 3),
        nn.Conv2d(8, 5, 1),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def compressed(dense: nn.Module, x: Tensor) -> Any:
    return pc.compress(dense, PLAN, calibration=pc.calibrate(dense, [x], plan=PLAN))


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From what to what convolutions that hand on, take bytes or add were called; ``both``: floats with their bytes beside them."""
    seen: list[str] = []
    original = int8_conv._hand_on
    monkeypatch.setattr(handing, "_FEW", 0)  # sums of small images, too

    def spy(x: Tensor, *operands: Any, keep: bool = False) -> Any:
        y, beside, finite = original(x, *operands, keep=keep)
        given = "floats" if y.dtype == torch.float32 else "bytes"
        plus = "" if operands[-1] is None else "+skip"
        seen.append(f"{'bytes' if x.dtype == torch.uint8 else 'floats'}{plus}>{given if beside is None else 'both'}")
        return y, beside, finite

    monkeypatch.setattr(int8_conv, "_hand_on", spy)
    return seen


FLOATS = torch.float32
CHAIN = ["floats>bytes", "bytes>bytes", "bytes>floats"]
RESIDUALS = [
    "floats>both", "bytes>bytes", "bytes>bytes", "bytes+skip>both", "bytes>bytes", "bytes>bytes", "bytes+skip>bytes",
]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_but_the_way_changes(threads: int, handed: list[Any], same: Same) -> None:
    dense, before = network(), torch.get_num_threads()
    x = torch.randn(3, 3, 19, 22)
    model = compressed(dense, x)
    torch.set_num_threads(threads)
    try:
        for given in (x, x.to(memory_format=LAST), x[:1], x[1:, :, :7]):
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    handed.clear()
                    y, features = model(given), model[:6](given)
                    assert handed == [*RESIDUALS, "bytes>bytes", "bytes>floats"]  # and none in what was cut off
                    with whole.without(model):
                        assert same(y, model(given))
                        plain = model[:6](given)
                assert same(features, plain) and features.stride() == plain.stride()
    finally:
        torch.set_num_threads(before)


def test_an_image_that_is_not_finite_gives_nan_and_no_other_one(same: Same) -> None:
    x = torch.randn(3, 3, 16, 16)
    model = compressed(network(), x)
    x[1, 0, 5, 5] = torch.inf
    with torch.no_grad():
        y = model(x)
        with whole.without(model):
            expected = model(x)
    assert bool(y[1].isnan().all()) and same(y[[0, 2]], expected[[0, 2]])


def test_whoever_looks_sees_floats(handed: list[Any], same: Same) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = compressed(network(), x)
    with torch.no_grad():
        expected = model(x)
        handed.clear()
        block = model[2]
        assert block.expand(x.new_ones(1, 12, 4, 4)).dtype == FLOATS  # by itself
        seen: list[torch.dtype] = []
        handle = block.depthwise.register_forward_hook(lambda _, args, y: seen.extend((args[0].dtype, y.dtype)))
        assert same(model(x), expected) and seen == [FLOATS, FLOATS] and not handed
        handle.remove()
        assert same(model(x), expected) and handed
        handed.clear()
        with nn.modules.module.register_module_forward_hook(lambda _, __, y: None):
            assert same(model(x), expected) and not handed
        assert same(model(x.bfloat16()), _plain(model, x.bfloat16())) and not handed
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        assert not handed
    graded = x.clone().requires_grad_()
    model(graded).sum().backward()
    assert not handed and graded.grad is not None
    model.train()
    with torch.no_grad():
        model(x)
    assert not handed


def _plain(model: nn.Module, x: Tensor) -> Tensor:
    with whole.without(model):
        y: Tensor = model(x)
    return y


def test_a_model_that_is_changed_is_computed_as_it_is_now(handed: list[Any], same: Same) -> None:
    x = torch.randn(2, 3, 16, 16)
    original = compressed(network(), x)
    changes: dict[str, Callable[[Any], Any]] = {
        "another module between": lambda m: setattr(m[2], "gate", nn.Tanh()),
        "a dense layer": lambda m: setattr(m[2], "depthwise", nn.Conv2d(24, 24, 3, padding=1, groups=24)),
        "a forward of its own": lambda m: setattr(m[2].gate, "forward", torch.tanh),
        "one more": lambda m: m.insert(5, nn.ReLU()),
    }
    for name, change in changes.items():
        for called in (True, False):  # before the change
            model = copy.deepcopy(original)
            with torch.no_grad():
                if called:
                    model(x)
                change(model)
                handed.clear()
                assert same(model(x), _plain(model, x)), name
                assert not handed
    model = copy.deepcopy(original)
    other = compressed(network(), 3 * x)
    with torch.no_grad():
        model(x)
        handed.clear()
        model.load_state_dict(other.state_dict())  # other ranges
        assert same(model(x), _plain(other, x)) and handed


def test_copies_and_files_hand_on_too(handed: list[Any], same: Same, tmp_path: Any) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = compressed(network(), x)
    pc.save(model, tmp_path / "m.safetensors")
    loaded = pc.load(network(), tmp_path / "m.safetensors")
    with torch.no_grad():
        expected = model(x)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            handed.clear()
            assert same(again(x), expected) and handed
        assert same(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
        layers = pc.load(network(), tmp_path / "m.safetensors", blocks=False)
        handed.clear()
        assert assigned(layers) is None and same(layers(x), expected) and not handed
    assert pc.validate(model, x).ok


def test_who_is_left_alone() -> None:
    x = torch.randn(2, 3, 16, 16)
    assert assigned(pc.compress(network(), pc.Int8())) is None  # dynamic: no range is known before

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) * self.c(y) * y

    assert assigned(compressed(Branches().eval(), x)) is None  # the model itself reads it

    class Steps(nn.Module):
        """Its way depends on numbers, so the largest module that can be traced is inside."""

        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if x.sum() > -1e9 else x

    model = compressed(Steps().eval(), x)
    assert assigned(model) is None and isinstance(assigned(model.body), HandOn)
    mirrored = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.Conv2d(3, 3, 3)).eval()
    assert isinstance(assigned(compressed(mirrored, x)), HandOn)
    assert assigned(compressed(mirrored[::-1], x)) is None
    huge = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)).eval()
    nn.init.constant_(huge[0].weight, 1e13)
    assert assigned(compressed(huge, x)) is None
    assert isinstance(compressed(huge, x)[0], Int8Conv2d)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_what_repeats_an_images_own_values_is_put_there_in_floats(mode: str, handed: list[Any], same: Same) -> None:
    """And zeros that a padding module put there lie around bytes as around floats."""
    layers = [
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode), nn.ReLU6(),
        nn.ZeroPad2d((0, 1, 2, 1)), nn.Conv2d(8, 8, 3), nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3, stride=2),
    ]  # fmt: skip
    x, dense = torch.randn(2, 3, 12, 11), nn.Sequential(*layers).eval()
    model = compressed(dense, x)
    with torch.no_grad():
        y = model(x)
        assert handed == CHAIN, "the first one gives floats, and the others bytes"
        with whole.without(model):
            assert same(y, model(x))
        torch.testing.assert_close(y, dense(x), rtol=0.1, atol=0.1)
