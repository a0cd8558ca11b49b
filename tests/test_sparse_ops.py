"""The sparse ops, on the native kernels and on their twin: every format against float64 and int64, and as torch sees them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pycompress import ops, reference

Same = Callable[[Tensor, Tensor], bool]
Forked = Callable[..., Any]

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BITS = {"rows": 32, "panels": 32, "quads": 8, "quads4": 8, "windows": 8, "chains": 8}
BLOCKS = {"rows": (1, 1), "panels": (16, 1), "quads": (1, 1), "quads4": (1, 4), "chains": (16, 4)}
WINDOW = 4  # and half of it stays
EPS = float(torch.finfo(torch.float32).eps)


@pytest.fixture(params=["native", "twin"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and ops.extension_error() is not None:
        pytest.skip("no extension was built")
    if request.param == "twin":
        for module in (ops.native, ops.int8, ops.sparse):
            monkeypatch.setattr(module, "_C", reference.extension)
            monkeypatch.setattr(module, "reads_tensors", False, raising=False)
    return request.param


class Weight(NamedTuple):
    dense: Tensor  # float32 or int8 [n, k]
    mask: Tensor
    values: Tensor
    scale: Tensor | None
    activation_bits: int

    def pack(self, layout: str = "") -> Tensor:
        try:
            return ops.sparse_pack(self.mask, self.values, self.dense.shape[1], self.activation_bits, layout)
        except ValueError as error:
            if "no kernel that this processor runs" in str(error):  # windows and chains, under PYCOMPRESS_ISA=scalar
                pytest.skip(str(error))
            raise


def kept(layout: str, n: int, k: int, density: float) -> Tensor:
    """bool [n, k]: random, in the pattern that the format is made for."""
    if layout == "windows":
        windows = torch.rand(n, -(-k // WINDOW), WINDOW).argsort(-1) < min(WINDOW // 2, density * WINDOW)
        return windows.flatten(1)[:, :k]
    rows, columns = BLOCKS[layout]
    blocks = torch.rand(-(-n // rows), -(-k // columns)) < density
    return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:n, :k]


def canonical(dense: Tensor, activation_bits: int = 8) -> Weight:
    """What the ops take of a dense weight, by NumPy alone."""
    keep = dense.numpy() != 0
    mask = torch.from_numpy(np.packbits(keep, axis=1, bitorder="little"))
    values = torch.from_numpy(dense.numpy()[keep])
    if dense.dtype == torch.float32:
        return Weight(dense, mask, values, None, 0)
    return Weight(dense, mask, values, torch.rand(len(dense)) / 127 + 1e-3, activation_bits)


def weight(layout: str, n: int, k: int, density: float = 0.3, activation_bits: int = 8) -> Weight:
    if BITS[layout] == 32:
        dense = torch.randn(n, k)
    else:
        dense = torch.randint(1, 128, (n, k)).mul(torch.randint(2, (n, k)) * 2 - 1).to(torch.int8)
    return canonical(dense * kept(layout, n, k, density), activation_bits)


def exact_with_bound(x: Tensor, dense: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x W^T + bias in float64, and how far a float32 result may lie from it: any order of the products that are there.

    With t products each of them meets at most t roundings by 1 + eps / 2, so they err by at most eps t sum |x w|, and by
    2^-150 where a rounding has a subnormal result; the bias adds one rounding of the result.
    """
    x, dense = x.double(), dense.double()
    exact = x @ dense.T + (0 if bias is None else bias.double())
    count = (dense != 0).sum(1).double() + 2
    return exact, EPS * count * (x.abs() @ dense.abs().T) + EPS * exact.abs() + count * 2.0**-149


def integers(x: Tensor, dense: Tensor, bits: int) -> tuple[Any, Any, Any]:
    """acc int64 [m, n], scale and zero point of the int8 formula."""
    q, scale, zero = ops.int8_quantize(x, bits)
    rows = q.numpy().astype(np.int64) - zero.numpy()[:, None]
    return rows @ dense.numpy().astype(np.int64).T, scale, zero


SIZES = [1, 3, 7, 8, 9, 16, 17, 35]
DEPTHS = [1, 3, 4, 8, 15, 33, 64, 131]


