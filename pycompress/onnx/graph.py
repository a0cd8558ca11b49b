"""``Graph``: an ONNX graph under construction, and what all lowerings build of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from pycompress.kinds.padded import Sides
from pycompress.kinds.walk import Walk
from pycompress.nn.layer import CompressedLayer
from pycompress.onnx.activation import ACTIVATIONS

OPSET = 20  # what torch.onnx.export writes by default; onnxruntime reads it since 1.17
BLOCKS_OPSET = 21  # the first with 4-bit integers, and with a DequantizeLinear that has a scale per block
_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # of torch's padding
MAX_WEIGHT_BYTES = 2**31 - 2**20  # of all weights together: a protobuf message ends at 2 GiB


class Graph:
    """A graph under construction. Most methods return the name of the value they add.

    Attributes:
        opset: raised by what needs a newer one.
        shown: the outputs besides y.
        taken: the inputs besides x.
        prefix: of the names of constants and of results without one, in a graph inside another.
    """

    def __init__(self, prefix: str = "") -> None:
        self.opset, self.prefix = OPSET, prefix
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

    def nibbles(self, name: str, values: npt.NDArray[np.uint8]) -> str:
        """Stores integers from 0 to 15 as uint4: two a byte, the earlier one in the low half, across the ends of rows. Raises as
        :meth:`weight` does."""
        self.opset = max(self.opset, BLOCKS_OPSET)
        _check_size(f"the weight {list(values.shape)} has", (values.size + 1) // 2)
        low, high = np.pad(values.reshape(-1), (0, values.size % 2)).reshape(-1, 2).T
        packed = (low | high << 4).tobytes()
        return self._stored(helper.make_tensor(name, TensorProto.UINT4, values.shape, packed, raw=True))

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
        """Applies a one-output operator of the standard domain."""
        output = output or f"{self.prefix}{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def matmul(self, x: str, name: str, weight: npt.NDArray[np.float32]) -> str:
        """x [m, k] . weight^T, the float32 weight [n, k] stored as [k, n] under this name."""
        return self.node("MatMul", x, self.weight(name, weight.T))

    def conv(
        self, x: str, name: str, weight: npt.NDArray[np.float32], geometry: Walk, bias: Tensor | None = None
    ) -> str:
        """The convolution of x with a float32 weight [n, channels, *kernel size], stored under this name."""
        x = self.filled(x, geometry)
        operands = [x, self.weight(name, weight), *([] if bias is None else [self.constant("bias", array(bias))])]
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
        return helper.make_model(proto, opset_imports=[opset], ir_version=ir_version, producer_name="pycompress")


def _check_size(what: str, n_bytes: int) -> None:
    if n_bytes > MAX_WEIGHT_BYTES:
        raise ValueError(f"lower: {what} {n_bytes} bytes, expected at most {MAX_WEIGHT_BYTES}")


def array(tensor: Tensor) -> npt.NDArray[np.float32]:
    """float32, in NumPy."""
    found: npt.NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return found


Lowering = Callable[[Graph, str, Any], str]  # (graph, x, layer) -> y, the names of values
