"""A file of each version that was ever released loads, and means what it meant: `witness/` has them, and what they gave then."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import pycompress as pc
from pycompress import ops
from pycompress.nn import CompressedLayer

WITNESS = Path(__file__).parent / "witness"


class Model(nn.Module):
    """A layer of each kind with a weight of each format; its names say which."""

    def __init__(self) -> None:
        super().__init__()
        self.int8, self.int8_7, self.int8_a16 = nn.Linear(40, 24), nn.Linear(40, 24, bias=False), nn.Linear(40, 24)
        self.int4, self.int4_symmetric = nn.Linear(70, 24), nn.Linear(70, 24)
        self.sparse, self.sparse_int8 = nn.Sequential(nn.Linear(40, 24), nn.GELU()), nn.Linear(48, 24)
        self.low_rank, self.low_rank_int8 = nn.Linear(40, 24), nn.Linear(40, 24)
        self.beside_int8, self.beside_int4 = nn.Linear(40, 24), nn.Linear(70, 24)
        self.beside_sparse, self.beside_dense = nn.Linear(40, 24), nn.Linear(40, 24)
        self.conv_sparse = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv_channel = nn.Conv2d(6, 8, 3, padding="same")
        self.conv_spatial = nn.Conv2d(6, 8, 3, dilation=2)
        self.conv_tucker = nn.Conv2d(6, 8, (3, 5))
        self.embedding = nn.Embedding(30, 12, padding_idx=3)
        self.tied_a, self.tied_b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.tied_b.weight = self.tied_a.weight
        self.norm, self.dense = nn.LayerNorm(16), nn.Linear(16, 8)


# Of each version of the plan: a file, and the version of the weights in it. All hold the same numbers.
VERSIONS = {plan: (f"version{plan}.safetensors", weights) for plan, weights in ((1, 1), (2, 1), (3, 2), (4, 2))}
EXPECTED = load_file(WITNESS / "version1.expected.safetensors")
LAYERS = sorted({name.split("/")[0] for name in EXPECTED})
# They run as chains of torch's own operators, which may sum in another order elsewhere.
CHAINS = ["conv_channel", "conv_spatial", "conv_tucker", "embedding"]


@pytest.fixture(scope="module", params=VERSIONS, ids="version {}".format)
def version(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture(scope="module")
def model(version: int) -> Iterator[nn.Module]:
    """On the scalar kernels, whose bits are the same everywhere."""
    with ops.capped("scalar"):
        yield pc.load(Model().eval(), WITNESS / VERSIONS[version][0])


def test_all_of_the_file_is_there(model: nn.Module, version: int) -> None:
    with safe_open(WITNESS / VERSIONS[version][0], "pt") as file:
        plan = json.loads(file.metadata()["pycompress"])
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    assert plan["version"] == version and sorted(plan["layers"]) == LAYERS
    formats = {entry.get("method", entry.get("weight")) for entry in plan["layers"].values()}
    assert formats == {"int8", "int4", "sparse", "low_rank"}
    held = dict(model.state_dict())
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert isinstance(layer, CompressedLayer)
        weight, then = layer.canonical(), layer.weight_type.of_version(VERSIONS[version][1])
        assert held.pop(f"{name}.weight").tolist() == [2], "a file has the version in its plan"
        for present in weight.tensors():
            del held[f"{name}.{present}"]
        names, parts = then.names(layer._settings_of(then)), weight.parts()
        held |= {f"{name}.{names[part]}": parts[part] for part in parts}
    assert set(stored) | set(plan["aliases"]) == set(held)
    for name, tensor in held.items():
        found = stored[plan["aliases"].get(name, name)]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_what_it_gave(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    assert isinstance(layer, CompressedLayer)
    matrix, expected = layer.canonical().decompress(), EXPECTED[f"{name}/decompressed"]
    if name in CHAINS:  # of factors in float32, which another processor multiplies in another order
        assert ((matrix - expected).abs() <= slack(layer) * magnitudes(layer).canonical().decompress()).all()
    else:
        assert torch.equal(matrix, expected), "to the bit"
    x, expected = EXPECTED[f"{name}/x"], EXPECTED[f"{name}/y"]
    with torch.inference_mode():
        y = layer(x)
    if name in CHAINS:
        assert ((y - expected).abs() <= bound(layer, x)).all()
    else:
        assert torch.equal(y, expected), "to the bit"


def bound(layer: CompressedLayer, x: Tensor) -> Tensor:
    """Of the difference between two orders of the same float32 sums: each is off by at most eps times its number of terms, times
    what it would be if all terms were positive."""
    with torch.inference_mode():
        return slack(layer) * magnitudes(layer)(x.abs())


def slack(layer: CompressedLayer) -> float:
    sizes = [tensor[0].numel() for tensor in layer.canonical().tensors().values()]
    return 2 * 2.0**-24 * (sum(sizes) + 1)


def magnitudes(layer: CompressedLayer) -> CompressedLayer:
    """The layer with all its numbers positive."""
    positive = copy.deepcopy(layer)
    positive.load_state_dict({name: tensor.abs() for name, tensor in layer.state_dict().items()})
    return positive
