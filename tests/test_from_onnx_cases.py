"""The operators that ``from_onnx`` knows, on the ONNX standard's own cases of one node each.

A case is imported as it is, and once more with all inputs but the first as constants, so that layers, folding and sizes take
their turn. It must give what ONNX's reference evaluator gives: integers to the bit, float32 to 1e-5 of the numbers plus 1e-5.
What is beside the same sums in another order is at most k * eps of the numbers for sums of k terms, here k < 100 and eps = 6e-8:
that is 6e-6. 16-bit floats are rounded once more, to 2^-11 (float16) and 2^-8 (bfloat16) of the numbers.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

import pycompress as pc
from pycompress.onnx.importing.importer import CLAIMED

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-7, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# Some give more than one result, of which the first is imported.
FIRST_ALONE = {"LayerNormalization", "MaxPool", "Dropout", "BatchNormalization"}
# No case of one node is there for these, or none that is imported: test_from_onnx.py has its own.
ELSEWHERE = {"GRU", "GlobalLpPool"}
TYPES = r"holds|no tensor of numbers|type \d+ of ONNX|is not known here|4-bit integers"


def tensor(value: Any) -> Tensor:
    """Of a case's input or output."""
    array = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.name in ("int4", "uint4"):
        array = array.astype(array.dtype.name.replace("4", "8"))
    return torch.from_numpy(np.array(array))


@functools.cache
def cases() -> dict[str, list[Any]]:
    """{operator: its cases} of those that are claimed."""
    from onnx.backend.test.case.node import collect_testcases

    found = defaultdict(list)
    for case in collect_testcases(None):
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].domain in ("", "ai.onnx") and nodes[0].op_type in CLAIMED:
            found[nodes[0].op_type].append(case)
    return found


def constant(model: onnx.ModelProto, inputs: list[Any]) -> onnx.ModelProto | None:
    """The model with its inputs as constants, except for the first."""
    if len(inputs) < 2 or len(model.graph.input) != len(inputs) or any(isinstance(one, list) for one in inputs):
        return None
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for info, value in list(zip(model.graph.input, inputs, strict=True))[1:]:
        named = onnx.TensorProto()
        named.CopyFrom(value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value)))
        named.name = info.name
        changed.graph.initializer.append(named)
    del changed.graph.input[1:]
    return changed


def first_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[1:], changed.graph.node[0].output[1:]
    return changed


def expected(model: onnx.ModelProto, inputs: list[Any], stored: list[Any]) -> list[Tensor]:
    """By the reference evaluator; by what is stored where it cannot run the case."""
    names = [one.name for one in model.graph.input]
    try:
        given = {name: tensor(one).numpy() for name, one in zip(names, inputs, strict=True)}
        return [tensor(one) for one in ReferenceEvaluator(model).run(None, given)]
    except Exception:  # it lacks types and versions
        return [tensor(one) for one in stored]


def run(path: Path, model: onnx.ModelProto, inputs: list[Any]) -> list[Tensor]:
    path.write_bytes(model.SerializeToString())
    imported = pc.from_onnx(path)
    with torch.no_grad():
        found = imported(*(tensor(one) for one in inputs))
    return list(found) if isinstance(found, tuple) else [found]


def check(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype.is_floating_point:
            tolerance = TOLERANCES[a.dtype]
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert torch.equal(a, b)


def outcome(path: Path, operator: str, case: Any) -> tuple[int, list[str]]:
    """(how many ways of one case are right, why the others are refused). Anything else fails."""
    inputs, outputs = case.data_sets[0]
    model = first_alone(case.model) if operator in FIRST_ALONE else case.model
    ways = [(model, inputs)]
    if (other := constant(model, inputs)) is not None:
        ways.append((other, inputs[:1]))
    right, refused = 0, []
    for one, given in ways:
        try:
            found = run(path, one, given)
        except NotImplementedError as error:
            refused.append(f"{case.name}: {error}")
            continue
        check(found, expected(one, given, outputs)[: len(one.graph.output)])
        right += 1
    return right, refused


# Of each operator: parts of the names of its cases, and why they are refused. Every other case must be right.
REFUSED: dict[str, dict[str, str]] = {
    "BatchNormalization": {"training_mode": "training_mode"},
    "Cast": {"": TYPES}, "CastLike": {"": TYPES}, "DequantizeLinear": {"": TYPES}, "QuantizeLinear": {"": TYPES},
    "Dropout": {"training": "drops numbers"},
    "Equal": {"string": TYPES},
    "Identity": {"sequence": TYPES, "opt": TYPES},
    "LSTM": {"": "weights are not constant|peepholes"}, "RNN": {"": "weights are not constant"},
    "MaxPool": {"with_argmax": "output"},
    "Resize": {"antialias": "antialias", "tf_crop": "tf_crop_and_resize", "not_larger": "keep_aspect",
    "not_smaller": "keep_aspect"},
    "SpaceToDepth": {"": "mode"},
    }  # fmt: skip


@pytest.mark.parametrize("operator", [name for name in CLAIMED if name not in ELSEWHERE])
def test_cases_of_the_standard(operator: str, tmp_path: Path) -> None:
    right = 0
    for case in cases()[operator]:
        done, refused = outcome(tmp_path / "case.onnx", operator, case)
        right += done
        allowed = [reason for part, reason in REFUSED.get(operator, {}).items() if part in case.name]
        if re.search(
            "uint(16|32|64)|bitwise", case.name, re.IGNORECASE
        ):  # (those of the bitwise ones are in their inputs)
            allowed.append("UINT(16|32|64)|no tensor of numbers")
        for why in refused:
            assert any(re.search(reason, why) for reason in allowed), why
            assert f"({operator}, opset" in why or "the input" in why
    assert right, f"no case of {operator} was right"


def test_how_many_there_are() -> None:
    assert len(cases()) > 140 and sum(map(len, cases().values())) > 900
    assert set(CLAIMED) - set(cases()) <= ELSEWHERE


def test_operators_that_are_not_imported_are_named(tmp_path: Path) -> None:
    """All operators of the standard are claimed, or refused by name."""
    opset = onnx.defs.onnx_opset_version()
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == "" and not schema.deprecated}
    others = names - set(CLAIMED)
    assert {"Loop", "Scan", "If", "NonMaxSuppression", "StringConcat"} <= others
    for name in sorted(others):
        schema = onnx.defs.get_schema(name, opset)
        inputs = [f"x{i}" for i in range(max(1, schema.min_input))][: schema.max_input]
        node = helper.make_node(name, inputs, ["y"], name="one")
        infos = [helper.make_tensor_value_info(one, onnx.TensorProto.FLOAT, [2]) for one in [*inputs, "y"]]
        graph = helper.make_graph([node], "g", infos[:-1], infos[-1:])
        path = tmp_path / "other.onnx"
        path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]).SerializeToString())
        with pytest.raises(NotImplementedError, match=rf"the node one \({name}, opset {opset}\) is not imported"):
            pc.from_onnx(path)


def test_the_guide_names_them_all() -> None:
    page = (Path(__file__).parent.parent / "docs" / "guide" / "from-onnx.md").read_text(encoding="utf-8")
    _, _, listed = page.partition("operators these:")
    assert re.findall(r"\w+", listed.partition(".")[0]) == [*CLAIMED]
