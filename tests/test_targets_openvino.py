"""OpenVINO: what it carries, how its file stores it, and that it computes the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pycompress as pc
from pycompress.targets import TARGETS
from pycompress.targets.openvino import FILE
from pycompress.targets.rounding import NOT_ROUNDED

openvino = pytest.importorskip("openvino", reason="the extra targets-openvino")
pytestmark = pytest.mark.slow  # torch.onnx, and OpenVINO's first start

Deployed = tuple[pc.targets.Deployment, Any, nn.Module]
PLAN = {
    "0": pc.Int8(activation="static"), "2": pc.Int4(group=32), "3": pc.Sparse(density=0.3), "4": pc.LowRank(8, residual=pc.Int8()),
    "5": pc.Sparse(density=0.3, bits=8),
}  # fmt: skip


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """What was written of a model with a layer of each weight, the graph in its file, and the model."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 64), nn.Linear(64, 64)]
    dense = nn.Sequential(*layers, nn.Linear(64, 256)).eval()
    model = pc.compress(dense, PLAN, calibration=pc.calibrate(dense, [torch.randn(64, 64)], plan=PLAN))
    path = tmp_path_factory.mktemp("openvino") / "m"
    found = pc.deploy(model, "openvino", path, torch.randn(5, 64))
    return found, openvino.Core().read_model(path / FILE), model


def test_it_gives_what_the_model_gives_but_for_the_rounding_of_inputs(
    deployed: Deployed,
) -> None:
    found, _, _ = deployed
    assert found.ok, found.verdict
    assert found.checked is not None
    assert found.checked.error < 2e-2
    assert {name: one.fate for name, (_, one) in found.layers.items()} == dict.fromkeys(PLAN, "kept")
    assert {name: one.reason for name, (_, one) in found.layers.items()} == {
        "0": "", "2": NOT_ROUNDED, "3": "", "4": NOT_ROUNDED, "5": NOT_ROUNDED,
    }  # fmt: skip


def test_another_number_of_rows(deployed: Deployed) -> None:
    found, _, model = deployed
    x = torch.randn(9, 64)
    (y,) = TARGETS["openvino"].run(found.path, {"input": x})
    assert float(torch.linalg.norm(y - model(x)) / torch.linalg.norm(model(x))) < 2e-2


def test_what_is_kept_is_stored_in_no_more_bits(deployed: Deployed) -> None:
    _, graph, _ = deployed
    constants = {one.get_friendly_name(): one for one in graph.get_ops() if one.get_type_name() == "Constant"}
    kinds = {name: one.get_element_type().to_string() for name, one in constants.items()}
    expected = {
        "0.weight": "i8", "2.weight": "u4", "2.weight_zero_point": "u4", "3.weight_values": "f32", "3.weight_mask": "u8",
        "4.up": "f32", "4.residual_weight": "i8", "5.weight_values": "i8",
    }  # fmt: skip
    assert {name: kinds[name] for name in expected} == expected
    assert "4.weight" not in kinds  # the product of the factors
    floats = [one for name, one in constants.items() if kinds[name] == "f32" and name != "3.weight_values"]
    assert max(one.get_byte_size() for one in floats) < 4 * 1024  # scales, biases, factors: no matrix in floats
    assert constants["3.weight_values"].get_byte_size() < 4 * 64 * 64 * 0.31
    assert graph.get_rt_info()["runtime_options"]["DYNAMIC_QUANTIZATION_GROUP_SIZE"].astype(str) == "0"


def test_recurrent_layers_are_refused() -> None:
    layer = pc.compress(nn.Sequential(nn.LSTM(8, 8)).eval(), pc.Int8())[0]
    assert pc.targets.TARGETS["openvino"].carried(layer).fate == "refused"
