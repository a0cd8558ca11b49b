"""ONNX files whose products are compressed in place: what they compute then, what stays as it was, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx", reason="the extra pycompress[onnx] is not installed")
pytest.importorskip("onnxruntime", reason="the extra pycompress[onnx] is not installed")
pytest.importorskip("onnxscript", reason="the extra pycompress[onnx] is not installed")

import pycompress as pc  # noqa: E402
from pycompress.onnx import kernels, session  # noqa: E402
from pycompress.onnx.exported import KEY  # noqa: E402
from pycompress.onnx.products import Products  # noqa: E402

needs_kernels = pytest.mark.skipif(not kernels.has_library(), reason="built without a compiler: no kernels to load")
FORMS = ["exact", "fused", pytest.param("kernels", marks=needs_kernels)]
FLOAT = onnx.TensorProto.FLOAT


def values(*size: int) -> Any:
    return np.random.default_rng(sum(size)).standard_normal(size, np.float32)


INPUTS = {"x": values(2, 5, 32), "square": np.eye(3, dtype=np.float32) * 2}


def written(path: Path, nodes: list[Any], constants: dict[str, Any], inputs: Any = INPUTS, **options: Any) -> Path:
    """A file; the outputs are those of the last node and what else is named in ``outputs``."""
    make = onnx.helper.make_tensor_value_info
    outputs = [*options.pop("outputs", ()), nodes[-1].output[0]]
    sizes = {
        name: [f"{name}_{i}" if i + 1 < max(x.ndim, 2) else k for i, k in enumerate(x.shape)]
        for name, x in inputs.items()
    }
    graph = onnx.helper.make_graph(
        nodes, "graph", [make(name, FLOAT, size) for name, size in sizes.items()], [make(name, FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    change = options.pop("change", None)
    opsets = [onnx.helper.make_opsetid("", options.pop("opset", 17)), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=options.pop("ir_version", 8))
    if change is not None:
        change(model)
    onnx.save(model, path, **options)
    return path


def node(operator: str, inputs: str, output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(operator, inputs.split(), [output], **attributes)


def network(path: Path, **options: Any) -> Path:
    """A MatMul with a bias, a Gemm with factors, a weight of two products, an operator of another domain, a name that is taken."""
    nodes = [
        node("Inverse", "square", "inverse", domain="com.microsoft", name="/inverse"),
        node("MatMul", "x block.0.weight", "h0", name="/block/0/MatMul"),
        node("Add", "block.0.bias h0", "h1", name="/block/0/Add"),
        node("Relu", "h1", "h2"),
        node("MatMul", "h2 block.1.weight", "h3", name="/block/1/MatMul"),
        node("MatMul", "h3 block.1.weight", "h4", name="/block/2/MatMul"),
        node("Add", "h4 block.0.scale", "h5"),
        node("Reshape", "h5 shape", "h6"),
        node("Gemm", "h6 head.weight head.bias", "y", transB=1, alpha=0.5, beta=2.0, name="/head/Gemm"),
    ]
    constants = {
        "block.0.weight": values(32, 48), "block.0.bias": values(48), "block.1.weight": values(48, 48) / 7,
        "block.0.scale": values(1, 48), "head.weight": values(24, 48), "head.bias": values(1, 24),
        "shape": np.array([-1, 48]),
    }  # fmt: skip
    return written(path, nodes, constants, outputs=["h1", "inverse"], **options)


def run(path: Path, inputs: Any = INPUTS) -> list[Any]:
    return list(session(path).run(None, inputs))


def numpy_network(layers: Any) -> list[Any]:
    """What compressed layers compute, with NumPy between them."""

    def layer(name: str, x: Any) -> Any:
        return layers.get_submodule(name)(torch.from_numpy(x)).detach().numpy()

    h1 = layer("block.0", INPUTS["x"])
    h5 = layer("block.2", layer("block.1", np.maximum(h1, 0))) + values(1, 48)
    return [h1, np.eye(3, dtype=np.float32) / 2, layer("head", h5.reshape(-1, 48))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "method", [pc.Int8(), pc.Int4(), pc.Sparse(0.4, bits=8), pc.LowRank(8, rank_guard=False)], ids=str
)
def test_what_a_file_computes(method: Any, form: str, tmp_path: Path) -> None:
    path, output = network(tmp_path / "model.onnx"), tmp_path / "compressed.onnx"
    before = path.read_bytes()
    found = pc.compress_onnx(path, {"block.2": None, "*": method} if form == "fused" else method, output, form=form)
    assert [record.name for record in found.layers] == ["block.0", "block.1", "block.2", "head"]
    assert path.read_bytes() == before
    model = onnx.load(output)
    assert [value.name for value in model.graph.input] == ["x", "square"]
    assert [value.name for value in model.graph.output] == ["h1", "inverse", "y"]
    assert {"/inverse"} <= {one.name for one in model.graph.node}
    assert {"h2", "h3", "h4", "h5", "h6"} <= {name for one in model.graph.node for name in one.output}
    opsets = {one.domain: one.version for one in model.opset_import}
    assert opsets["com.microsoft"] == 1
    assert form != "kernels" or opsets == {"": 17, "com.microsoft": 1, "pycompress": 1}
    kept = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    assert np.array_equal(kept["block.0.scale"], values(1, 48)) and "shape" in kept
    dense = [one for one in kept.values() if one.dtype == np.float32 and one.size == 48 * 48]
    assert len(dense) == (1 if form == "fused" else 0)
    assert json.loads(model.metadata_props[0].value)["form"] == form and model.metadata_props[0].key == KEY
    if form != "fused":
        layers = Products(path).layers
        pc.compress(layers, method, inplace=True, blocks=False)
        for y, expected in zip(run(output), numpy_network(layers), strict=True):
            if form == "kernels" or type(method) is pc.Int8:
                np.testing.assert_array_equal(y, expected)
            else:
                np.testing.assert_allclose(y, expected, rtol=0, atol=1e-2 * np.abs(expected).max())
        if form == "kernels":  # one weight of two products
            assert sum(name.startswith(("block.1", "block.2")) for name in kept) == len(
                layers.get_submodule("block.1").canonical().parts()
            )
    else:
        for y, expected in zip(run(output), run(path), strict=True):
            assert np.abs(y - expected).mean() <= (0.9 if type(method) is pc.LowRank else 0.5) * np.abs(expected).max()


def test_names_and_bits_are_those_of_the_imported_model(tmp_path: Path) -> None:
    path = network(tmp_path / "model.onnx", change=lambda model: model.graph.node.pop(0) and model.graph.output.pop(1))
    seen = [{"x": values(4, 3, 32)}, {"x": values(9, 3, 32)}]
    model = pc.from_onnx(path)
    plan: Any = {"head": pc.Int8(activation="static"), "*": pc.Int4()}
    batches = [{name: torch.from_numpy(x) for name, x in batch.items()} for batch in seen]
    batches = [{**batch, "square": torch.eye(3)} for batch in batches]
    model = pc.compress(model, plan, calibration=pc.calibrate(model, batches, plan=plan))
    layers = Products(path).layers
    pc.compress(layers, plan, calibration=pc.calibrate(layers, batches, plan=plan), inplace=True, blocks=False)
    for name, layer in layers.named_modules():
        if hasattr(layer, "canonical"):
            other = model.get_submodule(name).canonical().parts()
            assert all(torch.equal(part, other[key]) for key, part in layer.canonical().parts().items()), name


def test_calibration_by_arrays_and_positions(tmp_path: Path) -> None:
    path, output = network(tmp_path / "model.onnx"), tmp_path / "out.onnx"
    pc.compress_onnx(path, pc.Int8(activation="static"), output, calibration=[INPUTS, [INPUTS["x"], INPUTS["square"]]])
    y, expected = run(output)[-1], run(path)[-1]
    assert np.abs(y - expected).max() < 0.05 * np.abs(expected).max()
    with pytest.raises(ValueError, match="the inputs of the file are x, square, given are x"):
        pc.compress_onnx(path, pc.Int8(activation="static"), output, calibration=[{"x": INPUTS["x"]}])


def test_a_file_takes_its_own_place_and_its_weights_may_lie_beside_it(tmp_path: Path) -> None:
    path = network(tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=1024)
    before = run(path)
    pc.compress_onnx(path, pc.Int8(), path)
    (tmp_path / "weights").unlink()
    for y, expected in zip(run(path), before, strict=True):
        assert np.abs(y - expected).max() < 0.05 * np.abs(expected).max()


def test_weights_that_are_listed_as_inputs_by_old_files(tmp_path: Path) -> None:
    def listed(model: Any) -> None:
        for one in model.graph.initializer:
            model.graph.input.append(onnx.helper.make_tensor_value_info(one.name, one.data_type, list(one.dims)))

    old = network(tmp_path / "old.onnx", change=listed, ir_version=3, opset=9)
    before = run(old)
    pc.compress_onnx(old, pc.Int8(), tmp_path / "new.onnx", form="fused")
    assert [value.name for value in onnx.load(tmp_path / "new.onnx").graph.input] == ["x", "square"]
    assert np.abs(run(tmp_path / "new.onnx")[-1] - before[-1]).max() < 0.05 * np.abs(before[-1]).max()
    newer = network(tmp_path / "newer.onnx", change=listed)  # there they are defaults, which a caller may replace
    with pytest.raises(ValueError, match="has no MatMul or Gemm with a constant weight"):
        pc.compress_onnx(newer, pc.Int8(), tmp_path / "new.onnx")


@pytest.mark.parametrize("form", FORMS)
def test_ranks_that_the_file_does_not_tell(form: str, tmp_path: Path) -> None:
    nodes = [node("Reshape", "x size", "h"), node("MatMul", "h weight", "y")]
    shapes = {"x": values(64), "size": np.array([2.0], np.float32)}
    nodes.insert(0, node("Cast", "given", "size", to=onnx.TensorProto.INT64))
    path = written(tmp_path / "a.onnx", nodes, {"weight": values(8, 6)}, {"x": shapes["x"], "given": shapes["size"]})
    pc.compress_onnx(path, pc.Int8(), tmp_path / "b.onnx", form=form)
    for size in ([8, 8], [2, 4, 8], [2, 2, 2, 8]):
        inputs = {"x": values(64), "given": np.array(size, np.float32)}
        (y,), (expected,) = run(tmp_path / "b.onnx", inputs), run(path, inputs)
        assert y.shape == expected.shape == (*size[:-1], 6)
        assert np.abs(y - expected).max() < 0.05 * np.abs(expected).max()
    (one,) = run(tmp_path / "b.onnx", {"x": values(8), "given": np.array([8], np.float32)})
    assert one.shape == (6,)


LEFT: dict[str, Callable[[], tuple[list[Any], dict[str, Any]]]] = {
    "read elsewhere": lambda: (
        [node("MatMul", "x w", "h"), node("ReduceSum", "w", "s"), node("Add", "h s", "y")], {"w": values(32, 8)}
    ),
    "computed": lambda: ([node("Neg", "w", "v"), node("MatMul", "x v", "y")], {"w": values(32, 8)}),
    "three dimensions": lambda: ([node("MatMul", "x w", "y")], {"w": values(2, 32, 8)}),
    "on the left": lambda: ([node("MatMul", "w x", "y")], {"w": values(5, 5)}),
    "doubles": lambda: (
        [node("Cast", "x", "d", to=onnx.TensorProto.DOUBLE), node("MatMul", "d w", "h"), node("Cast", "h", "y", to=FLOAT)],
        {"w": values(32, 8).astype(np.float64)},
    ),
    "a bias of one number": lambda: (
        [node("Flatten", "x", "f", axis=2), node("Gemm", "f w b", "y")], {"w": values(32, 8), "b": values(1)}
    ),
    "turned": lambda: ([node("Flatten", "x", "f", axis=2), node("Gemm", "f w", "y", transA=1)], {"w": values(10, 8)}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name: str, tmp_path: Path) -> None:
    nodes, constants = LEFT[name]()
    path = written(tmp_path / "a.onnx", nodes, constants, {"x": INPUTS["x"]})
    run(path, {"x": INPUTS["x"]})
    with pytest.raises(ValueError, match=r"a\.onnx has no MatMul or Gemm with a constant weight \[k, n\] of floats"):
        pc.compress_onnx(path, pc.Int8(), tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_an_add_behind_a_product_is_its_bias_only_where_nothing_else_takes_the_product(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "h"), node("Add", "h b", "v"), node("Mul", "v h", "y")]
    path = written(tmp_path / "a.onnx", nodes, {"w": values(32, 8), "b": values(8)}, {"x": INPUTS["x"]})
    (layer,) = [one for one in Products(path).layers.modules() if isinstance(one, nn.Linear)]
    assert layer.bias is None
    pc.compress_onnx(path, pc.Int8(), tmp_path / "b.onnx")
    assert [one.op_type for one in onnx.load(tmp_path / "b.onnx").graph.node][-2:] == ["Add", "Mul"]


def test_what_is_refused(tmp_path: Path) -> None:
    path, output = network(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    output.write_bytes(b"older")
    for plan, options, error, match in [
        (pc.Int8(), {"form": "fast"}, ValueError, "form is 'fast', expected one of exact, fused, kernels"),
        ({"*": None}, {}, ValueError, r"no layer was compressed; there are: block\.0, block\.1"),
        ({"body.*": pc.Int8()}, {}, ValueError, r"body\.\*"),
        (None, {}, TypeError, "the plan is None"),
        (pc.Int8(activation="static"), {"calibration": INPUTS}, TypeError, "batches is dict, expected several"),
    ]:
        with pytest.raises(error, match=match):
            pc.compress_onnx(path, plan, output, **options)
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match=r"compress_onnx: .*text is no ONNX file"):
        pc.compress_onnx(tmp_path / "text", pc.Int8(), output)
    with pytest.raises(FileNotFoundError):
        pc.compress_onnx(tmp_path / "none", pc.Int8(), output)
    assert output.read_bytes() == b"older"


def test_data_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(10**5))
    (tmp_path / "in").mkdir()

    def outside(model: Any) -> None:
        tensor = model.graph.initializer[3]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../secret")

    path = network(tmp_path / "in" / "a.onnx", change=outside)
    with pytest.raises(
        ValueError, match=r"compress_onnx: the data of .* are in '\.\./secret', expected a relative path"
    ):
        pc.compress_onnx(path, pc.Int8(), tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()
