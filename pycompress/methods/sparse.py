"""Sparse: the weights that pruning by magnitude keeps (Han et al. 2015, arXiv:1506.02626), as a bitmask and their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycompress.methods import masks
from pycompress.methods.int8 import Int8
from pycompress.methods.weight import Expected, check_tensors
from pycompress.ops import MAX_IN_FEATURES

SCOPES = ("layer", "row", "model")
_POPCOUNT: NDArray[np.uint8] = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(
    axis=1, dtype=np.uint8
)


@dataclass(frozen=True, eq=False, repr=False)
class Sparse:
    """A share of the weights stays, the largest ones; the others become zeros that are neither stored nor multiplied.

    The weight of a convolution is the matrix [out_channels, in_channels * height * width].

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
        mask: bool [n, k], True where the weight stays; instead of density and pattern (see :meth:`from_mask`).
    Raises:
        TypeError: a density that is no number, a mask that is no boolean matrix. ValueError: anything else that is not above.
    """

    name: ClassVar[str] = "sparse"

    density: float | None = None
    pattern: str = "unstructured"
    bits: int = 32
    activation_bits: int = 7
    scope: str = "layer"
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.pattern not in masks.PATTERNS:
            raise ValueError(f"Sparse: pattern is {self.pattern!r}, expected one of {', '.join(masks.PATTERNS)}")
        if type(self.bits) is not int or self.bits not in (8, 32):
            raise ValueError(f"Sparse: bits is {self.bits!r}, expected 8 or 32")
        if type(self.activation_bits) is not int or self.activation_bits not in (7, 8):
            raise ValueError(f"Sparse: activation_bits is {self.activation_bits!r}, expected 7 or 8")
        if self.scope not in SCOPES:
            raise ValueError(f"Sparse: scope is {self.scope!r}, expected one of {', '.join(SCOPES)}")
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
            raise TypeError(f"Sparse: mask is {_kind(mask)}, expected a tensor of bool [n, k]")
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
            raise TypeError(f"Sparse: mask is {_kind(mask)}, expected a tensor of bool [n, k]")
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
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[:-1] if getattr(self, f.name) != f.default]
        mask = [] if self.mask is None else [f"mask={list(self.mask.shape)}"]
        return f"Sparse({', '.join(given + mask)})"

    def _options(self) -> tuple[object, ...]:
        return self.density, self.pattern, self.bits, self.activation_bits, self.scope

    def compress(self, weight: Tensor, importance: Tensor | None = None) -> SparseWeight:
        """Prunes, quantizes where bits is 8 (to the integers that :class:`Int8` makes of the pruned weight), and leaves out the
        zeros: a weight that stays but is zero, or rounds to the integer 0, is not stored.

        Args, Raises:
            as :meth:`prune`.
        """
        w = _finite_matrix(weight)
        kept = torch.where(self._keep(w, importance), w, 0.0)
        if self.bits == 32:
            return SparseWeight.from_dense(kept)
        quantized = Int8(self.activation_bits).compress(kept)
        return SparseWeight.from_dense(quantized.values, quantized.scale, quantized.activation_bits)

    def refuses(self, kind: str) -> str:
        """Why it cannot take layers of a kind, or ''."""
        if kind == "Embedding":
            return "Sparse takes no embeddings"
        return "int8 has no sparse convolution yet" if kind == "Conv2d" and self.bits == 8 else ""

    def prune(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """bool [n, k], on the CPU: True where the weight stays.

        Args:
            weight: floating point [n, k], 1 <= k <= 65536, on any device.
            importance: floating point [n, k], finite and >= 0: what ranks the weights instead of their magnitudes.
        Raises:
            TypeError: not floating-point matrices. ValueError: NaN or Inf, negative importance, the meta device, a shape that is
            empty, too large or not the mask's, importance where nothing is ranked (a mask, or no density), scope ``model``.
        """
        return self._keep(_finite_matrix(weight), importance).clone()

    def _keep(self, w: Tensor, importance: Tensor | None) -> Tensor:
        if self.scope == "model":
            raise ValueError("Sparse: scope is 'model', expected the method that for_layers(weights) gives this layer")
        ranked = self.density is not None or self.pattern in masks.N_OF_M
        if importance is not None and not ranked:
            raise ValueError("Sparse: importance was given, expected none: without a density nothing is ranked")
        if self.mask is not None:
            if self.mask.shape != w.shape:
                raise ValueError(f"Sparse: the weight is {list(w.shape)}, the mask {list(self.mask.shape)}")
            return self.mask
        if not ranked:
            return torch.from_numpy(masks.nonzero(w.numpy()))
        ranking = w if importance is None else _checked_importance(importance, w)
        return torch.from_numpy(self._largest(ranking.numpy()))

    def _largest(self, importance: masks.Floats) -> masks.Mask:
        if self.pattern in masks.N_OF_M:
            return masks.n_of_m(importance, *masks.N_OF_M[self.pattern])
        assert self.density is not None
        block = masks.BLOCKS[self.pattern]
        keys = masks.block_keys(importance, block)
        rows = keys if self.scope == "row" else keys.reshape(1, -1)
        keep = masks.largest(rows, round(self.density * rows.shape[1]))
        return masks.expand(keep.reshape(keys.shape), block, importance.shape)

    def for_layers(self, weights: Sequence[Tensor]) -> list[Sparse]:
        """One method per layer: ``self`` for each, but for scope ``model`` one with the layer's own density, so that together they
        keep exactly the round(density * count) largest weights (blocks) of all layers, ties going to the first layers.

        Args, Raises:
            weights: as :meth:`prune` takes them.
        """
        if self.scope != "model":
            return [self] * len(weights)
        assert self.density is not None
        block = masks.BLOCKS[self.pattern]
        keys = [masks.block_keys(_finite_matrix(weight).numpy(), block) for weight in weights]
        own = masks.shares(keys, round(self.density * sum(array.size for array in keys)))
        # round(density * size) gives back the count: the quotient's error, times size, stays far below 1/2.
        return [
            replace(self, scope="layer", density=count / array.size) for count, array in zip(own, keys, strict=True)
        ]


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _finite_matrix(weight: Tensor) -> Tensor:
    """float32 [n, k] on the CPU; the weight itself where it is that already."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise TypeError(f"Sparse: the weight is {_kind(weight)}, expected floating point [n, k]")
    if weight.shape[0] < 1 or not 1 <= weight.shape[1] <= MAX_IN_FEATURES:
        raise ValueError(f"Sparse: the weight is {list(weight.shape)}, expected [n > 0, 1 to {MAX_IN_FEATURES}]")
    if weight.is_meta:
        raise ValueError(f"Sparse: the weight {list(weight.shape)} is on the meta device, expected one with data")
    w = weight.detach().to("cpu", torch.float32)
    if not torch.isfinite(w).all():
        bad = int((~torch.isfinite(w)).sum())
        raise ValueError(f"Sparse: the weight {list(w.shape)} holds {bad} NaN or Inf, expected finite values")
    return w


