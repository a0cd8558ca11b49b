"""Compressed models in the runtimes of targets: `python benchmarks/targets.py --target executorch` prints a row for each plan, and
appends them to benchmarks/results/targets.jsonl.

all-MiniLM-L6-v2 at 1 x 64 tokens and a small convolution network (32 x 32 images, random weights), one thread. What the file gives
is held against the compressed model here, and each is called in turns with it. Where a target lacks an encoding, the layer is
widened, and the row says how many were. The target's extra has to be installed: `make targets` does it, in build/targets/<name>.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress import benchmark, cli, demo
from pycompress.benchmark import interleave, ratio
from pycompress.calls import call_model
from pycompress.targets import TARGETS
from pycompress.targets.source import Source

PLANS: dict[str, Any] = {
    "Int8(8)": pc.Int8(),
    "Int8(16)": pc.Int8(activation_bits=16),
    "Int4(symmetric)": pc.Int4(symmetric=True),
    "Int4(symmetric), calibrated": pc.Int4(symmetric=True),
    "Sparse(0.3)": pc.Sparse(density=0.3),
    "LowRank(64, Int8)": pc.LowRank(64, residual=pc.Int8()),
}
IMAGES = {"CNN, Int8(8)": pc.Int8(), "CNN, Sparse(0.3)": pc.Sparse(density=0.3)}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 1), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.convolutions(image).mean((2, 3)))
        return logits


def models(plans: Sequence[str]) -> Iterator[tuple[str, nn.Module, Any]]:
    """Name, compressed model and example inputs of these plans, in the order of the tables."""
    if chosen := [name for name in PLANS if name in plans]:
        text, tokenizer = demo.load()
        batch = demo.token_batch(tokenizer, demo.docstring_sentences(64), 1, 64)
        for name in chosen:
            seen = None
            if name.endswith("calibrated"):
                seen = demo.calibrated(text, tokenizer, demo.docstring_sentences(96)[64:])
            yield name, pc.compress(text, PLANS[name], calibration=seen), batch
    for name in (name for name in IMAGES if name in plans):
        torch.manual_seed(0)
        yield name, pc.compress(Network().eval(), IMAGES[name]), torch.randn(1, 3, 32, 32)


def one_thread(target: str) -> None:
    torch.set_num_threads(1)
    if target == "executorch":  # its pool has a thread for each core, whatever torch's has
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(1)


@click.command()
@click.option("--target", type=click.Choice([*TARGETS]), required=True)
@click.option("--plan", "plans", multiple=True, type=click.Choice([*PLANS, *IMAGES]), help="These alone.")
@click.option("--rounds", type=click.IntRange(min=3), default=15, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "targets.jsonl")
def main(target: str, plans: tuple[str, ...], rounds: int, output: Path) -> None:
    """Print a row for each plan: what became of its layers, error, sizes and times."""
    warnings.simplefilter("ignore")  # the converters warn much
    one_thread(target)
    environment = benchmark.Environment.collect().as_dict()
    click.echo(cli.environment_text(environment))
    place = TARGETS[target]
    for name, model, inputs in models(plans or [*PLANS, *IMAGES]):
        with TemporaryDirectory() as folder:
            found = pc.deploy(model, target, Path(folder, f"m{place.suffix}"), inputs, widen=True)
            record: dict[str, Any] = {
                "target": target,
                "plan": name,
                "fates": Counter(one.fate for _, one in found.layers.values()),
                "encodings": Counter(one.encoding for _, one in found.layers.values()),
                "bytes": found.bytes,
                "our_bytes": found.ours,
                "checked": None if found.checked is None else asdict(found.checked),
            }
            if found.checked is not None:
                tensors = Source.of(model, inputs, None).call.tensors
                runs = {"theirs": partial(place.open(found.path), tensors), "ours": partial(call_model, model, inputs)}
                with torch.inference_mode():
                    times = interleave(runs, rounds=rounds, min_time_s=0.1, pause_s=0.02)
                record["us"] = {side: 1e6 * one.median for side, one in times.items()}
                record["theirs_over_ours"] = list(ratio(times["theirs"], times["ours"]))
        click.echo(row(record))
        with output.open("a") as file:
            file.write(json.dumps({**record, "environment": environment}) + "\n")


def row(record: dict[str, Any]) -> str:
    """Of a Markdown table."""
    fates = ", ".join(f"{count} {fate}" for fate, count in record["fates"].items())
    cells = [record["target"], record["plan"], fates]
    checked = record["checked"]
    cells.append("not run" if checked is None else f"{checked['error']:.1e}")
    cells += [f"{record[size] / 1e6:.2f}" for size in ("bytes", "our_bytes")]
    cells += [f"{record['us'][side] / 1e3:.2f}" for side in ("theirs", "ours")] if "us" in record else ["", ""]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
