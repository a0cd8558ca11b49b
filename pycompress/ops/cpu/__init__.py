"""The CPU's side of the ops: checks, and calls to the native module. A module for each weight, with the functions of a door
(:mod:`pycompress.ops.registry`)."""

from pycompress.ops.cpu import dense, int4, int8, low_rank, sparse

__all__ = ["dense", "int4", "int8", "low_rank", "sparse"]
