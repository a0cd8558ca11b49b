"""What is gathered while batches run through a model: what each layer's inputs look like, without padding."""

from pycompress.calibration.calibration import Calibration, calibrate
from pycompress.calibration.description import Description
from pycompress.calibration.positions import Mask

__all__ = ["Calibration", "Description", "Mask", "calibrate"]
