"""Figures as SVG that stands inside of a page: its text is text, in the colour of what is around it, and nothing leads out."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

from pycompress.report.sections import roofs

Data = dict[str, Any]

TEXT = "#010203"  # in whose place stands that of the page
DENSE, COMPRESSED = "#d9822b", "#1f9d8f"  # on white and on black alike
WIDTH, ROW = 8.0, 0.2  # inches
MOST = 400  # bars and cells that are drawn


def _settings() -> dict[str, Any]:
    named = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(named, TEXT), "svg.fonttype": "none", "svg.hashsalt": "pycompress", "font.size": 8,
        "axes.spines.top": False, "axes.spines.right": False,
        "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    }  # fmt: skip


def drawn(name: str, data: Data, title: str) -> str:
    """The figure of a section: an ``svg`` element. ``title``: what a screen reader says of it."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_settings()), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph"
        )  # that matplotlib's font lacks: the browser draws the text, in its own
        figure = Figure(layout="constrained")
        FigureCanvasSVG(figure)
        _FIGURES[name](figure, data)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inside(out.getvalue(), name, title)


def _inside(svg: str, name: str, title: str) -> str:
    """Without what belongs to a file: declarations, metadata, namespaces; with names of its own, a title, and the page's colour."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(TEXT, "currentColor")
    label = f"{name}-title"
    head = f'<svg role="img" aria-labelledby="{label}" '
    svg = svg.replace("<svg ", head, 1)
    end = svg.index(">") + 1
    return f'{svg[:end]}<title id="{label}">{escape(title)}</title>{svg[end:]}'.strip()


def _plain(labels: list[str]) -> list[str]:
    """Names of layers as they are: a $ begins no formula."""
    return [label.replace("$", r"\$") for label in labels]


def _cut(layers: list[Any]) -> str:
    return f" (of the first {MOST} layers; the table has all)" if len(layers) > MOST else ""


def _front(figure: Any, data: Data) -> None:
    figure.set_size_inches(WIDTH, 3.6)
    axes, points = figure.subplots(), data["front"]
    largest = max(one["mb"] for one in points) or 1.0
    for one in points:
        size = 20 + 160 * one["mb"] / largest
        axes.scatter(
            one["ms"], one["quality"], s=size, color=DENSE if one["best"] else COMPRESSED, alpha=0.8, linewidths=0
        )
    best = next((one for one in points if one["best"]), None)
    if best is not None:
        axes.annotate("taken", (best["ms"], best["quality"]), textcoords="offset points", xytext=(8, -10))
    axes.set_xlabel("ms of a call; the larger the dot, the more bytes")
    axes.set_ylabel("quality")


def _layers(figure: Any, data: Data) -> None:
    layers = [one for one in data["layers"] if one["error"] is not None][:MOST]
    timed = any(one["us"] is not None and one["dense_us"] is not None for one in layers)
    figure.set_size_inches(WIDTH, 0.8 + ROW * len(layers))
    panes = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    places = range(len(layers))
    panes[0].barh(places, [one["error"] for one in layers], color=COMPRESSED)
    panes[0].set_yticks(places, _plain([one["name"] for one in layers]))
    panes[0].invert_yaxis()
    panes[0].set_xlabel(f"error of the weight{_cut(data['layers'])}")
    panes[0].margins(y=0.5 / len(layers))
    if timed:
        for shift, name, color, label in ((-0.2, "dense_us", DENSE, "dense"), (0.2, "us", COMPRESSED, "compressed")):
            times = [one[name] or math.nan for one in layers]
            panes[1].barh([place + shift for place in places], times, 0.4, color=color, label=label)
        panes[1].set_xlabel("us of a call")
        panes[1].legend()


def _sensitivity(figure: Any, data: Data) -> None:
    own = data["sensitivity"]
    layers, losses = own["layers"][:MOST], own["losses"][:MOST]
    figure.set_size_inches(WIDTH, 1.2 + ROW * len(layers))
    axes = figure.subplots()
    tiny = min((loss for row in losses for loss in row if loss is not None and loss > 0), default=1e-12)
    shown = [[math.nan if loss is None else math.log10(max(loss, tiny)) for loss in row] for row in losses]
    # (cells as paths: an image would be a picture inside of the picture)
    mesh = axes.pcolormesh(shown, cmap="viridis")
    axes.set_xticks(
        [i + 0.5 for i in range(len(own["candidates"]))], _plain(own["candidates"]), rotation=30, ha="right"
    )
    axes.set_yticks([i + 0.5 for i in range(len(layers))], _plain(layers))
    axes.set_xlabel(_cut(own["layers"]).strip())
    axes.invert_yaxis()
    figure.colorbar(mesh, ax=axes, label="log10 of the loss").solids.set_rasterized(False)


def _roofline(figure: Any, data: Data) -> None:
    figure.set_size_inches(WIDTH, 3.6)
    axes, points, rates = figure.subplots(), roofs(data), data["rates"]
    knee = rates["gflops"] / rates["gb_s"]
    low, high = min(knee, *(one[1] for one in points)) / 3, max(knee, *(one[1] for one in points)) * 3
    axes.loglog([low, knee, high], [low * rates["gb_s"], rates["gflops"], rates["gflops"]], color=TEXT, linewidth=1)
    for name, intensity, reached in points:
        axes.scatter(intensity, reached, color=DENSE if name.startswith("dense") else COMPRESSED)
        axes.annotate(name, (intensity, reached), textcoords="offset points", xytext=(6, -3))
    axes.set_xlabel("operations for each byte of the weights")
    axes.set_ylabel("G operations a second")


_FIGURES: dict[str, Callable[[Any, Data], None]] = {
    "front": _front,
    "layers": _layers,
    "sensitivity": _sensitivity,
    "roofline": _roofline,
}
