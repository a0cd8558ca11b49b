"""Whether a layer rounds its inputs row by row: the one thing that targets which only know compressed weights leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pycompress.nn import CompressedLayer

NOT_ROUNDED = "inputs are not rounded"


def rounds_rows(layer: CompressedLayer, *, static: bool = False) -> bool:
    """Whether it, or what stands beside its factors, does so; and ``static``: or by a range that is known before."""
    return not layer.kind.tokens and _rounds(layer.settings, static)


def _rounds(settings: Mapping[str, Any], static: bool) -> bool:
    own = settings.get("activation_bits") in (7, 8) and (static or not settings.get("static"))
    return own or ("residual" in settings and _rounds(settings["residual"], static))
