"""A progress bar on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def on_a_terminal() -> bool:
    """Whether somebody would see a progress bar."""
    isatty = getattr(sys.stderr, "isatty", None)  # there may be no standard error
    return bool(isatty and isatty())


def track(items: Sequence[T], what: str, show: bool) -> Iterator[T]:
    """Yields the items, and shows on standard error how many there are still to come."""
    if not show or sys.stderr is None:
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        for i, item in enumerate(items):
            print(f"\r{what} layer {i + 1} of {len(items)}", end="", file=sys.stderr, flush=True)  # noqa: T201
            yield item
        print(file=sys.stderr)  # noqa: T201
        return
    yield from track(items, description=what, console=Console(stderr=True))
