"""What the tables of weights say of values: settings that are allowed, and tensors that are good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**126  # of an input: it and its inverse are normal in float32
MAX_IN_FEATURES = 65536  # int32 sums of products of int8 cannot overflow up to here
# A value, the shape (n, k), the settings that stand before it -> what was expected, or '' where the value is good.
Allowed = Callable[[object, tuple[int, int], Mapping[str, Any]], str]


def matrix_shape(kind: str, shape: tuple[int, ...], smallest: int = 1) -> tuple[int, int]:
    """(n, k), checked. Raises ValueError where it is no shape of a weight that a kernel takes; ``smallest``: of n and of k."""
    n, k = shape
    if type(n) is not int or type(k) is not int or n < smallest or not smallest <= k <= MAX_IN_FEATURES:
        rows = f"n > {smallest - 1}" if smallest else "n"
        raise ValueError(f"{kind}: the shape is [{n!r}, {k!r}], expected [{rows}, {smallest} to {MAX_IN_FEATURES}]")
    return n, k


# --- of settings ----------------------------------------------------------------------------------------------------------


def one_of(*values: object) -> Allowed:
    """One of these, of the same type: 8.0 and True are no 8."""
    if all(isinstance(value, str) for value in values):
        text = f"one of {', '.join(map(str, values))}"
    else:
        *most, last = map(repr, values)
        text = f"{', '.join(most)} or {last}" if most else last

    def allowed(value: object, _shape: tuple[int, int], _settings: Mapping[str, Any]) -> str:
        return "" if any(type(value) is type(known) and value == known for known in values) else text

    return allowed


def between(low: int, most: Callable[[int, int], int]) -> Allowed:
    """A whole number from ``low`` to what n and k make the most."""

    def allowed(value: object, shape: tuple[int, int], _settings: Mapping[str, Any]) -> str:
        high = most(*shape)
        return "" if type(value) is int and low <= value <= high else f"{low} to {high} for a weight {list(shape)}"

    return allowed


# --- of tensors: what is wrong with one of a name, or '' ------------------------------------------------------------------


def finite(name: str, tensor: Tensor, _weight: object = None) -> str:
    bad = int((~torch.isfinite(tensor)).sum())
    return f"{name} holds NaN or Inf, expected finite values: {bad} are not" if bad else ""


def positive(name: str, tensor: Tensor, _weight: object = None) -> str:
    good = bool(((tensor > 0) & torch.isfinite(tensor)).all())
    return "" if good else f"a {name} is not a positive finite number"


def invertible(name: str, tensor: Tensor, _weight: object = None) -> str:
    """Scales that are normal in float32, as what they are the inverse of is."""
    good = bool(((tensor >= SMALLEST_SCALE) & (tensor <= LARGEST_SCALE)).all())
    return "" if good else f"{name} is not between {SMALLEST_SCALE:g} and {LARGEST_SCALE:g}, as expected"


def symmetric(name: str, tensor: Tensor, top: int = 127) -> str:
    """Integers from -top to top."""
    extremes = (int(tensor.amin()), int(tensor.amax())) if tensor.numel() else ()
    bad = [value for value in extremes if abs(value) > top]
    return f"{name} holds {bad[0]}, expected [-{top}, {top}]" if bad else ""


def numbers(name: str, tensor: Tensor, _weight: object = None) -> str:
    """Finite floats, or int8 without -128."""
    return finite(name, tensor) if tensor.is_floating_point() else symmetric(name, tensor)
