"""Which compression for which layer: sensitivity, measured costs, machines, and the front of plans."""

from pycompress.search.front import Cost, Front, Point, Shape
from pycompress.search.machine import DoesNotFit, Machine
from pycompress.search.profile import profile
from pycompress.search.search import search
from pycompress.search.sensitivity import Loss, Sensitivity, sensitivity

__all__ = [
    "Cost", "DoesNotFit", "Front", "Loss", "Machine", "Point", "Sensitivity", "Shape", "profile", "search", "sensitivity",
]  # fmt: skip
