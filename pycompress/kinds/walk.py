"""How a convolution goes over its input: what its geometry says, in however many dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from pycompress.kinds.padded import Sides, last_first
from pycompress.ops import MAX_STEP

if TYPE_CHECKING:
    from typing_extensions import Self

MODES = ("zeros", "reflect", "replicate", "circular")
_COUNTS = {1: "one number", 2: "two numbers", 4: "four numbers"}
_LATER = ("groups", "around", "padding_mode")  # what files and texts did not know in the beginning


class Walk:
    """What a geometry has in common with those of other dimensions; a subclass is a frozen dataclass with these fields.

    Attributes:
        dims: how many dimensions an image has.
        in_channels: from 1.
        kernel_size, stride, dilation: a number for each dimension, from 1 to ``ops.MAX_STEP``.
        padding: a number for each dimension, from 0, on either side; ``valid``: none; ``same``: so much that the output is as large
            as the input, an odd rest behind it (needs stride 1).
        groups: from 1, a divisor of in_channels.
        around: before and behind each dimension, from 0: zeros besides, of a padding module whose place the layer has, too. Only
            where the padding is zeros.
        padding_mode: ``zeros``, or ``reflect``, ``replicate`` or ``circular``, as ``torch.nn.functional.pad`` has them.
    Raises:
        ValueError: anything else.
    """

    dims: ClassVar[int]
    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    around: Sides
    padding_mode: str

    def __post_init__(self) -> None:
        def check(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}, expected {expected}")

        for name in ("groups", "in_channels"):
            value = getattr(self, name)
            check(name, type(value) is int and value >= 1, "a number from 1")
        check("groups", self.in_channels % self.groups == 0, f"a divisor of in_channels = {self.in_channels}")
        count, of = self.dims, _COUNTS[self.dims]
        for name in ("kernel_size", "stride", "dilation"):
            check(name, _are_sizes(getattr(self, name), count, 1), f"{of} from 1 to {MAX_STEP}")
        by_number = _are_sizes(self.padding, count, 0)
        check(
            "padding", self.padding in ("same", "valid") or by_number, f"{of} from 0 to {MAX_STEP}, 'same' or 'valid'"
        )
        check("padding_mode", self.padding_mode in MODES, f"one of {', '.join(MODES)}")
        check("around", _are_sizes(self.around, 2 * count, 0), f"{_COUNTS[2 * count]} from 0 to {MAX_STEP}")
        check(
            "around", not any(self.around) or self.padding_mode == "zeros", f"no zeros: the mode is {self.padding_mode}"
        )
        ones = (1,) * count
        check("stride", self.padding != "same" or self.stride == ones, f"{ones} for padding 'same'")

    @property
    def in_features(self) -> int:
        """k: how many inputs an output is made of."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def _own(self) -> Sides:
        """The sides of its own padding, whatever its mode."""
        if self.padding == "valid":
            return (0, 0) * self.dims
        if not isinstance(self.padding, str):
            return tuple(size for size in self.padding for _ in range(2))
        totals = (step * (size - 1) for step, size in zip(self.dilation, self.kernel_size, strict=True))
        return tuple(side for total in totals for side in (total // 2, total - total // 2))

    @property
    def sides(self) -> Sides:
        """How many zeros lie before and behind each dimension of the input, of an image at the top, bottom, left and right."""
        if self.padding_mode != "zeros":
            return self.around
        if not any(self.around):
            return self._own
        return tuple(own + other for own, other in zip(self._own, self.around, strict=True))

    @property
    def repeated(self) -> Sides:
        """How much lies there that repeats the input's own values (:meth:`filled`)."""
        return (0, 0) * self.dims if self.padding_mode == "zeros" else self._own

    @property
    def margins(self) -> Sides:
        """Both together."""
        return tuple(zeros + other for zeros, other in zip(self.sides, self.repeated, strict=True))

    @property
    def plane(self) -> tuple[Sides, Sides, Sides, Sides]:
        """Kernel size, stride, sides and dilation of the same in two dimensions, which the ops know: a sequence is an image one
        high (:meth:`as_image`)."""
        if self.dims == 2:
            return self.kernel_size, self.stride, self.sides, self.dilation
        return (1, *self.kernel_size), (1, *self.stride), (0, 0, *self.sides), (1, *self.dilation)

    def as_image(self, x: Tensor) -> Tensor:
        """[..., channels, *sizes] -> [..., channels, height, width]."""
        return x if self.dims == 2 else x.unsqueeze(-2)

    def from_image(self, y: Tensor) -> Tensor:
        """The inverse of :meth:`as_image`."""
        return y if self.dims == 2 else y.squeeze(-2)

    def filled(self, x: Tensor) -> Tensor:
        """x [..., channels, *sizes] with what repeats its own values around it, in the same memory format; as it is where zeros
        are padded. Raises RuntimeError where x is too small for that."""
        if self.padding_mode == "zeros" or not any(self.repeated):
            return x
        wide = pad(x, last_first(self.repeated), self.padding_mode)
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return wide.contiguous(memory_format=torch.channels_last) if last else wide

    def positions(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of the result for an input of these sizes, which may be torch's symbols."""
        wide = (size + sum(self.margins[2 * at : 2 * at + 2]) for at, size in enumerate(sizes))
        steps = zip(wide, self.kernel_size, self.dilation, self.stride, strict=True)
        return tuple((size - step * (kernel - 1) - 1) // stride + 1 for size, kernel, step, stride in steps)

    def arguments(self) -> dict[str, Any]:
        """What a dense module has of it, by name."""
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in names if name != "around"}

    def _shown(self) -> dict[str, Any]:
        """The values by name; of those that came later only what is not as it always was before."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        usual = _defaults(type(self))
        return {name: value for name, value in values.items() if name not in _LATER or value != usual[name]}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._shown().items())

    # --- stored form ----------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """For JSON: everything but in_channels, which the weight [n, k] knows."""
        values = {name: value for name, value in self._shown().items() if name != "in_channels"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_settings(cls, k: int, settings: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`settings` for a weight [n, k]. Raises ValueError where anything does not fit."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
        }
        usual = _defaults(cls)
        names = [
            field.name
            for field in fields(cls)[1:]  # type: ignore[arg-type]
            if field.name not in _LATER or values.get(field.name, usual[field.name]) != usual[field.name]
        ]
        if set(settings) != set(names):
            raise ValueError(f"{cls.__name__}: the settings are {list(settings)}, expected {names}")
        geometry = cls(values.get("groups", 1), **values)  # type: ignore[call-arg]
        size = math.prod(geometry.kernel_size)
        if k % size:
            raise ValueError(f"{cls.__name__}: kernel_size is {geometry.kernel_size}, expected a divisor of k = {k}")
        return replace(geometry, in_channels=k // size * geometry.groups)  # type: ignore[type-var]


def _defaults(geometry: type[Walk]) -> dict[str, Any]:
    return {field.name: field.default for field in fields(geometry)}  # type: ignore[arg-type]


def _are_sizes(value: object, count: int, smallest: int) -> bool:
    """So many whole numbers from ``smallest`` to MAX_STEP."""
    if not isinstance(value, tuple) or len(value) != count:
        return False
    return all(type(size) is int and smallest <= size <= MAX_STEP for size in value)
