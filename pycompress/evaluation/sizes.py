"""What a model is in numbers, in bytes, and in operations."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pycompress.calls import Inputs, call_model, evaluating, uncompiled
from pycompress.nn import CompressedLayer
from pycompress.passes import whole
from pycompress.storage import save
from pycompress.surgery import compressed_layers
from pycompress.weights import Weight


@dataclass(frozen=True)
class Sizes:
    """Of one model.

    Attributes:
        parameters: how many numbers weights and biases have, zeros included; of low-rank layers those of the factors.
        nonzeros: how many of them are not zero.
        macs: multiply-adds of the products in a call with ``rows`` rows (those of the first batch), of whatever type: of sparse
            weights those that are made, of attention all pairs of positions. What goes from element to element is not counted.
        flops: two for each of them, as torch's counter has it; between int8 weights and activations they are on integers.
        rows: of that call.
        memory_bytes: of all parameters and buffers, as they lie in memory now; without what is computed with them.
        disk_bytes: of the file that :func:`pycompress.save` writes (of a dense model, safetensors); None where neither can.
    """

    parameters: int
    nonzeros: int
    macs: int
    flops: int
    rows: int
    memory_bytes: int
    disk_bytes: int | None


def sizes_of(model: nn.Module, inputs: Inputs, rows: int) -> Sizes:
    model = uncompiled(model)
    numbers = [*_numbers(model)]
    count = flops(model, inputs)
    return Sizes(
        parameters=sum(one.numel() for one in numbers),
        nonzeros=sum(int(torch.count_nonzero(one)) for one in numbers),
        macs=count // 2,
        flops=count,
        rows=rows,
        memory_bytes=_memory_bytes(model),
        disk_bytes=_disk_bytes(model),
    )


def flops(model: nn.Module, inputs: Inputs) -> int:
    """Of one call: layer by layer, and attention and LSTMs by operators that torch's counter knows; it counts the others as 0."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32")  # from torch's flags, of which one alone is set here
        with (
            whole.without(model),
            evaluating(model, inputs),
            torch.backends.mkldnn.flags(enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            call_model(model, inputs)
    return int(counter.get_total_flops())


def _numbers(model: nn.Module) -> Iterator[Tensor]:
    """The weights and biases, those that are shared once."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, CompressedLayer):
            if id(module.packed) not in seen:
                seen.add(id(module.packed))
                yield from _numbers_of(module.canonical())
            if module.bias32 is not None:
                yield module.bias32
            continue
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter.detach()


def _numbers_of(weight: Weight) -> Iterator[Tensor]:
    factors = [getattr(weight, name, None) for name in ("down", "core", "up")]
    if any(factor is not None for factor in factors):
        yield from (factor for factor in factors if factor is not None)
        if (residual := getattr(weight, "residual", None)) is not None:
            yield from _numbers_of(residual)
    elif (parts := getattr(weight, "parts_of", None)) is not None:  # the matrices of a recurrent layer
        for part in parts:
            yield from _numbers_of(part)
    else:
        yield weight.decompress()


def _memory_bytes(model: nn.Module) -> int:
    storages = {}
    for tensor in (t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values())):
        if tensor is not None and not tensor.is_meta:
            memory = tensor.untyped_storage()
            storages[memory.data_ptr(), tensor.device] = memory.nbytes()
    return sum(storages.values())


def _disk_bytes(model: nn.Module) -> int | None:
    with TemporaryDirectory(prefix="pycompress-") as folder:
        path = os.path.join(folder, "model.safetensors")
        try:
            if compressed_layers(model):
                save(model, path)
            else:
                save_model(model, path)
        except (ValueError, TypeError, RuntimeError):  # what no file can hold: the figure is missing, and is shown so
            return None
        return os.path.getsize(path)
