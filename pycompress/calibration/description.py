"""``Description``: what a calibration saw of each layer, and where that may be too little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pycompress.methods.inputs import InputStatistics

_SHARE = 100  # a hundredth of the features, one at least, that may hold much of all squares
_MUCH = 0.5


@dataclass(frozen=True)
class LayerDescription:
    """What a layer's inputs look like.

    Attributes:
        names: of the layers that share these inputs.
        gathered: parts of ``inputs.PARTS``, or ``counts`` of an embedding.
        rows, features: rows seen, and k (tokens seen, and how many there are in the table).
        effective_rank: tr(M)^2 / ||M||_F^2 of the second moment: in how many directions the inputs lie, from 1 to k; None without
            one.
        dead: features that were always zero (tokens that never came); None where only ranges were gathered.
        dominant: the share of all squares that the largest hundredth of the features holds; None without squares.
        warnings: sentences.
    """

    names: tuple[str, ...]
    gathered: tuple[str, ...]
    rows: int
    features: int
    effective_rank: float | None
    dead: int | None
    dominant: float | None
    warnings: tuple[str, ...]


class Description:
    """Of all layers; ``str()`` is a table with what to beware of below it.

    Attributes:
        text, calls: of the calibration.
        layers: one :class:`LayerDescription` for each input; layers that share it are together.
        warnings: those of all layers, with their names.
    """

    def __init__(self, statistics: Mapping[str, InputStatistics], text: str = "", calls: int = 0) -> None:
        self.text, self.calls = text, calls
        groups: dict[int, list[str]] = {}
        for name, own in statistics.items():
            groups.setdefault(id(own), []).append(name)
        self.layers = [_described(tuple(names), statistics[names[0]]) for names in groups.values()]
        self.warnings = [f"{_called(layer)}: {text}" for layer in self.layers for text in layer.warnings]

    def __str__(self) -> str:
        rows = [("layer", "gathered", "rows", "features", "rank", "dead", "top 1 %")]
        for layer in self.layers:
            rank = "" if layer.effective_rank is None else f"{layer.effective_rank:.1f}"
            top = "" if layer.dominant is None else f"{layer.dominant:.0%}"
            dead = "" if layer.dead is None else f"{layer.dead:,}"
            rows.append(
                (_called(layer), ", ".join(layer.gathered), f"{layer.rows:,}", f"{layer.features:,}", rank, dead, top)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            f"{len(self.layers)} inputs of layers, {self.calls:,} calls of the model{': ' * bool(self.text)}{self.text}"
        ]
        for row in rows:
            cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *self.warnings])

    __repr__ = __str__


def _called(layer: LayerDescription) -> str:
    first, *others = layer.names
    return (first or "(the model)") + (f" and {len(others)} more" if others else "")


def _described(names: tuple[str, ...], own: InputStatistics) -> LayerDescription:
    k, rank, dead, dominant = own.features, None, None, None
    warnings = []
    if own.counts is not None:
        dead = int((own.counts == 0).sum())
        return LayerDescription(names, ("counts",), own.rows, k, None, dead, None, ())
    if own.second_moment is not None or own.mean_square is not None:
        squares = own.squares("describe", k)
        dead, total = int((squares == 0).sum()), float(squares.sum())
        dominant = float(squares.topk(max(1, k // _SHARE)).values.sum()) / total if total else None
        if own.second_moment is not None and total:
            # The largest entry lies on the diagonal: over it, no square leaves float64.
            scaled = own.second_moment / squares.max()
            rank = (
                float(scaled.diagonal().sum()) ** 2 / float(torch.linalg.vector_norm(scaled, dtype=torch.float64)) ** 2
            )
        if dead == k:
            warnings.append("all inputs are zero: they say nothing")
        elif dead:
            warnings.append(f"{dead} of {k} features were always zero: nothing is known of their weights")
        if dominant is not None and k >= 2 * _SHARE and dominant > _MUCH:
            count = max(1, k // _SHARE)
            warnings.append(
                f"{count} of {k} features hold {dominant:.0%} of all squares: they decide what counts as an error"
            )
    if own.second_moment is not None and own.rows < 4 * k:
        few = (
            "fewer than it has features: the second moment is singular" if own.rows < k else "expected 4 times as many"
        )
        warnings.append(f"{own.rows} rows for {k} features, {few}")
    return LayerDescription(names, own.gathered, own.rows, k, rank, dead, dominant, tuple(warnings))
