"""Threads: the same bits for every number of them, many callers at once, forked children, one OpenMP pool."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.methods.int8 import Int8
from pycompress.nn import Int8Linear

Forked = Callable[..., Any]
Python = Callable[..., subprocess.CompletedProcess[str]]
Same = Callable[[Tensor, Tensor], bool]

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
native = pytest.mark.skipif(ops.extension_error() is not None, reason="no extension was built: the twin has no threads")

AtOnce = Callable[[Callable[[int], None], int], None]


def large(bits: int = 8, activation: str = "none") -> Int8Linear:
    """Large enough for a parallel region at a single row."""
    return Int8Linear.from_dense(nn.Linear(1024, 1024), Int8(activation_bits=bits), activation)


def bits_of(y: Tensor) -> bytes:
    return y.detach().numpy().tobytes()


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_one_and_two_threads_give_the_same_bits(bits: int, activation: str, same: Same) -> None:
    layer = large(bits, activation)
    before = torch.get_num_threads()
    try:
        for rows in (1, 2, 3, 5, 31, 32, 33, 64, 130, 257):
            x = torch.randn(rows, 1024)
            x[rows // 2, 5] = float("nan")
            found = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found.append((layer(x), *ops.int8_accumulate(x, layer.packed, layer.form)))
            for other in found[1:]:
                for a, b in zip(found[0], other, strict=True):
                    assert same(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_with_layers_of_different_sizes(at_once: AtOnce) -> None:
    """Each thread has scratch memory of its own, which grows to what the largest layer needs."""
    layers = [Int8Linear.from_dense(nn.Linear(k, 64)) for k in (8, 2000, 64, 700)]
    inputs = [torch.randn(33, layer.in_features) for layer in layers]
    expected = [bits_of(layer(x)) for layer, x in zip(layers, inputs, strict=True)]
    wrong: list[int] = []

    def call(index: int) -> None:
        for turn in range(40):
            at = (index + turn) % 4
            if bits_of(layers[at](inputs[at])) != expected[at]:
                wrong.append(at)

    at_once(call, 4)
    assert not wrong


FIRST_USE_IN_A_CHILD = """
import os, signal, sys
import torch
from pycompress import ops
torch.set_num_threads(2)
a = torch.randn(1 << 22)
a.add(a)  # torch opens the OpenMP pool; no op of pycompress has run yet
values, x = torch.randint(-127, 128, (512, 512), dtype=torch.int8), torch.randn(256, 512)

def packed():
    return ops.pack("int8", {"values": values, "scale": torch.ones(512)}, (512, 512), {"activation_bits": 8})

child = os.fork()
if child == 0:
    signal.alarm(10)  # kills the child where it waits for threads that are not there
    y = ops.int8_linear(x, *packed())
    open(sys.argv[1], "wb").write(y.numpy().tobytes())
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the forked child did not finish"
y = ops.int8_linear(x, *packed())
assert open(sys.argv[1], "rb").read() == y.numpy().tobytes()
"""


@native
def test_first_use_in_a_forked_child(tmp_path: Path, python: Python) -> None:
    """A server that imports everything, runs some torch, forks its workers, and only they use a layer."""
    result = python(FIRST_USE_IN_A_CHILD, tmp_path / "y")
    assert result.returncode == 0, result.stderr


# --- one process, looked at from outside --------------------------------------------------------------------------------

LOOK = """
import json, os

def threads():
    return len(os.listdir("/proc/self/task"))

import torch
torch.set_num_threads(1)
found = {"torch": threads()}
import pycompress
found["import"] = threads()
from pycompress import ops
values, x = torch.randint(-127, 128, (1024, 1024), dtype=torch.int8), torch.randn(64, 1024)
packed = ops.pack("int8", {"values": values, "scale": torch.ones(1024)}, (1024, 1024), {"activation_bits": 8})
ops.int8_linear(x, *packed)
found["one"] = threads()
torch.set_num_threads(2)
for _ in range(3):
    ops.int8_linear(x, *packed)
found["two"] = threads()
torch.set_num_threads(3)
ops.int8_linear(x, *packed)
found["three"] = threads()
x.add(x), torch.randn(1 << 20).add(1)  # torch's own regions run on the same pool
found["torch after"] = threads()
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
found["openmp"] = sorted(p for p in paths if any(name in os.path.basename(p) for name in ("gomp", "iomp", "libomp")))
found["cuda"] = torch.cuda.is_initialized()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def process(python: Python) -> dict[str, Any]:
    """How many threads a fresh process has at each point, and which OpenMP libraries it maps."""
    result = python(LOOK)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@linux
def test_importing_starts_no_thread_and_touches_no_gpu(process: dict[str, Any]) -> None:
    assert process["import"] == process["torch"]
    assert process["cuda"] is False


@linux
@native
def test_the_number_of_threads_is_torchs(process: dict[str, Any]) -> None:
    assert process["one"] == process["import"], "one thread: no worker"
    assert process["two"] == process["one"] + 1
    assert process["three"] == process["one"] + 2


@linux
@native
def test_one_pool_shared_with_torch(process: dict[str, Any]) -> None:
    assert len([path for path in process["openmp"] if "gomp" in path]) == 1, process["openmp"]
    assert process["torch after"] == process["three"], "torch's regions start no workers of their own"
