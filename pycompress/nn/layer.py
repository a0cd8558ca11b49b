"""``CompressedLayer``: what all compressed layers have in common: one packed weight, and a state that is canonical."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.methods.weight import Method, Weight
from pycompress.nn.dense import dense_weight
from pycompress.nn.geometry import Conv2dGeometry

if TYPE_CHECKING:
    from typing_extensions import Self


class CompressedLayer(nn.Module):
    """A layer with a compressed weight [n, k].

    The module keeps the weight once, in the layout of the kernel that runs here (``packed``). What is canonical is derived from it:
    ``state_dict()``, pickles and saved files hold the tensors of the canonical weight, so they can be read on any processor.

    Attributes:
        n, k: outputs, and inputs that each is made of: the shape of the canonical weight.
        settings: what the canonical weight is besides its tensors (:meth:`Weight.settings`).
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``, fused behind the product.
        geometry: of a convolution; None for a linear layer.
        has_cuda_kernels: whether the layer runs on a CUDA device; others can be moved there, but not called.

    Scale and bias stay float32 whatever ``.to(dtype)`` says.
    """

    weight_type: ClassVar[type[Weight]]
    default_method: ClassVar[Method]
    dense_kind: ClassVar[str]  # the class of the dense layer whose place it takes
    geometry: Conv2dGeometry | None = None
    has_cuda_kernels: ClassVar[bool] = False

    weight_scale: Tensor | None
    bias: Tensor | None
    packed: Tensor

    def __init__(self, weight: Weight, bias: Tensor | None = None, activation: str = "none") -> None:
        super().__init__()
        kind = type(self).__name__
        if not isinstance(weight, self.weight_type):
            raise TypeError(f"{kind}: the weight is {type(weight).__name__}, expected {self.weight_type.__name__}")
        if activation not in ops.ACTIVATIONS:
            raise ValueError(f"{kind}: activation is {activation!r}, expected one of {', '.join(ops.ACTIVATIONS)}")
        self.n, self.k = weight.shape
        self.settings = weight.settings()
        self.activation = activation
        if bias is not None:
            if bias.shape != (self.n,):
                raise ValueError(f"{kind}: bias is {list(bias.shape)}, expected [{self.n}]")
            bias = bias.detach().to("cpu", torch.float32, copy=True)
            if not torch.isfinite(bias).all():
                raise ValueError(f"{kind}: the bias holds NaN or Inf, expected finite values")
        tensors = weight.tensors()
        scale = tensors.get("weight_scale")
        self.register_buffer("weight_scale", None if scale is None else scale.clone())
        self.register_buffer("bias", bias)
        self.register_buffer("packed", self._pack(tensors), persistent=False)

    @classmethod
    def from_dense(cls, dense: nn.Module, method: Method | None = None, activation: str = "none") -> Self:
        """From a dense layer, pruned by torch or not. Raises ValueError where its weight holds NaN or Inf."""
        return cls.replacing(dense, (method or cls.default_method).compress(dense_weight(dense)), activation)

    @classmethod
    def replacing(cls, dense: nn.Module, weight: Weight, activation: str = "none") -> Self:
        """What takes the place of a dense layer, whose weight is compressed already. Raises TypeError for another kind."""
        raise NotImplementedError

    # --- what a subclass has of its own ---------------------------------------------------------------------------

    def _pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensors of a canonical weight with the layer's shape and settings -> the packed vector (uint8)."""
        raise NotImplementedError

    def _unpack(self) -> dict[str, Tensor]:
        """The tensors that went into ``packed``: all of the canonical weight's but ``weight_scale``."""
        raise NotImplementedError

    def _with_weight(self, weight: Weight, bias: Tensor | None) -> Self:
        """A layer like this one with another weight and bias."""
        raise NotImplementedError

    def _sizes(self) -> str:
        """The dense layer's own arguments, for ``repr``."""
        raise NotImplementedError

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        raise NotImplementedError

    @staticmethod
    def _dense(packed: Tensor, shape: tuple[int, int], scale: Tensor | None) -> Tensor:
        """float32 [n, k], of tensors alone: it runs inside compiled graphs."""
        raise NotImplementedError

    def _settings_with(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:  # noqa: ARG002
        """The settings under which the layer takes these tensors from a state dict; usually its own."""
        return self.settings

    def extra_repr(self) -> str:
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        return f"{self._sizes()}, bias={self.bias is not None}, {self._details()}{fused}"

    def _details(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())

    @property
    def label(self) -> str:
        """What a table calls the method."""
        return self.weight_type.name

    # --- state: canonical outside, packed inside ------------------------------------------------------------------

    def _expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self.weight_type.expected((self.n, self.k), self.settings)

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the canonical weight, unpacked at each call; on the meta device without data, as the layer's own are."""
        if self.packed.is_meta:
            return {
                name: torch.empty(size, dtype=kind, device="meta") for name, (size, kind) in self._expected().items()
            }
        tensors = self._unpack()
        return tensors if self.weight_scale is None else {**tensors, "weight_scale": self.weight_scale}

    def canonical(self) -> Weight:
        """The canonical weight, unpacked at each call."""
        return self.weight_type.from_tensors((self.n, self.k), self._tensors(), self.settings)

    def canonical_bytes(self) -> int:
        """Size of the tensors of the canonical weight, which is not unpacked for it."""
        return sum(math.prod(size) * kind.itemsize for size, kind in self._expected().values())

    def same_weight(self, other: CompressedLayer) -> bool:
        """Whether the canonical weights are equal: they are packed alike then."""
        if type(self) is not type(other) or self.settings != other.settings:
            return False
        pairs = [(self.packed, other.packed), (self.weight_scale, other.weight_scale)]
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def share(self, other: CompressedLayer) -> None:
        """Use the packed weight of ``other``, whose canonical weight is the same (tied weights)."""
        self.packed, self.weight_scale = other.packed, other.weight_scale

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._tensors().items():
            if name not in self._buffers:
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
            self.packed, self.weight_scale, self.bias = fresh.packed, fresh.weight_scale, fresh.bias
            self.settings = fresh.settings

    def _with_tensors(self, found: Mapping[str, Any]) -> Self:
        """A layer like this one with other tensors: any of the canonical weight's and the bias."""
        for name, value in found.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")
        tensors = {name: value.detach().cpu() for name, value in found.items() if name != "bias"}
        if tensors.keys() != self._expected().keys():
            tensors = {**self._tensors(), **tensors}
        weight = self.weight_type.from_tensors((self.n, self.k), tensors, self._settings_with(tensors))
        return self._with_weight(weight, found.get("bias", self.bias))

    def __getstate__(self) -> dict[str, Any]:
        # A pickle may be opened on another processor, so it holds the canonical weight.
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, **self._tensors()}
        del state["_buffers"]["packed"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        tensors = {name: self._buffers[name] for name in self._expected()}
        for name in tensors.keys() - {"weight_scale"}:
            del self._buffers[name]
        self._buffers["packed"] = self._pack(tensors)  # type: ignore[arg-type]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Without the detour over __getstate__: nothing to unpack here, and layers that share a weight go on sharing it.
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: ARG002
        # `.to(dtype)`, `.half()` and the like are meant for activations: scale and bias follow the device, not the dtype.
        moved: dict[str, Tensor] = {}  # all of them or, where packing refuses, none
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            if name == "packed" and self._packs_anew(buffer.device, there := fn(buffer.new_empty(0)).device):
                moved[name] = self._pack({key: tensor.to(there) for key, tensor in self._unpack().items()})
                continue
            applied = fn(buffer)
            moved[name] = applied if applied.dtype == buffer.dtype else buffer.to(applied.device)
        self._buffers.update(moved)
        return self

    def _packs_anew(self, old: torch.device, new: torch.device) -> bool:
        """Whether the layer's kernels read another layout on the new device."""
        return self.has_cuda_kernels and {old.type, new.type} == {"cpu", "cuda"}


# The activations, for the layers that autograd differentiates.
DIFFERENTIABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda y: nn.functional.gelu(y, approximate="tanh"),
    "silu": nn.functional.silu,
}
