"""A calibration in a safetensors file: its tensors, each once, and in the metadata what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pycompress.methods.inputs import InputStatistics
from pycompress.replacing import FilePath, replacing

VERSION = 1
KEY = "pycompress.calibration"  # in the metadata of the file
_DTYPES = {
    "second_moment": ("F64", "F32"), "counts": ("I64",), "histogram": ("I64",),
    **dict.fromkeys(("mean", "mean_square", "low", "high", "limit", "extremes"), ("F64",)),
}  # fmt: skip
_MATRICES = ("second_moment", "extremes")
_OF_ALL_FEATURES = ("histogram", "limit", "extremes")  # whose sizes are others


def save(path: FilePath, statistics: Mapping[str, InputStatistics], facts: Mapping[str, Any]) -> None:
    """Writes statistics by the names of their layers; those that several share once."""
    if not statistics:
        raise ValueError("Calibration.save: nothing was gathered, expected layers that were met")
    inputs: dict[int, int] = {}
    tensors: dict[str, Tensor] = {}
    rows: list[int] = []
    layers: dict[str, int] = {}
    for name, own in statistics.items():
        if id(own) not in inputs:
            inputs[id(own)] = len(rows)
            tensors |= {f"{len(rows)}.{kind}": tensor.contiguous() for kind, tensor in own.tensors().items()}
            rows.append(own.rows)
        layers[name] = inputs[id(own)]
    text = json.dumps({"version": VERSION, **facts, "rows": rows, "layers": layers})
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, {KEY: text})
    except SafetensorError as error:
        raise OSError(f"Calibration.save: {path} could not be written: {error}") from None
    except OSError as error:
        raise OSError(error.errno, f"Calibration.save: {error.strerror}", str(path)) from None


def load(path: FilePath) -> tuple[dict[str, InputStatistics], dict[str, Any]]:
    """The statistics, and the facts. Raises ValueError where anything in the file is not as it was written."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise _fail(path, "no calibration in its metadata, expected a file that Calibration.save wrote")
            rows, layers, facts = _read(path, text)
            kinds = _kinds(path, file, len(rows))
            found = [_statistics(path, file, i, own, rows[i]) for i, own in enumerate(kinds)]
    except SafetensorError as error:
        raise _fail(path, f"no safetensors file: {error}") from None
    return {name: found[i] for name, i in layers.items()}, facts


def _fail(path: FilePath, message: str) -> ValueError:
    return ValueError(f"Calibration.load: {path}: {message}")


def _read(path: FilePath, text: str) -> tuple[list[int], dict[str, int], dict[str, Any]]:
    try:
        plan = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _fail(path, f"its description is not JSON: {error}") from None
    version = plan.get("version") if isinstance(plan, dict) else None
    if version != VERSION or type(version) is not int:
        raise _fail(path, f"its description has version {version!r}, expected {VERSION}")
    rows, layers, own, calls = (plan.get(name) for name in ("rows", "layers", "text", "calls"))
    if not (isinstance(rows, list) and rows and all(type(count) is int and count > 0 for count in rows)):
        raise _fail(path, "rows are not what they should be, expected a number from 1 for each input")
    numbers = range(len(rows))
    if not (isinstance(layers, dict) and all(type(i) is int and i in numbers for i in layers.values())):
        raise _fail(path, f"layers are not what they should be, expected {{name: 0 to {len(rows) - 1}}}")
    if not isinstance(own, str) or type(calls) is not int or calls < 0:
        raise _fail(path, f"text is {own!r}, calls are {calls!r}, expected a text and a number from 0")
    return rows, layers, {"text": own, "calls": calls}


def _kinds(path: FilePath, file: Any, count: int) -> list[list[str]]:
    """The kinds of tensors that there are of each input; shapes and dtypes are checked, before anything is read."""
    kinds: list[list[str]] = [[] for _ in range(count)]
    sizes: list[set[int]] = [set() for _ in range(count)]
    for name in file.keys():  # noqa: SIM118 - it is no mapping
        number, _, kind = name.partition(".")
        if not (number.isdecimal() and number == str(int(number)) and int(number) < count and kind in _DTYPES):
            raise _fail(path, f"the tensor {name!r} is none of a calibration")
        piece, i = file.get_slice(name), int(number)
        shape, dtype = piece.get_shape(), piece.get_dtype()
        if dtype not in _DTYPES[kind] or len(shape) != (2 if kind in _MATRICES else 1) or not all(shape):
            raise _fail(path, f"{name} is {dtype} {shape}, expected {' or '.join(_DTYPES[kind])}")
        kinds[i].append(kind)
        sizes[i].update(() if kind in _OF_ALL_FEATURES else shape)
        if len(sizes[i]) > 1:
            raise _fail(path, f"{name} is {shape}, the other tensors of its input are not of this size")
    return kinds


def _statistics(path: FilePath, file: Any, number: int, kinds: list[str], rows: int) -> InputStatistics:
    tensors = {kind: file.get_tensor(f"{number}.{kind}").clone() for kind in kinds}
    try:
        found = InputStatistics(rows, **tensors)
    except ValueError as error:
        raise _fail(path, f"input {number}: {error}") from None
    moment, squares = found.second_moment, found.mean_square
    if moment is not None and not torch.equal(moment, moment.T):
        raise _fail(path, f"input {number}: the second moment is not symmetric")
    if moment is not None:
        squares = moment.diagonal()
    if squares is not None and bool((squares < 0).any()):
        raise _fail(path, f"input {number}: mean squares are negative")
    if found.low is not None and found.high is not None and bool((found.low > found.high).any()):
        raise _fail(path, f"input {number}: a lowest value is above the highest")
    return found
