"""``Graph``: an ONNX graph under construction, and what all lowerings build of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from pycompress.kinds.padded import Sides
from pycompress.kinds.walk import Walk
from pycompress.nn.layer import CompressedLayer
from pycompress.onnx.activation import ACTIVATIONS
from pycompress.weights.sparse import nonzero

OPSET = 20  # what torch.onnx.export writes by default; onnxruntime reads it since 1.17
BLOCKS_OPSET = 21  # the first with 4-bit integers, and with a DequantizeLinear that has a scale per block
KERNELS_DOMAIN, KERNELS_VERSION = "pycompress", 1  # of our own ops (pycompress/onnx/kernels.py)
_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # of torch's padding
LEAST_SAVED = 2**12  # bytes for which a weight is stored without its zeros, twice what the nodes take that put them in
MAX_WEIGHT_BYTES = 2**31 - 2**20  # of all weights together: a protobuf message ends at 2 GiB


class Graph:
    """A graph under construction. Most methods return the name of the value they add.

    Attributes:
        opset: raised by what needs a newer one.
        unsigned: int8 weights are stored as uint8, 128 more, which is their zero point: for weights that several nodes multiply
            with. ONNX Runtime makes that of int8 weights itself (see :func:`session`), but fails at the second node.
        shown: the outputs besides y.
        taken: the inputs besides x.
        prefix: of the names of constants and of results without one, in a graph inside another.
    """

    def __init__(self, prefix: str = "", *, unsigned: bool = False) -> None:
        self.opset, self.prefix, self.unsigned = OPSET, prefix, unsigned
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.n_bytes = 0  # of these
        self.shown: list[onnx.ValueInfoProto] = []
        self.taken: list[onnx.ValueInfoProto] = []

    def show(self, name: str, dtype: int, *size: str | int) -> None:
        """Makes a value an output; a string stands for any size."""
        self.shown.append(helper.make_tensor_value_info(name, dtype, list(size)))

    def take(self, name: str, dtype: int, *size: str | int) -> str:
        """Makes a value an input; a string stands for any size."""
        self.taken.append(helper.make_tensor_value_info(name, dtype, list(size)))
        return name

    def constant(self, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        """Stores the value as an initializer; one of this name and value serves again.

        Raises:
            ValueError: there is another one of this name.
        """
        return self._stored(numpy_helper.from_array(np.asarray(value, dtype, order="C"), self.prefix + name))

    def weight(self, name: str, values: npt.NDArray[Any]) -> str:
        """Stores a weight. Raises ValueError where it is larger than a file can be."""
        _check_size(f"the weight {list(values.shape)} has", values.nbytes)
        return self.constant(name, values, values.dtype)

    def part(self, name: str, tensor: Tensor) -> str:
        """Stores a tensor of a canonical weight as it is. Raises as :meth:`weight` does."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype != torch.bfloat16:  # (which NumPy does not have)
            return self.weight(name, tensor.numpy())
        _check_size(f"the weight {list(tensor.shape)} has", tensor.nbytes)
        raw = tensor.view(torch.int16).numpy().astype("<i2").tobytes()
        return self._stored(helper.make_tensor(self.prefix + name, TensorProto.BFLOAT16, tensor.shape, raw, raw=True))

    def matrix(self, name: str, values: npt.NDArray[Any]) -> str:
        """Stores a weight, float32 or int8 [n, k], and gives the name of its transpose [k, n]: stored as it is, or, where that is
        smaller, without its zeros. int8 goes with :meth:`zero_points`. Raises as :meth:`weight` does."""
        return self._without_zeros(name, values) or self.weight(name, self._signless(values).T)

    def kernels(self, name: str, values: npt.NDArray[Any]) -> str:
        """As :meth:`matrix`, for the weight of a convolution [n, channels, *kernel size], which it gives as it is."""
        stored = self._without_zeros(name, values.reshape(len(values), -1))
        if not stored:
            return self.weight(name, self._signless(values))
        shape = self.constant(f"{name}_shape", values.shape, np.int64)
        return self.node("Reshape", self.node("Transpose", stored, perm=[1, 0]), shape)

    def zero_points(self, *shape: int, prefix: str = "") -> str:
        """The zero points of int8 weights."""
        zeros = self._signless(np.zeros(shape, np.int8))
        return self.constant(f"{prefix}zero_point", zeros, zeros.dtype)

    def _signless(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values.view(np.uint8) ^ np.uint8(128) if self.unsigned and values.dtype == np.int8 else values

    def _without_zeros(self, name: str, values: npt.NDArray[Any]) -> str:
        """A matrix [n, k] as the bits of what is there and those values row after row, from which the graph makes [k, n], what a
        runtime does once when it loads the file; '' where nothing is saved."""
        there = nonzero(values)
        mask = np.packbits(there, axis=1, bitorder="little")
        kept = self._signless(np.concatenate([np.zeros(1, values.dtype), values[there]]))
        if values.nbytes - mask.nbytes - kept.nbytes < LEAST_SAVED or values.size >= 2**31:  # (places are int32)
            return ""
        n, k = values.shape
        bits = self.node(
            "BitwiseAnd",
            self.weight(f"{name}_mask", mask[:, :, None]),
            self.constant("bits", 2 ** np.arange(8), np.uint8),
        )
        bits = self.node("Cast", bits, to=TensorProto.BOOL)
        bits = self.node("Reshape", bits, self.constant(f"{name}_padded", [n, mask.shape[1] * 8], np.int64))
        bits = self.node("Transpose", bits, perm=[1, 0])
        first, rows = self.constant("first", 0, np.int64), self.constant("first_axis", [0], np.int64)
        if k % 8:
            bits = self.node("Slice", bits, rows, self.constant(f"{name}_end", [k], np.int64), rows)
        # Where each value lies: behind those of its row's earlier columns, and of all earlier rows. Number 0 is a zero.
        counts = self.node("Cast", bits, to=TensorProto.INT32)
        sums = self.node("ReduceSum", counts, rows, keepdims=0)
        before = self.node("CumSum", sums, first, exclusive=1)
        place = self.node("Add", self.node("CumSum", counts, first), before)
        place = self.node("Where", bits, place, self.constant("no_place", 0, np.int32))
        return self.node("Gather", self.weight(f"{name}_values", kept), place)

    def nibbles(self, name: str, values: npt.NDArray[np.uint8], *, signed: bool = False) -> str:
        """Stores integers from 0 to 15 as uint4: two a byte, the earlier one in the low half, across the ends of rows. ``signed``:
        as int4, of which they are the bits. Raises as :meth:`weight` does."""
        self.opset = max(self.opset, BLOCKS_OPSET)
        _check_size(f"the weight {list(values.shape)} has", (values.size + 1) // 2)
        low, high = np.pad(values.reshape(-1), (0, values.size % 2)).reshape(-1, 2).T
        packed, kind = (low | high << 4).tobytes(), TensorProto.INT4 if signed else TensorProto.UINT4
        return self._stored(helper.make_tensor(name, kind, values.shape, packed, raw=True))

    def _stored(self, tensor: onnx.TensorProto) -> str:
        known = next((other for other in self.initializers if other.name == tensor.name), None)
        if known is None:
            self.initializers.append(tensor)
            self.n_bytes += len(tensor.raw_data)
            _check_size(f"the {len(self.initializers)} constants have together", self.n_bytes)
        elif known != tensor:
            raise ValueError(f"lower: the graph has another constant {tensor.name}")
        return str(tensor.name)

    def node(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Applies a one-output operator, of the standard domain where ``domain`` names no other."""
        output = output or f"{self.prefix}{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def matmul(self, x: str, name: str, weight: npt.NDArray[np.float32]) -> str:
        """x [..., k] . weight^T, the float32 weight [n, k] stored under this name as :meth:`matrix` does."""
        return self.node("MatMul", x, self.matrix(name, weight))

    def conv(
        self, x: str, name: str, weight: npt.NDArray[np.float32], geometry: Walk, bias: Tensor | None = None
    ) -> str:
        """The convolution of x with a float32 weight [n, channels, *kernel size], stored under this name."""
        operands = [x, self.kernels(name, weight), *([] if bias is None else [self.constant("bias", array(bias))])]
        return self.convolved(operands, geometry)

    def convolved(self, operands: Sequence[str], geometry: Walk) -> str:
        """Conv of x, a weight and, it may be, a bias."""
        operands = [self.filled(operands[0], geometry), *operands[1:]]
        return self.node(
            "Conv", *operands, kernel_shape=geometry.kernel_size, strides=geometry.stride,
            pads=[*geometry.sides[::2], *geometry.sides[1::2]], dilations=geometry.dilation, group=geometry.groups,
        )  # fmt: skip

    def filled(self, x: str, geometry: Walk) -> str:
        """x [images, channels, *sizes] with what repeats its own values around it."""
        if not any(geometry.repeated):
            return x
        return self.node("Pad", x, self.sides("repeated", geometry.repeated), mode=_MODES[geometry.padding_mode])

    def sides(self, name: str, sides: Sides) -> str:
        """What lies around images, as Pad takes it."""
        return self.constant(name, [0, 0, *sides[::2], 0, 0, *sides[1::2]], np.int64)

    def bias(self, v: str, layer: CompressedLayer) -> str:
        """Adds the bias of a layer to v [m, n]."""
        return v if layer.bias32 is None else self.node("Add", v, self.constant("bias", array(layer.bias32)[None, :]))

    def activation(self, v: str, layer: CompressedLayer) -> str:
        """Applies the activation of a layer."""
        return ACTIVATIONS[layer.activation](self, v)

    def model(self, layer: CompressedLayer) -> onnx.ModelProto:
        """The finished model: x to y, as large as the layer's kind has them, and what is shown."""
        sizes = layer.kind.sizes(layer.n, layer.k, layer.geometry)
        x = helper.make_tensor_value_info("x", TensorProto.INT64 if layer.kind.tokens else TensorProto.FLOAT, sizes[0])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes[1])
        proto = helper.make_graph(self.nodes, layer.kind.name, [x, *self.taken], [y, *self.shown], self.initializers)
        opset = helper.make_opsetid("", self.opset)
        # The oldest file version that holds this opset, so that older runtimes read it too.
        ir_version = helper.find_min_ir_version_for([opset])
        ours = [helper.make_opsetid(KERNELS_DOMAIN, KERNELS_VERSION)] * any(one.domain for one in self.nodes)
        return helper.make_model(proto, opset_imports=[opset, *ours], ir_version=ir_version, producer_name="pycompress")


def _check_size(what: str, n_bytes: int) -> None:
    if n_bytes > MAX_WEIGHT_BYTES:
        raise ValueError(f"lower: {what} {n_bytes} bytes, expected at most {MAX_WEIGHT_BYTES}")


def array(tensor: Tensor) -> npt.NDArray[np.float32]:
    """float32, in NumPy."""
    found: npt.NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return found


Lowering = Callable[[Graph, str, Any], str]  # (graph, x, layer) -> y, the names of values
