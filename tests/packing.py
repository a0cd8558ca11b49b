"""Weights packed for the tests, from the tensors that they are made of: the packed vector and its form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress import ops, reference
from pycompress.weights import SparseWeight

Packed = tuple[Tensor, str]


@contextmanager
def backends(name: str) -> Iterator[None]:
    """Inside it the ops run on the ``native`` module, on its ``scalar`` kernels alone, or on its ``twin``."""

    def forget() -> None:
        for op in ops.OPS.values():
            op.linear.short.cache_clear()  # type: ignore[attr-defined]

    if name != "twin" and ops.extension_error() is not None:
        pytest.skip("no extension was built")
    with pytest.MonkeyPatch.context() as patch, ops.capped("scalar") if name == "scalar" else nullcontext():
        if name == "twin":
            patch.setattr(ops.cpu.native, "_C", reference.extension)
            patch.setattr(ops.cpu.native, "reads_tensors", False)
        forget()
        yield
    forget()


@pytest.fixture(params=["native", "scalar", "twin"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test runs on each; a file that imports it asks for it with ``pytestmark = pytest.mark.usefixtures("backend")``."""
    with backends(request.param):
        yield request.param


def _shape(tensor: Tensor) -> tuple[int, int]:
    return tuple(tensor.shape)  # type: ignore[return-value]


def pack_int8(values: Tensor, bits: int = 8, scale: Tensor | None = None, kernel: str = "") -> Packed:
    """values int8 [n, k]; scale float32 [n], ones where it is not given."""
    scale = torch.ones(len(values)) if scale is None else scale
    return ops.pack(
        "int8", {"values": values, "scale": scale}, _shape(values), {"activation_bits": bits}, layout=kernel
    )


def pack_int4(values: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, group: int, bits: int) -> Packed:
    """values uint8 [n, ceil(k / 2)], scale bfloat16 [n, groups], zero_point uint8 [n, ceil(groups / 2)] or None."""
    parts = {"values": values, "scale": scale, **({} if zero_point is None else {"zero_point": zero_point})}
    settings = {"group": group, "symmetric": zero_point is None, "activation_bits": bits}
    return ops.pack("int4", parts, (len(values), k), settings)


def pack_sparse(
    mask: Tensor, values: Tensor, k: int, bits: int = 0, layout: str = "", scale: Tensor | None = None
) -> Packed:
    """mask uint8 [n, ceil(k / 8)], values float32 or int8 [nnz]; scale float32 [n] of int8, ones where it is not given."""
    if values.dtype == torch.int8 and scale is None:
        scale = torch.ones(len(mask))
    parts = {"mask": mask, "values": values, **({} if scale is None else {"scale": scale})}
    return ops.pack("sparse", parts, (len(mask), k), {"activation_bits": bits}, layout=layout)


def pack_low_rank(
    down: Tensor, up: Tensor, down_scale: Tensor | None = None, up_scale: Tensor | None = None, bits: int = 0,
    residual: str = "", settings: dict[str, Any] | None = None, layout: str = "", **parts: Tensor | None,
) -> Packed:  # fmt: skip
    """down [r, k], up [n, r], their scales for int8; the name, settings, layout and parts of a residual."""
    own = {"down": down, "up": up, "down_scale": down_scale, "up_scale": up_scale}
    given = {name: tensor for name, tensor in own.items() if tensor is not None}
    given |= {f"residual_{name}": tensor for name, tensor in parts.items() if tensor is not None}
    beside = {"residual": {"method": residual, **(settings or {})}} if residual else {}
    return ops.pack("low_rank", given, (len(up), down.shape[-1]), {"activation_bits": bits, **beside}, layout=layout)


def alter(layer: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Changes one tensor of a compressed layer's state."""
    state = layer.state_dict()
    layer.load_state_dict({**state, name: change(state[name])})


def integers(weight: SparseWeight) -> Tensor:
    """The values of a sparse weight with their zeros, without the scale: of their dtype, [n, k]."""
    dense = reference.sparse.decompress(weight.mask.numpy(), weight.values.numpy(), weight.shape[1])
    return torch.from_numpy(dense)
