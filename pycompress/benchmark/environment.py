"""What a figure depends on besides the code: the processor, the versions, the kernels, and the machine's limits."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pycompress import ops

PACKAGES = (
    "pycompress",
    "torch",
    "numpy",
    "numba",
    "onnx",
    "onnxruntime",
    "transformers",
    "openvino",
    "nncf",
    "ctranslate2",
)


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


PEAK_LOOPS = ("fp32_fma", "maddubs_d1", "maddubs_d2", "maddubs_d4", "maddubs_d8")


def probe_peaks(seconds: float = 0.02) -> dict[str, float]:
    """G op/s of each register-only loop on all torch threads, now; empty where the probe has no AVX2."""
    try:
        return {loop: ops.peak(loop, seconds) for loop in PEAK_LOOPS}
    except ValueError:
        return {}


SMALLEST_READ = 65536  # bytes; the probe takes no fewer, and they fit the first cache anyway


def probe_bandwidth(n_bytes: int, seconds: float = 0.02) -> float | None:
    """GB/s at which all torch threads read `n_bytes` again and again; None where the probe has no AVX2."""
    try:
        return ops.bandwidth(max(n_bytes, SMALLEST_READ), seconds)
    except ValueError:
        return None
