"""Adjusting a network to a platform: what is changed, that the model given is not, and that the cost is what it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn import CompressedLayer
from pycompress.targets import ADJUSTMENTS, TARGETS, Carried, Target, Uint8Images
from pycompress.targets.adjust import PlainNorm
from pycompress.targets.source import Source

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Seen(Target):
    """Keeps what it was given."""

    name, title, suffix, extra, packages = "seen", "Seen", "", "onnx", ("torch",)
    source: Source

    def carried(self, layer: CompressedLayer) -> Carried:
        return Carried("kept", "")

    def write(self, source: Source, path: str) -> None:
        Path(path).touch()
        type(self).source = source

    def run(self, path: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        model = self.source.program(_float_twin).module()
        return [y.detach() for y in model(*inputs.values())]


def _float_twin(_: str, layer: CompressedLayer) -> nn.Module:
    from pycompress.targets.twins import twin_of

    return twin_of(layer)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    place = Seen()
    monkeypatch.setitem(TARGETS, "seen", place)
    return place


@pytest.fixture(scope="module")
def images() -> nn.Module:
    """A compressed network of images: SiLU in a layer and alone, GELU in one."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.SiLU(), nn.Conv2d(16, 8, 3), nn.GELU(), nn.AvgPool2d(2), nn.SiLU(), nn.Flatten()]
    return pc.compress(nn.Sequential(*layers, nn.Linear(128, 12)).eval(), pc.Int8())


def bytes_as_floats() -> Tensor:
    """Images that are bytes, normalised."""
    bytes_ = torch.randint(0, 256, (2, 3, 12, 12)).float()
    return (bytes_ / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_activations_change_in_layers_and_modules_of_a_copy(images: nn.Module, seen: Seen, tmp_path: Path) -> None:
    before = str(images)
    x = torch.randn(2, 3, 12, 12)
    found = pc.deploy(images, "seen", tmp_path / "m", x, adjust=["hardswish", "gelu_tanh"])
    assert str(images) == before
    assert [(one.name, one.places) for one in found.adjusted] == [("hardswish", 2), ("gelu_tanh", 1)]
    other = seen.source.model
    assert [type(one).__name__ for one in other.modules()].count("Hardswish") == 1
    assert [getattr(one, "activation", "") for one in other][:3:2] == ["hardswish", "gelu_tanh"]
    hard, both = found.adjusted
    y, z = images(x), other(x)
    assert both.error == pytest.approx(float((y - z).norm() / y.norm()), rel=1e-3)
    assert 1e-3 < hard.error < 0.5
    assert abs(both.error - hard.error) < 1e-2  # the tanh form is close
    text = str(found)
    assert "adjusted: hardswish (SiLU as hard-swish), 2 places: cosine 0.9" in text
    assert "to the adjusted model" in found.verdict


def test_images_as_bytes_with_channels_last_lose_nothing(images: nn.Module, seen: Seen, tmp_path: Path) -> None:
    x = bytes_as_floats()
    for order in (["nhwc", Uint8Images(MEAN, STD)], [Uint8Images(MEAN, STD), "nhwc"]):
        found = pc.deploy(images, "seen", tmp_path / "m", x, adjust=order)
        assert [one.places for one in found.adjusted] == [1, 1]
        assert found.adjusted[-1].error < 0.02  # roundings of later layers flip
        (given,) = seen.source.call.tensors.values()
        assert given.dtype == torch.uint8 and given.shape == (2, 12, 12, 3)
        assert [*seen.source.call.tensors] == ["input"]
        assert found.ok, found.verdict
    maps = pc.compress(nn.Conv2d(3, 16, 3).eval(), pc.Int8())
    found = pc.deploy(maps, "seen", tmp_path / "m", x, adjust="nhwc")
    assert found.ok, found.verdict
    assert seen.source.outputs[0].shape == (2, 10, 10, 16)
    assert found.adjusted[0].error < 1e-6


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.norm, self.last = nn.Embedding(50, 16), nn.LayerNorm(16), nn.Linear(16, 8)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.rows(ids))) * mask[..., None]
        return y


def test_tokens_and_norms(seen: Seen, tmp_path: Path) -> None:
    model = pc.compress(Words().eval(), pc.Int8(activation_bits=16))
    inputs = {"ids": torch.randint(0, 50, (2, 7)), "mask": torch.ones(2, 7, dtype=torch.int64)}
    found = pc.deploy(model, "seen", tmp_path / "m", inputs, adjust=["int32_tokens", "plain_norms", "gelu_tanh"])
    assert [one.places for one in found.adjusted] == [2, 1, 0]
    assert {one.dtype for one in seen.source.call.tensors.values()} == {torch.int32}
    assert [*seen.source.call.tensors] == ["ids", "mask"]
    assert max(one.error for one in found.adjusted) < 1e-6
    assert not any("layer_norm" in str(node.target) for node in seen.source.program(_float_twin).graph.nodes)
    assert "gelu_tanh: nothing to change" in str(found)
    assert found.ok, found.verdict
    with pytest.raises(ValueError, match="holds 4294967296, expected less than"):
        ADJUSTMENTS["int32_tokens"]().given(torch.tensor([2**32]))


def test_a_plain_norm_is_the_norm() -> None:
    for norm in (
        nn.LayerNorm((3, 16)),
        nn.LayerNorm(16, bias=False),
        nn.LayerNorm(16, elementwise_affine=False, eps=0.1),
    ):
        x = torch.randn(4, 3, 16) * 5 + 3
        torch.testing.assert_close(PlainNorm(norm)(x), norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_attention_of_transformers_is_unfused(seen: Seen, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra demo")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = pc.compress(transformers.BertModel(config, add_pooling_layer=False).eval(), pc.Int8(activation_bits=16))
    inputs = {"input_ids": torch.randint(0, 50, (2, 7))}
    found = pc.deploy(model, "seen", tmp_path / "m", inputs, adjust="eager_attention")
    assert found.adjusted[0].places
    assert found.adjusted[0].error < 1e-5
    assert not any("scaled_dot" in str(node.target) for node in seen.source.program(_float_twin).graph.nodes)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        ("hardswitch", ValueError, "adjust has 'hardswitch', expected of gelu_tanh, hardswish"),
        (["nhwc", "nhwc"], ValueError, "nhwc twice"),
        ([3], TypeError, "adjust holds a int"),
        (Uint8Images((0.5, 0.5)), ValueError, "mean has 2 numbers, expected 1 or 3"),
        (Uint8Images(std=(0.0,)), ValueError, r"std is \(0.0,\), expected positive"),
    ],
)
def test_what_is_no_adjustment(
    images: nn.Module, seen: Seen, tmp_path: Path, asked: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        pc.deploy(images, "seen", tmp_path / "m", torch.randn(2, 3, 12, 12), adjust=asked)
    assert [*tmp_path.iterdir()] == []
