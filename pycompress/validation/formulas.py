"""The third party: what a layer computes, in NumPy, and how far two computations of it may lie apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pycompress import ops
from pycompress.nn.factors import FactorsLayer
from pycompress.nn.int4 import Int4Linear
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.int8_conv import Int8Conv2d
from pycompress.nn.int8_recurrent import Int8Recurrent
from pycompress.nn.layer import CompressedLayer
from pycompress.nn.low_rank import LowRankLinear
from pycompress.nn.low_rank_conv import LowRankConv2d
from pycompress.nn.low_rank_embedding import LowRankEmbedding
from pycompress.nn.sparse import SparseLayer, SparseLinear
from pycompress.weights import Int4Weight, Int8Weight, LowRankWeight, SparseWeight, Weight
from pycompress.weights.low_rank_conv import composed
from pycompress.weights.recurrent import Matrix

UNROUNDED_ACTIVATIONS = ("none", "relu", "relu6")  # they choose among numbers that are there
EXACT_ACTIVATIONS = (*UNROUNDED_ACTIVATIONS, "hardswish")  # in float32 steps that give everybody the same bits
EPS = 2.0**-23  # of float32; one rounding moves a number by half of it
STEEPEST = {"none": 1.0, "relu": 1.0, "relu6": 1.0, "hardswish": 1.5}  # slopes
STEEPEST_SMOOTH = 1.13  # of the others: gelu reaches 1.129, silu 1.100

Array = npt.NDArray[Any]


def float32(x: Tensor) -> Array:
    """A dense copy or view in NumPy."""
    return np.ascontiguousarray(x.detach().float().cpu().numpy())


def float64(x: Tensor) -> Array:
    """A dense copy in NumPy."""
    return float32(x).astype(np.float64)


def _bias(layer: CompressedLayer) -> Array | float:
    """float64 [n], or 0."""
    return 0.0 if layer.bias32 is None else float64(layer.bias32)


def array(x: Tensor) -> Array:
    """What ONNX Runtime and NumPy are given of an input: float32, or int64 of tokens."""
    return float32(x) if x.is_floating_point() else x.long().cpu().numpy()


def sums_floats(layer: CompressedLayer) -> bool:
    """Whether a layer of quantized or low-rank weights adds up floating-point products: its result depends on their order then."""
    if not isinstance(layer, LowRankLinear):
        return isinstance(layer, Int4Linear)
    in_int8 = layer.residual in ("", "int8") or (layer.residual == "sparse" and layer.settings["residual"]["bits"] == 8)
    return layer.bits == 32 or not in_int8


@dataclass(frozen=True)
class Product:
    """An int8 product in NumPy.

    Attributes:
        q: uint8 [m, k], the quantized rows of x.
        acc: int64 [m, n], summed in float64, which is exact: all sums stay below 2^31.
        v: float32 [m, n], acc in units of both scales; NaN in the rows in which x holds NaN or Inf, of which q is zeros.
    """

    q: Array
    acc: Array
    v: Array


@dataclass(frozen=True)
class _Rows:
    """The rows of x [m, k], quantized.

    Attributes:
        q: float32 [m, k], integers.
        scale, zero_point: float32 [m, 1].
        finite: bool [m, 1], False where x holds NaN or Inf; q is that of zeros there.
    """

    q: Array
    scale: Array
    zero_point: Array
    finite: Array


def _quantized_rows(x: Array, activation_bits: int) -> _Rows:
    amax = np.float32(2**activation_bits - 1)
    half_amax, zero, one_half = amax / np.float32(2), np.float32(0), np.float32(0.5)
    finite = np.asarray(np.isfinite(x).all(axis=1, keepdims=True))
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
    return _Rows(q, scale, zero_point, finite)


def _statically_quantized_rows(x: Array, activation_bits: int, input_range: tuple[float, int]) -> _Rows:
    """As :func:`_quantized_rows`, with one scale and zero point for all rows."""
    scale, zero_point = (np.full((len(x), 1), value, np.float32) for value in input_range)
    finite = np.asarray(np.isfinite(x).all(axis=1, keepdims=True))
    with np.errstate(all="ignore"):
        steps = np.where(finite, x, np.float32(0)) * (np.float32(1) / scale)
        q = np.clip(np.rint(steps) + zero_point, 0, np.float32(2**activation_bits - 1))
    return _Rows(q, scale, zero_point, finite)


def int8_product(
    x: Array, values: Tensor, scale: Tensor, activation_bits: int, input_range: tuple[float, int] | None = None
) -> Product:
    """The int8 formula in NumPy, for x float32 [m, k] and a weight int8 [n, k] with its scale [n]; ``input_range``: scale and zero
    point of a static weight's input."""
    if input_range is None:
        rows = _quantized_rows(x, activation_bits)
    else:
        rows = _statically_quantized_rows(x, activation_bits, input_range)
    acc = ((rows.q - rows.zero_point).astype(np.float64) @ float64(values).T).astype(np.int64)
    with np.errstate(all="ignore"):
        v = (acc.astype(np.float32) * rows.scale) * float32(scale)
    return Product(rows.q.astype(np.uint8), acc, np.where(rows.finite, v, np.float32(np.nan)))


