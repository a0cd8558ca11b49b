"""``Edit``: what a pass wants done to one layer of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pycompress.plan import Target


@dataclass(frozen=True)
class Edit:
    """Changes a target before it is compressed.

    Attributes:
        activation: what its kernel applies behind the product.
        emptied: the module that does so now, and becomes an ``nn.Identity``.
    """

    target: Target
    activation: str = "none"
    emptied: nn.Module | None = None

    def apply(self) -> None:
        self.target.record.activation = self.activation
        self.target.fused = self.emptied
