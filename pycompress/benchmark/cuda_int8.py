"""The int8 layer on a CUDA device, beside torch and cuBLASLt: cases of `benchmarks/gpu.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.benchmark.cuda import Build, Case, Run, Set, event_seconds, torch_dense
from pycompress.benchmark.peers import UnavailableError
from pycompress.methods.int8 import Int8
from pycompress.nn.int8 import Int8Linear
from pycompress.ops.cuda import int8
from pycompress.ops.cuda.native import stream_of

# (m, k, n)
CUDA_SHAPES = (
    *((m, 4096, 4096) for m in (1, 16, 64, 128, 256, 512, 1024, 4096)),
    (4096, 4096, 14336),
    (4096, 14336, 4096),
    (8192, 8192, 8192),
)


# --- ours -------------------------------------------------------------------------------------------------------------


def _layer(linear: nn.Linear) -> Int8Linear:
    return Int8Linear.from_dense(linear, method=Int8()).to(linear.weight.device)


def ours(one: Set) -> Run:
    """The layer as a model calls it: quantization, product and epilogue."""
    layer = _layer(one.linear)
    return lambda: layer(one.x)


def our_product(kernel: str = "") -> Build:
    """The GEMM with its epilogue alone, rows quantized before; by one kernel, or by the one that dispatch takes."""

    def build(one: Set) -> Run:
        layer, rows = _layer(one.linear), int8.rows(one.x, one.x.shape[1], 8)
        y = one.x.new_empty((one.x.shape[0], layer.n))

        def run() -> Tensor:
            int8.multiply(rows, layer.packed, layer.form, y, layer.bias32, kernel=kernel)
            return y

        return run

    return build


def our_quantizer(one: Set) -> Run:
    return lambda: int8.rows(one.x, one.x.shape[1], 8).workspace


# --- peers ------------------------------------------------------------------------------------------------------------


def _symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 per row, and its scale [m, 1]."""
    scale = x.float().abs().amax(1, keepdim=True).clamp_(min=1e-12) / 127
    return (x / scale).round_().to(torch.int8), scale


def torch_int_mm(*, product_alone: bool) -> Build:
    """`torch._int_mm`; without `product_alone`, the layer that torch's own operations make with it, compiled."""

    def build(one: Set) -> Run:
        if one.x.shape[0] <= 16:
            raise UnavailableError("torch._int_mm takes more than 16 rows")
        values, scale = _symmetric(one.linear.weight.detach())
        transposed, scale, bias = values.t(), scale.t(), one.linear.bias.detach()
        if product_alone:
            q, _ = _symmetric(one.x)
            return lambda: torch._int_mm(q, transposed)
        quantize = torch.compile(_symmetric)

        @torch.compile
        def rescale(sums: Tensor, row_scale: Tensor) -> Tensor:
            return (sums.float() * row_scale * scale + bias).to(torch.bfloat16)

        def run() -> Tensor:
            q, row_scale = quantize(one.x)
            y: Tensor = rescale(torch._int_mm(q, transposed), row_scale)
            return y

        return run

    return build


