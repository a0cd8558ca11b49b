"""Sparse: the weights that stay, as a bitmask and their values: the largest (Han et al. 2015, arXiv:1506.02626), or those with
which the outputs change least (admm.py, sparse_gpt.py, wanda.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pycompress.methods import admm, masks, sparse_gpt, wanda
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.int8 import Int8
from pycompress.methods.method import finite_matrix
from pycompress.methods.nearest import Outputs
from pycompress.methods.notes import note
from pycompress.methods.threads import one_thread
from pycompress.profiles import DEFAULT, Profile, profile
from pycompress.weights.sparse import SparseWeight, nonzero
from pycompress.weights.weight import described

SCOPES = ("layer", "row", "model")
CHOICES = ("admm", "sparsegpt", "wanda", "magnitude")


class _Pruned(NamedTuple):
    """The values float32 [n, k], zero where the mask bool [n, k] is False; the outputs by which they were fitted, if they were."""

    values: Tensor
    mask: Tensor
    outputs: Outputs | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Sparse:
    """A share of the weights stays; the others become zeros that are neither stored nor multiplied.

    With the inputs that calibration saw, those stay with which the outputs change least, and what stays is fitted to make up for
    what goes, and for its own rounding; without, the largest stay as they are. The weight of a convolution is the matrix
    [out_channels, in_channels * height * width].

    Args:
        density: share of the weights (of the blocks) that stay, in [0, 1]: exactly round(density * count), ties going to the
            lowest position. None: the zeros that are there stay, no others come (what ``torch.nn.utils.prune`` left, say).
            N:M patterns fix it: N / M or None.
        pattern: what stays or goes together: ``unstructured`` single weights; blocks of output channels x consecutive input
            features, ``16x1``, ``16x4``, ``1x4``, ``16x16``, ``32x32``, ``64x64``, ranked by their sum of squares (smaller
            ones at the edge too: of a given number of blocks, these hold most); ``2:4``, ``4:8``, ``4:16``: N of M
            consecutive input features, of a shorter last group min(N, its size).
        bits: 32 (default: float32 values) or 8: what stays is quantized as :class:`Int8` does it.
        activation_bits: 7 (default) or 8, for 8-bit weights: the range in which the layer quantizes its input.
        scope: where the density holds: over the ``layer``, in each ``row`` (of blocks, where blocks are ranked), or over all
            layers of the ``model`` together, by one threshold (see :meth:`for_layers`).
        fit: as :class:`Int8` has it, for 8-bit weights and activations.
        mask: bool [n, k], True where the weight stays; instead of density and pattern (see :meth:`from_mask`).
        choose: how what stays is chosen: ``magnitude``; or, where inputs are known, ``wanda`` (magnitude times the size of the
            input), ``sparsegpt`` or ``admm``, which change the values, too. None (default): ``admm`` where inputs are known, else
            ``magnitude``.
        inputs: what the layer's inputs look like; ``compress(..., calibration=...)`` sets it for each layer.
    Raises:
        TypeError: a density that is no number, a mask that is no boolean matrix, inputs of another type. ValueError: anything
            else that is not above.
    """

    name: ClassVar[str] = "sparse"

    density: float | None = None
    pattern: str = "unstructured"
    bits: int = 32
    activation_bits: int = 7
    scope: str = "layer"
    fit: str | Profile = field(default=DEFAULT, kw_only=True)
    mask: Tensor | None = None
    choose: str | None = field(default=None, kw_only=True)
    inputs: InputStatistics | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.pattern not in masks.PATTERNS:
            raise ValueError(f"Sparse: pattern is {self.pattern!r}, expected one of {', '.join(masks.PATTERNS)}")
        for option in SparseWeight.options:
            if option.name != "nnz":
                option.check("Sparse", getattr(self, option.name))
        if self.scope not in SCOPES:
            raise ValueError(f"Sparse: scope is {self.scope!r}, expected one of {', '.join(SCOPES)}")
        if self.choose not in (None, *CHOICES):
            raise ValueError(f"Sparse: choose is {self.choose!r}, expected None or one of {', '.join(CHOICES)}")
        if self.inputs is not None and not isinstance(self.inputs, InputStatistics):
            raise TypeError(f"Sparse: inputs is {type(self.inputs).__name__}, expected InputStatistics or None")
        profile("Sparse", "fit", self.fit)
        self._check_density()
        self._check_mask()

    def _check_density(self) -> None:
        density, pattern = self.density, self.pattern
        if density is not None and (isinstance(density, bool) or not isinstance(density, int | float)):
            raise TypeError(f"Sparse: density is {density!r}, expected a number in [0, 1] or None")
        if density is not None and not 0 <= density <= 1:
            raise ValueError(f"Sparse: density is {density!r}, expected a number in [0, 1] or None")
        if pattern in masks.N_OF_M:
            kept, group = masks.N_OF_M[pattern]
            if density not in (None, kept / group):
                raise ValueError(f"Sparse: density is {density!r}, expected {kept / group} or None for {pattern}")
            if self.scope != "layer":
                raise ValueError(f"Sparse: scope is {self.scope!r}, expected 'layer': {pattern} holds in every group")
        elif density is None and self.scope != "layer":
            raise ValueError(f"Sparse: scope is {self.scope!r}, expected 'layer' where no density is given")

    def _check_mask(self) -> None:
        mask = self.mask
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            raise TypeError(f"Sparse: mask is {described(mask)}, expected a tensor of bool [n, k]")
        if mask.device.type != "cpu":
            raise ValueError(f"Sparse: mask is on {mask.device}, expected the CPU (from_mask copies it there)")
        if self.density is not None or self.pattern != "unstructured":
            raise ValueError(
                f"Sparse: density is {self.density!r}, pattern is {self.pattern!r}, expected neither beside a mask"
            )

    @classmethod
    def from_mask(cls, mask: Tensor, bits: int = 32, activation_bits: int = 7) -> Sparse:
        """Keeps the weights where the mask, bool [n, k] on any device, is True. Raises TypeError for another tensor."""
        if not isinstance(mask, Tensor):
            raise TypeError(f"Sparse: mask is {described(mask)}, expected a tensor of bool [n, k]")
        return cls(bits=bits, activation_bits=activation_bits, mask=mask.detach().to("cpu", copy=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sparse):
            return NotImplemented
        if self._options() != other._options() or (self.mask is None) != (other.mask is None):
            return False
        return self.mask is None or other.mask is None or torch.equal(self.mask, other.mask)

    def __hash__(self) -> int:
        return hash((self._options(), None if self.mask is None else self.mask.shape))

    def __repr__(self) -> str:
        given = [f.name for f in fields(self) if f.name != "mask" and getattr(self, f.name) != f.default]
        shown = [f"{name}={getattr(self, name)!r}" for name in given]
        mask = [] if self.mask is None else [f"mask={list(self.mask.shape)}"]
        return f"Sparse({', '.join(shown + mask)})"

    def _options(self) -> tuple[object, ...]:
        return (
            self.density, self.pattern, self.bits, self.activation_bits, self.scope, self.fit, self.choose, self.inputs,
        )  # fmt: skip

    @property
    def needs(self) -> tuple[str, ...]:
        """What of the inputs it makes use of."""
        parts = {"magnitude": (), "wanda": ("diagonals",)}
        return parts.get(self.choose or "admm", ("moments",))

    def with_inputs(self, statistics: InputStatistics) -> Sparse:
        """The method for the layer that met these inputs."""
        return replace(self, inputs=statistics)

    def at(self, strength: float, shape: tuple[int, int]) -> Sparse:  # noqa: ARG002 - others need it
        """The milder method on the way to this one: the density falls from 1 as ``strength`` rises to 1. N:M patterns are reached
        through single weights."""
        if strength >= 1 or (self.density is None and self.pattern not in masks.N_OF_M):
            return self
        kept, group = masks.N_OF_M.get(self.pattern, (self.density, 1))
        assert kept is not None
        pattern = "unstructured" if self.pattern in masks.N_OF_M else self.pattern
        return replace(self, density=1 - strength * (1 - kept / group), pattern=pattern)

    def compress(self, weight: Tensor, importance: Tensor | None = None) -> SparseWeight:
        """Prunes, quantizes where bits is 8 (without inputs to the integers that :class:`Int8` makes of the pruned weight), and
        leaves out the zeros: a weight that stays but is zero, or rounds to the integer 0, is not stored.

        Args, Raises:
            as :meth:`prune`.
        """
        pruned = self._pruned(finite_matrix("Sparse", weight), importance)
        if self.bits == 32:
            return SparseWeight.from_dense(pruned.values)
        quantized = Int8(self.activation_bits, fit=self.fit).compress(pruned.values)
        integers = quantized.values
        if pruned.outputs is not None:
            with one_thread():
                integers = pruned.outputs.rounded(pruned.values, pruned.mask, quantized.scale, 127).to(torch.int8)
        return SparseWeight.from_dense(integers, quantized.scale, quantized.activation_bits)

    def refuses(self, kind: str) -> str:
        """Why it does not take layers of a kind, or ''."""
        return "int8 has no sparse convolution yet" if kind == "Conv2d" and self.bits == 8 else ""

    def prune(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """bool [n, k], on the CPU: True where the weight stays.

        Args:
            weight: floating point [n, k], 1 <= k <= 65536, on any device.
            importance: floating point [n, k], finite and >= 0: what ranks the weights instead of their magnitudes.
        Raises:
            TypeError: not floating-point matrices. ValueError: NaN or Inf, negative importance, the meta device, a shape that is
            empty, too large, not the mask's or not that of the inputs, importance where nothing is ranked (a mask, or no
            density), scope ``model``, a choice that needs inputs without any.
        """
        return self._pruned(finite_matrix("Sparse", weight), importance).mask.clone()

    def _pruned(self, w: Tensor, importance: Tensor | None) -> _Pruned:
        if self.scope == "model":
            raise ValueError("Sparse: scope is 'model', expected the method that for_layers(weights) gives this layer")
        ranked = self.density is not None or self.pattern in masks.N_OF_M
        if importance is not None and not ranked:
            raise ValueError("Sparse: importance was given, expected none: without a density nothing is ranked")
        choose = self._choice(w, ranked=ranked and importance is None)
        if not ranked:
            mask = self._given(w)
        elif importance is not None:
            mask = self._largest(_checked_importance(importance, w))
        elif choose == "magnitude":
            mask = self._largest(w)
        else:
            return self._by_inputs(w, choose)
        if choose != "admm":
            return _Pruned(torch.where(mask, w, 0.0), mask)
        return self._fitted(w, mask)

    def _choice(self, w: Tensor, *, ranked: bool) -> str:
        if self.inputs is None:
            if self.choose not in (None, "magnitude"):
                raise ValueError(
                    f"Sparse: choose is {self.choose!r} and inputs is None, expected those of compress(..., calibration=...)"
                )
            if ranked and self.choose is None:
                note("pruned by magnitude, without a calibration")
            return "magnitude"
        if not bool(self.inputs.squares("Sparse", w.shape[1]).any()):
            note("its inputs were all zero: pruned by magnitude")
            return "magnitude"
        return self.choose or "admm"

    def _given(self, w: Tensor) -> Tensor:
        if self.mask is None:
            return torch.from_numpy(nonzero(w.numpy()))
        if self.mask.shape != w.shape:
            raise ValueError(f"Sparse: the weight is {list(w.shape)}, the mask {list(self.mask.shape)}")
        return self.mask

    def _by_inputs(self, w: Tensor, choose: str) -> _Pruned:
        assert self.inputs is not None
        k = w.shape[1]
        if choose == "wanda":
            mask = self._largest(wanda.importance(w, self.inputs.squares("Sparse", k)))
            return _Pruned(torch.where(mask, w, 0.0), mask)
        moment = self.inputs.moment("Sparse", k)
        with one_thread():
            if choose == "sparsegpt":
                _, group = masks.N_OF_M.get(self.pattern, (0, sparse_gpt.BLOCK))
                return _Pruned(*sparse_gpt.sparse(w, moment, self._largest, group))
            outputs = Outputs(w, moment, "Sparse")
            scaled, mask = admm.sparse(outputs, self._largest)
            return _Pruned(outputs.unscaled(scaled, mask), mask, outputs)

    def _fitted(self, w: Tensor, mask: Tensor) -> _Pruned:
        """The values on a support that was chosen otherwise."""
        assert self.inputs is not None
        with one_thread():
            outputs = Outputs(w, self.inputs.moment("Sparse", w.shape[1]), "Sparse")
            values = outputs.refitted(torch.where(mask, outputs.weight, 0.0), mask)
            return _Pruned(outputs.unscaled(values, mask), mask, outputs)

    def _largest(self, importance: Tensor, before: int = 0) -> Tensor:
        density = 0.0 if self.density is None else self.density
        pattern = masks.Pattern(self.pattern, density, self.scope == "row")
        return torch.from_numpy(pattern.largest(importance.numpy(), before))

    def for_layers(self, weights: Sequence[Tensor], inputs: Sequence[InputStatistics] | None = None) -> list[Sparse]:
        """One method per layer: ``self`` for each, but for scope ``model`` one with the layer's own density, so that together they
        keep exactly the round(density * count) largest weights (blocks) of all layers, ties going to the first layers.

        Args:
            inputs: of each layer: what makes up most of its outputs counts as the largest then, weights times the size of their
                inputs over that of the layer's outputs. None: the weights themselves.

        Errors are those of :meth:`prune`.
        """
        if self.scope != "model":
            return [self] * len(weights)
        assert self.density is not None
        block = masks.BLOCKS[self.pattern]
        ranked = [finite_matrix("Sparse", weight) for weight in weights]
        if inputs is not None and self.choose != "magnitude":
            ranked = [_share_of_outputs(w, own) for w, own in zip(ranked, inputs, strict=True)]
        keys = [masks.block_keys(w.numpy(), block) for w in ranked]
        own = masks.shares(keys, round(self.density * sum(array.size for array in keys)))
        # round(density * size) gives back the count: the quotient's error, times size, stays far below 1/2.
        return [
            replace(self, scope="layer", density=count / array.size) for count, array in zip(own, keys, strict=True)
        ]


def _share_of_outputs(w: Tensor, inputs: InputStatistics) -> Tensor:
    """float32 [n, k]: the root mean square that each weight gives, over that of all outputs together."""
    k = w.shape[1]
    with one_thread():
        wide = w.double() / w.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        moment = inputs.moment("Sparse", k)
        whole = float(((wide @ moment) * wide).sum().clamp(min=0).sqrt())
        found = wide.abs() * inputs.squares("Sparse", k).sqrt() / (whole or 1.0)
    return found.clamp(max=torch.finfo(torch.float32).max).float()


def _checked_importance(importance: Tensor, w: Tensor) -> Tensor:
    if not isinstance(importance, Tensor) or not importance.is_floating_point():
        raise TypeError(f"Sparse: importance is {described(importance)}, expected floating point {list(w.shape)}")
    if importance.shape != w.shape:
        raise ValueError(f"Sparse: importance is {described(importance)}, expected floating point {list(w.shape)}")
    if importance.is_meta:
        raise ValueError("Sparse: importance is on the meta device, expected a tensor with data")
    found = importance.detach().to("cpu", torch.float32)
    bad = int((~((found >= 0) & torch.isfinite(found))).sum())
    if bad:
        raise ValueError(
            f"Sparse: importance holds {bad} values that are negative, NaN or Inf, expected finite ones >= 0"
        )
    return found
