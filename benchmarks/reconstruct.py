"""What training without labels gives back, over minutes: `python benchmarks/reconstruct.py "Sparse(0.5)" --minutes 10`.

all-MiniLM-L6-v2, compressed by a plan as benchmarks/accuracy.py takes it, and reconstructed on sentences that are not those of the
measurement: `mixed`, or other `docstrings`. A line of benchmarks/results/reconstruct.jsonl has the curve: seconds of training, and
the mean cosines to the float32 embeddings of 256 docstrings and of 256 film reviews, before every block and at every score of the
whole model, by the compressed layers.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import texts
import torch
from accuracy import CALIBRATION, Evaluation, plan_of
from torch import nn

import pycompress as pc
from pycompress import demo
from pycompress.benchmark.environment import processor_name, versions
from pycompress.train import Progress

RESULTS = Path(__file__).parent / "results" / "reconstruct.jsonl"
LENGTH = 64  # tokens
MOST = {"mixed": 16000, "docstrings": 1500}  # sentences: about all that there are


def batches(tokenizer: Any, sentences: list[str], size: int) -> list[dict[str, torch.Tensor]]:
    """Of sentences of like length."""
    ordered = sorted(sentences, key=len)
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [
        dict(tokenizer(part, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")) for part in parts
    ]


@click.command()
@click.argument("plan")
@click.option("--minutes", default=10.0)
@click.option(
    "--text", "domain", type=click.Choice(["mixed", "docstrings"]), default="mixed", help="To calibrate and train on."
)
@click.option("--sentences", type=int, help=f"To train on; {MOST} where nothing is said.")
@click.option("--batch", default=32, help="Sentences in a batch.")
@click.option("--lr", default=2e-3)
@click.option("--whole", default=1.0, help="Share of the time for the whole model.")
@click.option("--bfloat16", is_flag=True, help="Train in bfloat16, where the processor has AMX.")
@click.option("--threads", type=click.IntRange(min=1), default=2)
def main(
    plan: str, minutes: float, domain: str, sentences: int | None, batch: int, lr: float, whole: float, bfloat16: bool, threads: int
) -> None:  # fmt: skip
    """Train a plan for some minutes, and append its curve to the results."""
    torch.set_num_threads(threads)
    evaluation = Evaluation()
    calibration = evaluation.calibrated(domain)
    besides = evaluation.sentences["docstrings"]
    own = partial(texts.mixed, seed=1) if domain == "mixed" else partial(demo.docstring_sentences, besides=besides)
    text = own(sentences or MOST[domain])
    curve: list[dict[str, Any]] = []
    latest: list[str] = []

    def measure(block: str, seconds: float, steps: int, model: nn.Module) -> None:
        found = {name: round(own["cosine_mean"], 4) for name, own in evaluation.closeness(model).items()}
        curve.append({"block": block, "seconds": round(seconds, 1), "steps": steps, **found})
        print(json.dumps(curve[-1]), flush=True)

    def note(now: Progress, model: nn.Module) -> None:
        print(now, flush=True)
        if now.block == "" or latest != [now.block]:
            measure(now.block, now.seconds, now.steps, model)
        latest[:] = [now.block]

    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        result = pc.reconstruct(
            evaluation.model, plan_of(plan), batches(evaluation.tokenizer, text, batch), calibration=calibration,
            blocks="encoder.layer.*", minutes=minutes, lr=lr, whole=whole, progress=note,
        )  # fmt: skip
    measure("the result", time.perf_counter() - start, 0, result)
    options = {"minutes": minutes, "text": domain, "sentences": len(text), "batch": batch, "lr": lr, "whole": whole}
    options["bfloat16"] = bfloat16
    line = {"plan": plan, **options, "calibration": CALIBRATION, "threads": threads, "processor": processor_name()}
    line |= {"versions": versions(["torch", "transformers", "pycompress"]), "curve": curve}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")


if __name__ == "__main__":
    main()