# --- pack and unpack ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ops.SPARSE_FORMATS)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_unpack_is_the_inverse_of_pack(layout: str, density: float) -> None:
    for n, k in itertools.product(SIZES, DEPTHS):
        w = weight(layout, n, k, density, 7)
        packed = w.pack(layout)
        assert packed.dtype == torch.uint8 and packed.dim() == 1
        mask, values = ops.sparse_unpack(packed)
        assert torch.equal(mask, w.mask)
        assert values.dtype == w.values.dtype
        assert torch.equal(values, w.values)
        assert torch.equal(ops.sparse_dense(packed), w.dense)
        assert ops.sparse_header(packed) == {
            "n": n,
            "k": k,
            "nnz": len(w.values),
            "bits": BITS[layout],
            "activation_bits": 7 if BITS[layout] == 8 else 0,
            "format": layout,
        }


@pytest.mark.parametrize("layout", ["rows", "panels"])
def test_the_smallest_and_the_largest_numbers_are_kept(layout: str) -> None:
    dense = weight(layout, 40, 30, 1.0).dense
    dense[3, 4], dense[17, 29], dense[39, 0], dense[0, 0] = 1e-45, -1e-45, -torch.finfo(torch.float32).max, 2.0**-126
    assert torch.equal(ops.sparse_dense(canonical(dense).pack(layout)), dense)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("pattern", BITS)
def test_the_format_that_is_chosen(bits: int, pattern: str) -> None:
    dense = kept(pattern, 48, 64, 0.4) * torch.randint(1, 9, (48, 64))
    w = canonical(dense.to(torch.float32 if bits == 32 else torch.int8))
    packed = w.pack()
    header = ops.sparse_header(packed)
    assert BITS[header["format"]] == bits == header["bits"]
    assert torch.equal(ops.sparse_dense(packed), w.dense)
    assert torch.equal(w.pack(header["format"]), packed), "the choice is the same packing as the name"


def test_the_names_of_the_formats() -> None:
    assert tuple(BITS) == ops.SPARSE_FORMATS == tuple(reference.extension.SPARSE_FORMATS)
    assert reference.extension.SPARSE_FORMATS == BITS


@pytest.mark.parametrize("layout", ["rows", "quads"])
def test_non_contiguous_mask_and_values(layout: str) -> None:
    w = weight(layout, 12, 20)
    mask = torch.stack([w.mask, 255 - w.mask], 2).flatten(1)[:, ::2]
    values = torch.stack([w.values, torch.zeros_like(w.values)], 1).flatten()[::2]
    assert not mask.is_contiguous() and not values.is_contiguous()
    assert torch.equal(ops.sparse_pack(mask, values, 20, w.activation_bits, layout), w.pack(layout))


# --- float32 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "panels"])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_float32_within_the_bound(layout: str, density: float) -> None:
    for n, k in itertools.product(SIZES, DEPTHS):
        w, bias = weight(layout, n, k, density), torch.randn(n)
        packed = w.pack(layout)
        for m in (0, 1, 2, 5, 9, 17):
            x = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]
            exact, bound = exact_with_bound(x, w.dense, bias)
            assert ((ops.sparse_linear(x, packed, n, None, bias).double() - exact).abs() <= bound).all(), (m, n, k)
            exact, bound = exact_with_bound(x, w.dense, None)
            assert ((ops.sparse_linear(x, packed, n).double() - exact).abs() <= bound).all(), (m, n, k)


