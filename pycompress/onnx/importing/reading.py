"""What an ONNX file says, read with care: a file may come from anywhere.

Nothing is allocated for what a file only claims: a tensor's bytes must be there, as many as its shape has. External data lies in
files below the model's folder, under a relative path without links; no other file is opened.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto, inliner
from torch import Tensor

MAX_NODES = 1_000_000  # of a graph whose functions are written out
MAX_OPSET = onnx.defs.onnx_opset_version()  # of newer ones it is not known what changed

# (Of other unsigned integers torch has the types, but no arithmetic.)
DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64, TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16, TensorProto.INT8: torch.int8, TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32, TensorProto.INT64: torch.int64, TensorProto.UINT8: torch.uint8, TensorProto.BOOL: torch.bool,
}  # fmt: skip
NIBBLES: dict[int, torch.dtype] = {TensorProto.INT4: torch.int8, TensorProto.UINT4: torch.uint8}  # each becomes a byte
# Where numbers of a type are that are no raw bytes, and as what they are to be read.
_FIELDS: dict[int, tuple[str, str]] = {
    TensorProto.FLOAT: ("float_data", "<f4"), TensorProto.DOUBLE: ("double_data", "<f8"), TensorProto.INT64: ("int64_data", "<i8"),
    TensorProto.INT32: ("int32_data", "<i4"),
    TensorProto.INT16: ("int32_data", "<i2"), TensorProto.INT8: ("int32_data", "<i1"),
    TensorProto.UINT8: ("int32_data", "<u1"), TensorProto.BOOL: ("int32_data", "<u1"), TensorProto.FLOAT16: ("int32_data", "<u2"),
    TensorProto.BFLOAT16: ("int32_data", "<u2"), TensorProto.INT4: ("int32_data", "<u1"), TensorProto.UINT4: ("int32_data", "<u1"),
}  # fmt: skip


@dataclass(frozen=True)
class File:
    """An ONNX model as it was read.

    Attributes:
        graph: with the file's own functions written out.
        opset: of the standard operators.
        maker: who wrote it, as it says.
        folder: where external data may lie.
    """

    graph: onnx.GraphProto
    opset: int
    maker: str
    folder: Path


def read(path: str | os.PathLike[str]) -> File:
    """Reads a file, without its tensors.

    Raises:
        ValueError: it is no ONNX model, or one whose opset is not known. OSError: it cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe, which might never end
        raise ValueError(f"from_onnx: {path} is no regular file")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"from_onnx: {path} is no ONNX file ({error})") from error
    if not model.HasField("graph") or not model.opset_import:
        raise ValueError(f"from_onnx: {path} is no ONNX file: it has no graph or no opset")
    if model.functions:
        _check_functions(model)
        try:
            model = inliner.inline_local_functions(model)
        except Exception as error:
            raise ValueError(f"from_onnx: the functions of {path} cannot be written out: {error}") from error
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if not 1 <= opset <= MAX_OPSET:
        raise ValueError(f"from_onnx: the opset is {opset}, expected 1 to {MAX_OPSET}")
    maker = f"{model.producer_name} {model.producer_version}".strip()
    return File(model.graph, opset, maker or "an unnamed program", path.parent)


