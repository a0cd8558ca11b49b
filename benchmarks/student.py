"""A student of all-MiniLM-L6-v2 with half of its blocks, from text without labels: `python benchmarks/student.py --minutes 15`.

It begins with the teacher's blocks 1, 3 and 5 and learns the results of these, and the embedding (`pc.Distillation`), from the
sentences of benchmarks/texts.py but the first 2,000 film reviews, and from docstrings other than those that are measured. A line
of benchmarks/results/student.jsonl has the curve over minutes: the mean cosines to the teacher's embeddings of 256 docstrings and
of 256 film reviews; and those of the student in int8 at the end.
"""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import click
import texts
import torch
from accuracy import Evaluation
from reconstruct import MOST, batches
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pycompress as pc
from pycompress import demo
from pycompress.benchmark.environment import processor_name, versions

RESULTS = Path(__file__).parent / "results" / "student.jsonl"
BLOCKS = "encoder.layer.*"
LEFT_OUT = ("encoder.layer.0", "encoder.layer.2", "encoder.layer.4")


@click.command()
@click.option("--minutes", default=15.0)
@click.option("--batch", default=32, help="Sentences in a batch.")
@click.option("--lr", default=5e-4)
@click.option("--embedding", default=2.0, help="Weight of the embedding beside that of the blocks' results.")
@click.option("--cache", type=click.Path(path_type=Path), help="A folder for what the teacher gives: 3 GB.")
@click.option("--bfloat16", is_flag=True, help="Train in bfloat16, where the processor has AMX.")
@click.option("--threads", type=click.IntRange(min=1), default=2)
def main(
    minutes: float, batch: int, lr: float, embedding: float, cache: Path | None, bfloat16: bool, threads: int
) -> None:
    """Train a student, and append its curve to the results."""
    torch.set_num_threads(threads)
    evaluation = Evaluation()
    sentences = texts.mixed(MOST["mixed"], seed=1)
    sentences += demo.docstring_sentences(MOST["docstrings"], besides=evaluation.sentences["docstrings"])
    text = batches(evaluation.tokenizer, sentences, batch)
    teacher = copy.deepcopy(evaluation.model)
    student = pc.Cut.without(*LEFT_OUT).apply(copy.deepcopy(evaluation.model))
    distill = pc.Distillation(
        teacher, student, hidden=BLOCKS, embedding="cosine", weights={"embedding": embedding}, cache=cache
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr, weight_decay=0.01, fused=True)
    curve: list[dict[str, Any]] = []
    order: list[int] = []
    dice = random.Random(0)
    seconds = steps = 0.0

    def measure(model: nn.Module) -> dict[str, float]:
        return {name: round(own["cosine_mean"], 4) for name, own in evaluation.closeness(model.eval()).items()}

    def note() -> None:
        curve.append({"minutes": round(seconds / 60, 1), "steps": int(steps), **measure(student)})
        print(json.dumps(curve[-1]), flush=True)

    note()  # ... in evaluation mode, and in it stays: dropout is noise to what the teacher gives
    while seconds < 60 * minutes:
        start = time.perf_counter()
        order = order or dice.sample(range(len(text)), len(text))
        share = seconds / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, share / 0.02 + 1e-3) * (1 - share)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = distill(student(**text[order.pop()]))
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        seconds += time.perf_counter() - start
        if seconds >= 60 * minutes * len(curve) / 10:
            note()
    distill.close()
    small = measure(pc.compress(student.eval(), pc.Int8()))
    print(json.dumps({"int8": small}), flush=True)
    options = {"minutes": minutes, "sentences": len(sentences), "batch": batch, "lr": lr, "embedding": embedding}
    line = {**options, "bfloat16": bfloat16, "threads": threads, "processor": processor_name()}
    line |= {"versions": versions(["torch", "transformers", "pycompress"]), "curve": curve, "int8": small}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")


if __name__ == "__main__":
    main()
