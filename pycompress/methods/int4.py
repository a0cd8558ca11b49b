"""Int4: 4-bit weights with a scale and a zero point per group, calibrated by GPTQ (Frantar et al. 2022, arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from pycompress.methods import gptq, groups
from pycompress.methods.groups import LARGEST_SCALE, SMALLEST_SCALE, SYMMETRIC_ZERO_POINT, Rounded
from pycompress.methods.inputs import InputStatistics, Metric
from pycompress.methods.weight import Expected, check_tensors, finite_matrix, matrix_shape

GROUPS = (32, 64, 128)
ACTIVATION_BITS = (8, 16)


@dataclass(frozen=True, repr=False)
class Int4:
    """4-bit weights, a scale and a zero point for each group of them, and 8-bit activations, quantized as the model runs.

    Without inputs, a group's range is clipped where that lowers its squared error. With the inputs that calibration saw, rounding
    errors are made to cancel in the outputs (GPTQ), which is worth more than small groups or zero points.

    Args:
        group: 32 (default), 64 or 128 consecutive input features share a scale: 4.6, 4.3 or 4.2 bits a weight, zero points
            included.
        symmetric: leave out the zero points: every group's zero is the integer 8.
        activation_bits: 8 (default): each row of the input is quantized; 16: it stays in floating point ("weight only").
        inputs: what the layer's inputs look like; ``compress(..., calibration=...)`` sets it for each layer.
    Raises:
        TypeError: inputs of another type. ValueError: another value.
    """

    name: ClassVar[str] = "int4"

    group: int = 32
    symmetric: bool = False
    activation_bits: int = 8
    inputs: InputStatistics | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_options("Int4", self.group, self.symmetric, self.activation_bits)
        if self.inputs is not None and not isinstance(self.inputs, InputStatistics):
            raise TypeError(f"Int4: inputs is {type(self.inputs).__name__}, expected InputStatistics or None")

    def __repr__(self) -> str:
        shown = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Int4({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def with_inputs(self, statistics: InputStatistics) -> Int4:
        """The method for the layer that met these inputs."""
        return replace(self, inputs=statistics)

    def compress(self, weight: Tensor) -> Int4Weight:
        """The weight of a linear layer, rounded.

        Args:
            weight: floating point [n, k], 1 <= k <= 65536, on any device; the result lies on the CPU.
        Raises:
            TypeError: not a floating-point matrix. ValueError: NaN or Inf, the meta device, a shape that is empty or too large,
            inputs of another size.
        """
        w = finite_matrix("Int4", weight)
        moment = self._moment(w.shape[1])
        if moment is not None:
            found = gptq.rounded(w, moment, self.group, symmetric=self.symmetric)
            if found is not None:
                return self._closer(w, found, moment)
        return self._weight(groups.rounded(w, self.group, symmetric=self.symmetric, search=True), w.shape[1])

    def _moment(self, k: int) -> Tensor | None:
        if self.inputs is None:
            return None
        moment = self.inputs.second_moment
        if moment is None:
            raise ValueError("Int4: inputs are those of an embedding, expected a second moment")
        if len(moment) != k:
            raise ValueError(f"Int4: inputs are {len(moment)} features wide, the weight has k = {k}")
        return moment

    def _closer(self, w: Tensor, found: Rounded, moment: Tensor) -> Int4Weight:
        """Of each row, what was found, or plain rounding where that changes the outputs less."""
        plain = groups.rounded(w, self.group, symmetric=self.symmetric, search=False)
        metric, k = Metric(moment), w.shape[1]
        lost = [metric.squares((self._weight(r, k).decompress() - w).double()) for r in (found, plain)]
        rows = (lost[0] <= lost[1])[:, None]
        chosen = (torch.where(rows, own, other) for own, other in zip(found, plain, strict=True))
        return self._weight(Rounded(*chosen), k)

    def _weight(self, rounded: Rounded, k: int) -> Int4Weight:
        zero_point = None if self.symmetric else pack_nibbles(rounded.zero_point)
        packed = pack_nibbles(rounded.integers)
        return Int4Weight(packed, rounded.scale, zero_point, k, self.group, self.activation_bits)


def _check_options(kind: str, group: object, symmetric: object, activation_bits: object) -> None:
    if type(group) is not int or group not in GROUPS:
        raise ValueError(f"{kind}: group is {group!r}, expected one of {', '.join(map(str, GROUPS))}")
    if type(symmetric) is not bool:
        raise ValueError(f"{kind}: symmetric is {symmetric!r}, expected True or False")
    if type(activation_bits) is not int or activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"{kind}: activation_bits is {activation_bits!r}, expected 8 or 16")


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 [n, k] of integers 0 to 15 -> uint8 [n, ceil(k / 2)], two a byte: the earlier one in the low half."""
    pairs = pad(values, (0, values.shape[1] % 2)).view(len(values), -1, 2)
    return pairs[:, :, 0] | (pairs[:, :, 1] << 4)


def unpack_nibbles(packed: Tensor, k: int) -> Tensor:
    """The inverse of :func:`pack_nibbles`: uint8 [n, ceil(k / 2)] -> uint8 [n, k]."""
    return torch.stack([packed & 15, packed >> 4], dim=2).view(len(packed), -1)[:, :k]


