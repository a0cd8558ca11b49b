"""A model that reads its layers' weights as it runs: `python benchmarks/generate.py` writes benchmarks/results/generate.jsonl.

transformers' T5 looks at `wo.weight.dtype` up to three times a call. It has T5-small's sizes here, with random weights (speed alone
is measured), and generates: dense, and compressed with `only_if_faster`, in turns. Then, for every row of the table of layers, what
it takes to ask a layer for its weight's dtype, shape and device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import nn

import pycompress as pc
from pycompress import benchmark, cli
from pycompress.kinds import KINDS
from pycompress.measure import interleaved_us
from pycompress.nn import LAYERS

RESULTS = Path(__file__).parent / "results" / "generate.jsonl"
PROMPT, TOKENS = 16, 24


def t5() -> nn.Module:
    """T5-small, which its config is by default."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(decoder_start_token_id=0, eos_token_id=None, pad_token_id=0)
    model: nn.Module = T5ForConditionalGeneration(config).eval()
    return model


def variants(model: nn.Module, prompt: torch.Tensor) -> dict[str, nn.Module]:
    inputs = {"input_ids": prompt, "decoder_input_ids": prompt[:, :1]}
    made = {"dense": model}
    for name, plan in (
        ("Int8", pc.Int8()),
        ("Int4", pc.Int4()),
        ("Int8 on wo", {"*.wo": pc.Int8()}),
        ("Int4 on wo", {"*.wo": pc.Int4()}),
    ):
        made[name] = pc.compress(model, plan, example_inputs=inputs, only_if_faster=True)
    return made


def replaced(model: nn.Module) -> int:
    return sum(record.method is not None for record in pc.summary(model).layers)


def measure(made: dict[str, nn.Module], prompt: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a token of each round, the variants in turns."""

    def turn(model: Any) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        return (time.perf_counter() - start) / TOKENS * 1e3

    for model in made.values():
        turn(model)
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, model in made.items():
            times[name].append(turn(model))
    return times


def reads() -> dict[str, dict[str, float]]:
    """Microseconds of `layer.weight.dtype`, `.shape` and `.device`, for each row of the table."""
    dense: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(512, 2048),
        "conv2d": lambda: nn.Conv2d(64, 64, 3),
        "embedding": lambda: nn.Embedding(1000, 64),
    }
    found = {}
    for (kind, weight), layer_type in LAYERS.items():
        if kind in dense and any(known.name == kind for known in KINDS):
            layer = layer_type.from_dense(dense[kind]())
            found[f"{weight} {kind}"] = {
                name: interleaved_us(lambda: getattr(layer.weight, name), lambda: None)[0]  # noqa: B023
                for name in ("dtype", "shape", "device")
            }
    return found


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="JSON lines.")
def generate(*, rounds: int, output: Path) -> None:
    """Milliseconds a token, and microseconds a question."""
    model = t5()
    prompt = torch.randint(1, 32000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    made = variants(model, prompt)
    times = measure(made, prompt, rounds)
    records: list[dict[str, Any]] = [
        {
            "model": "T5-small sizes", "candidate": name, "replaced": replaced(made[name]) if name != "dense" else 0,
            "ms_per_token": median(own), "dense_over_it": median(d / t for d, t in zip(times["dense"], own, strict=True)),
        }
        for name, own in times.items()
    ]  # fmt: skip
    questions = reads()
    records += [{"layer": layer, **{f"{name}_us": us for name, us in own.items()}} for layer, own in questions.items()]
    environment = benchmark.Environment.collect()
    benchmark.write_json_lines(output, environment, records)
    print(cli.environment_text(environment.as_dict()))
    for record in records:
        print(
            "  ".join(
                f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in record.items()
            )
        )


if __name__ == "__main__":
    generate()
