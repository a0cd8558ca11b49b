"""The native block with every weight: the integers of its products, and bits that depend on nothing but the sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

import pycompress as pc
from pycompress import ops
from pycompress.nn import CompressedLinear
from pycompress.ops.block_form import PRODUCTS
from pycompress.ops.cpu.block import run_of, twin

D, WIDE, HEADS, HEAD_SIZE = 48, 80, 3, 16
METHODS = [
    None, pc.Int8(7), pc.Int8(8), pc.Int8(activation_bits=16), pc.Int4(32), pc.Int4(32, activation_bits=16),
    pc.Sparse(density=0.3), pc.Sparse(density=0.3, bits=8), pc.Sparse(pattern="4:16", bits=8), pc.LowRank(8, rank_guard=False),
    pc.LowRank(8, bits=8, rank_guard=False), pc.LowRank(4, residual=pc.Int8(7), rank_guard=False),
    pc.LowRank(4, residual=pc.Sparse(density=0.3), rank_guard=False),
]  # fmt: skip
KERNELS = [row["name"] for row in ops.kernels() if row["op"] == "block" and row["available"]]

Made = tuple[list[Tensor | None], str, dict[str, nn.Module]]


def made(method: Any, *, gated: bool = False, **changes: Any) -> Made:
    """The tensors of a block all of whose products one method compressed (None: dense), its form, and its layers."""
    torch.manual_seed(3)
    inner = HEADS * HEAD_SIZE
    sizes = dict.fromkeys(PRODUCTS[:3], (D, inner)) | {"output": (inner, D), "up": (D, WIDE), "down": (WIDE, D)}
    if gated:
        sizes["gate"] = (D, WIDE)
    layers: dict[str, nn.Module] = {}
    tensors: list[Tensor | None] = []
    forms = []
    for name in PRODUCTS:
        if name not in sizes:
            tensors += [None, None]
            forms.append("")
            continue
        dense = nn.Linear(*sizes[name])
        layer = layers[name] = dense if method is None else pc.compress(dense, method)
        if isinstance(layer, CompressedLinear):
            tensors += [layer.packed, layer.bias32]
            forms.append(f"{layer.weight_type.name} {layer.form}")
        else:
            tensors += [layer.weight.detach(), layer.bias.detach()]
            forms.append(f"dense n={layer.out_features} k={layer.in_features}")
    for _ in range(2):
        tensors += [1 + torch.randn(D) / 4, torch.randn(D) / 4]
    settings: dict[str, Any] = {
        "heads": HEADS, "head_size": HEAD_SIZE, "scale": HEAD_SIZE**-0.5, "pre_norm": False, "norm": "layer_norm",
        "eps": (1e-5, 1e-5), "activation": "gelu", "causal": False, **changes,
    }  # fmt: skip
    return tensors, str(ops.BlockForm(**settings, products=tuple(forms))), layers


def native(x: Tensor, block: Made, mask: Tensor | None = None, bias: Tensor | None = None, threads: int = 2) -> Tensor:
    """The kernel's result, never the twin's."""
    run = run_of(block[1])
    if run is None:
        pytest.skip("no native block here: torch < 2.10, or no compiler")
    y = torch.full_like(x, torch.nan)
    assert run(x, mask, bias, block[0], y, threads), "the native block refused the tensors"
    return y


@contextmanager
def by(kernel: str) -> Iterator[None]:
    with ops.forced("block", kernel) if kernel else nullcontext():
        yield


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products_are_those_of_the_layers(method: Any, rows: int) -> None:
    """Sequences of one token, whose attention is their value to the bit, and an MLP that gives its bias: what is left of the
    products' float steps are two norms, some units in the last place; an integer more or less would be thousands of them."""
    block = made(method, activation="relu")
    tensors, layers = block[0], block[2]
    x = torch.randn(rows, 1, D)
    tensors[2 * PRODUCTS.index("down")] = torch.zeros(D, WIDE)
    form = ops.BlockForm(**{**vars(ops.parse_block(block[1])), "products": (
        *ops.parse_block(block[1]).products[:6], f"dense n={D} k={WIDE}"
    )})  # fmt: skip
    y = native(x, (tensors, str(form), layers))
    at = x if rows > 8 else x.expand(-1, 9, -1)  # as in a call of many rows, whose sums have one order
    attention = layers["output"](layers["value"](at))[:, :1]
    weights = [None if one is None else one.double() for one in tensors[-4:]]
    h = layer_norm((x + attention).double(), (D,), weights[0], weights[1], 1e-5)
    assert tensors[2 * PRODUCTS.index("down") + 1] is not None
    h = layer_norm(h + tensors[2 * PRODUCTS.index("down") + 1], (D,), weights[2], weights[3], 1e-5)
    assert (y.double() - h).abs().max() < 1e-5


@pytest.mark.parametrize("method", [None, pc.Int8(activation_bits=16), pc.Sparse(density=0.3)], ids=repr)
@pytest.mark.parametrize("kernel", ["", *KERNELS])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 21), (12, 7), (1, 150)], ids=str)
def test_close_to_float64_where_nothing_is_rounded(method: Any, kernel: str, shape: tuple[int, int]) -> None:
    """Against the twin; both are off float64 by some hundred roundings of numbers of magnitude one."""
    block = made(method, pre_norm=True, activation="silu", gated=True)
    x = torch.randn(*shape, D)
    mask = torch.rand(shape[0], 1, 1, shape[1]) > 0.3
    with by(kernel):
        y = native(x, block, mask)
    torch.testing.assert_close(y, twin(x, mask, None, *block[:2]), rtol=3e-5, atol=3e-5)


