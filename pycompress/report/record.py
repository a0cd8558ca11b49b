"""``Record``: all that is known of a compressed model beside its dense one, as plain data, from which pages are made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pycompress.calibration import Calibration, Description
from pycompress.calls import uncompiled
from pycompress.evaluation import Evaluation
from pycompress.records import LayerRecord, summary
from pycompress.replacing import FilePath, replacing
from pycompress.validation import Report

VERSION = 1
Data = dict[str, Any]


class Cost(Protocol):
    """Milliseconds of a call, bytes in millions, and quality, the higher the better."""

    @property
    def ms(self) -> float: ...
    @property
    def mb(self) -> float: ...
    @property
    def quality(self) -> float: ...


class Point(Protocol):
    """A plan, and what it was thought and found to take."""

    @property
    def plan(self) -> Mapping[str, Any]: ...
    @property
    def predicted(self) -> Cost: ...
    @property
    def measured(self) -> Cost: ...


class Front(Protocol):
    """Plans of which none is worse than another in everything, and the one that was taken."""

    @property
    def best(self) -> Point: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Point]: ...


class Record:
    """What :func:`report` made; ``data`` is plain (JSON). Pages of it: :meth:`html`, :meth:`markdown`, :meth:`card`."""

    def __init__(self, data: Data) -> None:
        self.data = data

    @classmethod
    def read(cls, path: FilePath) -> Record:
        """A JSON file that :meth:`save` wrote. Raises ValueError for another file, or of a later version."""
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        version = data.get("version") if isinstance(data, dict) else None
        if type(version) is not int or not 1 <= version <= VERSION or data.get("kind") != "pycompress report":
            raise ValueError(f"report: {os.fspath(path)} is no report of version {VERSION} or earlier")
        return cls(data)

    def json(self) -> str:
        return json.dumps(self.data, indent=1, allow_nan=False) + "\n"

    def html(self) -> str:
        """One page with all of it, that needs no other file. Needs the extra ``report``."""
        from pycompress.report.page import page

        return page(self.data)

    def markdown(self) -> str:
        from pycompress.report.markdown import markdown

        return markdown(self.data)

    def card(self, licence: str = "", base_model: str = "") -> str:
        """A model card for hubs: YAML in front of the Markdown.

        Args:
            licence, base_model: of the dense model, as the hub names them; left out where they are ''.
        """
        from pycompress.report.markdown import card

        return card(self.data, licence, base_model)

    def save(self, path: FilePath) -> None:
        """Writes ``.html``, ``.md`` or ``.json``; a file that is there is replaced whole or not at all.

        Raises:
            ValueError: another ending. OSError: it could not be written. ImportError: the extra ``report`` is not installed.
        """
        kinds = {".html": self.html, ".md": self.markdown, ".json": self.json}
        kind = os.path.splitext(os.fspath(path))[1]
        if kind not in kinds:
            raise ValueError(f"report: the path is {os.fspath(path)!r}, expected one that ends with {', '.join(kinds)}")
        text = kinds[kind]()
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(text)


def report(
    dense: nn.Module,
    compressed: nn.Module,
    path: FilePath | None = None,
    *,
    evaluation: Evaluation | None = None,
    front: Front | None = None,
    sensitivity: Mapping[tuple[str, str], Any] | None = None,
    validation: Report | None = None,
    calibration: Calibration | Description | str | None = None,
    plan: Any = None,
    command: str = "",
    rates: Mapping[str, float] | None = None,
    title: str = "",
) -> Record:
    """What became of a model, on one page to show to somebody: what was compressed and by what data, before and after in each
    metric, layer by layer, and how to make it again.

    Args:
        dense, compressed: the models before and after.
        path: of the page: ``.html``, one file that needs no other and no network, ``.md`` or ``.json``. None: it is not written.
        evaluation: what :func:`evaluate` found of the compressed model beside the dense one.
        front: the plans of a search, each with ``plan``, and ``predicted`` and ``measured`` with ``ms``, ``mb`` and ``quality``.
        sensitivity: {(layer, candidate): loss}, a number, or something that has one as ``exact`` or ``cheap``.
        validation: what :func:`validate` found.
        calibration: what the methods saw, or what there is to say of it: the page says that nothing is known where it is None.
        plan: the plan of ``compress``; it stands on the page as it would be written in Python.
        command: by which all of this is made again.
        rates: what this machine reaches: ``gflops``, 10^9 float32 operations a second, and ``gb_s``, 10^9 bytes read a second. With
            them, and an evaluation with times, there is a roofline.
        title: of the page; by default the name of the model's class.
    Returns:
        The :class:`~pycompress.report.Record`, which gives the other forms, too.
    Raises:
        TypeError: a model is no module. ValueError: a path of another ending, rates of other names.
        OSError: the page could not be written. ImportError: the extra ``pycompress[report]`` is not installed.
    """
    for name, model in (("dense", dense), ("compressed", compressed)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"report: {name} is {type(model).__name__}, expected a torch.nn.Module")
    if rates is not None and (set(rates) != {"gflops", "gb_s"} or not all(rate > 0 for rate in rates.values())):
        raise ValueError(f"report: rates is {dict(rates)}, expected gflops and gb_s, numbers above 0")
    layers = summary(compressed)
    data: Data = {
        "kind": "pycompress report",
        "version": VERSION,
        "title": title or f"{type(uncompiled(dense)).__name__}, compressed",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dense_bytes": summary(dense).bytes,
        "bytes": layers.bytes,
        "layers": [_layer(record) for record in layers.layers],
        "others": [_layer(record) for record in layers.others],
        "blocks": [{"name": own.name, "kind": own.kind, "reason": own.reason} for own in layers.blocks],
        "calibration": _calibration(calibration),
        "evaluation": None if evaluation is None else evaluation.as_dict(),
        "front": None if front is None else _front(front),
        "sensitivity": None if sensitivity is None else _sensitivity(sensitivity),
        "validation": None if validation is None else _validation(validation),
        "rates": None if rates is None else dict(rates),
        "environment": _environment() if evaluation is None else evaluation.environment,
        "command": command,
        "plan": None if plan is None else _plan(plan),
        "hashes": {"dense": digest(dense), "compressed": digest(compressed)},
    }
    record = Record(_finite(data))
    if path is not None:
        record.save(path)
    return record


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's state: names, dtypes, shapes and bits, of compressed layers those of their canonical weights."""
    found = hashlib.sha256()
    for name, value in sorted(uncompiled(model).state_dict().items()):
        found.update(f"{name}\0".encode())
        if isinstance(value, Tensor):
            own = value.detach().cpu().contiguous()
            found.update(f"{own.dtype} {list(own.shape)}\0".encode())
            found.update(own.reshape(-1).view(torch.uint8).numpy().data)
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def _environment() -> Data:
    from pycompress.benchmark.environment import Environment

    return Environment.collect().as_dict()