def int8_convolution(x: Tensor, layer: Int8Conv2d, chosen: Tensor) -> Product:
    """The formula of ``csrc/conv/conv.h`` in NumPy: of images x [images, in_channels, height, width] the positions of y that are
    chosen, int64 [m], counted through all images. q is that of whole images, acc and v are [m, n]."""
    weight, geometry = layer.canonical(), layer.geometry
    images = float32(x)
    flat, bits, fixed = images.reshape(len(images), -1), weight.activation_bits, weight.input_range
    quantized = _quantized_rows(flat, bits) if fixed is None else _statically_quantized_rows(flat, bits, fixed)
    inside = torch.from_numpy((quantized.q - quantized.zero_point).reshape(images.shape))
    rows = float64(layer.kind.rows(inside, geometry, chosen)).reshape(len(chosen), geometry.groups, -1)
    values = float64(weight.values).reshape(geometry.groups, -1, layer.k)
    acc = np.einsum("mgk,gnk->mgn", rows, values).reshape(len(chosen), -1).astype(np.int64)
    of = chosen.numpy() // math.prod(geometry.positions(images.shape[2:]))
    with np.errstate(all="ignore"):
        v = (acc.astype(np.float32) * quantized.scale[of]) * float32(weight.scale)
        v = v if layer.bias32 is None else v + float32(layer.bias32)
    q = quantized.q.astype(np.uint8).reshape(images.shape)
    return Product(q, acc, np.where(quantized.finite[of], v, np.float32(np.nan)))


def _weight_product(x: Array, weight: Int8Weight | SparseWeight) -> Product:
    assert weight.scale is not None
    assert weight.activation_bits is not None
    values = replace(weight, scale=torch.ones_like(weight.scale)).decompress()
    fixed = weight.input_range if isinstance(weight, Int8Weight) else None
    return int8_product(x, values, weight.scale, weight.activation_bits, fixed)


@dataclass(frozen=True)
class _GroupsProduct:
    """The product of quantized rows and 4-bit weights in NumPy.

    Attributes:
        q: uint8 [m, k], the quantized rows of x; zeros in the rows in which x holds NaN or Inf.
        v: float32 [m, n], to the bit; NaN in these rows.
        size: float64 [m, n], the sum of the absolute products.
        apart: float64 [m, n], what adding up q * weight and the zero point * weight apart may cost; Inf where these sums may not
            fit float32.
    """

    q: Array
    v: Array
    size: Array
    apart: Array

    def order_bound(self, v: Array) -> Array:
        """How far v of a layer, a bias or the like added to the product, may lie from that of a runtime that adds up the k products
        (q - zero point) * weight in one sum: float64 [m, n].

        These are exact. The runtime's sum meets a rounding for each of them, the layer's one for each group, but of q * weight and
        of the zero point * weight apart; then both meet one for the scale of x and one for what is added.
        """
        return np.where(np.isnan(v), 0, _sum_bound(v, self.size, self.q.shape[1])) + self.apart


