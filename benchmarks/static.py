"""Static int8 linear layers beside dynamic ones: `python benchmarks/static.py` prints how many times as long the dynamic one takes,
and writes benchmarks/results/static.jsonl.

The same weights, in turns; all that differs is that a dynamic layer looks for the ends of each row, and a static one has a range.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import torch
from torch import nn

import pycompress as pc
from pycompress import benchmark, cli
from pycompress.benchmark import interleave, ratio
from pycompress.benchmark.harness import geometric_mean
from pycompress.nn import Int8Linear

SHAPES = ((384, 384), (384, 1536), (1536, 384), (768, 3072), (4096, 1024))  # k, n
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)


@click.command()
@click.option("--rounds", type=click.IntRange(min=3), default=15, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "static.jsonl")
def main(rounds: int, threads: int, output: Path) -> None:
    """Print a line for each number of rows."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    environment = benchmark.Environment.collect()
    click.echo(cli.environment_text(environment.as_dict()))
    records: list[benchmark.Record] = []
    for m in ROWS:
        found = []
        for k, n in SHAPES:
            dense = nn.Linear(k, n, dtype=torch.float32, device="cpu")
            fixed = pc.Int8(activation="static", observer=pc.Known(-5, 5))
            x = torch.randn(m, k, dtype=torch.float32, device="cpu")
            runs = {
                name: partial(Int8Linear.from_dense(dense, method), x)
                for name, method in (("dynamic", pc.Int8()), ("static", fixed))
            }
            with torch.inference_mode():
                times = interleave(runs, rounds=rounds, min_time_s=0.02)
            gain = ratio(times["dynamic"], times["static"])
            found.append(gain.median)
            us = {name: 1e6 * own.median for name, own in times.items()}
            records.append({"m": m, "k": k, "n": n, "us": us, "dynamic_over_static": list(gain)})
        click.echo(f"{m:4} rows: {geometric_mean(found):.2f} ({' '.join(f'{one:.2f}' for one in found)})")
    benchmark.write_json_lines(output, environment, records)


if __name__ == "__main__":
    main()
