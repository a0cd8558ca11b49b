"""Files that are broken, or made to do harm: a clear error, no memory for what is only claimed, and no other file is touched."""

from __future__ import annotations

import contextlib
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import floats, model, node, written

import pycompress as pc

REFUSALS = (ValueError, NotImplementedError)


def linear(weight: onnx.TensorProto | None = None) -> onnx.ModelProto:
    """x [2, 3] . w [3, 4], w as it is given."""
    made = model([node("MatMul", "x w", "y", "one")], {"x": [2, 3]}, ["y"], {"w": floats(3, 4)})
    if weight is not None:
        made.graph.initializer[0].CopyFrom(weight)
    return made


def external(location: str, **more: int) -> onnx.ModelProto:
    """With w in another file."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        weight.external_data.add(key=key, value=str(value))
    return linear(weight)


@pytest.mark.parametrize("seed", range(40))
def test_random_bytes(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(random.Random(seed).randbytes(seed * 37))
    with pytest.raises(REFUSALS, match="from_onnx: "):
        pc.from_onnx(path)


def test_a_file_with_one_byte_changed_or_cut(tmp_path: Path) -> None:
    """Whatever that makes of it: the model, or an error of ours."""
    made = model([node("Conv", "x w b", "a", pads=[1, 1, 1, 1]), node("Reshape", "a s", "y")], {"x": [1, 2, 4, 4]}, ["y"],
                 {"w": floats(3, 2, 3, 3), "b": floats(3), "s": np.array([0, -1])})  # fmt: skip
    data, path, draw = made.SerializeToString(), tmp_path / "model.onnx", random.Random(0)
    refused = []
    for _ in range(600):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(changed) if draw.random() < 0.8 else data[: draw.randrange(len(data))])
        try:
            pc.from_onnx(path)
        except REFUSALS as error:
            refused.append(str(error))
    assert len(refused) > 100 and all(one.startswith("from_onnx: ") for one in refused)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([node("Add", "x b", "a"), node("Neg", "a", "b"), node("Neg", "a", "y")],
             "takes 'b', which is made only behind it: the graph has a cycle"),
        ([node("Add", "x y", "y")], "a cycle"),
        ([node("Add", "x nowhere", "y")], "takes 'nowhere', which is made by nothing"),
        ([node("Neg", "x", "y"), node("Abs", "x", "y")], "'y' is made twice"),
        ([node("Neg", "x", "x"), node("Abs", "x", "y")], "'x' is made twice"),
        ([node("Abs", "x", "z")], "the output takes 'y', which is made by nothing"),
        ([node("Add", "x", "y")], "it has 1 inputs, expected 2 to 2"),
        ([node("Abs", "x x", "y")], "it has 2 inputs, expected 1 to 1"),
        ([node("Erfc", "x", "y")], r"\(Erfc, opset 20\): ONNX has no operator Erfc in opset 20: the file is invalid, as hand"),
        ([node("Abs", "x", "y", axis=1)], "Abs has no attribute 'axis'"),
        ([node("Softmax", "x", "y", axis="no")], "the attribute 'axis' is of another type"),
        ([node("Conv", "x w", "y", kernel_shape=[2**40, 3])], "kernel_shape is"),
        ([node("Conv", "x w", "y", group=0)], "group 0"),
        ([node("Conv", "x w", "y", pads=[1])], "pads is"),
        ([node("Transpose", "w", "a", perm=[0, 0, 7, 1]), node("Add", "x a", "y")], None),
        ([node("ConstantOfShape", "huge", "a"), node("Add", "x a", "y")], None),
        ([node("Abs", "one", "huge"), node("Abs", "huge", "y")], "'huge' is made twice"),
        ([node("Tile", "w", "a"), node("Add", "x a", "y")], "it has 1 inputs"),
        ([node("FusedMatMul", "x w", "y")], "no operator FusedMatMul"),
    ],
)  # fmt: skip
def test_broken_graphs(tmp_path: Path, nodes: list[onnx.NodeProto], reason: str | None) -> None:
    constants = {"w": floats(4, 3, 3, 3), "huge": np.array([2**40, 2**40]), "one": np.float32(1)}
    path = written(tmp_path / "model.onnx", model(nodes, {"x": [2, 3, 5, 5]}, ["y"], constants))
    if reason is None:  # what the shapes are shows only in a run
        pc.from_onnx(path)
        return
    with pytest.raises(REFUSALS, match=reason):
        pc.from_onnx(path)


def test_a_graph_of_many_nodes(tmp_path: Path) -> None:
    nodes = [node("Mul", f"v{i} v{i}", f"v{i + 1}") for i in range(3000)]
    found = pc.from_onnx(written(tmp_path / "model.onnx", model(nodes, {"v0": [1]}, ["v3000"])))
    assert len(found.graph.nodes) == 3002


def test_other_domains(tmp_path: Path) -> None:
    made = model([node("FusedMatMul", "x w", "y", "one")], {"x": [2, 3]}, ["y"], {"w": floats(3, 4)})
    made.graph.node[0].domain = "com.microsoft"
    with pytest.raises(NotImplementedError, match=r"the node one \(FusedMatMul, opset 20\).*domain 'com.microsoft'"):
        pc.from_onnx(written(tmp_path / "model.onnx", made))


def test_opsets(tmp_path: Path) -> None:
    made = linear()
    for opset in (0, -3, 10_000):
        made.opset_import[0].version = opset
        with pytest.raises(ValueError, match=f"the opset is {opset}, expected 1 to"):
            pc.from_onnx(written(tmp_path / "model.onnx", made))
    del made.opset_import[:]
    with pytest.raises(ValueError, match="no graph or no opset"):
        pc.from_onnx(written(tmp_path / "model.onnx", made))


# --- memory -------------------------------------------------------------------------------------------------------------


def tensor(dims: list[int], data: bytes = b"", kind: int = TensorProto.FLOAT) -> onnx.TensorProto:
    return TensorProto(name="w", data_type=kind, dims=dims, raw_data=data)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (tensor([2**40, 2**40]), "w has 0 bytes, expected"), (tensor([-1, 4]), "expected sizes from 0"),
        (tensor([3, 4], b"1234"), "w has 4 bytes, expected 48"), (tensor([3, 4], b"1" * 48, 99), "holds the type 99"),
        (tensor([3, 4], b"1" * 48, TensorProto.STRING), "holds STRING"), (tensor([0, 2**62]), "expected sizes up to"),
        (TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**50], float_data=[1.0]), "w has 4 bytes"),
        (TensorProto(name="w", data_type=TensorProto.INT8, dims=[1], int32_data=[70000]), "no <i1"),
        (tensor([5, 4], b"1" * 80), None),
    ],
)  # fmt: skip
def test_tensors_that_are_not_what_they_say(tmp_path: Path, weight: onnx.TensorProto, reason: str | None) -> None:
    path = written(tmp_path / "model.onnx", linear(weight))
    if reason is None:  # x does not fit it, which a run says
        pc.from_onnx(path)
        return
    with pytest.raises(REFUSALS, match=rf"the node one \(MatMul, opset 20\).*{reason}"):
        pc.from_onnx(path)


HUGE: dict[str, list[onnx.NodeProto]] = {
    "ConstantOfShape": [node("ConstantOfShape", "huge", "a")], "Expand": [node("Expand", "one", "a")],
    "Range": [node("Range", "zero end step", "a")],
    "Tile": [node("Tile", "row times", "a")], "MatMul": [node("MatMul", "column row", "a")], "Pad": [node("Pad", "row pads", "a")],
    "OneHot": [node("OneHot", "places end values", "a")], "Gather": [node("Gather", "row places", "a")],
    "Resize": [node("Resize", "row - scales", "a")], "Upsample": [node("Add", "column row", "a")],
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_constants_that_would_be_huge_are_not_computed(tmp_path: Path, name: str) -> None:
    nodes = HUGE[name]
    if name == "Expand":
        nodes = [node("Expand", "one huge", "a")]
    constants = {
        "huge": np.array([2**20, 2**20]), "one": np.float32(1), "zero": np.int64(0), "end": np.int64(2**40), "step": np.int64(1),
        "row": np.ones((1, 5000), np.float32), "column": np.ones((5000, 1), np.float32), "times": np.array([2**30, 1]),
        "pads": np.array([2**20, 0, 2**20, 0]), "places": np.zeros(2000, np.int64), "values": np.zeros(2, np.float32),
        "scales": np.array([2.0**20, 1], np.float32),
    }  # fmt: skip
    if name == "Gather":
        constants["places"] = np.zeros(100_000, np.int64)
    path = written(tmp_path / "model.onnx", model([*nodes, node("Add", "a x", "y")], {"x": [1]}, ["y"], constants))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(*REFUSALS):
        pc.from_onnx(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "more than 100 MB"


def test_functions_that_grow_or_call_themselves(tmp_path: Path) -> None:
    def function(name: str, callee: str) -> onnx.FunctionProto:
        body = [
            helper.make_node(callee, ["a"], ["b"], domain="own"),
            helper.make_node(callee, ["b"], ["c"], domain="own"),
        ]
        return helper.make_function(
            "own", name, ["a"], ["c"], body, [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
        )

    made = model([node("F0", "x", "y")], {"x": [2]}, ["y"])
    made.graph.node[0].domain = "own"
    made.opset_import.append(helper.make_opsetid("own", 1))
    made.functions.extend(function(f"F{i}", f"F{i + 1}") for i in range(40))
    with pytest.raises(ValueError, match=r"written out, the functions make \d+ nodes, expected at most"):
        pc.from_onnx(written(tmp_path / "model.onnx", made))
    made.functions.append(function("F40", "F0"))
    with pytest.raises(ValueError, match="calls itself"):
        pc.from_onnx(written(tmp_path / "model.onnx", made))


# --- other files --------------------------------------------------------------------------------------------------------


def watched(path: Path, call: Callable[[], Any]) -> list[str]:
    """The files that a call opens."""
    import sys

    seen: list[str] = []

    def hook(event: str, arguments: Any) -> None:
        if event == "open" and recording:
            seen.append(str(arguments[0]))

    recording = True
    sys.addaudithook(hook)
    try:
        call()
    finally:
        recording = False
    return [one for one in seen if one.startswith(str(path)) or "secret" in one]


def test_external_data(tmp_path: Path) -> None:
    weight = floats(3, 4)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "weights.bin").write_bytes(b"head" + weight.tobytes())
    path = written(tmp_path / "model.onnx", external("data/weights.bin", offset=4, length=48))
    found = pc.from_onnx(path)
    assert np.array_equal(next(found.children()).weight.detach(), weight.T)


@pytest.mark.parametrize(
    ("location", "more", "reason"),
    [
        ("../secret.bin", {}, "expected a relative path without"), ("a/../../secret.bin", {}, "expected a relative path without"),
        ("{outside}/secret.bin", {}, "expected a relative path without"), ("", {}, "expected a relative path"),
        ("..\\secret.bin", {}, "relative path"),
        ("link.bin", {}, "which is a link"), ("folder/secret.bin", {}, "which is a link"), ("missing.bin", {}, "cannot be opened"),
        (".", {}, "expected a regular file"), ("pipe", {}, "expected a regular file"),
        ("good.bin", {"offset": 1}, "expected 48 inside of it"),
        ("good.bin", {"offset": -8}, "expected 48 inside of it"), ("good.bin", {"length": 2**50}, "expected 48"),
        ("good.bin", {"offset": "x"}, "no number"), ("good.bin\0", {}, "relative path"),
    ],
)  # fmt: skip
def test_external_data_that_must_not_be_read(tmp_path: Path, location: str, more: dict[str, Any], reason: str) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    for folder in (outside, inside):
        folder.mkdir()
    (outside / "secret.bin").write_bytes(bytes(48))
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    (inside / "good.bin").write_bytes(bytes(48))
    (inside / "link.bin").symlink_to(outside / "secret.bin")
    (inside / "folder").symlink_to(outside)
    os.mkfifo(inside / "pipe")
    path = written(inside / "model.onnx", external(location.format(outside=outside), **more))

    def call() -> None:
        with pytest.raises(ValueError, match=rf"the node one \(MatMul, opset 20\).*{reason}"):
            pc.from_onnx(path)

    assert not [one for one in watched(tmp_path, call) if "secret" in one or "link" in one]


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pc.from_onnx(tmp_path / "missing.onnx")
    with pytest.raises(IsADirectoryError):
        pc.from_onnx(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        pc.from_onnx(tmp_path / "pipe")
