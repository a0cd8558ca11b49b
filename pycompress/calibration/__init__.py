"""What is gathered while batches run through a model: the moments of each layer's inputs, without padding."""

from pycompress.calibration.positions import Mask
from pycompress.calibration.watch import Calibration, calibrate

__all__ = ["Calibration", "Mask", "calibrate"]
