"""The sparse ops, on the native kernels and on their twin: every format against float64 and int64.

What every op promises is in contract/test_ops.py; there a weight is made, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from contract.packed import EPS, FLOAT_FORMATS, FLOATS, INT8_FORMATS, Case, canonical, kept, sparse
from packing import Packed, backend, integers, pack_int8, pack_sparse  # noqa: F401
from torch import Tensor

from pycompress import ops, reference
from pycompress.weights import SparseWeight

Same = Callable[[Tensor, Tensor], bool]

pytestmark = pytest.mark.usefixtures("backend")
BITS = {**dict.fromkeys(FLOAT_FORMATS, 32), **dict.fromkeys(INT8_FORMATS, 8)}


def pack(w: SparseWeight, layout: str = "") -> Packed:
    return Case("sparse", layout, sparse, layout).pack(w)


def exact_with_bound(x: Tensor, dense: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x W^T + bias in float64, and how far a float32 result may lie from it: any order of the products that are there.

    With t products each of them meets at most t roundings by 1 + eps / 2, so they err by at most eps t sum |x w|, and by
    2^-150 where a rounding has a subnormal result; the bias adds one rounding of the result.
    """
    x, dense = x.double(), dense.double()
    exact = x @ dense.T + (0 if bias is None else bias.double())
    count = (dense != 0).sum(1).double() + 2
    return exact, EPS * count * (x.abs() @ dense.abs().T) + EPS * exact.abs() + count * 2.0**-149


def accumulated(x: Tensor, dense: Tensor, bits: int) -> tuple[Any, Any, Any]:
    """acc int64 [m, n], scale and zero point of the int8 formula."""
    q, scale, zero = ops.int8_quantize(x, bits)
    rows = q.numpy().astype(np.int64) - zero.numpy()[:, None]
    return rows @ dense.numpy().astype(np.int64).T, scale, zero


SIZES = [1, 3, 7, 8, 9, 16, 17, 35]
DEPTHS = [1, 3, 4, 8, 15, 33, 64, 131]


# --- pack and unpack ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "panels"])
def test_the_smallest_and_the_largest_numbers_are_kept(layout: str) -> None:
    dense = integers(sparse(40, 30, layout, 1.0))
    dense[3, 4], dense[17, 29], dense[39, 0], dense[0, 0] = 1e-45, -1e-45, -torch.finfo(torch.float32).max, 2.0**-126
    assert torch.equal(ops.dense("sparse", *pack(canonical(dense), layout)), dense)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("pattern", BITS)
def test_the_format_that_is_chosen(bits: int, pattern: str) -> None:
    dense = kept(pattern, 48, 64, 0.4) * torch.randint(1, 9, (48, 64))
    w = canonical(dense.to(torch.float32 if bits == 32 else torch.int8))
    packed = pack(w)
    form = ops.parse(packed[1])
    assert BITS[form.layout] == bits == form.bits
    assert torch.equal(ops.dense("sparse", *packed), w.decompress())
    again = pack(w, form.layout)
    assert torch.equal(again[0], packed[0]) and again[1] == packed[1], "the choice is the same packing as the name"


def test_the_names_of_the_formats() -> None:
    assert tuple(BITS) == ops.SPARSE_FORMATS == tuple(reference.extension.SPARSE_FORMATS)
    assert reference.extension.SPARSE_FORMATS == BITS


# --- float32 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "panels"])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_float32_within_the_bound(layout: str, density: float) -> None:
    for n, k in itertools.product(SIZES, DEPTHS):
        w, bias = sparse(n, k, layout, density), torch.randn(n)
        packed = pack(w, layout)
        for m in (0, 1, 2, 5, 9, 17):
            x = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]
            exact, bound = exact_with_bound(x, integers(w), bias)
            assert ((ops.sparse_linear(x, *packed, bias).double() - exact).abs() <= bound).all(), (m, n, k)
            exact, bound = exact_with_bound(x, integers(w), None)
            assert ((ops.sparse_linear(x, *packed).double() - exact).abs() <= bound).all(), (m, n, k)


