"""The ops of pycompress as torch sees them: schemas, fakes, checks.

A weight is packed into one uint8 vector and a *form*, the string that says how it lies there (:mod:`pycompress.ops.form`); each
weight's ops stand in ``OPS``, a table that is open for others' (:mod:`pycompress.ops.registry`). They are registered with
``torch.library`` (``define`` and ``impl``, the cheapest of its ways to dispatch), so that ``torch.compile(fullgraph=True)``,
``torch.export`` and ``FakeTensor`` work. The layers call the functions of this package.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pycompress.ops.activation import DIFFERENTIABLE
from pycompress.ops.block import BlockForm, block, parse_block
from pycompress.ops.checks import ACTIVATIONS, MAX_IN_FEATURES, MAX_STEP
from pycompress.ops.cpu.native import bandwidth, capped, extension_error, forced, instruction_sets, kernels, peak
from pycompress.ops.cuda import cuda_error, cuda_kernels
from pycompress.ops.embed import embed
from pycompress.ops.form import Form, parse
from pycompress.ops.int4 import int4_linear
from pycompress.ops.int8 import int8_accumulate, int8_depths, int8_linear, int8_quantize, int8_round
from pycompress.ops.int8_conv import int8_conv2d, int8_conv2d_accumulate
from pycompress.ops.int8_fused import int8_fused_linear
from pycompress.ops.low_rank import low_rank_intermediate, low_rank_linear, low_rank_residual
from pycompress.ops.pool import pool
from pycompress.ops.recurrent import int8_recurrent
from pycompress.ops.registry import OPS, Op
from pycompress.ops.sparse import SPARSE_FORMATS, sparse_accumulate, sparse_conv2d, sparse_linear

__all__ = [
    "ACTIVATIONS",
    "DIFFERENTIABLE",
    "MAX_IN_FEATURES",
    "MAX_STEP",
    "OPS",
    "SPARSE_FORMATS",
    "BlockForm",
    "Form",
    "Op",
    "bandwidth",
    "block",
    "capped",
    "cuda_error",
    "cuda_kernels",
    "dense",
    "embed",
    "extension_error",
    "forced",
    "instruction_sets",
    "int4_linear",
    "int8_accumulate",
    "int8_conv2d",
    "int8_conv2d_accumulate",
    "int8_depths",
    "int8_fused_linear",
    "int8_linear",
    "int8_quantize",
    "int8_recurrent",
    "int8_round",
    "kernels",
    "low_rank_intermediate",
    "low_rank_linear",
    "low_rank_residual",
    "pack",
    "parse",
    "parse_block",
    "peak",
    "pool",
    "sparse_accumulate",
    "sparse_conv2d",
    "sparse_linear",
    "unpack",
]


def pack(
    name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any],
    device: torch.device | str = "cpu", layout: str = "",
) -> tuple[Tensor, str]:  # fmt: skip
    """Canonical weight -> the layout of the kernels of a device: a uint8 vector, for this process only, and its form.

    What parts and settings must hold is said in ``ops/cpu/<name>.py``.

    Args:
        name: of the weight, e.g. ``int8``.
        parts: the tensors by the names of the weight's attributes; those of a low-rank weight's residual behind ``residual_``.
        shape: (n, k).
        settings: of the weight, as it stores them.
        layout: to force one that the kernels know; the one that is expected to be the fastest where it is not given.
    Raises:
        ValueError: anything that breaks these rules. RuntimeError: there are no kernels for the device.
    """
    return OPS[name].pack(parts, shape, settings, device, layout)


def unpack(name: str, packed: Tensor, form: str) -> dict[str, Tensor]:
    """The parts that :func:`pack` was given, exactly. Costs a pass over the weight."""
    return OPS[name].unpack(packed, form)


def dense(name: str, packed: Tensor, form: str) -> Tensor:
    """The weight, float32 [n, k]. Costs some passes over it, or as much as a layer of k rows for a low-rank weight."""
    return OPS[name].dense(packed, form)