def _checked_importance(importance: Tensor, w: Tensor) -> Tensor:
    if not isinstance(importance, Tensor) or not importance.is_floating_point():
        raise TypeError(f"Sparse: importance is {_kind(importance)}, expected floating point {list(w.shape)}")
    if importance.shape != w.shape:
        raise ValueError(f"Sparse: importance is {_kind(importance)}, expected floating point {list(w.shape)}")
    if importance.is_meta:
        raise ValueError("Sparse: importance is on the meta device, expected a tensor with data")
    found = importance.detach().to("cpu", torch.float32)
    bad = int((~((found >= 0) & torch.isfinite(found))).sum())
    if bad:
        raise ValueError(
            f"Sparse: importance holds {bad} values that are negative, NaN or Inf, expected finite ones >= 0"
        )
    return found


@dataclass(frozen=True, eq=False, repr=False)
class SparseWeight:
    """The canonical sparse weight: what is saved, exported and compared; independent of any processor.

    A bitmask instead of indices: none can be out of range, doubled or out of order, and from a density of 1/32 up it is no
    larger than 32-bit column indices would be.

    Attributes:
        mask: uint8 [n, ceil(k / 8)]: bit i % 8 (least significant first) of byte i // 8 of row r says whether weight[r, i] is
            non-zero; the padding bits behind k are 0.
        values: float32 or int8 [nnz]: the non-zero weights, row after row, ascending k. Never zero, finite, never -128.
        k: in_features, 1 to 65536.
        scale: float32 [n], positive and finite, for int8: weight = integer * scale[row]. None for float32.
        activation_bits: 7 or 8 for int8, the range in which the layer quantizes its input. None for float32.
    Raises:
        ValueError: a field that breaks these rules.
    """

    name: ClassVar[str] = "sparse"

    mask: Tensor
    values: Tensor
    k: int
    scale: Tensor | None = None
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        self._check_mask()
        self._check_values()
        self._check_quantization()

    def _check_mask(self) -> None:
        mask, k = self.mask, self.k
        if type(k) is not int or not 1 <= k <= MAX_IN_FEATURES:
            raise ValueError(f"SparseWeight: k is {k!r}, expected 1 to {MAX_IN_FEATURES}")
        if mask.dtype != torch.uint8 or mask.dim() != 2 or mask.shape[1] != -(-k // 8) or mask.shape[0] == 0:
            raise ValueError(
                f"SparseWeight: mask is {mask.dtype} {list(mask.shape)}, expected uint8 [n, {-(-k // 8)}] for k = {k}, n > 0"
            )
        for name, tensor in self.tensors().items():
            if tensor.device.type != "cpu":
                raise ValueError(f"SparseWeight: {name} is on {tensor.device}, expected the CPU")
        padding = mask.numpy()[:, -1] >> ((k - 1) % 8 + 1)
        if padding.any():
            raise ValueError(
                f"SparseWeight: row {int(padding.nonzero()[0][0])} of the mask has bits set behind k = {k}"
            )

    def _check_values(self) -> None:
        values, count = self.values, int(_POPCOUNT[self.mask.numpy()].sum(dtype=np.int64))
        if values.dtype not in (torch.float32, torch.int8) or values.dim() != 1:
            raise ValueError(
                f"SparseWeight: values is {values.dtype} {list(values.shape)}, expected float32 or int8 [nnz]"
            )
        if len(values) != count:
            raise ValueError(f"SparseWeight: there are {len(values)} values, the mask has {count} bits set")
        numbers = _numpy(values)
        zeros = count - int(np.count_nonzero(masks.nonzero(numbers)))
        if zeros:
            raise ValueError(f"SparseWeight: {zeros} of the values are zero, expected them to be left out of the mask")
        if values.dtype == torch.int8 and int((numbers == -128).sum()):
            raise ValueError("SparseWeight: a value is -128, expected integers in [-127, 127]")
        if not np.isfinite(numbers).all():
            bad = int((~np.isfinite(numbers)).sum())
            raise ValueError(f"SparseWeight: {bad} of the values are NaN or Inf, expected finite values")

    def _check_quantization(self) -> None:
        scale, bits = self.scale, self.activation_bits
        if self.values.dtype == torch.float32:
            if scale is not None or bits is not None:
                given = "None" if scale is None else f"{scale.dtype} {list(scale.shape)}"
                raise ValueError(
                    f"SparseWeight: scale is {given}, activation_bits is {bits!r}, expected None for float32 values"
                )
            return
        if type(bits) is not int or bits not in (7, 8):
            raise ValueError(f"SparseWeight: activation_bits is {bits!r}, expected 7 or 8 for int8 values")
        n = self.mask.shape[0]
        if scale is None or scale.dtype != torch.float32 or scale.shape != (n,):
            given = "None" if scale is None else f"{scale.dtype} {list(scale.shape)}"
            raise ValueError(f"SparseWeight: scale is {given}, expected float32 [{n}] for int8 values")
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise ValueError("SparseWeight: a scale is not a positive finite number")

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[0], self.k

    @property
    def bits(self) -> int:
        """32 or 8."""
        return 32 if self.values.dtype == torch.float32 else 8

    @property
    def nnz(self) -> int:
        return len(self.values)

    @property
    def density(self) -> float:
        """Share of the weights that are non-zero."""
        return self.nnz / (self.shape[0] * self.k)

    def __repr__(self) -> str:
        return f"SparseWeight(shape={list(self.shape)}, bits={self.bits}, nnz={self.nnz})"

    @classmethod
    def from_dense(
        cls, values: Tensor, scale: Tensor | None = None, activation_bits: int | None = None
    ) -> SparseWeight:
        """Leaves out the zeros of values: float32 [n, k], or int8 [n, k] with a scale and activation_bits.

        Raises:
            ValueError: not such a matrix, or what breaks the rules of the class.
        """
        if values.dim() != 2 or values.dtype not in (torch.float32, torch.int8):
            raise ValueError(
                f"SparseWeight: the dense weight is {values.dtype} {list(values.shape)}, expected float32 or int8 [n, k]"
            )
        dense = _numpy(values)
        nonzero = masks.nonzero(dense)
        mask = np.packbits(nonzero, axis=1, bitorder="little")
        return cls(torch.from_numpy(mask), torch.from_numpy(dense[nonzero]), dense.shape[1], scale, activation_bits)

    def decompress(self) -> Tensor:
        """float32 [n, k]."""
        nonzero = np.unpackbits(self.mask.numpy(), axis=1, count=self.k, bitorder="little").view(np.bool_)
        numbers = _numpy(self.values)
        dense = np.zeros(self.shape, numbers.dtype)
        dense[nonzero] = numbers
        weight = torch.from_numpy(dense).to(torch.float32)
        return weight if self.scale is None else weight * self.scale[:, None]

    # --- stored form ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names that it has below the layer's."""
        stored = {"weight_mask": self.mask, "weight_values": self.values}
        return stored if self.scale is None else {**stored, "weight_scale": self.scale}

    def settings(self) -> dict[str, int]:
        """The rest, for JSON."""
        rest = {"bits": self.bits, "nnz": self.nnz}
        return rest if self.activation_bits is None else {**rest, "activation_bits": self.activation_bits}

    @classmethod
    def expected(cls, shape: tuple[int, int], settings: Mapping[str, object]) -> Expected:
        """Shape and dtype of each of the :meth:`tensors` of a weight [n, k] with these settings; allocates nothing.

        Raises:
            ValueError: a setting that is missing, unknown or out of range, or an impossible shape.
        """
        n, k = _checked_shape(shape)
        bits, nnz = settings.get("bits"), settings.get("nnz")
        if type(bits) is not int or bits not in (8, 32):
            raise ValueError(f"SparseWeight: bits is {bits!r}, expected 8 or 32")
        if type(nnz) is not int or not 0 <= nnz <= n * k:
            raise ValueError(f"SparseWeight: nnz is {nnz!r}, expected 0 to {n * k} for a weight [{n}, {k}]")
        names = {"bits", "nnz"} | ({"activation_bits"} if bits == 8 else set())
        if set(settings) != names:
            raise ValueError(f"SparseWeight: the settings are {list(settings)}, expected {sorted(names)}")
        tensors: Expected = {
            "weight_mask": ((n, -(-k // 8)), torch.uint8),
            "weight_values": ((nnz,), torch.int8 if bits == 8 else torch.float32),
        }
        if bits == 32:
            return tensors
        activation_bits = settings["activation_bits"]
        if type(activation_bits) is not int or activation_bits not in (7, 8):
            raise ValueError(f"SparseWeight: activation_bits is {activation_bits!r}, expected 7 or 8")
        return {**tensors, "weight_scale": ((n,), torch.float32)}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], settings: Mapping[str, object]
    ) -> SparseWeight:
        """The inverse of :meth:`tensors` and :meth:`settings`. Raises ValueError where anything does not fit."""
        check_tensors(cls.__name__, tensors, cls.expected(shape, settings))
        bits = settings.get("activation_bits")
        assert bits is None or isinstance(bits, int)
        return cls(tensors["weight_mask"], tensors["weight_values"], shape[1], tensors.get("weight_scale"), bits)


def _checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    n, k = shape
    if type(n) is not int or type(k) is not int or n < 1 or not 1 <= k <= MAX_IN_FEATURES:
        raise ValueError(f"SparseWeight: the shape is [{n!r}, {k!r}], expected [n > 0, 1 to {MAX_IN_FEATURES}]")
    return n, k


def _numpy(tensor: Tensor) -> NDArray[np.generic]:
    array: NDArray[np.generic] = tensor.detach().cpu().numpy()
    return array
