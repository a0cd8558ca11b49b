"""A transformer block that runs as one op: the module as it was, with its class assigned, and nothing else changed.

Children, parameters, names and state stay. Each call looks at the module as it is now, and where it is not what was read, or where
somebody wants to see what happens inside (hooks, gradients, attentions, training), the original forward runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import repeat, zip_longest
from operator import attrgetter, contains, getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from pycompress import ops
from pycompress.nn.assigned import GLOBAL_HOOKS, HOOKS, assign, assigned, restore
from pycompress.nn.layer import CompressedLayer
from pycompress.nn.linear import CompressedLinear
from pycompress.ops.block import block_directly
from pycompress.ops.block_form import BEHIND, PRODUCTS, BlockForm
from pycompress.ops.checks import FLOATS, nobody_looks

BLOCK = "_pycompress_block"  # the attribute that makes a module a block
LEFT = "_pycompress_no_block"  # why a module that looks like one is none

READ = ("dense", "int8", "int4", "sparse", "low_rank")  # the weights that a native block multiplies

Operands = tuple[
    Tensor, Tensor | None, Tensor | None, bool
]  # x, mask, bias, and whether a missing mask is a causal one


class Unfit(Exception):  # noqa: N818 - no error: a reason
    """Why a module cannot run as one op."""


@dataclass(frozen=True)
class Product:
    """Where the weight of a product is: that of the linear layer ``path``; or some rows of ``in_proj_weight`` there.

    Attributes:
        third: 0, 1 or 2 for query, key or value of an ``nn.MultiheadAttention``.
    """

    path: str
    third: int | None = None


@dataclass(frozen=True)
class Description:
    """What a family read in a module.

    Attributes:
        family: its name.
        form: without the products; ``causal`` where attention is, if a call says nothing of it.
        products: of each of :data:`PRODUCTS`; None where there is none.
        norms: paths of the two.
        names: of the arguments of the original forward, in their order.
        arguments: ``(module, description, args, kwargs) -> operands`` of a call; None where the original forward has to run.
        attention: path of the module whose ``config`` names the attention function of transformers; '' where there is none.
        watched: (path, attribute) of what the form was read from: another value there is another block.
        outputs: what the original returns: None for y, or for a tuple what its items are (``y``, ``bias`` or ``none``).
        turned: whether x, and y, are [length, batch, d].
        read: how the family reads a module: what it reads later has to be this.
        classes: of the modules inside that are no linear layers, by path.
        skip_padding: whether the op leaves out what the mask hides as keys; the original computes it.
        heads: of the form's string, without and with ``causal``.
    """

    family: str
    form: BlockForm
    products: tuple[Product | None, ...]
    norms: tuple[str, str]
    names: tuple[str, ...]
    arguments: Callable[[nn.Module, Description, tuple[Any, ...], Mapping[str, Any]], Operands | None]
    attention: str = ""
    watched: tuple[tuple[str, str], ...] = ()
    outputs: tuple[str, ...] | None = None
    turned: bool = False
    read: Callable[[nn.Module], Description] | None = None
    classes: tuple[tuple[str, type], ...] = ()
    skip_padding: bool = False
    heads: tuple[str, str] = field(init=False)

    def __post_init__(self) -> None:
        form = replace(self.form, skip_padding=self.skip_padding)
        object.__setattr__(self, "heads", (replace(form, causal=False).head, replace(form, causal=True).head))

    def check(self, module: nn.Module) -> None:
        """Raises Unfit where the module is no longer what was read."""
        now = self if self.read is None else self.read(module)
        if (now.form, now.products, now.turned) != (self.form, self.products, self.turned):
            raise Unfit("it is no longer what was read")
        for (path, kind), (other_path, other_kind) in zip_longest(
            self.classes, classes_of(module), fillvalue=("", None)
        ):
            if path != other_path or kind is not other_kind:
                raise Unfit(f"its {other_path or path} is another")

    def result(self, y: Tensor, bias: Tensor | None) -> Any:
        """As the original returns it."""
        if self.turned:
            y = y.transpose(0, 1)
        if self.outputs is None:
            return y
        return tuple(y if one == "y" else bias if one == "bias" else None for one in self.outputs)


def classes_of(module: nn.Module) -> tuple[tuple[str, type], ...]:
    """Of the modules inside, by path, but for linear layers: one may be put in the place of another."""
    return tuple(
        (path, type(one))
        for path, one in module.named_modules()
        if path and not isinstance(one, (CompressedLayer, nn.Linear))
    )


class Block:
    """What makes a module a block: its description; and what was derived from the module, which is no state: copies begin anew."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.seen: Seen | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> Block:
        return Block(self.description)

    def __reduce__(self) -> tuple[Any, ...]:
        return Block, (self.description,)

    def look(self, module: nn.Module) -> Seen:
        """The module as it is now: what was seen at the last call, where nothing has changed."""
        seen = self.seen
        if seen is None or not seen.still():
            seen = self.seen = Seen(module, self.description)
        return seen

    def reason(self, module: nn.Module) -> str:
        """Why the original forward runs at every call, as the module is now; '' where it does not."""
        seen = self.look(module)
        return seen.reason or ("there are hooks inside" if seen.hooked() else "")


