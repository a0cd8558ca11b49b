"""`pycompress bench int8|int4|sparse|low-rank`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import track
from rich.table import Table

from pycompress.cli.options import writable
from pycompress.cli.tables import environment_text, int4_table, int8_table, low_rank_table, sparse_table
from pycompress.cli.terminal import console

if TYPE_CHECKING:
    from torch import nn

    from pycompress import benchmark
    from pycompress.benchmark import Record

LARGEST = 2**31 - 1  # numbers in a matrix: 8 GiB of float32


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


@click.group()
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
