"""What a page says, in order: sections of sentences and tables, alike for each form of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pycompress.evaluation.records import SIZES

Data = dict[str, Any]
Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows below a head; the first cell of each row is its name. ``words``: the columns that hold no numbers besides."""

    caption: str
    head: Row
    rows: Sequence[Row]
    words: tuple[int, ...] = ()


@dataclass(frozen=True)
class Section:
    """``points``: what is listed below the text. ``figure``: the name of the one that stands there in a page that can show it."""

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figure: str = ""


def sections(data: Data) -> list[Section]:
    """Those that there is something for; that nothing was judged is something."""
    return [section for make in _ALL for section in make(data)]


def headline(data: Data) -> str:
    """One sentence."""
    parts = [f"{megabytes(data['bytes'])} in place of {megabytes(data['dense_bytes'])}"]
    evaluation = data["evaluation"] or {}
    faster = [(one["rows"], one["speedup"]) for one in evaluation.get("latencies", []) if one["speedup"]]
    parts += [f"{speedup[0]:.2f} times as fast on {counted(rows, 'row')}" for rows, speedup in faster]
    for one in evaluation.get("figures", []):
        if one["difference"] and not one["worse"]:
            parts.append(f"{one['name']} {interval(one['model'])} in place of {one['baseline']['value']:.4g}")
    return "; ".join(parts) + "."


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 10_000 else f"{count:,} bytes"


def number(value: float | None, spec: str = ".4g") -> str:
    return "-" if value is None else format(value, spec)


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def interval(own: Data | None) -> str:
    if own is None:
        return "-"
    return number(own["value"]) + ("" if own["low"] is None else f" ({own['low']:.4g} to {own['high']:.4g})")


# --- one after another ------------------------------------------------------------------------------------------------


def _what(data: Data) -> Iterator[Section]:
    groups: dict[str, list[Data]] = {}
    for layer in data["layers"]:
        groups.setdefault(layer["label"] if layer["method"] else "dense", []).append(layer)
    rows: list[Row] = []
    for label, layers in sorted(groups.items()):
        before, after = (sum(layer[name] for layer in layers) for name in ("dense_bytes", "bytes"))
        rows.append((label, f"{len(layers)}", f"{before:,}", f"{after:,}"))
    rest = sum(layer["bytes"] for layer in data["others"])
    rows.append(
        ("all else", f"{len(data['others'])}", f"{sum(one['dense_bytes'] for one in data['others']):,}", f"{rest:,}")
    )
    table = Table("Layers by what they became", ("became", "layers", "bytes before", "bytes after"), rows)
    yield Section("what", "What was compressed", *_calibrated(data["calibration"]), [table])


def _calibrated(own: Data | None) -> tuple[list[str], list[str]]:
    """A sentence, and what to beware of."""
    if own is None:
        return ["By what data: not said. Methods that make use of data do better or worse by its kind: ask for it."], []
    seen = (
        ""
        if own["calls"] is None
        else f" Seen were {counted(own['calls'], 'call')} of the model, {counted(own['rows'], 'row')}."
    )
    return [f"By what data: {own['text'].rstrip('.') or 'not described'}.{seen}"], own["warnings"]


def _quality(data: Data) -> Iterator[Section]:
    own = data["evaluation"]
    if own is None:
        yield Section("quality", "Quality", ["Not judged: nothing was evaluated."])
        return
    rows = []
    for one in own["figures"]:
        name = f"{one['name']}, {one['worse']}" if one["worse"] else one["name"]
        cells = [interval(one[which]) for which in ("baseline", "model", "difference")]
        rows.append((name, *cells, one["reason"] or one["verdict"]))
    text = [
        f"On {own['rows']:,} rows. In brackets is where each figure lies with a confidence of {own['confidence']:.0%}.",
        f"By {own['resamples']:,} bootstrap draws of the rows; in the difference the same for both models.",
    ]
    table = Table(
        "Each metric before and after", ("metric", "dense", "compressed", "difference", "reading"), rows, (4,)
    )
    yield Section("quality", "Quality", text, own["notes"], [table])