def torch_fp8(one: Set) -> Run:
    """`torch._scaled_mm` with scales per row and channel; x is converted by compiled torch operations."""
    if torch.cuda.get_device_capability() < (8, 9):
        raise UnavailableError("fp8 needs compute capability 8.9")
    top = torch.finfo(torch.float8_e4m3fn).max

    def convert(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.float().abs().amax(1, keepdim=True).clamp_(min=1e-12) / top
        return (x / scale).to(torch.float8_e4m3fn), scale

    weight, scale = convert(one.linear.weight.detach())
    bias, compiled = one.linear.bias.detach().to(torch.bfloat16), torch.compile(convert)

    def run() -> Tensor:
        q, row_scale = compiled(one.x)
        y: Tensor = torch._scaled_mm(
            q, weight.t(), row_scale, scale.t().contiguous(), bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return y

    return run


class CublasLt:
    """int8 x int8 -> int32 by cuBLASLt with a workspace: the fastest of what its heuristics offer.

    The library is the one that torch's CUDA build loads; the calls and constants are those of cublasLt.h.
    """

    WORKSPACE = 64 << 20
    COMPUTE_32I, R_8I, R_32I = 72, 3, 10
    TRANSA, OP_T, MAX_WORKSPACE = 3, 1, 1
    RESULT_BYTES, ALGORITHMS = 96, 8  # of a cublasLtMatmulHeuristicResult_t, whose first 64 bytes are the algorithm

    def __init__(self) -> None:
        self.cublaslt = self._load()
        self.handle = self._created("cublasLtCreate")
        self.workspace = torch.empty(self.WORKSPACE, dtype=torch.uint8, device="cuda")

    @staticmethod
    def _load() -> ctypes.CDLL:
        for version in (13, 12, 11):
            try:
                return ctypes.CDLL(f"libcublasLt.so.{version}")
            except OSError:
                continue
        raise UnavailableError("no libcublasLt was found")

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.cublaslt, name)(*arguments)
        if status != 0:
            raise UnavailableError(f"{name} gave status {status}")

    def _created(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._call(name, ctypes.byref(handle), *arguments)
        return handle

    def __call__(self, one: Set) -> Run:
        (m, k), n = one.x.shape, one.linear.out_features
        q, w = _symmetric(one.x)[0], _symmetric(one.linear.weight.detach())[0]
        y = torch.empty((m, n), dtype=torch.int32, device=q.device)
        # Column-major: y^T [n, m] = (w^T [k, n])^T x^T [k, m]
        product = self._created("cublasLtMatmulDescCreate", self.COMPUTE_32I, self.R_32I)
        transpose = ctypes.c_int32(self.OP_T)
        self._call("cublasLtMatmulDescSetAttribute", product, self.TRANSA, ctypes.byref(transpose), ctypes.c_size_t(4))
        layouts = []
        for kind, rows, columns in ((self.R_8I, k, n), (self.R_8I, k, m), (self.R_32I, n, m)):
            sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
            layouts.append(self._created("cublasLtMatrixLayoutCreate", kind, *sizes))
        preference = self._created("cublasLtMatmulPreferenceCreate")
        size, bytes_of_size = ctypes.c_size_t(self.WORKSPACE), ctypes.c_size_t(8)
        attribute = self.MAX_WORKSPACE, ctypes.byref(size), bytes_of_size
        self._call("cublasLtMatmulPreferenceSetAttribute", preference, *attribute)
        results, count = ctypes.create_string_buffer(self.RESULT_BYTES * self.ALGORITHMS), ctypes.c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self.handle, product, *layouts, layouts[2], preference, self.ALGORITHMS,
            results, ctypes.byref(count),
        )  # fmt: skip
        if count.value == 0:
            raise UnavailableError("cuBLASLt has no int8 algorithm for this shape")
        one_, zero = ctypes.c_int32(1), ctypes.c_int32(0)

        def run_with(algorithm: int) -> Tensor:
            a, b, c = (ctypes.c_void_p(t.data_ptr()) for t in (w, q, y))
            self._call(
                "cublasLtMatmul", self.handle, product, ctypes.byref(one_), a, layouts[0], b, layouts[1],
                ctypes.byref(zero), c, layouts[2], c, layouts[2], ctypes.byref(results, self.RESULT_BYTES * algorithm),
                ctypes.c_void_p(self.workspace.data_ptr()), size, ctypes.c_void_p(stream_of(q.device.index)),
            )  # fmt: skip
            return y

        best = min(range(count.value), key=lambda i: _seconds(lambda: run_with(i)))
        return lambda: run_with(best)


def _seconds(run: Callable[[], object]) -> float:
    """Of one call, the least of a few: for choosing among algorithms."""
    return min(event_seconds(run) for _ in range(5))


def cublaslt(one: Set) -> Run:
    return CublasLt()(one)


LAYERS: dict[str, Build] = {
    "pycompress_int8": ours,
    "torch_bf16": torch_dense(torch.bfloat16),
    "torch_fp16": torch_dense(torch.float16),
    "torch_int_mm": torch_int_mm(product_alone=False),
    "torch_fp8": torch_fp8,
}
PRODUCTS: dict[str, Build] = {
    "pycompress_product": our_product(),
    "pycompress_quantizer": our_quantizer,
    "cublaslt_int8_product": cublaslt,
    "torch_int_mm_product": torch_int_mm(product_alone=True),
}


def every_product() -> dict[str, Build]:
    """The GEMM by each kernel of the table."""
    return {f"pycompress_product_{row['name']}": our_product(row["name"]) for row in ops.cuda_kernels()}


INT8 = (Case("int8_linear_cuda", {**LAYERS, **PRODUCTS}, every_product, CUDA_SHAPES),)