def _check_functions(model: onnx.ModelProto) -> None:
    """Functions that call themselves, or each other so often that no memory holds them written out, are refused."""
    bodies = {(one.domain, one.name): one.node for one in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(node: onnx.NodeProto, inside: tuple[tuple[str, str], ...]) -> int:
        key = (node.domain, node.op_type)
        if key in inside:
            raise ValueError(f"from_onnx: the function {node.op_type} calls itself")
        if key in bodies and key not in sizes:
            sizes[key] = sum(size(one, (*inside, key)) for one in _all_nodes(bodies[key]))
        return sizes.get(key, 1)

    try:
        total = sum(size(node, ()) for node in _all_nodes(model.graph.node))
    except RecursionError:
        raise ValueError("from_onnx: functions call each other too deeply") from None
    if total > MAX_NODES:
        raise ValueError(f"from_onnx: written out, the functions make {total} nodes, expected at most {MAX_NODES}")


def _all_nodes(nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """With those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _all_nodes(graph.node)


# --- tensors ----------------------------------------------------------------------------------------------------------------


def tensor(proto: onnx.TensorProto, folder: Path) -> Tensor:
    """A tensor of a file; 4-bit integers as bytes.

    Raises:
        NotImplementedError: torch has no arithmetic for its type.
        ValueError: its type is none, or its data are not as many bytes as its shape has, or are where they must not be.
    """
    name = proto.name or "a tensor"
    kind = proto.data_type
    dtype = DTYPES.get(kind, NIBBLES.get(kind))
    if dtype is None:
        known = kind in TensorProto.DataType.values()
        raised = NotImplementedError if known else ValueError
        what = TensorProto.DataType.Name(kind) if known else f"the type {kind}"
        raise raised(f"from_onnx: {name} holds {what}, expected one of: {', '.join(map(str, DTYPES.values()))}")
    dims = list(proto.dims)
    if any(size < 0 for size in dims):
        raise ValueError(f"from_onnx: {name} has the shape {dims}, expected sizes from 0")
    count = math.prod(dims)
    n_bytes = (count + 1) // 2 if kind in NIBBLES else count * dtype.itemsize
    if proto.data_location == TensorProto.EXTERNAL:
        data = _external(proto, name, folder, n_bytes)
    elif proto.HasField("raw_data"):
        data = bytearray(proto.raw_data)
    else:
        data = _fields(proto, name)
    if len(data) != n_bytes:
        raise ValueError(f"from_onnx: {name} has {len(data)} bytes, expected {n_bytes} for {dims} of {dtype}")
    if not count:
        if max(dims, default=0) > 2**31:
            raise ValueError(f"from_onnx: {name} has the shape {dims}, expected sizes up to 2^31")
        return torch.empty(dims, dtype=dtype, device="cpu")
    if kind in NIBBLES:
        pairs = torch.frombuffer(data, dtype=torch.uint8)
        values = torch.stack([pairs & 15, pairs >> 4], 1).flatten()[:count].to(dtype)
        return (
            torch.where(values > 7, values - 16, values).reshape(dims) if dtype == torch.int8 else values.reshape(dims)
        )
    return torch.frombuffer(data, dtype=dtype).reshape(dims)


def _fields(proto: onnx.TensorProto, name: str) -> bytearray:
    field, dtype = _FIELDS[proto.data_type]
    values = getattr(proto, field)
    try:
        found = np.array(values, dtype=np.int64 if dtype[1] in "iu" and dtype[2:] != "8" else dtype)
        narrow = found.astype(dtype)
        # a negative number may stand for the bits of an unsigned byte
        if not (narrow.astype(found.dtype) == found).all() and dtype[1] != "f":
            narrow = found.astype(f"<i{dtype[2:]}")
            if not (narrow.astype(found.dtype) == found).all():
                raise OverflowError("a number does not fit its type")
    except (OverflowError, ValueError) as error:
        raise ValueError(f"from_onnx: the numbers of {name} are no {dtype}: {error}") from error
    return bytearray(narrow.tobytes())


def located(name: str, location: str, folder: Path) -> str:
    """The path of a file with a tensor's data. Raises ValueError where it is not below the folder, or behind a link."""
    where = Path(location)
    if not location or where.is_absolute() or ".." in where.parts or "\0" in location or "\\" in location:
        raise ValueError(
            f"from_onnx: the data of {name} are in {location!r}, expected a relative path without '..', below the model's folder"
        )
    base = os.path.realpath(folder)
    path = os.path.normpath(os.path.join(base, location))
    if os.path.realpath(path) != path:
        raise ValueError(f"from_onnx: the data of {name} are in {location!r}, which is a link, expected a file")
    return path


def _external(proto: onnx.TensorProto, name: str, folder: Path, n_bytes: int) -> bytearray:
    """Its bytes in another file, which is opened where it lies below the folder, under its own name."""
    said = {entry.key: entry.value for entry in proto.external_data}
    location = said.get("location", "")
    path = located(name, location, folder)
    try:
        offset, length = (int(said.get(key, default)) for key, default in (("offset", "0"), ("length", str(n_bytes))))
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except ValueError as error:
        raise ValueError(
            f"from_onnx: the data of {name} have an offset or a length that is no number: {error}"
        ) from error
    except OSError as error:
        raise ValueError(
            f"from_onnx: the data of {name} are in {location!r}, which cannot be opened: {error}"
        ) from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise ValueError(f"from_onnx: the data of {name} are in {location!r}, expected a regular file")
    with os.fdopen(handle, "rb") as file:
        if length != n_bytes or not 0 <= offset <= found.st_size - length:
            raise ValueError(
                f"from_onnx: the data of {name} are bytes {offset} to {offset + length} of {location!r}, which has "
                f"{found.st_size}, expected {n_bytes} inside of it"
            )
        file.seek(offset)
        data = bytearray(length)
        if file.readinto(data) != length:
            raise ValueError(f"from_onnx: {location!r} ended while the data of {name} were read")
        return data
