"""Places to deploy a compressed model to.

Each says what of our weights it can carry, in which of its own encodings, and what that changes.
"""

from pycompress.targets.coreml import CoreMl
from pycompress.targets.deployment import Checked, Deployment, deploy
from pycompress.targets.executorch import ExecuTorch
from pycompress.targets.litert import LiteRT
from pycompress.targets.onnxruntime import OnnxRuntime
from pycompress.targets.openvino import OpenVino
from pycompress.targets.target import Carried, Target

__all__ = ["TARGETS", "Carried", "Checked", "Deployment", "Target", "deploy"]

TARGETS: dict[str, Target] = {
    target.name: target for target in (OnnxRuntime(), OpenVino(), ExecuTorch(), LiteRT(), CoreMl())
}
