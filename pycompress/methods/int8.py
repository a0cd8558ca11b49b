"""Int8: symmetric weights per output channel, asymmetric activations per row (Jacob et al. 2018, arXiv:1712.05877).

Activations are quantized per row ("per token", as in ZeroQuant, Yao et al. 2022, arXiv:2206.01861) inside the kernel, or not at
all, so there is nothing to calibrate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

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
    Raises:
        ValueError: another number of bits, or a profile that is none.
    """

    name: ClassVar[str] = "int8"

    activation_bits: int = 8
    weight_bits: int = 8
    fit: str | Profile = field(default=DEFAULT, kw_only=True)
    embeddings: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for option in Int8Weight.options:
            option.check("Int8", getattr(self, option.name))
        profile("Int8", "fit", self.fit)

    def __repr__(self) -> str:
        fit = "" if self.fit == DEFAULT else f", fit={self.fit!r}"
        embeddings = ", embeddings=True" if self.embeddings else ""
        return f"Int8(activation_bits={self.activation_bits}, weight_bits={self.weight_bits}{fit}{embeddings})"

    def refuses(self, kind: str) -> str:
        """Why it does not take layers of a kind, ``Linear``, ``Conv2d`` or ``Embedding``, for the sake of its options; or ''."""
        return "Int8 takes embeddings with embeddings=True only" if kind == "Embedding" and not self.embeddings else ""

    def for_embedding(self) -> Int8:
        """The method for an embedding: rows are chosen, and multiply nothing."""
        return replace(self, activation_bits=16)

    def compress(self, weight: Tensor) -> Int8Weight:
        """Rounds each row to integers, half to even, with scale max|row| / wmax; for 8-bit activations the scale is at least
        rms(row) / largest_rms / wmax, by the profile.

        Args:
            weight: floating point [n, k], on any device; the result lies on the CPU.
        Raises:
            TypeError: not a floating-point matrix. ValueError: it holds NaN or Inf, or is on the meta device.
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
        return Int8Weight(values, scale, self.activation_bits, self.weight_bits)


def _rms(w: Tensor) -> Tensor:
    """Root mean square per row, without overflow or underflow: float32 [n]."""
    norm: Tensor = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)
    return (norm / math.sqrt(w.shape[1])).to(torch.float32)
