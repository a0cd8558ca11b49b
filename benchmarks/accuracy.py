"""What a plan keeps of all-MiniLM-L6-v2: `python benchmarks/accuracy.py "Sparse(0.5)" "Int4(32)"` prints a line for each plan.

The mean cosine to the float32 embeddings of 256 docstrings of the standard library and of 256 film reviews. Calibrated on 320
sentences, by `--calibration`: `mixed` (film reviews, news, products, messages, none of those that are measured: in the domain of
the reviews, outside that of the docstrings), `docstrings` (others than those that are measured) or `none`.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import click
import texts
import torch
from torch import nn

import pycompress as pc
from pycompress import demo
from pycompress.benchmark import Record
from pycompress.calibration import Calibration

COUNT = 256
CALIBRATION = 320


class Evaluation:
    """The dense model, its tokenizer, and its embeddings of the sentences to measure on."""

    def __init__(self) -> None:
        self.model, self.tokenizer = demo.load()
        self.sentences = {"docstrings": demo.docstring_sentences(COUNT), "reviews": texts.evaluation(COUNT)}
        self.reference = {name: self.embed(self.model, own) for name, own in self.sentences.items()}

    def embed(self, model: nn.Module, sentences: list[str]) -> torch.Tensor:
        return demo.embed(partial(demo.call_module, model), self.tokenizer, sentences)

    def calibrated(self, domain: str, count: int = CALIBRATION) -> Calibration | None:
        if domain == "none":
            return None
        besides = self.sentences["docstrings"]
        sentences = texts.mixed(count) if domain == "mixed" else demo.docstring_sentences(count, besides=besides)
        return demo.calibrated(self.model, self.tokenizer, sentences)

    def closeness(self, model: nn.Module) -> Record:
        """For each kind of sentences what :func:`pycompress.demo.closeness` says."""
        return {
            name: demo.closeness(self.embed(model, own), self.reference[name]) for name, own in self.sentences.items()
        }


def plan_of(expression: str) -> Any:
    """What a Python expression over the names of pycompress says: a method, or a mapping."""
    return eval(expression, vars(pc) | {"__builtins__": {}})


@click.command()
@click.argument("plans", nargs=-1, required=True)
@click.option("--calibration", "domain", type=click.Choice(["mixed", "docstrings", "none"]), default="mixed")
@click.option("--sentences", default=CALIBRATION, help="To calibrate on.")
@click.option("--threads", type=click.IntRange(min=1), default=2)
def main(plans: tuple[str, ...], domain: str, sentences: int, threads: int) -> None:
    """Print what each plan keeps."""
    torch.set_num_threads(threads)
    evaluation = Evaluation()
    start = time.perf_counter()
    calibration = evaluation.calibrated(domain, sentences)
    print(f"calibration: {domain}, {time.perf_counter() - start:.1f} s; cosine (top-10) on docstrings, film reviews")
    for plan in plans:
        start = time.perf_counter()
        model = pc.compress(evaluation.model, plan_of(plan), calibration=calibration)
        seconds = time.perf_counter() - start
        found = evaluation.closeness(model)
        cells = [f"{own['cosine_mean']:.4f} ({own['neighbour_overlap']:.3f})" for own in found.values()]
        print(f"{plan:50} {'   '.join(cells)}   {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
