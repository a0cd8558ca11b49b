"""Int8: symmetric weights per output channel, asymmetric activations per row (Jacob et al. 2018, arXiv:1712.05877), calibrated by
GPTQ (Frantar et al. 2022, arXiv:2210.17323).

Activations are quantized per row ("per token", as in ZeroQuant, Yao et al. 2022, arXiv:2206.01861) inside the kernel, or not at
all, so that inputs change how weights are rounded, and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from pycompress.methods import gptq
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.method import finite_matrix
from pycompress.profiles import DEFAULT, Profile, profile
from pycompress.weights.int8 import Int8Weight


@dataclass(frozen=True, repr=False)
class Int8:
    """int8 weights and 8- or 7-bit activations, quantized as the model runs; or int8 weights alone.

    Args:
        activation_bits: 8 (default) or 7. Seven bits leave the AVX2 kernels twice the room in their 16-bit lanes, which makes
            them faster there; processors with VNNI run both at the same speed. README has both, measured. 16: activations stay in
            floating point ("weight only"), for few rows, where a layer costs what its weights cost to read.
        weight_bits: 8 (default: integers in [-127, 127]) or 7 ([-63, 63]).
        fit: for 8-bit activations, the profile whose kernels the range of a row is chosen for (:mod:`pycompress.profiles`):
            ``avx2`` (default), ``none`` (each row takes the whole range of integers) or one of your own. Embeddings of
            all-MiniLM-L6-v2 over 512 sentences have a mean cosine to the float32 ones of 0.99896 with ``avx2`` (least 0.9978) and
            of 0.99898 with ``none`` (least 0.9979), whose products take up to 1.4 times as long on AVX2: hence the default.
        embeddings: take embeddings too, with a scale for each row; no activations are quantized there.
        inputs: what the layer's inputs look like; ``compress(..., calibration=...)`` sets it for each layer. Rounding errors are
            made to cancel in the outputs then (GPTQ); the scales stay as they are.
    Raises:
        TypeError: inputs of another type. ValueError: another number of bits, or a profile that is none.
    """

    name: ClassVar[str] = "int8"

    activation_bits: int = 8
    weight_bits: int = 8
    fit: str | Profile = field(default=DEFAULT, kw_only=True)
    embeddings: bool = field(default=False, kw_only=True)
    inputs: InputStatistics | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for option in Int8Weight.options:
            if option.name != "static":  # which stands in `activation`
                option.check("Int8", getattr(self, option.name))
        profile("Int8", "fit", self.fit)
        if self.inputs is not None and not isinstance(self.inputs, InputStatistics):
            raise TypeError(f"Int8: inputs is {type(self.inputs).__name__}, expected InputStatistics or None")

    def __repr__(self) -> str:
        fit = "" if self.fit == DEFAULT else f", fit={self.fit!r}"
        embeddings = ", embeddings=True" if self.embeddings else ""
        inputs = "" if self.inputs is None else f", inputs={self.inputs!r}"
        return f"Int8(activation_bits={self.activation_bits}, weight_bits={self.weight_bits}{fit}{embeddings}{inputs})"

    def refuses(self, kind: str) -> str:
        """Why it does not take layers of a kind, ``Linear``, ``Conv2d`` or ``Embedding``, for the sake of its options; or ''."""
        return "Int8 takes embeddings with embeddings=True only" if kind == "Embedding" and not self.embeddings else ""

    def for_embedding(self) -> Int8:
        """The method for an embedding: rows are chosen, and multiply nothing."""
        return replace(self, activation_bits=16, inputs=None)

    def for_convolution(self, shape: tuple[int, int, int, int], stride: tuple[int, int]) -> Int8:  # noqa: ARG002
        """The method for a convolution; where a channel is convolved alone, no kernel gains by a profile's range."""
        return replace(self, fit="none") if shape[1] == 1 else self

    def with_inputs(self, statistics: InputStatistics) -> Int8:
        """The method for the layer that met these inputs."""
        return replace(self, inputs=statistics)

    def at(self, strength: float, shape: tuple[int, int]) -> Int8:  # noqa: ARG002 - others need it
        """The milder method on the way to this one: 8 bits as long as ``strength`` is below 1."""
        return self if strength >= 1 else replace(self, weight_bits=8)

    def compress(self, weight: Tensor) -> Int8Weight:
        """Rounds each row to integers, half to even, with scale max|row| / wmax; for 8-bit activations the scale is at least
        rms(row) / largest_rms / wmax, by the profile. With inputs, a row is rounded by GPTQ where that changes the outputs less.

        Args:
            weight: floating point [n, k], on any device; the result lies on the CPU.
        Raises:
            TypeError: not a floating-point matrix. ValueError: NaN or Inf, the meta device, inputs of another size.
        """
        w = finite_matrix("Int8", weight, smallest=0)
        top = 2 ** (self.weight_bits - 1) - 1
        if w.shape[1] == 0:
            return Int8Weight(w.to(torch.int8), w.new_ones(w.shape[0]), self.activation_bits, self.weight_bits)
        reach = w.abs().amax(dim=1)
        largest_rms = profile("Int8", "fit", self.fit).largest_rms
        if self.activation_bits == 8 and largest_rms is not None:
            reach = torch.maximum(reach, _rms(w) / largest_rms)
        scale = reach.clamp_(max=torch.finfo(torch.float32).max) / top
        # A row of zeros, or so small that its scale is not a normal float: any scale gives zeros; 1 keeps it valid.
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
        values = (w / scale[:, None]).round_().clamp_(-top, top).to(torch.int8)
        if self.inputs is not None:
            values = _closer(w, values, scale, top, self.inputs.moment("Int8", w.shape[1]))
        return Int8Weight(values, scale, self.activation_bits, self.weight_bits)


def _closer(w: Tensor, plain: Tensor, scale: Tensor, top: int, moment: Tensor) -> Tensor:
    """Of each row, what GPTQ finds, or plain rounding where that changes the outputs less."""
    steps = gptq.rounded(w, moment, scale[:, None], w.shape[1], lambda x, _: (x / scale).round_().clamp_(-top, top))
    if steps is None:
        return plain
    found = steps.to(torch.int8)
    rows = gptq.closer(w, found * scale[:, None], plain * scale[:, None], moment)
    return torch.where(rows[:, None], found, plain)


def _rms(w: Tensor) -> Tensor:
    """Root mean square per row, without overflow or underflow: float32 [n]."""
    norm: Tensor = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)
    return (norm / math.sqrt(w.shape[1])).to(torch.float32)