def _size(data: Data) -> Iterator[Section]:
    own = data["evaluation"]
    if own is None or own["sizes"] is None:
        rows: list[Row] = [("parameters and buffers, bytes", f"{data['dense_bytes']:,}", f"{data['bytes']:,}")]
        yield Section("size", "Size", tables=[Table("Size before and after", ("what", "dense", "compressed"), rows)])
        return
    before, after = own["baseline_sizes"], own["sizes"]

    def of(sizes: Data | None, name: str) -> float | None:
        value: float | None = None if sizes is None else sizes[name]
        return value / sizes["rows"] if sizes and value is not None and name in ("macs", "flops") else value

    rows = []
    for name, what in SIZES.items():
        first, second = of(before, name), of(after, name)
        times = f"{first / second:.2f}" if first is not None and second else "-"
        rows.append((what, number(first, ",.0f"), number(second, ",.0f"), times))
    text = ["Operations are two for each multiply-add of a product; those of int8 layers are on integers."]
    yield Section(
        "size",
        "Size",
        text,
        tables=[Table("Size and operations before and after", ("what", "dense", "compressed", "times"), rows)],
    )


def _speed(data: Data) -> Iterator[Section]:
    if not (data["evaluation"] or {}).get("latencies"):
        return
    rows = []
    for one in data["evaluation"]["latencies"]:
        cells: list[str] = []
        for which in ("baseline", "times"):
            own = one[which]
            cells += (
                ["-"] * 3
                if own is None
                else [f"{own['p50_ms']:.3g}", f"{own['p95_ms']:.3g}", f"{own['rows_per_s']:,.0f}"]
            )
        speedup = one["speedup"]
        rows.append(
            (
                f"{one['rows']:,}",
                *cells,
                "-" if speedup is None else f"{speedup[0]:.2f} ({speedup[1]:.2f} to {speedup[2]:.2f})",
            )
        )
    head = ("rows", "dense ms", "95th percentile", "rows/s", "compressed ms", "95th percentile", "rows/s", "speed-up")
    text = [
        "Both models took turns; the speed-up is the median of the ratios of the turns, in brackets their quartiles."
    ]
    yield Section("speed", "Speed", text, tables=[Table("Time of a call by its rows", head, rows)])


def _front(data: Data) -> Iterator[Section]:
    if not data["front"]:
        return
    columns = [prefix + name for name in ("ms", "mb", "quality") for prefix in ("", "predicted_")]
    rows = [
        ("taken" if one["best"] else str(i + 1), *(number(one[column]) for column in columns))
        for i, one in enumerate(data["front"])
    ]
    head = ("plan", "ms", "predicted", "MB", "predicted", "quality", "predicted")
    text = [f"{len(rows)} plans, of which none is worse than another in time, bytes and quality alike."]
    yield Section(
        "front", "Plans to choose from", text, tables=[Table("The Pareto front, measured", head, rows)], figure="front"
    )


def _layers(data: Data) -> Iterator[Section]:
    rows = [
        (
            one["name"], one["kind"], "x".join(map(str, one["shape"])), one["label"], f"{one['dense_bytes']:,}",
            f"{one['bytes']:,}", number(one["error"]), number(one["dense_us"], ".0f"), number(one["us"], ".0f"), one["note"],
        )
        for one in data["layers"]
    ]  # fmt: skip
    head = ("layer", "kind", "shape", "became", "dense bytes", "bytes", "error", "dense us", "us", "notes")
    text = [
        "The error is that of the weight, ||W - W'|| / ||W||. Times are of layers that had to be faster than the dense ones."
    ]
    tables = [Table("Layers that are compressed, or could be", head, rows, (1, 3, 9))]
    if data["blocks"]:
        blocks = [
            (one["name"] or "(the model)", one["kind"], one["reason"] or "runs as one operator")
            for one in data["blocks"]
        ]
        tables.append(Table("Blocks", ("module", "kind", "how it runs"), blocks, (1, 2)))
    others = [(one["name"], one["kind"], f"{one['bytes']:,}", one["note"]) for one in data["others"]]
    if others:
        tables.append(
            Table(
                "All else that has parameters or buffers",
                ("module", "kind", "bytes", "why it was left"),
                others,
                (1, 3),
            )
        )
    shown = any(one["error"] is not None for one in data["layers"])
    yield Section("layers", "Layer by layer", text, tables=tables, figure="layers" if shown else "")


