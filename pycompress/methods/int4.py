"""Int4: 4-bit weights with a scale and a zero point per group, calibrated by GPTQ (Frantar et al. 2022, arXiv:2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from pycompress.methods import gptq, groups
from pycompress.methods.groups import Grid, Rounded
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.int8 import Int8
from pycompress.methods.method import finite_matrix
from pycompress.weights.int4 import Int4Weight, pack_nibbles


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
        for option in Int4Weight.options:
            option.check("Int4", getattr(self, option.name))
        if self.inputs is not None and not isinstance(self.inputs, InputStatistics):
            raise TypeError(f"Int4: inputs is {type(self.inputs).__name__}, expected InputStatistics or None")

    def __repr__(self) -> str:
        shown = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Int4({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def with_inputs(self, statistics: InputStatistics) -> Int4:
        """The method for the layer that met these inputs."""
        return replace(self, inputs=statistics)

    def at(self, strength: float, shape: tuple[int, int]) -> Int4 | Int8:  # noqa: ARG002 - others need it
        """The milder method on the way to this one: 8 bits in the first half, then 7, at 1 these."""
        return self if strength >= 1 else Int8(self.activation_bits, weight_bits=8 if strength < 0.5 else 7)

    def compress(self, weight: Tensor) -> Int4Weight:
        """The weight of a linear layer, rounded.

        Args:
            weight: floating point [n, k], 1 <= k <= 65536, on any device; the result lies on the CPU.
        Raises:
            TypeError: not a floating-point matrix. ValueError: NaN or Inf, the meta device, a shape that is empty or too large,
            inputs of another size.
        """
        w = finite_matrix("Int4", weight)
        k = w.shape[1]
        if self.inputs is not None:
            found = self._by_inputs(w, self.inputs.moment("Int4", k))
            if found is not None:
                return self._weight(found, k)
        return self._weight(groups.rounded(w, self.group, symmetric=self.symmetric, search=True), k)

    def _by_inputs(self, w: Tensor, moment: Tensor) -> Rounded | None:
        """Of each row, what GPTQ finds, or plain rounding where that changes the outputs less; None where inputs say nothing."""
        grid = groups.rounded(w, self.group, symmetric=self.symmetric, search=True)
        scale, zeros = grid.scale.float(), grid.zero_point.float()
        steps = gptq.rounded(w, moment, scale, self.group, lambda x, g: Grid(scale[:, g], zeros[:, g]).steps(x))
        if steps is None:
            return None
        integers = steps + zeros.repeat_interleave(self.group, dim=1)[:, : w.shape[1]]
        found = Rounded(integers.to(torch.uint8), grid.scale, grid.zero_point)
        plain = groups.rounded(w, self.group, symmetric=self.symmetric, search=False)
        dense, otherwise = (self._weight(r, w.shape[1]).decompress() for r in (found, plain))
        rows = gptq.closer(w, dense, otherwise, moment)[:, None]
        return Rounded(*(torch.where(rows, own, other) for own, other in zip(found, plain, strict=True)))

    def _weight(self, rounded: Rounded, k: int) -> Int4Weight:
        zero_point = None if self.symmetric else pack_nibbles(rounded.zero_point)
        packed = pack_nibbles(rounded.integers)
        return Int4Weight(packed, rounded.scale, zero_point, k, self.group, self.activation_bits)
