"""``nn.Linear``."""

from __future__ import annotations

from torch import nn

from pycompress.kinds.kind import Kind


class Linear(Kind):
    """Rows of k features, and a matrix [n, k] as it is."""

    name, dense = "linear", nn.Linear
    phrase, plural = "a linear layer", "linear layers"
