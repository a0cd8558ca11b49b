"""The ways in which a model may be compiled when it is handed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

EACH_WAY = pytest.mark.parametrize("how", ["the function", "the method", "inside"])


def compiled(model: nn.Module, how: str) -> Any:
    """A compiled one that computes with the modules of ``model``."""
    if how == "the function":
        return torch.compile(model, backend="eager")
    if how == "the method":
        model.compile(backend="eager")
        return model
    return nn.Sequential(torch.compile(model, backend="eager"))
