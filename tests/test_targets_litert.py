"""LiteRT: what its files hold, and what they give in its own interpreter. `make targets` installs it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployed import errors, inputs, parts
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn import Int8Linear
from pycompress.surgery import compressed_layers
from pycompress.targets import TARGETS, Deployment, litert
from pycompress.weights import Int8Weight

installed = pytest.mark.skipif(
    importlib.util.find_spec("litert_torch") is None, reason="litert-torch is not installed: make targets"
)
PLACE = TARGETS["litert"]
KEPT = {
    "int8": "int8", "seven": "int8", "weights": "int8", "static": "int8", "int4": "int4", "int4_wide": "int4",
    "low_rank": "float32", "low_rank_int8": "int8", "beside": "float32 + int8", "conv": "int8", "fixed": "int8", "groups": "int8",
    "depthwise": "int8", "uneven": "int8", "spatial": "float32", "sequence": "int8", "rows": "int8", "narrow": "float32",
}  # fmt: skip
WIDENED = {
    "zero_points": "int4",
    "int4_weights": "float32",
    "sparse": "float32",
    "sparse_int8": "int8",
    "sparse_conv": "float32",
}
REASONS = {
    "seven": "8 bits, not 7", "static": "not the fixed one", "fixed": "each image", "zero_points": "sums of groups",
    "sparse": "no sparse weights", "int4_weights": "activation_bits=8",
}  # fmt: skip
# The input is rounded in other steps there; all else gives our kernels' numbers.
ROUGH = {"seven": 0.03, "static": 0.03, "zero_points": 0.02, "fixed": 0.05}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return parts()


@pytest.fixture(scope="module")
def deployed(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    path = tmp_path_factory.mktemp("litert") / "m.tflite"
    return pc.deploy(model, "litert", path, inputs(), widen=True)


def named() -> dict[str, Tensor]:
    return dict(zip(("x", "image", "tokens"), inputs(), strict=True))


def test_what_becomes_of_each_layer_is_known_without_the_package(model: nn.Module) -> None:
    found = {name: PLACE.carried(layer) for name, layer in compressed_layers(model).items()}
    assert {name for name, one in found.items() if one.fate == "kept"} == set(KEPT)
    assert {name for name, one in found.items() if one.fate == "widened"} == set(WIDENED)
    for name, start in (KEPT | WIDENED).items():
        assert found[name].encoding.startswith(start), name
    for name, words in REASONS.items():
        assert words in found[name].reason, name


def test_recurrent_layers_are_refused() -> None:
    assert PLACE.carried(pc.compress(nn.GRU(8, 8).eval(), pc.Int8())).fate == "refused"
    ragged = pc.compress(nn.Linear(72, 8).eval(), pc.Int4(group=32, symmetric=True))
    assert "k is 72" in PLACE.carried(ragged).reason


@installed
def test_every_part_gives_what_ours_gives(model: nn.Module, deployed: Deployment) -> None:
    assert deployed.ok, deployed.verdict
    off = errors(PLACE.run(deployed.path, named()), model(*inputs()))
    assert {name: error for name, error in off.items() if error > ROUGH.get(name, 1e-5)} == {}


@installed
def test_integers_and_scales_in_the_file_are_ours(model: nn.Module, deployed: Deployment) -> None:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=deployed.path, num_threads=1)
    found: dict[bytes, Any] = {}
    for one in interpreter.get_tensor_details():
        if one["dtype"] == np.int8 and len(one["quantization_parameters"]["scales"]):
            try:
                values = interpreter.get_tensor(one["index"])
            except ValueError:  # made while it runs
                continue
            found[values.tobytes()] = one["quantization_parameters"]["scales"]
    layers = compressed_layers(model)
    for name in ("int8", "seven", "weights", "static"):
        weight = layers[name].canonical()
        np.testing.assert_allclose(found[weight.values.numpy().tobytes()], weight.scale, rtol=1e-6)
    kernels = layers["conv"].canonical()
    values = kernels.values.view(12, 8, 3, 3).permute(0, 2, 3, 1).contiguous()
    np.testing.assert_allclose(found[values.numpy().tobytes()], kernels.scale, rtol=1e-6)


@installed
def test_other_sizes_than_those_of_the_example_are_an_error(deployed: Deployment) -> None:
    with pytest.raises(ValueError, match=r"x is \[3, 64\], expected \[4, 64\]"):
        PLACE.run(deployed.path, named() | {"x": inputs()[0][:3]})


@installed
def test_what_is_said_to_be_kept_and_is_stored_as_floats_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pc.compress(nn.Sequential(nn.Linear(64, 32)).eval(), pc.Int8())
    monkeypatch.setattr(litert, "_quantized", lambda written, _: written)
    with pytest.raises(RuntimeError, match="LiteRT stored 0 in another form than as integers"):
        pc.deploy(model, "litert", tmp_path / "m.tflite", torch.randn(2, 64))
    assert [*tmp_path.iterdir()] == []


@installed
def test_a_row_without_neighbouring_integers_is_found_again(tmp_path: Path) -> None:
    """The quantizer's own recovery takes the smallest distance for the scale, here of 31 steps."""
    values = torch.tensor([[127, -64, 31, 0], [-3, 0, 6, 127]], dtype=torch.int8)
    weight = Int8Weight(values, torch.tensor([0.01, 0.02]), 8, 8)
    model = nn.Sequential(Int8Linear.from_weight(weight)).eval()
    found = pc.deploy(model, "litert", tmp_path / "m.tflite", torch.randn(2, 4))
    assert found.checked is not None
    assert found.checked.error < 1e-5


@installed
def test_constants_before_and_behind_weights_stay_out_of_them(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 16)
            self.norm.weight.data.uniform_(0.5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.norm(self.a(x))).view(-1, 4, 4).transpose(0, 1) * 0.3
            return y

    model = pc.compress(Scaled().eval(), pc.Int8())
    assert pc.deploy(model, "litert", tmp_path / "m.tflite", torch.randn(2, 32)).ok
