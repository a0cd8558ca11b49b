"""Layers on a CUDA device beside their peers: how cases are measured. `benchmarks/gpu.py` says which.

Every candidate is captured into a CUDA graph of calls that rotate over inputs and weights larger together than the L2 cache,
and the graphs take turns, timed by CUDA events. Data is random: a multiplication of zeros draws less power, and clocks higher.
The dense peers of sparse layers multiply the zeros too, so that is in their favour.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.benchmark.environment import versions
from pycompress.benchmark.harness import Timing
from pycompress.benchmark.peers import UnavailableError, relative_error
from pycompress.benchmark.results import Record, microseconds, time_ratios
from pycompress.weights import Weight

MOST_SETS = 64
CALLS = 32  # in a graph, at least
MANY_ROWS = ((4096, 4096, 4096), (4096, 4096, 14336))  # (m, k, n)


class Set(NamedTuple):
    """One of the inputs and weights that the calls rotate over.

    Attributes:
        x: bfloat16 [m, k].
        linear: a float32 layer [n, k]; all candidates compute what it does.
        weight: the canonical weight that its weight is the dense form of; None where there is none.
    """

    x: Tensor
    linear: nn.Linear
    weight: Weight | None = None


Run = Callable[[], Tensor]
Build = Callable[[Set], Run]


class Case(NamedTuple):
    """What is measured side by side.

    Attributes:
        op: as the records name it.
        builds: the candidates.
        every_kernel: further ones, which force each kernel.
        shapes: (m, k, n).
        weight: makes the weight [n, k] that all have, of n and k; None: Gaussian ones.
    """

    op: str
    builds: Mapping[str, Build]
    every_kernel: Callable[[], Mapping[str, Build]] = dict
    shapes: Sequence[tuple[int, int, int]] = MANY_ROWS
    weight: Callable[[int, int], Weight] | None = None


def torch_dense(dtype: torch.dtype) -> Build:
    def build(one: Set) -> Run:
        x, weight, bias = (t.to(dtype) for t in (one.x, one.linear.weight.detach(), one.linear.bias.detach()))
        return lambda: nn.functional.linear(x, weight, bias)

    return build


# --- measuring --------------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A candidate ready to be timed: one call for each set, and a graph of `calls` of them."""

    runs: list[Run]
    graph: torch.cuda.CUDAGraph
    calls: int


def event_seconds(run: Callable[[], object]) -> float:
    """What the device needs for `run()`, by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def sets_of(m: int, k: int, n: int, weight: Callable[[int, int], Weight] | None) -> list[Set]:
    """Random inputs and layers, twice as large together as the L2, 2 of them at least."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    count = min(max(2, math.ceil(2 * l2 / (m * k + n * k + m * n))), MOST_SETS)
    torch.manual_seed(0)
    sets = []
    for _ in range(count):
        linear = nn.Linear(k, n, device="cuda", dtype=torch.float32)
        made = None if weight is None else weight(n, k)
        with torch.no_grad():
            if made is None:
                linear.weight.normal_(std=k**-0.5)
            else:
                linear.weight.copy_(made.decompress())
        sets.append(Set(torch.randn(m, k, device="cuda", dtype=torch.bfloat16), linear, made))
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
    case: Case, shapes: Iterable[tuple[int, int, int]], builds: Mapping[str, Build], *, rounds: int = 21
) -> Iterator[list[Record]]:
    """Times the candidates on each shape (m, k, n), and yields its records, one per candidate.

    A record holds `op`, `us` (median of the rounds, on the device) and `us_quartiles`, `tops` (as if the layer were dense),
    `host_us` (Python's share of a call outside a graph), `kernels`, `state` (of the device after the rounds), `relative_error`
    (to float32; None for sums and quantized rows), `time_ratio` (each other candidate's time over this one's, median and
    quartiles), or `unavailable`: why not.
    """
    for m, k, n in shapes:
        cell, sets = {"op": case.op, "m": m, "k": k, "n": n}, sets_of(m, k, n, case.weight)
        ready: dict[str, Candidate] = {}
        records: list[Record] = []
        for name, build in builds.items():
            try:
                ready[name] = prepare(build, sets)
            except (UnavailableError, RuntimeError) as error:
                records.append({**cell, "candidate": name, "unavailable": str(error)})
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
                    **cell,
                    "candidate": name,
                    **microseconds(own),
                    "tops": 2e-12 * m * k * n / own.median,
                    "host_us": host_microseconds(candidate.runs[0]),
                    "kernels": kernel_names(candidate.runs[0]),
                    "state": state,
                    "relative_error": relative_error(y.float(), expected) if y.is_floating_point() else None,
                    "time_ratio": time_ratios(name, timings),
                }
            )
        yield records


def lines(records: Sequence[Record]) -> Iterator[str]:
    """One line per candidate of a shape, for reading."""
    for record in records:
        head = f"{record['op']} m={record['m']} k={record['k']} n={record['n']} {record['candidate']}"
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
    cases: Sequence[Case],
    shapes: Sequence[tuple[int, int, int]],
    *,
    every_kernel: bool,
    rounds: int,
    output: Path | None,
) -> Iterator[str]:
    """Measures the cases, on their own shapes where none are given, yields what to print, and writes JSON lines as they come.

    Raises:
        RuntimeError: there is no device, and why.
    """
    why = ops.cuda_error()
    if why is not None:
        raise RuntimeError(f"the CUDA benchmark needs a device: {why}")
    with ExitStack() as stack:
        file = None
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(output.open("w"))

        def keep(*records: Record) -> None:
            if file is not None:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()  # whoever stops the run keeps what was measured

        stack.enter_context(torch.inference_mode())
        header: Record = {"environment": environment()}
        keep(header)
        yield json.dumps(header)
        for case in cases:
            builds = {**case.builds, **(case.every_kernel() if every_kernel else {})}
            for records in measure_cuda(case, shapes or case.shapes, builds, rounds=rounds):
                keep(*records)
                yield from lines(records)
