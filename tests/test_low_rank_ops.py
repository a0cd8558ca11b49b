"""The low-rank ops, on the native kernels and on their twin: against float64, two int8 linears, and as torch sees them."""

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
from pycompress.methods.int4 import pack_nibbles

Same = Callable[[Tensor, Tensor], bool]
Forked = Callable[..., Any]

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EPS = float(torch.finfo(torch.float32).eps)
# What stands beside the factors; a sparse residual goes by the name of its format.
FLOAT_RESIDUALS = ["dense", "rows", "panels"]
INT8_RESIDUALS = ["int8", "quads", "quads4", "windows", "chains"]
INT4_RESIDUALS = {"int4": (32, False), "int4 symmetric": (128, True)}  # group, and whether there are no zero points
QUANTIZED = [*INT8_RESIDUALS, *INT4_RESIDUALS]
RESIDUALS = ["", *FLOAT_RESIDUALS, *QUANTIZED]
KINDS = [(bits, residual) for bits in (32, 8) for residual in RESIDUALS]
EVERY = pytest.mark.parametrize(("bits", "residual"), KINDS)
# (n, k, rank): around the tile of 6 rows x 16 channels, the ends of the rank, odd sizes.
SIZES = [
    (1, 1, 1), (1, 40, 1), (40, 1, 1), (15, 33, 15), (16, 16, 16), (17, 31, 6), (33, 17, 17), (48, 130, 1), (65, 131, 33),
]  # fmt: skip
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 13, 64, 130]


