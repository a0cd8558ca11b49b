"""What the commands print to."""

from __future__ import annotations

import sys

from rich.console import Console

WIDTH = 130  # of tables in a file or a pipe


def console(*, stderr: bool = False) -> Console:
    """Of the process's own stream, which may be None or of another kind."""
    is_terminal = getattr(sys.stderr if stderr else sys.stdout, "isatty", lambda: False)
    return Console(stderr=stderr, width=None if is_terminal() else WIDTH, highlight=False)
