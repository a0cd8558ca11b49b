"""What a row of the table is: a Python function, whose signature says all that the importer has to know of an ONNX operator.

Positional parameters are the operator's inputs in their order (None: left out; ``*xs``: any number), keywords its attributes. An
attribute that is no keyword is refused, by name; a parameter that was an attribute in older opsets and is an input since may be
given as either. Of the annotations four mean something:

``Sizes``
    numbers rather than a tensor, wherever they are known: of a constant, or of what is computed of shapes.
``torch.dtype``
    an attribute that is the number of a type in ONNX.
``Literal``
    all values of an attribute that are known; a file with another is refused.
``tuple``, as what it returns
    one result for each output of the operator; a parameter ``num_outputs`` is told how many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Sizes = int | float | Sequence[int] | Sequence[float] | Tensor
# The function of an operator; or, where it came to mean something else, {the first opset: the function from there on}.
Row = Callable[..., Any] | Mapping[int, Callable[..., Any]]


def numbers(sizes: Sizes) -> list[Any]:
    """Sizes as a list of Python numbers; a single one as a list of one."""
    found = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    return list(found) if isinstance(found, Sequence) else [found]


def number(sizes: Sizes) -> Any:
    """Sizes of which there is one. Raises ValueError where there are more."""
    (found,) = numbers(sizes)
    return found


def tensor_of(sizes: int | Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """Integers that are known as such, as a tensor; those of a shape that is traced stay what they are."""
    if not isinstance(sizes, Sequence):
        return torch.full((), sizes, dtype=dtype, device="cpu")
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return torch.stack([tensor_of(size, dtype) for size in sizes])
    return torch.tensor(list(sizes), dtype=dtype, device="cpu")