@dataclass(frozen=True, eq=False, repr=False)
class Int4Weight:
    """The canonical int4 weight: what is saved, exported and compared; independent of any processor.

    weight[n, k] = (value[n, k] - zero_point[n, g]) * scale[n, g] with g = k // group: exact in float32.

    Attributes:
        values: uint8 [n, ceil(k / 2)]: integers 0 to 15, two a byte, the one at the even position in the low half; the half behind
            an odd k is 0.
        scale: bfloat16 [n, groups], groups = ceil(k / group), the last one may be short; normal, at most 2^124.
        zero_point: uint8 [n, ceil(groups / 2)]: integers 0 to 15, packed as the values are; None where symmetric: all are 8.
        k: in_features, 1 to 65536.
        group: 32, 64 or 128.
        activation_bits: 8 where the layer quantizes its input, per row; 16 where it leaves it in floating point.
    Raises:
        ValueError: a field that breaks these rules.
    """

    name: ClassVar[str] = "int4"

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    k: int
    group: int
    activation_bits: int

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.values.dim() != 2:
            raise ValueError(f"{kind}: values is {list(self.values.shape)}, expected uint8 [n, ceil(k / 2)]")
        check_tensors(kind, self.tensors(), self.expected(self.shape, self.settings()))
        for name, tensor in self.tensors().items():
            if tensor.device.type != "cpu":
                raise ValueError(f"{kind}: {name} is on {tensor.device}, expected the CPU")
        for name, packed, count in (("values", self.values, self.k), ("zero_point", self.zero_point, self.groups)):
            if packed is not None and count % 2 and bool((packed[:, -1] > 15).any()):
                raise ValueError(f"{kind}: {name} has bits set behind the last of {count} integers, expected zeros")
        scale = self.scale.to(torch.float32)
        if not bool(((scale >= SMALLEST_SCALE) & (scale <= LARGEST_SCALE)).all()):
            raise ValueError(f"{kind}: a scale is not between {SMALLEST_SCALE:g} and {LARGEST_SCALE:g}, as expected")

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.k

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None

    @property
    def groups(self) -> int:
        """How many a row has."""
        return -(-self.k // self.group)

    def __repr__(self) -> str:
        rest = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"Int4Weight(shape={list(self.shape)}, {rest})"

    def integers(self) -> Tensor:
        """The values one by one: uint8 [n, k]."""
        return unpack_nibbles(self.values, self.k)

    def zero_points(self) -> Tensor:
        """uint8 [n, groups], of symmetric weights too."""
        if self.zero_point is None:
            return torch.full(self.scale.shape, SYMMETRIC_ZERO_POINT, dtype=torch.uint8)
        return unpack_nibbles(self.zero_point, self.groups)

    def decompress(self) -> Tensor:
        """float32 [n, k]."""
        steps = self.integers().to(torch.float32) - self._spread(self.zero_points())
        return steps.mul_(self._spread(self.scale))

    def _spread(self, of_groups: Tensor) -> Tensor:
        """[n, groups] -> float32 [n, k]."""
        return of_groups.to(torch.float32).repeat_interleave(self.group, dim=1)[:, : self.k]

    # --- stored form ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names that it has below the layer's."""
        stored = {"weight": self.values, "group_scale": self.scale}
        return stored if self.zero_point is None else {**stored, "group_zero_point": self.zero_point}

    def settings(self) -> dict[str, int | bool]:
        """The rest, for JSON."""
        return {"group": self.group, "symmetric": self.symmetric, "activation_bits": self.activation_bits}

    @classmethod
    def expected(cls, shape: tuple[int, int], settings: Mapping[str, object]) -> Expected:
        """Shape and dtype of each of the :meth:`tensors` of a weight [n, k] with these settings; allocates nothing.

        Raises:
            ValueError: a setting that is missing, unknown or out of range, or an impossible shape.
        """
        n, k = matrix_shape(cls.__name__, shape)
        group, symmetric, bits = (settings.get(name) for name in _SETTINGS)
        _check_options(cls.__name__, group, symmetric, bits)
        if len(settings) != len(_SETTINGS):
            raise ValueError(f"{cls.__name__}: the settings are {list(settings)}, expected {list(_SETTINGS)}")
        assert isinstance(group, int)
        groups = -(-k // group)
        stored: Expected = {"weight": ((n, -(-k // 2)), torch.uint8), "group_scale": ((n, groups), torch.bfloat16)}
        return stored if symmetric else {**stored, "group_zero_point": ((n, -(-groups // 2)), torch.uint8)}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], settings: Mapping[str, object]
    ) -> Int4Weight:
        """The inverse of :meth:`tensors` and :meth:`settings`. Raises ValueError where anything does not fit."""
        check_tensors(cls.__name__, tensors, cls.expected(shape, settings))
        group, bits = settings["group"], settings["activation_bits"]
        assert isinstance(group, int) and isinstance(bits, int)  # noqa: PT018
        return cls(tensors["weight"], tensors["group_scale"], tensors.get("group_zero_point"), shape[1], group, bits)


_SETTINGS = ("group", "symmetric", "activation_bits")
