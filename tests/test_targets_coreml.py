"""Core ML: what its files hold, which can be made and read on any system; run on macOS only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.targets.coreml import _Weights
from pycompress.targets.rounding import NOT_ROUNDED
from pycompress.weights import Int8Weight

coremltools = pytest.importorskip("coremltools", reason="the extra targets-coreml")
pytestmark = pytest.mark.slow  # torch.export, and coremltools' imports

PLAN = {
    "rows": pc.Int8(embeddings=True), "a": pc.Int8(), "b": pc.Int4(group=32), "c": pc.Sparse(density=0.3),
    "d": pc.Sparse(density=0.3, bits=8), "e": pc.LowRank(8, residual=pc.Int8()), "u": pc.Int8(), "v": pc.Sparse(density=0.3),
}  # fmt: skip


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.a, self.b = nn.Embedding(100, 64), nn.Linear(64, 256), nn.Linear(256, 64)
        self.c, self.d, self.e = (nn.Linear(64, 64) for _ in range(3))
        self.u, self.v = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3)

    def forward(self, ids: Tensor, images: Tensor) -> dict[str, Tensor]:
        x = self.b(nn.functional.gelu(self.a(self.rows(ids))))
        return {"words": self.e(self.d(self.c(x))), "maps": self.v(self.u(images).relu())}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, pc.targets.Deployment, Any, Any]:
    """A model with a layer of each weight; what became of it; the description in the file, and its program."""
    from coremltools.converters.mil.frontend.milproto.load import load

    torch.manual_seed(0)
    model = pc.compress(Layers().eval(), PLAN)
    path = tmp_path_factory.mktemp("coreml") / "m.mlpackage"
    inputs = {"ids": torch.randint(0, 100, (2, 5)), "images": torch.randn(2, 3, 8, 8)}
    found = pc.deploy(model, "coreml", path, inputs)
    file = coremltools.models.MLModel(str(path), skip_model_load=True)
    spec = file.get_spec()
    return model, found, spec, load(spec, spec.specificationVersion, file.weights_dir)


def test_every_layer_is_kept(deployed: tuple[nn.Module, pc.targets.Deployment, Any, Any]) -> None:
    _, found, _, _ = deployed
    assert {name: one.fate for name, (_, one) in found.layers.items()} == dict.fromkeys(PLAN, "kept")
    assert {name for name, (_, one) in found.layers.items() if one.reason == NOT_ROUNDED} == {*"abdeu"}
    assert found.ok == (sys.platform == "darwin"), found.verdict
    # A file of such small layers is as much names as numbers; a float matrix of a or b alone is 64 kB.
    assert found.bytes < found.ours + 32_000


def test_the_file_holds_the_weights_to_the_bit(deployed: tuple[nn.Module, pc.targets.Deployment, Any, Any]) -> None:
    model, _, _, program = deployed
    operations = [*program.functions["main"].operations]
    kinds = [one.op_type for one in operations if one.op_type.startswith("constexpr")]
    assert sorted(kinds) == sorted(
        ["constexpr_blockwise_shift_scale"] * 5
        + ["constexpr_sparse_to_dense"] * 3
        + ["constexpr_sparse_blockwise_shift_scale"]
    )
    dense = {"constexpr_blockwise_shift_scale", "constexpr_sparse_to_dense"}
    made = [one.materialized_val_inference() for one in operations if one.op_type in dense]
    held = {np.asarray(one).reshape(len(one), -1).astype(np.float32).tobytes() for one in made}
    for name in PLAN:
        weight = getattr(model, name).canonical()
        stored = [weight] if name != "e" else [weight.residual]
        assert all(one.decompress().numpy().tobytes() in held for one in stored), name
    floats = [
        one.val.val for one in operations if one.op_type == "const" and np.asarray(one.val.val).dtype == np.float32
    ]
    assert max(map(np.size, floats)) < 64 * 64  # factors, scales, what is left of sparse weights: no matrix


def test_inputs_and_outputs_are_the_models_and_batches_may_be_one(
    deployed: tuple[nn.Module, pc.targets.Deployment, Any, Any],
) -> None:
    _, _, spec, _ = deployed
    assert [one.name for one in spec.description.input] == ["ids", "images"]
    assert [one.name for one in spec.description.output] == ["words", "maps"]
    for port, free in zip(spec.description.input, (2, 1), strict=True):
        bounds = port.type.multiArrayType.shapeRange.sizeRanges
        assert [one.lowerBound for one in bounds][:free] == [1] * free
        assert [one.upperBound for one in bounds][:free] == [2**31 - 1] * free


def test_a_weight_that_is_not_found_is_an_error_that_names_the_layer(
    deployed: tuple[nn.Module, pc.targets.Deployment, Any, Any],
) -> None:
    found = _Weights()
    found.encode("lost")(Int8Weight(torch.ones(4, 4, dtype=torch.int8), torch.ones(4), 8, 8), (4, 4))
    with pytest.raises(RuntimeError, match="the weights of lost are not in what coremltools made"):
        found.put_into(deployed[3])


def test_what_it_lacks(tmp_path: Path) -> None:
    model = pc.compress(nn.Sequential(nn.Linear(48, 64)).eval(), pc.Int4(group=32))
    with pytest.raises(ValueError, match="k = 48 is no multiple of the group, 32"):
        pc.deploy(model, "coreml", tmp_path / "m.mlpackage", torch.randn(2, 48))
    network = pc.compress(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), pc.Int8())
    with pytest.raises(ValueError, match=r"the input input is torch\.uint8, expected one of torch\.float32"):
        pc.deploy(network, "coreml", tmp_path / "m.mlpackage", torch.randn(2, 3, 8, 8), adjust="uint8_images")
    layer = pc.compress(nn.Sequential(nn.LSTM(8, 8)).eval(), pc.Int8())[0]
    assert pc.targets.TARGETS["coreml"].carried(layer).fate == "refused"
