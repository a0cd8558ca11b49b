"""The measuring harness, the peers and the int8 grid of `pycompress bench` and of the scripts in benchmarks/.

Candidates take turns in one process (A B C A B C ...), because the clock of a shared machine drifts by a
fifth within seconds: two turns of the same round can be compared, two separate runs cannot. Every ratio is
therefore the median of the per-round ratios. Peers are called the way their users call them, from Python to
Python.

The weights are Gaussian by default, as those of trained layers nearly are. `weights="uniform"` is nn.Linear's
own initialisation; it fills the int8 range evenly (mean |w| near 63 where a Gaussian has about 30), so fewer
products fit the 16-bit lane budget, the packed weight takes shallower kernels, and int8 looks slower than it
is on a trained model.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pycompress import ops
from pycompress.methods.int8 import Int8
from pycompress.nn.int8 import Int8Linear

Record = dict[str, Any]

# ---------------------------------------------------------------------------------------------------- harness


class Spread(NamedTuple):
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value, interpolated linearly."""
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high))


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return spread(self.seconds).median

    @property
    def quartiles(self) -> tuple[float, float]:
        _, low, high = spread(self.seconds)
        return low, high


def ratio(a: Timing, b: Timing) -> Spread:
    """Median and quartiles of the per-round ratio a / b: above 1 where b is the faster one."""
    return spread([x / y for x, y in zip(a.seconds, b.seconds, strict=True)])


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean of positive values; raises StatisticsError where there are none."""
    return statistics.geometric_mean(values)


def interleave(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, min_time_s: float, pause_s: float = 0.0
) -> dict[str, Timing]:
    """Time the candidates turn by turn: A B C A B C ..., `rounds` times.

    Each is warmed up and then called often enough for one turn to last about `min_time_s`. `pause_s` is slept
    before each turn: 0.02 lets the workers of ONNX Runtime fall asleep, which would otherwise steal the cores
    from whoever is next.
    """
    if rounds < 1:
        raise ValueError(f"interleave: rounds is {rounds}, expected at least 1")
    calls = {name: _calls_per_turn(run, min_time_s) for name, run in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            time.sleep(pause_s)
            if calls[name] > 1:
                run()  # brings caches and sleeping threads back; a call as long as the turn does so by itself
            seconds[name].append(_turn(run, calls[name]))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _turn(run: Callable[[], object], calls: int) -> float:
    """Seconds per call over `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _calls_per_turn(run: Callable[[], object], min_time_s: float) -> int:
    """Warm up, and say how many calls last about `min_time_s`."""
    run()
    calls = 1
    while (elapsed := _turn(run, calls) * calls) < min_time_s / 4:
        calls *= 2
    return max(1, math.ceil(calls * min_time_s / elapsed))


def rotating(runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One callable for many, called in turn: each meets weights that the others drove out of the cache."""
    following = 0

    def run() -> object:
        nonlocal following
        chosen = runs[following]
        following = (following + 1) % len(runs)
        return chosen()

    return run


# ------------------------------------------------------------------------------------------------ environment

PACKAGES = ("pycompress", "torch", "numpy", "numba", "onnx", "onnxruntime", "transformers")


@dataclass(frozen=True)
class Environment:
    """What a figure depends on besides the code: quote none without it."""

    processor: str
    instruction_sets: tuple[str, ...]
    cores: int
    threads: int
    l3_bytes: int
    versions: dict[str, str]
    kernels: tuple[str, ...]
    load_average: float  # before measuring: near the number of cores, somebody else was using them
    date: str

    @classmethod
    def collect(cls) -> Environment:
        return cls(
            processor=processor_name(),
            instruction_sets=tuple(name for name, present in ops.instruction_sets().items() if present),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            l3_bytes=l3_bytes(),
            versions=versions(PACKAGES),
            kernels=tuple(f"{kernel['op']}: {kernel['name']}" for kernel in chosen_kernels()),
            load_average=os.getloadavg()[0],
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Version of each installed package, without importing it; those not installed are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def chosen_kernels() -> list[dict[str, Any]]:
    """The first available kernel of each op: the tables are ordered best first."""
    chosen: dict[str, dict[str, Any]] = {}
    for kernel in ops.kernels():
        if kernel["available"]:
            chosen.setdefault(kernel["op"], kernel)
    return list(chosen.values())


def processor_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def l3_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the last-level cache; 32 MiB where the system does not tell."""
    units = {"K": 10, "M": 20}
    texts = [size.read_text().strip() for size in folder.glob("index*/size")]  # such as 32768K
    return max((int(text.rstrip("KM")) << units.get(text[-1], 0) for text in texts), default=32 << 20)


PEAK_LOOPS = ("fp32_fma", "maddubs_d1", "maddubs_d2", "maddubs_d4")


def probe_peaks(seconds: float = 0.02) -> dict[str, float]:
    """G op/s of each register-only loop on all torch threads, now; empty where the probe has no AVX2."""
    try:
        return {loop: ops.peak(loop, seconds) for loop in PEAK_LOOPS}
    except ValueError:
        return {}


def probe_bandwidth(n_bytes: int, seconds: float = 0.02) -> float | None:
    """GB/s at which all torch threads read `n_bytes` again and again; None where the probe has no AVX2."""
    try:
        return ops.bandwidth(n_bytes, seconds)
    except ValueError:
        return None


# ------------------------------------------------------------------------------------------------------ peers


class UnavailableError(Exception):
    """A peer that is not installed or does not run on this machine; the message says which."""


class Call(NamedTuple):
    """A layer bound to its input: `run` is what is timed, `output` gives y [m, n] float32 of the last run."""

    run: Callable[[], object]
    output: Callable[[], torch.Tensor]


Bind = Callable[[torch.Tensor], Call]  # a built layer: x float32 [m, k] -> Call
Build = Callable[[nn.Linear], Bind]  # a float32 linear layer -> the peer's own layer


def module_call(layer: nn.Module) -> Bind:
    """How torch layers are called: the module itself, under an inference_mode entered once by the caller."""

    def bind(x: torch.Tensor) -> Call:
        run = partial(layer, x)
        return Call(run, run)

    return bind


def pycompress_int8(activation_bits: int) -> Build:
    method = Int8(activation_bits=activation_bits)
    return lambda linear: module_call(Int8Linear.from_dense(linear, method=method))


def torch_fp32(linear: nn.Linear) -> Bind:
    return module_call(linear)


def torch_dynamic(engine: str) -> Build:
    return lambda linear: module_call(quantize_dynamic(nn.Sequential(linear), engine)[0])


def quantize_dynamic(model: nn.Module, engine: str) -> Any:
    """A copy of `model` with its linear layers quantized by torch's own `quantize_dynamic`.

    The packed weights remember the engine that packed them, so the engine matters here and not at call time
    (measured: same bits and same speed whatever the engine is set to afterwards).
    """
    if engine not in torch.backends.quantized.supported_engines:
        raise UnavailableError(f"torch has no {engine} engine on this machine")
    before = torch.backends.quantized.engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of torch.ao.quantization at every call
            torch.backends.quantized.engine = engine
            quantize: Any = torch.ao.quantization.quantize_dynamic
            return quantize(model, {nn.Linear}, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = before


def ort_session(model: bytes | str, *, spinning: bool = False) -> Any:
    """An ONNX Runtime CPU session with as many threads as torch has.

    Without `spinning`, its workers stop spinning when a run ends, so that they do not slow down whoever is
    next.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UnavailableError("not installed: onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if not spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def ort_call(session: Any, n: int) -> Bind:
    """How a session is called where speed matters: inputs and outputs bound to preallocated buffers."""

    def bind(x: torch.Tensor) -> Call:
        from onnxruntime import OrtValue

        y = OrtValue.ortvalue_from_numpy(np.zeros((x.shape[0], n), np.float32))
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", OrtValue.ortvalue_from_numpy(x.numpy()))
        binding.bind_ortvalue_output("y", y)
        return Call(partial(session.run_with_iobinding, binding), lambda: torch.from_numpy(y.numpy()))

    return bind


def ort_fp32(linear: nn.Linear) -> Bind:
    weight, bias = _arrays(linear)
    nodes = [("MatMul", ["x", "weight"], ["product"], ""), ("Add", ["product", "bias"], ["y"], "")]
    constants = {"weight": np.ascontiguousarray(weight.T), "bias": bias}
    return _ort_linear(linear, nodes, constants, spinning=False)


def ort_int8(signed: bool, *, spinning: bool = False) -> Build:
    """DynamicQuantizeMatMul with a scale per output channel: u8 activations per tensor, weights s8 or u8.

    Where the processor has no VNNI, the s8 form adds pairs of products in saturating 16-bit lanes; the u8
    form is exact.
    """

    def build(linear: nn.Linear) -> Bind:
        weight, bias = _arrays(linear)
        scale = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
        values = np.rint(weight / scale[:, None]).T
        kind, zero = (np.int8, 0) if signed else (np.uint8, 128)
        constants = {
            "weight": np.ascontiguousarray((values + zero).astype(kind)),
            "scale": scale,
            "zero_point": np.full(scale.shape, zero, kind),
            "bias": bias,
        }
        node = ("DynamicQuantizeMatMul", ["x", *constants], ["y"], "com.microsoft")
        return _ort_linear(linear, [node], constants, spinning=spinning)

    return build


def _arrays(linear: nn.Linear) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """weight [n, k] and bias [n] of a layer that has both."""
    return linear.weight.detach().numpy(), linear.bias.detach().numpy()


def _ort_linear(
    linear: nn.Linear,
    nodes: list[tuple[str, list[str], list[str], str]],
    constants: dict[str, np.ndarray[Any, Any]],
    *,
    spinning: bool,
) -> Bind:
    """A session for a graph x [m, k] -> y [m, n] of (op, inputs, outputs, domain) nodes."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ModuleNotFoundError as error:
        raise UnavailableError("not installed: onnx") from error
    graph = helper.make_graph(
        [helper.make_node(op, inputs, outputs, domain=domain) for op, inputs, outputs, domain in nodes],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", linear.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", linear.out_features])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return ort_call(ort_session(model.SerializeToString(), spinning=spinning), linear.out_features)


OURS: dict[str, Build] = {"pycompress_a7": pycompress_int8(7), "pycompress_a8": pycompress_int8(8)}
PEERS: dict[str, Build] = {
    "torch_fp32": torch_fp32,
    "torch_fbgemm": torch_dynamic("fbgemm"),
    "torch_onednn": torch_dynamic("onednn"),
    "ort_fp32": ort_fp32,
    "ort_u8": ort_int8(signed=False),
    "ort_s8": ort_int8(signed=True),
}
SPINNING: dict[str, Build] = {  # ONNX Runtime as it comes: its workers spin on, which pays at one row
    "ort_u8_spinning": ort_int8(signed=False, spinning=True),
    "ort_s8_spinning": ort_int8(signed=True, spinning=True),
}
EXACT_PEERS = ("torch_fbgemm", "ort_u8")


def available(builds: Mapping[str, Build]) -> tuple[dict[str, Build], dict[str, str]]:
    """Split candidates into those that run here and, for the others, why not."""
    usable: dict[str, Build] = {}
    missing: dict[str, str] = {}
    for name, build in builds.items():
        try:
            build(dense_linear(16, 16))(torch.zeros(1, 16)).run()
            usable[name] = build
        except Exception as error:  # whatever keeps a peer from running is reported; it is no failure of ours
            missing[name] = str(error) or type(error).__name__
    return usable, missing


def dense_linear(k: int, n: int, weights: str = "gaussian") -> nn.Linear:
    """The same float32 layer at every call; weights "gaussian" (std 1/sqrt(k)) or "uniform" (+-1/sqrt(k))."""
    if weights not in ("gaussian", "uniform"):
        raise ValueError(f'weights is {weights!r}, expected "gaussian" or "uniform"')
    generator = torch.Generator().manual_seed(k * 65537 + n)
    linear = nn.Linear(k, n)
    for parameter in linear.parameters():
        if weights == "gaussian":
            nn.init.normal_(parameter, std=k**-0.5, generator=generator)
        else:
            nn.init.uniform_(parameter, -(k**-0.5), k**-0.5, generator=generator)
        parameter.requires_grad_(False)
    return linear


# ------------------------------------------------------------------------------------------------------- grid

# (k, n)
INT8_SHAPES = ((384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768), (4096, 4096))
INT8_ROWS = (1, 8, 32, 128, 512)
QUICK_SHAPES = ((384, 1536), (768, 768))
QUICK_ROWS = (1, 32, 512)
MAX_COPIES = 96  # layers so small that more copies would be needed to leave the cache get no cold figure


def copies_to_leave_cache(layer_bytes: int) -> int:
    """How many copies of a layer hold half as much again as the last-level cache (at least 2)."""
    return max(2, math.ceil(1.5 * l3_bytes() / layer_bytes))


def int8_cells(shapes: Sequence[tuple[int, int]], rows: Sequence[int], *, cold: bool = True) -> list[Record]:
    """The cells {k, n, m, weights} of a grid: all with warm weights, and one row with cold ones as well."""
    cells: list[Record] = []
    for k, n in shapes:
        cells += [{"k": k, "n": n, "m": m, "weights": "warm"} for m in rows]
        if cold and 1 in rows and copies_to_leave_cache(k * n) <= MAX_COPIES:
            cells.append({"k": k, "n": n, "m": 1, "weights": "cold"})
    return cells


def measure_int8(
    cells: Iterable[Record],
    builds: Mapping[str, Build],
    *,
    spinning: Mapping[str, Build] | None = None,
    rounds: int = 15,
    min_time_s: float = 0.02,
    pause_s: float = 0.02,
    weights: str = "gaussian",
) -> Iterator[list[Record]]:
    """Time the candidates on each cell of `int8_cells`, and yield its records, one per candidate.

    `spinning` holds candidates for the warm one-row cells alone, timed after the others. A record holds the cell and: `candidate`,
    `us` (median) and `us_quartiles`, `gops`, `peak_gops` (the faster of the probes before and after),
    `share_of_peak` (of maddubs_d2; of fp32_fma for the fp32 candidates), `weight_gbs` (weight bytes read per
    second, in 1e9), `bandwidth_gbs` (one-row cells: the probe's rate at the size of the int8 weight, or
    beyond the cache for cold weights), `relative_error` (Frobenius, to fp32), and `time_ratio`: median and
    quartiles of each other candidate's time over this one's.
    """
    built: dict[str, Bind] = {}
    built_for = None
    extra: dict[str, Bind]
    for cell in cells:
        k, n, m = cell["k"], cell["n"], cell["m"]
        linear = dense_linear(k, n, weights)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        if cell["weights"] == "cold":
            extra, calls = {}, {name: _cold_call(build, linear, x, name) for name, build in builds.items()}
        else:
            if built_for != (k, n):
                built = {name: build(linear) for name, build in builds.items()}
                built_for = (k, n)
            extra = {name: build(linear) for name, build in (spinning or {}).items()} if m == 1 else {}
            calls = {name: bind(x) for name, bind in {**built, **extra}.items()}
        with torch.inference_mode():
            before = probe_peaks()
            # Workers that spin on would steal the cores from whoever is next: they take their turns afterwards.
            timings: dict[str, Timing] = {}
            for group in (built.keys() if cell["weights"] == "warm" else calls.keys(), extra.keys()):
                runs = {name: calls[name].run for name in group}
                timings |= interleave(runs, rounds=rounds, min_time_s=min_time_s, pause_s=pause_s)
            limits = _limits(cell, before)
            errors = {name: relative_error(call.output(), linear(x)) for name, call in calls.items()}
        yield [_record(cell, name, timings, errors[name], limits) for name in calls]


def _cold_call(build: Build, linear: nn.Linear, x: torch.Tensor, name: str) -> Call:
    """A candidate that rotates over copies of the layer, and so meets its weights outside the cache."""
    calls = []
    for _ in range(copies_to_leave_cache(linear.weight.numel() * _weight_bytes(name))):
        call = build(copy.deepcopy(linear))(x)
        with torch.inference_mode():
            call.run()  # the worker of a new ONNX Runtime session spins until its first run has ended
        calls.append(call)
    return Call(rotating([call.run for call in calls]), calls[0].output)


def _weight_bytes(candidate: str) -> int:
    return 4 if candidate.endswith("_fp32") else 1


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """|y - expected| / |expected| in the Frobenius norm."""
    return float(torch.linalg.norm((y - expected).double()) / torch.linalg.norm(expected.double()))


def _limits(cell: Record, before: dict[str, float]) -> Record:
    """What the machine could do around this cell: its arithmetic peaks, and at one row its read bandwidth."""
    peaks = {loop: max(before[loop], after) for loop, after in probe_peaks().items()}
    read = 2 * l3_bytes() if cell["weights"] == "cold" else cell["k"] * cell["n"]
    return {"peak_gops": peaks, "bandwidth_gbs": probe_bandwidth(read) if cell["m"] == 1 else None}


def _record(cell: Record, name: str, timings: dict[str, Timing], error: float, limits: Record) -> Record:
    k, n, m = cell["k"], cell["n"], cell["m"]
    own = timings[name]
    gops = 2e-9 * m * k * n / own.median
    peak = limits["peak_gops"].get("fp32_fma" if name.endswith("_fp32") else "maddubs_d2")
    return {
        "op": "int8_linear",
        **cell,
        "candidate": name,
        "us": own.median * 1e6,
        "us_quartiles": [value * 1e6 for value in own.quartiles],
        "gops": gops,
        "share_of_peak": gops / peak if peak else None,
        "weight_gbs": 1e-9 * k * n * _weight_bytes(name) / own.median,
        **limits,
        "relative_error": error,
        "time_ratio": {other: list(ratio(timing, own)) for other, timing in timings.items() if other != name},
    }


# ---------------------------------------------------------------------------------------------------- results


def measured(record: Record, peers: Iterable[str]) -> bool:
    """Whether any of `peers` was timed beside this record's candidate."""
    return any(peer in record["time_ratio"] for peer in peers)


def best_ratio(record: Record, peers: Iterable[str]) -> float:
    """Time of the fastest of `peers` over that of this record's candidate: above 1 where they are slower.

    Peers that did not run are left out; raises ValueError where none did.
    """
    return float(min(record["time_ratio"][peer][0] for peer in peers if peer in record["time_ratio"]))


@dataclass(frozen=True)
class Comparison:
    """One line of the summary: a candidate against the best of some peers over part of the grid."""

    candidate: str
    against: str
    scope: str
    cells: int
    geometric_mean: float
    worst: float
    worst_cell: str

    def __str__(self) -> str:
        return (
            f"{self.candidate} against {self.against}, {self.scope} ({self.cells} cell(s)): "
            f"geometric mean {self.geometric_mean:.3f}x, worst {self.worst:.3f}x at {self.worst_cell}"
        )


_SCOPES: dict[str, Callable[[Record], bool]] = {
    "whole grid": lambda record: record["weights"] == "warm",
    "m >= 128": lambda record: record["m"] >= 128,
    "m = 1": lambda record: record["m"] == 1 and record["weights"] == "warm",
    "m = 1, cold weights": lambda record: record["m"] == 1 and record["weights"] == "cold",
    "m = 1, ONNX Runtime spinning": lambda record: measured(record, SPINNING),
}
_GRID = ("whole grid", "m >= 128")
_COMPARISONS = (
    ("pycompress_a7", "the best peer", tuple(PEERS), (*_GRID, "m = 1", "m = 1, cold weights")),
    ("pycompress_a7", "the best peer", (*PEERS, *SPINNING), ("m = 1, ONNX Runtime spinning",)),
    ("pycompress_a8", "the best exact peer", EXACT_PEERS, (*_GRID, "m = 1", "m = 1, cold weights")),
    ("pycompress_a8", "ONNX Runtime s8, which saturates", ("ort_s8",), _GRID),
    ("pycompress_a8", "the best peer", (*PEERS, *SPINNING), ("m = 1, ONNX Runtime spinning",)),
)


def summarize(records: Sequence[Record]) -> list[Comparison]:
    """Geometric mean and worst cell of every comparison that the records allow."""
    lines = []
    for candidate, against, peers, scopes in _COMPARISONS:
        for scope in scopes:
            ratios = {
                f"m={record['m']} k={record['k']} n={record['n']}": best_ratio(record, peers)
                for record in records
                if record["candidate"] == candidate and _SCOPES[scope](record) and measured(record, peers)
            }
            if ratios:
                worst = min(ratios, key=ratios.__getitem__)
                mean = geometric_mean(ratios.values())
                lines.append(Comparison(candidate, against, scope, len(ratios), mean, ratios[worst], worst))
    return lines


def json_lines(environment: Environment, records: Iterable[Record]) -> str:
    """One JSON object per line: {"environment": ...} first, then the records."""
    return "".join(json.dumps(line) + "\n" for line in ({"environment": environment.as_dict()}, *records))


def write_json_lines(path: Path, environment: Environment, records: Iterable[Record]) -> None:
    """Write json_lines() to a file, whose folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_lines(environment, records))
