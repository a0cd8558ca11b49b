"""What the families have in common: how a module is read, and how transformers calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycompress.nn import CompressedLayer
from pycompress.nn.assigned import original_class
from pycompress.nn.block import Description, Operands, Product, Unfit, child_at
from pycompress.ops.block_form import PRODUCTS, BlockForm
from pycompress.passes.activations import activation_name

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """Modules of one shape.

    Attributes:
        name: what a summary calls it.
        classes: of the blocks, each as ``module.Class``.
        read: what such a module is; raises :class:`Unfit` where it is something else.
        calls: of the original forward, such as its model makes them, of x, padding bool [batch, length] and a position bias.
    """

    name: str
    classes: frozenset[str]
    read: Callable[[nn.Module], Description]
    calls: Callable[[nn.Module, Description, Tensor, Tensor, Tensor], list[Call]]


def class_name(module: nn.Module) -> str:
    """``module.Class``, of a block what it was before."""
    kind = original_class(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def transformers_classes(**names: str) -> frozenset[str]:
    """``bert="BertLayer"``: the class of that model."""
    return frozenset(f"transformers.models.{model}.modeling_{model}.{name}" for model, name in names.items())


class Places(NamedTuple):
    """Paths in a module: of the products (two or more names: those of one with a gate), the norms, and the activation."""

    query: str
    key: str
    value: str
    output: str
    up: str
    down: str
    attention_norm: str
    mlp_norm: str
    activation: str
    gate: str = ""

    def products(self) -> tuple[Product | None, ...]:
        paths = [getattr(self, name) for name in PRODUCTS]
        return tuple(Product(path) if path else None for path in paths)


class Numbers(NamedTuple):
    """Where the numbers of attention are: (path, attribute) of each."""

    heads: tuple[str, str]
    head_size: tuple[str, str]
    scale: tuple[str, str] | float | None = None  # None: 1 / sqrt(head_size)


def described(
    family: str, module: nn.Module, places: Places, numbers: Numbers, arguments: Any, *,
    pre_norm: bool, attention: str = "", norm: str = "layer_norm", eps: str = "eps",
    aside: tuple[str, ...] = (),
) -> Description:  # fmt: skip
    """The description of a module whose parts are at these places. Raises Unfit where something else is there, or more.

    Args:
        attention: path of the module with transformers' ``config``; '' where it has an attention of its own.
        eps: the attribute of the norms.
        aside: paths of what makes the position bias.
    """
    try:
        heads, head_size = int(value_at(module, *numbers.heads)), int(value_at(module, *numbers.head_size))
        watched = [numbers.heads, numbers.head_size, (places.attention_norm, eps), (places.mlp_norm, eps)]
        if isinstance(numbers.scale, tuple):
            scale = float(value_at(module, *numbers.scale))
            watched.append(numbers.scale)
        else:
            scale = head_size**-0.5 if numbers.scale is None else numbers.scale
        causal = False
        if attention:
            causal = bool(getattr(child_at(module, attention), "is_causal", True))
            watched.append((attention, "is_causal"))
        behind = places.gate or places.up
        form = BlockForm(
            heads, head_size, scale, pre_norm, norm,
            (float(value_at(module, places.attention_norm, eps)), float(value_at(module, places.mlp_norm, eps))),
            activation_of(child_at(module, behind), child_at(module, places.activation)), causal,
        )  # fmt: skip
        for path in (places.attention_norm, places.mlp_norm):
            check_norm(child_at(module, path), norm)
        no_activation(module, [getattr(places, name) for name in PRODUCTS if getattr(places, name) not in ("", behind)])
        nothing_besides(module, [*places, *aside])
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise Unfit(f"it is no {family} as it is known here: {error}") from error
    return Description(
        family, form, places.products(), (places.attention_norm, places.mlp_norm), names_of_arguments(module), arguments,
        attention, tuple(watched),
    )  # fmt: skip


def value_at(module: nn.Module, path: str, name: str) -> Any:
    """An attribute of a module inside."""
    return getattr(child_at(module, path), name)


def activation_of(layer: nn.Module, module: nn.Module | None) -> str:
    """Of the layer in front of an activation: its own, where it has taken it over, else that of the module. Raises Unfit."""
    own = layer.activation if isinstance(layer, CompressedLayer) else "none"
    if module is None or type(module) is nn.Identity:
        return own
    name = activation_name(module)
    if name is None or own != "none":
        raise Unfit(f"its activation is {own} and {type(module).__name__}, which no block applies")
    return name


def no_activation(module: nn.Module, paths: Iterable[str]) -> None:
    """Raises Unfit where another product has an activation of its own."""
    for path in paths:
        layer = child_at(module, path)
        if isinstance(layer, CompressedLayer) and layer.activation != "none":
            raise Unfit(f"{path} applies {layer.activation} itself")


def check_norm(norm: nn.Module, kind: str) -> None:
    """Raises Unfit where it is another norm, or over more than the last dimension."""
    if kind == "layer_norm" and not (type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1):
        raise Unfit(f"its norm is {type(norm).__name__}, expected LayerNorm over one dimension")
    if kind == "rms_norm" and "bias" in norm._parameters:
        raise Unfit(f"its norm is {type(norm).__name__} with a bias, expected none")


def nothing_besides(module: nn.Module, paths: Iterable[str]) -> None:
    """Raises Unfit where a module inside is none of these, has nothing of them in it, and is no dropout."""
    known = {id(child_at(module, path)) for path in paths if path}
    for name, one in module.named_modules():
        if id(one) in known or type(one) in (nn.Dropout, nn.Identity):
            continue
        if not any(id(inner) in known for inner in one.modules()):
            raise Unfit(f"it has a {name} besides")
        if one._parameters or one._buffers:
            raise Unfit(f"{name or 'it'} has tensors of its own")


def names_of_arguments(module: nn.Module) -> tuple[str, ...]:
    """Of the original forward, those that can be given by position."""
    parameters = [*inspect.signature(original_class(module).forward).parameters.values()][1:]
    return tuple(one.name for one in parameters if one.kind == one.POSITIONAL_OR_KEYWORD)


# --- how it is called -------------------------------------------------------------------------------------------------

HARMLESS = ("output_hidden_states", "return_dict", "use_cache")  # what is asked of others than the block


def arguments(
    module: nn.Module, description: Description, args: tuple[Any, ...], kwargs: Mapping[str, Any]  # noqa: ARG001
) -> Operands | None:  # fmt: skip
    """x, mask, position bias, and whether without a mask attention is causal, of a call as transformers makes it."""
    x = mask = bias = causal = None
    for name, value in chain(zip(description.names, args), kwargs.items()):  # noqa: B905 - as many as there are
        if value is None or value is False:
            causal = False if name == "is_causal" and value is False else causal
        elif name == "hidden_states":
            x = value
        elif name == "attention_mask":
            mask = value
        elif name == "position_bias":
            bias = value
        elif name == "is_causal":
            causal = True
        elif name not in HARMLESS:
            return None
    if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3:
        return None
    if not ((mask is None or _adds(mask, x)) and (bias is None or _adds(bias, x))):
        return None
    return x, mask, bias, mask is None and (description.form.causal if causal is None else causal)


def _adds(scores: Any, x: Tensor) -> bool:
    """Whether it is [..., ..., ..., length] and may be added to scores."""
    plain = isinstance(scores, Tensor) and scores.dim() == 4 and scores.shape[-1] == x.shape[1]
    return plain and (scores.dtype is torch.bool or scores.is_floating_point())


def calls(_module: nn.Module, _description: Description, x: Tensor, padding: Tensor, _bias: Tensor) -> list[Call]:
    """With and without a mask of padded keys."""
    return [((x,), {"attention_mask": None}), ((x,), {"attention_mask": added(padding)})]


def added(padding: Tensor) -> Tensor:
    """The mask that is added to the scores, as transformers makes it."""
    mask = torch.zeros(padding.shape, dtype=torch.float32, device=padding.device)
    return mask.masked_fill(padding, torch.finfo(torch.float32).min)[:, None, None]
