"""A graph as a file, which takes the place of an older one whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress

import onnx
import onnx_ir as ir

from pycompress.replacing import FilePath, replacing

LARGEST = 2**31 - 2**26  # bytes of weights in one file: a protobuf message ends at 2 GiB, and nodes take their part
ALIGNMENT = 2**16  # of weights in a file of their own: what every system can map into memory
BESIDE = 2**10  # bytes of the largest constant that stays in the graph then


def write(model: ir.Model, path: FilePath, *, check: bool = True) -> None:
    """Writes a graph, which the ONNX checker has to pass where it is asked (``check``). Where its weights are larger than a
    protobuf message can be, they go to a second file beside it, one after the other and never together in memory.

    The second file is called ``NAME.DIGEST.data`` after what is in it. So it lies beside an older one until the graph, which says
    the name, has taken the place of the older graph in one step; then the older one goes.

    Raises:
        OSError: a file could not be written; the older ones are as they were. ValueError: path is a symbolic link, and weights
        would have to lie beside it.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    weights = [value for value in model.graph.initializers.values() if value.const_value.nbytes > BESIDE]
    apart = sum(value.const_value.nbytes for value in weights) > LARGEST
    if apart and os.path.islink(path):
        raise ValueError(
            f"export: {os.fspath(path)} is a symbolic link, expected the path of a file, beside which large weights are found"
        )
    beside, fresh = "", False
    try:
        with replacing(path) as temporary:
            if apart:
                beside = _write_weights(weights, os.path.dirname(temporary), name)
            with open(temporary, "wb") as file:
                file.write(ir.to_proto(model).SerializeToString())
            if check:
                onnx.checker.check_model(temporary)
            if beside:
                fresh = not os.path.exists(os.path.join(folder, beside))
                os.replace(os.path.join(os.path.dirname(temporary), beside), os.path.join(folder, beside))
    except BaseException as error:
        if fresh:
            os.unlink(os.path.join(folder, beside))
        if isinstance(error, OSError):
            raise OSError(error.errno, f"export: {error.strerror}", os.fspath(path)) from None
        raise
    older = re.compile(re.escape(name) + r"\.[0-9a-f]{16}\.data")
    for other in os.listdir(folder):
        if other != beside and older.fullmatch(other):
            with suppress(OSError):
                os.unlink(os.path.join(folder, other))


def _write_weights(weights: Sequence[ir.Value], folder: str, name: str) -> str:
    """Moves weights of a graph to a file in a folder. Returns its name."""
    digest, places = hashlib.sha256(), list[tuple[int, int]]()
    temporary = os.path.join(folder, "weights")
    with open(temporary, "xb") as file:
        for value in weights:
            file.write(gap := bytes(-file.tell() % ALIGNMENT))
            data = value.const_value.tobytes()
            places.append((file.tell(), len(data)))
            file.write(data)
            digest.update(gap)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    beside = f"{name}.{digest.hexdigest()[:16]}.data"
    os.rename(temporary, os.path.join(folder, beside))
    for value, (offset, length) in zip(weights, places, strict=True):
        tensor = value.const_value
        value.const_value = ir.ExternalTensor(
            beside, offset, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=folder
        )
    return beside
