"""How the twin is compiled.

numba knows a cached function by the time of its file: a compiled function calls none of another file.
"""

from __future__ import annotations

from typing import Any

from numba import njit


def jit(function: Any) -> Any:
    """Compiled once and cached beside the package or in the user's home; where neither can be written, compiled anew."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:
        return njit(function)
