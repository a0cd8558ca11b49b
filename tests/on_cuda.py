"""What the tests of the CUDA ops and layers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pycompress import ops

device = pytest.mark.skipif(ops.cuda_error() is not None, reason=f"no CUDA here: {ops.cuda_error()}")

HALVES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # and their unit roundoffs
DISPATCH = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # what torch calls for tensors there, for any tensors


@pytest.fixture(autouse=True)
def poison() -> None:
    """What the allocator hands out next holds NaN, not the zeros of fresh memory or the right results of the test before."""
    if ops.cuda_error() is not None:
        return
    torch.cuda.empty_cache()
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(4)]
        del blocks


def rounded(factor: Tensor) -> Tensor:
    """To bfloat16, ties away from zero, as float64: what the kernels read of a float32 factor."""
    return (factor.view(torch.int32) + 0x8000 >> 16 << 16).view(torch.float32).double()


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Raises where something waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_a_graph_beside_another_stream(made: Callable[[Tensor], Tensor], m: int, k: int, dtype: torch.dtype) -> None:
    """Sums over parts of k that several blocks share must not meet those of the same layer elsewhere."""
    there, xs = torch.zeros(m, k, dtype=dtype, device="cuda"), torch.randn(3, m, k, dtype=dtype, device="cuda")
    expected = [made(x) for x in xs]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(there)
    torch.cuda.synchronize()
    for x, right in zip(xs, expected, strict=True):
        there.copy_(x)
        y.fill_(float("nan"))
        graph.replay()
        with torch.cuda.stream(stream):
            beside = [made(xs[0]) for _ in range(10)]
        torch.cuda.synchronize()
        assert torch.equal(y, right)
        assert all(torch.equal(other, expected[0]) for other in beside)
