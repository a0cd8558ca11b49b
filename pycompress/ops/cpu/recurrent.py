"""int8 LSTMs and GRUs on the CPU (``csrc/recurrent``): packed matrices of ``csrc/int8``, one behind another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pycompress.ops.checks import FLOATS, check, rows_of
from pycompress.ops.cpu import int8, native
from pycompress.ops.form import parse, written

CELLS = {"lstm": 0, "gru": 1}
_ALIGNMENT = 64  # bytes: where each matrix begins


@dataclass(frozen=True)
class Piece:
    """One packed matrix: its form as ``int8`` has it, where its bytes lie, and the first of its rows among all."""

    form: str
    n: int
    start: int
    end: int
    row: int

    def of(self, packed: Tensor) -> Tensor:
        return packed[self.start : self.end]


@dataclass(frozen=True)
class Recurrent:
    """What a form says. ``pieces``: of each layer and direction the input's matrix and the hidden state's."""

    cell: str
    n: int
    input_size: int
    hidden_size: int
    layers: int
    directions: int
    pieces: tuple[Piece, ...]


@lru_cache(maxsize=1 << 12)
def read(form: str) -> Recurrent:
    """The inverse of what :func:`pack` writes. Raises ValueError where the string is no such form."""
    own = parse(form)
    check(own.layout in CELLS, f"int8_recurrent: the form is {form!r}, expected one that starts with lstm or gru")
    gates, at = 4 if own.layout == "lstm" else 3, [int(place) for place in str(own.at).split(":")]
    pieces, row, n = [], 0, gates * own.hidden
    for i, (start, end) in enumerate(zip(at[::2], at[1::2], strict=True)):
        layer, hidden = i // (2 * own.directions), i % 2
        k = own.hidden if hidden else own.input if layer == 0 else own.hidden * own.directions
        pieces.append(Piece(written("packed", n, k, activation_bits=own.activation_bits), n, start, end, row))
        row += n
    return Recurrent(own.layout, own.n, own.input, own.hidden, own.layers, own.directions, tuple(pieces))


def pack(parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any]) -> tuple[Tensor, str]:
    """Canonical weight -> each matrix in the layout of the best int8 kernel here, for this process only, and its form.

    Args:
        parts: of each matrix, in their order, ``<name>_values`` int8 [n, k] and ``<name>_scale`` float32 [n].
        shape, settings: of the weight.
    """
    packed, places, end = [], [], 0
    bits = {"activation_bits": settings["activation_bits"]}
    for name in (part.removesuffix("_values") for part in parts if part.endswith("_values")):
        values = parts[f"{name}_values"]
        piece, _ = int8.pack({"values": values, "scale": parts[f"{name}_scale"]}, tuple(values.shape), bits)  # type: ignore[arg-type]
        places += [end, end + len(piece)]
        packed += [piece, piece.new_zeros(-len(piece) % _ALIGNMENT)]
        end = places[-1] + len(packed[-1])
    keys: dict[str, Any] = {
        "input": settings["input_size"], "hidden": settings["hidden_size"], "layers": settings["num_layers"],
        "directions": 2 if settings["bidirectional"] else 1, **bits, "at": ":".join(map(str, places)),
    }  # fmt: skip
    return torch.cat(packed), written(settings["cell"], *shape, **keys)


def unpack(packed: Tensor, form: str) -> list[dict[str, Tensor]]:
    """values and scale of each matrix."""
    return [int8.unpack(piece.of(packed), piece.form) for piece in read(form).pieces]


def recurrent(
    x: Tensor, packed: Tensor, form: str, bias: Tensor | None, h: Tensor, c: Tensor | None, batch_sizes: Tensor | None
) -> list[Tensor]:
    own, dtype = read(form), x.dtype
    native.check_operand("int8_recurrent", "packed", packed, torch.uint8)
    bias_at = None if bias is None else native.channels("int8_recurrent", "bias", bias, own.n)
    lead, batch = x.shape[:-1], h.shape[1]
    if batch_sizes is None:
        batch_sizes = torch.full((x.shape[0],), batch, dtype=torch.int64, device="cpu")
    sizes = batch_sizes.contiguous()
    states = [
        one.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for one in (h, c) if one is not None
    ]
    at = [one.data_ptr() for one in states] + [0]
    step, rows = 4 * batch * own.hidden_size, x.numel() // max(1, x.shape[-1])
    width = own.hidden_size * own.directions

    def matrix(piece: Piece) -> tuple[int, int, int, int]:
        n_bytes, scale = native.split("int8_recurrent", piece.of(packed), piece.n)
        return scale - n_bytes, n_bytes, scale, 0 if bias_at is None else bias_at + 4 * piece.row

    for layer in range(own.layers):
        x, ldx = rows_of("int8_recurrent", x.reshape(rows, x.shape[-1]))
        y = x.new_empty((rows, width), dtype=torch.float32)
        for direction in range(own.directions):
            i = layer * own.directions + direction
            native._C.int8_recurrent(
                CELLS[own.cell], x.data_ptr(), FLOATS[x.dtype], rows, x.shape[1], ldx, matrix(own.pieces[2 * i]),
                matrix(own.pieces[2 * i + 1]), sizes.data_ptr(), len(sizes), batch, own.hidden_size, direction == 1,
                at[0] + step * i, at[1] + step * i if c is not None else 0,
                y.data_ptr() + 4 * own.hidden_size * direction, width, torch.get_num_threads(),
            )  # fmt: skip
        x = y
    return [one.to(dtype) for one in (x.view(*lead, width), *states)]
