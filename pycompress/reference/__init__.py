"""The readable twin of every kernel, in numba: the oracle of the tests, and what runs where no extension was built.

A module for each op (``int8``, ``int4``, ``sparse``, ``low_rank``, ``recurrent``, and ``weight_only`` for what two of them
share) has its formulas, step by step. Integers, and floats where the contract leaves one order, have the same bits as the kernels'
(but for the activations ``gelu``, ``gelu_tanh``, ``silu`` and ``quick_gelu``, which here are the exact functions, rounded once).
``extension`` wraps them in the functions of the native module.
"""

from pycompress.reference import block, chain, extension, int4, int8, low_rank, recurrent, sparse, weight_only

__all__ = ["block", "chain", "extension", "int4", "int8", "low_rank", "recurrent", "sparse", "weight_only"]
