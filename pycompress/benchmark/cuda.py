"""The int8 layer on a CUDA device, beside torch and cuBLASLt: `benchmarks/gpu.py`.

Every candidate is captured into a CUDA graph of calls that rotate over inputs and weights larger together than the L2 cache,
and the graphs take turns, timed by CUDA events. Data is random: a multiplication of zeros draws less power, and clocks higher.
"""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.benchmark.environment import versions
from pycompress.benchmark.harness import Timing, ratio
from pycompress.benchmark.peers import UnavailableError, relative_error
from pycompress.benchmark.results import Record
from pycompress.methods.int8 import Int8
from pycompress.nn.int8 import Int8Linear
from pycompress.ops import cuda

# (m, k, n)
CUDA_SHAPES = (
    *((m, 4096, 4096) for m in (1, 16, 64, 128, 256, 512, 1024, 4096)),
    (4096, 4096, 14336),
    (4096, 14336, 4096),
    (8192, 8192, 8192),
)
MOST_SETS = 64
CALLS = 32  # in a graph, at least


class Set(NamedTuple):
    """One of the inputs and weights that the calls rotate over: bfloat16 x [m, k] and a layer [n, k]."""

    x: Tensor
    linear: nn.Linear


Run = Callable[[], Tensor]
Build = Callable[[Set], Run]


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
        layer, k = _layer(one.linear), one.x.shape[1]
        rows, _, _ = cuda.int8_rows(one.x, k, 8)
        y = one.x.new_empty((one.x.shape[0], layer.n))

        def run() -> Tensor:
            cuda.int8_multiply(rows, k, layer.packed, y, layer.weight_scale, layer.bias, kernel=kernel)
            return y

        return run

    return build


def our_quantizer(one: Set) -> Run:
    return lambda: cuda.int8_rows(one.x, one.x.shape[1], 8)[0]


# --- peers ------------------------------------------------------------------------------------------------------------


def torch_dense(dtype: torch.dtype) -> Build:
    def build(one: Set) -> Run:
        x, weight, bias = (t.to(dtype) for t in (one.x, one.linear.weight.detach(), one.linear.bias.detach()))
        return lambda: nn.functional.linear(x, weight, bias)

    return build


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
        layouts = [
            self._created(
                "cublasLtMatrixLayoutCreate",
                kind,
                ctypes.c_uint64(rows),
                ctypes.c_uint64(columns),
                ctypes.c_int64(rows),
            )
            for kind, rows, columns in ((self.R_8I, k, n), (self.R_8I, k, m), (self.R_32I, n, m))
        ]
        preference = self._created("cublasLtMatmulPreferenceCreate")
        size = ctypes.c_size_t(self.WORKSPACE)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute",
            preference,
            self.MAX_WORKSPACE,
            ctypes.byref(size),
            ctypes.c_size_t(8),
        )
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
                ctypes.c_void_p(self.workspace.data_ptr()), size, ctypes.c_void_p(cuda.stream_of(q.device.index)),
            )  # fmt: skip
            return y

        best = min(range(count.value), key=lambda i: _seconds(lambda: run_with(i)))
        return lambda: run_with(best)


def _seconds(run: Callable[[], object]) -> float:
    """Of one call, the least of a few: for choosing among algorithms."""
    return min(event_seconds(run) for _ in range(5))


def event_seconds(run: Callable[[], object]) -> float:
    """What the device needs for `run()`, by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


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


# --- measuring --------------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A candidate ready to be timed: one call for each set, and a graph of `calls` of them."""

    runs: list[Run]
    graph: torch.cuda.CUDAGraph
    calls: int


def sets_of(m: int, k: int, n: int) -> list[Set]:
    """Random inputs and layers, twice as large together as the L2, 2 of them at least."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    count = min(max(2, math.ceil(2 * l2 / (m * k + n * k + m * n))), MOST_SETS)
    torch.manual_seed(0)
    sets = []
    for _ in range(count):
        linear = nn.Linear(k, n, device="cuda", dtype=torch.float32)
        nn.init.normal_(linear.weight, std=k**-0.5)
        sets.append(Set(torch.randn(m, k, device="cuda", dtype=torch.bfloat16), linear))
    return sets


def prepare(build: Build, sets: Sequence[Set]) -> Candidate:
    """Builds, warms up and captures a candidate."""
    runs = [build(one) for one in sets]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    stream.synchronize()
    calls = max(CALLS // len(runs), 1) * len(runs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            runs[i % len(runs)]()
    return Candidate(runs, graph, calls)


def kernel_names(run: Run) -> list[str]:
    """The kernels of one call, in order."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type.name == "CUDA"]