@pytest.mark.parametrize("layout", ["rows", "panels"])
def test_float32_of_extreme_values(layout: str) -> None:
    """Long rows, cancellation, and the ends of the range of float32."""
    n, k = 33, 3000
    w = weight(layout, n, k, 0.4)
    packed = w.pack(layout)
    alternating = torch.tensor([1e6, -1e6]).repeat(k // 2)
    x = torch.stack(
        [torch.randn(k), alternating, torch.full((k,), 1e30), torch.randn(k) * 1e-38, torch.full((k,), 1e-44)]
    )
    exact, bound = exact_with_bound(x, w.dense, None)
    assert ((ops.sparse_linear(x, packed, n).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("layout", ["rows", "panels"])
def test_float32_is_exact_where_it_can_be(layout: str) -> None:
    """Small integers: no order of the sum rounds, so a product that was left out or taken twice shows."""
    for n, k in [(1, 1), (5, 7), (16, 64), (17, 65), (40, 300)]:
        dense = kept(layout, n, k, 0.4) * torch.randint(1, 20, (n, k)).float()
        w = canonical(dense)
        for m in (1, 3, 8, 21):
            x = torch.randint(-20, 20, (m, k)).float()
            assert torch.equal(ops.sparse_linear(x, w.pack(layout), n), x @ dense.T)


@pytest.mark.parametrize("layout", ["rows", "panels"])
def test_nan_and_inf_show_where_there_is_a_weight(layout: str) -> None:
    n, k = 37, 50
    w = weight(layout, n, k, 0.3)
    x = torch.randn(6, k)
    x[1, 7], x[2, 30], x[4, 49] = math.nan, math.inf, -math.inf
    y = ops.sparse_linear(x, w.pack(layout), n)
    clean = ops.sparse_linear(torch.where(x.isfinite(), x, 0.0), w.pack(layout), n)
    for row in range(6):
        touched = (w.dense[:, ~x[row].isfinite()] != 0).any(1)
        assert not y[row][touched].isfinite().any()
        assert torch.equal(y[row][~touched], clean[row][~touched])
    assert torch.equal(y[2].isposinf(), w.dense[:, 30] > 0)
    assert torch.equal(y[4].isposinf(), w.dense[:, 49] < 0)


@pytest.mark.parametrize(("pattern", "density"), [("rows", 0.97), ("panels", 0.5)])
def test_nan_shows_where_there_is_a_weight_whatever_is_chosen(pattern: str, density: float) -> None:
    """A weight almost full, and one in 16x1 blocks of which a few weights happen to be zero: no hole is multiplied."""
    n, k = 64, 96
    dense = weight(pattern, n, k, density).dense
    dense[::9, ::7] = 0
    w = canonical(dense)
    for column in range(0, k, 7):
        x = torch.randn(3, k)
        x[1, column] = math.nan
        y = ops.sparse_linear(x, w.pack(), n)
        assert torch.equal(y.isnan().any(0), dense[:, column] != 0), ops.sparse_header(w.pack())["format"]


# --- int8 ---------------------------------------------------------------------------------------------------------------

INT8 = [layout for layout, bits in BITS.items() if bits == 8]


@pytest.mark.parametrize("layout", INT8)
@pytest.mark.parametrize("activation_bits", [7, 8])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_integers_equal_numpy(layout: str, activation_bits: int, density: float) -> None:
    for n, k in itertools.product(SIZES, DEPTHS):
        w = weight(layout, n, k, density, activation_bits)
        packed = w.pack(layout)
        for m in (0, 1, 2, 5, 9):
            x = torch.randn(m, k)
            expected, scale, zero = integers(x, w.dense, activation_bits)
            acc, got_scale, got_zero = ops.sparse_accumulate(x, packed)
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
        acc, *_ = ops.sparse_accumulate(x, w.pack(layout))
        np.testing.assert_array_equal(acc.numpy(), integers(x, w.dense, activation_bits)[0])


@pytest.mark.parametrize("layout", INT8)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_has_the_bits_of_int8_linear(layout: str, activation: str, with_bias: bool, same: Same) -> None:
    n, k = 37, 130
    for activation_bits in (7, 8):
        w = weight(layout, n, k, 0.4, activation_bits)
        assert w.scale is not None
        bias = torch.randn(n) if with_bias else None
        x = torch.randn(9, k) * torch.logspace(-20, 20, 9)[:, None]
        x[3] = 0
        for dtype in FLOATS:
            got = ops.sparse_linear(x.to(dtype), w.pack(layout), n, w.scale, bias, activation)
            dense = ops.int8_pack(w.dense, activation_bits)
            expected = ops.int8_linear(x.to(dtype), dense, w.scale, bias, activation)
            nan = expected.isnan()  # rows that float16 cannot hold; the sign of a NaN is left to the processor
            assert torch.equal(got.isnan(), nan)
            assert same(got[~nan], expected[~nan])


@pytest.mark.parametrize("layout", INT8)
def test_a_row_with_nan_or_inf_gives_a_row_of_nan(layout: str) -> None:
    w = weight(layout, 24, 40, 0.3)
    x = torch.randn(4, 40)
    x[0, 3], x[2, 39] = math.nan, math.inf
    y = ops.sparse_linear(x, w.pack(layout), 24, w.scale)
    assert y[[0, 2]].isnan().all() and y[[1, 3]].isfinite().all()


# --- shapes, strides, dtypes, threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ops.SPARSE_FORMATS)
def test_rows_without_weights(layout: str) -> None:
    """Whole blocks of empty rows in front, between and behind: only the bias is left there."""
    n, k = 80, 48
    dense = weight(layout, n, k, 1.0).dense
    for empty in (slice(0, 16), slice(16, 48), slice(64, 80), slice(0, 80)):
        holes = dense.clone()
        holes[empty] = 0
        w, bias = canonical(holes), torch.randn(n)
        y = ops.sparse_linear(torch.randn(5, k), w.pack(layout), n, w.scale, bias)
        assert torch.equal(y[:, empty], bias[empty].expand(5, -1))
        assert torch.equal(ops.sparse_dense(w.pack(layout)), holes)


@pytest.mark.parametrize("layout", ops.SPARSE_FORMATS)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 0, 3), (0,), (70, 3)])
def test_leading_dimensions(layout: str, lead: tuple[int, ...], same: Same) -> None:
    w, bias = weight(layout, 24, 20), torch.randn(24)
    packed = w.pack(layout)
    x = torch.randn(*lead, 20)
    y = ops.sparse_linear(x, packed, 24, w.scale, bias)
    assert y.shape == (*lead, 24)
    assert same(y, ops.sparse_linear(x.reshape(-1, 20), packed, 24, w.scale, bias).reshape(*lead, 24))
    for row, out in itertools.islice(zip(x.reshape(-1, 20), y.reshape(-1, 24), strict=True), 8):
        alone = ops.sparse_linear(row, packed, 24, w.scale, bias)
        if BITS[layout] == 8:
            assert same(alone, out), "a row does not depend on the rows beside it"
        else:  # another kernel may take one row, and sum in another order
            _, bound = exact_with_bound(row[None], w.dense, bias)
            assert ((alone - out).abs() <= 2 * bound[0]).all()


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "left half of wider rows": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]],
    "right half of wider rows": lambda x: torch.cat([torch.full_like(x, torch.nan), x], 1)[:, x.shape[1] :],
    "every second row": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2],
    "every second column": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 2).flatten(1)[:, ::2],
    "odd offset": lambda x: torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view_as(x),
    "one row repeated": lambda x: x[:1].expand(x.shape),
    "one value repeated": lambda x: x[:1, :1].expand(x.shape),
    "overlapping rows": lambda x: x.flatten().as_strided(x.shape, (1, 1)),
    "permuted": lambda x: x.view(3, 4, -1).permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


