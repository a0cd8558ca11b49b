"""From Keras and from JAX to two runtimes, compressed on the way: `make migrate`, or `python examples/migrate.py`.

A CNN of Keras and an MLP of Flax learn the handwritten digits of scikit-learn. Each goes out as ONNX, comes in as a torch model,
is calibrated, compressed and validated, and goes out again for each target; each time it says which digits the images that it has
not seen are. Needs the extra `migrate`; Keras runs on torch, so that TensorFlow is not needed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import numpy as np
import torch
from numpy.typing import NDArray

import pycompress as pc
from pycompress.targets import TARGETS

Array = NDArray[np.float32]
Predict = Callable[[Array], Array]


@dataclass
class Digits:
    """Images [n, 8, 8, 1] from 0 to 1 and their digits [n]; the last fifth is for the test."""

    images: Array
    digits: NDArray[np.int64]

    @classmethod
    def load(cls) -> tuple[Digits, Digits]:
        from sklearn.datasets import load_digits

        found = load_digits()
        order = np.random.default_rng(0).permutation(len(found.target))
        x, y = (found.images[order, :, :, None] / 16).astype(np.float32), found.target[order]
        cut = len(x) * 4 // 5
        return cls(x[:cut], y[:cut]), cls(x[cut:], y[cut:])

    def accuracy(self, scores: Array) -> float:
        return float((scores.argmax(1) == self.digits).mean())


def of_keras(train: Digits, path: Path, epochs: int) -> Predict:
    """A CNN, trained, and its ONNX file."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((8, 8, 1)),
        layers.Conv2D(32, 3, padding="same", activation="relu"),
        layers.Conv2D(64, 3, activation="relu"),
        layers.Flatten(),
        layers.Dense(128, activation="relu"),
        layers.Dense(10),
    ])  # fmt: skip
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(train.images, train.digits, epochs=epochs, verbose=0)
    model.export(path, format="onnx", verbose=False)
    return lambda x: np.asarray(model.predict(x, verbose=0))


def of_jax(train: Digits, path: Path, epochs: int) -> Predict:
    """An MLP of Flax, trained, and its ONNX file."""
    import jax
    import onnx
    import optax
    from flax import nnx
    from jax2onnx import to_onnx

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.second = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 256, rngs=rngs)
            self.last = nnx.Linear(256, 10, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x.reshape(x.shape[0], 64)
            return self.last(jax.nn.gelu(self.second(jax.nn.gelu(self.first(x), approximate=False)), approximate=False))

    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Network, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
        def loss(model: Network) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for chosen in np.array_split(rng.permutation(len(train.images)), len(train.images) // 32):
            step(model, optimizer, train.images[chosen], train.digits[chosen])
    onnx.save(to_onnx(model, [("batch", 8, 8, 1)]), path)
    return lambda x: np.asarray(model(x))


@dataclass
class Step:
    """What a table has of one place that the model came to."""

    place: str
    bytes: int
    accuracy: float
    agrees: float  # share of the test images for which it says what the framework said


MAKERS: dict[str, tuple[Callable[[Digits, Path, int], Predict], pc.Int8 | pc.Int4]] = {
    "Keras, CNN": (of_keras, pc.Int8()),
    "JAX, MLP": (of_jax, pc.Int4()),
}


def migrate(maker: str, folder: Path, targets: list[str], epochs: int, train: Digits, test: Digits) -> list[Step]:
    """All the way of one model. Raises SystemExit where the validation or a target finds a difference."""
    make, plan = MAKERS[maker]
    source, small = folder / "model.onnx", folder / "model.safetensors"
    scores = make(train, source, epochs)(test.images)
    steps: list[Step] = []

    def arrived(place: str, size: int, found: Array) -> None:
        agrees = float((found.argmax(1) == scores.argmax(1)).mean())
        steps.append(Step(place, size, test.accuracy(found), agrees))

    arrived("the framework", source.stat().st_size, scores)
    dense, images = pc.from_onnx(source), torch.from_numpy(test.images)
    arrived("from_onnx", source.stat().st_size, dense(images).detach().numpy())

    seen = torch.from_numpy(train.images[:512]).split(64)
    calibration = pc.calibrate(dense, [[batch] for batch in seen], plan=plan)
    model = pc.compress(dense, plan, calibration=calibration, example_inputs=images[:8])
    print(pc.summary(model))
    report = pc.validate(model, images)
    print(report.verdict)
    if not report.ok:
        raise SystemExit(str(report))
    pc.save(model, small)
    arrived("compressed", small.stat().st_size, model(images).detach().numpy())

    name = next(node.name for node in dense.graph.nodes if node.op == "placeholder")
    for target in targets:
        place = folder / f"{target}{TARGETS[target].suffix}"
        done = pc.deploy(model, target, place, {name: images}, {0: "batch"})
        print(done)
        if not done.ok:
            raise SystemExit(f"{target}: {done.verdict}")
        (found,) = TARGETS[target].run(str(place), {name: images})
        arrived(target, done.bytes, found.numpy())
    return steps


def main(targets: list[str], epochs: int) -> dict[str, list[Step]]:
    """Prints a table of all models, which it returns."""
    train, test = Digits.load()
    found = {}
    for maker in MAKERS:
        with tempfile.TemporaryDirectory(prefix="migrate-") as folder:
            found[maker] = migrate(maker, Path(folder), targets, epochs, train, test)
    print(f"\n{'':12}{'':16}{'kB':>8}{'accuracy':>10}{'agrees':>8}")
    for maker, steps in found.items():
        for step in steps:
            print(f"{maker:12}{step.place:16}{step.bytes / 1000:8.1f}{step.accuracy:10.3f}{step.agrees:8.3f}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=[*TARGETS], help="may be given several times")
    parser.add_argument("--epochs", type=int, default=10, help="over the training images")
    asked = parser.parse_args()
    main(asked.target or ["onnxruntime", "openvino"], asked.epochs)