@pytest.mark.parametrize("layout", ["rows", "panels"])
def test_float32_of_extreme_values(layout: str) -> None:
    """Long rows, cancellation, and the ends of the range of float32."""
    n, k = 33, 3000
    w = sparse(n, k, layout, 0.4)
    packed = pack(w, layout)
    alternating = torch.tensor([1e6, -1e6]).repeat(k // 2)
    x = torch.stack(
        [torch.randn(k), alternating, torch.full((k,), 1e30), torch.randn(k) * 1e-38, torch.full((k,), 1e-44)]
    )
    exact, bound = exact_with_bound(x, integers(w), None)
    assert ((ops.sparse_linear(x, *packed).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("layout", ["rows", "panels"])
def test_float32_is_exact_where_it_can_be(layout: str) -> None:
    """Small integers: no order of the sum rounds, so a product that was left out or taken twice shows."""
    for n, k in [(1, 1), (5, 7), (16, 64), (17, 65), (40, 300)]:
        dense = kept(layout, n, k, 0.4) * torch.randint(1, 20, (n, k)).float()
        w = canonical(dense)
        for m in (1, 3, 8, 21):
            x = torch.randint(-20, 20, (m, k)).float()
            assert torch.equal(ops.sparse_linear(x, *pack(w, layout)), x @ dense.T)


@pytest.mark.parametrize("layout", ["rows", "panels"])
def test_nan_and_inf_show_where_there_is_a_weight(layout: str) -> None:
    n, k = 37, 50
    w = sparse(n, k, layout, 0.3)
    x = torch.randn(6, k)
    x[1, 7], x[2, 30], x[4, 49] = math.nan, math.inf, -math.inf
    y = ops.sparse_linear(x, *pack(w, layout))
    clean = ops.sparse_linear(torch.where(x.isfinite(), x, 0.0), *pack(w, layout))
    for row in range(6):
        touched = (integers(w)[:, ~x[row].isfinite()] != 0).any(1)
        assert not y[row][touched].isfinite().any()
        assert torch.equal(y[row][~touched], clean[row][~touched])
    assert torch.equal(y[2].isposinf(), integers(w)[:, 30] > 0)
    assert torch.equal(y[4].isposinf(), integers(w)[:, 49] < 0)


@pytest.mark.parametrize(("pattern", "density"), [("rows", 0.97), ("panels", 0.5)])
def test_nan_shows_where_there_is_a_weight_whatever_is_chosen(pattern: str, density: float) -> None:
    """A weight almost full, and one in 16x1 blocks of which a few weights happen to be zero: no hole is multiplied."""
    n, k = 64, 96
    dense = integers(sparse(n, k, pattern, density))
    dense[::9, ::7] = 0
    w = canonical(dense)
    for column in range(0, k, 7):
        x = torch.randn(3, k)
        x[1, column] = math.nan
        y = ops.sparse_linear(x, *pack(w))
        assert torch.equal(y.isnan().any(0), dense[:, column] != 0), pack(w)[1]


# --- int8 ---------------------------------------------------------------------------------------------------------------

INT8 = [layout for layout, bits in BITS.items() if bits == 8]


@pytest.mark.parametrize("layout", INT8)
@pytest.mark.parametrize("activation_bits", [7, 8])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_integers_equal_numpy(layout: str, activation_bits: int, density: float) -> None:
    for n, k in itertools.product(SIZES, DEPTHS):
        w = sparse(n, k, layout, density, activation_bits)
        packed = pack(w, layout)
        for m in (0, 1, 2, 5, 9):
            x = torch.randn(m, k)
            expected, scale, zero = accumulated(x, integers(w), activation_bits)
            acc, got_scale, got_zero = ops.sparse_accumulate(x, *packed)
            assert acc.dtype == torch.int32
            np.testing.assert_array_equal(acc.numpy(), expected)
            assert torch.equal(got_scale, scale) and torch.equal(got_zero, zero)


@pytest.mark.parametrize("layout", INT8)
@pytest.mark.parametrize("activation_bits", [7, 8])
def test_integers_never_saturate(layout: str, activation_bits: int) -> None:
    """Extremes of one sign in every weight that is there, and of both in the activations."""
    n, k = 35, 2100
    for sign in (127, -127):
        w = canonical(kept(layout, n, k, 0.6).to(torch.int8) * sign, activation_bits)
        half = torch.tensor([1.0, -1.0])
        x = torch.stack([torch.ones(k), -torch.ones(k), half.repeat(k // 2), half.repeat_interleave(k // 2)])
        acc, *_ = ops.sparse_accumulate(x, *pack(w, layout))
        np.testing.assert_array_equal(acc.numpy(), accumulated(x, integers(w), activation_bits)[0])


@pytest.mark.parametrize("layout", INT8)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_has_the_bits_of_int8_linear(layout: str, activation: str, with_bias: bool, same: Same) -> None:
    n, k = 37, 130
    for activation_bits in (7, 8):
        w = sparse(n, k, layout, 0.4, activation_bits)
        assert w.scale is not None
        bias = torch.randn(n) if with_bias else None
        x = torch.randn(9, k) * torch.logspace(-20, 20, 9)[:, None]
        x[3] = 0
        for dtype in FLOATS:
            got = ops.sparse_linear(x.to(dtype), *pack(w, layout), bias, activation)
            dense = pack_int8(integers(w), activation_bits, w.scale)
            expected = ops.int8_linear(x.to(dtype), *dense, bias, activation)
            nan = expected.isnan()  # rows that float16 cannot hold; the sign of a NaN is left to the processor
            assert torch.equal(got.isnan(), nan)
            assert same(got[~nan], expected[~nan])


# --- shapes, strides, dtypes, threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ops.SPARSE_FORMATS)
def test_rows_without_weights(layout: str) -> None:
    """Whole blocks of empty rows in front, between and behind: only the bias is left there."""
    n, k = 80, 48
    dense = integers(sparse(n, k, layout, 1.0))
    for empty in (slice(0, 16), slice(16, 48), slice(64, 80), slice(0, 80)):
        holes = dense.clone()
        holes[empty] = 0
        w, bias = canonical(holes), torch.randn(n)
        y = ops.sparse_linear(torch.randn(5, k), *pack(w, layout), bias)
        assert torch.equal(y[:, empty], bias[empty].expand(5, -1))
        assert torch.equal(ops.dense("sparse", *pack(w, layout)), w.decompress())


# --- torch's own checks -------------------------------------------------------------------------------------------------


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_scale_belongs_to_int8() -> None:
    floats, quantized, x = sparse(24, 20, "rows"), sparse(24, 20, "quads"), torch.randn(3, 20)
    (packed, form), parts = pack(quantized), {"mask": quantized.mask, "values": quantized.values}
    calls: list[tuple[Callable[[], object], str]] = [
        (
            lambda: pack_sparse(floats.mask, floats.values, 20, scale=torch.ones(24)),
            r"sparse_pack: scale is torch.float32 \[24\], expected None for float32 values",
        ),
        (
            lambda: ops.pack("sparse", parts, (24, 20), {"activation_bits": 8}),
            r"sparse_pack: scale is None, expected float32 \[24\] for int8 values",
        ),
        (
            lambda: pack_sparse(*parts.values(), 20, 8, scale=torch.ones(23)),
            r"sparse_pack: scale is \[23\], expected \[24\]",
        ),
        (
            lambda: ops.sparse_accumulate(x, *pack(floats)),
            "sparse_accumulate: the packed weight is float32, expected int8",
        ),
        # A form that is not the buffer's: the kernels say what they miss.
        (lambda: ops.sparse_accumulate(x, pack(floats)[0], form), "packed sparse weight"),
        (
            lambda: ops.cpu.sparse.linear(x, packed, form.replace("bits=8", "bits=32"), None, "none"),
            "packed sparse weight",
        ),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


Change = Callable[[Tensor, Tensor], tuple[Any, ...]]


REFUSALS: list[tuple[str, Change, str]] = [  # layout, what is made of mask and values, the message
    ("rows", lambda mask, values: (mask.int(), values, 20), r"mask is torch.int32 \[24, 3\], expected uint8 \[24, 3\]"),
    ("rows", lambda mask, values: (mask, values, 30), r"mask is torch.uint8 \[24, 3\], expected uint8 \[24, 4\]"),
    ("rows", lambda mask, values: (mask[0], values, 20), r"mask is torch.uint8 \[3\], expected uint8"),
    ("rows", lambda mask, values: (mask, values.double(), 20), r"values is torch.float64 \[\d+\], expected float32"),
    ("rows", lambda mask, values: (mask, values[None], 20), r"values is torch.float32 \[1, \d+\]"),
    ("rows", lambda mask, values: (mask[:0], values[:0], 20), r"out_features is 0, expected 1 to 16777216"),
    ("rows", lambda mask, values: (mask[:, :0], values[:0], 0), r"in_features is 0, expected 1 to 65536"),
    (
        "rows",
        lambda _, values: (torch.zeros(1, 8193).byte(), values[:0], 65537),
        r"in_features is 65537, expected 1 to",
    ),
    ("rows", lambda mask, values: (mask, values[1:], 20), r"the mask has 480 ones, but there are 479 values"),
    ("rows", lambda mask, values: (mask, values, 17), r"the mask has bits set behind k = 17"),
    ("rows", lambda mask, values: (mask, values * 0, 20), r"480 values are zero"),
    ("rows", lambda mask, values: (mask, values * math.inf, 20), r"a value is NaN or Inf"),
    ("rows", lambda mask, values: (mask, values * math.nan, 20), r"a value is NaN or Inf"),
    (
        "rows",
        lambda mask, values: (mask, values, 20, 7),
        r"activation_bits is 7, expected 7 or 8 for int8 weights, 0 for",
    ),
    (
        "rows",
        lambda mask, values: (mask, values, 20, 0, "quads"),
        r"format quads holds int8 weights, these are float32",
    ),
    (
        "rows",
        lambda mask, values: (mask, values, 20, 0, "csr"),
        r"no format is named 'csr', expected rows, panels, quads",
    ),
    (
        "quads",
        lambda mask, values: (mask, values, 20, 8, "panels"),
        r"format panels holds float32 weights, these are int8",
    ),
    ("quads", lambda mask, values: (mask, values, 20, 6), r"activation_bits is 6, expected 7 or 8"),
    ("quads", lambda mask, values: (mask, values, 20, 16), r"activation_bits is 16, expected 7 or 8"),
    ("quads", lambda mask, values: (mask, values, 20), r"activation_bits is 0, expected 7 or 8"),
    ("quads", lambda mask, values: (mask, values * 0, 20, 8), r"480 values are zero"),
    ("quads", lambda mask, values: (mask, values * 0 - 128, 20, 8), r"a value is -128"),
]


@pytest.mark.parametrize(("layout", "change", "message"), REFUSALS)
def test_weights_that_pack_refuses(layout: str, change: Change, message: str) -> None:
    w = canonical(torch.ones(24, 20, dtype=torch.float32 if layout == "rows" else torch.int8))
    with pytest.raises(ValueError, match=f"sparse_pack: {message}"):
        pack_sparse(*change(w.mask, w.values))


def test_a_form_other_than_the_packed_weights() -> None:
    packed, form = pack(sparse(24, 40))
    nnz = f"nnz={ops.parse(form).nnz}"
    for other in (form.replace(nnz, "nnz=1"), form.replace("k=40", "k=41"), form.replace("n=24", "n=23")):
        for use in (ops.unpack, ops.dense):
            with pytest.raises(ValueError, match=r"sparse_unpack: the packed weight has .*, its form says "):
                use("sparse", packed, other)
    with pytest.raises(ValueError, match="packed sparse weight"):
        ops.dense("sparse", packed, form.replace("bits=32", "bits=8"))
