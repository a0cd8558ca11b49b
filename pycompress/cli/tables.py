"""The tables of `pycompress bench`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from pycompress.benchmark import Record


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
