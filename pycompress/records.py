"""``summary``: what became of each layer of a model, and what the rest of it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycompress.calls import uncompiled
from pycompress.kinds import folded_into, kind_of
from pycompress.nn import CompressedLayer
from pycompress.nn.block import LEFT, block_of
from pycompress.nn.handing import sums_in
from pycompress.nn.layer import RECORD, REMARK


@dataclass
class LayerRecord:
    """What became of one layer; or another module with parameters or buffers of its own, which is none that can be compressed.

    Attributes:
        name, kind, shape: dotted name in the model, class of the dense layer, shape of its weight.
        method: ``int8``, ``int4``, ``sparse``, ``low_rank`` or None where the layer stayed dense; ``reason`` says why then.
        dense_bytes, bytes: parameters and buffers before and after; what several layers share counts where it is met first.
        error: relative error of the weight, ||W - W'|| / ||W|| (Frobenius), computed in float64.
        dense_us, us: measured time of one call, where ``only_if_faster`` measured it.
        label: the method as the table has it, e.g. ``sparse 20 % int8``.
        density: of a sparse layer: the share of its weights that is non-zero.
        rank: of a low-rank layer with two factors.
        bits: of a sparse or a low-rank layer: what one of its weights (in the factors) takes, 32 or 8.
        note: what else there is to say of a compressed layer, or of what passes did to a module, or why they did not.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dense_bytes: int
    method: str | None = None
    reason: str = ""
    bytes: int = 0
    error: float | None = None
    dense_us: float | None = None
    us: float | None = None
    activation: str = "none"
    label: str = "dense"
    density: float | None = None
    bits: int | None = None
    rank: int | None = None
    note: str = ""

    def describe(self, layer: CompressedLayer, *, shares_weight: bool = False) -> None:
        """Writes down what the compressed layer is; a weight that it shares with another layer counts there."""
        self.method, self.label, self.reason = layer.weight_type.name, layer.label, ""
        self.activation = layer.activation
        self.density, self.rank = getattr(layer, "density", None), getattr(layer, "rank", None)
        self.bits = getattr(layer, "bits", None)
        self.bytes = 4 * _size(layer.bias32) + (0 if shares_weight else layer.canonical_bytes())


@dataclass
class BlockRecord:
    """A module that runs as one op, or that looks as if it might.

    Attributes:
        name, kind: dotted name in the model, class.
        family: what was read in it; '' where nothing was.
        reason: why the original forward runs, as the module is now; '' where it does not, but for gradients and the like.
        skips_padding: whether it leaves padding out.
    """

    name: str
    kind: str
    family: str = ""
    reason: str = ""
    skips_padding: bool = False