def _layer(record: LayerRecord) -> Data:
    note = "; ".join(filter(None, [record.reason, record.note]))
    activation = "" if record.activation == "none" else f" + {record.activation}"
    return {
        "name": record.name or "(the model)",
        "kind": record.kind,
        "shape": [*record.shape],
        "method": record.method,
        "label": record.label + activation,
        "dense_bytes": record.dense_bytes,
        "bytes": record.bytes,
        "error": record.error,
        "dense_us": record.dense_us,
        "us": record.us,
        "note": note,
    }


def _calibration(calibration: Calibration | Description | str | None) -> Data | None:
    if calibration is None:
        return None
    if isinstance(calibration, str):
        return {"text": calibration, "calls": None, "rows": None, "warnings": []}
    own = calibration.describe() if isinstance(calibration, Calibration) else calibration
    rows = max((layer.rows for layer in own.layers), default=0)
    return {"text": own.text, "calls": own.calls, "rows": rows, "warnings": [*own.warnings]}


def _front(front: Front) -> list[Data]:
    best = front.best
    return [
        {
            **{name: float(getattr(point.measured, name)) for name in ("ms", "mb", "quality")},
            **{f"predicted_{name}": float(getattr(point.predicted, name)) for name in ("ms", "mb", "quality")},
            "plan": _plan(point.plan),
            "best": point is best,
        }
        for point in front
    ]


def _plan(plan: Any) -> dict[str, str]:
    rules = plan if isinstance(plan, Mapping) else {"*": plan}
    calls = {f"shrink, call {i}": repr(dict(call)) for i, call in enumerate(getattr(plan, "shrink", ()), 1)}
    return {**calls, **{glob: repr(method) for glob, method in rules.items()}}


def _sensitivity(losses: Mapping[tuple[str, str], Any]) -> Data:
    """Layers, candidates, and by layer the losses; None where there is none."""

    def number(loss: Any) -> float | None:
        if loss is None or isinstance(loss, int | float):
            return loss
        exact: float | None = getattr(loss, "exact", None)
        return getattr(loss, "cheap", None) if exact is None else exact

    layers = [*dict.fromkeys(layer for layer, _ in losses)]
    candidates = [*dict.fromkeys(candidate for _, candidate in losses)]
    rows = [[number(losses.get((layer, name))) for name in candidates] for layer in layers]
    return {"layers": layers, "candidates": candidates, "losses": rows}


def _validation(validation: Report) -> Data:
    others = {one.name: one.reason for one in validation.layers if one.status != "ok"}
    return {"verdict": validation.verdict, "ok": validation.ok, "layers": len(validation.layers), "others": others}


def _finite(value: Any) -> Any:
    """What JSON holds: tuples are lists, and numbers that are none are None."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
