"""Modules that put zeros around images: the convolution behind one pads itself, where nothing else is done with either."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import Snapshot, refused
from torch import Tensor, nn

import pycompress as pc
from pycompress.kinds import zeros_around
from pycompress.methods.method import Method
from pycompress.model import compressed_layers
from pycompress.passes.padding import take_in
from pycompress.passes.trial import tried
from pycompress.plan import targets_of

Same = Callable[[Tensor, Tensor], bool]
METHODS: dict[str, Method] = {
    "int8": pc.Int8(),
    "static": pc.Int8(activation="static", observer=pc.Known(-2.0, 3.0)),
    "sparse": pc.Sparse(0.5),
    **{name: pc.LowRank(3, decomposition=name, rank_guard=False) for name in ("channel", "spatial", "tucker")},
}


def behind_one(pad: nn.Module | None = None, **options: Any) -> nn.Sequential:
    """As TensorFlow pads a stride of two: one more behind than before."""
    conv = nn.Conv2d(6, 8, (3, 3), stride=2, **options)
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)) if pad is None else pad, conv, nn.ReLU6()).eval()


def hooked(model: nn.Sequential) -> nn.Sequential:
    """The same with a padding module that has to stay."""
    stays = copy.deepcopy(model)
    stays[0].register_forward_hook(lambda *_: None)
    return stays


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 9, 12)


def test_what_lies_around() -> None:
    assert zeros_around(nn.ZeroPad2d((1, 2, 3, 4))) == (3, 4, 1, 2), "of torch the last dimension is the first"
    assert zeros_around(nn.ConstantPad2d(2, 0.0)) == (2, 2, 2, 2)
    others = (
        nn.ConstantPad2d(1, 0.5),
        nn.ZeroPad2d((1, -1, 0, 0)),
        nn.ReflectionPad2d(1),
        nn.Identity(),
        nn.ZeroPad3d(1),
    )
    assert all(zeros_around(module) is None for module in others)


@pytest.mark.parametrize(
    "pad", [nn.ZeroPad2d((0, 1, 0, 2)), nn.ConstantPad2d((3, 0, 1, 2), 0)], ids=["zeros", "constant"]
)
@pytest.mark.parametrize("own", [0, (2, 1)], ids=["none of its own", "its own"])
@pytest.mark.parametrize("method", METHODS)
def test_the_layer_pads_and_computes_the_same(method: str, own: Any, pad: nn.Module, x: Tensor, same: Same) -> None:
    model = behind_one(pad, padding=own)
    made, stays = pc.compress(model, METHODS[method]), pc.compress(hooked(model), METHODS[method])
    layer: Any = made[1]
    assert type(made[0]) is nn.Identity and layer.geometry.around == zeros_around(pad)
    assert (type(stays[0]), stays[1].geometry.around) == (type(pad), (0, 0, 0, 0))
    assert (layer.padding, layer.activation) == (model[1].padding, "relu6"), "as the dense convolution has it"
    for given in (x, x[0], x.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(made(given), stays(given), rtol=1e-5, atol=1e-5)
        assert same(made(given), stays(given)) or method in ("channel", "spatial", "tucker")
    report = pc.validate(made, x)
    assert report.ok, str(report)
    note = f"pads its input itself: {'x'.join(map(str, layer.geometry.around))} zeros"
    assert note in str(pc.summary(made)) and "pads" not in str(pc.summary(stays))
    gradients = []
    for one in (made, stays):
        given = x.clone().requires_grad_()
        one(given).square().sum().backward()
        assert given.grad is not None
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    for again in (copy.deepcopy(made), pc.compress(model, METHODS[method], inplace=True)):
        assert same(again(x), made(x)) and again[1].geometry == layer.geometry


class InCode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pad, self.conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.pad(x)
        return self.conv(wide)


class Kept(InCode):
    def forward(self, x: Tensor) -> Tensor:
        wide = self.pad(x)
        return self.conv(wide) + wide[:, :, 2:, 2:]


class Twice(InCode):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x)) + self.pad(x)[:, :, 2:, 2:]


class LookedAt(InCode):
    def forward(self, x: Tensor) -> Tensor:
        wide = self.pad(x)
        return self.conv(wide) * self.pad.padding[1]


class Convolved(InCode):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x)) + self.conv(x).mean()


def test_read_in_the_source(x: Tensor) -> None:
    made = pc.compress(InCode().eval(), pc.Int8())
    assert type(made.pad) is nn.Identity and made.conv.geometry.around == (0, 1, 0, 1)
    for model in (Kept(), Twice(), LookedAt(), Convolved()):
        left = pc.compress(model.eval(), pc.Int8())
        assert type(left.pad) is nn.ZeroPad2d and left.conv.geometry.around == (0, 0, 0, 0), type(model)
        torch.testing.assert_close(left(x), model(x), rtol=0.1, atol=0.1)


def test_what_stays(x: Tensor) -> None:
    shared = nn.ZeroPad2d(1)
    both = nn.Sequential(shared, nn.Conv2d(6, 6, 3), shared, nn.Conv2d(6, 6, 3))
    for model in (
        both, behind_one(nn.ConstantPad2d(1, 0.5)), behind_one(nn.ReflectionPad2d(1)), behind_one(nn.ZeroPad2d((1, -1, 0, 0))),
        nn.Sequential(nn.ZeroPad2d(1), nn.Identity(), nn.Conv2d(6, 6, 3)), hooked(behind_one()),
    ):  # fmt: skip
        model.eval()
        pads = [type(module) for module in model.modules() if "Pad" in type(module).__name__]
        made = pc.compress(model, pc.Int8(), example_inputs=x)
        assert [type(module) for module in made.modules() if "Pad" in type(module).__name__] == pads
        assert all(not any(layer.geometry.around) for layer in compressed_layers(made).values())
    dense = pc.compress(behind_one(), {"*": None})
    assert type(dense[0]) is nn.ZeroPad2d


def test_tried_on_example_inputs(x: Tensor) -> None:
    model = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(6, 6, 3), nn.ZeroPad2d(1), nn.Conv2d(6, 6, 3)).eval()
    targets = targets_of(model, pc.Int8())
    edits = take_in(model, targets)
    assert [edit.emptied for edit in edits] == [model[0], model[2]]
    assert [edit.reason for edit in tried(model, edits, x)] == ["", ""]
    wrong = replace(edits[0], target=targets[1])  # as if the source had been misread
    (found,) = tried(model, [wrong], x)
    assert found.reason == "with it taken in, the model computes something else on example_inputs"
    found.apply()
    assert targets[1].pad is None and targets[1].record.note.startswith(
        "the ZeroPad2d before it stays: with it taken in"
    )


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded(method: str, x: Tensor, tmp_path: Path, same: Same) -> None:
    model, path = behind_one(), tmp_path / "m.safetensors"
    made = pc.compress(model, METHODS[method])
    pc.save(made, path)
    for target in (behind_one(), made, pc.compress(behind_one(), METHODS[method])):
        loaded = pc.load(copy.deepcopy(target), path)
        assert same(loaded(x), made(x)) and loaded[1].geometry == made[1].geometry
        assert type(loaded[0]) is nn.Identity and "pads its input itself: 0x1x0x1" in str(pc.summary(loaded))


def test_padding_of_nothing(x: Tensor, tmp_path: Path, same: Same) -> None:
    """It stands before the 1x1 convolutions of networks that are written so, and costs a copy."""
    model, path = behind_one(nn.ZeroPad2d(0)), tmp_path / "m.safetensors"
    made = pc.compress(model, pc.Int8())
    assert type(made[0]) is nn.Identity and "pads" not in str(pc.summary(made))
    pc.save(made, path)
    assert same(pc.load(model, path)(x), made(x))


def test_files_that_do_not_agree(tmp_path: Path, snapshot: Snapshot) -> None:
    path = tmp_path / "m.safetensors"
    pc.save(pc.compress(behind_one(), pc.Int8()), path)
    refused(path, "the padding 0x1x0x1 in the file, of which the model has none", snapshot, behind_one(nn.Identity()))
    refused(
        path,
        "0 is a ZeroPad2d in the model, in the file padding that a layer applies itself",
        snapshot,
        behind_one(nn.ZeroPad2d(1)),
    )
    refused(
        path,
        "0 is a ReflectionPad2d in the model, in the file an activation",
        snapshot,
        behind_one(nn.ReflectionPad2d(1)),
    )
    refused(path, "0 is a ZeroPad2d in the model with hooks", snapshot, hooked(behind_one()))
    pc.save(pc.compress(hooked(behind_one()), pc.Int8()), path)
    refused(path, "0 is an Identity in the model", snapshot, behind_one(nn.Identity()))
    with pytest.raises(ValueError, match="around"):
        pc.load(pc.compress(behind_one(), pc.Int8()), path)


def test_measured_with_the_padding(x: Tensor) -> None:
    """The dense layer is timed behind its padding module, the compressed one on what that gets."""
    model = behind_one()
    made = pc.compress(model, pc.Int8(), example_inputs=x, only_if_faster=True)
    (record,) = pc.summary(made).layers
    assert record.dense_us is not None and record.us is not None
    assert type(made[0]) is (nn.Identity if record.method else nn.ZeroPad2d)
    torch.testing.assert_close(made(x), model(x), rtol=0.1, atol=0.1)


def test_a_prepared_model_is_frozen_as_it_was(x: Tensor, same: Same) -> None:
    model = behind_one()
    pc.prepare(model, pc.Int8(), steps=1)
    expected = model.eval()(x)
    made = pc.compress(model)
    assert type(made[0]) is nn.Identity and same(made(x), expected)


def test_reconstructed(x: Tensor) -> None:
    model = nn.Sequential(behind_one(), nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3, groups=2)).eval()
    made = pc.reconstruct(model, pc.Int8(), [x, x + 1, x * 2], steps=2, blocks=None, progress=False)
    assert type(made[0][0]) is nn.Identity and type(made[1]) is nn.Identity
    torch.testing.assert_close(made(x), model(x), rtol=0.2, atol=0.2)
    only = pc.reconstruct(model, pc.Int8(), [x, x + 1, x * 2], steps=2, blocks="0", whole=0.0, progress=False)
    torch.testing.assert_close(only(x), model(x), rtol=0.2, atol=0.2)


def test_with_a_calibration_and_a_norm_between(x: Tensor) -> None:
    model = nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
    ).eval()
    model[2].running_mean.normal_()
    seen = pc.calibrate(model, [x, x + 1], plan=pc.Int8(activation="static"))
    made = pc.compress(model, pc.Int8(activation="static"), calibration=seen)
    assert [type(made[i]) for i in (0, 2, 3)] == [nn.Identity] * 3
    assert "folded in: 2; pads its input itself: 0x1x0x1 zeros" in str(pc.summary(made))
    torch.testing.assert_close(made(x), model(x), rtol=0.1, atol=0.1)
