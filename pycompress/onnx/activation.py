"""The activations that the kernels fuse, in ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pycompress.onnx.graph import Graph


def _relu(graph: Graph, v: str) -> str:
    return graph.node("Relu", v)


def _gelu(graph: Graph, v: str) -> str:
    """0.5 v (1 + erf(v / sqrt 2))"""
    erf = graph.node("Erf", graph.node("Mul", v, graph.constant("sqrt_half", 0.5**0.5)))
    half_v = graph.node("Mul", v, graph.constant("gelu_half", 0.5))
    return graph.node("Mul", half_v, graph.node("Add", erf, graph.constant("gelu_one", 1.0)))


def _gelu_tanh(graph: Graph, v: str) -> str:
    """0.5 v (1 + tanh u) = v sigmoid(2u), u = sqrt(2 / pi) (v + 0.044715 v^3)"""
    cube = graph.node("Mul", graph.node("Mul", v, v), v)
    inner = graph.node("Add", v, graph.node("Mul", cube, graph.constant("cube_factor", 0.044715)))
    return _times_sigmoid(graph, v, graph.node("Mul", inner, graph.constant("twice_sqrt", 2 * (2 / np.pi) ** 0.5)))


def _silu(graph: Graph, v: str) -> str:
    return _times_sigmoid(graph, v, v)


def _quick_gelu(graph: Graph, v: str) -> str:
    return _times_sigmoid(graph, v, graph.node("Mul", v, graph.constant("quick_factor", 1.702)))


def _relu6(graph: Graph, v: str) -> str:
    return graph.node("Clip", v, graph.constant("clip_low", 0.0), graph.constant("clip_high", 6.0))


def _hardswish(graph: Graph, v: str) -> str:
    """v min(max(v + 3, 0), 6) / 6 in the kernels' steps: ``HardSwish`` multiplies by a sixth, which rounds otherwise."""
    inner = _relu6(graph, graph.node("Add", v, graph.constant("hardswish_shift", 3.0)))
    return graph.node("Div", graph.node("Mul", v, inner), graph.constant("clip_high", 6.0))


def _times_sigmoid(graph: Graph, v: str, s: str) -> str:
    """v sigmoid(s) = v / (1 + exp(-s)). ONNX Runtime's Sigmoid stops at 1e-8, this goes on to 0."""
    exp = graph.node("Exp", graph.node("Neg", s))
    return graph.node("Div", v, graph.node("Add", exp, graph.constant("sigmoid_one", 1.0)))


ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "none": lambda _graph, v: v,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "quick_gelu": _quick_gelu,
    "relu6": _relu6,
    "hardswish": _hardswish,
}
