"""Modules that take the place of dense layers."""

from pycompress.nn.int8 import Int8Linear

__all__ = ["Int8Linear"]
