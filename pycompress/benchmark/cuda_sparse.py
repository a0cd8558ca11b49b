"""2:4 and block sparse layers on a CUDA device, beside torch's: cases of `benchmarks/gpu.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from pycompress.benchmark.cuda import Build, Case, Run, Set, torch_dense
from pycompress.benchmark.cuda_int8 import ours as dense_int8
from pycompress.benchmark.peers import UnavailableError
from pycompress.methods.sparse import Sparse
from pycompress.nn.sparse import SparseLinear
from pycompress.ops.cuda import native, sparse
from pycompress.ops.cuda.sparse_layout import ELEMENTS
from pycompress.weights import SparseWeight, Weight

BLOCKS = (("64x64", 80), ("64x64", 90), ("32x32", 80), ("16x16", 80))  # and zeros in per cent


def pruned(n: int, k: int, pattern: str, density: float | None) -> SparseWeight:
    """Gaussian bfloat16 numbers, pruned."""
    weight = torch.randn(n, k, dtype=torch.float32, device="cpu").mul_(k**-0.5).to(torch.bfloat16)
    return Sparse(density, pattern).compress(weight)


# --- ours -------------------------------------------------------------------------------------------------------------


def _layer(one: Set, bits: int) -> SparseLinear:
    """The zeros stay what they are."""
    return SparseLinear.from_dense(one.linear, Sparse(bits=bits, activation_bits=8)).to(one.x.device)


def ours(bits: int) -> Build:
    """The layer as a model calls it; int8 with its quantizer."""

    def build(one: Set) -> Run:
        layer = _layer(one, bits)
        return lambda: layer(one.x)

    return build


def our_kernel(bits: int, name: str) -> Build:
    def build(one: Set) -> Run:
        layer = _layer(one, bits)
        return lambda: sparse.linear(one.x, layer.packed, layer.form, layer.bias32, "none", name)

    return build


def every_kernel(table: str, size: int | None = None) -> dict[str, Build]:
    """The layers by each kernel of the native function's table that takes blocks of this size and runs here."""
    major, minor = torch.cuda.get_device_capability()
    bits = {ELEMENTS[torch.bfloat16]: 32, ELEMENTS[torch.int8]: 8}
    return {
        f"pycompress_{row['name']}": our_kernel(bits[row["element"]], row["name"])
        for row in getattr(native.native("bench"), table)()
        if row["element"] in bits
        and row.get("size") == size
        and (row["arch"] == 80 or 10 * major + minor == row["arch"])
    }


# --- peers ------------------------------------------------------------------------------------------------------------


def torch_semi_structured(one: Set) -> Run:
    """`torch.sparse.to_sparse_semi_structured`, by cuSPARSELt."""
    if not torch.backends.cusparselt.is_available():
        raise UnavailableError("this torch has no cuSPARSELt")
    weight = torch.sparse.to_sparse_semi_structured(one.linear.weight.detach().to(torch.bfloat16))
    bias = one.linear.bias.detach().to(torch.bfloat16)
    return lambda: nn.functional.linear(one.x, weight, bias)


def torch_csr(one: Set) -> Run:
    """cuSPARSE's product of a CSR matrix and a dense one."""
    weight = one.linear.weight.detach().to(torch.bfloat16).to_sparse_csr()
    bias = one.linear.bias.detach().to(torch.bfloat16)[:, None]

    def run() -> Tensor:
        return (weight @ one.x.t()).add_(bias).t()

    return run


def torch_bsr(block: int) -> Build:
    """torch's Triton kernel for BSR matrices, called as torchao's block sparse tensors call it."""

    def build(one: Set) -> Run:
        try:
            from torch.sparse._triton_ops import bsr_dense_addmm
        except ImportError as error:
            raise UnavailableError(f"torch's BSR product cannot be loaded: {error}") from error
        weight = one.linear.weight.detach().to(torch.bfloat16).to_sparse_bsr((block, block))
        bias = one.linear.bias.detach().to(torch.bfloat16)[:, None]

        def run() -> Tensor:
            y = one.x.new_empty((weight.shape[0], one.x.shape[0]))
            bsr_dense_addmm(y, weight, one.x.t(), alpha=1, beta=0, out=y)
            return y.add_(bias).t()

        return run

    return build


COMMON: Mapping[str, Build] = {
    "torch_bf16": torch_dense(torch.bfloat16),
    "pycompress_dense_int8": dense_int8,
    "torch_csr": torch_csr,
}
OURS: Mapping[str, Build] = {"pycompress_bf16": ours(32), "pycompress_int8": ours(8)}


def _case(
    op: str, pattern: str, density: float | None, peers: Mapping[str, Build], kernels: Callable[[], Mapping[str, Build]]
) -> Case:
    weight: Callable[[int, int], Weight] = partial(pruned, pattern=pattern, density=density)
    return Case(op, {**OURS, **COMMON, **peers}, kernels, weight=weight)


STRUCTURED = (
    _case(
        "structured_cuda",
        "2:4",
        None,
        {"torch_semi_structured": torch_semi_structured},
        partial(every_kernel, "structured_kernels"),
    ),
)


def _blocks(pattern: str, zeros: int) -> Case:
    block = int(pattern.partition("x")[0])
    kernels = partial(every_kernel, "blocks_kernels", 64 if block == 64 else 16)
    return _case(
        f"blocks_{pattern}_{zeros}_cuda", pattern, (100 - zeros) / 100, {"torch_bsr": torch_bsr(block)}, kernels
    )


BLOCK_SPARSE = tuple(_blocks(pattern, zeros) for pattern, zeros in BLOCKS)
