"""``CompressedLayer``: what all compressed layers have in common: one packed weight, and a state that is canonical."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.kinds import Kind, kind_of
from pycompress.methods.method import Method
from pycompress.weights import Weight

if TYPE_CHECKING:
    from typing_extensions import Self


def setting(name: str, doc: str) -> Any:
    """A property: what the layer's settings have under a name, or None."""
    return property(lambda layer: layer.settings.get(name), doc=doc)


class CompressedLayer(nn.Module):
    """A layer with a compressed weight [n, k].

    The module keeps the weight once, in the layout of the kernel that runs here (``packed``). What is canonical is derived from it:
    ``state_dict()``, pickles and saved files hold the tensors of the canonical weight, so they can be read on any processor.

    Attributes:
        n, k: outputs, and inputs that each is made of: the shape of the canonical weight.
        settings: what the canonical weight is besides its tensors (:meth:`Weight.settings`).
        form: how ``packed`` lies in memory (:mod:`pycompress.ops.form`).
        op: what packs, unpacks and multiplies such weights; None for layers made of torch's own operators.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``, fused behind the product.
        geometry: what its kind has to know besides weight and bias; None for a linear layer.
        has_cuda_kernels: whether the layer runs on a CUDA device; others can be moved there, but not called.

    The bias stays float32 whatever ``.to(dtype)`` says.
    """

    weight_type: ClassVar[type[Weight]]
    op: ClassVar[ops.Op | None] = None
    default_method: ClassVar[Method]
    kind: ClassVar[Kind]  # of the dense layer whose place it takes
    has_cuda_kernels: ClassVar[bool] = False

    bias: Tensor | None
    packed: Tensor

    def __init__(
        self, weight: Weight, bias: Tensor | None = None, activation: str = "none", geometry: Any = None
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        if not isinstance(weight, self.weight_type):
            raise TypeError(f"{kind}: the weight is {type(weight).__name__}, expected {self.weight_type.__name__}")
        if activation not in ops.ACTIVATIONS:
            raise ValueError(f"{kind}: activation is {activation!r}, expected one of {', '.join(ops.ACTIVATIONS)}")
        self.n, self.k = weight.shape
        self.settings = weight.settings()
        self.activation = activation
        self.geometry = geometry
        if reason := self.misfit(geometry, self.settings):
            raise ValueError(f"{kind}: {reason}")
        if bias is not None:
            if bias.shape != (self.n,):
                raise ValueError(f"{kind}: bias is {list(bias.shape)}, expected [{self.n}]")
            bias = bias.detach().to("cpu", torch.float32, copy=True)
            if not torch.isfinite(bias).all():
                raise ValueError(f"{kind}: the bias holds NaN or Inf, expected finite values")
        packed, self.form = self._pack(weight.parts())
        self.register_buffer("bias", bias)
        self.register_buffer("packed", packed, persistent=False)

    @classmethod
    def from_dense(cls, dense: nn.Module, method: Method | None = None, activation: str = "none") -> Self:
        """From a dense layer, pruned by torch or not. Raises ValueError where its weight holds NaN or Inf."""
        kind = cls._kind_of(dense)
        if reason := cls.misfit(kind.geometry(dense)):
            raise ValueError(f"{cls.__name__}: {reason}")
        weight = kind.fitted(method or cls.default_method, dense).compress(kind.matrix(dense))
        return cls.replacing(dense, weight, activation)

    @classmethod
    def replacing(cls, dense: nn.Module, weight: Weight, activation: str = "none") -> Self:
        """What takes the place of a dense layer, whose weight is compressed already. Raises TypeError for another kind."""
        kind = cls._kind_of(dense)
        return cls.build(weight, kind.geometry(dense), kind.bias(dense), activation)

    @classmethod
    def _kind_of(cls, dense: nn.Module) -> Kind:
        kind = kind_of(dense)
        if kind is None or kind.name != cls.kind.name:
            raise TypeError(f"{cls.__name__}: the dense layer is {type(dense).__name__}, expected {cls.kind.title}")
        return kind

    @classmethod
    def build(cls, weight: Weight, geometry: Any, bias: Tensor | None = None, activation: str = "none") -> Self:
        """From a canonical weight and the geometry of its kind: how all layers of the table are made."""
        return cls(weight, geometry=geometry, bias=bias, activation=activation)

    @classmethod
    def misfit(cls, geometry: Any, settings: Mapping[str, Any] | None = None) -> str:  # noqa: ARG003
        """Why such a layer cannot have a geometry, or a weight of these settings; '' where it can. None: not known yet."""
        return ""

    # --- what a subclass has of its own ---------------------------------------------------------------------------

    def extra_repr(self) -> str:
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        sizes = self.kind.describe(self.n, self.k, self.geometry)
        bias = f", bias={self.bias is not None}" if self.kind.epilogue else ""
        return f"{sizes}{bias}, {self._details()}{fused}"

    def _details(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        return self.kind.weight_shape(self.n, self.k, self.geometry)

    @property
    def weight(self) -> Tensor:
        """The dense layer's, float32, made at each access."""
        if self.packed.is_meta:
            return torch.empty(self.dense_shape, device="meta")
        weight: Tensor = self.canonical().decompress()
        return weight.view(self.dense_shape)

    @property
    def label(self) -> str:
        """What a table calls the method."""
        return self.weight_type.name

    # --- state: canonical outside, packed inside ------------------------------------------------------------------

    def _expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self.weight_type.expected((self.n, self.k), self.settings)

    def _pack(self, parts: Mapping[str, Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, str]:
        """The parts of a canonical weight with the layer's shape and settings -> the packed vector there, and its form."""
        assert self.op is not None
        return self.op.pack(parts, (self.n, self.k), self.settings, device)

    def _unpack(self) -> dict[str, Tensor]:
        """The parts that went into ``packed``."""
        assert self.op is not None
        return self.op.unpack(self.packed, self.form)

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the canonical weight, unpacked at each call; on the meta device without data, as the layer's own are."""
        if self.packed.is_meta:
            return {
                name: torch.empty(size, dtype=kind, device="meta") for name, (size, kind) in self._expected().items()
            }
        parts = self._unpack()
        return {stored: parts[name] for name, stored in self.weight_type.names(self.settings).items()}

    @property
    def weight_scale(self) -> Tensor | None:
        """float32 [n], one per output channel, unpacked at each access; None where the weight has no such scale."""
        return self._tensors()["weight_scale"] if "weight_scale" in self._expected() else None

    def canonical(self) -> Any:
        """The canonical weight, a ``weight_type`` on the CPU, unpacked at each call."""
        tensors = {name: tensor.cpu() for name, tensor in self._tensors().items()}
        return self.weight_type.from_tensors((self.n, self.k), tensors, self.settings)

    def canonical_bytes(self) -> int:
        """Size of the tensors of the canonical weight, which is not unpacked for it."""
        return sum(math.prod(size) * kind.itemsize for size, kind in self._expected().values())

    def same_weight(self, other: CompressedLayer) -> bool:
        """Whether the canonical weights are equal: they are packed alike then."""
        if type(self) is not type(other) or (self.settings, self.form) != (other.settings, other.form):
            return False
        return self.packed is other.packed or torch.equal(self.packed, other.packed)

    def share(self, other: CompressedLayer) -> None:
        """Use the packed weight of ``other``, whose canonical weight is the same (tied weights)."""
        self.packed, self.form = other.packed, other.form

    def tie(self, earlier: list[CompressedLayer]) -> bool:
        """Shares the packed weight of the first of the earlier layers whose weight is the same; joins these where there is none.
        Returns whether there was one."""
        for other in earlier:
            if other.same_weight(self):
                self.share(other)
                return True
        earlier.append(self)
        return False

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._tensors().items():
            destination[prefix + name] = tensor
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,  # noqa: ARG002
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        names = [*self._expected(), *([] if self.bias is None else ["bias"])]
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        missing = [prefix + name for name in names if name not in found]
        if strict:
            missing_keys += missing
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in names]
        if not found:
            return
        try:  # all of it or nothing, also where load_state_dict(strict=False) forgives what is missing
            fresh = self._with_tensors(found)
            if self.packed.is_cuda:
                fresh.to(self.packed.device)
        except (TypeError, ValueError, RuntimeError) as error:
            error_msgs.append(f"{prefix}{', '.join(names[:-1])} or {names[-1]}: {error}")
            return
        if not missing:
            self.packed, self.form, self.bias, self.settings = fresh.packed, fresh.form, fresh.bias, fresh.settings

    def _with_tensors(self, found: Mapping[str, Any]) -> Self:
        """A layer like this one with other tensors: any of the canonical weight's and the bias."""
        for name, value in found.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")
        tensors = {name: value.detach().cpu() for name, value in found.items() if name != "bias"}
        if tensors.keys() != self._expected().keys():
            tensors = {**self._tensors(), **tensors}
        settings = self.weight_type.measured(tensors, self.settings)  # another rank, more or fewer non-zeros
        weight = self.weight_type.from_tensors((self.n, self.k), tensors, settings)
        return self.build(weight, self.geometry, found.get("bias", self.bias), self.activation)

    def __getstate__(self) -> dict[str, Any]:
        # A pickle may be opened on another processor, so it holds the canonical weight.
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, **self._tensors()}
        del state["_buffers"]["packed"], state["form"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        names = self.weight_type.names(self.settings)
        parts: dict[str, Any] = {name: self._buffers.pop(stored) for name, stored in names.items()}
        self._buffers.pop("weight_scale", None)  # None in older pickles
        self._buffers["packed"], self.form = self._pack(parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Without the detour over __getstate__: nothing to unpack here, and layers that share a weight go on sharing it.
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: ARG002
        # `.to(dtype)`, `.half()` and the like are meant for activations: the bias follows the device, not the dtype.
        moved: dict[str, Tensor] = {}  # all of them or, where packing refuses, none
        form = self.form
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            if name == "packed" and self._packs_anew(buffer.device, there := fn(buffer.new_empty(0)).device):
                moved[name], form = self._pack(self._unpack(), there)
                continue
            applied = fn(buffer)
            moved[name] = applied if applied.dtype == buffer.dtype else buffer.to(applied.device)
        self._buffers.update(moved)
        self.form = form
        return self

    def _packs_anew(self, old: torch.device, new: torch.device) -> bool:
        """Whether the layer's kernels read another layout on the new device."""
        return self.has_cuda_kernels and {old.type, new.type} == {"cpu", "cuda"}
