"""``Conv2dGeometry``: which inputs meet which weights in a convolution; what a Conv2d is besides weight and bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from pycompress.ops import MAX_STEP


@dataclass(frozen=True)
class Conv2dGeometry:
    """The arguments of an ``nn.Conv2d`` with one group and zeros around its input.

    Attributes:
        in_channels: from 1.
        kernel_size, stride, dilation: (height, width), from 1 to ``ops.MAX_STEP``.
        padding: (height, width), from 0, on either side; ``valid``: none; ``same``: so much that the output is as large as the
            input, an odd rest at the bottom and at the right (needs stride 1).
    Raises:
        ValueError: anything else.
    """

    in_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if type(self.in_channels) is not int or self.in_channels < 1:
            raise ValueError(f"Conv2dGeometry: in_channels is {self.in_channels!r}, expected a number from 1")
        for name in ("kernel_size", "stride", "dilation"):
            if not _is_pair(value := getattr(self, name), 1):
                raise ValueError(f"Conv2dGeometry: {name} is {value!r}, expected two numbers from 1 to {MAX_STEP}")
        if self.padding not in ("same", "valid") and not _is_pair(self.padding, 0):
            raise ValueError(
                f"Conv2dGeometry: padding is {self.padding!r}, expected two numbers from 0 to {MAX_STEP}, 'same' or 'valid'"
            )
        if self.padding == "same" and self.stride != (1, 1):
            raise ValueError(f"Conv2dGeometry: stride is {self.stride}, expected (1, 1) for padding 'same'")

    @property
    def in_features(self) -> int:
        """k: how many inputs an output is made of."""
        return self.in_channels * self.kernel_size[0] * self.kernel_size[1]

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """Rows and columns of zeros at the top, bottom, left and right of the input."""
        if not isinstance(self.padding, str):
            (height, width) = self.padding
            return height, height, width, width
        if self.padding == "valid":
            return 0, 0, 0, 0
        height, width = (step * (size - 1) for step, size in zip(self.dilation, self.kernel_size, strict=True))
        return height // 2, height - height // 2, width // 2, width - width // 2

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    # --- stored form ----------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, list[int] | str]:
        """For JSON: everything but in_channels, which the weight [n, k] knows."""
        values = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: value if isinstance(value, str) else list(value) for name, value in values.items()}

    @classmethod
    def from_settings(cls, k: int, settings: Mapping[str, object]) -> Conv2dGeometry:
        """The inverse of :meth:`settings` for a weight [n, k]. Raises ValueError where anything does not fit."""
        names = [field.name for field in fields(cls)[1:]]
        if set(settings) != set(names):
            raise ValueError(f"Conv2dGeometry: the settings are {list(settings)}, expected {names}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        geometry = cls(1, **values)  # type: ignore[arg-type]
        height, width = geometry.kernel_size
        if k % (height * width):
            raise ValueError(f"Conv2dGeometry: kernel_size is {geometry.kernel_size}, expected a divisor of k = {k}")
        return replace(geometry, in_channels=k // (height * width))


def _is_pair(value: object, smallest: int) -> bool:
    """Two whole numbers from ``smallest`` to MAX_STEP."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    return all(type(size) is int and smallest <= size <= MAX_STEP for size in value)