def host_microseconds(run: Run, calls: int = 200) -> float:
    """What one call costs in Python before the device works: the median of a few series that the queue holds."""
    series = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        series.append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return statistics.median(series) * 1e6


def device_state() -> dict[str, str]:
    """Clocks, power and temperature, as nvidia-smi tells them; empty without it."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    if shutil.which("nvidia-smi") is None:
        return {}
    index = str(torch.cuda.current_device())
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", index],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return dict(zip(fields.split(","), (value.strip() for value in done.stdout.split(",")), strict=False))


def environment() -> Record:
    """What the figures depend on besides the code."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "versions": versions(("pycompress", "torch", "triton")),
        "state": device_state(),
        "command": " ".join(sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def measure_cuda(
    shapes: Iterable[tuple[int, int, int]], builds: Mapping[str, Build], *, rounds: int = 21
) -> Iterator[list[Record]]:
    """Times the candidates on each shape (m, k, n), and yields its records, one per candidate.

    A record holds `us` (median of the rounds, on the device) and `us_quartiles`, `tops`, `host_us` (Python's share of a call
    outside a graph), `kernels`, `state` (of the device after the rounds), `relative_error` (to float32; None for sums and
    quantized rows), `time_ratio` (each other candidate's time over this one's, median and quartiles), or `unavailable`: why not.
    """
    for m, k, n in shapes:
        sets = sets_of(m, k, n)
        ready: dict[str, Candidate] = {}
        records: list[Record] = []
        for name, build in builds.items():
            try:
                ready[name] = prepare(build, sets)
            except (UnavailableError, RuntimeError) as error:
                records.append({"m": m, "k": k, "n": n, "candidate": name, "unavailable": str(error)})
        seconds: dict[str, list[float]] = {name: [] for name in ready}
        for turn in range(rounds + 1):
            for name, candidate in ready.items():
                elapsed = event_seconds(candidate.graph.replay) / candidate.calls
                if turn > 0:  # the first turn warms up
                    seconds[name].append(elapsed)
        timings, state = {name: Timing(tuple(values)) for name, values in seconds.items()}, device_state()
        expected = nn.functional.linear(sets[0].x.float(), sets[0].linear.weight, sets[0].linear.bias).detach()
        for name, candidate in ready.items():
            own, y = timings[name], candidate.runs[0]()
            records.append(
                {
                    "op": "int8_linear_cuda",
                    "m": m,
                    "k": k,
                    "n": n,
                    "candidate": name,
                    "us": own.median * 1e6,
                    "us_quartiles": [value * 1e6 for value in own.quartiles],
                    "tops": 2e-12 * m * k * n / own.median,
                    "host_us": host_microseconds(candidate.runs[0]),
                    "kernels": kernel_names(candidate.runs[0]),
                    "state": state,
                    "relative_error": relative_error(y.float(), expected) if y.is_floating_point() else None,
                    "time_ratio": {
                        other: list(ratio(timing, own)) for other, timing in timings.items() if other != name
                    },
                }
            )
        yield records


def lines(records: Sequence[Record]) -> Iterator[str]:
    """One line per candidate of a shape, for reading."""
    for record in records:
        head = f"m={record['m']} k={record['k']} n={record['n']} {record['candidate']}"
        if "unavailable" in record:
            yield f"{head}: not measured: {record['unavailable']}"
            continue
        against = record["time_ratio"].get("torch_bf16")
        speed = "" if against is None else f", {against[0]:.2f}x torch bf16"
        yield (
            f"{head}: {record['us']:.1f} us, {record['tops']:.0f} TOP/s{speed}, {record['host_us']:.1f} us in Python; "
            f"{', '.join(record['kernels'])}"
        )


def run_cuda(
    shapes: Sequence[tuple[int, int, int]], *, every_kernel: bool, rounds: int, output: Path | None
) -> Iterator[str]:
    """Measures, yields what to print, and writes JSON lines. Raises RuntimeError, saying why, without a device."""
    why = ops.cuda_error()
    if why is not None:
        raise RuntimeError(f"the CUDA benchmark needs a device: {why}")
    builds = {**LAYERS, **PRODUCTS}
    if every_kernel:
        builds |= {f"pycompress_product_{row['name']}": our_product(row["name"]) for row in ops.cuda_kernels()}
    header = {"environment": environment()}
    yield json.dumps(header)
    with torch.inference_mode():
        found = [header]
        for records in measure_cuda(shapes or CUDA_SHAPES, builds, rounds=rounds):
            found += records
            yield from lines(records)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(line) + "\n" for line in found))
