"""A searched plan for all-MiniLM-L6-v2 beside the best uniform one: `python benchmarks/search.py` prints the front and what it
is worth.

Calibrated on docstrings; quality, the cosine of sentence embeddings, is measured on news, products and messages, and the plans
that were found once more on film reviews that no search saw. `--correlation` measures each layer exactly, too, and prints how
well the cheap scores foretell the order (in minutes). `--shapes` has smaller models on the same front, without a block, neurons or
heads. A search that was stopped goes on where it was: `--cache`.
"""

from __future__ import annotations

import time
from typing import Any

import click
import numpy as np
import texts
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress import demo
from pycompress.calls import Inputs

CANDIDATES = {
    "int8 a8": pc.Int8(),
    "int8 a7": pc.Int8(7),
    "static": pc.Int8(activation="static"),
    "int4": pc.Int4(),
    "rank 48": pc.LowRank(48, bits=8, rank_guard=False),
    "rank 96": pc.LowRank(96, bits=8, rank_guard=False),
    "rank 192": pc.LowRank(192, bits=8, rank_guard=False),
    "half": pc.Sparse(0.5, bits=8, choose="sparsegpt"),
    "4:16": pc.Sparse(pattern="4:16", bits=8, choose="sparsegpt"),
}
SHAPES = {
    "5 blocks": {"blocks": {"model.encoder.layer.*": 5 / 6}},
    "neurons .95": {"neurons": 0.95},
    "70 heads": {"heads": 70 / 72, "fisher": True},
    "68 heads": {"heads": 68 / 72, "fisher": True},
}
LIMITS = {"layer_mb": 12.0, "quality": 0.995}
PER_BATCH = 32


class Embedder(nn.Module):
    """The model with the mean over tokens, normalised: float32 [batch, features]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        hidden, mask = self.model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


def batches(tokenizer: Any, sentences: list[str]) -> list[Inputs]:
    """With little padding."""
    ordered, found = sorted(sentences, key=len), []
    for start in range(0, len(ordered), PER_BATCH):
        tokens = tokenizer(ordered[start : start + PER_BATCH], padding=True, return_tensors="pt")
        found.append({name: tokens[name] for name in demo.INPUTS})
    return found


def cosine(model: nn.Module, other: nn.Module, data: list[Inputs]) -> float:
    with torch.inference_mode():
        rows = [torch.cosine_similarity(model(**batch), other(**batch)) for batch in data]  # type: ignore[arg-type]
    return float(torch.cat(rows).mean())


def ranks(values: list[float]) -> np.ndarray[Any, Any]:
    return np.argsort(np.argsort(values))


def correlation(losses: Any) -> None:
    """Spearman's, over the layers: of each candidate, and of all pairs of int4, half and the ranks together."""
    chosen = {
        name: [key for key in losses if key[1] == name and (losses[key].exact or 0) > 0] for name in losses.candidates
    }
    together = [key for name in ("int4", "half", "rank 192") for key in chosen[name]]
    for name, keys in {**chosen, "int4, half, rank 192": together}.items():
        exact = ranks([losses[key].exact for key in keys])
        change, error = (
            float(np.corrcoef(exact, ranks([getattr(losses[key], score) for key in keys]))[0, 1])
            for score in ("change", "error")
        )
        print(
            f"{name:22} {len(keys):4} layers  rank correlation with exact: change {change:.3f}, error alone {error:.3f}"
        )


@click.command()
@click.option("--threads", type=click.IntRange(min=1), default=2)
@click.option("--rows", nargs=2, default=(8, 64), help="Sentences and tokens that are timed.")
@click.option("--sentences", default=64, help="To rate plans by.")
@click.option("--cache", type=click.Path(dir_okay=False), default=None)
@click.option("--exact", is_flag=True, help="Losses of layers measured one by one.")
@click.option("--quality", default=LIMITS["quality"], help="The least cosine.")
@click.option("--shapes", is_flag=True, help="Plans of smaller models, too.")
@click.option("--correlation", "correlate", is_flag=True, help="Measure cheap against exact scores, and nothing else.")
def main(
    threads: int, rows: tuple[int, int], sentences: int, cache: str | None, exact: bool, quality: float,
    shapes: bool, correlate: bool,
) -> None:  # fmt: skip
    """Search a plan for all-MiniLM-L6-v2."""
    torch.set_num_threads(threads)
    model, tokenizer = demo.load()
    embedder = Embedder(model).eval()
    rating = [
        text
        for source in ("news", "products", "messages")
        for text in (one.text for one in texts.rated(source)[: sentences // 3 + 1])
    ]
    data = batches(tokenizer, rating[:sentences])
    unseen = batches(tokenizer, texts.evaluation(256))
    start = time.perf_counter()
    sample = batches(tokenizer, demo.docstring_sentences(256))
    if correlate:
        correlation(pc.sensitivity(embedder, CANDIDATES, data, exact=True, calibration=sample, cache=cache))
        return
    ids = torch.randint(1000, 20000, tuple(rows), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    limits = LIMITS | {"quality": quality}
    front = pc.search(
        embedder, CANDIDATES, data, limits, example_inputs=example, calibration=sample, exact=exact, cache=cache,
        shapes=SHAPES if shapes else None,
    )  # fmt: skip
    print(
        f"{time.perf_counter() - start:.0f} s, {threads} threads; {len(front)} plans, of {len(front.measured)} measured"
    )
    print(front)
    for of in ("additive", "predicted"):
        worst = front.errors(of)
        print(f"{of}: time off by {worst.ms:.1%} at most, quality by {worst.quality:.4f}")
    plans = {"best": front.best, "best uniform": front.best_uniform}
    for name, point in plans.items():
        if point is None:
            print(f"{name}: none keeps to the limits")
            continue
        small = pc.shrunk(embedder, point.plan.shrink, sample, example_inputs=example)
        small = pc.compress(small, point.plan, calibration=pc.calibrate(small, sample, plan=point.plan))
        own = point.measured
        rated = f"cosine {own.quality:.4f}; on reviews {cosine(embedder, small, unseen):.4f}"
        print(f"{name}: {own.ms:.2f} ms, {own.layer_mb:.2f} MB of layers, {rated}")
    assert front.bound is not None
    print(f"by the corrected sums no plan of these candidates within the limits is below {front.bound:.2f} ms")
    if front.best_uniform is not None:
        print(f"{front.best_uniform.measured.ms / front.best.measured.ms:.2f} times as fast as the best uniform plan")


if __name__ == "__main__":
    main()