def _groups_product(x: Array, weight: Int4Weight) -> _GroupsProduct:
    rows = _quantized_rows(x, 8)
    with np.errstate(all="ignore"):
        sums, ones = _group_sums(rows.q, weight), _group_sums(np.ones((1, weight.k), np.float32), weight)
        v = np.where(rows.finite, _fma(-rows.zero_point, ones, sums) * rows.scale, np.float32(np.nan))
    weights = np.abs(float64(weight.decompress())).T
    apart = (rows.q + rows.zero_point).astype(np.float64) @ weights
    size = np.abs(rows.q - rows.zero_point).astype(np.float64) @ weights * rows.scale
    fits = apart < float(np.finfo(np.float32).max)
    apart = np.where(fits, EPS * (weight.groups + 2) * apart * rows.scale, np.inf)
    return _GroupsProduct(rows.q.astype(np.uint8), v, size, apart)


def _group_sums(q: Array, weight: Int4Weight) -> Array:
    """The float32 sum over the groups of q [m, k] . weight^T, the products of each group as an exact integer: [m, n]."""
    integers, zero_points = weight.integers().numpy(), weight.zero_points().numpy()
    scale = float32(weight.scale)
    v = np.zeros((len(q), len(integers)), np.float32)
    for group in range(weight.groups):
        columns = slice(group * weight.group, (group + 1) * weight.group)
        steps = integers[:, columns].astype(np.float32) - zero_points[:, group, None]
        # Exact in float32 in any order: 128 products of at most 255 * 15 stay below 2^24.
        v = _fma(q[:, columns] @ steps.T, scale[None, :, group], v)
    return v


def _fma(a: Array, b: Array, c: Array) -> Array:
    """float32(a * b + c) with one rounding, of float32 arrays whose product is exact in float64.

    The sum is rounded to odd in float64, which loses nothing that the rounding to float32 needs (Boldo and Melquiond 2008,
    https://doi.org/10.1109/TC.2007.70819).
    """
    product, c64 = a.astype(np.float64) * b, c.astype(np.float64)
    with np.errstate(all="ignore"):
        total = product + c64
        part = total - product
        error = (product - (total - part)) + (c64 - part)  # of the sum, exactly (Knuth's TwoSum)
        even = total.view(np.int64) & 1 == 0
        inexact = np.isfinite(total) & (error != 0) & even
        odd = np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
        return odd.astype(np.float32)


def numpy_weight_only(x: Array, layer: Int4Linear | Int8Linear) -> tuple[Array, Array]:
    """A layer with quantized weights and 16-bit activations in float64, activation included, and how far float32 may lie from it.

    Besides those of a sum of k products, the rounding of an int8 layer's weight * scale, or of its sum times the scale, counts. The
    sum without the scale has to fit float32 as well.

    Args:
        x: float32 [m, k]. NaN and Inf meet every weight, zeros too.
    Returns:
        float64 [m, n], both.
    """
    weight = layer.canonical()
    if isinstance(weight, Int8Weight):
        values, scale = (float64(part) for part in (weight.values, weight.scale))
    else:
        values, scale = float64(weight.decompress()), np.ones(layer.n)
    bias = _bias(layer)
    finite = np.isfinite(x)
    clean = np.where(finite, x, 0).astype(np.float64)
    size = np.abs(clean) @ np.abs(values).T
    fits = size < float(np.finfo(np.float32).max)
    v, size = (clean @ values.T) * scale + bias, size * scale + np.abs(bias)
    bound = np.where(fits, _sum_bound(v, size, layer.k + 2), np.inf)
    broken = ~finite.all(axis=1)
    with np.errstate(invalid="ignore"):
        v[broken] += np.where(finite, 0, x)[broken].astype(np.float64) @ values.T
    y, (bound,) = _activated(v, [bound], layer)
    return y, bound


