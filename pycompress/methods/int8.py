"""Int8: symmetric weights per output channel, asymmetric activations per row (Jacob et al. 2018, arXiv:1712.05877).

Activations are quantized per row ("per token", as in ZeroQuant, Yao et al. 2022, arXiv:2206.01861) inside the kernel, or not at
all, so there is nothing to calibrate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycompress.methods.weight import Expected, check_tensors

# For 8-bit activations the root mean square of a row's integers, as a share of the largest one, is at most this: 34 of 127.
# Rows with a heavy tail lie below it anyway; a row that fills its range evenly would get steps finer than the others', which
# buys little (its rounding error stays at 1 / (34 sqrt 12) = 0.8 % of its rms) and costs much: with larger integers most pairs
# of weights exceed the 16-bit lane budget (csrc/int8/pack.h), and the product takes 1.4 times as long on AVX2. 7-bit
# activations leave room for any weights, and activations in floating point need none. benchmarks/NOTES.md has the figures.
LARGEST_RMS = 34 / 127

_BITS = {"activation_bits": (7, 8, 16), "weight_bits": (7, 8)}


def _check_bits(kind: str, name: str, bits: object) -> None:
    if type(bits) is not int or bits not in _BITS[name]:
        *most, last = _BITS[name]
        raise ValueError(f"{kind}: {name} is {bits!r}, expected {', '.join(map(str, most))} or {last}")


@dataclass(frozen=True)
class Int8:
    """int8 weights and 8- or 7-bit activations, quantized as the model runs; or int8 weights alone.

    Args:
        activation_bits: 8 (default) or 7. Seven bits leave the AVX2 kernels twice the room in their 16-bit lanes, which makes
            them faster there; processors with VNNI run both at the same speed. README has both, measured. 16: activations stay in
            floating point ("weight only"), for few rows, where a layer costs what its weights cost to read.
        weight_bits: 8 (default: integers in [-127, 127]) or 7 ([-63, 63]).
    Raises:
        ValueError: another number of bits.
    """

    name: ClassVar[str] = "int8"

    activation_bits: int = 8
    weight_bits: int = 8

    def __post_init__(self) -> None:
        for field in _BITS:
            _check_bits("Int8", field, getattr(self, field))

    def compress(self, weight: Tensor) -> Int8Weight:
        """Rounds each row to integers, half to even, with scale max|row| / wmax; for 8-bit activations the scale is at least
        rms(row) / LARGEST_RMS / wmax.

        Args:
            weight: floating point [n, k], on any device; the result lies on the CPU.
        Raises:
            TypeError: not a floating-point matrix. ValueError: it holds NaN or Inf, or is on the meta device.
        """
        if weight.dim() != 2 or not weight.is_floating_point():
            raise TypeError(f"Int8: the weight is {weight.dtype} {list(weight.shape)}, expected floating point [n, k]")
        if weight.is_meta:
            raise ValueError(f"Int8: the weight {list(weight.shape)} is on the meta device, expected one with data")
        w = weight.detach().to("cpu", torch.float32)
        if not torch.isfinite(w).all():
            bad = int((~torch.isfinite(w)).sum())
            raise ValueError(f"Int8: the weight {list(w.shape)} holds {bad} NaN or Inf, expected finite values")
        top = 2 ** (self.weight_bits - 1) - 1
        if w.shape[1] == 0:
            return Int8Weight(w.to(torch.int8), torch.ones(w.shape[0]), self.activation_bits, self.weight_bits)
        reach = w.abs().amax(dim=1)
        if self.activation_bits == 8:
            reach = torch.maximum(reach, _rms(w) / LARGEST_RMS)
        scale = reach.clamp_(max=torch.finfo(torch.float32).max) / top
        # A row of zeros, or so small that its scale is not a normal float: any scale gives zeros; 1 keeps it valid.
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
        values = (w / scale[:, None]).round_().clamp_(-top, top).to(torch.int8)
        return Int8Weight(values, scale, self.activation_bits, self.weight_bits)


def _rms(w: Tensor) -> Tensor:
    """Root mean square per row, without overflow or underflow: float32 [n]."""
    norm: Tensor = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)
    return (norm / math.sqrt(w.shape[1])).to(torch.float32)


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """The canonical int8 weight: what is saved, exported and compared; independent of any processor.

    Attributes:
        values: int8 [n, k], in [-wmax, wmax] with wmax = 127 (8 bits) or 63 (7 bits).
        scale: float32 [n], positive and finite: weight[n, k] = values[n, k] * scale[n].
        activation_bits: 7 or 8, the range in which the layer quantizes its input; 16 where it leaves it in floating point.
        weight_bits: 7 or 8.
    Raises:
        ValueError: a field that breaks these rules.
    """

    name: ClassVar[str] = "int8"

    values: Tensor
    scale: Tensor
    activation_bits: int
    weight_bits: int

    def __post_init__(self) -> None:
        Int8(self.activation_bits, self.weight_bits)  # checks the bits
        values, scale, top = self.values, self.scale, 2 ** (self.weight_bits - 1) - 1
        if values.dtype != torch.int8 or values.dim() != 2:
            raise ValueError(f"Int8Weight: values is {values.dtype} {list(values.shape)}, expected int8 [n, k]")
        if scale.dtype != torch.float32 or scale.shape != values.shape[:1]:
            raise ValueError(
                f"Int8Weight: scale is {scale.dtype} {list(scale.shape)}, expected float32 [{values.shape[0]}]"
            )
        if (values.numel() and int(values.amax()) > top) or (values.numel() and int(values.amin()) < -top):
            low, high = int(values.amin()), int(values.amax())
            raise ValueError(f"Int8Weight: values lie in [{low}, {high}], expected [-{top}, {top}]")
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise ValueError("Int8Weight: a scale is not a positive finite number")

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def decompress(self) -> Tensor:
        """float32 [n, k]."""
        return self.values.to(torch.float32) * self.scale[:, None]

    # --- stored form ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names that it has below the layer's."""
        return {"weight": self.values, "weight_scale": self.scale}

    def settings(self) -> dict[str, int]:
        """The rest, for JSON."""
        return {"activation_bits": self.activation_bits, "weight_bits": self.weight_bits}

    @classmethod
    def expected(cls, shape: tuple[int, int], settings: Mapping[str, object]) -> Expected:
        """Shape and dtype of each of the :meth:`tensors` of a weight [n, k] with these settings; allocates nothing.

        Raises:
            ValueError: a setting that is missing, unknown or out of range.
        """
        for name in _BITS:
            _check_bits("Int8Weight", name, settings.get(name))
        if len(settings) != len(_BITS):
            raise ValueError(f"Int8Weight: the settings are {list(settings)}, expected {list(_BITS)}")
        return {"weight": (tuple(shape), torch.int8), "weight_scale": ((shape[0],), torch.float32)}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], settings: Mapping[str, object]
    ) -> Int8Weight:
        """The inverse of :meth:`tensors` and :meth:`settings`. Raises ValueError where anything does not fit."""
        check_tensors(cls.__name__, tensors, cls.expected(shape, settings))
        activation_bits, weight_bits = settings["activation_bits"], settings["weight_bits"]
        assert isinstance(activation_bits, int) and isinstance(weight_bits, int)  # noqa: PT018
        return cls(tensors["weight"], tensors["weight_scale"], activation_bits, weight_bits)
