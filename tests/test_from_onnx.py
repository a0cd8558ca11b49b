"""What becomes of a file's nodes: layers, names, shapes, activations, and what a module must be able to do."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import floats, in_runtime, model, node, written
from torch import Tensor, nn

import pycompress as pc

pytestmark = pytest.mark.filterwarnings("ignore")


def imported(path: Path, made: onnx.ModelProto, *inputs: Tensor, tolerance: float = 1e-5) -> Any:
    """The model, which gives what ONNX Runtime gives: sums of less than 100 terms in another order (test_from_onnx_cases.py)."""
    found = pc.from_onnx(written(path / "model.onnx", made))
    with torch.no_grad():
        given = found(*inputs)
    for one, other in zip(given if isinstance(given, tuple) else [given], in_runtime(made, *inputs), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    return found


def kinds(found: nn.Module) -> dict[str, str]:
    return {name: type(one).__name__ for name, one in found.named_modules() if not one._modules}


# --- layers -------------------------------------------------------------------------------------------------------------


def test_products_with_constant_weights_are_layers(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x up.weight", "a", "/up/MatMul"), node("Add", "up.bias a", "b"), node("Relu", "b", "c", "/act/Relu"),
        node("Gemm", "c down.weight down.bias", "y", "/down/Gemm", transB=1),
    ]  # fmt: skip
    weights = {"up.weight": floats(6, 9), "up.bias": floats(9), "down.weight": floats(4, 9), "down.bias": floats(4)}
    found = imported(tmp_path, model(nodes, {"x": ["rows", 6]}, ["y"], weights), torch.randn(5, 6))
    assert kinds(found) == {"up": "Linear", "act": "ReLU", "down": "Linear"}
    assert np.array_equal(found.up.weight.detach(), weights["up.weight"].T)
    assert np.array_equal(found.up.bias.detach(), weights["up.bias"])
    record = pc.summary(pc.compress(found, pc.Int8())).layers[0]
    assert (record.name, record.activation) == ("up", "relu")


def test_a_gemm_with_factors(tmp_path: Path) -> None:
    nodes = [node("Gemm", "x w b", "y", alpha=0.5, beta=2.0)]
    found = imported(
        tmp_path, model(nodes, {"x": [3, 6]}, ["y"], {"w": floats(6, 4), "b": floats(1, 4)}), torch.randn(3, 6)
    )
    assert [*kinds(found).values()] == ["Linear"]
    turned = model([node("Gemm", "x w", "y", transA=1)], {"x": [6, 3]}, ["y"], {"w": floats(6, 4)})
    assert not [*imported(tmp_path, turned, torch.randn(6, 3)).parameters()]


def test_what_else_uses_the_sum_keeps_the_bias_apart(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "a"), node("Add", "a b", "c"), node("Mul", "a c", "y")]
    found = imported(
        tmp_path, model(nodes, {"x": [3, 6]}, ["y"], {"w": floats(6, 4), "b": floats(4)}), torch.randn(3, 6)
    )
    (layer,) = found.children()
    assert layer.bias is None


@pytest.mark.parametrize("way", ["Identity", "Reshape"])
def test_what_is_used_later_keeps_the_bias_apart(tmp_path: Path, way: str) -> None:
    """Also by another name, or before a reshape."""
    other = node("Identity", "a", "c") if way == "Identity" else node("Reshape", "a sizes", "c")
    nodes = [node("MatMul", "x w", "a"), other, node("Add", "c b", "d"), node("Relu", "a", "e"), node("Reshape", "e sizes", "f"),
             node("Add", "d f", "y")]  # fmt: skip
    constants = {"w": floats(6, 4), "b": floats(4), "sizes": np.array([3, 4])}
    imported(tmp_path, model(nodes, {"x": [3, 6]}, ["y"], constants), torch.randn(3, 6))


@pytest.mark.parametrize(
    ("attributes", "padding"),
    [
        ({"pads": [1, 1, 1, 1]}, (1, 1)), ({"pads": [0, 1, 1, 1]}, (0, 0)), ({"auto_pad": "SAME_UPPER"}, (1, 1)),
        ({"auto_pad": "SAME_LOWER", "strides": [2, 2]}, (0, 0)), ({"auto_pad": "VALID", "dilations": [2, 1]}, (0, 0)),
        ({"strides": [1, 2], "group": 2}, (0, 0)),
    ],
)  # fmt: skip
def test_convolutions(tmp_path: Path, attributes: dict[str, Any], padding: Any) -> None:
    groups = attributes.get("group", 1)
    nodes = [node("Conv", "x w", "a", **attributes), node("Add", "a b", "y")]
    weights = {"w": floats(6, 4 // groups, 3, 3), "b": floats(1, 6, 1, 1)}
    found = imported(tmp_path, model(nodes, {"x": [2, 4, 9, 8]}, ["y"], weights), torch.randn(2, 4, 9, 8))
    (layer,) = found.children()
    assert isinstance(layer, nn.Conv2d) and layer.padding == padding and layer.bias is not None
    assert pc.summary(pc.compress(found, pc.Int8())).layers[0].method == "int8"


def test_a_kernel_of_even_size_that_keeps_the_size(tmp_path: Path) -> None:
    made = model([node("Conv", "x w", "y", pads=[1, 2])], {"x": [2, 4, 9]}, ["y"], {"w": floats(6, 4, 4)})
    (layer,) = imported(tmp_path, made, torch.randn(2, 4, 9)).children()
    assert isinstance(layer, nn.Conv1d) and layer.padding == "same"


@pytest.mark.parametrize(
    "more", [{}, {"strides": [2, 2], "output_padding": [1, 1], "pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}]
)
def test_transposed_convolutions(tmp_path: Path, more: dict[str, Any]) -> None:
    made = model(
        [node("ConvTranspose", "x w b", "y", **more)],
        {"x": [2, 4, 5, 5]},
        ["y"],
        {"w": floats(4, 3, 3, 3), "b": floats(3)},
    )
    found = imported(tmp_path, made, torch.randn(2, 4, 5, 5))
    assert [type(one) for one in found.children()] == ([] if "auto_pad" in more else [nn.ConvTranspose2d])


def test_a_table_and_a_head_that_share_their_weight(tmp_path: Path) -> None:
    """The file has it twice, turned."""
    table = floats(20, 6)
    nodes = [node("Gather", "table tokens", "a"), node("MatMul", "a head", "y")]
    made = model(nodes, {"tokens": ["n", "s"]}, ["y"], {"table": table, "head": table.T.copy()}, tokens=True)
    found = imported(tmp_path, made, torch.randint(0, 20, (2, 5)))
    embedding, linear = found.children()
    assert isinstance(embedding, nn.Embedding) and linear.weight is embedding.weight
    assert len([*found.parameters()]) == 1


def test_weights_that_are_all_alike_stay_two(tmp_path: Path) -> None:
    zeros = np.zeros((4, 4), np.float32)
    made = model(
        [node("MatMul", "x a", "b"), node("MatMul", "b c", "y")], {"x": [2, 4]}, ["y"], {"a": zeros, "c": zeros}
    )
    assert len([*imported(tmp_path, made, torch.randn(2, 4)).parameters()]) == 2


def test_norms(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "a"), node("BatchNormalization", "a norm.weight b m v", "c"),
        node("LayerNormalization", "c s t", "y", axis=-1, epsilon=1e-6),
    ]  # fmt: skip
    weights = {
        "w": floats(6, 4, 1, 1),
        "norm.weight": floats(6),
        "b": floats(6),
        "m": floats(6),
        "v": np.abs(floats(6)) + 0.5,
    }
    made = model(nodes, {"x": [2, 4, 5, 5]}, ["y"], {**weights, "s": floats(5), "t": floats(5)}, opset=17)
    x = torch.randn(2, 4, 5, 5)
    found = imported(tmp_path, made, x)
    assert [*kinds(found).values()] == ["Conv2d", "BatchNorm2d", "LayerNorm"]
    folded = pc.fold_norms(found, x)
    assert isinstance(folded.norm, nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), found(x), rtol=1e-5, atol=1e-5)


def test_a_quantized_weight_is_a_float_one(tmp_path: Path) -> None:
    q = np.arange(-12, 12, dtype=np.int8).reshape(6, 4)
    nodes = [node("DequantizeLinear", "q scale zero", "w", axis=1), node("MatMul", "x w", "y")]
    constants = {"q": q, "scale": np.array([0.5, 1, 2, 4], np.float32), "zero": np.zeros(4, np.int8)}
    found = imported(tmp_path, model(nodes, {"x": [3, 6]}, ["y"], constants), torch.randn(3, 6))
    (layer,) = found.children()
    assert np.array_equal(layer.weight.detach(), (q * constants["scale"]).T)


# --- recurrent layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("state", [False, True])
def test_recurrent_layers(tmp_path: Path, operator: str, gates: int, direction: str, state: bool) -> None:
    count = 2 if direction == "bidirectional" else 1
    weights = {
        "w": floats(count, gates * 7, 5),
        "r": floats(count, gates * 7, 7, seed=1),
        "b": floats(count, 14 * gates, seed=2),
    }
    more = {"linear_before_reset": 1} if operator == "GRU" else {}
    states = ("h c" if operator == "LSTM" else "h") if state else ""
    for name in states.split():
        weights[name] = floats(count, 3, 7, seed=3 + len(weights))
    outputs = ["y", "last", "cell"][: 3 if operator == "LSTM" else 2]
    one = node(
        operator,
        f"x w r b {'- ' + states if state else ''}",
        " ".join(outputs),
        hidden_size=7,
        direction=direction,
        **more,
    )
    found = imported(tmp_path, model([one], {"x": [6, 3, 5]}, outputs, weights), torch.randn(6, 3, 5))
    (layer,) = found.children()
    assert type(layer).__name__ == operator and layer.bidirectional == (count == 2)


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs", "reason"),
    [
        ("GRU", {}, "x w r", "linear_before_reset is 0"), ("GRU", {"activations": ["Relu", "Tanh"]}, "x w r", "activations"),
        ("RNN", {"clip": 1.0}, "x w r", "clips"), ("RNN", {}, "x v r", "not constant"),
        ("RNN", {}, "x w r - lengths", "sequence_lens"),
    ],
)  # fmt: skip
def test_recurrent_layers_that_torch_does_not_have(
    tmp_path: Path, operator: str, attributes: dict[str, Any], inputs: str, reason: str
) -> None:
    rows = 21 if operator == "GRU" else 7
    constants = {"w": floats(1, rows, 5), "r": floats(1, rows, 7), "lengths": np.array([2, 3, 4], np.int32)}
    made = model(
        [node(operator, inputs, "y", "one", hidden_size=7, **attributes)],
        {"x": [6, 3, 5], "v": [1, rows, 5]},
        ["y"],
        constants,
    )
    with pytest.raises(NotImplementedError, match=rf"the node one \({operator}, opset 20\).*{reason}"):
        pc.from_onnx(written(tmp_path / "model.onnx", made))


# --- activations --------------------------------------------------------------------------------------------------------

ROOT, HALF = np.float32(2**0.5), np.float32(0.5)
GELUS = {
    "divided": ([node("Div", "a r", "b"), node("Erf", "b", "c"), node("Add", "c one", "d"), node("Mul", "a d", "e"),
    node("Mul", "e h", "y")],
                "GELU(approximate='none')"),
    "halved first": ([node("Mul", "a h", "b"), node("Mul", "a i", "c"), node("Erf", "c", "d"), node("Add", "one d", "e"),
                      node("Mul", "e b", "y")], "GELU(approximate='none')"),
    "tanh": ([node("Pow", "a three", "b"), node("Mul", "b k", "c"), node("Add", "a c", "d"), node("Mul", "d s", "e"),
              node("Tanh", "e", "f"), node("Add", "f one", "g"), node("Mul", "a g", "i2"), node("Mul", "i2 h", "y")],
             "GELU(approximate='tanh')"),
    "silu": ([node("Sigmoid", "a", "b"), node("Mul", "b a", "y")], "SiLU()"),
    "another factor": ([node("Div", "a r", "b"), node("Erf", "b", "c"), node("Add", "c one", "d"), node("Mul", "a d", "y")], ""),
    "another gate": ([node("Sigmoid", "x", "b"), node("MatMul", "b w", "c"), node("Mul", "c a", "y")], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", GELUS)
def test_activations_that_are_written_out(tmp_path: Path, name: str) -> None:
    nodes, expected = GELUS[name]
    numbers = {"r": ROOT, "h": HALF, "i": 1 / ROOT, "one": np.float32(1), "three": np.float32(3), "k": np.float32(0.044715),
               "s": np.float32((2 / np.pi) ** 0.5)}  # fmt: skip
    made = model([node("MatMul", "x w", "a"), *nodes], {"x": [3, 6]}, ["y"], {"w": floats(6, 6), **numbers}, opset=13)
    found = imported(tmp_path, made, torch.randn(3, 6))
    texts = [repr(one) for one in found.children() if not isinstance(one, nn.Linear)]
    assert texts == ([expected] if expected else [])
    assert (pc.summary(pc.compress(found, pc.Int8())).layers[0].activation != "none") == bool(expected)


# --- shapes -------------------------------------------------------------------------------------------------------------


def heads(opset: int) -> onnx.ModelProto:
    """Splits features into heads, as exporters write it: sizes from Shape, Gather, Slice, Concat, arithmetic."""
    nodes = [
        node("MatMul", "x w", "a"), node("Shape", "x", "shape"), node("Gather", "shape zero", "batch"),
        node("Gather", "shape one", "length"),
        node("Unsqueeze", "batch axes", "batch1"), node("Unsqueeze", "length axes", "length1"),
        node("Slice", "shape two three axes", "width"),
        node("Div", "width parts", "each"), node("Concat", "batch1 length1 parts each", "sizes", axis=0),
        node("Reshape", "a sizes", "b"),
        node("Transpose", "b", "c", perm=[0, 2, 1, 3]), node("Range", "zero length one", "r"), node("Cast", "r", "rf", to=1),
        node("Unsqueeze", "rf axes1", "rc"), node("Add", "c rc", "d"), node("ConstantOfShape", "length1", "ones"),
        node("Add", "d ones_w", "e"), node("Transpose", "e", "f", perm=[0, 2, 1, 3]), node("Reshape", "f shape", "y"),
    ]  # fmt: skip
    whole = {"zero": 0, "one": 1, "two": [2], "three": [3], "axes": [0], "axes1": [1], "parts": [2]}
    constants: dict[str, Any] = {name: np.array(value, np.int64) for name, value in whole.items()}
    return model(
        nodes, {"x": ["batch", "length", 8]}, ["y"], {**constants, "w": floats(8, 8), "ones_w": floats(4)}, opset=opset
    )


def test_sizes_stay_open(tmp_path: Path) -> None:
    made = heads(13)
    found = imported(tmp_path, made, torch.randn(2, 5, 8))
    for shape in ((3, 7, 8), (1, 1, 8)):
        x = torch.randn(*shape)
        torch.testing.assert_close(found(x).detach(), in_runtime(made, x)[0], rtol=1e-5, atol=1e-5)
    assert "tensor_of" not in found.code, "all of it is arithmetic on integers"
    x = torch.randn(4, 6, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(found, fullgraph=True, backend="eager", dynamic=True)(x), found(x))
        auto = torch.export.Dim.AUTO
        exported = torch.export.export(found, (torch.randn(2, 5, 8),), dynamic_shapes=({0: auto, 1: auto},)).module()
        assert torch.equal(exported(x), found(x))


def test_sizes_have_the_types_of_the_file(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "s"), node("Cast", "s", "s32", to=6), node("Equal", "s three", "same"),
        node("Where", "same one s", "chosen"),
        node("Not", "same", "other"), node("Size", "x", "n"), node("Neg", "s32", "less"),
    ]  # fmt: skip
    outputs = ["s", "s32", "same", "chosen", "other", "n", "less"]
    made = model(nodes, {"x": [2, 3]}, outputs, {"three": np.array([3]), "one": np.array([1])}, opset=13)
    imported(tmp_path, made, torch.randn(2, 3))


def test_sizes_where_the_rank_is_not_known(tmp_path: Path) -> None:
    made = heads(13)
    del made.graph.input[0].type.tensor_type.shape.dim[:]
    made.graph.input[0].type.tensor_type.ClearField("shape")
    found = pc.from_onnx(written(tmp_path / "model.onnx", made))
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(found(x).detach(), in_runtime(heads(13), x)[0], rtol=1e-5, atol=1e-5)


def test_constants_are_computed_once(tmp_path: Path) -> None:
    nodes = [node("Transpose", "w", "t"), node("Mul", "t two", "u"), node("MatMul", "x u", "y")]
    found = imported(
        tmp_path, model(nodes, {"x": [3, 6]}, ["y"], {"w": floats(4, 6), "two": np.float32(2)}), torch.randn(3, 6)
    )
    assert [*kinds(found).values()] == ["Linear"] and not [*found.buffers()]


# --- older opsets, and files of before ----------------------------------------------------------------------------------


def test_axes_as_attributes_and_as_inputs(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4)
    old = model([node("Unsqueeze", "x", "a", axes=[1]), node("ReduceSum", "a", "b", axes=[3]), node("Squeeze", "b", "y", axes=[1])],
                {"x": [2, 3, 4]}, ["y"], opset=11)  # fmt: skip
    imported(tmp_path, old, x)
    sliced = model([node("Slice", "x", "y", starts=[1], ends=[3], axes=[2])], {"x": [2, 3, 4]}, ["y"], opset=9)
    imported(tmp_path, sliced, x)
    imported(tmp_path, model([node("Softmax", "x", "y")], {"x": [2, 3, 4]}, ["y"], opset=11), x)
    imported(tmp_path, model([node("Clip", "x", "y", min=-0.5, max=0.5)], {"x": [2, 3, 4]}, ["y"], opset=10), x)


def test_weights_that_are_inputs_with_defaults(tmp_path: Path) -> None:
    made = model([node("MatMul", "x w", "y")], {"x": [2, 3], "w": [3, 4]}, ["y"], {"w": floats(3, 4)})
    found = pc.from_onnx(written(tmp_path / "model.onnx", made))
    assert found(torch.randn(2, 3)).shape == (2, 4)


def test_functions_of_the_file_are_written_out(tmp_path: Path) -> None:
    made = model([node("Twice", "x", "y")], {"x": [2]}, ["y"])
    made.graph.node[0].domain = "own"
    made.opset_import.append(helper.make_opsetid("own", 1))
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    made.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 20)]))
    assert torch.equal(pc.from_onnx(written(tmp_path / "model.onnx", made))(torch.ones(2)), torch.full((2,), 2.0))


def test_inputs_by_name_and_several_outputs(tmp_path: Path) -> None:
    made = model([node("Add", "a:0 class", "x"), node("Sub", "a:0 class", "y")], {"a:0": [2], "class": [2]}, ["x", "y"])
    found = pc.from_onnx(written(tmp_path / "model.onnx", made))
    total, difference = found(a_0=torch.ones(2), x_class=torch.ones(2))
    assert total.tolist() == [2, 2] and difference.tolist() == [0, 0]


def test_global_lp_pool(tmp_path: Path) -> None:
    imported(
        tmp_path, model([node("GlobalLpPool", "x", "y", p=3)], {"x": [2, 3, 4, 5]}, ["y"]), torch.randn(2, 3, 4, 5)
    )


# --- what a module must be able to do -----------------------------------------------------------------------------------


def test_copied_pickled_saved_and_compressed(tmp_path: Path) -> None:
    found, x = imported(tmp_path, heads(13), torch.randn(2, 5, 8)), torch.randn(2, 5, 8)
    assert not found.training and found(x).requires_grad
    buffer = io.BytesIO()
    torch.save(found, buffer)
    buffer.seek(0)
    with torch.no_grad():
        for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(x), found(x))
        made = pc.compress(found, pc.Int8(), example_inputs=x)
        pc.save(made, tmp_path / "model.safetensors")
        assert torch.equal(pc.load(found, tmp_path / "model.safetensors")(x), made(x))
        assert pc.validate(made, x).ok


def test_names_are_those_of_the_file(tmp_path: Path) -> None:
    names = [
        "model/forward/kernel:0",
        "a.weight",
        "a.b.weight",
        "a.b_1.weight",
        "lambda.weight",
        "onnx::MatMul_7",
        "onnx::MatMul_8",
    ]
    nodes = [
        node("MatMul", f"x{i} {name}", f"x{i + 1}", f"/encoder/layers.{i}/MatMul" if i > 4 else "")
        for i, name in enumerate(names)
    ]
    weights = {name: floats(4, 4, seed=i) for i, name in enumerate(names)}
    found = imported(tmp_path, model(nodes, {"x0": [2, 4]}, ["x7"], weights), torch.randn(2, 4), tolerance=1e-3)
    assert [*kinds(found)] == ["model.forward_", "a", "a_b", "a_b_1", "lambda_", "encoder.layers.5", "encoder.layers.6"]


def test_the_error_without_onnx(python: Any) -> None:
    code = "import sys; sys.modules['onnx'] = None\nimport pycompress as pc\npc.from_onnx('x')"
    assert "pycompress[onnx]" in python(code).stderr


def test_graph_module_activations_are_read_from_the_graph() -> None:
    """Of any model that torch.fx traced; where its code was changed behind the graph's back, nothing is taken for granted."""
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    traced = torch.fx.symbolic_trace(nn.ModuleDict({"inner": plain})["inner"])
    found = pc.summary(pc.compress(traced, pc.Int8())).layers
    assert [record.activation for record in found] == ["relu", "relu"]
    changed = torch.fx.symbolic_trace(plain)
    last = [one for one in changed.graph.nodes if one.op == "call_module"][-1]
    changed.graph.erase_node(next(one for one in changed.graph.nodes if one.op == "output"))
    changed.graph.output(last.args[0])
    assert [record.activation for record in pc.summary(pc.compress(changed, pc.Int8())).layers] == ["none", "none"]


def test_types_of_inputs(tmp_path: Path) -> None:
    made = model([node("Identity", "x", "y")], {"x": [2]}, ["y"])
    made.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    with pytest.raises(NotImplementedError, match="the input 'x' is no tensor of numbers"):
        pc.from_onnx(written(tmp_path / "model.onnx", made))
