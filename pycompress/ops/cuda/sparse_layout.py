"""What the form of a sparse weight on CUDA says."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from pycompress.ops.form import parse

# Of the stored values, as csrc/sparse/element.h counts them.
ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.int8: 2}
_NAMES = {str(element).removeprefix("torch."): element for element in ELEMENTS}


class Layout(NamedTuple):
    """Of a packed weight [n, k].

    Attributes:
        kernels: ``bitmap``, ``structured`` or ``blocks``: how the native functions begin.
        element: what the stored values are.
        nnz: of the canonical weight.
        activation_bits: 7 or 8 for int8, else 0.
        bytes: of the kernel's buffer, behind which int8 has its scale.
        shape: what the native functions are told of the weight.
    """

    kernels: str
    element: torch.dtype
    n: int
    k: int
    nnz: int
    activation_bits: int
    bytes: int
    shape: tuple[int, ...]

    @property
    def is_int8(self) -> bool:
        return self.element is torch.int8

    @property
    def size(self) -> int:
        """Bytes of the packed weight."""
        return self.bytes + (4 * self.n if self.is_int8 else 0)


@lru_cache(maxsize=4096)
def layout(form: str) -> Layout:
    """Of a packed weight's form."""
    of, kernels = parse(form), "structured"
    element = _NAMES[of.element]
    shape: tuple[int, ...] = (of.n, of.k, ELEMENTS[element])
    if of.layout == "bitmap":
        kernels, shape = "bitmap", (*shape, of.bytes, of.unit_bytes)
    elif of.layout != kernels:
        kernels, shape = "blocks", (*shape, of.block, of.stored)
    return Layout(kernels, element, of.n, of.k, of.nnz, of.activation_bits, of.bytes, shape)


def element_name(element: torch.dtype) -> str:
    """As forms have it."""
    return str(element).removeprefix("torch.")
