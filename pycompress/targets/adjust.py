"""Adjusting a network to a platform: what a target lacks is changed in a copy of the model, and what that costs is measured.

An adjustment either puts other modules in the places of some (an activation in another form), or changes what goes in and comes out
(images as bytes, channels last), for which the model gets hooks: its parts, their names and its signature stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pycompress.calls import Inputs
from pycompress.passes.activations import activation_name
from pycompress.surgery import compressed_layers, swap


class Adjustment(ABC):
    """Attributes:
    name: in ``deploy(adjust=...)``.
    what: is changed, in a few words.
    """

    name: ClassVar[str]
    what: ClassVar[str]

    @abstractmethod
    def apply(self, model: nn.Module, inputs: Inputs) -> int:
        """Changes the model in place. Returns in how many places; 0 where there is nothing to change."""

    def given(self, x: Tensor) -> Tensor:
        """What an adjusted model takes in the place of a tensor among the inputs."""
        return x

    def taken(self, y: Tensor) -> Tensor:
        """What an adjusted model gives in the place of a tensor among the outputs."""
        return y


class _Activation(Adjustment):
    """One activation in the place of another, in compressed layers and as a module of its own."""

    before: ClassVar[str]
    after: ClassVar[str]
    module: ClassVar[Callable[[], nn.Module]]

    def apply(self, model: nn.Module, inputs: Inputs) -> int:  # noqa: ARG002
        fused = [layer for layer in compressed_layers(model).values() if layer.activation == self.before]
        for layer in fused:
            layer.activation = self.after
        alone = [module for module in model.modules() if activation_name(module) == self.before]
        swap(model, {module: type(self).module() for module in alone})
        return len(fused) + len(alone)


class GeluTanh(_Activation):
    name, what = "gelu_tanh", "GELU in its tanh form"
    before, after = "gelu", "gelu_tanh"
    module = staticmethod(lambda: nn.GELU("tanh"))


class HardSwish(_Activation):
    name, what = "hardswish", "SiLU as hard-swish"
    before, after = "silu", "hardswish"
    module = nn.Hardswish


class PlainNorm(nn.Module):
    """``nn.LayerNorm`` in single operators."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self._dims, self._eps = [-1 - i for i in range(len(norm.normalized_shape))], norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        off = x - x.mean(self._dims, keepdim=True)
        y = off / ((off * off).mean(self._dims, keepdim=True) + self._eps).sqrt()
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


class PlainNorms(Adjustment):
    name, what = "plain_norms", "layer norms in single operators"

    def apply(self, model: nn.Module, inputs: Inputs) -> int:  # noqa: ARG002
        norms = [module for module in model.modules() if type(module) is nn.LayerNorm]
        swap(model, {norm: PlainNorm(norm) for norm in norms})
        return len(norms)


class EagerAttention(Adjustment):
    name, what = "eager_attention", "attention as products and a softmax, in models of transformers"

    def apply(self, model: nn.Module, inputs: Inputs) -> int:  # noqa: ARG002
        found = (getattr(module, "config", None) for module in model.modules())
        configs = {id(one): one for one in found if getattr(one, "_attn_implementation", "eager") != "eager"}
        for config in configs.values():
            config._attn_implementation = "eager"  # type: ignore[union-attr]
        return len(configs)


class _Format(Adjustment):
    """Another form of inputs or outputs, which the model's own is made from by a hook."""

    def apply(self, model: nn.Module, inputs: Inputs) -> int:
        count = sum(self._takes(x) for x in _tensors(inputs))
        if count:
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
            model.register_forward_hook(self._after)
        return count

    def _before(self, _: nn.Module, args: Any, keywords: Any) -> Any:
        return pytree.tree_map_only(Tensor, self.own, (args, keywords))

    def _after(self, _: nn.Module, __: Any, result: Any) -> Any:
        return pytree.tree_map_only(Tensor, self.taken, result)

    def given(self, x: Tensor) -> Tensor:
        return self.changed(x) if self._takes(x) else x

    @abstractmethod
    def _takes(self, x: Tensor) -> bool:
        """Whether an input of the model is one that changes."""

    @abstractmethod
    def changed(self, x: Tensor) -> Tensor:
        """Such an input in the other form."""

    @abstractmethod
    def own(self, x: Tensor) -> Tensor:
        """The inverse, of any input."""


