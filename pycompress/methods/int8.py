"""Int8: symmetric weights per output channel, asymmetric activations per row (Jacob et al. 2018, arXiv:1712.05877), calibrated by
GPTQ (Frantar et al. 2022, arXiv:2210.17323).

Activations are quantized inside the kernel, per row ("per token", as in ZeroQuant, Yao et al. 2022, arXiv:2206.01861) or with one
range for all rows that an observer chose, or not at all. Besides that range, inputs change how weights are rounded, no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from pycompress.methods import gptq
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.int8_recurrent import OfRecurrent
from pycompress.methods.method import NEEDS_CALIBRATION, finite_matrix
from pycompress.methods.notes import note
from pycompress.methods.observers import MinMax, Observer
from pycompress.profiles import DEFAULT, Profile, profile
from pycompress.weights.int8 import Int8Weight, range_tensors
from pycompress.weights.rules import LARGEST_SCALE, SMALLEST_SCALE, one_of

# A static range that reaches so many times as far as half of the input's features ever do leaves these 5 bits of its 8.
OUTLIERS = 8


@dataclass(frozen=True, repr=False)
class Int8:
    """int8 weights and 8- or 7-bit activations, quantized as the model runs; or int8 weights alone.

    .. code-block:: python

        plan = pc.Int8(activation="static", observer=pc.Percentile(99.99))
        model = pc.compress(model, plan, calibration=pc.calibrate(model, batches, plan=plan))

    Args:
        activation_bits: 8 (default) or 7. Seven bits leave the AVX2 kernels twice the room in their 16-bit lanes, which makes
            them faster there; processors with VNNI run both at the same speed. README has both, measured. 16: activations stay in
            floating point ("weight only"), for few rows, where a layer costs what its weights cost to read.
        weight_bits: 8 (default: integers in [-127, 127]) or 7 ([-63, 63]).
        fit: for 8-bit activations, the profile whose kernels the range of a row is chosen for (:mod:`pycompress.profiles`):
            ``avx2`` (default), ``none`` (each row takes the whole range of integers) or one of your own. Embeddings of
            all-MiniLM-L6-v2 over 512 sentences have a mean cosine to the float32 ones of 0.99896 with ``avx2`` (least 0.9978) and
            of 0.99898 with ``none`` (least 0.9979), whose products take up to 1.4 times as long on AVX2: hence the default.
        activation: ``dynamic`` (default): each row of the input has its own range, which the kernel looks for. ``static``: all rows
            have the one that ``observer`` chose from a calibration, which saves that pass over the input, and is inexact where rows
            differ: in transformers with outlier channels it can cost nearly all accuracy. The guide "Static ranges" has both sides.
        observer: which range that is: ``MinMax()`` (default), ``MovingAverage()``, ``Percentile()``, ``MeanSquaredError()``,
            ``Entropy()``, or ``Known(low, high)``, which needs no calibration.
        embeddings: take embeddings too, with a scale for each row; no activations are quantized there.
        inputs: what the layer's inputs look like; ``compress(..., calibration=...)`` sets it for each layer. Rounding errors are
            made to cancel in the outputs then (GPTQ); the scales stay as they are. For a static input without moments (``gather=``)
            they are rounded as they are.
    Raises:
        TypeError: inputs or an observer of another type. ValueError: another number of bits, a profile that is none, or another
            activation; a static one of 16 bits.
    """

    name: ClassVar[str] = "int8"

    activation_bits: int = 8
    weight_bits: int = 8
    fit: str | Profile = field(default=DEFAULT, kw_only=True)
    activation: str = field(default="dynamic", kw_only=True)
    observer: Observer = field(default=MinMax(), kw_only=True)
    embeddings: bool = field(default=False, kw_only=True)
    inputs: InputStatistics | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for option in Int8Weight.options:
            if option.name != "static":  # which stands in `activation`
                option.check("Int8", getattr(self, option.name))
        profile("Int8", "fit", self.fit)
        if expected := one_of("dynamic", "static")(self.activation, (1, 1), {}):
            raise ValueError(f"Int8: activation is {self.activation!r}, expected {expected}")
        if self.static and self.activation_bits == 16:
            raise ValueError(
                "Int8: activation is 'static' with activation_bits 16, expected 7 or 8: nothing is quantized"
            )
        if not isinstance(self.observer, Observer) or isinstance(self.observer, type):
            raise TypeError(f"Int8: observer is {self.observer!r}, expected one such as MinMax()")
        if self.inputs is not None and not isinstance(self.inputs, InputStatistics):
            raise TypeError(f"Int8: inputs is {type(self.inputs).__name__}, expected InputStatistics or None")

    def __repr__(self) -> str:
        fit = "" if self.fit == DEFAULT else f", fit={self.fit!r}"
        fit += f", activation='static', observer={self.observer!r}" if self.static else ""
        embeddings = ", embeddings=True" if self.embeddings else ""
        inputs = "" if self.inputs is None else f", inputs={self.inputs!r}"
        return f"Int8(activation_bits={self.activation_bits}, weight_bits={self.weight_bits}{fit}{embeddings}{inputs})"

    @property
    def static(self) -> bool:
        """Whether the range of the input is chosen before the input comes."""
        return self.activation == "static"

    @property
    def needs(self) -> tuple[str, ...]:
        """Which parts of its inputs it makes use of."""
        return ("moments", *self.observer.needs) if self.static else ("moments",)

    @property
    def lacks_inputs(self) -> bool:
        """Whether it can compress nothing before it is told what the inputs look like."""
        return self.static and bool(self.observer.needs) and self.inputs is None

    def refuses(self, kind: str) -> str:
        """Why it does not take layers of a kind, such as ``Linear`` or ``Embedding``, for the sake of its options; or ''."""
        if kind == "Embedding" and not self.embeddings:
            return "Int8 takes embeddings with embeddings=True only"
        if kind in ("LSTM", "GRU") and (self.static or self.activation_bits == 16):
            own = "static" if self.static else "16-bit"
            return f"Int8 takes {kind}s with dynamic activations of 7 or 8 bits only, not with {own} ones"
        if kind in ("Conv1d", "Conv2d") and self.activation_bits == 16:
            return "Int8 takes convolutions with activations of 7 or 8 bits only, not with 16-bit ones"
        return ""

    def for_embedding(self) -> Int8:
        """The method for an embedding: rows are chosen, and multiply nothing."""
        return replace(self, activation_bits=16, activation="dynamic", inputs=None)

    def for_convolution(self, shape: tuple[int, int, int, int], stride: tuple[int, int]) -> Int8:  # noqa: ARG002
        """The method for a convolution; where a channel is convolved alone, no kernel gains by a profile's range."""
        return replace(self, fit="none") if shape[1] == 1 else self

    def for_recurrent(
        self, cell: str, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool
    ) -> OfRecurrent:
        """The method for an LSTM or a GRU: each matrix by itself, without inputs."""
        return OfRecurrent(replace(self, inputs=None), cell, input_size, hidden_size, num_layers, bidirectional)

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
            TypeError: not a floating-point matrix. ValueError: NaN or Inf, the meta device, inputs of another size; for a static
                input no inputs, or such that lack what the observer needs.
        """
        w, fixed = finite_matrix("Int8", weight, smallest=0), range_tensors(self.input_range)
        top = 2 ** (self.weight_bits - 1) - 1
        if w.shape[1] == 0:
            return Int8Weight(w.to(torch.int8), w.new_ones(w.shape[0]), self.activation_bits, self.weight_bits, *fixed)
        reach = w.abs().amax(dim=1)
        largest_rms = profile("Int8", "fit", self.fit).largest_rms
        if self.activation_bits == 8 and largest_rms is not None:
            reach = torch.maximum(reach, _rms(w) / largest_rms)
        scale = reach.clamp_(max=torch.finfo(torch.float32).max) / top
        # A row of zeros, or so small that its scale is not a normal float: any scale gives zeros; 1 keeps it valid.
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
        values = (w / scale[:, None]).round_().clamp_(-top, top).to(torch.int8)
        if self.inputs is not None and not (self.static and self.inputs.second_moment is None):
            values = _closer(w, values, scale, top, self.inputs.moment("Int8", w.shape[1]))
        return Int8Weight(values, scale, self.activation_bits, self.weight_bits, *fixed)

    @property
    def input_range(self) -> tuple[float, int] | None:
        """Scale and zero point of a static input, by the formula of ``csrc/int8/gemm.h`` for a row; None for a dynamic one.

        Raises:
            ValueError: nothing is known of the inputs, or not what the observer needs.
        """
        if not self.static:
            return None
        if self.lacks_inputs:
            raise ValueError(
                f"Int8: the activation is static, and nothing is known of the inputs: {NEEDS_CALIBRATION}, or the observer "
                "Known(low, high)"
            )
        top = 2**self.activation_bits - 1
        low, high = self.observer.ends(self.inputs, top + 1)
        low, high = min(low, 0.0), max(high, 0.0)
        self._note_outliers(max(-low, high))
        half = min(high / 2 - low / 2, LARGEST_SCALE * top / 2)
        if half < SMALLEST_SCALE * top:  # zeros, or next to nothing: any scale gives zeros
            return 1.0, 0
        zero_point = min(max(round(-low * (top / 2 / half)), 0), top)
        return float(torch.tensor(half / (top / 2), dtype=torch.float32, device="cpu")), zero_point

    def _note_outliers(self, reach: float) -> None:
        """Says so where few features decide how far the range reaches, and the others are left with few of its integers."""
        if self.inputs is None or self.inputs.low is None or self.inputs.high is None:
            return
        each = torch.maximum(-self.inputs.low, self.inputs.high)
        each = each[each > 0]
        if len(each) and reach > OUTLIERS * (median := float(each.median())):
            note(
                f"half of the inputs take at most 1/{reach / median:.0f} of the static range: outliers decide it, dynamic is safer"
            )


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
