"""What a method has to say of a weight that it compressed, such as that it had to do it another way than it was asked to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_open: ContextVar[list[str] | None] = ContextVar("notes", default=None)


def note(text: str) -> None:
    """For the layer's record, which the summary prints; nobody listens where a method is called by itself."""
    notes = _open.get()
    if notes is not None and text not in notes:
        notes.append(text)


@contextmanager
def noted() -> Iterator[list[str]]:
    """The notes that are made within."""
    notes: list[str] = []
    token = _open.set(notes)
    try:
        yield notes
    finally:
        _open.reset(token)
