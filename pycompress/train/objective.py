"""What a block, and the whole model, are reconstructed to: what the dense ones give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pycompress.train.calls import Call, output
from pycompress.train.losses import relative
from pycompress.train.watch import Watch

Loss = Callable[[Any, Any, Tensor | None], Tensor]


class Objective(Protocol):
    """Attributes: kept: whether the results of the dense model are few enough to be kept for all batches."""

    kept: bool

    def results(self, module: nn.Module, call: Call) -> Any:
        """What counts of what a module gives."""

    def error(self, found: Any, target: Any, mask: Tensor | None) -> Tensor:
        """Of results, beside those of the dense module."""


class OfBlock:
    """The squared error of a block's result, relative to the dense one's."""

    kept = True

    def results(self, module: nn.Module, call: Call) -> Tensor:
        return output(module, call)

    def error(self, found: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        return relative(found, target, mask)


class _Model(NamedTuple):
    result: Any
    blocks: list[Tensor]


class OfModel:
    """A loss of the result of the whole model and, beside it, the mean error of all its blocks' results: what the last layers are
    to make good is said to the first ones, too.

    Args:
        names: of the blocks.
    """

    kept = False

    def __init__(self, names: Sequence[str], loss: Loss) -> None:
        self._names, self._loss = names, loss

    def results(self, module: nn.Module, call: Call) -> _Model:
        watch = Watch(module, self._names)
        with watch.watching():
            result = module(*call.args, **call.keywords)
        return _Model(result, [watch.results[name] for name in self._names])

    def error(self, found: _Model, target: _Model, mask: Tensor | None) -> Tensor:
        whole = self._loss(found.result, target.result, mask)
        inner = [relative(y, own, mask) for y, own in zip(found.blocks, target.blocks, strict=True)]
        return whole + torch.stack(inner).mean() if inner else whole
