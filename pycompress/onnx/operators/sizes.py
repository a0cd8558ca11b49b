"""Arithmetic on shapes: what ONNX computes of them as tensors is done on Python's integers here, one number or a tuple.

So the code of an imported model reads ``x.reshape(batch, length, 4, 8)``, and torch.compile and torch.export follow it with sizes
that may change.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

Ints = int | tuple[int, ...]


def _each(function: Callable[..., int], *operands: Ints) -> Ints:
    """Broadcast as tensors of up to one dimension are. Raises ValueError where the lengths do not go together."""
    lengths = [len(one) for one in operands if isinstance(one, Sequence)]
    if not lengths:
        return function(*operands)
    long = max(lengths)
    rows = [(one,) * long if isinstance(one, int) or not isinstance(one, Sequence) else one for one in operands]
    rows = [row * long if len(row) == 1 else row for row in rows]
    return tuple(function(*column) for column in zip(*rows, strict=True))


def add(a: Ints, b: Ints) -> Ints:
    return _each(operator.add, a, b)


def subtract(a: Ints, b: Ints) -> Ints:
    return _each(operator.sub, a, b)


def multiply(a: Ints, b: Ints) -> Ints:
    return _each(operator.mul, a, b)


def divide(a: Ints, b: Ints) -> Ints:
    """As in C."""
    return _each(lambda a, b: a // b if (a >= 0) == (b > 0) else -(-a // b), a, b)


def mod(a: Ints, b: Ints) -> Ints:
    return _each(operator.mod, a, b)


def smallest(*xs: Ints) -> Ints:
    return _each(min, *xs) if len(xs) > 1 else xs[0]


def largest(*xs: Ints) -> Ints:
    return _each(max, *xs) if len(xs) > 1 else xs[0]


def negative(x: Ints) -> Ints:
    return _each(operator.neg, x)


def equal(a: Ints, b: Ints) -> Ints:
    return _each(operator.eq, a, b)


def greater(a: Ints, b: Ints) -> Ints:
    return _each(operator.gt, a, b)


def less(a: Ints, b: Ints) -> Ints:
    return _each(operator.lt, a, b)


def where(condition: Ints, a: Ints, b: Ints) -> Ints:
    return _each(lambda chosen, a, b: a if chosen else b, condition, a, b)


def joined(*xs: Ints) -> Ints:
    return tuple(size for one in xs for size in (one if isinstance(one, Sequence) else (one,)))


def gather(sizes: tuple[int, ...], indices: Ints) -> Ints:
    return _each(lambda i: sizes[i], indices)


def product(sizes: tuple[int, ...]) -> int:
    return math.prod(sizes)


def as_one(sizes: Ints) -> int:
    """The number of a tuple of one. Raises ValueError where there are more."""
    if not isinstance(sizes, Sequence):
        return sizes
    (one,) = sizes
    return one


def as_tuple(size: Ints) -> tuple[int, ...]:
    return tuple(size) if isinstance(size, Sequence) else (size,)


# Of these operators, with operands that are all sizes or constant integers; those with axes stand in the importer.
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": add, "Sub": subtract, "Mul": multiply, "Div": divide, "Mod": mod, "Min": smallest, "Max": largest, "Neg": negative,
    "Equal": equal, "Greater": greater, "Less": less, "Where": where,
}  # fmt: skip
