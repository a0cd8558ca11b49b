"""Smaller dense models: `python benchmarks/shrink.py` writes benchmarks/results/shrink.jsonl.

all-MiniLM-L6-v2, without labels: calibrated on sentences, its neurons and heads judged by what they do to the embedding. Measured
by the cosine to the whole model's embeddings, and by a labelled task: whether a film review is rated above or below zero, by a
logistic head fitted to the WHOLE model's embeddings of 2,000 reviews, and frozen, on 800 others. One standard error of the
accuracy is 1.5 points; that of the difference between two models, of which most reviews say nothing, is printed beside.

`--vit`: a ViT of 4 blocks, trained here for a minute on scikit-learn's digits: a test that it works, not a proof of what it keeps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accuracy
import click
import texts
import torch
from torch import Tensor
from torch.nn import functional

import pycompress as pc
from pycompress import benchmark, demo
from pycompress.structure.pace import speedup_of

RESULTS = Path(__file__).parent / "results"
FITTED, TESTED = 2000, 800
GRADIENTS = 96  # sentences
WRONG = 0.5  # reviews rated nearer to zero say nothing


def embedding(result: Any, batch: Any) -> Tensor:
    """As sentence-transformers has it: the mean of the tokens, of length one."""
    mask = batch["attention_mask"][:, :, None].float()
    return functional.normalize((result.last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)


def head(x: Tensor, y: Tensor) -> Tensor:
    """Logistic regression with ridge 1: float64 [features + 1]."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (
            functional.binary_cross_entropy_with_logits(x @ w, y.double(), reduction="sum") + w[:-1].square().sum() / 2
        )
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return w.detach()


def right(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Bool: which are told rightly."""
    return ((x.double() @ w[:-1] + w[-1]) > 0) == y


def compared(found: Tensor, dense: Tensor) -> benchmark.Record:
    """Points of accuracy, and the difference to the dense model with its standard error."""
    difference = found.double() - dense.double()
    return {
        "accuracy": 100 * float(found.double().mean()), "dense_accuracy": 100 * float(dense.double().mean()),
        "difference": 100 * float(difference.mean()), "standard_error": 100 * float(difference.std() / len(found) ** 0.5),
    }  # fmt: skip


def tokens(tokenizer: Any, sentences: Sequence[str], size: int = 16) -> list[dict[str, Tensor]]:
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    return [dict(tokenizer(list(sentences[i : i + size]), **options)) for i in range(0, len(sentences), size)]


def minilm(rates: dict[str, Any], speedup: float | None, sentences: int, domain: str) -> benchmark.Record:
    evaluation = accuracy.Evaluation()
    dense, tokenizer = evaluation.model, evaluation.tokenizer
    reviews = [one for one in texts.rated("reviews") if abs(one.rating) > WRONG][: FITTED + TESTED]
    labels = torch.tensor([one.rating > 0 for one in reviews])
    known = [one.text for one in reviews]
    x = torch.as_tensor(evaluation.embed(dense, known))
    w = head(x[:FITTED], labels[:FITTED])
    own = texts.mixed(sentences) if domain == "mixed" else [one.text for one in texts.rated("reviews")[-sentences:]]
    seen = demo.calibrated(dense, tokenizer, own)
    counts = pc.fisher(dense, [(batch, batch) for batch in tokens(tokenizer, own[:GRADIENTS])], embedding)
    inputs = tokens(tokenizer, known[:8], 8)[0]
    start = time.perf_counter()
    small = pc.shrink(dense, **rates, speedup=speedup, calibration=seen, fisher=counts, example_inputs=inputs)
    seconds = time.perf_counter() - start
    print(pc.Cut.of(small))
    found = torch.as_tensor(evaluation.embed(small, known[FITTED:]))
    closeness = evaluation.closeness(small)
    return {
        "model": "all-MiniLM-L6-v2", "calibration": domain, "sentences": sentences, "seconds": seconds,
        **compared(right(found, labels[FITTED:], w), right(x[FITTED:], labels[FITTED:], w)),
        **{f"cosine_{name}": own["cosine_mean"] for name, own in closeness.items()},
        "speedup": speedup_of(dense, small, inputs),
        "speedup_int8": speedup_of(pc.compress(dense, pc.Int8()), pc.compress(small, pc.Int8()), inputs),
    }  # fmt: skip


def vit(rates: dict[str, Any], speedup: float | None) -> benchmark.Record:
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    train, test = slice(0, 1300), slice(1300, None)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=96, num_hidden_layers=4, num_attention_heads=6,
        intermediate_size=384, num_labels=10,
    )  # fmt: skip
    dense = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(dense.parameters(), 1e-3)
    for _ in range(15):
        for part in torch.randperm(1300).split(64):
            loss = dense(pixel_values=x[part], labels=y[part]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    dense.eval()
    batches = [{"pixel_values": part} for part in x[train].split(100)]
    seen = pc.calibrate(dense, batches)
    counts = pc.fisher(dense, batches)
    inputs = {"pixel_values": x[:64]}
    small = pc.shrink(dense, **rates, speedup=speedup, calibration=seen, fisher=counts, example_inputs=inputs)
    print(pc.Cut.of(small))
    with torch.no_grad():
        told = [model(pixel_values=x[test]).logits.argmax(1) == y[test] for model in (small, dense)]
    return {"model": "ViT, digits", **compared(*told), "speedup": speedup_of(dense, small, inputs)}


@click.command()
@click.option("--neurons", type=float, help="The share that stays; without any, as --speedup asks.")
@click.option("--heads", type=float)
@click.option("--speedup", type=float, default=1.5, show_default=True)
@click.option("--calibration", "domain", type=click.Choice(["mixed", "reviews"]), default="mixed", show_default=True)
@click.option("--sentences", default=640, show_default=True, help="To calibrate on.")
@click.option("--vit", "only_vit", is_flag=True, help="The trained ViT in place of MiniLM.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "shrink.jsonl", show_default=True)
def main(
    neurons: float | None, heads: float | None, speedup: float, domain: str, sentences: int, only_vit: bool, threads: int,
    output: Path,
) -> None:  # fmt: skip
    """Shrink a model, and measure what it keeps."""
    torch.set_num_threads(threads)
    timed = neurons is None and heads is None
    rates: dict[str, Any] = {"neurons": True, "heads": True} if timed else {"neurons": neurons, "heads": heads}
    asked = speedup if timed else None
    record = vit(rates, asked) if only_vit else minilm(rates, asked, sentences, domain)
    record = {
        **{name: rate for name, rate in rates.items() if not timed},
        "asked_speedup": asked,
        "threads": threads,
        **record,
    }
    for name, value in record.items():
        print(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")
    with output.open("a") as file:  # beside those of other rates, each with its machine
        file.write(benchmark.json_lines(benchmark.Environment.collect(), [record]))


if __name__ == "__main__":
    main()