@pytest.fixture(params=["native", "twin"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and ops.extension_error() is not None:
        pytest.skip("no extension was built")
    if request.param == "twin":
        for module in (ops.native, ops.int8, ops.int4, ops.sparse, ops.low_rank):
            monkeypatch.setattr(module, "_C", reference.extension)
            monkeypatch.setattr(module, "reads_tensors", False, raising=False)
    return request.param


class Weight(NamedTuple):
    down: Tensor
    up: Tensor
    down_scale: Tensor | None
    up_scale: Tensor | None
    activation_bits: int
    residual: str  # one of RESIDUALS
    values: Tensor  # of the residual, float32, int8 or (int4) uint8 [n, k]; empty where there is none
    scale: Tensor | None  # of the residual
    grid: tuple[Tensor, Tensor | None] | None = None  # of int4: bfloat16 scales and uint8 zero points, both [n, groups]

    @property
    def residual_bits(self) -> int:
        """In which an int8 residual quantizes x: for half of the weights as the factors do."""
        return 7 + self.up.shape[0] % 2

    def packed_residual(self) -> Tensor | None:
        """As `low_rank_pack` takes it."""
        if self.residual in {"", "dense"}:
            return self.values if self.residual else None
        if self.residual == "int8":
            return ops.int8_pack(self.values, self.residual_bits)
        if self.grid is not None:
            return self.packed_int4()
        keep = self.values.numpy() != 0
        mask = torch.from_numpy(np.packbits(keep, axis=1, bitorder="little"))
        values, bits = torch.from_numpy(self.values.numpy()[keep]), 0 if self.scale is None else self.residual_bits
        try:
            return ops.sparse_pack(mask, values, self.values.shape[1], bits, self.residual)
        except ValueError as error:
            if "no kernel that this processor runs" in str(error):  # windows and chains, under PYCOMPRESS_ISA=scalar
                pytest.skip(str(error))
            raise

    def packed_int4(self, activation_bits: int = 8) -> Tensor:
        assert self.grid is not None
        scale, zero_point = self.grid
        zeros = None if zero_point is None else pack_nibbles(zero_point)
        group, _ = INT4_RESIDUALS[self.residual]
        return ops.int4_pack(pack_nibbles(self.values), scale, zeros, self.values.shape[1], group, activation_bits)

    @property
    def kind(self) -> str:
        kind = self.residual.partition(" ")[0]
        return kind if kind in ops.RESIDUALS else "sparse"

    def arguments(self) -> tuple[Any, ...]:
        return (*self[:5], self.kind, self.packed_residual(), self.scale)

    def pack(self) -> Tensor:
        return ops.low_rank_pack(*self.arguments())

    def factors(self) -> tuple[Tensor, Tensor]:
        """In float64."""
        down, up = self.down.double(), self.up.double()
        if self.down_scale is None or self.up_scale is None:
            return down, up
        return down * self.down_scale.double()[:, None], up * self.up_scale.double()[:, None]

    def steps(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points of an int4 residual: float32 and uint8, [n, groups]."""
        assert self.grid is not None
        scale, zero_point = self.grid
        return scale.float(), torch.full_like(scale, 8, dtype=torch.uint8) if zero_point is None else zero_point

    def residual64(self) -> Tensor:
        if self.grid is not None:
            group, k = INT4_RESIDUALS[self.residual][0], self.values.shape[1]
            steps, zero = (t.double().repeat_interleave(group, 1)[:, :k] for t in self.steps())
            return (self.values.double() - zero) * steps
        scale = 1 if self.scale is None else self.scale.double()[:, None]
        return self.values.double() * scale if self.residual else torch.zeros(1, dtype=torch.float64)


def scales(n: int) -> Tensor:
    return torch.rand(n) / 127 + 1e-3


def weight(
    n: int, k: int, rank: int, bits: int = 32, residual: str = "", *, activation_bits: int = 7, small: bool = False
) -> Weight:
    """Random; `small`: of integers so small that no order of a float32 sum rounds."""

    def matrix(rows: int, columns: int, int8: bool) -> Tensor:
        if small or int8:
            top = 4 if small else 128
            return torch.randint(1 - top, top, (rows, columns)).to(torch.int8 if int8 else torch.float32)
        return torch.randn(rows, columns)

    values, scale, grid = torch.empty(0), None, None
    if residual in INT4_RESIDUALS:
        group, symmetric = INT4_RESIDUALS[residual]
        groups = -(-k // group)
        values = torch.randint(16, (n, k), dtype=torch.uint8)
        zero_point = None if symmetric else torch.randint(16, (n, groups), dtype=torch.uint8)
        grid = (torch.rand(n, groups) * 0.1 + 0.01).bfloat16(), zero_point
    elif residual:
        values = matrix(n, k, residual in INT8_RESIDUALS)
        scale = scales(n) if residual in INT8_RESIDUALS else None
        if residual == "windows":
            values = values * (torch.arange(k) % 4 < 2)
        elif residual not in {"dense", "int8"}:
            rows, columns = {"panels": (16, 1), "quads4": (1, 4), "chains": (16, 4)}.get(residual, (1, 1))
            keep = torch.rand(-(-n // rows), -(-k // columns)) < 0.4
            values = values * keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:n, :k]
    down, up = matrix(rank, k, bits == 8), matrix(n, rank, bits == 8)
    if bits == 32:
        return Weight(down, up, None, None, 0, residual, values, scale, grid)
    return Weight(down, up, scales(rank), scales(n), activation_bits, residual, values, scale, grid)


def gamma(count: int) -> float:
    return count * EPS / 2 / (1 - count * EPS / 2)


def float_part(x: Tensor, w: Weight, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums of float32 factors and of a float32 residual in float64, and how far a float32 result may lie from them.

    A product of the factors meets at most k roundings by 1 + u in t, then r, then one for each product of the residual and two
    more where partial sums are joined; the bias meets those behind t. Subnormal results are off by 2^-150 each.
    """
    down, up = w.factors()
    k, rank = w.down.shape[1], w.down.shape[0]
    x, start = x.double(), 0.0 if bias is None else bias.double()
    exact, size, steps = x @ down.T @ up.T + start, x.abs() @ down.T.abs() @ up.T.abs() + abs(start), k + rank + 4
    if w.residual in FLOAT_RESIDUALS:
        exact, size, steps = exact + x @ w.values.double().T, size + x.abs() @ w.values.double().T.abs(), steps + k
    tiny = 2.0**-149 * (k * (1 + up.abs().sum(1)) + rank + k)
    return exact, gamma(steps) * size + tiny


def int8_part(x: Tensor, w: Weight, bias: Tensor | None) -> Tensor:
    """The low-rank part of int8 factors, to the bit: two linears of the int8 formula."""
    rows = x.float().contiguous().numpy()
    assert w.down_scale is not None and w.up_scale is not None
    linear, bits = reference.int8.linear, w.activation_bits
    t = linear(rows, w.down.numpy(), w.down_scale.numpy(), activation_bits=bits)
    offset = None if bias is None else bias.numpy()
    return torch.from_numpy(linear(t, w.up.numpy(), w.up_scale.numpy(), offset, activation_bits=bits))


def integer_residual(x: Tensor, w: Weight) -> Tensor:
    """What an int8 or int4 residual adds, to the bit."""
    rows, values = x.float().contiguous().numpy(), w.values.numpy()
    if w.grid is not None:
        steps, zero_point = (t.numpy() for t in w.steps())
        return torch.from_numpy(reference.int4.linear(rows, values, steps, zero_point, INT4_RESIDUALS[w.residual][0]))
    assert w.scale is not None
    return torch.from_numpy(reference.int8.linear(rows, values, w.scale.numpy(), activation_bits=w.residual_bits))


def check_result(y: Tensor, x: Tensor, w: Weight, bias: Tensor | None, message: object = None) -> None:
    """y, float32 without activation, is what the contract says."""
    if w.down.dtype == torch.int8:
        low = int8_part(x, w, bias)
        if w.residual not in FLOAT_RESIDUALS:
            assert torch.equal(y, integer_residual(x, w) + low if w.residual else low), message
            return
        added = x.double() @ w.values.double().T
        bound = gamma(w.values.shape[1] + 4) * (x.double().abs() @ w.values.double().T.abs() + low.abs())
        assert ((y - (added + low)).abs() <= bound + w.values.shape[1] * 2.0**-149).all(), message
        return
    exact, bound = float_part(x, w, bias)
    if w.residual in QUANTIZED:
        exact = exact + integer_residual(x, w)
        bound = bound + EPS * (exact.abs() + bound)
    assert ((y - exact).abs() <= bound).all(), message


# --- pack and unpack ----------------------------------------------------------------------------------------------------


@EVERY
def test_unpack_is_the_inverse_of_pack(bits: int, residual: str, same: Same) -> None:
    for n, k, rank in SIZES:
        w = weight(n, k, rank, bits, residual)
        arguments, packed = w.arguments(), w.pack()
        assert packed.dtype == torch.uint8 and packed.dim() == 1
        found = ops.low_rank_unpack(packed)
        given = [arguments[i] for i in (0, 1, 2, 3, 6, 7)]
        for got, expected in zip(found, given, strict=True):
            assert got.numel() == 0 if expected is None else same(got, expected)
        assert ops.low_rank_header(packed) == {
            "n": n, "k": k, "rank": rank, "bits": bits, "activation_bits": 7 if bits == 8 else 0, "residual": w.kind,
            "residual_bytes": 0 if arguments[6] is None else arguments[6].nbytes, "residual_scaled": w.scale is not None,
        }  # fmt: skip
        down, up = w.factors()
        exact = up @ down + w.residual64()
        size = up.abs() @ down.abs() + w.residual64().abs()
        dense = ops.low_rank_dense(packed, n, k)
        assert dense.dtype == torch.float32 and dense.shape == (n, k)
        assert ((dense - exact).abs() <= gamma(rank + 4) * size).all()


def test_factors_that_are_not_contiguous() -> None:
    w = weight(20, 30, 5, residual="dense")
    turned = w._replace(down=w.down.T.contiguous().T, up=w.up.T.contiguous().T, values=w.values.T.contiguous().T)
    assert not turned.down.is_contiguous()
    assert torch.equal(turned.pack(), w.pack())


# --- what it computes ---------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("size", SIZES)
def test_result(bits: int, residual: str, size: tuple[int, int, int]) -> None:
    n, k, rank = size
    w, bias = weight(n, k, rank, bits, residual), torch.randn(n)
    packed = w.pack()
    for m in ROWS:
        x, offset = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None], bias if m % 2 else None
        y = ops.low_rank_linear(x, packed, n, offset)
        assert y.shape == (m, n) and y.dtype == torch.float32
        check_result(y, x, w, offset, (m, size))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_float32_is_exact_where_it_can_be(residual: str) -> None:
    """Small integers: no order of the sums rounds, so a product that was left out or taken twice shows."""
    for n, k, rank in SIZES:
        w, bias = weight(n, k, rank, residual=residual, small=True), torch.randint(-9, 9, (n,)).float()
        packed = w.pack()
        for m in ROWS:
            x = torch.randint(-4, 5, (m, k)).float()
            expected = x @ w.down.T @ w.up.T + bias
            if w.residual:
                expected += integer_residual(x, w) if w.residual in QUANTIZED else x @ w.values.T
            assert torch.equal(ops.low_rank_linear(x, packed, n, bias), expected), (m, n, k, rank)


@EVERY
def test_long_rows_and_extreme_values(bits: int, residual: str) -> None:
    n, k, rank = 40, 2100, 40
    w = weight(n, k, rank, bits, residual)
    half = torch.tensor([1e6, -1e6])
    rows = [torch.randn(k), half.repeat(k // 2), half.repeat_interleave(k // 2), torch.full((k,), 1e30)]
    x = torch.stack([*rows, torch.randn(k) * 1e-30, torch.full((k,), 1e-44), torch.zeros(k)])
    check_result(ops.low_rank_linear(x, w.pack(), n), x, w, None)


@pytest.mark.parametrize("activation_bits", [7, 8])
@pytest.mark.parametrize("residual", ["", "int8", "quads", "int4", "int4 symmetric"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_factors_are_two_int8_linears(activation_bits: int, residual: str, dtype: torch.dtype, same: Same) -> None:
    """To the bit, with the activation and the rounding to x's dtype."""
    n, k, rank = 37, 130, 19
    w, bias = weight(n, k, rank, 8, residual, activation_bits=activation_bits), torch.randn(n)
    x = (torch.randn(9, k) * torch.logspace(-20, 3, 9)[:, None]).to(dtype)
    x[3] = 0
    v = int8_part(x, w, bias) + (integer_residual(x, w) if residual else 0)
    assert same(ops.low_rank_linear(x, w.pack(), n, bias), v.to(dtype))
    assert same(ops.low_rank_linear(x, w.pack(), n, bias, "relu"), v.clamp(min=0).to(dtype))


@pytest.mark.parametrize("residual", INT4_RESIDUALS)
@pytest.mark.parametrize("activation_bits", [7, 8])
def test_beside_int4_int8_factors_are_the_sum_of_two_ops(activation_bits: int, residual: str) -> None:
    """Whether both quantize x alike (8 bits), which is then done once, or not."""
    for n, k, rank in [*SIZES, (20, 300, 8)]:
        w, bias = weight(n, k, rank, 8, residual, activation_bits=activation_bits), torch.randn(n)
        factors = w._replace(residual="", grid=None).pack()
        for m in ROWS:
            x = torch.randn(m, k) + 3
            both = ops.int4_linear(x, w.packed_int4(), n) + ops.low_rank_linear(x, factors, n, bias)
            assert torch.equal(ops.low_rank_linear(x, w.pack(), n, bias), both), (m, n, k, rank)


@pytest.mark.parametrize("bits", [32, 8])
def test_intermediate(bits: int) -> None:
    for n, k, rank in SIZES:
        w = weight(n, k, rank, bits, "int8")
        for m, dtype in itertools.product((0, 1, 7, 64), FLOATS):
            x = torch.randn(m, k).to(dtype)
            t = ops.low_rank_intermediate(x, w.pack())
            assert t.shape == (m, rank) and t.dtype == torch.float32
            if bits == 8:
                rows, scale = x.float().numpy(), w.down_scale.numpy()
                assert np.array_equal(t, reference.int8.linear(rows, w.down.numpy(), scale, activation_bits=7))
            else:
                exact, size = x.double() @ w.down.double().T, x.double().abs() @ w.down.double().T.abs()
                assert ((t - exact).abs() <= gamma(k + 2) * size).all()


@EVERY
def test_a_row_with_nan_or_inf_touches_no_other(bits: int, residual: str) -> None:
    n, k = 37, 50
    w = weight(n, k, 9, bits, residual)
    packed = w.pack()
    for m in (3, 6, 20):
        x, bad = torch.randn(m, k), [0, 2, *([5] if m > 5 else [])]
        clean = ops.low_rank_linear(x, packed, n)
        x[bad, 3] = torch.tensor([math.nan, math.inf, -math.inf])[: len(bad)]
        y = ops.low_rank_linear(x, packed, n)
        others = [row for row in range(m) if row not in bad]
        assert torch.equal(y[others], clean[others])
        if bits == 8 or residual in QUANTIZED:
            assert y[bad].isnan().all()
        else:
            assert not y[bad].isfinite().any(), "every output has a weight for each input"


# --- shapes, strides, dtypes, threads -----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 0, 3), (0,), (70, 3)])
def test_leading_dimensions(bits: int, residual: str, lead: tuple[int, ...], same: Same) -> None:
    w, bias = weight(24, 20, 6, bits, residual), torch.randn(24)
    packed, x = w.pack(), torch.randn(*lead, 20)
    y = ops.low_rank_linear(x, packed, 24, bias)
    assert y.shape == (*lead, 24)
    assert same(y, ops.low_rank_linear(x.reshape(-1, 20), packed, 24, bias).reshape(*lead, 24))
    for row, out in itertools.islice(zip(x.reshape(-1, 20), y.reshape(-1, 24), strict=True), 8):
        check_result(ops.low_rank_linear(row, packed, 24, bias)[None], row[None], w, bias)
        check_result(out[None], row[None], w, bias)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "left half of wider rows": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]],
    "every second row": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2],
    "every second column": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 2).flatten(1)[:, ::2],
    "odd offset": lambda x: torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view_as(x),
    "one row repeated": lambda x: x[:1].expand(x.shape),
    "overlapping rows": lambda x: x.flatten().as_strided(x.shape, (1, 1)),
    "permuted": lambda x: x.view(3, 4, -1).permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "negated": torch._neg_view,
}


@pytest.mark.parametrize("strides", STRIDED)
@EVERY
def test_strides(strides: str, bits: int, residual: str, same: Same) -> None:
    packed = weight(40, 36, 7, bits, residual).pack()
    for dtype in FLOATS:
        x = STRIDED[strides](torch.randn(12, 36).to(dtype))
        dense = x.resolve_neg().clone(memory_format=torch.contiguous_format)
        before = dense.clone()
        assert same(ops.low_rank_linear(x, packed, 40), ops.low_rank_linear(dense, packed, 40))
        assert same(x.resolve_neg(), before), "the op does not write to its input"
        if x.dim() == 2:
            assert same(ops.low_rank_intermediate(x, packed), ops.low_rank_intermediate(dense, packed))


@EVERY
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations_and_half_precision(bits: int, residual: str, activation: str, same: Same) -> None:
    w, bias = weight(40, 36, 7, bits, residual), torch.randn(40)
    packed = w.pack()
    functions = {
        "none": torch.clone, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    }  # fmt: skip
    for m in (1, 7):
        x = torch.randn(m, 36)
        v = ops.low_rank_linear(x, packed, 40, bias).double()
        y = ops.low_rank_linear(x, packed, 40, bias, activation)
        slack = 0 if activation in {"none", "relu"} else 8 * EPS
        assert ((y - functions[activation](v)).abs() <= slack * v.abs()).all()
        for dtype in (torch.bfloat16, torch.float16):
            half = x.to(dtype)
            expected = ops.low_rank_linear(half.float(), packed, 40, bias, activation).to(dtype)
            assert same(ops.low_rank_linear(half, packed, 40, bias, activation), expected)


@EVERY
def test_every_thread_count_gives_the_same_bits(bits: int, residual: str, same: Same) -> None:
    w, bias = weight(200, 300, 40, bits, residual), torch.randn(200)
    packed, before = w.pack(), torch.get_num_threads()
    inputs = [torch.randn(m, 300) for m in (1, 2, 7, 64, 130)]

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        assert torch.equal(w.pack(), packed)
        return [ops.low_rank_linear(x, packed, 200, bias) for x in inputs]

    try:
        expected = run(1)
        for threads in (2, 3):
            for got, one in zip(run(threads), expected, strict=True):
                assert same(got, one)
    finally:
        torch.set_num_threads(before)


# --- torch's own checks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "residual"),
    [(32, ""), (32, "dense"), (32, "rows"), (32, "int4"), (8, "int8"), (8, "quads"), (8, "int4 symmetric")],
)
def test_opcheck(bits: int, residual: str) -> None:
    w, bias = weight(24, 20, 6, bits, residual), torch.randn(24)
    packed, found = w.pack(), torch.ops.pycompress
    sizes = ops.low_rank._sizes(packed)
    torch.library.opcheck(found.low_rank_linear.default, (torch.randn(2, 3, 20), packed, 24, bias, "gelu"))
    torch.library.opcheck(found.low_rank_linear.default, (torch.randn(20, 5).half().T, packed, 24, None, "none"))
    torch.library.opcheck(found.low_rank_linear.default, (torch.randn(0, 20).bfloat16(), packed, 24, bias, "relu"))
    torch.library.opcheck(found.low_rank_pack.default, w.arguments())
    torch.library.opcheck(found.low_rank_unpack.default, (packed, *sizes))
    torch.library.opcheck(found.low_rank_dense.default, (packed, 24, 20))