def _sensitivity(data: Data) -> Iterator[Section]:
    own = data["sensitivity"]
    if not own or not own["layers"]:
        return
    rows = [
        (layer, *(number(loss, ".2e") for loss in losses))
        for layer, losses in zip(own["layers"], own["losses"], strict=True)
    ]
    text = ["What is lost where one layer alone is compressed; less is better."]
    yield Section(
        "sensitivity",
        "Sensitivity",
        text,
        tables=[Table("Loss by layer and method", ("layer", *own["candidates"]), rows)],
        figure="sensitivity",
    )


def roofs(data: Data) -> list[tuple[str, float, float]]:
    """(which model and how many rows, operations for each byte of its weights, 10^9 operations a second) of each call timed."""
    own = data["evaluation"]
    if not data["rates"] or own is None:
        return []
    found = []
    for one in own["latencies"]:
        for name, sizes, times in (("dense", "baseline_sizes", "baseline"), ("compressed", "sizes", "times")):
            if own[sizes] is not None and one[times] is not None and own[sizes]["flops"]:
                flops = own[sizes]["flops"] / own[sizes]["rows"] * one["rows"]
                found.append(
                    (
                        f"{name}, {counted(one['rows'], 'row')}",
                        flops / own[sizes]["memory_bytes"],
                        flops / one[times]["p50_ms"] / 1e6,
                    )
                )
    return found


def _roofline(data: Data) -> Iterator[Section]:
    points = roofs(data)
    if not points:
        return
    rates = data["rates"]
    rows = []
    for name, intensity, reached in points:
        roof = min(rates["gflops"], intensity * rates["gb_s"])
        rows.append((name, number(intensity), number(reached), number(roof), f"{reached / roof:.0%}"))
    reaches = f"{rates['gflops']:.4g} G float32 operations and reads {rates['gb_s']:.4g} GB a second"
    text = [
        f"This machine reaches {reaches}, as measured. A call has to read the weights once; what layers hand on is left out.",
        "Integer operations may lie above the roof.",
    ]
    head = ("call", "operations a byte", "G operations/s", "roof", "of it")
    table = Table("What calls reach of what the machine can", head, rows)
    yield Section("roofline", "Roofline", text, tables=[table], figure="roofline")


def _validation(data: Data) -> Iterator[Section]:
    own = data["validation"]
    if own is None:
        yield Section("validation", "Validation", ["Not validated against ONNX Runtime."])
        return
    rows = [(name, reason) for name, reason in own["others"].items()]
    tables = [Table("Layers that did not agree, or were not compared", ("layer", "why"), rows, (1,))] if rows else []
    yield Section("validation", "Validation", [own["verdict"]], tables=tables)


def _machine(data: Data) -> Iterator[Section]:
    own = data["environment"]
    rows: list[Row] = []
    for name, value in own.items():
        parts = [f"{key} {item}" for key, item in value.items()] if isinstance(value, dict) else value
        text = ", ".join(map(str, parts)) if isinstance(parts, list | tuple) else str(parts)
        rows.append((name.replace("_", " "), text))
    yield Section("machine", "Environment", tables=[Table("Where this was measured", ("what", "value"), rows, (1,))])


def _again(data: Data) -> Iterator[Section]:
    text = [] if data["command"] else ["The command was not given."]
    rows: list[Row] = [("command", data["command"])] if data["command"] else []
    rows += [(f"SHA-256 of the {name} state", digest) for name, digest in data["hashes"].items()]
    tables = [Table("Command and hashes", ("what", "value"), rows, (1,))]
    if data["plan"] is not None:
        tables.append(
            Table(
                "The plan: the first glob that matches a layer counts",
                ("layers", "method"),
                [*data["plan"].items()],
                (1,),
            )
        )
    if (best := next((one for one in data["front"] or [] if one["best"]), None)) is not None:
        tables.append(Table("The plan that the search took", ("layers", "method"), [*best["plan"].items()], (1,)))
    yield Section("again", "How to make it again", text, tables=tables)


_ALL: list[Callable[[Data], Iterator[Section]]] = [
    _what, _quality, _size, _speed, _front, _layers, _sensitivity, _roofline, _validation, _machine, _again,
]  # fmt: skip
