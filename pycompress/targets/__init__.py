"""Places to deploy a compressed model to.

Each says what of our weights it can carry, in which of its own encodings, and what that changes.
"""

from pycompress.targets.adjust import ADJUSTMENTS, Adjustment, Uint8Images
from pycompress.targets.coreml import CoreMl
from pycompress.targets.deployment import Adjusted, Checked, Deployment, deploy
from pycompress.targets.executorch import ExecuTorch
from pycompress.targets.litert import LiteRT
from pycompress.targets.onnxruntime import OnnxRuntime
from pycompress.targets.openvino import OpenVino
from pycompress.targets.target import Carried, Target
from pycompress.targets.tensorrt import TensorRt

__all__ = [
    "ADJUSTMENTS", "TARGETS", "Adjusted", "Adjustment", "Carried", "Checked", "Deployment", "Target", "Uint8Images", "deploy",
]  # fmt: skip

TARGETS: dict[str, Target] = {
    target.name: target for target in (OnnxRuntime(), OpenVino(), ExecuTorch(), LiteRT(), CoreMl(), TensorRt())
}