SHAPES = [(1, 1), (2, 3), (1, 17), (5, 13), (1, 70), (9, 33), (2, 129)]  # few rows, some, whole sequences in a task


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_bits_depend_neither_on_threads_nor_on_other_sequences(method: Any) -> None:
    block = made(method)
    for batch, length in SHAPES:
        x = torch.randn(batch, length, D)
        seen = torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
        mask = seen[:, None, None, :]
        y = native(x, block, mask, threads=1)
        for threads in (2, 3, 7):
            assert torch.equal(native(x, block, mask, threads=threads), y), (batch, length, threads)
        for i in range(batch):
            alone = native(x[i : i + 1], block, mask[i : i + 1], threads=1 + i % 2)
            assert torch.equal(alone[0], y[i]), (batch, length, i)


@pytest.mark.parametrize("kernel", ["", *KERNELS])
def test_masks_of_all_kinds(kernel: str) -> None:
    block = made(pc.Int8(activation_bits=16))
    batch, length = 3, 37
    x = torch.randn(batch, length, D)
    seen = torch.rand(batch, 1, 1, length) > 0.4
    added = torch.zeros(batch, 1, 1, length).masked_fill(~seen, -torch.inf)
    whole = (batch, 1, length, length)
    with by(kernel):
        y = native(x, block, seen)
        same = {
            "added": added, "lowest": added.clamp(min=torch.finfo(torch.float32).min), "half": added.bfloat16(),
            "expanded": seen.expand(batch, HEADS, length, length), "whole": seen.expand(whole).contiguous(),
            "whole, added": added.expand(whole).contiguous(), "turned": added.expand(whole).contiguous().mT.contiguous().mT,
        }  # fmt: skip
        for name, mask in same.items():
            assert torch.equal(native(x, block, mask), y), name
        assert torch.equal(native(x, block, None, added), y)
        per_query = seen.expand(whole) & (torch.rand(whole) > 0.2)
        per_query[..., 0] = True
        bias = torch.randn(1, HEADS, length, length)
        for mask, more in ((per_query, None), (seen, bias), (per_query, bias), (None, bias.bfloat16()), (bias, bias)):
            torch.testing.assert_close(
                native(x, block, mask, more), twin(x, mask, more, *block[:2]), rtol=3e-5, atol=3e-5
            )
        # a query that sees nothing: attention gives zeros; a sequence of which nothing is seen, the same
        none = torch.zeros(batch, 1, 1, length, dtype=torch.bool)
        torch.testing.assert_close(native(x, block, none), twin(x, none, None, *block[:2]), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("length", [1, 8, 40, 100])
def test_causal(length: int) -> None:
    """A query's bits do not depend on what comes behind it."""
    block = made(pc.Int8(7), causal=True, pre_norm=True)
    x = torch.randn(2, length, D)
    y = native(x, block)
    for end in {1, length // 2, length - 1} - {0}:
        assert torch.equal(native(x[:, :end].contiguous(), block), y[:, :end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_halves_are_rounded_once(dtype: torch.dtype, pre_norm: bool) -> None:
    block = made(pc.Int8(8), pre_norm=pre_norm)
    for batch, length in SHAPES:
        x = torch.randn(batch, length, D).to(dtype)
        assert torch.equal(native(x, block), native(x.float(), block).to(dtype))


def test_dense_weights_of_other_floats_and_rows_apart() -> None:
    block = made(None)
    x = torch.randn(2, 11, D)
    for dtype in (torch.bfloat16, torch.float16):
        halves = [None if one is None else one.to(dtype) for one in block[0]]
        floats = [None if one is None else one.float() for one in halves]
        assert torch.equal(native(x, (halves, *block[1:])), native(x, (floats, *block[1:])))
    apart = [
        None if one is None else torch.cat([one, one], 1)[:, : one.shape[1]] if one.dim() == 2 else one
        for one in block[0]
    ]
    assert torch.equal(native(x, (apart, *block[1:])), native(x, block))


def test_a_number_that_is_none_stays_in_its_sequence() -> None:
    block = made(pc.Int8(7))
    x = torch.randn(4, 20, D)
    y = native(x, block)
    x[1, 3, 5] = torch.nan
    x[3, 0, 0] = torch.inf
    poisoned = native(x, block)
    for i in range(4):
        assert torch.equal(poisoned[i], y[i]) if i % 2 == 0 else poisoned[i].isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    block = made(pc.Int8(7))
    run = run_of(block[1])
    if run is None:
        pytest.skip("no native block here")
    x = torch.randn(2, 5, D)
    y = torch.empty_like(x)
    assert not run(x, torch.zeros(2, 1, 1, 4), None, block[0], y, 1)
    assert not run(x, None, None, block[0][:-1], y, 1)
    assert not run(x.mT.contiguous().mT, None, None, block[0], y, 1)
    shorter = [block[0][0][:40], *block[0][1:]]
    assert not run(x, None, None, shorter, y, 1)
    broken = block[0][0].clone()
    broken[24] ^= 1  # the channels of a panel
    with pytest.raises(ValueError, match="packed int8 weight"):
        run(x, None, None, [broken, *block[0][1:]], y, 1)
    swapped = [*block[0]]
    up, down = 2 * PRODUCTS.index("up"), 2 * PRODUCTS.index("down")
    swapped[up], swapped[down] = swapped[down], swapped[up]
    swapped[up + 1] = swapped[down + 1] = None
    with pytest.raises(ValueError, match=r"the weight of up is \[48, 80\], expected \[48, 48\]"):
        run(x, None, None, swapped, y, 1)
    y.fill_(7)
    assert (native(x[:0], block).numel(), y.eq(7).all()) == (0, True)
