"""The op of int8 LSTMs and GRUs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pycompress.ops import cpu
from pycompress.ops.checks import check_float, check_tensor, nobody_looks
from pycompress.ops.cpu.recurrent import read
from pycompress.ops.derivative import below
from pycompress.ops.flops import Shape, counted, multiply_adds
from pycompress.ops.form import parse
from pycompress.ops.int8 import OP
from pycompress.ops.registry import Doors, implement

_DOORS = Doors("int8_recurrent", cpu.recurrent)


def _check(
    x: Tensor, _packed: Tensor, form: str, _bias: Tensor | None, h: Tensor, c: Tensor | None, batch_sizes: Tensor | None
) -> None:
    check_float("int8_recurrent", x)
    own, packed = read(form), batch_sizes is not None
    if x.dim() != (2 if packed else 3) or x.shape[-1] != own.input_size:
        lead = "rows" if packed else "steps, batch"
        raise ValueError(f"int8_recurrent: x is {list(x.shape)}, expected [{lead}, {own.input_size}]")
    if batch_sizes is not None and (
        batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu
    ):
        raise ValueError(
            f"int8_recurrent: batch_sizes is {batch_sizes.dtype} {list(batch_sizes.shape)} on {batch_sizes.device}, expected "
            "int64 [steps] on the CPU"
        )
    if (c is not None) != (own.cell == "lstm"):
        raise ValueError(f"int8_recurrent: c is {'given' if c is not None else 'None'}, which no {own.cell} takes")
    for name, state in (("h", h), ("c", c)):
        expected = (own.layers * own.directions, h.shape[1] if packed else x.shape[1], own.hidden_size)
        if state is not None and (tuple(state.shape) != expected or state.dtype != x.dtype):
            raise ValueError(
                f"int8_recurrent: {name} is {state.dtype} {list(state.shape)}, expected {x.dtype} {list(expected)}"
            )


def _fake(x: Tensor, _packed: Tensor, form: str, _bias: Any, h: Tensor, c: Tensor | None, _sizes: Any) -> Any:
    own = read(form)
    y = x.new_empty((*x.shape[:-1], own.hidden_size * own.directions))
    return [y, *(one.new_empty(one.shape) for one in (h, c) if one is not None)]


def _differentiable(op: Any, keys: Any, *operands: Any) -> Any:
    """The op's own numbers, with the derivatives of torch's layer with the weights that the packed ones stand for."""
    x, packed, form, bias, h, c, batch_sizes = operands
    native, own = below(op, keys, *operands), read(form)
    matrices = [OP.dense(piece.of(packed), piece.form) for piece in own.pieces]
    rows = [None if bias is None else bias[piece.row : piece.row + piece.n] for piece in own.pieces]
    weights = []
    for i in range(0, len(matrices), 2):
        weights += [one for one in (*matrices[i : i + 2], *rows[i : i + 2]) if one is not None]
    states = (h.float(), c.float()) if c is not None else h.float()
    run: Any = torch._VF.lstm if c is not None else torch._VF.gru
    rest = (weights, bias is not None, own.layers, 0.0, False, own.directions == 2)
    dense = run(x.float(), states, *rest, False) if batch_sizes is None else run(x.float(), batch_sizes, states, *rest)
    return [
        one + (other - other.detach()).to(one.dtype).nan_to_num(0.0) for one, other in zip(native, dense, strict=True)
    ]


def _no_vmap(*_operands: Any) -> Any:
    raise NotImplementedError("int8_recurrent: vmap, expected a batch in x")


_op: Any = implement(
    "int8_recurrent",
    "(Tensor x, Tensor packed, str form, Tensor? bias, Tensor h, Tensor? c, Tensor? batch_sizes) -> Tensor[]",
    _DOORS,
    "recurrent",
    _fake,
    _differentiable,
    vmapped=_no_vmap,
    check=_check,
    cast=lambda _dtype, *operands: _op(*operands),
)


def _multiply_adds(x: Shape, _packed: Shape, form: str, *_: Any, out_shape: Any) -> int:  # noqa: ARG001
    """Each row of x, a step of a sequence, meets all matrices."""
    return math.prod(x[:-1]) * sum(multiply_adds(parse(piece.form)) for piece in read(form).pieces)


counted("int8_recurrent", _multiply_adds)


def int8_recurrent(
    x: Tensor,
    packed: Tensor,
    form: str,
    bias: Tensor | None,
    h: Tensor,
    c: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> list[Tensor]:
    """All layers and directions of an LSTM or a GRU with int8 weights, each row of the input and of h quantized as it comes.

    The formulas and their rounding are in ``csrc/recurrent/recurrent.h``: the result has the same bits for every thread count and
    every kernel.

    Args:
        x: float32, bfloat16 or float16, [steps, batch, input_size]; with batch_sizes [rows, input_size], as a
            ``PackedSequence`` has it.
        packed, form: from ``ops.cpu.recurrent.pack``.
        bias: float32 [n], that of each row of each matrix, or None.
        h, c: the states before the first step, [layers * directions, batch, hidden_size] in the dtype of x; c of an LSTM alone.
        batch_sizes: int64 [steps], how many sequences have each step, or None: all of them.
    Returns:
        y [steps, batch, directions * hidden_size] or [rows, directions * hidden_size]; h and, of an LSTM, c after the last step of
        each sequence. All of x's dtype.
    Raises:
        TypeError: x has another dtype. ValueError: sizes or dtypes do not fit. RuntimeError: the tensors are not on the CPU.
    """
    check_tensor("int8_recurrent", x)
    operands = (x, packed, form, bias, h, c, batch_sizes)
    tensors = [one for one in operands if isinstance(one, Tensor)]
    if all(one.is_cpu and nobody_looks(one) for one in tensors):
        _check(*operands)
        return cpu.recurrent.recurrent(*operands)
    return _op(*operands)  # type: ignore[no-any-return]