def activation_bound(v: Array, activation: str) -> Array:
    """How far two float32 evaluations of ``activation(v)`` may lie apart, elementwise: 0 for none, relu, relu6 and hardswish.

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
    return np.zeros(v.shape) if activation in EXACT_ACTIVATIONS else 2 * _activation_rounding(v, activation)


def _activation_rounding(v: Array, activation: str) -> Array:
    """How far a float32 evaluation of ``activation(v)`` may lie from the exact value, elementwise (:func:`activation_bound`).

    hardswish rounds three times, by u of its value each, which 8 u |v| covers, but its product with 6 may overflow.
    """
    if activation in UNROUNDED_ACTIVATIONS:
        return np.zeros(v.shape)
    magnitude = np.where(np.isnan(v), 0.0, np.abs(v.astype(np.float64)))
    rounding = 8 * 2.0**-24 * magnitude + 2.0**-127
    if activation == "hardswish":
        rounding[6 * magnitude > float(np.finfo(np.float32).max)] = np.inf
    return rounding


def numpy_dense(x: Array, layer: CompressedLayer) -> tuple[Array, Array]:
    """The product with the decompressed weight in float64, activation included, and how far float32 may lie from it.

    Args:
        x: float32 [m, k], what the matrix of the layer's kind meets; int64 [m], tokens.
    Returns:
        float64 [m, n], both. The bound is Inf, which says nothing, for rows of x with NaN or Inf.
    """
    weight = float64(layer.canonical().decompress())
    if layer.kind.tokens:
        return weight[x], np.zeros((len(x), layer.k))
    return _summed(x, weight, np.abs(weight), layer.k, layer)


def fused_chains(weight: Weight) -> list[list[Array]]:
    """The float64 matrices [n, k] that x meets one behind the other, in chains whose results are added up, where all of it is in
    floating point."""
    if not isinstance(weight, LowRankWeight):
        return [[float64(weight.decompress())]]
    down, up = weight.factors()
    beside = [] if weight.residual is None else [[float64(weight.residual.decompress())]]
    return [[float64(down), float64(up)], *beside]


def in_static_range(x: Array, weight: Weight) -> Array:
    """x float32, rounded to the steps of a static weight's range as QuantizeLinear and DequantizeLinear do it; as it is without."""
    fixed = getattr(weight, "input_range", None)
    if fixed is None:
        return x
    step, zero, largest = np.float32(fixed[0]), np.float32(fixed[1]), np.float32(2**weight.activation_bits - 1)  # type: ignore[attr-defined]
    if largest < 255:
        x = np.clip(x, -zero * step, (largest - zero) * step)
    with np.errstate(all="ignore"):
        q = np.clip(np.rint(x / step) + zero, np.float32(0), largest)
    rounded: Array = (q - zero) * step
    return rounded