def _size(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.numel()


CUT = "_pycompress_cut"  # the attribute of a model made smaller that has its ``Cut``, with a step for each call of ``shrink``
_CHUNK = 1 << 20  # weights that are in float64 at a time


def relative_error(dense: Tensor, other: Tensor) -> float:
    """||dense - other|| / ||dense|| of two matrices, in float64, where squares of the largest and tiniest float32 fit."""
    error = norm = 0.0
    rows = max(1, _CHUNK // max(1, dense.shape[1]))
    for a, b in zip(dense.split(rows), other.split(rows), strict=True):
        exact = a.to(torch.float64)
        norm += float(exact.square().sum())
        error += float((exact - b).square_().sum())
    return math.sqrt(error / norm) if norm else 0.0


def leave_records(model: nn.Module, records: Iterable[LayerRecord]) -> None:
    """Leaves with each layer of a model what was written down of it."""
    for record in records:
        vars(model.get_submodule(record.name))[RECORD] = record


def forget_records(model: nn.Module) -> None:
    """Where the weights are others now."""
    for module in model.modules():
        vars(module).pop(RECORD, None)


class Summary:
    """What became of each layer, and what the rest of the model is; ``str()`` is a table.

    Attributes:
        layers: one :class:`LayerRecord` for each layer that is compressed, or that :func:`compress` left dense.
        others: one for each other module that has parameters or buffers of its own, with the reason why it was left alone. The
            table has one line for those that are alike.
        blocks: one :class:`BlockRecord` for each module that runs as one op, or whose class is known for it.
        dense_bytes, bytes: of all parameters and buffers of the model, before and after (a shared tensor counts once): the sums
            over both lists.
    """

    def __init__(
        self, layers: list[LayerRecord], others: list[LayerRecord], blocks: Sequence[BlockRecord] = ()
    ) -> None:  # fmt: skip
        self.layers, self.others, self.blocks = layers, others, [*blocks]
        self.dense_bytes = sum(record.dense_bytes for record in [*layers, *others])
        self.bytes = sum(record.bytes for record in [*layers, *others])

    def __str__(self) -> str:
        head = ("layer", "shape", "method", "bytes", "of dense", "error", "dense us", "us", "")
        whole = (f"{self.bytes:,}", f"{self.bytes / max(self.dense_bytes, 1):.2f}")
        records = map(self._row, [*self.layers, *_alike(self.others)])
        rows = [head, *records, ("the whole model", "", "", *whole, "", "", "", "")]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        left = {0, 2, len(head) - 1}
        lines = []
        for row in rows:
            cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(cells))
        lines += [""] * bool(self.blocks) + [*map(self._line, self.blocks)]
        return "\n".join(line.rstrip() for line in lines)

    @staticmethod
    def _line(block: BlockRecord) -> str:
        skips = ", padding skipped" if block.skips_padding else ""
        runs = f"runs as one op ({block.family}{skips})" if not block.reason else f"runs layer by layer: {block.reason}"
        return f"{block.name or '(the model)'}: {block.kind} {runs}"

    @staticmethod
    def _row(layer: LayerRecord) -> tuple[str, ...]:
        def number(value: float | None, spec: str) -> str:
            return "" if value is None else format(value, spec)

        fused = "" if layer.activation == "none" else f"+{layer.activation}"
        return (
            layer.name or "(the model)", "x".join(map(str, layer.shape)), layer.label + fused,
            f"{layer.bytes:,}", f"{layer.bytes / max(layer.dense_bytes, 1):.2f}", number(layer.error, ".4g"),
            number(layer.dense_us, ".0f"), number(layer.us, ".0f"), "; ".join(filter(None, [layer.reason, layer.note])),
        )  # fmt: skip


def _alike(others: list[LayerRecord]) -> list[LayerRecord]:
    """One record, named by their number, for all of a class that were left alone for one reason."""
    groups: dict[tuple[str, str, str], list[LayerRecord]] = {}
    for record in others:
        groups.setdefault((record.kind, record.reason, record.note), []).append(record)
    return [
        group[0]
        if len(group) == 1
        else replace(
            group[0],
            name=f"{len(group)} {group[0].kind}",
            shape=group[0].shape if len({record.shape for record in group}) == 1 else (),
            dense_bytes=sum(record.dense_bytes for record in group),
            bytes=sum(record.bytes for record in group),
        )
        for group in groups.values()
    ]


def summary(model: nn.Module) -> Summary:
    """Per layer: method, bytes before and after, weight error, measured times, or why it was left alone; and all else that the
    model is made of, so that every parameter and buffer is in the total. On the meta device too, and of models never compressed.

    Layers are described as they are now. Of those that were loaded from a file or put in by hand, errors and times are not known.
    """
    layers, others, blocks = [], [], []
    sums = sums_in(uncompiled(model))
    seen: set[int] = set()
    for name, module in uncompiled(model).named_modules():
        tensors: dict[str, Tensor] = {}
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[key] = tensor
        if (block := block_of(module)) is not None:
            read, reason = block.description, block.reason(module)
            blocks.append(BlockRecord(name, type(module).__name__, read.family, reason, read.skip_padding))
        elif LEFT in vars(module):
            blocks.append(BlockRecord(name, type(module).__name__, reason=vars(module)[LEFT]))
        record = vars(module).get(RECORD)
        if isinstance(module, CompressedLayer):
            shares = all(tensor is not module.packed for tensor in tensors.values())
            layers.append(_noted(_compressed(name, module, record, shares), module, sums.get(module, "")))
        elif record is not None:
            size = sum(map(_bytes, tensors.values()))
            layers.append(_noted(replace(record, name=name, dense_bytes=size, bytes=size), module))
        elif tensors:
            size, largest = sum(map(_bytes, tensors.values())), max(tensors.values(), key=_bytes)
            why = _why(module, tensors)
            other = LayerRecord(name, type(module).__name__, _shape(largest), size, reason=why, bytes=size)
            others.append(_noted(other, module))
    return Summary(layers, others, blocks)


def _noted(record: LayerRecord, module: nn.Module, behind: str = "") -> LayerRecord:
    """With what passes did to the module."""
    norms = folded_into(module)
    own = module.kind.note(module.geometry) if isinstance(module, CompressedLayer) else ""
    notes = [vars(module).get(REMARK, ""), norms and f"folded in: {norms}", own, behind, record.note]
    return replace(record, note="; ".join(filter(None, notes)))


def _compressed(name: str, layer: CompressedLayer, record: LayerRecord | None, shares_weight: bool) -> LayerRecord:
    """A compressed layer as it is now, with what compress() knew of it."""
    if record is None:
        count = layer.kind.count(layer.n, layer.k, layer.geometry)
        size = layer.dtype.itemsize * (_size(layer.bias32) + (0 if shares_weight else count))
        record = LayerRecord(name, layer.kind.title, layer.dense_shape, size)
    record = replace(record, name=name)
    record.describe(layer, shares_weight=shares_weight)
    return record


def _why(module: nn.Module, tensors: dict[str, Tensor]) -> str:
    """Why nobody compressed a module."""
    if any(map(is_lazy, tensors.values())):
        return "its parameters are not initialized yet"
    if (kind := kind_of(module)) is not None:
        return kind.misfit(module) or "no plan was for it"
    if isinstance(module, nn.MultiheadAttention):
        return "it reads its weights itself"
    if not any(module._parameters.get(name) is not None for name in tensors):
        return "buffers only"
    reason = f"no compressed layer for {type(module).__name__}"
    matrices = [f"{name} {'x'.join(map(str, t.shape))}" for name, t in tensors.items() if t.dim() > 1]
    known = type(module).__module__.startswith("torch.nn.")
    return reason if known or not matrices else f"{reason}, with {', '.join(matrices)}"


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return () if is_lazy(tensor) or tensor.is_nested else tuple(tensor.shape)


def _bytes(tensor: Tensor) -> int:
    """What its numbers take; of a sparse one those that it has, and their places."""
    if is_lazy(tensor):
        return 0
    if tensor.layout == torch.sparse_coo:
        return _bytes(tensor._values()) + _bytes(tensor._indices())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return _bytes(tensor.values()) + _bytes(tensor.crow_indices()) + _bytes(tensor.col_indices())
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return _bytes(tensor.values()) + _bytes(tensor.ccol_indices()) + _bytes(tensor.row_indices())
    return tensor.numel() * tensor.element_size()
