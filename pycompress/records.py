"""``summary``: what became of each layer of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycompress.nn import CompressedLayer
from pycompress.surgery import compressed_layers

RECORDS = "_pycompress_records"  # the attribute in which compress() leaves the records with the model


@dataclass
class LayerRecord:
    """What became of one layer.

    Attributes:
        name, kind, shape: dotted name in the model, class of the dense layer, shape of its weight.
        method: ``int8``, ``int4``, ``sparse``, ``low_rank`` or None where the layer stayed dense; ``reason`` says why then.
        dense_bytes, bytes: parameters before and after.
        error: relative error of the weight, ||W - W'|| / ||W|| (Frobenius).
        dense_us, us: measured time of one call, where ``only_if_faster`` measured it.
        label: the method as the table has it, e.g. ``sparse 20 % int8``.
        density: of a sparse layer: the share of its weights that is non-zero.
        rank: of a low-rank layer with two factors.
        bits: of a sparse or a low-rank layer: what one of its weights (in the factors) takes, 32 or 8.
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

    def describe(self, layer: CompressedLayer, *, shares_weight: bool = False) -> None:
        """Writes down what the compressed layer is; a weight that it shares with another layer counts there."""
        self.method, self.label, self.reason = layer.weight_type.name, layer.label, ""
        self.activation = layer.activation
        self.density, self.rank = getattr(layer, "density", None), getattr(layer, "rank", None)
        self.bits = getattr(layer, "bits", None)
        self.bytes = 4 * _size(layer.bias) + (0 if shares_weight else layer.canonical_bytes())


def _size(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.numel()


class Summary:
    """What became of each layer; ``str()`` is a table.

    Attributes:
        layers: one :class:`LayerRecord` a layer.
        dense_bytes, bytes: of all parameters and buffers of the model, before and after (a shared tensor counts once).
    """

    def __init__(self, layers: list[LayerRecord], total_bytes: int) -> None:
        self.layers = layers
        self.bytes = total_bytes
        self.dense_bytes = total_bytes + sum(layer.dense_bytes - layer.bytes for layer in layers)

    def __str__(self) -> str:
        head = ("layer", "shape", "method", "bytes", "of dense", "error", "dense us", "us", "")
        whole = (f"{self.bytes:,}", f"{self.bytes / max(self.dense_bytes, 1):.2f}")
        rows = [head, *(self._row(layer) for layer in self.layers), ("the whole model", "", "", *whole, "", "", "", "")]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        left = {0, 2, len(head) - 1}
        lines = []
        for row in rows:
            cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(cells))
        return "\n".join(line.rstrip() for line in lines)

    @staticmethod
    def _row(layer: LayerRecord) -> tuple[str, ...]:
        def number(value: float | None, spec: str) -> str:
            return "" if value is None else format(value, spec)

        fused = "" if layer.activation == "none" else f"+{layer.activation}"
        return (
            layer.name or "(the model)", "x".join(map(str, layer.shape)), layer.label + fused,
            f"{layer.bytes:,}", f"{layer.bytes / max(layer.dense_bytes, 1):.2f}", number(layer.error, ".4f"),
            number(layer.dense_us, ".0f"), number(layer.us, ".0f"), layer.reason,
        )  # fmt: skip


def summary(model: nn.Module) -> Summary:
    """Per layer: method, bytes before and after, weight error, measured times, or why it was left alone.

    Compressed layers are described as they are now. Of those that were loaded from a file or put in by hand, errors and times
    are not known.
    """
    layers = compressed_layers(model)
    packed = {id(layer.packed): layer for layer in layers.values()}  # (tied layers share it, and the scale with it)
    derived = packed.keys()
    seen: dict[int, Tensor] = {}
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and not is_lazy(tensor) and id(tensor) not in derived:
                seen[id(tensor)] = tensor
    total = sum(tensor.numel() * tensor.element_size() for tensor in seen.values())
    total += sum(layer.canonical_bytes() for layer in packed.values())
    return Summary(_records(model, layers), total)


def _records(model: nn.Module, layers: dict[str, CompressedLayer]) -> list[LayerRecord]:
    """What compress() wrote down, brought up to date, and what it did not know of."""
    records = [replace(record) for record in model.__dict__.get(RECORDS, [])]
    known = {record.name for record in records}
    records += [
        LayerRecord(name, layer.kind.title, layer.dense_shape, 0) for name, layer in layers.items() if name not in known
    ]
    packed: set[int] = set()
    for record in records:
        if (layer := layers.get(record.name)) is None:
            continue
        shared = id(layer.packed) in packed
        packed.add(id(layer.packed))
        record.describe(layer, shares_weight=shared)
        if record.name not in known:
            record.dense_bytes = 4 * (_size(layer.bias) + (0 if shared else layer.n * layer.k))
    return records
