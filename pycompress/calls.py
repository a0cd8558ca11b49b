"""How a model is called: with what, and so that it is afterwards as it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import is_
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycompress.nn import CompressedLayer

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]  # of a model: its only argument, positional, or keyword arguments


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """``model(inputs)``: a tensor as the only argument, a sequence as positional, a mapping as keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return model(*inputs)
    raise TypeError(
        f"inputs is {type(inputs).__name__}, expected a tensor, a sequence of arguments or a mapping of keywords"
    )


def only_argument(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """What a layer with one argument was called with."""
    (x,) = (*args, *keywords.values())
    return x


@contextmanager
def evaluating(model: nn.Module, inputs: Inputs = ()) -> Iterator[None]:
    """Evaluation mode without gradients; at its end the model, the inputs and torch's random state are as they were.

    That is: training flags, the attributes of all modules (with what lists, dictionaries and plain objects in them hold, such as
    caches), the numbers in buffers and in other tensors that are found there or in the inputs, and which parameters require
    gradients. Parameters themselves are taken to be left alone. ``no_grad`` and not ``inference_mode``: tensors that the model
    gives away must not make later training fail.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count() if _uses_cuda(model) else 0)))
        before = _Before(stack)
        for module in model.modules():
            before.note_module(module)
        before.note(inputs)
        model.eval()
        stack.enter_context(torch.no_grad())
        yield


def _uses_cuda(model: nn.Module) -> bool:
    return any(tensor.is_cuda for tensor in [*model.parameters(), *model.buffers()])


class _Before:
    """What was there before a run: ``undo`` gets, for each thing that it may have changed, how to change it back."""

    def __init__(self, undo: ExitStack) -> None:
        self.undo = undo
        self.seen: dict[int, object] = {}  # the objects themselves, lest another one gets the id of one that is gone

    def note_module(self, module: nn.Module) -> None:
        for parameter in module._parameters.values():
            if parameter is not None:
                self.seen[id(parameter)] = parameter
                self.undo.callback(parameter.requires_grad_, parameter.requires_grad)
        if isinstance(module, CompressedLayer):  # whose packed weight is large, and never written to
            self.seen[id(module.packed)] = module.packed
        self.seen[id(module)] = module
        self._note_contents(vars(module))

    def note(self, value: Any) -> None:
        """Anything but a module: those are noted each by itself, and stay where they are."""
        if id(value) in self.seen or isinstance(value, _LEFT_ALONE):
            return
        self.seen[id(value)] = value
        if isinstance(value, Tensor):
            self._note_tensor(value)
        elif isinstance(value, dict | list | set | deque):
            self._note_contents(value)
        elif isinstance(value, tuple | frozenset):
            for item in value:
                self.note(item)
        elif hasattr(value, "__dict__"):
            self._note_contents(vars(value))

    def _note_contents(self, container: dict[Any, Any] | list[Any] | set[Any] | deque[Any]) -> None:
        self.seen[id(container)] = container
        copy = container.copy()

        def refill() -> None:
            if _same(container, copy):
                return
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(copy)

        self.undo.callback(refill)
        for item in copy.values() if isinstance(copy, dict) else copy:
            self.note(item)

    def _note_tensor(self, tensor: Tensor) -> None:
        if tensor.is_meta or is_lazy(tensor) or tensor.layout != torch.strided:
            return
        copy, version = tensor.detach().clone(), None if tensor.is_inference() else tensor._version

        def refill() -> None:
            if version is None or tensor._version != version:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(copy)

        self.undo.callback(refill)


_LEFT_ALONE = (nn.Module, nn.Parameter, type, FunctionType, MethodType, ModuleType, str, bytes, int, float, torch.dtype)


def _same(container: Any, copy: Any) -> bool:
    """Whether they hold the same objects, in the same order."""
    if isinstance(container, set):
        return bool(container == copy)
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        return all(map(is_, container, copy)) and all(map(is_, container.values(), copy.values()))
    return all(map(is_, container, copy))
