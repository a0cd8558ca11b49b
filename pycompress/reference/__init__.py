"""The readable twin of every kernel, in numba: the oracle of the tests, and what runs where no extension was built.

A module for each op (``int8``, ``sparse``, ``low_rank``) has its formulas, step by step. Integers, and floats where the contract
leaves one order, have the same bits as the kernels' (but for the activations ``gelu``, ``gelu_tanh`` and ``silu``, which here are
the exact functions, rounded once).
``native`` wraps them in the functions of the native module.
"""

from pycompress.reference import int8, low_rank, sparse
from pycompress.reference.native import Native

__all__ = ["Native", "int8", "low_rank", "sparse"]
