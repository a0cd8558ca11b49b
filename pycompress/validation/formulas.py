"""The third party: what a layer computes, in NumPy, and how far two computations of it may lie apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pycompress.nn.geometry import Conv2dGeometry
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.layer import CompressedLayer
from pycompress.nn.sparse import SparseLayer, SparseLinear

EXACT_ACTIVATIONS = ("none", "relu")
EPS = 2.0**-23  # of float32; one rounding moves a number by half of it
STEEPEST = 1.13  # no activation has a steeper slope: gelu reaches 1.129, silu 1.100

Array = npt.NDArray[Any]


def float32(x: Tensor) -> Array:
    """A dense copy or view in NumPy."""
    return np.ascontiguousarray(x.detach().float().cpu().numpy())


def sums_floats(layer: CompressedLayer) -> bool:
    """Whether the layer adds up floating-point products, so that its result depends on their order."""
    return isinstance(layer, SparseLayer) and layer.bits == 32


def numpy_int8_linear(x: Array, layer: Int8Linear | SparseLinear) -> tuple[Array, Array, Array]:
    """The int8 formula in NumPy, up to the activation.

    Args:
        x: float32 [m, k]. Rows with NaN or Inf quantize to zeros and go on as NaN.
        layer: gives the weight (int8), the scales and the bias.
    Returns:
        q uint8 [m, k]; acc int64 [m, n], summed in float64, which is exact: all sums stay below 2^31; and
        float32 [m, n], what goes into the activation.
    """
    weight = layer.canonical()
    assert weight.scale is not None
    integers = replace(weight, scale=torch.ones_like(weight.scale)).decompress()
    amax = np.float32(2 ** layer.settings["activation_bits"] - 1)
    half_amax, zero, one_half = amax / np.float32(2), np.float32(0), np.float32(0.5)
    finite = np.isfinite(x).all(axis=1, keepdims=True)
    x = np.where(finite, x, zero)
    with np.errstate(all="ignore"):
        low = np.minimum(x.min(axis=1, keepdims=True), zero)
        high = np.maximum(x.max(axis=1, keepdims=True), zero)
        half = one_half * high - one_half * low
        flat = half < np.float32(2.0**-100)
        scale = np.where(flat, zero, half / half_amax)
        inverse = np.where(flat, zero, half_amax / half)
        zero_point = np.clip(np.rint(-low * inverse), zero, amax)
        q = np.clip(np.rint(x * inverse) + zero_point, zero, amax)
        acc = ((q - zero_point).astype(np.float64) @ float32(integers).astype(np.float64).T).astype(np.int64)
        v = (acc.astype(np.float32) * scale) * float32(weight.scale)
        if layer.bias is not None:
            v = v + float32(layer.bias)
    return q.astype(np.uint8), acc, np.where(finite, v, np.float32(np.nan))


def activation_bound(v: Array, activation: str) -> Array:
    """How far two float32 evaluations of ``activation(v)`` may lie apart, elementwise: 0 for none and relu.

    For the others one evaluation errs by at most 8 u |v|, u = 2^-24, and two lie within 16 u |v|. All have
    the form v s with s in [0, 1], and s is 0.5 (1 + erf(v / sqrt 2)) or 1 / (1 + exp(-t)):

    - an implementation's erf is within 4 u, rounding its argument moves it by up to u, and the sum rounds by
      up to u, so half of it is within 3 u;
    - an argument t that is off by 8 u |t| moves s by at most 8 u |t| s (1 - s) < 1.8 u, and an exp off by 4 u
      of its value by 4 u s (1 - s) <= u.

    The sum, quotient and product that remain round by up to u |v| each: 6 u in all, and 8 u covers the rest.
    2^-126 allows for results below the normal range, which an implementation may round to 0. An infinite v
    leaves the result open (Inf, NaN or 0, by the order of the factors); a NaN leaves nothing open.
    """
    if activation in EXACT_ACTIVATIONS:
        return np.zeros(v.shape)
    magnitude = np.where(np.isnan(v), 0.0, np.abs(v.astype(np.float64)))
    return 2 * 8 * 2.0**-24 * magnitude + 2.0**-126


def patches(x: Array, geometry: Conv2dGeometry, outputs: Array) -> Array:
    """What the outputs of a convolution are made of: the rows of x with which it is a linear layer.

    Args:
        x: float32 [images, in_channels, height, width].
        outputs: int [m], counting the positions of y [images, out_channels, its height, its width] over the channels
            that lie there.
    Returns:
        float32 [m, k], in the order of the weight.
    """
    top, bottom, left, right = geometry.sides
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = [step * (size - 1) + 1 for step, size in zip(geometry.dilation, geometry.kernel_size, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    steps = [slice(None, None, step) for step in (*geometry.stride, *geometry.dilation)]
    windows = windows[(slice(None), slice(None), *steps)].transpose(0, 2, 3, 1, 4, 5)
    found: Array = windows[np.unravel_index(outputs, windows.shape[:3])].reshape(len(outputs), -1)
    return found


def numpy_sparse_linear(x: Array, layer: SparseLayer) -> tuple[Array, Array, Array]:
    """A layer with float32 weights in float64, activation included, and what float32 may make of it.

    NaN and Inf in x count where there is a weight for them: zeros are not multiplied.

    Args:
        x: float32 [m, k]; for a convolution its :func:`patches`.
        layer: gives the weight and the bias.
    Returns:
        float64 [m, n], all three: y; how far the layer's own y may lie from it; how far that of a runtime that
        multiplies the zeros too. The last is Inf, which says nothing, for rows of x with NaN or Inf.
    """
    weight = float32(layer.canonical().decompress()).astype(np.float64)
    bias = 0.0 if layer.bias is None else float32(layer.bias).astype(np.float64)
    finite = np.isfinite(x)
    clean = np.where(finite, x, 0).astype(np.float64)
    v, size = clean @ weight.T + bias, np.abs(clean) @ np.abs(weight).T + np.abs(bias)
    own, runtime = _sum_bound(v, size, np.count_nonzero(weight, axis=1)), _sum_bound(v, size, weight.shape[1])
    broken = ~finite.all(axis=1)
    if broken.any():
        runtime[broken] = np.inf
        v[broken] += _nonfinite(x[broken], weight)
    rounding = activation_bound(v, layer.activation) / 2
    slope = 1.0 if layer.activation in EXACT_ACTIVATIONS else STEEPEST
    y = _ACTIVATIONS[layer.activation](torch.from_numpy(v)).numpy()
    return y, slope * own + rounding, slope * runtime + rounding


def _sum_bound(v: Array, size: Array, products: Array | int) -> Array:
    """How far a float32 sum of so many products, plus a bias, may lie from the exact v, in whatever order it is taken.

    A product meets at most ``products`` roundings, its own included, so with u = EPS / 2 the sum errs by at most
    products u / (1 - products u) of ``size``, the sum of the absolute products: less than products EPS for up to
    2^23 of them. A subnormal result is off by up to 2^-150 instead. The bias adds one rounding. Where ``size`` does
    not fit float32 the sum may overflow on its way, and nothing is certain.
    """
    bound = EPS * (products + 2) * size + EPS * np.abs(v) + (products + 2) * 2.0**-149
    return np.where(size < float(np.finfo(np.float32).max), bound, np.inf)


def _nonfinite(x: Array, weight: Array) -> Array:
    """What the NaN and Inf of x [m, k] add to each output: NaN, Inf, -Inf or 0, float64 [m, n]."""

    def meets(where: Array, weights: Array) -> Array:
        return where.astype(np.float32) @ weights.astype(np.float32).T > 0

    up = meets(x == np.inf, weight > 0) | meets(x == -np.inf, weight < 0)
    down = meets(x == np.inf, weight < 0) | meets(x == -np.inf, weight > 0)
    undefined = meets(np.isnan(x), weight != 0) | (up & down)
    return np.where(undefined, np.nan, np.where(up, np.inf, np.where(down, -np.inf, 0.0)))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
    "silu": nn.functional.silu,
}
