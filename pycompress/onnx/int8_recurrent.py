"""int8 LSTMs and GRUs in ONNX operators: their steps are those of a Scan, their gates are computed as the kernels do it."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from pycompress.nn.int8_recurrent import Int8Recurrent
from pycompress.onnx.graph import Graph, array
from pycompress.onnx.int8 import int8_product, integers, poisoned
from pycompress.weights import Int8Weight
from pycompress.weights.recurrent import Matrix

FLOAT = TensorProto.FLOAT


def lower_int8_recurrent(graph: Graph, x: str, layer: Int8Recurrent) -> str:
    """x float32 [steps, batch, input_size], whatever ``batch_first`` says, and the first states ``h_0`` and, of an LSTM, ``c_0``,
    [layers * directions, batch, hidden_size] -> y float32 [steps, batch, directions * hidden_size].

    Shown besides are the last states ``h_n`` and ``c_n``; and of each matrix q and acc (``ih_l0_q`` uint8 [steps * batch, k],
    ``hh_l0_acc`` int32 [steps, batch, n] and so on).

    A dynamic quantization of every step is in no LSTM operator of ONNX, so a layer and direction is one product of all steps and
    a Scan over them. Every float32 step is an operator of its own in the layer's order, the exponential too: y, the states and the
    integers are the layer's to the bit. Where speed counts more, a runtime's own operators are faster.
    """
    geometry, weight, bias = layer.geometry, layer.canonical(), layer.bias32
    shape = geometry.num_layers * geometry.directions, "batch", geometry.hidden_size
    states = ["h", "c"] if layer.kind.cell == "lstm" else ["h"]
    first = {name: graph.take(f"{name}_0", FLOAT, *shape) for name in states}
    last: dict[str, list[str]] = {name: [] for name in states}
    of = weight.matrices
    for i in range(geometry.num_layers):
        outputs = []
        for direction in range(geometry.directions):
            at = i * geometry.directions + direction
            pair = [
                _Product(matrix, weight[matrix.name], None if bias is None else array(bias[matrix.rows]))
                for matrix in of[2 * at : 2 * at + 2]
            ]
            index = graph.constant(f"state_{at}", at, np.int64)
            began = [graph.node("Gather", one, index, axis=0) for one in first.values()]
            ended, y = _direction(graph, x, layer, pair, began, direction == 1)
            outputs.append(y)
            for name, one in zip(states, ended, strict=True):
                last[name].append(graph.node("Unsqueeze", one, graph.constant("front", [0], np.int64)))
        x = outputs[0] if len(outputs) == 1 else graph.node("Concat", *outputs, axis=2)
    for name in states:
        graph.show(graph.node("Concat", *last[name], output=f"{name}_n", axis=0), FLOAT, *shape)
    return x


class _Product:
    """The product with one matrix, and its bias."""

    def __init__(self, matrix: Matrix, weight: Int8Weight, bias: np.ndarray | None) -> None:
        self.prefix, self.n, self.weight, self.bias = f"{matrix.name}_", matrix.n, weight, bias

    def __call__(self, graph: Graph, x: str) -> str:
        """x float32 [m, k] -> float32 [m, n]."""
        v, broken = int8_product(graph, x, *integers(self.weight), self.prefix)
        if self.bias is not None:
            v = graph.node("Add", v, graph.constant(f"{self.prefix}bias", self.bias[None, :]))
        return poisoned(graph, v, broken)


def _direction(
    graph: Graph, x: str, layer: Int8Recurrent, pair: list[_Product], began: list[str], reverse: bool
) -> tuple[list[str], str]:
    """One layer and direction: the last states, and y [steps, batch, hidden_size]."""
    of_input, of_hidden = pair
    width = graph.constant(f"{of_input.prefix}width", [of_input.weight.shape[1]], np.int64)
    rows = graph.node("Concat", graph.constant("any", [-1], np.int64), width, axis=0)
    gates = of_input(graph, graph.node("Reshape", x, rows))
    lead = graph.node("Shape", x, start=0, end=2)
    whole = graph.node("Concat", lead, graph.constant(f"{of_input.prefix}gates", [of_input.n], np.int64), axis=0)
    gates = graph.node("Reshape", gates, whole)

    size, prefix = layer.geometry.hidden_size, of_hidden.prefix
    body = Graph(f"{prefix}step_")
    names = [f"{prefix}{name}" for name in ("h", "c")][: len(began)]
    steps = _lstm if len(began) == 2 else _gru
    after = steps(body, f"{prefix}gx", of_hidden(body, names[0]), names, size)
    ended = [body.node("Identity", one, output=f"{name}_next") for one, name in zip(after, names, strict=True)]
    y = body.node("Identity", ended[0], output=f"{prefix}y_step")
    given = [helper.make_tensor_value_info(name, FLOAT, ["batch", size]) for name in names]
    given.append(helper.make_tensor_value_info(f"{prefix}gx", FLOAT, ["batch", of_hidden.n]))
    made = [helper.make_tensor_value_info(name, FLOAT, ["batch", size]) for name in (*ended, y)]
    shown = [one.name for one in body.shown]
    for one in body.shown:  # of each step; of all steps together they have these names
        for node in body.nodes:
            node.output[:] = [f"{name}_step" if name == one.name else name for name in node.output]
            node.input[:] = [f"{name}_step" if name == one.name else name for name in node.input]
        kind = one.type.tensor_type
        columns = kind.shape.dim[1].dim_value
        made.append(helper.make_tensor_value_info(f"{one.name}_step", kind.elem_type, ["batch", columns]))
        graph.show(one.name, kind.elem_type, "steps", "batch", columns)
    graph.nodes.append(
        helper.make_node(
            "Scan", [*began, gates], [*(f"{name}_last" for name in names), f"{prefix}y", *shown],
            body=helper.make_graph(body.nodes, f"{prefix}step", given, made, body.initializers), num_scan_inputs=1,
            scan_input_directions=[int(reverse)], scan_output_directions=[int(reverse)] * (1 + len(shown)),
        )
    )  # fmt: skip
    return [f"{name}_last" for name in names], f"{prefix}y"


# --- the gates, as csrc/recurrent/gates.h and csrc/common/activation.h have them -------------------------------------------


def _lstm(graph: Graph, gx: str, gh: str, states: list[str], size: int) -> list[str]:
    u = graph.node("Add", gx, gh)
    i, f, _, o = _split(graph, _sigmoid(graph, u), 4, size)
    _, _, g, _ = _split(graph, u, 4, size)
    c = graph.node("Add", graph.node("Mul", f, states[1]), graph.node("Mul", i, _tanh(graph, g)))
    return [graph.node("Mul", o, _tanh(graph, c)), c]


def _gru(graph: Graph, gx: str, gh: str, states: list[str], size: int) -> list[str]:
    r, z, _ = _split(graph, _sigmoid(graph, graph.node("Add", gx, gh)), 3, size)
    (_, _, x), (_, _, hidden) = _split(graph, gx, 3, size), _split(graph, gh, 3, size)
    n = _tanh(graph, graph.node("Add", x, graph.node("Mul", r, hidden)))
    return [graph.node("Add", graph.node("Mul", graph.node("Sub", states[0], n), z), n)]


def _split(graph: Graph, x: str, count: int, size: int) -> list[str]:
    names = [f"{graph.prefix}split_{len(graph.nodes)}_{i}" for i in range(count)]
    sizes = graph.constant("sizes", [size] * count, np.int64)
    graph.nodes.append(helper.make_node("Split", [x, sizes], names, axis=1))
    return names


def _bounded(graph: Graph, u: str) -> tuple[str, str]:
    """u between -128 and 128, 0 where it is NaN; and where it is."""
    broken = graph.node("IsNaN", u)
    clean = graph.node("Where", broken, graph.constant("zero", 0.0), u)
    return graph.node("Clip", clean, graph.constant("least", -128.0), graph.constant("most", 128.0)), broken


def _exp_negative(graph: Graph, x: str) -> str:
    def number(value: float | np.float32) -> str:
        return graph.constant(f"number_{np.float32(value)!s}", value)

    floor, magic = number(-87.0), number(1.5 * 2**23)
    above = graph.node("Less", floor, x)
    clamped = graph.node("Where", above, x, floor)
    n = graph.node("Sub", graph.node("Add", graph.node("Mul", clamped, number(1.44269504)), magic), magic)
    r = graph.node("Sub", clamped, graph.node("Mul", n, number(0.693359375)))
    r = graph.node("Sub", r, graph.node("Mul", n, number(-2.12194440e-4)))
    p = number(np.float32(1) / np.float32(5040))
    for factorial in (720, 120, 24, 6, 2):
        p = graph.node("Add", graph.node("Mul", p, r), number(np.float32(1) / np.float32(factorial)))
    p = graph.node("Add", graph.node("Mul", graph.node("Mul", p, r), r), r)
    p = graph.node("Add", p, number(1.0))
    powers = graph.constant("powers", np.ldexp(np.float32(1), np.arange(-126, 1)))
    place = graph.node("Cast", graph.node("Add", n, number(126.0)), to=TensorProto.INT64)
    exact = graph.node("Mul", p, graph.node("Gather", powers, place, axis=0))
    return graph.node("Where", above, exact, graph.constant("zero", 0.0))


def _sigmoid(graph: Graph, u: str) -> str:
    v, broken = _bounded(graph, u)
    one = graph.constant("one", 1.0)
    e = _exp_negative(graph, graph.node("Neg", graph.node("Abs", v)))
    positive = graph.node("Div", one, graph.node("Add", one, e))
    below = graph.node("Less", v, graph.constant("zero", 0.0))
    return poisoned(graph, graph.node("Where", below, graph.node("Mul", positive, e), positive), broken)


def _tanh(graph: Graph, u: str) -> str:
    v, broken = _bounded(graph, u)
    one, zero = graph.constant("one", 1.0), graph.constant("zero", 0.0)
    twice = graph.node("Mul", graph.node("Neg", graph.node("Abs", v)), graph.constant("two", 2.0))
    e = _exp_negative(graph, twice)
    positive = graph.node("Div", graph.node("Sub", one, e), graph.node("Add", one, e))
    negative = graph.node("Sub", zero, positive)
    return poisoned(graph, graph.node("Where", graph.node("Less", v, zero), negative, positive), broken)
