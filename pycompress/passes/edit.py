"""``Edit``: what a pass wants done to one layer of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from pycompress.plan import Target


@dataclass(frozen=True)
class Edit:
    """Changes a target before it is compressed.

    Attributes:
        activation: what its kernel applies behind the product.
        emptied: names of the modules that do so now, and become ``nn.Identity``.
    """

    target: Target
    activation: str = "none"
    emptied: list[str] = field(default_factory=list)

    def apply(self) -> None:
        self.target.record.activation = self.activation
        self.target.fused = self.emptied
