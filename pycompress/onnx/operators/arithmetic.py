"""Operators that compute each number of their result of those in the same place."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pycompress.onnx.operators.operator import Row, Sizes, number


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Integers are divided as in C."""
    return a / b if torch.is_floating_point(a) else torch.div(a, b, rounding_mode="trunc")


def power(x: Tensor, exponent: Tensor) -> Tensor:
    """In the type of x."""
    return torch.pow(x, exponent).to(x.dtype)


def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The sign is that of b; of a with fmod."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def clip(x: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None) -> Tensor:  # noqa: A002
    """Where min is above max, max."""
    if not isinstance(min, Tensor) and not isinstance(max, Tensor):
        return x if min is None and max is None else torch.clamp(x, min, max)
    if min is not None:
        x = torch.maximum(x, torch.as_tensor(min, dtype=x.dtype, device=x.device))
    return x if max is None else torch.minimum(x, torch.as_tensor(max, dtype=x.dtype, device=x.device))


def smallest(*xs: Tensor) -> Tensor:
    return reduce(torch.minimum, xs)


def largest(*xs: Tensor) -> Tensor:
    return reduce(torch.maximum, xs)


def total(*xs: Tensor) -> Tensor:
    return reduce(torch.add, xs)


def mean(*xs: Tensor) -> Tensor:
    return reduce(torch.add, xs) / len(xs)


def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if detect_negative:
        found = found | (x == -torch.inf)
    return found | (x == torch.inf) if detect_positive else found


def bit_shift(x: Tensor, by: Tensor, *, direction: Literal["LEFT", "RIGHT"]) -> Tensor:
    # torch has shifts of few unsigned types
    wide = (x.to(torch.int64), by.to(torch.int64))
    return (torch.bitwise_left_shift(*wide) if direction == "LEFT" else torch.bitwise_right_shift(*wide)).to(x.dtype)


def cast(x: Tensor, *, to: torch.dtype) -> Tensor:
    return x.to(to)


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def cumulated(x: Tensor, axis: Sizes, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Sums along an axis; exclusive: without the number itself; reverse: from the end."""
    along = number(axis)
    turned = x.flip(along) if reverse else x
    sums = torch.cumsum(turned, along, dtype=x.dtype)
    if exclusive:
        sums = torch.cat(
            [torch.zeros_like(sums.narrow(along, 0, 1)), sums.narrow(along, 0, sums.shape[along] - 1)], along
        )
    return sums.flip(along) if reverse else sums


def einsum(*xs: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *xs)


# --- activations --------------------------------------------------------------------------------------------------------


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return functional.leaky_relu(x, alpha)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return functional.elu(x, alpha)


def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return functional.celu(x, alpha)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


def hard_swish(x: Tensor) -> Tensor:
    return x * torch.clamp(x / 6 + 0.5, 0, 1)


def gelu(x: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    return functional.gelu(x, approximate=approximate)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    inner = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, inner)).to(x.dtype)


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """1 where the first of the largest numbers along an axis is, 0 elsewhere."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


def flat_softmax(x: Tensor, *, axis: int = 1) -> Tensor:
    """Until opset 12: over all dimensions from this one on."""
    return torch.softmax(x.flatten(axis), -1).view(x.shape) if axis else torch.softmax(x.flatten(), -1).view(x.shape)


def flat_log_softmax(x: Tensor, *, axis: int = 1) -> Tensor:
    """Until opset 12: over all dimensions from this one on."""
    return torch.log(flat_softmax(x, axis=axis))


# Where one operand may stand in the code as a number, since Python's own operators take numbers.
PYTHON: dict[str, Row] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Equal": operator.eq, "Greater": operator.gt,
    "GreaterOrEqual": operator.ge, "Less": operator.lt, "LessOrEqual": operator.le,
}  # fmt: skip
ARITHMETIC: dict[str, Row] = {
    **PYTHON, "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "And": torch.logical_and, "Asin": torch.asin,
    "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh, "BitShift": bit_shift, "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor, "Cast": cast,
    "CastLike": cast_like, "Ceil": torch.ceil, "Celu": celu, "Clip": clip, "Cos": torch.cos, "Cosh": torch.cosh,
    "CumSum": cumulated, "Div": divide, "Einsum": einsum, "Elu": elu, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor,
    "Gelu": gelu, "HardSigmoid": hard_sigmoid, "HardSwish": hard_swish, "Hardmax": {13: hardmax}, "IsInf": is_inf,
    "IsNaN": torch.isnan, "LeakyRelu": leaky_relu, "Log": torch.log, "LogSoftmax": {1: flat_log_softmax, 13: log_softmax},
    "Max": largest, "Mean": mean, "Min": smallest, "Mish": functional.mish, "Mod": mod, "Neg": torch.neg,
    "Not": torch.logical_not, "Or": torch.logical_or, "PRelu": prelu, "Pow": power, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Selu": selu, "Shrink": shrink, "Sigmoid": torch.sigmoid, "Sign": torch.sign,
    "Sin": torch.sin, "Sinh": torch.sinh, "Softmax": {1: flat_softmax, 13: softmax}, "Softplus": functional.softplus,
    "Softsign": functional.softsign, "Sqrt": torch.sqrt, "Sum": total, "Swish": swish, "Tan": torch.tan, "Tanh": torch.tanh,
    "ThresholdedRelu": thresholded_relu, "Where": torch.where, "Xor": torch.logical_xor,
}  # fmt: skip
