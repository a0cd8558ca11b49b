"""``CompressedLayer``: what all compressed layers have in common: one packed weight, and a state that is canonical."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from pycompress import ops
from pycompress.kinds import Kind, kind_of
from pycompress.methods.method import Method
from pycompress.nn import sharing
from pycompress.nn.dense_weight import LazyTensor, is_traced
from pycompress.weights import Weight
from pycompress.weights.weight import described

if TYPE_CHECKING:
    from typing_extensions import Self


RECORD = "_pycompress_record"  # where compress() leaves what it knew of a layer, which goes where the layer goes
REMARK = "_pycompress_remark"  # where a pass leaves what it did to a dense module, or why it did not


def setting(name: str, doc: str) -> Any:
    """A property: what the layer's settings have under a name, or None."""
    return property(lambda layer: layer.settings.get(name), doc=doc)


class CompressedLayer(nn.Module):
    """A layer with a compressed weight [n, k].

    The module keeps the weight once, in the layout of the kernel that runs here (``packed``). What is canonical is derived from it:
    ``state_dict()``, pickles and saved files hold the tensors of the canonical weight, so they can be read on any processor.

    Whoever reads it as if it were the dense layer finds ``weight``, and what else such a module has (``in_features``, ``stride``),
    with the meaning that it has there. In a state dict ``weight`` is one byte, the version of the weight's stored form: so a dense
    layer refuses the state of a compressed one, as a compressed layer does that of a dense one.

    Attributes:
        kind: of the module that it stands for.
        dtype: of that one's weight; ``.to(dtype)`` changes it.
        n, k: outputs, and inputs that each is made of: the shape of the canonical weight.
        settings: what the canonical weight is besides its tensors (:meth:`Weight.settings`).
        form: how ``packed`` lies in memory (:mod:`pycompress.ops.form`).
        op: what packs, unpacks and multiplies such weights; None for layers made of torch's own operators.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``quick_gelu``, ``relu6`` or ``hardswish``, fused behind
            the product.
        geometry: what its kind has to know besides weight and bias; None for a linear layer.
        computes: the name of the method that is compared with other implementations.
        has_cuda_kernels: whether the layer runs on a CUDA device; others can be moved there, but not called.

    What is added as the bias stays float32 whatever ``.to(dtype)`` says.
    """

    weight_type: ClassVar[type[Weight]]
    op: ClassVar[ops.Op | None] = None
    default_method: ClassVar[Method]
    kind: Kind
    computes: ClassVar[str] = "forward"
    has_cuda_kernels: ClassVar[bool] = False

    __slots__ = ("_lazy",)  # outside of the state: what `weight` gave last

    packed: Tensor
    dtype: torch.dtype
    _lazy: LazyTensor | None

    def __new__(cls, *_arguments: Any, **_keywords: Any) -> Self:
        layer = super().__new__(cls)
        layer._lazy = None
        return layer

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
        packed, self.form = self._pack(weight.parts())
        self._buffers["bias"] = None if bias is None else self._checked_bias(bias)
        self.register_buffer("packed", packed, persistent=False)
        self._stand_as(self.kind, torch.float32)

    def _checked_bias(self, bias: Any) -> Tensor:
        """float32 on the CPU, a copy."""
        kind = type(self).__name__
        if not isinstance(bias, Tensor):
            raise TypeError(f"{kind}: bias is {type(bias).__name__}, expected a tensor")
        if bias.shape != (self.n,):
            raise ValueError(f"{kind}: bias is {list(bias.shape)}, expected [{self.n}]")
        own = bias.detach().to("cpu", torch.float32, copy=True)
        if not torch.isfinite(own).all():
            raise ValueError(f"{kind}: the bias holds NaN or Inf, expected finite values")
        return own

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
        layer = cls.build(weight, kind.geometry(dense), kind.bias(dense), activation)
        layer.stand_for(dense)
        return layer

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

    # --- what it stands for ---------------------------------------------------------------------------------------

    def stand_for(self, module: nn.Module) -> None:
        """Takes over what a dense module, or a compressed layer, is besides its numbers: the kind, and the dtype of the weight."""
        if isinstance(module, CompressedLayer):
            self._stand_as(module.kind, module.dtype)
        else:
            kind = self._kind_of(module)
            self._stand_as(kind, kind.stored(module).dtype)

    def _stand_as(self, kind: Kind, dtype: torch.dtype) -> None:
        for name in self.kind.attributes(self.n, self.k, self.geometry):
            self.__dict__.pop(name, None)
        self.kind, self.dtype, self._lazy = kind, dtype, None
        self.__dict__.update(kind.attributes(self.n, self.k, self.geometry))

    # --- what a subclass has of its own ---------------------------------------------------------------------------

    def extra_repr(self) -> str:
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        sizes = self.kind.describe(self.n, self.k, self.geometry)
        bias = f", bias={self.bias32 is not None}" if self.kind.biased else ""
        return f"{sizes}{bias}, {self._details()}{fused}"

    def _details(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        return self.kind.weight_shape(self.n, self.k, self.geometry)

    @property
    def weight(self) -> Tensor:
        """The dense layer's, read-only: its numbers are decompressed where they are used; in a graph, by an operator."""
        if is_compiling() or is_traced():
            return self._dense_weight()
        lazy, packed = self._lazy, self._buffers["packed"]
        if lazy is None or lazy.memory is not packed or lazy.dtype is not self.dtype:
            assert packed is not None
            if type(packed) is not Tensor:
                return self._dense_weight()
            now = type(self).__new__(type(self))  # the layer as it is now, which does not keep the layer alive
            now.__dict__.update(self.__dict__, _buffers={"packed": packed})
            like = torch.empty(self.dense_shape, dtype=self.dtype, device="meta")
            subject = f"the dense weight of a {type(self).__name__}, which keeps it compressed"
            lazy = self._lazy = LazyTensor(subject, packed, now._dense_weight, like)
        return lazy

    @property
    def bias(self) -> Tensor | None:
        """The dense layer's, or None: in the dtype of its weight. What is added, and stands in the state, is :attr:`bias32`."""
        own = self.bias32
        if own is None or own.dtype == self.dtype:
            return own
        if is_compiling() or is_traced() or type(own) is not Tensor:
            return own.to(self.dtype)
        subject = f"the dense bias of a {type(self).__name__}, which keeps it in float32"
        like = torch.empty(own.shape, dtype=self.dtype, device="meta")
        return LazyTensor(subject, own, partial(own.to, self.dtype), like)

    @property
    def bias32(self) -> Tensor | None:
        """float32 [n], or None: what is added."""
        return self._buffers["bias"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__}: weight is compressed and cannot be set: put a dense layer in its place, or a layer made "
                "by from_weight"
            )
        super().__setattr__(name, value)

    def _dense_weight(self) -> Tensor:
        if self.packed.is_meta:
            return torch.empty(self.dense_shape, dtype=self.dtype, device="meta")
        device = self.packed.device.type
        if torch.is_autocast_enabled(device):  # it would round the factors of a product
            with torch.autocast(device, enabled=False):
                return self._dense_weight()
        return self.kind.as_weight(self.dense(), self.geometry).to(self.dtype)

    def dense(self) -> Tensor:
        """The decompressed matrix, float32 [n, k], by operators that a compiler can take into its graph."""
        if self.op is None:
            return self.canonical().decompress().to(self.packed.device)  # type: ignore[no-any-return]
        return self.op.dense(self.packed, self.form)

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

    def _shared_tensors(self) -> dict[str, Tensor]:
        """As :meth:`_tensors`, for what goes out: of layers that share their weight the same ones, while they are there."""
        return sharing.shared([self.packed], ("tensors", type(self), self.form), self._tensors)

    def _shared_packed(self, sources: list[Tensor], packed: Tensor, form: str) -> Tensor:
        """The packed weight that another layer made of these very tensors, else this one."""
        how = ("packed", type(self), self.n, self.k, json.dumps(self.settings), form)
        found: Tensor = sharing.shared(sources, how, lambda: {"packed": packed})["packed"]
        return found

    def canonical(self) -> Any:
        """The canonical weight, a ``weight_type`` on the CPU, unpacked at each call."""
        tensors = {name: tensor.cpu() for name, tensor in self._tensors().items()}
        return self.weight_type.from_tensors((self.n, self.k), tensors, self.settings)

    def canonical_bytes(self) -> int:
        """Size of the tensors of the canonical weight, which is not unpacked for it."""
        return sum(math.prod(size) * kind.itemsize for size, kind in self._expected().values())

    def same_weight(self, other: CompressedLayer) -> bool:
        """Whether the canonical weights are equal: they are packed alike then."""
        return type(self) is type(other) and self._has(other.packed, other.form, other.settings)

    def _has(self, packed: Tensor, form: str, settings: Mapping[str, Any]) -> bool:
        if (self.form, self.settings) != (form, settings):
            return False
        return self.packed is packed or torch.equal(self.packed, packed)

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
        for name, tensor in self._shared_tensors().items():
            destination[prefix + name] = tensor
        destination[prefix + "weight"] = torch.tensor(
            [self.weight_type.version], dtype=torch.uint8, device=self.packed.device
        )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        given = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        try:
            older = self._version_of(given)
            names = list(older.expected((self.n, self.k), self._settings_of(older)))
            tensors = {name: given[name] for name in names if name in given}
            mark = ["weight"] if "weight" in given or older is self.weight_type else []
            rest = [*mark, *([] if self.bias32 is None else ["bias"])]
            missing = [name for name in (*names, *rest) if name not in given]
            if strict:
                missing_keys += [prefix + name for name in missing]
                unexpected_keys += [prefix + name for name in given if name not in (*names, *rest)]
            # All of it or nothing, also where load_state_dict(strict=False) forgives what is missing.
            bias = self._checked_bias(given["bias"]) if "bias" in given and self.bias32 is not None else self.bias32
            if tensors and len(tensors) < len(names):
                raise ValueError(f"there are {', '.join(tensors)}, expected all of {', '.join(names)}")
            fresh = self._with_tensors(tensors, older) if tensors else None
        except (TypeError, ValueError, RuntimeError) as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        if fresh is None and missing == names:  # only the mark: left out as that of another layer, which shares it
            fresh = sharing.recall([self.packed], "loaded")
            missing = [] if fresh else missing
        if fresh and not missing:
            sharing.remember([self.packed], "loaded", fresh)
            if not self._has(fresh["packed"], fresh["form"], fresh["settings"]):
                vars(self).pop(RECORD, None)  # of the weight that was here
            self.packed, self.form, self.settings = fresh["packed"], fresh["form"], fresh["settings"]
            self._buffers["bias"] = None if bias is None else bias.to(self.packed.device)

    def _version_of(self, given: Mapping[str, Any]) -> type[Weight]:
        """The class with the tables of a state dict. Raises ValueError where it is that of a dense layer."""
        mark, present = given.get("weight"), self.weight_type
        if isinstance(mark, Tensor) and (mark.dtype, mark.shape) == (torch.uint8, (1,)):
            return present.of_version(int(mark))
        first = present.of_version(1)
        if first is not present:  # of version 1 there was no mark, and what is int8 or int4 had the name of the weight
            names = first.names(self._settings_of(first)).values()
            if all(name in given for name in names) or ("weight" not in given and any(name in given for name in names)):
                return first
        if "weight" in given:
            raise ValueError(
                f"it is {described(mark)}, expected the state of a {type(self).__name__}: that of a dense layer is loaded "
                "before it is compressed"
            )
        return present

    def _settings_of(self, weight_type: type[Weight]) -> dict[str, Any]:
        """The settings as a version of the weight's class had them: in the first one, of what is inside it the first one, too."""
        if weight_type is self.weight_type:
            return self.settings
        inside = {
            option.name: {**self.settings[option.name], "version": 1} for option in weight_type._nested(self.settings)
        }
        return {**self.settings, **inside}

    def _with_tensors(self, tensors: Mapping[str, Any], older: type[Weight]) -> dict[str, Any]:
        """What the layer is with the tensors of a version of its weight: ``packed``, ``form`` and ``settings``."""
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")
        there = {name: value.detach().cpu() for name, value in tensors.items()}
        measured = older.measured(there, self._settings_of(older))  # another rank, more or fewer non-zeros
        migrated, settings = self.weight_type.migrate(older.version, there, measured)
        weight = self.weight_type.from_tensors((self.n, self.k), migrated, settings)
        fresh = self.build(weight, self.geometry)
        if self.packed.is_cuda:
            fresh.to(self.packed.device)
        packed = fresh._shared_packed(list(tensors.values()), fresh.packed, fresh.form)
        return {"packed": packed, "form": fresh.form, "settings": fresh.settings}

    def __getstate__(self) -> dict[str, Any]:
        # A pickle may be opened on another processor, so it holds the canonical weight; but a child process that is being spawned
        # is here, and is handed the memory of tensors, which therefore have to live on.
        state = self.__dict__.copy()
        if get_spawning_popen() is not None:
            return state
        state["_buffers"] = {**self._buffers, **self._shared_tensors()}
        del state["_buffers"]["packed"], state["form"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "packed" in self._buffers:
            return
        names = self.weight_type.names(self.settings)
        if all(stored in self._buffers for stored in names.values()):
            tensors: dict[str, Any] = {part: self._buffers.pop(stored) for part, stored in names.items()}
            parts = tensors
        else:
            older = self.weight_type.of_version(1)
            then = self._settings_of(older)
            tensors = {name: self._buffers.pop(name) for name in older.expected((self.n, self.k), then)}
            weight = self.weight_type.from_tensors((self.n, self.k), *self.weight_type.migrate(1, tensors, then))
            parts, self.settings = weight.parts(), weight.settings()
        packed, self.form = self._pack(parts)
        self._buffers["packed"] = self._shared_packed(list(tensors.values()), packed, self.form)
        # In pickles of the first version it is None; and they know neither kind nor dtype.
        self._buffers.pop("weight_scale", None)
        self._stand_as(self.kind, self.__dict__.get("dtype", getattr(self.geometry, "dtype", torch.float32)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Without the detour over __getstate__: nothing to unpack here, and layers that share a weight go on sharing it.
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: ARG002
        # `.to(dtype)`, `.half()` and the like are meant for activations: the bias follows the device, not the dtype.
        def moved(buffer: Tensor) -> Tensor:
            applied = fn(buffer)
            return applied if applied.dtype == buffer.dtype else buffer.to(applied.device)

        def packed() -> dict[str, Any]:
            there = fn(self.packed.new_empty(0)).device
            if self._packs_anew(self.packed.device, there):
                return dict(zip(("packed", "form"), self._pack(self._unpack(), there), strict=True))
            return {"packed": moved(self.packed), "form": self.form}

        made = sharing.shared([self.packed], ("moved", type(self), sharing.Same(fn)), packed)
        rest = {
            name: moved(buffer) for name, buffer in self._buffers.items() if buffer is not None and name != "packed"
        }
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        self._buffers.update(rest, packed=made["packed"])  # all of them or, where packing refuses, none
        self.form, self.dtype = made["form"], dtype
        return self

    def _packs_anew(self, old: torch.device, new: torch.device) -> bool:
        """Whether the layer's kernels read another layout on the new device."""
        return self.has_cuda_kernels and {old.type, new.type} == {"cpu", "cuda"}
