"""Transfer learning that ends compressed: `python examples/transfer.py`.

A trained sentence encoder learns what a docstring of Python's standard library is about. It is prepared before it is fine-tuned:
what learns the task is what will be deployed, 75 % zeros in 8 bits. Beside it the same fine-tuning of the dense model, compressed
afterwards.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import random

import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress import demo

TOPICS = {
    "network": "http.client http.server http.cookiejar urllib.request urllib.parse ftplib smtplib imaplib poplib socket ssl",
    "files": "os pathlib shutil tempfile zipfile tarfile glob fileinput gzip bz2 lzma mmap io posixpath",
    "numbers": "statistics fractions decimal random heapq bisect datetime calendar time colorsys math",
    "processes": "subprocess threading multiprocessing.pool multiprocessing.context asyncio.base_events asyncio.tasks queue sched",
    "tests": "unittest.case unittest.mock unittest.suite unittest.loader unittest.result doctest pdb cProfile timeit trace bdb",
    "source code": "ast inspect dis tokenize importlib._bootstrap importlib.util pkgutil symtable pickletools code codeop types",
}
PLAN = {"encoder.encoder.*": pc.Sparse(pattern="4:16", bits=8), "*": None}


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


def fine_tune(
    model: nn.Module, train: list[tuple[str, int]], steps: int, training: pc.train.Training | None = None
) -> None:
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
        if training is not None:
            training.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, test: list[tuple[str, int]]) -> float:
    found = [model([text for text, _ in test[i : i + 50]]).argmax(1) for i in range(0, len(test), 50)]
    return float((torch.cat(found) == torch.tensor([topic for _, topic in test])).double().mean())


def main(steps: int = 150) -> dict[str, float]:
    """Trains both, and returns the accuracies."""
    torch.manual_seed(0)
    pairs = docstrings()
    train, test = pairs[400:], pairs[:400]
    model = Classifier().eval()
    dense = copy.deepcopy(model)
    fine_tune(dense, train, steps)
    training = pc.prepare(model, PLAN, steps=steps, ramp=pc.Ramp(0.0, 0.5, every=max(1, steps // 15)))
    fine_tune(model, train, steps, training)
    models = {"dense": dense, "compressed afterwards": pc.compress(dense, PLAN), "prepared": pc.compress(model)}
    return {name: accuracy(own, test) for name, own in models.items()}


if __name__ == "__main__":
    for name, share in main().items():
        print(f"{name:22} {100 * share:.1f} %")
