"""What was measured, by what it was measured of: so that nothing is measured twice, whoever stops in between."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pycompress.replacing import FilePath


class Cache:
    """Numbers, texts and lists of them by a key, in memory and, where there is a path, in a file: a line of JSON for each,
    written as soon as it is known. A last line that was not finished is written over; several processes must not share one file.

    Args:
        path: of the file, which is made where there is none; None: nothing is kept.
    Attributes:
        hits, misses: how often something was there, and how often it had to be measured.
    Raises:
        ValueError: the file is no such cache.
    """

    def __init__(self, path: FilePath | None = None) -> None:
        self.path = path
        self.hits = self.misses = 0
        self._found: dict[str, Any] = {}
        if path is not None and os.path.exists(path):
            self._read(path)

    def _read(self, path: FilePath) -> None:
        with open(path, "rb") as file:
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                key, value = json.loads(line)
                self._found[str(key)] = value
            except (ValueError, TypeError):
                raise ValueError(f"cache: {path}: line {number} is {line[:40]!r}, expected [key, value]") from None
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def get(self, key: str) -> Any:
        """What is known under a key, or None."""
        value = self._found.get(key)
        self.hits, self.misses = self.hits + (value is not None), self.misses + (value is None)
        return value

    def put(self, key: str, value: Any) -> Any:
        """Writes it down, and returns it."""
        self._found[key] = value
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps([key, value]) + "\n")
        return value


def digest(*values: Any) -> str:
    """A key: alike for what is alike in content, in this process and the next.

    Of tensors, arrays and models it is the numbers that count; of functions the code, and what they close over; of other objects
    what they hold, as far as Python can see it.
    """
    sha = hashlib.sha256()
    _feed(sha, values, set())
    return sha.hexdigest()


def _feed(sha: Any, value: Any, met: set[int]) -> None:
    sha.update(f"<{type(value).__qualname__}".encode())
    if isinstance(value, str | bytes | int | float | type | None):
        sha.update(repr(value).encode())
    elif isinstance(value, Tensor):
        own = value.detach().cpu().contiguous()
        sha.update(f"{own.dtype}{list(own.shape)}".encode())
        sha.update(own.reshape(-1).view(torch.uint8).numpy().tobytes() if own.numel() else b"")
    elif isinstance(value, np.ndarray):
        sha.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif id(value) not in met:  # (objects may hold each other)
        for part in _parts(value):
            _feed(sha, part, met | {id(value)})
    sha.update(b">")


def _parts(value: Any) -> Iterable[Any]:
    """What an object is made of."""
    if isinstance(value, nn.Module):
        return [repr(value), value.state_dict()]
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, set | frozenset):
        return sorted(map(digest, value))
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        return [value.__code__, value.__defaults__, [cell.cell_contents for cell in value.__closure__ or ()]]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    return [type(value).__module__, getattr(value, "__dict__", {})]
