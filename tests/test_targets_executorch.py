"""ExecuTorch: what its files hold, and what they give in its own runtime. `make targets` installs it."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from deployed import errors, inputs, parts
from torch import nn

import pycompress as pc
from pycompress.surgery import compressed_layers
from pycompress.targets import TARGETS, Deployment, executorch
from pycompress.targets.twins import as_floats

installed = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="executorch is not installed: make targets"
)
PLACE = TARGETS["executorch"]
KEPT = {
    "int8": "int8", "seven": "int8", "static": "int8", "int4": "int4", "int4_wide": "int4", "low_rank": "float32",
    "low_rank_int8": "int8", "beside": "float32 + int8", "conv": "int8", "fixed": "int8", "groups": "int8", "uneven": "int8",
    "spatial": "float32", "sequence": "int8", "rows": "int8", "narrow": "float32",
}  # fmt: skip
WIDENED = {
    "weights": "float32", "zero_points": "int4", "int4_weights": "float32", "sparse": "float32", "sparse_int8": "int8",
    "depthwise": "float32", "sparse_conv": "float32",
}  # fmt: skip
REASONS = {
    "seven": "8 bits, not 7", "static": "not the fixed one", "fixed": "each image", "weights": "activation_bits=8",
    "zero_points": "sums of groups", "int4_weights": "activation_bits=8", "sparse": "no sparse weights", "depthwise": "one channel",
}  # fmt: skip
# The input is rounded in other steps there, or not at all; all else gives our kernels' numbers but for an integer or two.
ROUGH = {"seven": 0.03, "static": 0.03, "zero_points": 0.02, "fixed": 0.05, "depthwise": 0.02}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return parts()


@pytest.fixture(scope="module")
def deployed(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    path = tmp_path_factory.mktemp("executorch") / "m.pte"
    return pc.deploy(model, "executorch", path, inputs(), widen=True)


def test_what_becomes_of_each_layer_is_known_without_the_package(model: nn.Module) -> None:
    found = {name: PLACE.carried(layer) for name, layer in compressed_layers(model).items()}
    assert {name for name, one in found.items() if one.fate == "kept"} == set(KEPT)
    assert {name for name, one in found.items() if one.fate == "widened"} == set(WIDENED)
    for name, start in (KEPT | WIDENED).items():
        assert found[name].encoding.startswith(start), name
    for name, words in REASONS.items():
        assert words in found[name].reason, name


def test_recurrent_layers_are_refused(tmp_path: Path) -> None:
    lstm = pc.compress(nn.LSTM(8, 8).eval(), pc.Int8())
    with pytest.raises(ValueError, match="recurrent"):
        pc.deploy(lstm, "executorch", tmp_path / "m.pte", torch.randn(3, 2, 8), widen=True)
    ragged = pc.compress(nn.Linear(72, 8).eval(), pc.Int4(group=32, symmetric=True))
    assert "k is 72" in PLACE.carried(ragged).reason


@installed
def test_every_part_gives_what_ours_gives(model: nn.Module, deployed: Deployment) -> None:
    assert deployed.ok, deployed.verdict
    call = PLACE.open(deployed.path)
    named = dict(zip(("x", "image", "tokens"), inputs(), strict=True))
    off = errors(call(named), model(*inputs()))
    assert {name: error for name, error in off.items() if error > ROUGH.get(name, 1e-5)} == {}


@installed
def test_sizes_below_those_of_the_example_run(model: nn.Module, deployed: Deployment) -> None:
    x, image, tokens = (one[:2] for one in inputs())
    off = errors(PLACE.run(deployed.path, {"x": x, "image": image, "tokens": tokens}), model(x, image, tokens))
    assert {name: error for name, error in off.items() if error > ROUGH.get(name, 1e-5)} == {}


@installed
def test_sizes_above_those_of_the_example_are_an_error(deployed: Deployment) -> None:
    x, image, tokens = inputs()
    with pytest.raises(ValueError, match=r"x is \[8, 64\], expected at most \[4, 64\]"):
        PLACE.run(deployed.path, {"x": x.repeat(2, 1), "image": image, "tokens": tokens})


@installed
@pytest.mark.parametrize("method", [pc.Int8(), pc.Int4(group=32, symmetric=True)])
def test_what_is_said_to_be_kept_and_is_stored_as_floats_fails(
    method: pc.Int8 | pc.Int4, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pc.compress(nn.Sequential(nn.Linear(64, 32)).eval(), method)
    x = torch.randn(2, 64)
    assert pc.deploy(copy.deepcopy(model), "executorch", tmp_path / "m.pte", x).ok
    monkeypatch.setattr(executorch, "_encoded", lambda weight, shape, _: as_floats(weight, shape))
    with pytest.raises(RuntimeError, match="ExecuTorch stored 0 in another form than as integers"):
        pc.deploy(model, "executorch", tmp_path / "n.pte", x)
    assert [one.name for one in tmp_path.iterdir()] == ["m.pte"]
