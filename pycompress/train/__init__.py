"""Compressed models that are trained as they will compute."""

from pycompress.train.distillation import Distillation
from pycompress.train.prepare import Training, prepare
from pycompress.train.ramps import Ramp
from pycompress.train.reconstruct import Progress, reconstruct

__all__ = ["Distillation", "Progress", "Ramp", "Training", "prepare", "reconstruct"]
