"""How a model is called: with what, layer by layer, and so that it is afterwards as it was."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.state import unchanged

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]  # of a model: its only argument, positional, or keyword arguments


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """``model(inputs)``: a tensor as the only argument, a sequence as positional, a mapping as keyword arguments.

    Raises:
        TypeError: inputs of another type; or with which the model failed, and which do not fit its signature or hold no tensor.
    """
    args, keywords = arguments_of(inputs)
    try:
        return model(*args, **keywords)
    except Exception as error:
        if reason := _misfit(model, args, keywords):
            raise TypeError(
                f"inputs is {type(inputs).__name__}, {reason}: expected a tensor, a sequence of positional arguments (several rows "
                "are one tensor: torch.stack, torch.tensor) or a mapping of keywords"
            ) from error
        raise


def arguments_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of :func:`call_model`'s call. Raises TypeError for inputs of another type."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes):
        return tuple(inputs), {}
    raise TypeError(
        f"inputs is {type(inputs).__name__}, expected a tensor, a sequence of arguments or a mapping of keywords"
    )


def _misfit(model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """What is wrong with the arguments of a call that failed, or ''."""
    values = [*args, *keywords.values()]
    if values and not any(map(_holds_tensor, values)):
        return f"of {type(values[0]).__name__}, without a tensor in it"
    try:
        inspect.signature(model.forward).bind(*args, **keywords)
    except TypeError as error:
        return f"which are not the arguments of {type(model).__name__}.forward ({error})"
    except ValueError:  # no signature is known
        return ""
    return ""


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor) or any(
        isinstance(part, Tensor) for part in getattr(value, "__dict__", {}).values()
    )


def tensors_in(value: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, lists, dicts (also transformers' ModelOutput) and dataclasses, each with where it is."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{i}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), f"{path}.{field.name}")


def only_argument(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """What a layer with one argument was called with."""
    (x,) = (*args, *keywords.values())
    return x


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` stands for; any other one is itself."""
    dynamo = sys.modules.get("torch._dynamo")
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._orig_mod
    return model


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """In the block each layer is called as a module of its own, and its hooks with it: what is compiled runs as it was written, and
    torch's transformer does without its fast path, which reads weights and packs padded batches into nested tensors."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


@contextmanager
def evaluating(model: nn.Module, inputs: Inputs = ()) -> Iterator[None]:
    """Evaluation mode, :func:`layer_by_layer`, without gradients; at its end all is as it was: see :func:`unchanged`.

    What the model returned may be something that it keeps, whose numbers go back as well: whoever needs them copies them in the
    block. ``no_grad`` and not ``inference_mode``: tensors that the model gives away must not make later training fail.
    """
    with unchanged(model, inputs), layer_by_layer():
        model.eval()
        with torch.no_grad():
            yield
