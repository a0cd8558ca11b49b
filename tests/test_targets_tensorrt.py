"""TensorRT, which is on no machine of ours: that the file holds what its parser takes, and computes the model in ONNX Runtime."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.targets import TARGETS, Deployment
from pycompress.targets.deployment import compared
from pycompress.targets.rounding import NOT_ROUNDED
from pycompress.targets.tensorrt import CACHE, FILE, HEAD

onnx = pytest.importorskip("onnx", reason="the extra onnx")
pytest.importorskip("onnxscript", reason="the extra onnx")
pytestmark = pytest.mark.slow  # torch.onnx

STATIC = pc.Int8(activation="static")
PLAN = {
    "u": STATIC, "v": pc.Sparse(density=0.3), "a": STATIC, "b": pc.Int8(), "c": pc.Int4(group=32, symmetric=True),
    "d": pc.Int4(group=32), "e": pc.LowRank(8, residual=pc.Int8()), "f": pc.Sparse(density=0.2, bits=8), "g": pc.LowRank(8, bits=8),
}  # fmt: skip


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.a, self.b, self.c, self.d, self.e, self.f, self.g = (nn.Linear(16 if i == 0 else 64, 64) for i in range(7))

    def forward(self, images: Tensor) -> Tensor:
        x = self.v(self.u(images).relu()).mean((2, 3))
        for layer in (self.a, self.b, self.c, self.d, self.e, self.f, self.g):
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Path, Deployment]:
    torch.manual_seed(0)
    dense, images = Layers().eval(), torch.randn(8, 3, 12, 12)
    model = pc.compress(dense, PLAN, calibration=pc.calibrate(dense, [images], plan=PLAN))
    path = tmp_path_factory.mktemp("tensorrt") / "m"
    return model, images, path, pc.deploy(model, "tensorrt", path, images, widen=True)


def test_what_becomes_of_layers_is_said_and_that_nothing_ran(
    deployed: tuple[nn.Module, Tensor, Path, Deployment], tmp_path: Path
) -> None:
    model, images, _, found = deployed
    assert {name for name, (_, one) in found.layers.items() if one.fate == "widened"} == {*"vdf"}
    assert {name for name, (_, one) in found.layers.items() if one.reason == NOT_ROUNDED} == {*"bceg"}
    assert "symmetric" in found.layers["a"][1].reason
    assert not found.ok
    assert "not run: TensorRT needs an NVIDIA GPU" in found.verdict
    with pytest.raises(ValueError, match=r"(?s)v .*zeros.*d .*zero points"):
        pc.deploy(model, "tensorrt", tmp_path / "m", images)


def test_the_file_is_what_the_parser_takes(deployed: tuple[nn.Module, Tensor, Path, Deployment]) -> None:
    proto = onnx.load(deployed[2] / FILE)
    onnx.checker.check_model(proto, full_check=True)
    kinds = {one.name: onnx.TensorProto.DataType.Name(one.data_type) for one in proto.graph.initializer}
    expected = {"u": "INT8", "v": "FLOAT", "a": "INT8", "b": "INT8", "c": "INT4", "d": "FLOAT", "f": "FLOAT"}
    assert {name: kinds[f"{name}.weight"] for name in expected} == expected
    assert [kinds[name] for name in ("e.down", "e.up", "e.residual_weight", "g.down", "g.up")] == ["FLOAT"] * 2 + [
        "INT8"
    ] * 3
    values = {one.name: one for one in proto.graph.initializer}
    quantizers = [one for one in proto.graph.node if one.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    assert {one.op_type for one in quantizers} == {"QuantizeLinear", "DequantizeLinear"}
    for node in quantizers:
        for zero in node.input[2:]:
            assert kinds[zero] == "INT8"
            assert not onnx.numpy_helper.to_array(values[zero]).any()
    assert not {one.op_type for one in proto.graph.node} & {"BitwiseAnd", "MatMulInteger", "ConvInteger", "CumSum"}
    assert not {"UINT4", "UINT8"} & {*kinds.values()}


def test_onnx_runtime_computes_the_model_of_it(deployed: tuple[nn.Module, Tensor, Path, Deployment]) -> None:
    model, images, path, _ = deployed
    with torch.no_grad():
        expected = [model(images).double()]
    found = compared(expected, TARGETS["tensorrt"].run(str(path), {"images": images}))
    assert not found.reason, found
    assert found.error < 0.05


def test_four_bits_are_the_layers_own(deployed: tuple[nn.Module, Tensor, Path, Deployment]) -> None:
    model, _, path, _ = deployed
    (stored,) = (one for one in onnx.load(path / FILE).graph.initializer if one.name == "c.weight")
    integers = onnx.numpy_helper.to_array(stored).astype(np.int8).T
    assert (integers == model.c.canonical().integers().numpy().astype(np.int8) - 8).all()


def test_the_cache_has_the_scale_of_each_static_input(deployed: tuple[nn.Module, Tensor, Path, Deployment]) -> None:
    model, _, path, _ = deployed
    head, *lines = (path / CACHE).read_text().splitlines()
    assert head == HEAD
    scales = dict(line.rsplit(": ", 1) for line in lines)
    quantized = [one.input[0] for one in onnx.load(path / FILE).graph.node if one.op_type == "QuantizeLinear"]
    assert [*scales] == quantized
    for layer, digits in zip((model.u, model.a), scales.values(), strict=True):
        (found,) = struct.unpack(">f", bytes.fromhex(digits))
        step, zero = layer.canonical().input_range
        assert found == pytest.approx(max(zero * step, (255 - zero) * step) / 127, rel=1e-6)
        assert len(digits) == 8


def test_without_static_ranges_there_is_no_cache(tmp_path: Path) -> None:
    model: Any = pc.compress(nn.Sequential(nn.Linear(16, 16)).eval(), pc.Int8())
    pc.deploy(model, "tensorrt", tmp_path / "m", torch.randn(2, 16))
    assert sorted(one.name for one in (tmp_path / "m").iterdir()) == [FILE]
    with pytest.raises(ValueError, match="its form is symmetric"):
        pc.validate(model, torch.randn(2, 16), exported=tmp_path / "m" / FILE)
