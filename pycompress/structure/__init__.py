"""Smaller dense models: without the neurons, heads, channels and blocks that are needed least."""

from pycompress.structure.calls import shrunk
from pycompress.structure.cut import Cut
from pycompress.structure.fisher import fisher
from pycompress.structure.shrinking import shrink

__all__ = ["Cut", "fisher", "shrink", "shrunk"]
