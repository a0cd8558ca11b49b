"""The CPU's side of the ops: checks, and calls to the native module. A module for each weight, with the functions of a door
(:mod:`pycompress.ops.registry`)."""

from pycompress.ops.cpu import block, dense, embed, int4, int8, int8_conv, low_rank, pool, recurrent, sparse

__all__ = ["block", "dense", "embed", "int4", "int8", "int8_conv", "low_rank", "pool", "recurrent", "sparse"]
