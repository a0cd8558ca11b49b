"""``Int8LSTM`` and ``Int8GRU``: an ``nn.LSTM`` and an ``nn.GRU`` whose matrices are int8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from pycompress import ops
from pycompress.kinds import GRU, LSTM, Recurrent, RecurrentGeometry
from pycompress.methods.int8 import Int8
from pycompress.nn.dense_weight import LazyTensor, is_traced
from pycompress.nn.layer import CompressedLayer, setting
from pycompress.ops.checks import check_float
from pycompress.ops.cpu import recurrent as packing
from pycompress.weights import Int8RecurrentWeight
from pycompress.weights.recurrent import Matrix, stacked

if TYPE_CHECKING:
    from typing_extensions import Self

State = Tensor | tuple[Tensor, Tensor]


class Int8Recurrent(CompressedLayer):
    """What both have in common.

    Called as the dense layer is: a tensor [steps, batch, input_size], or batch first, or without the batch, or a
    ``PackedSequence``; and the states to begin with, zeros where they are not given. What comes out is what the dense layer gives,
    in the dtype of the input. Every row of the input, and of the hidden state at every step, is quantized as it comes; a row with
    NaN or Inf gives NaN from there on.

    State: of each matrix, by torch's name for it, ``int8_ih_l0_values`` int8 [n, k] and ``int8_ih_l0_scale`` float32 [n];
    ``bias`` float32, those of all matrices one behind another.

    Who reads it as the dense layer finds ``weight_ih_l0``, ``bias_hh_l0_reverse`` and so on, and ``all_weights``, decompressed
    where their numbers are used, and ``bias``: whether there is one. It has no ``weight``.
    """

    weight_type = Int8RecurrentWeight
    default_method = Int8()
    kind: Recurrent
    geometry: RecurrentGeometry

    computes = "run"

    activation_bits: int = setting("activation_bits", "8 or 7.")
    weight_bits: int = setting("weight_bits", "8 or 7.")

    def __init__(self, weight: Int8RecurrentWeight, geometry: RecurrentGeometry, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias, geometry=geometry)

    @classmethod
    def from_weight(cls, weight: Int8RecurrentWeight, bias: Tensor | None = None, *, batch_first: bool = False) -> Self:
        """From a canonical weight; bias float [n], that of each row of each matrix, or None."""
        own = (weight.input_size, weight.hidden_size, weight.num_layers)
        return cls(weight, RecurrentGeometry(*own, batch_first, weight.bidirectional), bias)

    @classmethod
    def build(cls, weight: Any, geometry: Any, bias: Tensor | None = None, activation: str = "none") -> Self:
        if activation != "none":
            raise ValueError(f"{cls.__name__}: activation is {activation!r}, expected 'none'")
        return cls(weight, geometry, bias)

    @classmethod
    def misfit(cls, geometry: Any, settings: Mapping[str, Any] | None = None) -> str:
        """Why such a layer cannot have a geometry, or a weight of these settings; '' where it can."""
        if geometry is None or settings is None:
            return ""
        own = geometry.settings()
        wanted = {name: own.get(name, cls.kind.cell) for name in Int8RecurrentWeight.options_of_shape()}
        found = {name: settings[name] for name in wanted}
        return "" if found == wanted else f"the weight is that of {found}, expected {wanted}"

    @property
    def label(self) -> str:
        """What a table calls the method: ``int8``."""
        return "int8"

    # --- the call -------------------------------------------------------------------------------------------------

    def forward(self, input: Any, hx: Any = None) -> Any:  # noqa: A002 - the name that nn.LSTM gives it
        own, name = self.geometry, type(self).__name__
        if self.training and own.dropout and own.num_layers > 1:
            raise RuntimeError(
                f"{name}: it is in training mode, with dropout {own.dropout} between its layers, expected eval(): a compressed "
                "layer has no dropout"
            )
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        check_float(name, input)
        steps = 1 if own.batch_first and input.dim() == 3 else 0
        if input.dim() not in (2, 3) or input.shape[-1] != own.input_size or input.shape[steps] == 0:
            lead = "batch, steps" if own.batch_first else "steps, batch"
            raise ValueError(
                f"{name}: x is {list(input.shape)}, expected [{lead}, {own.input_size}] or [steps, {own.input_size}]"
            )
        unbatched = input.dim() == 2
        x = input[:, None] if unbatched else input.transpose(0, 1) if own.batch_first else input
        states = self._states(hx, x.shape[1], x, unbatched)
        y, *last = self.run(x, states, None)
        if unbatched:
            return y[:, 0], self._given([one[:, 0] for one in last])
        return y.transpose(0, 1) if own.batch_first else y, self._given(last)

    def run(self, x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
        """The op: x with the steps first, or the rows of a packed sequence -> y and the last states."""
        c = states[1] if len(states) == 2 else None
        return ops.int8_recurrent(x, self.packed, self.form, self.bias32, states[0], c, batch_sizes)

    def _packed(self, x: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        states = self._states(hx, int(x.batch_sizes[0]), x.data, unbatched=False)
        if x.sorted_indices is not None:
            states = [one if hx is None else one.index_select(1, x.sorted_indices) for one in states]
        check_float(type(self).__name__, x.data)
        y, *last = self.run(x.data, states, x.batch_sizes)
        if x.unsorted_indices is not None:
            last = [one.index_select(1, x.unsorted_indices) for one in last]
        return PackedSequence(y, x.batch_sizes, x.sorted_indices, x.unsorted_indices), self._given(last)

    def _states(self, hx: Any, batch: int, x: Tensor, unbatched: bool) -> list[Tensor]:
        """h and, of an LSTM, c, as the op takes them."""
        own, name = self.geometry, type(self).__name__
        shape = (own.num_layers * own.directions, batch, own.hidden_size)
        count = 2 if self.kind.cell == "lstm" else 1
        if hx is None:
            return [x.new_zeros(shape) for _ in range(count)]
        states = list(hx) if count == 2 and isinstance(hx, (tuple, list)) else [hx]
        if len(states) != count or not all(isinstance(one, Tensor) for one in states):
            expected = "a tuple (h, c) of tensors" if count == 2 else "a tensor h"
            raise TypeError(f"{name}: hx is {type(hx).__name__}, expected {expected}, or None")
        wanted = (shape[0], shape[2]) if unbatched else shape
        for one in states:
            if tuple(one.shape) != wanted or one.dtype != x.dtype:
                raise ValueError(
                    f"{name}: a state in hx is {one.dtype} {list(one.shape)}, expected {x.dtype} {list(wanted)}"
                )
        return [one[:, None] if unbatched else one for one in states]

    @staticmethod
    def _given(states: list[Tensor]) -> State:
        """As the dense layer gives it."""
        return (states[0], states[1]) if len(states) == 2 else states[0]

    # --- read as the dense layer ------------------------------------------------------------------------------------

    def _named(self) -> dict[str, tuple[int, Matrix]]:
        """What torch calls each weight and each bias: which matrix it is of."""
        names = ("weight", "bias") if self.bias else ("weight",)
        of = self.geometry.matrices(self.kind.cell)
        return {f"{name}_{matrix.name}": (i, matrix) for i, matrix in enumerate(of) for name in names}

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("weight_ih_l", "weight_hh_l", "bias_ih_l", "bias_hh_l")) and "_buffers" in self.__dict__:
            found = self._named().get(name)
            if found is not None:
                return self._one(name, *found)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith(("weight_ih_l", "weight_hh_l", "bias_ih_l", "bias_hh_l")):
            raise AttributeError(
                f"{type(self).__name__}: {name} is compressed and cannot be set: put a dense layer in its place, or one made by "
                "from_weight"
            )
        super().__setattr__(name, value)

    def _one(self, name: str, i: int, matrix: Matrix) -> Tensor:
        packed, dtype, form, bias = self.packed, self.dtype, self.form, self.bias32
        device = packed.device

        def floats() -> Tensor:
            if name.startswith("bias"):
                assert bias is not None
                return bias[matrix.rows].to(dtype)
            return _matrix(packed, form, i).to(device, dtype)

        shape = (matrix.n,) if name.startswith("bias") else (matrix.n, matrix.k)
        if packed.is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        if is_compiling() or is_traced() or type(packed) is not Tensor:
            return floats()
        like = torch.empty(shape, dtype=dtype, device="meta")
        return LazyTensor(f"{name} of a {type(self).__name__}, which keeps it compressed", packed, floats, like)

    @property
    def weight(self) -> NoReturn:
        """None: the dense layer has none of this name."""
        raise AttributeError(f"{type(self).__name__} has no weight, expected weight_ih_l0 and so on")

    @property
    def bias(self) -> bool:  # type: ignore[override]
        """Whether there is one, as the dense layer says it. What is added is :attr:`bias32`."""
        return self.bias32 is not None

    @property
    def _flat_weights_names(self) -> list[str]:
        pairs = (
            (matrix.name, name) for matrix in self.geometry.matrices(self.kind.cell)[::2] for name in ("weight", "bias")
        )
        return [
            f"{name}_{which}{of[2:]}" for of, name in pairs if name == "weight" or self.bias for which in ("ih", "hh")
        ]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @property
    def _all_weights(self) -> list[list[str]]:
        names, count = self._flat_weights_names, 4 if self.bias else 2
        return [names[i : i + count] for i in range(0, len(names), count)]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """As the dense layer has it: a list for each layer and direction."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _flat_weight_refs(self) -> list[None]:
        return [None for _ in self._flat_weights_names]

    def flatten_parameters(self) -> None:
        """Does nothing: there is nothing to flatten."""

    def _details(self) -> str:
        return f"activation_bits={self.activation_bits}, weight_bits={self.weight_bits}"

    def dense(self) -> Tensor:
        """All matrices, one below another: float32 [n, k]."""
        count = len(self.geometry.matrices(self.kind.cell))
        return stacked([_matrix(self.packed, self.form, i) for i in range(count)], self.k)

    # --- state ------------------------------------------------------------------------------------------------------

    def _pack(self, parts: Mapping[str, Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, str]:
        there = {name: part.detach().cpu() for name, part in parts.items()}
        packed, form = packing.pack(there, (self.n, self.k), self.settings)
        return packed.to(device), form

    def _unpack(self) -> dict[str, Tensor]:
        found = packing.unpack(self.packed.cpu(), self.form)
        of = self.geometry.matrices(self.kind.cell)
        return {f"{m.name}_{name}": part for m, parts in zip(of, found, strict=True) for name, part in parts.items()}


def _matrix(packed: Tensor, form: str, i: int) -> Tensor:
    """float32 [n, k], by an operator that a compiler can take into its graph."""
    piece = packing.read(form).pieces[i]
    return ops.OPS["int8"].dense(piece.of(packed), piece.form)


class Int8LSTM(Int8Recurrent):
    """An ``nn.LSTM`` whose matrices are int8: ``y, (h, c) = lstm(x, (h0, c0))``. See :class:`Int8Recurrent`."""

    kind = LSTM


class Int8GRU(Int8Recurrent):
    """An ``nn.GRU`` whose matrices are int8: ``y, h = gru(x, h0)``. See :class:`Int8Recurrent`."""

    kind = GRU