class ChannelsLast(_Format):
    name, what = "nhwc", "images with their channels last, in and out"

    def _takes(self, x: Tensor) -> bool:
        return x.dim() == 4

    def changed(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).contiguous()

    def own(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self._takes(x) else x

    def taken(self, y: Tensor) -> Tensor:
        return y.permute(0, 2, 3, 1) if y.dim() == 4 else y


class Int32Tokens(_Format):
    name, what = "int32_tokens", "tokens and masks as int32"

    def _takes(self, x: Tensor) -> bool:
        return x.dtype == torch.int64

    def changed(self, x: Tensor) -> Tensor:
        if x.numel() and int(x.abs().max()) >= 2**31:
            raise ValueError(f"deploy: {self.name}: an input holds {int(x.abs().max())}, expected less than 2^31")
        return x.to(torch.int32)

    def own(self, x: Tensor) -> Tensor:
        return x.long() if x.dtype == torch.int32 else x


@dataclass(frozen=True)
class Uint8Images(_Format):
    """Images [images, channels, height, width] as bytes: the model gets (x / 255 - mean) / std, which is in the file then.

    Attributes:
        mean, std: a number for each channel, or one for all, as the images of the model were normalised with.
    """

    name: ClassVar[str] = "uint8_images"
    what: ClassVar[str] = "images as bytes, their normalisation inside"
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)

    def _takes(self, x: Tensor) -> bool:
        return x.dim() == 4 and x.is_floating_point()

    def changed(self, x: Tensor) -> Tensor:
        mean, std = self._by_channel(x)
        return ((x * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def own(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.dtype != torch.uint8:
            return x
        mean, std = self._by_channel(x)
        return (x.float() - 255 * mean) / (255 * std)

    def _by_channel(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, x.shape[1]):
                raise ValueError(f"deploy: {self.name}: {name} has {len(values)} numbers, expected 1 or {x.shape[1]}")
        if min(self.std) <= 0:
            raise ValueError(f"deploy: {self.name}: std is {tuple(self.std)}, expected positive numbers")
        numbers = (torch.tensor([*values], dtype=torch.float32, device="cpu") for values in (self.mean, self.std))
        mean, std = (one.view(1, -1, 1, 1) for one in numbers)
        return mean, std


ADJUSTMENTS: dict[str, Callable[[], Adjustment]] = {
    one.name: one for one in (GeluTanh, HardSwish, PlainNorms, EagerAttention, ChannelsLast, Int32Tokens, Uint8Images)
}


def adjustments(asked: str | Adjustment | Iterable[str | Adjustment]) -> list[Adjustment]:
    """In the order in which they are applied.

    Raises ValueError for a name that is not known, and one that comes twice; TypeError for anything else.
    """
    if isinstance(asked, str | Adjustment):
        asked = [asked]
    found: list[Adjustment] = []
    for one in asked:
        if not isinstance(one, str | Adjustment):
            raise TypeError(f"deploy: adjust holds a {type(one).__name__}, expected names or adjustments")
        if isinstance(one, str) and one not in ADJUSTMENTS:
            raise ValueError(f"deploy: adjust has {one!r}, expected of {', '.join(ADJUSTMENTS)}")
        made = ADJUSTMENTS[one]() if isinstance(one, str) else one
        if any(made.name == other.name for other in found):
            raise ValueError(f"deploy: adjust has {made.name} twice, expected it once")
        found.append(made)
    return sorted(
        found, key=lambda one: one.name == ChannelsLast.name
    )  # last: the others know images as the model does


def given(inputs: Inputs, adjustment: Adjustment) -> Inputs:
    """The inputs for an adjusted model."""
    return pytree.tree_map_only(Tensor, adjustment.given, inputs)  # type: ignore[no-any-return]


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