def test_fake_has_the_strides_of_the_real_result() -> None:
    packed, x = weight(24, 20, 6).pack(), torch.randn(2, 20, 5).transpose(1, 2)
    real, fake = ops.low_rank_linear(x, packed, 24), ops.low_rank_linear(x.to("meta"), packed.to("meta"), 24)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert fake.is_meta and real.is_contiguous()


def test_compile_fullgraph_vmap_and_modes(same: Same) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    packed, bias, x = weight(24, 20, 6, 8, "int8").pack(), torch.randn(24), torch.randn(4, 5, 20)

    def call(x: Tensor) -> Tensor:
        return ops.low_rank_linear(x, packed, 24, bias, "gelu") @ ops.low_rank_dense(packed, 24, 20)

    torch._dynamo.reset()
    assert same(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
    torch._dynamo.reset()
    y = torch.func.vmap(lambda row: ops.low_rank_linear(row, packed, 24, bias), in_dims=1, out_dims=1)(x)
    assert same(y, ops.low_rank_linear(x, packed, 24, bias))
    with pytest.raises(NotImplementedError, match="vmap over the weights"):
        torch.func.vmap(lambda b: ops.low_rank_linear(x[0], packed, 24, b))(bias.expand(2, 24).contiguous())
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Spy():
        ops.low_rank_linear(x, packed, 24)
    assert torch.ops.pycompress.low_rank_linear.default in seen


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 8])
def test_sizes_that_do_not_fit(bits: int) -> None:
    packed, x, linear = weight(24, 20, 6, bits).pack(), torch.randn(3, 20), ops.low_rank_linear
    sizes = ops.LowRankSizes(24, 20, 7, bits, "", 0, False)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: linear(torch.ones(3, 100), packed, 24), r"linear: x is \[3, 100\], the packed weight expects k = 20"),
        (lambda: linear(torch.ones(0, 100), packed, 24), r"linear: x is \[0, 100\], the packed weight expects k = 20"),
        (lambda: linear(x, packed, 25), "linear: n is 25, the packed weight has 24 channels"),
        (lambda: linear(x, packed, 24, torch.ones(25)), r"linear: bias is \[25\], expected \[24\]"),
        (lambda: linear(x, packed, 24, torch.ones(24).double()), r"linear: bias is torch.float64 \[24\] on cpu"),
        (lambda: linear(torch.tensor(1.0), packed, 24), "linear: x is a scalar"),
        (lambda: linear(x.double(), packed, 24), r"linear: x is torch.float64, expected float32, bfloat16 or float16"),
        (lambda: linear(x, packed, 24, None, "tanh"), "linear: activation is 'tanh', expected one of none, relu"),
        (lambda: linear(x, packed.float(), 24), r"linear: packed is torch.float32 .* on the CPU from low_rank_pack"),
        (lambda: ops.low_rank_intermediate(x[0], packed), r"intermediate: x is \[20\], expected \[m, k\]"),
        (lambda: ops.low_rank_dense(packed, 24, 21), "dense: the packed weight is 24x20, not 24x21"),
        (lambda: ops.low_rank_unpack(packed, sizes), r"unpack: the packed weight is \(24, 20, 6, .*, not \(24, 20, 7, "),
    ]  # fmt: skip
    for call, message in calls:
        with pytest.raises(TypeError if "float64, expected" in message else ValueError, match=f"low_rank_{message}"):
            call()


