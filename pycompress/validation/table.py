"""Which check compares which layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pycompress.nn.layer import CompressedLayer
from pycompress.validation.checks import (
    Check,
    ConvolutionCheck,
    FactorsCheck,
    FloatCheck,
    SparseCheck,
    StepsCheck,
    WeightOnlyCheck,
    weight_only,
)
from pycompress.validation.recurrent import RecurrentCheck

if TYPE_CHECKING:  # an optional dependency, imported by validate()
    import onnxruntime

# By kind of layer and weight, as in nn.LAYERS; a layer that is not there is compared by FloatCheck.
CHECKS: dict[tuple[str, str], Callable[[str, CompressedLayer, onnxruntime.InferenceSession], Check]] = {
    ("linear", "int8"): lambda *args: (WeightOnlyCheck if weight_only(args[1]) else StepsCheck)(*args),
    ("linear", "int4"): lambda *args: (WeightOnlyCheck if weight_only(args[1]) else StepsCheck)(*args),
    ("linear", "sparse"): lambda *args: (SparseCheck if args[1].settings["bits"] == 32 else StepsCheck)(*args),
    ("conv2d", "int8"): ConvolutionCheck,
    ("conv1d", "int8"): ConvolutionCheck,
    ("conv2d", "sparse"): SparseCheck,
    ("conv1d", "sparse"): SparseCheck,
    ("linear", "low_rank"): StepsCheck,
    ("conv2d", "low_rank"): FactorsCheck,
    ("embedding", "low_rank"): FactorsCheck,
    ("lstm", "int8"): RecurrentCheck,
    ("gru", "int8"): RecurrentCheck,
}


def check_of(name: str, layer: CompressedLayer, session: onnxruntime.InferenceSession) -> Check:
    """The check that fits the layer's kind and weight."""
    return CHECKS.get((layer.kind.name, layer.weight_type.name), FloatCheck)(name, layer, session)