# --- the class --------------------------------------------------------------------------------------------------------


def block_of(module: nn.Module) -> Block | None:
    """What makes a module a block; None where it is none."""
    own = vars(module).get(BLOCK)
    return own if isinstance(own, Block) and assigned(module) is called else None


def become_block(module: nn.Module, description: Description) -> None:
    """Has a module run as one op."""
    vars(module)[BLOCK] = Block(description)
    assign(module, called)


def become_original(module: nn.Module) -> None:
    """Has a block run as it did before."""
    restore(module)
    vars(module).pop(BLOCK, None)


_transforms = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._is_tracing
_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: torch.is_autocast_enabled("cpu"))


def called(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
    """(What the block returns,); None where the original forward has to run."""
    block: Block = module.__dict__[BLOCK]
    description = block.description
    operands = description.arguments(module, description, args, kwargs)
    if operands is None:
        return None
    x, mask, bias, causal = operands
    if x.dtype not in FLOATS or x.layout is not torch.strided or not x.is_cpu:
        return None
    run = block_directly
    if not nobody_looks(x):
        run = ops.block
        if x.dtype is not torch.float32 and _autocast():  # (what the original returns then depends on its operators)
            return None
        if is_compiling():
            found = _while_compiled(module, description, operands)
            if found is None:
                return None
            return (description.result(run(x, mask, bias, found[0], found[1][causal]), bias),)
        if type(x) is not Tensor or forward_ad._current_level >= 0 or _transforms() is not None or _tracing():
            return None
    seen = block.look(module)
    if seen.reason or seen.hooked() or (torch.is_grad_enabled() and seen.wants_gradient(x, mask, bias)):
        return None
    return (description.result(run(x, mask, bias, seen.current(), seen.forms[causal and seen.is_sdpa]), bias),)


def _while_compiled(
    module: nn.Module, description: Description, operands: Operands
) -> tuple[list[Tensor | None], tuple[str, str]] | None:  # fmt: skip
    """The tensors and the forms in a graph, whose guards watch what is read here."""
    modules = [*module.modules()]
    if _altered(modules) or any(one._forward_hooks or one._forward_pre_hooks for one in modules[1:]):
        return None
    if torch.is_grad_enabled():
        asked = [*operands[:3], *module.parameters()]
        if any(one is not None and one.requires_grad for one in asked):
            return None
    try:
        tensors, forms = operands_of(module, description)
    except (Unfit, AttributeError, KeyError, IndexError):
        return None
    if description.attention and not is_sdpa(module, description):
        forms = (forms[0], forms[0])
    return [one if one is None or one.dtype in _AS_IT_IS else one.detach().float() for one in tensors], forms


_AS_IT_IS = (torch.float32, torch.uint8)


# --- the module as it is ----------------------------------------------------------------------------------------------


def child_at(module: nn.Module, path: str) -> nn.Module:
    """The module that a dotted path leads to."""
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


class Seen:
    """A module as it was looked at: the tensors of the op, or why there are none, and all by which to tell whether it is still so.

    Dictionaries are compared with copies of them: in C and by identity, 15 ns an entry.

    Attributes:
        reason: why the original forward has to run; '' where it need not.
        tensors: those of the op.
        forms: without and with ``causal``.
        is_sdpa: whether attention without a mask may be causal.
    """

    def __init__(self, module: nn.Module, description: Description) -> None:
        self.tensors: list[Tensor | None] = []
        self.forms = ("", "")
        self.is_sdpa = False
        modules = self._modules = [*module.modules()]
        self._types = [*map(type, modules)]
        self._attributes = [vars(one) for one in modules]
        self._hooks = (*GLOBAL_HOOKS, *(vars(one)[name] for one in modules[1:] for name in HOOKS))
        self._tables = [table for one in modules for table in (one._modules, one._parameters, one._buffers) if table]
        self._parameters = list(module.parameters())
        try:
            self.reason = _altered(modules)
            if not self.reason:
                description.check(module)
                self.is_sdpa = bool(description.attention) and is_sdpa(module, description)
                self.tensors, self.forms = operands_of(module, description)
        except Unfit as unfit:
            self.reason = str(unfit)
        except (AttributeError, KeyError, IndexError):
            self.reason = "it is no longer what was read"
        norms = self.tensors[2 * len(PRODUCTS) :]
        self._rounded = [
            i for i, norm in enumerate(norms, 2 * len(PRODUCTS)) if norm is not None and norm.dtype != torch.float32
        ]
        self._watch(module, description)

    def _watch(self, module: nn.Module, description: Description) -> None:
        watched = [(vars(one), "training") for one in self._modules if _minds_training(one)]
        watched += [(vars(one), "activation") for one in self._modules if isinstance(one, CompressedLayer)]
        for path, name in description.watched:
            with suppress(AttributeError):
                watched.append((vars(child_at(module, path)), name))
        if description.attention:
            with suppress(AttributeError):
                watched.append((vars(child_at(module, description.attention).config), "_attn_implementation_internal"))
        watched = [(own, name) for own, name in watched if name in own]
        self._owners, self._names = [own for own, _ in watched], [name for _, name in watched]
        self._values = [own[name] for own, name in watched]
        self._tables_then = [*map(dict, self._tables)]
        self._dtypes = [*map(_dtype, self._parameters)]
        views = {product.path for product in description.products if product is not None and product.third is not None}
        self._viewed = [
            one for path in views for one in child_at(module, path)._parameters.values() if one is not None
        ] if not self.reason else []  # fmt: skip
        self._addresses = [*map(_address, self._viewed)]

    def still(self) -> bool:
        """Whether nothing has changed since."""
        try:
            return (
                self._tables == self._tables_then
                and [*map(getitem, self._owners, self._names)] == self._values
                and [*map(type, self._modules)] == self._types
                and True not in map(contains, self._attributes, repeat("forward"))
                and [*map(_dtype, self._parameters)] == self._dtypes
                and (not self._viewed or [*map(_address, self._viewed)] == self._addresses)
            )
        except (
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ):  # an attribute less; or other tensors, which have no one truth
            return False

    def hooked(self) -> bool:
        """Whether somebody watches what happens inside."""
        return any(self._hooks) and not all(map(_only_captures, self._hooks))

    def wants_gradient(self, *operands: Tensor | None) -> bool:
        """Whether one of the operands, or a parameter, asks for one."""
        return any(one is not None and one.requires_grad for one in (*operands, *self._parameters))

    def current(self) -> list[Tensor | None]:
        """The tensors as the op takes them: norms in float32."""
        if not self._rounded:
            return self.tensors
        tensors = [*self.tensors]
        for i in self._rounded:
            norm = tensors[i]
            tensors[i] = None if norm is None else norm.detach().float()
        return tensors


_dtype, _address = attrgetter("dtype"), Tensor.data_ptr
_STEADY = {
    nn.Linear,
    nn.LayerNorm,
    nn.ModuleList,
    nn.Identity,
    nn.GELU,
    nn.ReLU,
    nn.SiLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Hardswish,
}  # in training as in evaluation
_CAPTURING = "transformers.utils.output_capturing"


def _minds_training(module: nn.Module) -> bool:
    return type(module) not in _STEADY and not isinstance(module, CompressedLayer)


def _only_captures(hooks: Mapping[int, Any]) -> bool:
    """Whether they are those with which transformers gathers attentions, and nobody wants any now; it never takes them away."""
    if any(getattr(hook, "__module__", "") != _CAPTURING for hook in hooks.values()):
        return False
    wanted = sys.modules[_CAPTURING]._active_collector.get() if hooks else None
    return wanted is None or not {*wanted} - {"hidden_states", "_hidden_states_layers"}


def _altered(modules: Sequence[nn.Module]) -> str:
    if any(one.training for one in modules if _minds_training(one)):
        return "it is in training"
    if any("forward" in one.__dict__ for one in modules):
        return "a module has a forward of its own"
    return ""


def is_sdpa(module: nn.Module, description: Description) -> bool:
    """Raises Unfit where attention is computed by a function of another name than these two, which compute the same."""
    config: Any = child_at(module, description.attention).config
    name = config._attn_implementation
    if name not in ("sdpa", "eager"):
        raise Unfit(f"its attention is {name}, expected sdpa or eager")
    return bool(name == "sdpa")


def operands_of(module: nn.Module, description: Description) -> tuple[list[Tensor | None], tuple[str, str]]:
    """The op's tensors, and its form without and with ``causal``. Raises Unfit where what is in the places cannot be read."""
    tensors: list[Tensor | None] = []
    forms = []
    for product in description.products:
        weight, bias, form = (None, None, "") if product is None else _weight_of(module, product)
        tensors += [weight, bias]
        forms.append(form)
    for path in description.norms:
        own = child_at(module, path)._parameters
        tensors += [own.get("weight"), own.get("bias")]
    plain, causal = description.heads
    behind = BEHIND + BEHIND.join(forms)
    return tensors, (plain + behind, causal + behind)


def _weight_of(module: nn.Module, product: Product) -> tuple[Tensor, Tensor | None, str]:
    layer = child_at(module, product.path)
    if isinstance(layer, CompressedLinear):
        name = layer.weight_type.name
        if layer.op is None or name not in READ or type(layer).forward is not CompressedLinear.forward:
            raise Unfit(f"{product.path} is {layer.label}, which no block multiplies")
        return layer.packed, layer.bias32, f"{name} {layer.form}"
    if not isinstance(layer, nn.MultiheadAttention) and type(layer).forward is not nn.Linear.forward:
        raise Unfit(f"{product.path} is a {type(layer).__name__}")
    weight, bias = layer._parameters["weight" if product.third is None else "in_proj_weight"], None
    bias = layer._parameters["bias" if product.third is None else "in_proj_bias"]
    if weight is None or weight.dtype != torch.float32 or not (type(weight) is nn.Parameter or is_compiling()):
        raise Unfit(f"{product.path} is dense and no plain float32 layer")
    if product.third is not None:
        n = weight.shape[0] // 3
        rows = slice(product.third * n, (product.third + 1) * n)
        return weight.detach()[rows], None if bias is None else bias.detach()[rows], f"dense n={n} k={weight.shape[1]}"
    return weight, bias, f"dense n={weight.shape[0]} k={weight.shape[1]}"
