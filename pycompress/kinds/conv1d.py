"""transformers' ``Conv1D`` (GPT-2): a linear layer that keeps its weight as [k, n]."""

# ruff: noqa: ARG002 - a kind that is asked what all are asked may not need all of it

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pycompress.kinds.linear import Linear


class Conv1D(Linear):
    """Replaced as an nn.Linear is. Recognized by its name, because the package need not be installed."""

    def matches(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"

    def misfit(self, module: nn.Module) -> str:
        return ""  # a subclass has another name

    def shape(self, module: nn.Module) -> tuple[int, int]:
        k, n = self.dense_shape(module)
        return n, k

    def matrix(self, module: nn.Module) -> Tensor:
        return super().matrix(module).T

    def weight_shape(self, n: int, k: int, geometry: Any) -> tuple[int, ...]:
        return k, n

    def as_weight(self, matrix: Tensor, geometry: Any) -> Tensor:
        return matrix.T.contiguous()

    def attributes(self, n: int, k: int, geometry: Any) -> dict[str, Any]:
        return {"nx": k, "nf": n}
