"""``Positions``: which positions of the batch that runs just now count, and which are padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The name of an argument of the model's modules, or a function of the model's arguments by name.
Mask = str | Callable[[Mapping[str, Any]], Tensor | None] | None

CONVENTION = "attention_mask"  # transformers': [batch, length], 0 where there is padding
_INPUTS = ("input_ids", "inputs_embeds", "hidden_states")  # what transformers' mask is for, or else the first argument
# torch's: [batch, length], True, or minus infinity, where there is padding.
_TORCHS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.TransformerEncoder, "src_key_padding_mask"),
    (nn.TransformerEncoderLayer, "src_key_padding_mask"),
    (nn.TransformerDecoder, "tgt_key_padding_mask"),
    (nn.TransformerDecoderLayer, "tgt_key_padding_mask"),
)


class Positions:
    """The masks of the modules that are being called, the innermost last.

    A module's mask is for what runs in it: that of a decoder is another than that of the encoder beside it.
    """

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        self.model, self.mask = model, mask
        self.scopes: list[Tensor] = []
        self.unmet = isinstance(mask, str) and mask != CONVENTION  # one was asked for by name, and there was none yet

    def watch(self) -> list[Any]:
        """Hooks on all modules that may be given a mask. Returns their handles."""
        handles: list[Any] = []
        for module in self.model.modules() if self.mask is not None else ():
            find = self._finder(module)
            if find is None:
                continue
            entered: list[bool] = []  # for each call of it that is running

            def enter(
                module: nn.Module,
                args: tuple[Any, ...],
                keywords: dict[str, Any],
                find: Any = find,
                entered: Any = entered,
            ) -> None:
                found = find(_by_name(module, args, keywords))
                entered.append(found is not None)
                self.scopes += [] if found is None else [found]

            def leave(*_: Any, entered: Any = entered) -> None:
                if entered and entered.pop():
                    self.scopes.pop()

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        return handles

    def mask_of(self, x: Tensor, dims: int) -> Tensor | None:
        """The mask [batch, length] that is for x [batch, length, ..., item] or [batch * length, item]; None: all of it counts.

        Args:
            dims: how many dimensions at the end are one item.
        """
        leading = tuple(x.shape[: x.dim() - dims])
        for mask in reversed(self.scopes):
            if leading[:2] == mask.shape or leading == (mask.numel(),):
                return None if bool(mask.all()) else mask
        return None

    def _finder(self, module: nn.Module) -> Callable[[dict[str, Any]], Tensor | None] | None:
        """What finds a module's mask, True where a position counts, among its arguments."""
        if callable(self.mask):
            return self._asked if module is self.model else None
        for kind, name in _TORCHS:
            if isinstance(module, kind):
                return lambda arguments: _turned(module, _kept(arguments.get(name)))
        assert self.mask is not None
        own = self.mask
        parameters = _parameters(module)
        if own not in parameters and module is not self.model:
            return None
        inputs = [*_INPUTS, *list(parameters)[:1]]

        def named(arguments: dict[str, Any]) -> Tensor | None:
            of = next((value for name in inputs if isinstance(value := arguments.get(name), Tensor)), None)
            return self._named(arguments.get(own), of)

        return named

    def _named(self, value: Any, of: Any) -> Tensor | None:
        if not isinstance(value, Tensor) or value.dim() != 2:
            return None  # such as one that has been made into what is added to the scores
        self.unmet = False
        if isinstance(of, Tensor) and of.dim() > 1 and len(of) == len(value) and 0 < of.shape[1] < value.shape[1]:
            value = value[:, -of.shape[1] :]  # the positions before are in a cache of keys and values
        kept: Tensor = value != 0
        return kept

    def _asked(self, arguments: dict[str, Any]) -> Tensor | None:
        assert callable(self.mask)
        found = self.mask(arguments)
        if found is not None and (not isinstance(found, Tensor) or found.dim() != 2):
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"calibrate: the mask is {what}, expected a tensor [batch, length], or None")
        return None if found is None else found != 0


def _kept(padding: Any) -> Tensor | None:
    if not isinstance(padding, Tensor) or padding.dim() != 2:
        return None
    return ~padding if padding.dtype == torch.bool else padding > -torch.inf


def _turned(module: nn.Module, mask: Tensor | None) -> Tensor | None:
    """As the inputs of torch's transformers lie, which may be [length, batch, features]."""
    attention = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), None)
    return mask if mask is None or attention is None or attention.batch_first else mask.T


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return {}


def _by_name(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call; what does not fit the signature is for the call to complain of."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **keywords)
    except (TypeError, ValueError):
        return keywords
    found = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(found.pop(name, {}))
    return found


def counting(x: Tensor, mask: Tensor | None, dims: int) -> Tensor:
    """Those of x that count: x itself, or [rows, ..., item]; ``mask`` is what :meth:`Positions.mask_of` gave."""
    if mask is None:
        return x
    mask = mask.to(x.device)
    return x[mask.flatten() if x.dim() == dims + 1 else mask]
