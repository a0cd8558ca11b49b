"""What the commands print to."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from rich.console import Console

WIDTH = 130  # of tables in a file or a pipe


def console(*, stderr: bool = False) -> Console:
    """Of the process's own stream, which may be None or of another kind."""
    is_terminal = getattr(sys.stderr if stderr else sys.stdout, "isatty", lambda: False)
    return Console(stderr=stderr, width=None if is_terminal() else WIDTH, highlight=False)


def json_text(value: Any) -> str:
    """JSON, which has no numbers that are not finite: null."""
    return json.dumps(_finite(value), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
