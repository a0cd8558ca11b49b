"""int8 LSTMs and GRUs."""

from __future__ import annotations

from typing import Any

import numpy as np

from pycompress.reference import recurrent
from pycompress.reference.extension import memory
from pycompress.reference.extension.int8 import unpacked

Weight = tuple[int, int, int, int]  # packed, its bytes, scale, bias or 0


def int8_recurrent(
    cell: int, x: int, x_type: int, rows: int, k: int, ldx: int, input_: Weight, hidden: Weight, batch_sizes: int, steps: int,
    batch: int, size: int, reverse: bool, h: int, c: int, y: int, ldy: int, _threads: int,
) -> None:  # fmt: skip
    sizes = memory.view(batch_sizes, np.int64, steps)
    _check_sizes(sizes, rows, batch)
    of_input, of_hidden = _matrix(input_), _matrix(hidden)
    bits = of_input[3]
    cells = memory.view(c, np.float32, batch, size) if cell == 0 else None
    out = recurrent.run(
        memory.load(x, x_type, rows, k, ldx), (of_input[:3], of_hidden[:3]), sizes,
        memory.view(h, np.float32, batch, size), cells, bits, reverse,
    )  # fmt: skip
    for i, row in enumerate(out):
        memory.view(y + 4 * i * ldy, np.float32, size)[:] = row


def _check_sizes(sizes: memory.Array, rows: int, batch: int) -> None:
    if len(sizes) < 1:
        raise ValueError(f"recurrent: there are {len(sizes)} steps, expected at least 1")
    before = batch
    for t, found in enumerate(map(int, sizes)):
        if not (found == batch if t == 0 else 0 <= found <= before):
            expected = batch if t == 0 else f"0 to {before}"
            raise ValueError(f"recurrent: batch_sizes[{t}] is {found}, expected {expected}")
        before = found
    if int(sizes.sum()) != rows:
        raise ValueError(f"recurrent: x has {rows} rows, expected {int(sizes.sum())} as batch_sizes adds up to")


def _matrix(weight: Weight) -> tuple[Any, Any, Any, int]:
    packed, n_bytes, scale, bias = weight
    values, bits, _ = unpacked(packed, n_bytes)
    offset = memory.vector(bias, len(values)).copy() if bias else None
    return np.ascontiguousarray(values), memory.vector(scale, len(values)).copy(), offset, bits
