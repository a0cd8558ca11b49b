"""TOML, as far as plans and profiles of machines are written in it: tables of text, numbers, truth values, lists and further
tables."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pycompress.replacing import FilePath, replacing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read(path: FilePath, who: str) -> dict[str, Any]:
    """The table in a file; ``who``: asks for it. Raises ValueError where it is no TOML, OSError where it cannot be read."""
    with open(path, "rb") as file:
        try:
            return tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{who}: {path}: not TOML: {error}") from None


def write(path: FilePath, table: Mapping[str, Any]) -> None:
    """Writes a table to a file, which takes the place of an older one whole or not at all."""
    text = "\n".join(_lines(table, ()))
    with replacing(path) as new, open(new, "w", encoding="utf-8", newline="\n") as file:
        file.write(text + "\n")


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Values first: whatever follows the head of a table belongs to it."""
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    if path and (len(inner) < len(table) or not inner):
        yield f"\n[{'.'.join(map(_key, path))}]"
    yield from (f"{_key(key)} = {_value(value)}" for key, value in table.items() if key not in inner)
    for key, value in inner.items():
        yield from _lines(value, (*path, key))


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _text(key)


def _text(text: str) -> str:
    """A basic string: JSON's are, but for one character that must be escaped there."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)  # "inf" and "nan" are TOML's names, too
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(
        f"toml: {value!r} is {type(value).__name__}, expected text, a number, a truth value, a list or a table"
    )
