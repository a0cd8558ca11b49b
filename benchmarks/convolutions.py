"""Compressed convolutions against torch's: `python benchmarks/convolutions.py` writes benchmarks/results/convolutions.jsonl.

Layers of a ResNet-50, one image: sparse ones with 80 and 90 % zeros, low-rank ones with half of the dense multiply-adds.
"""

from pathlib import Path

import click
import torch
from torch import nn

from pycompress import benchmark, cli
from pycompress.benchmark.harness import geometric_mean
from pycompress.methods import LowRank, Sparse
from pycompress.methods.method import Method
from pycompress.model import compress

RESULTS = Path(__file__).parent / "results"
LAYERS = ((64, 64, 3, 56), (128, 128, 3, 28), (256, 256, 3, 14), (512, 512, 3, 7), (256, 64, 1, 56), (512, 2048, 1, 7))
SHARE = 0.5  # of the dense multiply-adds


def low_rank(conv: nn.Conv2d, decomposition: str) -> LowRank:
    """The largest rank with at most SHARE of the multiply-adds."""
    n, c, (side, _) = conv.out_channels, conv.in_channels, conv.kernel_size
    area = side * side
    costs = {
        "channel": lambda r: r * (c * area + n),
        "spatial": lambda r: r * side * (c + n),
        "tucker": lambda r: r * (c + n) + r * r * area,
    }
    rank = max(r for r in range(1, min(n, c) * side) if costs[decomposition](r) <= SHARE * n * c * area)
    return LowRank(rank, decomposition=decomposition, rank_guard=False)


def measure(layer: tuple[int, int, int, int], rounds: int) -> list[benchmark.Record]:
    """One record per candidate: how many times as fast as the faster of torch's two dense layers."""
    c, n, side, size = layer
    conv = nn.Conv2d(c, n, side, padding=side // 2, dtype=torch.float32, device="cpu")
    methods: dict[str, Method] = {"sparse 80 %": Sparse(0.2), "sparse 90 %": Sparse(0.1)}
    methods |= {
        kind: low_rank(conv, kind) for kind in ("channel", "spatial", "tucker") if side > 1 or kind == "channel"
    }
    x = torch.randn(1, c, size, size, dtype=torch.float32, device="cpu")
    last = x.contiguous(memory_format=torch.channels_last)
    layers = {name: compress(nn.Sequential(conv), method) for name, method in methods.items()}
    runs = {"torch": lambda: conv(x), "torch channels-last": lambda: conv(last)}
    runs |= {name: lambda module=module: module(x) for name, module in layers.items()}
    with torch.inference_mode():
        timings = benchmark.interleave(runs, rounds=rounds, min_time_s=0.02, pause_s=0.02)
    records = []
    for name in layers:
        dense = min(benchmark.ratio(timings[peer], timings[name]).median for peer in ("torch", "torch channels-last"))
        shape = {"in_channels": c, "out_channels": n, "kernel": side, "size": size}
        records.append({**shape, "candidate": name, "us": timings[name].median * 1e6, "speedup": dense})
    return records


@click.command()
@click.option("--rounds", type=click.IntRange(min=3), default=11, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "convolutions.jsonl")
def convolutions(*, rounds: int, output: Path) -> None:
    """Times faster than the best dense convolution of torch."""
    torch.manual_seed(0)
    environment = benchmark.Environment.collect()
    records = [record for layer in LAYERS for record in measure(layer, rounds)]
    benchmark.write_json_lines(output, environment, records)
    console = cli.console()
    console.print(cli.environment_text(environment.as_dict()))
    for record in records:
        kernel = f"{record['in_channels']}-{record['out_channels']} {record['kernel']}x{record['kernel']}"
        where = f"{kernel}, {record['size']}x{record['size']}"
        console.print(
            f"{where:24}{record['candidate']:14}{record['us']:8.0f} us {record['speedup']:6.2f}x", highlight=False
        )
    for kind in ("channel", "spatial", "tucker"):
        ratios = [record["speedup"] for record in records if record["candidate"] == kind and record["kernel"] > 1]
        mean = geometric_mean(ratios)
        console.print(f"{kind}, 3x3, {SHARE:.0%} of the multiply-adds: {mean:.2f}x, efficiency {mean * SHARE:.2f}")


if __name__ == "__main__":
    convolutions()