def numpy_fused(x: Array, layer: CompressedLayer) -> tuple[Array, Array]:
    """A layer of an exported file of the form ``fused`` in float64, activation included, and how far float32 may lie from it.

    Args:
        x: float32 [m, k], what the matrix of the layer's kind meets; of a convolution in groups [m * groups, k].
    Returns:
        float64 [m, n], both. The bound is Inf, which says nothing, for rows of x with NaN or Inf.
    """
    groups = getattr(layer.geometry, "groups", 1)
    finite, broken = _without_broken(x)
    rounded = in_static_range(finite.astype(np.float32), layer.canonical()).astype(np.float64)
    v, size, products = np.zeros((len(x) // groups, layer.n)), np.zeros((len(x) // groups, layer.n)), 1
    for chain in fused_chains(layer.canonical()):
        part, paths, roundings = rounded, np.abs(rounded), 1  # (x itself, an integer times a scale)
        for matrix in chain:
            part, paths = _in_groups(part, matrix, groups), _in_groups(paths, np.abs(matrix), groups)
            roundings += matrix.shape[1] + 2  # a sum of products, and weights that are an integer times a scale
        v, size, products = v + part, size + paths, products + roundings
    bias = _bias(layer)
    v, size = v + bias, size + np.abs(bias)
    bound = _sum_bound(v, size, products)
    bound[broken.reshape(-1, groups).any(axis=1)] = np.inf
    y, (bound,) = _activated(v, [bound], layer)
    return y, bound


def _in_groups(x: Array, matrix: Array, groups: int) -> Array:
    """x [m * groups, k] times a matrix [n, k], of which each group has its rows: [m, n]."""
    k = x.shape[1]
    product: Array = np.einsum("mgk,gnk->mgn", x.reshape(-1, groups, k), matrix.reshape(groups, -1, k))
    return product.reshape(len(product), -1)


def _summed(x: Array, weight: Array, paths: Array, products: int, layer: CompressedLayer) -> tuple[Array, Array]:
    """y and the bound of a layer with this weight [n, k], where an input reaches an output over paths of these absolute weights,
    and meets the roundings of so many products."""
    clean, broken = _without_broken(x)
    bias = _bias(layer)
    v, size = clean @ weight.T + bias, np.abs(clean) @ paths.T + np.abs(bias)
    bound = _sum_bound(v, size, products)
    bound[broken] = np.inf
    y, (bound,) = _activated(v, [bound], layer)
    return y, bound


def numpy_sparse_linear(x: Array, layer: SparseLayer) -> tuple[Array, Array, Array]:
    """A layer with float32 weights in float64, activation included, and what float32 may make of it.

    NaN and Inf in x count where there is a weight for them: zeros are not multiplied.

    Args:
        x: float32 [m, k], what the matrix of the layer's kind meets.
        layer: gives the weight and the bias.
    Returns:
        float64 [m, n], all three: y; how far the layer's own y may lie from it; how far that of a runtime that
        multiplies the zeros too. The last is Inf, which says nothing, for rows of x with NaN or Inf.
    """
    weight = float64(layer.canonical().decompress())
    bias = _bias(layer)
    finite = np.isfinite(x)
    clean = np.where(finite, x, 0).astype(np.float64)
    v, size = clean @ weight.T + bias, np.abs(clean) @ np.abs(weight).T + np.abs(bias)
    own, runtime = _sum_bound(v, size, np.count_nonzero(weight, axis=1)), _sum_bound(v, size, weight.shape[1])
    broken = ~finite.all(axis=1)
    if broken.any():
        runtime[broken] = np.inf
        v[broken] += _nonfinite(x[broken], weight)
    y, (own, runtime) = _activated(v, [own, runtime], layer)
    return y, own, runtime


def _activated(v: Array, bounds: list[Array], layer: CompressedLayer) -> tuple[Array, list[Array]]:
    """The activation of v, float64 [m, n], and how far it may lie off where v may lie off by the bounds."""
    rounding = _activation_rounding(v, layer.activation)
    slope = STEEPEST.get(layer.activation, STEEPEST_SMOOTH)
    y = ops.DIFFERENTIABLE[layer.activation](torch.from_numpy(v)).numpy()
    return y, [slope * bound + rounding for bound in bounds]


def _sum_bound(v: Array, size: Array, products: Array | int) -> Array:
    """How far a float32 sum of so many products, plus a bias, may lie from the exact v, in whatever order it is taken.

    A product meets at most ``products`` roundings, its own included, so with u = EPS / 2 the sum errs by at most
    products u / (1 - products u) of ``size``, the sum of the absolute products: less than products EPS for up to
    2^23 of them. A subnormal result is off by up to 2^-150 instead. The bias adds one rounding. Where ``size`` does
    not fit float32 the sum may overflow on its way, and nothing is certain.
    """
    bound = EPS * (products + 2) * size + EPS * np.abs(v) + (products + 2) * 2.0**-149
    return np.where(size < float(np.finfo(np.float32).max), bound, np.inf)


def _without_broken(x: Array) -> tuple[Array, Array]:
    """x [m, k] in float64 with zeros in the rows that hold NaN or Inf; and bool [m]: which these are."""
    broken = np.asarray(~np.isfinite(x).all(axis=1))
    return np.where(broken[:, None], 0, x).astype(np.float64), broken


def numpy_factors(x: Array, layer: FactorsLayer) -> tuple[Array, Array]:
    """A low-rank convolution or embedding in float64, activation included, and how far float32 may lie from it.

    An input reaches an output over several paths, on each of which it is multiplied with one weight of every factor. It meets
    the roundings of every sum on its path: as many as these have products, all factors together.

    Args:
        x: float32 [m, k], the patches of a convolution; int64 [m], the tokens of an embedding.
    Returns:
        float64 [m, n], both. The bound is Inf, which says nothing, for rows of x with NaN or Inf.
    """
    if isinstance(layer, LowRankEmbedding):
        table, basis = float64(layer.canonical().up)[x], float64(layer.canonical().down)
        return table @ basis, _sum_bound(table @ basis, np.abs(table) @ np.abs(basis), layer.rank)
    assert isinstance(layer, LowRankConv2d)
    factors = tuple(factor.double() for factor in layer.canonical().factors())
    weight = composed(factors).flatten(1).numpy()
    paths = composed(tuple(factor.abs() for factor in factors)).flatten(1).numpy()
    return _summed(x, weight, paths, sum(factor[0].numel() for factor in factors), layer)


@dataclass(frozen=True)
class Steps:
    """What a linear layer that quantizes its input, or a LowRankLinear, computes.

    Attributes:
        exact: by name, what must be equal: q and acc of what is int8, q of what is int4; those of int8 factors and of what they
            make of x (``t``, ``down_q``, ``down_acc``, ``up_``...) and those of a residual (``residual_``...).
        v: what goes into the activation: float32 [m, n], to the bit, where all is int8 or int4; float64 otherwise.
        y: float64 [m, n], activation included.
        own: float64 [m, n], how far the layer's y may lie from this one: Inf, which says nothing, for rows of x with NaN or Inf
            where all is float32.
        bound: the same for a runtime that takes the sums of float32, or of int4 weights, in another order.
    """

    exact: dict[str, Array]
    v: Array
    y: Array
    own: Array
    bound: Array


def numpy_steps(x: Array, layer: Int8Linear | SparseLinear | Int4Linear | LowRankLinear) -> Steps:
    """A layer in NumPy: the float32 steps of what is int8 or int4, float64 for the rest.

    float32 factors: a product x_i down_ji up_nj meets at most k roundings in its first and r in its second sum. A float32
    residual adds k products to these, in whatever order, one further addition among them; a residual in int8 or int4 is a number
    known to the bit, with one further addition.

    Args:
        x: float32 [m, k].
    """
    weight, exact = layer.canonical(), dict[str, Array]()
    clean, broken = _without_broken(x)
    v: Array = np.zeros(1, np.float32) if layer.bias32 is None else float32(layer.bias32)
    size, roundings, order, prefix = np.abs(v), 0, None, ""
    if isinstance(weight, LowRankWeight):
        if weight.bits == 32:
            down, up = float64(weight.down), float64(weight.up)
            v, size = clean @ down.T @ up.T + v, np.abs(clean) @ np.abs(down).T @ np.abs(up).T + size
            roundings = layer.k + weight.rank
        else:
            factors, exact = _int8_factors(x, weight)
            v = factors + v
            size = np.abs(v)
        weight, prefix = weight.residual, "residual_"
    with np.errstate(all="ignore"):
        if isinstance(weight, Int4Weight):
            order = _groups_product(x, weight)
            exact[prefix + "q"] = order.q
            v, size = order.v + v, size + np.abs(order.v)
        elif isinstance(weight, Int8Weight | SparseWeight) and weight.scale is not None:
            product = _weight_product(x, weight)
            exact |= {prefix + "q": product.q, prefix + "acc": product.acc}
            v, size = product.v + v, size + np.abs(product.v)
        elif weight is not None:
            dense = float64(weight.decompress())
            v, size = clean @ dense.T + v, np.abs(clean) @ np.abs(dense).T + size
            roundings += layer.k + 1
    bound = np.zeros(v.shape)
    if roundings:
        bound = _sum_bound(v, size, roundings + 1)
        bound[broken] = 0 if exact else np.inf  # with a product of integers such a row is NaN
    bounds = [bound, bound if order is None else bound + order.order_bound(v)]
    y, (own, runtime) = _activated(v.astype(np.float64), bounds, layer)
    return Steps(exact, v, y, own, runtime)


def _int8_factors(x: Array, weight: LowRankWeight) -> tuple[Array, dict[str, Array]]:
    """What int8 factors make of x, without a bias: v float32 [m, n], and by name t float32 [m, r] and the integers of both."""
    assert weight.activation_bits is not None
    assert weight.down_scale is not None
    assert weight.up_scale is not None
    down = int8_product(x, weight.down, weight.down_scale, weight.activation_bits)
    up = int8_product(down.v, weight.up, weight.up_scale, weight.activation_bits)
    return up.v, {"t": down.v, "down_q": down.q, "down_acc": down.acc, "up_q": up.q, "up_acc": up.acc}


def _nonfinite(x: Array, weight: Array) -> Array:
    """What the NaN and Inf of x [m, k] add to each output: NaN, Inf, -Inf or 0, float64 [m, n]."""

    def meets(where: Array, weights: Array) -> Array:
        return where.astype(np.float32) @ weights.astype(np.float32).T > 0

    up = meets(x == np.inf, weight > 0) | meets(x == -np.inf, weight < 0)
    down = meets(x == np.inf, weight < 0) | meets(x == -np.inf, weight > 0)
    undefined = meets(np.isnan(x), weight != 0) | (up & down)
    return np.where(undefined, np.nan, np.where(up, np.inf, np.where(down, -np.inf, 0.0)))


# --- recurrent layers -------------------------------------------------------------------------------------------------


def recurrent(x: Tensor, states: list[Tensor], layer: Int8Recurrent) -> dict[str, Array]:
    """An int8 LSTM or GRU in NumPy, float32 step by float32 step: y [steps, batch, directions * size], ``h_n``, ``c_n``, and of
    each matrix q and acc, those of the hidden state with the steps in front."""
    weight, directions, size = layer.canonical(), layer.geometry.directions, layer.geometry.hidden_size
    bias = None if layer.bias32 is None else float32(layer.bias32)
    input_, (steps, batch) = float32(x), x.shape[:2]
    last = [float32(one).copy() for one in states]
    found: dict[str, Array] = {}

    def product(matrix: Matrix, rows: Array) -> tuple[Product, Array]:
        part = weight[matrix.name]
        made = int8_product(rows, part.values, part.scale, part.activation_bits)
        return made, made.v if bias is None else made.v + bias[matrix.rows]

    for number in range(layer.geometry.num_layers):
        outputs = np.empty((steps, batch, directions * size), np.float32)
        for direction in range(directions):
            at = number * directions + direction
            of_input, of_hidden = weight.matrices[2 * at : 2 * at + 2]
            made, gates = product(of_input, input_.reshape(steps * batch, -1))
            found |= {f"{of_input.name}_q": made.q, f"{of_input.name}_acc": made.acc}
            each: list[Product] = [made] * steps
            for t in range(steps)[:: -1 if direction else 1]:
                each[t], hidden = product(of_hidden, last[0][at])
                _cell([one[at] for one in last], gates.reshape(steps, batch, -1)[t], hidden)
                outputs[t, :, direction * size : (direction + 1) * size] = last[0][at]
            found[f"{of_hidden.name}_q"] = np.stack([one.q for one in each])
            found[f"{of_hidden.name}_acc"] = np.stack([one.acc for one in each])
        input_ = outputs
    return {"y": input_, **dict(zip(("h_n", "c_n"), last, strict=False)), **found}


def _cell(states: list[Array], gx: Array, gh: Array) -> None:
    """The states of the next step, in place."""
    with np.errstate(all="ignore"):
        if len(states) == 2:
            h, c = states
            i, f, g, o = np.split(gx + gh, 4, axis=1)
            c[:] = _sigmoid(f) * c + _sigmoid(i) * _tanh(g)
            h[:] = _sigmoid(o) * _tanh(c)
            return
        (h,) = states
        (rx, zx, nx), (rh, zh, nh) = np.split(gx, 3, axis=1), np.split(gh, 3, axis=1)
        n = _tanh(nx + _sigmoid(rx + rh) * nh)
        h[:] = (h - n) * _sigmoid(zx + zh) + n


def _sigmoid(u: Array) -> Array:
    e = _exp_negative(-np.abs(u))
    return np.where(np.isnan(u), u, np.where(u < 0, e, np.float32(1)) * (np.float32(1) / (np.float32(1) + e)))


def _tanh(u: Array) -> Array:
    e = _exp_negative(np.float32(-2) * np.abs(u))
    positive = (np.float32(1) - e) / (np.float32(1) + e)
    return np.where(np.isnan(u), u, np.where(u < 0, -positive, positive))


def _exp_negative(x: Array) -> Array:
    """As ``csrc/common/activation.h`` has it, of float32 up to 0; 0 below -87."""
    inside = np.where(x > -87, x, np.float32(-87))
    n = np.rint(inside * np.float32(1.44269504))
    r = inside - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p: Array = np.asarray(np.float32(1) / np.float32(5040))
    for divisor in (720, 120, 24, 6, 2):
        p = p * r + np.float32(1) / np.float32(divisor)
    p = p * r * r + r + np.float32(1)
    return np.where(x > -87, np.ldexp(p, n.astype(np.int32)), np.float32(0))
