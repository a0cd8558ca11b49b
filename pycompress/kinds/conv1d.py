"""transformers' ``Conv1D`` (GPT-2): a linear layer that keeps its weight as [k, n]."""

# ruff: noqa: ARG002 - a kind that is asked what all are asked may not need all of it

from __future__ import annotations

from torch import Tensor, nn

from pycompress.kinds.linear import Linear


class Conv1D(Linear):
    """Replaced as an nn.Linear is. Recognized by its name, because the package need not be installed."""

    def matches(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"

    def misfit(self, module: nn.Module) -> str:
        return ""  # a subclass has another name

    def dense_shape(self, module: nn.Module) -> tuple[int, ...]:
        return tuple(self.stored(module).shape)[::-1]

    def matrix(self, module: nn.Module) -> Tensor:
        return super().matrix(module).T