F, I = weight(24, 20, 6), weight(24, 20, 6, 8)  # noqa: E741
Refusal = tuple[dict[str, Any], str]
BROKEN: dict[str, Refusal] = {
    "down in float64": ({"down": F.down.double()}, r"down is torch.float64 \[6, 20\], expected a float32 or int8 matrix"),
    "up a vector": ({"up": F.up[0]}, r"up is torch.float32 \[6\], expected a float32 or int8 matrix"),
    "up in int8": ({"up": I.up}, r"up is torch.int8 \[24, 6\], expected torch.float32 \[n, 6\] as down is \[6, 20\]"),
    "another rank": ({"up": F.up[:, :5]}, r"up is torch.float32 \[24, 5\], expected torch.float32 \[n, 6\]"),
    "rank above k": ({"down": torch.ones(21, 20), "up": torch.ones(24, 21)}, "the rank is 21, expected 1 to 20 for"),
    "rank above n": ({"up": F.up[:5]}, "the rank is 6, expected 1 to 5"),
    "rank 0": ({"down": F.down[:0], "up": F.up[:, :0]}, "the rank is 0, expected 1 to 20"),
    "too many inputs": ({"down": torch.ones(6, 65537)}, "in_features is 65537, expected 1 to 65536"),
    "NaN": ({"down": F.down * math.nan}, "down holds NaN or Inf, expected finite values"),
    "Inf": ({"up": F.up * math.inf}, "up holds NaN or Inf, expected finite values"),
    "-128": ({**I._asdict(), "up": I.up * 0 - 128}, "up holds -128, expected integers from -127 to 127"),
    "a scale of floats": ({"down_scale": torch.ones(6)}, r"down_scale is torch.float32 \[6\], expected None without int8"),
    "no scale": ({**I._asdict(), "up_scale": None}, r"up_scale is None, expected float32 \[24\] for int8 factors"),
    "a short scale": ({**I._asdict(), "up_scale": torch.ones(23)}, r"up_scale is \[23\], expected \[24\]"),
    "bits of floats": ({"activation_bits": 7}, "activation_bits is 7, expected 7 or 8 for int8 factors, 0 for float32"),
    "6 bits": ({**I._asdict(), "activation_bits": 6}, "activation_bits is 6, expected 7 or 8"),
    "an unknown residual": ({"kind": "low_rank", "residual": F.down}, "residual_kind is 'low_rank', expected one of '', "),
    "a kind alone": ({"kind": "dense"}, "residual_kind is 'dense' and the residual None, expected both or neither"),
    "a residual alone": ({"residual": torch.ones(24, 20)}, "residual_kind is '' and the residual torch.float32"),
    "another shape": ({"kind": "dense", "residual": torch.ones(20, 24)}, r"the residual is torch.float32 \[20, 24\]"),
    "a residual of NaN": ({"kind": "dense", "residual": torch.full((24, 20), math.nan)}, "the residual holds NaN or Inf"),
    "not packed": ({"kind": "int8", "residual": torch.ones(24, 20)}, "the residual is .*expected a dense uint8 vector from"),
    "a scale of nothing": ({"scale": torch.ones(24)}, "residual_scale is .*expected None without int8 values"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_pack_refuses(case: str) -> None:
    change, message = BROKEN[case]
    given = {**F._asdict(), "kind": "", "residual": None, **change}
    given["residual"] = given["residual"] if isinstance(given["residual"], Tensor) else None
    names = ("down", "up", "down_scale", "up_scale", "activation_bits", "kind", "residual", "scale")
    with pytest.raises(ValueError, match=f"low_rank_pack: {message}"):
        ops.low_rank_pack(*(given[name] for name in names))


def test_packed_residuals_that_pack_refuses() -> None:
    w = weight(24, 20, 6, residual="int8")
    sparse, other = weight(24, 20, 6, residual="rows").packed_residual(), weight(24, 21, 6, residual="int8")
    int4, wider = weight(24, 20, 6, residual="int4"), weight(24, 21, 6, residual="int4")
    for kind, residual, scale, message in (
        ("int8", w.packed_residual(), None, r"residual_scale is None, expected float32 \[24\] for int8 values"),
        ("int8", w.packed_residual(), torch.ones(20), r"residual_scale is \[20\], expected \[24\]"),
        ("int8", other.packed_residual(), w.scale, "the residual is 24x21, expected 24x20"),
        ("int8", sparse, w.scale, "packed int8 weight"),
        ("sparse", w.packed_residual(), w.scale, "packed sparse weight"),
        ("sparse", sparse, w.scale, "residual_scale is .*, expected None without int8 values"),
        ("int4", int4.packed_int4(), w.scale, "residual_scale is .*, expected None without int8 values"),
        ("int4", wider.packed_int4(), None, "the residual is 24x21, expected 24x20"),
        ("int4", int4.packed_int4(16), None, "the residual's activation_bits is 16, expected 8"),
        ("int4", w.packed_residual(), None, "packed int4 weight"),
        ("int8", int4.packed_int4(), w.scale, "packed int8 weight"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.low_rank_pack(w.down, w.up, None, None, 0, kind, residual, scale)


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return type(error).__name__
    return "result"


def outcomes(packed: Tensor) -> set[str]:
    """What the ops make of a packed buffer of a weight [24, 40]."""
    x = torch.ones(3, 40)
    calls: list[Callable[[], object]] = [
        lambda: ops.low_rank_linear(x, packed, 24),
        lambda: ops.low_rank_linear(x[:1], packed, 24),
        lambda: ops.low_rank_intermediate(x, packed),
        lambda: ops.low_rank_unpack(packed),
        lambda: ops.low_rank_dense(packed, 24, 40),
        lambda: ops.low_rank_header(packed),
    ]
    return {outcome(call) for call in calls}


@EVERY
def test_buffers_that_no_pack_made(bits: int, residual: str, forked: Forked) -> None:
    """A packed buffer is made by this process, but an exported program may carry one in a file: an error, never a crash."""
    w = weight(24, 40, 7, bits, residual)
    packed, inner = w.pack(), w.packed_residual()
    broken = {
        "empty": packed[:0], "header only": packed[:40], "truncated": packed[:-1], "zeros": torch.zeros_like(packed),
        "too long": torch.cat([packed, packed]), "float32": packed.float(), "two dimensions": packed[None],
        "every second byte": torch.stack([packed, packed], 1).flatten()[::2],
        "of the int8 op": ops.int8_pack(torch.ones(24, 40, dtype=torch.int8), 8),
    }  # fmt: skip
    start = -1 if inner is None else bytes(packed.numpy()).find(bytes(inner.view(torch.uint8).numpy())[:24])
    headers = [*range(144), *(range(start, start + 128) if start > 0 else ())]

    def run() -> dict[str, set[str]]:
        torch.set_num_threads(1)  # torch's own products hang in a forked child
        for position, value in itertools.product(headers, (0, 1, 0x7F, 0xFF)):
            edited = packed.clone()
            edited[position] = value
            outcomes(edited)
        return {name: outcomes(buffer) for name, buffer in broken.items()}

    for name, found in forked(run).items():
        assert found == {"ValueError"}, name


def test_a_buffer_on_another_device_is_refused(forked: Forked) -> None:
    """A meta tensor has no memory, so reading it would be a crash. (All of them on meta have a fake result.)"""
    packed, x = weight(24, 40, 7).pack(), torch.ones(3, 40)
    calls: list[Callable[[], object]] = [
        lambda: ops.low_rank_linear(x, packed.to("meta"), 24),
        lambda: ops.low_rank_linear(x, packed, 24, torch.ones(24, device="meta")),
        lambda: ops.low_rank_header(packed.to("meta")),
        lambda: ops.low_rank_intermediate(x, packed.to("meta")),
    ]
    assert "result" not in forked(lambda: [outcome(call) for call in calls])
