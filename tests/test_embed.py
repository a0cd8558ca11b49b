"""The op ``embed``: rows of tables, their sum and its LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from isa import isa  # noqa: F401
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm

from pycompress import ops
from pycompress.ops import cpu
from pycompress.ops.embed import embed_unseen
from pycompress.reference import embed as twin

pytestmark = pytest.mark.usefixtures("isa")

Same = Callable[[Tensor, Tensor], bool]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
U = 2.0**-24


def tables(d: int, count: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(torch.randn(rows, d) + 0.3).to(dtype) for rows in (40, 20, 2)[:count]]


def ids(batch: int, length: int, count: int = 3) -> list[Tensor]:
    return [torch.randint(0, rows, (batch, length)) for rows in (40, 20, 2)[:count]]


def exact_with_bound(
    given: list[Tensor], chosen: list[Tensor], weight: Tensor | None, shift: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """In float64, and how far float32 may lie from it: a rounding for each step, as ``csrc/embed/embed.h`` has them."""
    rows = [embedding(one, table.double()) for one, table in zip(chosen, given, strict=True)]
    s, error = sum(rows[1:], start=rows[0]), (len(rows) - 1) * U * sum(one.abs() for one in rows)
    if eps is None:
        return s, error
    d = s.shape[-1]
    depth = -(-d // 32) + 5
    c = s - s.mean(-1, keepdim=True)
    error = error + (error + (depth + 1) * U * s.abs()).mean(-1, keepdim=True) + U * c.abs()
    variance = c.square().mean(-1, keepdim=True)
    off = (2 * c.abs() * error + error.square()).mean(-1, keepdim=True) + (depth + 3) * U * variance
    relative = off / (2 * (variance + eps)) * 1.1 + 3 * U
    factor = (variance + eps).rsqrt()
    size = factor * (error * (1 + relative) + c.abs() * (relative + 2 * U))
    w = torch.ones(d).double() if weight is None else weight.double()
    y = c * factor * w + (0 if shift is None else shift.double())
    return y, 1.01 * (w.abs() * size + 2 * U * y.abs()) + 2.0**-126


@pytest.mark.parametrize("d", [1, 7, 8, 31, 32, 33, 67, 384])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("norm", ["none", "plain", "weighted"])
def test_close_to_float64(d: int, dtype: torch.dtype, count: int, norm: str) -> None:
    given, chosen = tables(d, count, dtype), ids(3, 5, count)
    weight, shift = (torch.rand(d) + 0.5, torch.randn(d)) if norm == "weighted" else (None, None)
    eps = None if norm == "none" else 1e-5
    y = ops.embed(given, chosen, weight=weight, shift=shift, eps=eps)
    exact, bound = exact_with_bound(given, chosen, weight, shift, eps)
    assert (y.dtype, y.shape) == (dtype, (3, 5, d))
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert ((y.double() - exact).abs() <= bound + rounding).all()


def test_every_kernel_gives_the_bits_of_the_scalar_one(same: Same) -> None:
    for d, dtype in ((1, torch.float32), (33, torch.bfloat16), (67, torch.float32), (384, torch.float16)):
        given, chosen, weight = tables(d, 3, dtype), ids(2, 9), torch.rand(d)
        with ops.capped("scalar"):
            expected = ops.embed(given, chosen, weight=weight, eps=1e-6)
        for row in ops.kernels():
            if row["op"] == "embed" and row["available"]:
                with ops.forced("embed", row["name"]):
                    assert same(ops.embed(given, chosen, weight=weight, eps=1e-6), expected), row["name"]


@pytest.mark.usefixtures("two_threads")
def test_every_thread_count_gives_the_same_bits(same: Same) -> None:
    given, chosen = tables(96), ids(13, 50)
    chosen[1] = None  # type: ignore[call-overload]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(
            ops.embed(
                [given[0], torch.randn(60, 96, generator=torch.manual_seed(1)), given[2]], chosen, padding=3, eps=1e-5
            )
        )
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_a_row_is_the_same_whatever_stands_beside_it(same: Same) -> None:
    given, chosen = tables(40), ids(6, 11)
    whole = ops.embed(given, chosen, eps=1e-5)
    assert same(ops.embed(given, [one[2:3, 4:5] for one in chosen], eps=1e-5), whole[2:3, 4:5])


def test_ids_and_tables_of_any_strides(same: Same) -> None:
    given, chosen, weight = tables(24), ids(4, 6), torch.rand(24)
    expected = ops.embed(given, chosen, weight=weight, eps=1e-5)
    others = {
        "int32": (given, [one.int() for one in chosen]),
        "transposed": (given, [one.T.contiguous().T for one in chosen]),
        "every second": (given, [one.repeat_interleave(2, 1)[:, ::2] for one in chosen]),
        "wide rows": ([nn.functional.pad(one, (3, 2))[:, 3:-2] for one in given], chosen),
        "columns": ([one.T.contiguous().T for one in given], chosen),
        "a negative view": ([torch._neg_view(-one) for one in given], chosen),
        "that require a gradient": ([nn.Parameter(one) for one in given], chosen),
    }
    for name, (of, at) in others.items():
        with torch.no_grad():
            assert same(ops.embed(of, at, weight=weight, eps=1e-5), expected), name
    broadcast = [chosen[0], chosen[1][:1], chosen[2][:1, :1]]
    written_out = [one.expand(4, 6).contiguous() for one in broadcast]
    assert same(ops.embed(given, broadcast, eps=1e-5), ops.embed(given, written_out, eps=1e-5))


def test_tables_of_several_dtypes() -> None:
    given, chosen = tables(24), ids(2, 3)
    mixed = [given[0].bfloat16(), given[1], given[2].half()]
    exact, _ = exact_with_bound(mixed, chosen, None, None, 1e-5)
    y = ops.embed(mixed, chosen, weight=torch.ones(24).half(), shift=torch.zeros(24).bfloat16(), eps=1e-5)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)


def test_counted_positions() -> None:
    """As transformers has them for RoBERTa: of what is no padding."""
    tokens = torch.tensor([[5, 6, 7, 1, 1], [1, 5, 1, 6, 1], [1, 1, 1, 1, 1]])
    places = torch.tensor([[2, 3, 4, 1, 1], [1, 2, 1, 3, 1], [1, 1, 1, 1, 1]])
    assert torch.equal(twin.positions(tokens, 1), places)
    given = tables(16, 2)
    assert torch.equal(ops.embed(given, [tokens, None], padding=1), ops.embed(given, [tokens, places]))


@pytest.mark.parametrize("size", [(0, 4), (3, 0), (0, 0)])
def test_nothing(size: tuple[int, int]) -> None:
    assert ops.embed(tables(8, 1), [torch.zeros(size, dtype=torch.int64)], eps=1e-5).shape == (*size, 8)


@pytest.mark.parametrize(("table", "wrong"), [(0, 40), (0, -1), (1, 20), (2, 2**40)])
@pytest.mark.parametrize("batch", [2, 200])
def test_an_id_without_a_row_is_named(table: int, wrong: int, batch: int) -> None:
    chosen = ids(batch, 50)
    chosen[table][1, 3] = wrong
    rows = (40, 20, 2)[table]
    message = f"index out of range: {wrong} among the ids of table {table}, expected 0 to {rows - 1}"
    with pytest.raises(IndexError, match=message):
        ops.embed(tables(16), chosen, eps=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"tables": []}, ValueError, "0 tables, expected 1 to 3"),
        ({"tables": tables(8) + tables(8)}, ValueError, "6 tables, expected 1 to 3"),
        ({"ids": ids(2, 3, 1)}, ValueError, "1 ids and 3 scales for 3 tables"),
        ({"ids": [None, *ids(2, 3, 2)]}, ValueError, "the ids of table 0 are None"),
        ({"ids": [one.short() for one in ids(2, 3)]}, TypeError, "the ids of table 0 are torch.int16"),
        ({"ids": [one[0] for one in ids(2, 3)]}, ValueError, r"the ids of table 0 are \[3\], expected \[batch, length\]"),
        ({"tables": [one.double() for one in tables(8)]}, TypeError, "table 0 is torch.float64"),
        ({"tables": [*tables(8, 2), torch.ones(2, 9)]}, ValueError, r"table 2 is \[2, 9\], expected \[rows, 8\]"),
        ({"weight": torch.ones(9), "eps": 1e-5}, ValueError, r"weight is torch.float32 \[9\], expected floats \[8\]"),
        ({"shift": torch.ones(8)}, ValueError, r"shift is torch.float32 \[8\] without eps"),
    ],
)  # fmt: skip
def test_refusals(given: dict[str, Any], error: type[Exception], message: str) -> None:
    rest = {"tables": tables(8), "ids": ids(2, 3), **given}
    with pytest.raises(error, match=message):
        ops.embed(rest.pop("tables"), rest.pop("ids"), **rest)


def test_gradients_are_those_of_torch() -> None:
    given, chosen = [one.requires_grad_() for one in tables(12)], ids(2, 5)
    weight, shift = torch.rand(12, requires_grad=True), torch.randn(12, requires_grad=True)
    rows = [embedding(one, table) for one, table in zip(chosen, given, strict=True)]
    expected = torch.autograd.grad(
        layer_norm(sum(rows), (12,), weight, shift, 1e-5).square().sum(), (*given, weight, shift)
    )
    y = ops.embed(given, chosen, weight=weight, shift=shift, eps=1e-5)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (*given, weight, shift)), expected)


def test_opcheck() -> None:
    chosen: list[Tensor | None] = [*ids(2, 5)]
    op, none = torch.ops.pycompress.embed.default, [None] * 3
    torch.library.opcheck(op, (tables(12), none, chosen, 0, torch.ones(12), torch.zeros(12), 1e-5))
    values, scale = torch.randint(-127, 128, (40, 12), dtype=torch.int8), torch.rand(40)
    torch.library.opcheck(op, ([values, *tables(12)[:1]], [scale, None], [chosen[0], None], 1, None, None, None))


def test_rows_of_int8(same: Same) -> None:
    given, chosen = tables(67), ids(3, 5)
    values, scale = torch.randint(-127, 128, (40, 67), dtype=torch.int8), torch.rand(40)
    dense = [values.float() * scale[:, None], *given[1:]]
    expected = ops.embed(dense, chosen, eps=1e-5)
    assert same(ops.embed([values, *given[1:]], chosen, scales=[scale, None, None], eps=1e-5), expected)
    assert ops.embed([values], chosen[:1], scales=[scale]).dtype == torch.float32
    halves = [one.bfloat16() for one in given[1:]]
    assert ops.embed([values, *halves], chosen, scales=[scale, None, None]).dtype == torch.bfloat16
    for wrong in ([None] * 3, [scale[:3], None, None], [scale.double(), None, None], [scale, scale, None]):
        with pytest.raises(ValueError, match=r"expected a scale for int8|expected torch.float32 \[40\]"):
            ops.embed([values, *given[1:]], chosen, scales=wrong)


def test_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a torch that cannot hand its tensors over: torch's own operators."""
    given, chosen = tables(24), ids(2, 3)
    expected = ops.embed(given, chosen, eps=1e-5)
    monkeypatch.setattr(cpu.native, "reads_tensors", False)
    torch.testing.assert_close(ops.embed(given, chosen, eps=1e-5), expected)
    with pytest.raises(IndexError, match="index out of range: 2 among the ids of table 2, expected 0 to 1"):
        ops.embed(given, [*chosen[:2], torch.full((2, 3), 2)])
    with torch.no_grad():
        assert embed_unseen(given, [None] * 3, [*chosen], 0, None, None, 1e-5) is None
