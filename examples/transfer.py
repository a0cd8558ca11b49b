"""Transfer learning that ends compressed: `python examples/transfer.py`.

A trained sentence encoder learns what a docstring of Python's standard library is about. Then a plan is searched for it: at most
9 MB of layers, at most one point of accuracy lost, on texts that it did not learn from; as fast as that goes. What is found is
judged beside the dense model on texts that nobody has seen, with intervals; transfer.html shows it.
"""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress import demo
from pycompress.calibration import Calibration
from pycompress.evaluation import Evaluation
from pycompress.search import Front

TOPICS = {
    "network": "http.client http.server http.cookiejar urllib.request urllib.parse ftplib smtplib imaplib poplib socket ssl",
    "files": "os pathlib shutil tempfile zipfile tarfile glob fileinput gzip bz2 lzma mmap io posixpath",
    "numbers": "statistics fractions decimal random heapq bisect datetime calendar time colorsys math",
    "processes": "subprocess threading multiprocessing.pool multiprocessing.context asyncio.base_events asyncio.tasks queue sched",
    "tests": "unittest.case unittest.mock unittest.suite unittest.loader unittest.result doctest pdb cProfile timeit trace bdb",
    "source code": "ast inspect dis tokenize importlib._bootstrap importlib.util pkgutil symtable pickletools code codeop types",
}
CANDIDATES = {"int8": pc.Int8(), "int4": pc.Int4(), "rank 96": pc.LowRank(96, bits=8)}
LAYER_MB, AT_MOST_LOST = 9.0, 0.01


def docstrings() -> list[tuple[str, int]]:
    """First paragraphs, each with the number of its topic."""
    found: dict[str, int] = {}
    for topic, modules in enumerate(TOPICS.values()):
        for module in map(importlib.import_module, modules.split()):
            owners = [
                own for _, own in sorted(vars(module).items()) if getattr(own, "__module__", "") == module.__name__
            ]
            for owner in [
                *owners,
                *(member for own in owners if inspect.isclass(own) for member in vars(own).values()),
            ]:
                text = " ".join((inspect.getdoc(owner) or "").split("\n\n")[0].split()) if callable(owner) else ""
                if len(text.split()) >= 6:
                    found.setdefault(text, topic)
    pairs = list(found.items())
    random.Random(0).shuffle(pairs)
    return pairs


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.tokenizer = demo.load()
        self.head = nn.Linear(384, len(TOPICS))

    def forward(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        mask = batch["attention_mask"][:, :, None]
        return self.head((self.encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))  # type: ignore[no-any-return]


def fine_tune(model: nn.Module, train: list[tuple[str, int]], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for step in range(steps):
        texts, topics = zip(*random.Random(step).sample(train, 32), strict=True)
        loss = nn.functional.cross_entropy(model(list(texts)), torch.tensor(topics))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def batches(pairs: list[tuple[str, int]], rows: int = 50) -> Iterator[tuple[list[list[str]], list[int]]]:
    """What `pc.evaluate` takes: the only argument of the model is a list of texts, beside it are their topics."""
    for i in range(0, len(pairs), rows):
        texts, topics = zip(*pairs[i : i + rows], strict=True)
        yield [list(texts)], list(topics)


def search(model: nn.Module, train: list[tuple[str, int]], choose: list[tuple[str, int]]) -> tuple[Front, Calibration]:
    """Plans for the fine-tuned model under its limits; what its layers meet is gathered on texts that it was trained on."""
    judged = [*batches(choose)]

    def accuracy(one: nn.Module) -> float:
        with torch.inference_mode():
            right = [(one(*texts).argmax(1) == torch.tensor(topics)).sum() for texts, topics in judged]
        return float(sum(right)) / len(choose)

    limits = {"layer_mb": LAYER_MB, "quality": accuracy(model) - AT_MOST_LOST}
    seen = pc.calibrate(model, [texts for texts, _ in batches(train[:200])])
    inputs = [texts for texts, _ in judged]
    return pc.search(
        model, CANDIDATES, inputs, limits, example_inputs=inputs[0], metric=accuracy, calibration=seen, points=4
    ), seen


def main(
    steps: int = 150, choose: int = 300, tests: int = 400, latency: tuple[int, ...] = (1, 16), path: str = "transfer.html"
) -> tuple[Front, Evaluation]:  # fmt: skip
    """Trains, searches a plan, judges it on so many texts beside the dense model, and writes the page."""
    torch.manual_seed(0)
    pairs = docstrings()
    test, chooses, train = pairs[:tests], pairs[tests : tests + choose], pairs[tests + choose :]
    model = Classifier().eval()
    fine_tune(model, train, steps)
    front, seen = search(model, train, chooses)
    small = pc.compress(model, front.best.plan, calibration=seen)
    metrics = ["accuracy", "f1", "agreement"]
    found = pc.evaluate(small, batches(test), metrics, baseline=model, latency=latency)
    pc.report(
        model, small, path, front=front, evaluation=found, plan=front.best.plan,
        command="python examples/transfer.py", title="What a docstring is about",
        calibration=f"200 of the {len(train):,} docstrings of Python's standard library to train on; {len(chooses):,} others to "
        f"choose the plan by, and {len(test):,} others to test on",
    )  # fmt: skip
    return front, found


if __name__ == "__main__":
    plans, evaluation = main()
    print(f"{plans}\n\n{evaluation}")
