"""What torch's counter makes of our ops: hand counts, written out beside each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_block_ops import HEAD_SIZE, HEADS, WIDE, D, made
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import pycompress as pc
from pycompress import ops
from pycompress.methods import Dense

N, K, ROWS = 24, 64, 2 * 3


def flops(call: Any, *operands: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(*operands)
    return counter.get_total_flops()


def test_every_op_of_x_and_a_weight_is_registered() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pycompress")}
    without = {"embed", "pool"}  # no products
    products = {name for name in names if not name.endswith(("_dense", "_unpack"))} - without
    assert products == {op.__name__ for op in flop_registry if str(op).startswith("pycompress.")} & names
    assert len(products) >= 9


LINEAR = {
    "dense": (None, N * K),
    "int8": (pc.Int8(), N * K),
    "int8, activations in floating point": (pc.Int8(16), N * K),
    "int4": (pc.Int4(), N * K),
    "sparse": (pc.Sparse(0.25), N * K // 4),
    "sparse int8": (pc.Sparse(0.25, bits=8), N * K // 4),
    "sparse, nothing": (pc.Sparse(0.0), 0),
    "low rank": (pc.LowRank(6, rank_guard=False), 6 * (N + K)),
    "low rank int8": (pc.LowRank(6, bits=8, rank_guard=False), 6 * (N + K)),
    "low rank and int8": (pc.LowRank(6, residual=pc.Int8(), rank_guard=False), 6 * (N + K) + N * K),
    "low rank and sparse": (pc.LowRank(6, residual=pc.Sparse(0.25), rank_guard=False), 6 * (N + K) + N * K // 4),
    "low rank and dense": (pc.LowRank(6, residual=Dense(), rank_guard=False), 6 * (N + K) + N * K),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_a_linear_layer(kind: str) -> None:
    method, multiply_adds = LINEAR[kind]
    model: nn.Module = nn.Sequential(nn.Linear(K, N)).eval()
    if method is not None:
        model = pc.compress(model, method)
    assert flops(model, torch.randn(2, 3, K)) == 2 * ROWS * multiply_adds


CONV = {  # 4 groups of 2 input and 3 output channels, or one; the result is 5 x 3
    "dense": (None, 1, 12 * 8 * 3 * 2),
    "dense in groups": (None, 4, 12 * 2 * 3 * 2),
    "int8": (pc.Int8(), 1, 12 * 8 * 3 * 2),
    "int8 in groups": (pc.Int8(), 4, 12 * 2 * 3 * 2),
    "sparse": (pc.Sparse(0.25), 1, 12 * 8 * 3 * 2 // 4),
}


@pytest.mark.parametrize("kind", CONV)
def test_a_convolution(kind: str) -> None:
    method, groups, multiply_adds = CONV[kind]
    model: nn.Module = nn.Sequential(nn.Conv2d(8, 12, (3, 2), stride=(1, 2), padding=(0, 1), groups=groups)).eval()
    if method is not None:
        model = pc.compress(model, method)
    x = torch.randn(2, 8, 7, 4)
    assert model(x).shape == (2, 12, 5, 3)
    assert flops(model, x) == 2 * (2 * 5 * 3) * multiply_adds


def test_a_low_rank_convolution_is_its_chain() -> None:
    model = pc.compress(
        nn.Sequential(nn.Conv2d(8, 12, 3, padding=1)), pc.LowRank(4, decomposition="channel", rank_guard=False)
    )
    assert flops(model, torch.randn(2, 8, 5, 5)) == 2 * (2 * 25) * (4 * 8 * 9 + 12 * 4)


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers(cell: Any, gates: int) -> None:
    model = pc.compress(nn.ModuleDict({"rnn": cell(16, 8, num_layers=2, bidirectional=True)}).eval(), pc.Int8())
    per_step = 2 * gates * 8 * (16 + 8) + 2 * gates * 8 * (2 * 8 + 8)  # both directions of both layers
    assert flops(model["rnn"], torch.randn(5, 3, 16)) == 2 * (5 * 3) * per_step
    packed = pack_padded_sequence(torch.randn(5, 3, 16), torch.tensor([5, 3, 2]))
    assert flops(model["rnn"], packed) == 2 * (5 + 3 + 2) * per_step


def test_int8_behind_a_norm() -> None:
    layer = pc.compress(nn.Sequential(nn.Linear(K, N)), pc.Int8())[0]
    x = torch.randn(2, 3, K)
    assert flops(lambda: ops.int8_fused_linear(x, "rms_norm", layer.packed, layer.form)) == 2 * ROWS * N * K


@pytest.mark.parametrize(("method", "share"), [(None, 1.0), (pc.Int8(), 1.0), (pc.Sparse(0.25), 0.25)])
def test_a_block_is_its_products_and_its_attention(method: Any, share: float) -> None:
    tensors, form, _ = made(method, gated=True)
    products = share * (4 * D * HEADS * HEAD_SIZE + 3 * D * WIDE)
    pairs = 2 * 2 * 7 * 7 * HEADS * HEAD_SIZE
    assert flops(ops.block, torch.randn(2, 7, D), None, None, tensors, form) == 2 * (2 * 7 * products + pairs)
