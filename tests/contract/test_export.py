"""Every row in one exported model: the file's part for each layer is what the layer is, in all forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="the extra pycompress[onnx] is not installed")
pytest.importorskip("onnxruntime", reason="the extra pycompress[onnx] is not installed")
pytest.importorskip("onnxscript", reason="the extra pycompress[onnx] is not installed")

import pycompress as pc  # noqa: E402
from contract.cases import CASES, Case  # noqa: E402
from pycompress.onnx import runs  # noqa: E402
from pycompress.onnx.exported import Exported  # noqa: E402
from pycompress.validation.fused import differs  # noqa: E402


class Every(nn.Module):
    """A layer of each case, which all meet the input of their kind, so many times."""

    def __init__(self, cases: list[Case], calls: int) -> None:
        super().__init__()
        self.calls = calls
        for i, case in enumerate(cases):
            activation = case.activations[i % len(case.activations)]
            name = f"{case.kind.name}_{case.layer_type.weight_type.name}_{i}"
            self.add_module(name, case.layer(activation, bias=i % 3 > 0))

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        return {
            f"{name} {call}": layer(given[layer.kind.name] + (0 if layer.kind.tokens else call))
            for name, layer in self.named_children()
            for call in range(self.calls)
        }


def inputs(lead: tuple[int, ...]) -> dict[str, Tensor]:
    """Of each kind; ``lead`` of those that may have any."""
    of_kind = {case.kind.name: case for case in CASES}
    return {name: case.x(*(lead if case.kind.dims < 2 else lead[:1])) for name, case in of_kind.items()}


@pytest.mark.parametrize(
    ("form", "lead", "calls"), [("exact", (2, 3), 1), ("exact", (4,), 2), ("fused", (4,), 1), ("kernels", (2, 3), 2)]
)
def test_every_row(form: str, lead: tuple[int, ...], calls: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = Every(CASES, calls).eval(), tmp_path / "every.onnx"
    given = inputs(lead)
    free = {name: {d: f"{name}_{d}" for d in range(len(lead) if not name.startswith("conv") else 1)} for name in given}
    pc.export(model, path, given, free, form=form)
    given = inputs(tuple(size + 3 for size in lead))
    report = pc.validate(model, given, exported=path)
    assert report.ok, str(report)
    file, records = Exported(path), {record.name: record for record in report.layers}
    assert {node.domain for node in file.model.graph.node} == ({"", "pycompress"} if form == "kernels" else {""})
    assert len(records) == len(CASES)
    natively = {record.name: record for record in pc.validate(model, given).layers}
    for name, layer in model.named_children():
        record, native = records[name], natively[name]
        assert (record.rows, record.status) == (native.rows, "ok")
        if form == "kernels" and runs(layer):
            assert (record.integers_equal, record.max_ulp) == (None, 0)
        elif form != "fused" or not differs(layer):  # what is promised of a layer alone, the file keeps
            assert (record.integers_equal, record.max_ulp) == (native.integers_equal, native.max_ulp)
        else:
            assert record.integers_equal is None and record.max_ulp is None