@pytest.mark.parametrize("strides", STRIDED)
@pytest.mark.parametrize("layout", ops.SPARSE_FORMATS)
def test_strides(strides: str, layout: str, same: Same) -> None:
    w = weight(layout, 40, 36)
    packed = w.pack(layout)
    for dtype in FLOATS:
        x = STRIDED[strides](torch.randn(12, 36).to(dtype))
        dense = x.clone(memory_format=torch.contiguous_format)
        before = dense.clone()
        assert same(ops.sparse_linear(x, packed, 40, w.scale), ops.sparse_linear(dense, packed, 40, w.scale))
        assert same(x, before), "the op does not write to its input"
        if BITS[layout] == 8 and x.dim() == 2:
            assert torch.equal(ops.sparse_accumulate(x, packed)[0], ops.sparse_accumulate(dense, packed)[0])


@pytest.mark.parametrize("layout", ops.SPARSE_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_half_precision_is_the_rounded_float32_result(
    layout: str, dtype: torch.dtype, activation: str, same: Same
) -> None:
    w, bias = weight(layout, 40, 36), torch.randn(40)
    packed = w.pack(layout)
    for m in (1, 7):
        x = torch.randn(m, 36).to(dtype)
        y = ops.sparse_linear(x, packed, 40, w.scale, bias, activation)
        assert same(y, ops.sparse_linear(x.float(), packed, 40, w.scale, bias, activation).to(dtype))


SMOOTH = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


@pytest.mark.parametrize("layout", ops.SPARSE_FORMATS)
def test_activations(layout: str) -> None:
    w, bias = weight(layout, 40, 36), torch.randn(40)
    x, packed = torch.randn(7, 36), w.pack(layout)
    v = ops.sparse_linear(x, packed, 40, w.scale, bias)
    assert torch.equal(ops.sparse_linear(x, packed, 40, w.scale, bias, "relu"), v.clamp(min=0))
    for name, function in SMOOTH.items():
        y = ops.sparse_linear(x, packed, 40, w.scale, bias, name)
        assert ((y.double() - function(v.double())).abs() <= 8 * EPS * v.double().abs() + 1e-44).all()


@pytest.mark.parametrize("layout", ops.SPARSE_FORMATS)
def test_every_thread_count_gives_the_same_bits(layout: str, same: Same) -> None:
    w, bias = weight(layout, 200, 300), torch.randn(200)
    packed, before = w.pack(layout), torch.get_num_threads()
    inputs = [torch.randn(m, 300) for m in (1, 2, 7, 64)]

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        assert torch.equal(w.pack(layout), packed)
        return [ops.sparse_linear(x, packed, 200, w.scale, bias) for x in inputs]

    try:
        expected = run(1)
        for threads in (2, 3, 5):
            for got, one in zip(run(threads), expected, strict=True):
                assert same(got, one)
    finally:
        torch.set_num_threads(before)


# --- torch's own checks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "quads"])
@pytest.mark.parametrize(
    ("dtype", "shape", "with_bias", "activation", "transposed"),
    [
        (torch.float32, (3, 20), True, "none", False),
        (torch.bfloat16, (2, 3, 20), False, "relu", False),
        (torch.float16, (20,), True, "gelu", False),
        (torch.float32, (0, 20), False, "silu", False),
        (torch.float32, (5, 20), True, "gelu_tanh", True),
    ],
)
def test_opcheck_linear(
    layout: str, dtype: torch.dtype, shape: tuple[int, ...], with_bias: bool, activation: str, transposed: bool
) -> None:
    w, bias = weight(layout, 24, 20), torch.randn(24)
    x = torch.randn(shape).to(dtype)
    x = x.T.contiguous().T if transposed else x
    arguments = (x, w.pack(layout), 24, w.scale, bias if with_bias else None, activation)
    torch.library.opcheck(torch.ops.pycompress.sparse_linear.default, arguments)


@pytest.mark.parametrize("layout", ops.SPARSE_FORMATS)
def test_opcheck_of_the_rest(layout: str) -> None:
    w = weight(layout, 24, 20)
    packed, bits = w.pack(layout), BITS[layout]
    arguments = (w.mask, w.values, 20, w.activation_bits, layout)
    torch.library.opcheck(torch.ops.pycompress.sparse_pack.default, arguments)
    torch.library.opcheck(torch.ops.pycompress.sparse_unpack.default, (packed, 24, 20, len(w.values), bits))
    torch.library.opcheck(torch.ops.pycompress.sparse_dense.default, (packed, 24, 20, bits))


def test_fake_has_the_strides_of_the_real_result() -> None:
    w = weight("rows", 24, 20)
    x = torch.randn(2, 20, 5).transpose(1, 2)
    real = ops.sparse_linear(x, w.pack(), 24)
    fake = ops.sparse_linear(x.to("meta"), w.pack().to("meta"), 24)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert fake.is_meta and real.is_contiguous()


def test_compile_fullgraph(same: Same) -> None:
    w, bias = weight("quads", 24, 20), torch.randn(24)
    packed = w.pack()

    def call(x: Tensor) -> Tensor:
        y = ops.sparse_linear(x, packed, 24, w.scale, bias, "gelu")
        return y @ ops.sparse_dense(packed, (24, 20, 8)).to(y.dtype)

    torch._dynamo.reset()
    x = torch.randn(5, 20)
    assert same(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
    torch._dynamo.reset()


def test_vmap(same: Same) -> None:
    w, bias = weight("rows", 24, 20), torch.randn(24)
    packed, x = w.pack(), torch.randn(4, 3, 20)
    y = torch.func.vmap(lambda row: ops.sparse_linear(row, packed, 24, None, bias))(x)
    assert same(y, ops.sparse_linear(x, packed, 24, None, bias))
    with pytest.raises(NotImplementedError, match="vmap over the weights"):
        torch.func.vmap(lambda b: ops.sparse_linear(x[0], packed, 24, None, b))(bias.expand(2, 24).contiguous())


def test_dispatch_modes_see_the_op() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    w = weight("rows", 24, 20)
    packed = w.pack()
    with Spy():
        ops.sparse_linear(torch.randn(3, 20), packed, 24)
    assert torch.ops.pycompress.sparse_linear.default in seen


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit() -> None:
    w = weight("rows", 24, 20)
    packed = w.pack()
    for m in (0, 3):
        with pytest.raises(ValueError, match=rf"sparse_linear: x is \[{m}, 100\], the packed weight expects k = 20"):
            ops.sparse_linear(torch.randn(m, 100), packed, 24)
    with pytest.raises(ValueError, match=r"sparse_linear: n is 25, the packed weight has 24 channels"):
        ops.sparse_linear(torch.randn(3, 20), packed, 25)
    with pytest.raises(ValueError, match=r"sparse_linear: bias is \[25\], expected \[24\]"):
        ops.sparse_linear(torch.randn(3, 20), packed, 24, None, torch.randn(25))
    with pytest.raises(ValueError, match=r"sparse_linear: bias is torch.float64 \[24\] on cpu"):
        ops.sparse_linear(torch.randn(3, 20), packed, 24, None, torch.randn(24).double())
    with pytest.raises(ValueError, match="sparse_linear: x is a scalar"):
        ops.sparse_linear(torch.tensor(1.0), packed, 24)
    with pytest.raises(TypeError, match=r"sparse_linear: x is torch\.float64, expected float32, bfloat16 or float16"):
        ops.sparse_linear(torch.randn(3, 20).double(), packed, 24)
    with pytest.raises(ValueError, match="sparse_linear: activation is 'tanh', expected one of none, relu"):
        ops.sparse_linear(torch.randn(3, 20), packed, 24, None, None, "tanh")


def test_scale_belongs_to_int8() -> None:
    floats, quantized, x = weight("rows", 24, 20), weight("quads", 24, 20), torch.randn(3, 20)
    with pytest.raises(ValueError, match="sparse_linear: the packed weight is float32, which has neither a scale"):
        ops.sparse_linear(x, floats.pack(), 24, torch.ones(24))
    with pytest.raises(ValueError, match="sparse_linear: the packed weight is int8, expected a scale"):
        ops.sparse_linear(x, quantized.pack(), 24)
    with pytest.raises(ValueError, match=r"sparse_linear: scale is \[23\], expected \[24\]"):
        ops.sparse_linear(x, quantized.pack(), 24, torch.ones(23))
    with pytest.raises(ValueError, match="sparse_accumulate: the packed weight is float32, expected int8"):
        ops.sparse_accumulate(x, floats.pack())
    with pytest.raises(ValueError, match=r"sparse_accumulate: x is \[20\], expected \[m, k\]"):
        ops.sparse_accumulate(x[0], quantized.pack())


Change = Callable[[Tensor, Tensor], tuple[Any, ...]]


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (
            "rows",
            lambda mask, values: (mask.int(), values, 20),
            r"mask is torch.int32 \[24, 3\], expected uint8 \[n, 3\]",
        ),
        ("rows", lambda mask, values: (mask, values, 30), r"mask is torch.uint8 \[24, 3\], expected uint8 \[n, 4\]"),
        ("rows", lambda mask, values: (mask[0], values, 20), r"mask is torch.uint8 \[3\], expected uint8"),
        (
            "rows",
            lambda mask, values: (mask, values.double(), 20),
            r"values is torch.float64 \[\d+\], expected float32",
        ),
        ("rows", lambda mask, values: (mask, values[None], 20), r"values is torch.float32 \[1, \d+\]"),
        (
            "rows",
            lambda mask, values: (mask[:0], values[:0], 20),
            r"out_features is 0, expected 1 to 16777216",
        ),
        ("rows", lambda mask, values: (mask[:, :0], values[:0], 0), r"in_features is 0, expected 1 to 65536"),
        (
            "rows",
            lambda mask, values: (torch.zeros(1, 8193).byte(), values[:0], 65537),
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
        ("quads", lambda mask, values: (mask, values, 20), r"activation_bits is 0, expected 7 or 8"),
        ("quads", lambda mask, values: (mask, values * 0, 20, 8), r"480 values are zero"),
        ("quads", lambda mask, values: (mask, values * 0 - 128, 20, 8), r"a value is -128"),
    ],
)
def test_weights_that_pack_refuses(layout: str, change: Change, message: str) -> None:
    w = canonical(torch.ones(24, 20, dtype=torch.float32 if layout == "rows" else torch.int8))
    with pytest.raises(ValueError, match=f"sparse_pack: {message}"):
        ops.sparse_pack(*change(w.mask, w.values))


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return type(error).__name__
    return "result"


def outcomes(packed: Tensor, w: Weight) -> set[str]:
    """What the ops make of a packed buffer."""
    n, k = w.dense.shape
    calls: list[Callable[[], object]] = [
        lambda: ops.sparse_linear(torch.ones(3, k), packed, n, w.scale),
        lambda: ops.sparse_unpack(packed),
        lambda: ops.sparse_dense(packed),
        lambda: ops.sparse_header(packed),
    ]
    return {outcome(call) for call in calls}


@pytest.mark.parametrize("layout", ops.SPARSE_FORMATS)
def test_buffers_that_no_pack_made(layout: str, forked: Forked) -> None:
    w = weight(layout, 24, 40)
    packed = w.pack(layout)
    broken = {
        "empty": packed[:0],
        "header only": packed[:40],
        "truncated": packed[:-1],
        "too long": torch.cat([packed, packed]),
        "zeros": torch.zeros_like(packed),
        "float32": packed.float(),
        "every second byte": torch.stack([packed, packed], 1).flatten()[::2],
        "two dimensions": packed[None],
        "of the int8 op": ops.int8_pack(torch.ones(24, 40, dtype=torch.int8), 8),
    }

    def run() -> dict[str, set[str]]:
        return {name: outcomes(buffer, w) for name, buffer in broken.items()}

    for name, found in forked(run).items():
        assert found == {"ValueError"}, name


@pytest.mark.parametrize("layout", ops.SPARSE_FORMATS)
def test_no_corrupted_header_crashes(layout: str, forked: Forked) -> None:
    """A packed buffer is made by this process, but an exported program may carry one in a file."""
    w = weight(layout, 24, 40)
    packed = w.pack(layout)

    def run() -> int:
        for position, value in itertools.product(range(min(128, len(packed))), (0, 1, 0x7F, 0x80, 0xFF)):
            broken = packed.clone()
            broken[position] = value
            outcomes(broken, w)
        return 0

    assert forked(run) == 0


def test_sizes_other_than_the_packed_weight_has() -> None:
    packed = weight("rows", 24, 40).pack()
    with pytest.raises(ValueError, match="sparse_unpack: n, k, nnz and bits of the packed weight are"):
        ops.sparse_unpack(packed, (24, 40, 1, 32))
    with pytest.raises(ValueError, match=r"sparse_dense: n, k and bits of the packed weight are \(24, 40, 32\), not"):
        ops.sparse_dense(packed, (24, 40, 8))


def test_a_buffer_on_another_device_is_refused(forked: Forked) -> None:
    """A meta tensor has no memory, so reading it would be a crash. (All of them on meta have a fake result.)"""
    w = weight("rows", 24, 40)
    packed = w.pack().to("meta")

    def run() -> list[str]:
        return [
            outcome(lambda: ops.sparse_linear(torch.ones(3, 40), packed, 24)),
            outcome(lambda: ops.sparse_header(packed)),
            outcome(lambda: ops.sparse_linear(torch.ones(3, 40), w.pack(), 24, None, torch.ones(24, device="meta"))),
        ]

    assert "result" not in forked(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: torch.nested.nested_tensor([x, x[:1]]),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_other_layouts_are_refused(change: Callable[[Tensor], Tensor], forked: Forked) -> None:
    packed, x = weight("rows", 24, 20).pack(), change(torch.randn(3, 20))

    def run() -> str:
        try:
            return str(ops.sparse_linear(x, packed, 24).shape)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            return f"refused: {type(error).__name__}"

    assert forked(run).startswith("refused")


def test_lazy_zeros_and_negated_views(forked: Forked, same: Same) -> None:
    packed, bias = weight("rows", 24, 20).pack(), torch.randn(24)
    x = torch._neg_view(torch.randn(3, 20))
    assert same(ops.sparse_linear(x, packed, 24), ops.sparse_linear(x.resolve_neg(), packed, 24))

    def run() -> bool:
        y = ops.sparse_linear(torch._efficientzerotensor((3, 20)), packed, 24, None, bias)
        return torch.equal(y, bias.expand(3, 24))

    assert forked(run)
