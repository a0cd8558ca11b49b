"""What a value of an ONNX graph is while it is imported: a constant, sizes, or a tensor that is computed at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(eq=False)
class Constant:
    """Attributes:
    tensor: its numbers.
    name: of the tensor in the file that it is, or is made of.
    nibbles: whether the file has it in 4 bits, which operators would have to know that give as many.
    node: where the model reads it, once something does.
    """

    tensor: Tensor
    name: str
    nibbles: bool = False
    node: fx.Node | None = None


@dataclass(frozen=True)
class Size:
    """Integers that are known as such: what shapes are, and what is computed of them.

    Attributes:
        value: one integer; or several, as a tuple of them or as a node that gives one. An integer may be a node, too.
        scalar: whether it is one.
        dtype: of the tensor that it is in the file.
    """

    value: Any
    scalar: bool
    dtype: torch.dtype = torch.int64

    @property
    def parts(self) -> tuple[Any, ...] | None:
        """The integers one by one, where their number is known."""
        if self.scalar:
            return (self.value,)
        return self.value if isinstance(self.value, tuple) else None


Value = Constant | Size | fx.Node
