"""Compressed models that are trained as they will compute."""

from pycompress.train.reconstruct import Progress, reconstruct

__all__ = ["Progress", "reconstruct"]
