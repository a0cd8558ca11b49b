"""Kills ``save`` at random moments and looks at what is left: the old file or the new one, whole.

    python tests/stress_save.py [KILLS]

Runs with the safetensors that the interpreter finds, so with another version by ``PYTHONPATH`` to a folder where
``pip install --target FOLDER safetensors==0.5.*`` put it. Needs ``os.fork``.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import safetensors
import torch
from torch import nn

import pycompress as pc

FILLINGS = (1, 2)  # which numbers a file holds throughout


def model(filling: int) -> nn.Module:
    """16 MB beside a layer: long enough a file to be met half-way."""
    made = pc.compress(nn.Sequential(nn.Linear(64, 64)), pc.Int8())
    for i in range(4):
        made.register_buffer(f"table{i}", torch.full((1024, 1024), filling, dtype=torch.int32))
    return made


def filling_of(path: Path) -> int:
    """Of a whole file. Raises ValueError for any other."""
    loaded = pc.load(model(0), path)
    found = {int(number) for i in range(4) for number in getattr(loaded, f"table{i}").unique()}
    if len(found) != 1 or not found <= set(FILLINGS):
        raise ValueError(f"{path} holds {found}, expected one of {FILLINGS}")
    return found.pop()


def killed_while_saving(models: list[nn.Module], path: Path, seconds: float) -> None:
    """A child that saves one model after the other until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                for one in models:
                    pc.save(one, path)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise RuntimeError("save raised in the child, expected it to go on until it is killed")


def stress(kills: int, folder: Path) -> Counter[str]:
    """Counts what was found after each kill. Raises where that was no whole file."""
    path, found = folder / "model.safetensors", Counter[str]()
    models = [model(filling) for filling in FILLINGS]
    started = time.perf_counter()
    for one in models:
        pc.save(one, path)
    seconds, before = time.perf_counter() - started, filling_of(path)
    for _ in range(kills):
        killed_while_saving(models, path, random.uniform(0, 2 * seconds))
        now = filling_of(path)
        found["the old file" if now == before else "the new file"] += 1
        before = now
        left = [entry for entry in folder.iterdir() if entry != path]
        if any(not entry.name.startswith(".pycompress-") for entry in left):
            raise RuntimeError(f"{[entry.name for entry in left]} lie beside the file, expected .pycompress-* alone")
        found["killed half-way"] += bool(left)
        for entry in left:
            shutil.rmtree(entry)
    return found


def main() -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        found = stress(kills, Path(folder))
    counts = ", ".join(f"{name} {count}" for name, count in sorted(found.items()))
    print(f"safetensors {safetensors.__version__}: {kills} kills, all files whole: {counts}")


if __name__ == "__main__":
    main()
