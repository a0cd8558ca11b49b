"""What can be known of the CUDA kernels without a device: their source run on the host (``tests/native/cuda``), and what is
said where there is no CUDA. That no kernel spills or has a stack, the build of `make test-all` asserts (PYCOMPRESS_NO_SPILLS).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pycompress import cli, ops
from pycompress.nn import Int8Linear
from pycompress.ops.cuda import int8
from pycompress.ops.cuda import native as cuda

ROOT = Path(__file__).resolve().parent.parent
nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, which is not on the PATH")

# --- the kernels' source on the host ------------------------------------------------------------------------------------


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
@nvcc
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_the_kernels_source_on_the_host() -> None:
    """In ``build``, which git ignores, so that only what changed is compiled again."""
    folder = ROOT / "build" / "cuda_host"
    run("cmake", "-S", ROOT, "-B", folder, "-DPYCOMPRESS_NATIVE_TESTS=ON")
    run("cmake", "--build", folder, "--target", "cuda_kernels", "--parallel", os.cpu_count())
    program = folder / "tests/native/cuda/cuda_kernels"
    names = run(program, "--list").splitlines()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a process each
        ran = list(pool.map(lambda name: run(program, name), names))
    assert {"int8 quantize", "int8 sm80", "int8 sm90", "2:4", "blocks", "low rank"} <= set(names)
    for name, said in zip(names, ran, strict=True):
        assert re.fullmatch(rf"{re.escape(name)}: [1-9]\d* cases, 0 failures\n", said)


# --- where there is no CUDA ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.cuda_error() is None:
        pytest.skip("there is a CUDA device here")


@pytest.mark.slow  # built by `make test-all` alone
def test_loading_the_module_needs_no_driver() -> None:
    module, why = cuda._load()
    if module is None:
        pytest.skip(f"it was not built: {why}")
    assert {kernel["arch"] for kernel in ops.cuda_kernels()} == {80, 90}
    assert module.int8_chosen_kernel(4096, 4096, 4096, 90, 132).startswith("sm90")
    assert module.int8_chosen_kernel(4096, 4096, 4096, 80, 108).startswith("sm80")
    with pytest.raises(ValueError, match=r"compute capability 7\.5, expected 8\.0"):
        module.int8_chosen_kernel(1, 1, 1, 75, 40)


@pytest.mark.usefixtures("no_device")
def test_asking_for_cuda_says_why_it_is_not_there() -> None:
    why = ops.cuda_error()
    assert why is not None
    with pytest.raises(RuntimeError, match="int8_pack: no CUDA here: " + re.escape(why)):
        int8.pack({"values": torch.zeros(2, 2, dtype=torch.int8)}, (2, 2), {"activation_bits": 8})
    assert cli.info.cuda_state() == f"not available: {why}"


@pytest.mark.usefixtures("no_device")
def test_the_benchmark_says_why_it_does_not_run() -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"the CUDA benchmark needs a device: {ops.cuda_error()}\n"


def built(monkeypatch: pytest.MonkeyPatch, **members: Any) -> None:
    monkeypatch.setattr(cuda, "_load", lambda: (SimpleNamespace(**members), None))
    cuda._capability_error.cache_clear()


def test_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_load", lambda: (None, "it was not built"))
    assert ops.cuda_error() == "it was not built"
    assert ops.cuda_kernels() == []

    def too_old(device: int) -> int:
        raise RuntimeError(f"cudaGetDevice: the driver of device {device} is too old")

    built(monkeypatch, compute_capability=lambda _: 75)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in str(ops.cuda_error())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ops.cuda_error() == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Turing")
    assert ops.cuda_error() == "Turing has compute capability 7.5, expected 8.0 or later"
    built(monkeypatch, compute_capability=too_old)
    assert ops.cuda_error() == "cudaGetDevice: the driver of device 0 is too old"
    built(monkeypatch, compute_capability=lambda _: 90)
    assert ops.cuda_error() is None
    cuda._capability_error.cache_clear()


def test_a_missing_module_is_told_from_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: ImportError) -> tuple[Any, str | None]:
        def load(_name: str) -> None:
            raise error

        monkeypatch.setattr(cuda, "import_module", load)
        return cuda._load.__wrapped__()

    assert "built without CUDA kernels" in str(fails(ModuleNotFoundError("No module named 'pycompress._cuda'"))[1])
    assert fails(ImportError("undefined symbol: x"))[1] == "the CUDA kernels cannot be loaded: undefined symbol: x"


def test_a_layer_is_packed_anew_between_cpu_and_cuda_alone() -> None:
    layer = Int8Linear.from_dense(nn.Linear(8, 8))
    cpu, gpu, other, meta = (torch.device(name) for name in ("cpu", "cuda:0", "cuda:1", "meta"))
    assert layer._packs_anew(cpu, gpu)
    assert layer._packs_anew(gpu, cpu)
    assert not any(layer._packs_anew(*pair) for pair in ((cpu, cpu), (gpu, other), (cpu, meta), (meta, gpu)))
