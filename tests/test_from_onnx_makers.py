"""What other programs write for common layers, node by node as they wrote it, and what becomes of it.

Files of Keras 3.15.1 with TensorFlow 2.21.0 (``model.export(format="onnx")``, which is tf2onnx 1.17.0: opset 15), of tf2onnx
1.17.0 itself (opsets 13 and 18), of PaddlePaddle 3.3.1 with paddle2onnx 2.1.0 (opset 17) and of JAX 0.10.2 with jax2onnx 0.17.1
(opset 23) were read for these; the programs are not needed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx_files import floats, in_runtime, model, node, written
from torch import nn

import pycompress as pc

INT, KERAS = np.int32, {"opset": 15, "producer": "tf2onnx", "version": "1.17.0"}


def int64(*values: int) -> Any:
    return np.array(values, np.int64)


def keras_dense_of_sequences(path: str = "functional_1/dense_1") -> onnx.ModelProto:
    """A reshape to rows, whose sizes are int32 on the way; the bias and the activation behind it."""
    p = f"{path}/Tensordot"
    nodes = [
        node("Shape", "x", f"{p}/Shape:0"), node("Cast", f"{p}/Shape:0", f"{p}/Shape__11:0", to=6),
        node("Reshape", f"x {p}/Reshape_shape__27", f"{p}/Reshape:0"),
        node("Gather", f"{p}/Shape__11:0 {p}/free:0", f"{p}/GatherV2:0", axis=0),
        node("Concat", f"{p}/GatherV2:0 {p}/Const_2:0", f"{p}/concat_1:0", axis=0),
        node("Cast", f"{p}/concat_1:0", f"{p}__18:0", to=7),
        node("MatMul", f"{p}/Reshape:0 {path}/Cast/ReadVariableOp:0", f"{p}/MatMul:0"),
        node("Reshape", f"{p}/MatMul:0 {p}__18:0", f"{p}:0"),
        node("Add", f"{p}:0 {path}/BiasAdd/ReadVariableOp:0", f"{path}/BiasAdd:0"), node("Relu", f"{path}/BiasAdd:0", "y"),
    ]  # fmt: skip
    constants = {
        f"{p}/free:0": np.array([0, 1], INT), f"{p}/Reshape_shape__27": int64(-1, 8), f"{p}/Const_2:0": np.array([16], INT),
        f"{path}/Cast/ReadVariableOp:0": floats(8, 16), f"{path}/BiasAdd/ReadVariableOp:0": floats(16),
    }  # fmt: skip
    return model(nodes, {"x": ["n", "s", 8]}, ["y"], constants, **KERAS)


def keras_conv() -> onnx.ModelProto:
    """Conv2D(padding="same", strides=2), pooled, then Dense: images have their channels last."""
    nodes = [
        node("Transpose", "x", "a", perm=[0, 3, 1, 2]),
        node("Conv", "a functional_8_1/conv2d_1_1/convolution/ReadVariableOp:0 b", "c",
             strides=[2, 2], kernel_shape=[3, 3], group=1,
             dilations=[1, 1], pads=[1, 0, 1, 1]),
        node("GlobalAveragePool", "c", "d"), node("Squeeze", "d axes", "e"),
        node("MatMul", "e functional_8_1/dense_14_1/Cast/ReadVariableOp:0", "f"), node("Add", "f g", "y"),
    ]  # fmt: skip
    constants = {
        "functional_8_1/conv2d_1_1/convolution/ReadVariableOp:0": floats(8, 3, 3, 3), "b": floats(8), "axes": int64(2, 3),
        "functional_8_1/dense_14_1/Cast/ReadVariableOp:0": floats(8, 4), "g": floats(4),
    }  # fmt: skip
    return model(nodes, {"x": ["n", 15, 16, 3]}, ["y"], constants, **KERAS)


def keras_conv1d() -> onnx.ModelProto:
    """A Conv2d of lines, whose bias comes behind the squeeze."""
    nodes = [
        node("Unsqueeze", "x axis", "a"), node("Transpose", "a", "b", perm=[0, 3, 1, 2]),
        node("Conv", "b w", "c", dilations=[1, 1], strides=[1, 1], kernel_shape=[1, 3], pads=[0, 1, 0, 1], group=1),
        node("Squeeze", "c two", "d"), node("Add", "d bias", "e"), node("Relu", "e", "f"), node("GlobalMaxPool", "f", "g"),
        node("Squeeze", "g two", "y"),
    ]  # fmt: skip
    constants = {"axis": int64(-3), "w": floats(8, 3, 1, 3), "two": int64(2), "bias": floats(1, 8, 1)}
    return model(nodes, {"x": ["n", 20, 3]}, ["y"], constants, **KERAS)


def keras_embedding() -> onnx.ModelProto:
    """Tokens below zero count from the end, written as arithmetic."""
    nodes = [
        node("Add", "x size", "a"), node("Cast", "x", "b", to=1), node("Less", "b zero", "c"), node("Not", "c", "d"),
        node("Cast", "d", "e", to=7), node("Mul", "x e", "f"), node("Cast", "c", "g", to=7), node("Mul", "g a", "h"),
        node("Add", "h f", "i"),
        node("Gather", "functional_17_1/embedding_1/GatherV2/ReadVariableOp:0 i", "j", axis=0),
        node("ReduceMean", "j", "y", axes=[1], keepdims=0),
    ]  # fmt: skip
    constants = {
        "size": np.int64(20),
        "zero": np.float32(0),
        "functional_17_1/embedding_1/GatherV2/ReadVariableOp:0": floats(20, 8),
    }
    return model(nodes, {"x": ["n", 7]}, ["y"], constants, tokens=True, **KERAS)


def keras_layer_norm() -> onnx.ModelProto:
    nodes = [
        node("GlobalAveragePool", "x", "m"), node("Sub", "x m", "a"), node("Mul", "a a", "b"), node("GlobalAveragePool", "b", "v"),
        node("Add", "v eps", "c"), node("Sqrt", "c", "d"), node("Reciprocal", "d", "e"), node("Mul", "e gamma", "f"),
        node("Mul", "x f", "g"),
        node("Neg", "m", "h"), node("Mul", "h f", "i"), node("Add", "i beta", "j"), node("Add", "g j", "y"),
    ]  # fmt: skip
    return model(
        nodes,
        {"x": ["n", 6, 8]},
        ["y"],
        {"eps": np.float32(1e-3), "gamma": floats(1, 1, 8), "beta": floats(1, 1, 8)},
        **KERAS,
    )


def keras_upsampling() -> onnx.ModelProto:
    """UpSampling2D: tiles, and a shape that is cut and joined."""
    nodes = [
        node("Shape", "x", "s"), node("Cast", "s", "s32", to=6), node("Unsqueeze", "x two", "a"), node("Tile", "a times", "b"),
        node("Slice", "s32 two end zero", "c"), node("Slice", "s32 zero one zero", "d"), node("Concat", "d ten c", "e", axis=0),
        node("Cast", "e", "f", to=7), node("Reshape", "b f", "y"),
    ]  # fmt: skip
    constants = {"two": int64(2), "times": int64(1, 1, 2, 1, 1), "end": int64(2147483647), "zero": int64(0), "one": int64(1),
                 "ten": np.array([10], INT)}  # fmt: skip
    return model(nodes, {"x": ["n", 5, 5, 3]}, ["y"], constants, **KERAS)


def keras_prelu() -> onnx.ModelProto:
    nodes = [node("MatMul", "x w", "a"), node("Relu", "a", "b"), node("Neg", "a", "c"), node("Relu", "c", "d"),
    node("Mul", "d s", "e"),
             node("Add", "b e", "y")]  # fmt: skip
    return model(nodes, {"x": ["n", 8]}, ["y"], {"w": floats(8, 8), "s": floats(8)}, **KERAS)


def keras_lstm() -> onnx.ModelProto:
    """LSTM(return_sequences=True): time first, and a Squeeze of the direction."""
    nodes = [
        node("Transpose", "x", "a", perm=[1, 0, 2]), node("LSTM", "a W0__311 R__309 B0__312", "b c d",
             hidden_size=12, direction="forward"),
        node("Squeeze", "b one", "e"), node("Transpose", "e", "y", perm=[1, 0, 2]),
    ]  # fmt: skip
    constants = {"W0__311": floats(1, 48, 8), "R__309": floats(1, 48, 12), "B0__312": floats(1, 96), "one": int64(1)}
    return model(nodes, {"x": ["n", 7, 8]}, ["y"], constants, **KERAS)


def tf2onnx_flatten() -> onnx.ModelProto:
    """Opset 18: conv, norm merged into it, pooled, flattened channels last."""
    nodes = [
        node("Transpose", "x", "a", perm=[0, 3, 1, 2]),
        node("Conv", "a conv2d/convolution/merged_input:0", "b", kernel_shape=[3, 3], auto_pad="SAME_UPPER",
             strides=[1, 1], group=1),
        node("Relu", "b", "c"), node("MaxPool", "c", "d", strides=[2, 2], kernel_shape=[2, 2]),
        node("Transpose", "d", "e", perm=[0, 2, 3, 1]),
        node("Shape", "d", "f"), node("Gather", "f order", "g"), node("Cast", "g", "h", to=6),
        node("Slice", "h zero one zero", "i"),
        node("Concat", "i width", "j", axis=0), node("Cast", "j", "k", to=7), node("Reshape", "e k", "l"),
        node("MatMul", "l w", "m"),
        node("Softmax", "m", "y"),
    ]  # fmt: skip
    constants = {"conv2d/convolution/merged_input:0": floats(8, 3, 3, 3), "order": int64(0, 2, 3, 1), "zero": int64(0),
    "one": int64(1),
                 "width": np.array([128], INT), "w": floats(128, 10)}  # fmt: skip
    return model(nodes, {"x": ["n", 8, 8, 3]}, ["y"], constants, opset=18, producer="tf2onnx", version="1.17.0")


def paddle_mlp() -> onnx.ModelProto:
    nodes = [
        node("MatMul", "x linear_0.w_0", "p2o.pd_op.matmul.0.0"), node("Add", "p2o.pd_op.matmul.0.0 linear_0.b_0", "a"),
        node("Identity", "a", "b"), node("Identity", "b", "c"), node("Div", "c root", "d"), node("Erf", "d", "e"),
        node("Add", "e one", "f"),
        node("Mul", "c f", "g"), node("Mul", "g half", "h"),
        node("LayerNormalization", "h layer_norm_0.w_0 layer_norm_0.b_0", "i", axis=1, epsilon=1e-5),
        node("MatMul", "i linear_1.w_0", "j"), node("Add", "j linear_1.b_0", "k"), node("Identity", "k", "y"),
    ]  # fmt: skip
    constants = {"linear_0.w_0": floats(8, 16), "linear_0.b_0": floats(16), "root": np.float32(2**0.5), "one": np.float32(1),
                 "half": np.float32(0.5), "layer_norm_0.w_0": floats(16), "layer_norm_0.b_0": floats(16),
                 "linear_1.w_0": floats(16, 4),
                 "linear_1.b_0": floats(4)}  # fmt: skip
    return model(nodes, {"x": ["DynamicDimension.0", 8]}, ["y"], constants, opset=17)


def jax_mlp() -> onnx.ModelProto:
    nodes = [
        node("Gemm", "x const_0 const_1", "a", "node_Gemm_0", alpha=1.0, beta=1.0, transA=0, transB=0),
        node("Gelu", "a", "b", "node_Gelu_1", approximate="none"), node("ReduceMean", "b axes", "c", keepdims=1),
        node("Sub", "b c", "d"),
        node("Mul", "b b", "e"), node("ReduceMean", "e axes", "f", keepdims=1), node("Mul", "c c", "g"), node("Sub", "f g", "h"),
        node("Max", "h zero", "i"), node("Add", "i eps", "j"), node("Sqrt", "j", "k"), node("Div", "d k", "l"),
        node("Mul", "l const_2", "m"),
        node("Add", "m const_3", "n"), node("Gemm", "n const_4 const_5", "y", "node_Gemm_14",
             alpha=1.0, beta=1.0, transA=0, transB=0),
    ]  # fmt: skip
    constants = {"const_0": floats(8, 16), "const_1": floats(16), "axes": int64(1), "zero": np.float32(0), "eps": np.float32(1e-6),
                 "const_2": floats(16), "const_3": floats(16), "const_4": floats(16, 4), "const_5": floats(4)}  # fmt: skip
    return model(nodes, {"x": ["B", 8]}, ["y"], constants, opset=23, producer="jax2onnx", version="0.17.1")


MADE: dict[str, tuple[Any, tuple[int, ...], dict[str, type[nn.Module]]]] = {
    "keras_dense_of_sequences": (keras_dense_of_sequences, (2, 3, 8), {"dense_1": nn.Linear}),
    "keras_conv": (keras_conv, (2, 15, 16, 3), {"conv2d_1_1": nn.Conv2d, "dense_14_1": nn.Linear}),
    "keras_conv1d": (keras_conv1d, (2, 20, 3), {"conv2d": nn.Conv2d}),
    "keras_embedding": (keras_embedding, (2, 7), {"embedding_1": nn.Embedding}),
    "keras_layer_norm": (keras_layer_norm, (2, 6, 8), {}),
    "keras_upsampling": (keras_upsampling, (2, 5, 5, 3), {}),
    "keras_prelu": (keras_prelu, (3, 8), {"linear": nn.Linear}),
    "keras_lstm": (keras_lstm, (2, 7, 8), {"lstm": nn.LSTM}),
    "tf2onnx_flatten": (tf2onnx_flatten, (2, 8, 8, 3), {"conv2d": nn.Conv2d, "linear": nn.Linear}),
    "paddle_mlp": (paddle_mlp, (3, 8), {"linear_0": nn.Linear, "layer_norm_0": nn.LayerNorm, "linear_1": nn.Linear}),
    "jax_mlp": (jax_mlp, (3, 8), {"node_Gemm_0": nn.Linear, "node_Gelu_1": nn.GELU, "node_Gemm_14": nn.Linear}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MADE)
def test_what_becomes_of_it(tmp_path: Path, name: str) -> None:
    make, shape, layers = MADE[name]
    made = make()
    found = pc.from_onnx(written(tmp_path / "model.onnx", made))
    for batch in (shape[0], 5):  # of any size
        x = torch.randint(-20, 20, (batch, *shape[1:])) if "embedding" in name else torch.randn(batch, *shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(found(x), in_runtime(made, x)[0], rtol=1e-5, atol=1e-5)
    kinds = {one: type(module) for one, module in found.named_modules() if not module._modules and one}
    activations = (nn.ReLU, nn.GELU)
    kept = {one: kind for one, kind in kinds.items() if kind not in activations or one in layers}
    assert kept == layers


def test_a_dense_layer_of_sequences_is_one_product(tmp_path: Path) -> None:
    """With its bias and its activation, though both stand behind a reshape."""
    found = pc.from_onnx(written(tmp_path / "model.onnx", keras_dense_of_sequences()))
    made = pc.compress(found, pc.Int8())
    assert found.dense_1.bias is not None and pc.summary(made).layers[0].activation == "relu"
    x = torch.randn(4, 9, 8)
    with torch.no_grad():
        assert torch.cosine_similarity(made(x).flatten(), found(x).flatten(), dim=0) > 0.999


def test_the_exact_gelu_of_keras(tmp_path: Path) -> None:
    """Its file has an operator that ONNX does not have, though the exporter reports no error."""
    name = "functional_3_1/dense_6_1/Gelu/Erfc"
    made = model([node("Neg", "x", "a"), node("Erfc", "a", "y", name)], {"x": ["n", 8]}, ["y"], **KERAS)
    with pytest.raises(
        ValueError,
        match=rf"{name} \(Erfc, opset 15\): ONNX has no operator Erfc .* invalid, as tf2onnx 1.17.0 wrote it",
    ):
        pc.from_onnx(written(tmp_path / "model.onnx", made))


def test_the_gru_of_keras(tmp_path: Path) -> None:
    """GRU and SimpleRNN come as a Loop, which is refused."""
    name = "functional_19_1/gru_1/while_loop"
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])], "body", [], [helper.make_empty_tensor_value_info("d")]
    )
    made = model(
        [node("Loop", "count go", "y", name, body=body)],
        {"x": ["n", 8]},
        ["y"],
        {"count": np.int64(7), "go": np.bool_(1)},
        **KERAS,
    )
    with pytest.raises(
        NotImplementedError, match=rf"{name} \(Loop, opset 15\) is not imported: its attribute 'body' is a subgraph"
    ):
        pc.from_onnx(written(tmp_path / "model.onnx", made))
