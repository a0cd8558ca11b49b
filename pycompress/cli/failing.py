"""What an error of the package is on the command line: wrong usage (exit code 2), or a failure (1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def reading() -> Iterator[None]:
    """In the block what was given is read, and found to fit: whatever is wrong with that is wrong usage."""
    with working():
        try:
            yield
        except (ValueError, TypeError, NotImplementedError, OSError) as error:
            raise click.UsageError(str(error)) from error


@contextmanager
def working() -> Iterator[None]:
    """In the block an error is a failure."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, MemoryError, OSError) as error:
        raise click.ClickException(str(error) or type(error).__name__) from error
