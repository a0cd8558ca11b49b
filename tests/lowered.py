"""Lowered layers with a wrong constant, so that ONNX Runtime computes something else than the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from torch import nn

import pycompress.onnx

Array = npt.NDArray[Any]


def constants(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def corrupt(
    monkeypatch: pytest.MonkeyPatch, layer: nn.Module, initializer: str, change: Callable[[Array], None]
) -> None:
    """Makes lower() of the layer change one initializer, each time it is called."""
    original = pycompress.onnx.lower

    def corrupted(other: nn.Module) -> onnx.ModelProto:
        model = original(other)
        if other is layer:
            (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == initializer]
            array = onnx.numpy_helper.to_array(tensor).copy()
            change(array)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, initializer))
        return model

    monkeypatch.setattr(pycompress.onnx, "lower", corrupted)


def one_off(array: Array) -> None:
    """An integer, the largest, changes by one; the largest float, of a vector each, by a hundredth."""
    flat = array.reshape(-1)
    if array.dtype == np.float32 and array.size == max(array.shape):
        flat *= np.float32(1.01)
        return
    place = int(np.abs(flat.astype(np.float64)).argmax())
    largest = flat[place]
    flat[place] = largest * np.float32(1.01) if array.dtype == np.float32 else int(largest) - np.sign(int(largest))
