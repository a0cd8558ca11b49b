"""The numba twin: the same bits as the native kernels, and a full stand-in where no extension was built."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pycompress
from pycompress import ops, reference

Same = Callable[[Tensor, Tensor], bool]
Python = Callable[..., subprocess.CompletedProcess[str]]

native = pytest.mark.skipif(ops.extension_error() is not None, reason="no extension was built to compare with")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``twin(call)``: the result of ``call()`` with the ops on the numba twin."""

    def run(call: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(ops, "_C", reference.Native())
            patch.setattr(ops, "_reads_tensors", False, raising=False)
            return call()

    return run


def rows(k: int) -> Tensor:
    """Ordinary rows, extreme rows, rows with NaN and Inf."""
    biggest = torch.finfo(torch.float32).max
    x = torch.randn(14, k) * torch.logspace(-30, 30, 14)[:, None]
    x[1], x[2], x[3] = 0, 1e-45, 2.0**-100
    x[4], x[5] = biggest, -biggest
    x[6, 0], x[7, -1], x[8, k // 2] = math.nan, math.inf, -math.inf
    x[9] = torch.rand(k) + 3
    x[10] = -torch.rand(k) - 3
    x[11] = torch.arange(k) / 2
    return x


@native
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("k", [1, 4, 33, 130])
@pytest.mark.parametrize("dtype", FLOATS)
def test_same_integers(bits: int, k: int, dtype: torch.dtype, twin: Callable[..., Any]) -> None:
    values = torch.randint(-127, 128, (21, k), dtype=torch.int8)
    x = rows(k).to(dtype)

    def run() -> tuple[Tensor, ...]:
        packed = ops.int8_pack(values, bits)
        return (*ops.int8_quantize(x, bits), *ops.int8_accumulate(x, packed), ops.int8_unpack(packed))

    for got, expected in zip(twin(run), run(), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got.numpy(), expected.numpy())


@native
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_same_bits_of_y(
    activation: str, bits: int, dtype: torch.dtype, with_bias: bool, twin: Callable[..., Any], same: Same
) -> None:
    values = torch.randint(-127, 128, (21, 70), dtype=torch.int8)
    scale, bias = torch.rand(21) / 100 + 1e-4, torch.randn(21) if with_bias else None
    x = rows(70).to(dtype)

    def run() -> Tensor:
        return ops.int8_linear(x, ops.int8_pack(values, bits), scale, bias, activation)

    got, expected = twin(run), run()
    nan = torch.isnan(expected)  # the sign of a NaN is left to the processor
    assert torch.equal(torch.isnan(got), nan)
    assert same(got[~nan], expected[~nan])


@native
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_smooth_activations_within_their_bound(activation: str, twin: Callable[..., Any]) -> None:
    """The twin has the exact functions; the kernels stay within 8 ulp of their argument (test_ops derives it)."""
    values = torch.zeros(4001, 3, dtype=torch.int8)
    bias = torch.linspace(-40, 40, 4001)

    def run() -> Tensor:
        return ops.int8_linear(torch.zeros(1, 3), ops.int8_pack(values, 8), torch.ones(4001), bias, activation)[0]

    assert ((twin(run) - run()).abs() <= bias.abs() * 8 * 2**-23 + 1e-44).all()


@native
def test_same_errors(twin: Callable[..., Any]) -> None:
    values = torch.ones(3, 4, dtype=torch.int8)

    def message(call: Callable[[], object]) -> str:
        with pytest.raises(ValueError) as error:
            call()
        return str(error.value)

    def messages() -> list[str]:
        packed = ops.int8_pack(values, 8)
        return [
            message(lambda: ops.int8_linear(torch.ones(2, 5), packed, torch.ones(3))),
            message(lambda: ops.int8_linear(torch.ones(2, 4), packed, torch.ones(2))),
            message(lambda: ops.int8_pack(values, 6)),
            message(lambda: ops.int8_pack(-127 - values, 8)),
            message(lambda: ops.int8_quantize(torch.ones(2, 3), 9)),
            message(lambda: ops.int8_pack(values, 8, "avx9")),
        ]

    assert twin(messages) == messages()


def test_truncated_and_random_buffers(twin: Callable[..., Any]) -> None:
    def run() -> None:
        packed = ops.int8_pack(torch.ones(3, 4, dtype=torch.int8), 8)
        for broken in (packed[:0], packed[:10], packed[:-1], torch.zeros_like(packed), torch.cat([packed, packed])):
            for use in (ops.int8_unpack, ops.int8_depths):
                with pytest.raises(ValueError, match="packed int8 weight"):
                    use(broken.clone())
            with pytest.raises(ValueError, match="packed int8 weight"):
                ops.int8_linear(torch.ones(2, 4), broken.clone(), torch.ones(3))

    twin(run)


def test_strides(twin: Callable[..., Any], same: Same) -> None:
    def run() -> None:
        packed = ops.int8_pack(torch.randint(-127, 128, (5, 6), dtype=torch.int8), 8)
        wide = torch.randn(4, 9)
        for x in (wide[:, :6], wide[:, 3:], wide[::2, :6], wide.T[:6].T):
            expected = ops.int8_linear(x.contiguous(), packed, torch.ones(5))
            assert same(ops.int8_linear(x, packed, torch.ones(5)), expected)

    twin(run)


def test_no_rows(twin: Callable[..., Any]) -> None:
    def run() -> None:
        packed = ops.int8_pack(torch.ones(5, 6, dtype=torch.int8), 8)
        assert ops.int8_accumulate(torch.ones(0, 6), packed)[0].shape == (0, 5)
        assert ops.int8_linear(torch.ones(0, 6), packed, torch.ones(5)).shape == (0, 5)
        assert [t.shape for t in ops.int8_quantize(torch.ones(0, 6), 8)] == [(0, 6), (0,), (0,)]

    twin(run)


def test_linear_is_the_composition_of_its_parts() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 12), np.float32)
    w = rng.integers(-127, 128, (7, 12), np.int8)
    scale, bias = rng.random(7, np.float32), rng.standard_normal(7, np.float32)
    for bits in (7, 8):
        q, row_scale, zero = reference.quantize(x, 2**bits - 1)
        acc = reference.accumulate(q, zero, w)
        np.testing.assert_array_equal(acc, (q.astype(np.int64) - zero[:, None]) @ w.astype(np.int64).T)
        expected = acc.astype(np.float32) * row_scale[:, None] * scale
        np.testing.assert_array_equal(reference.linear(x, w, scale, activation_bits=bits), expected)
        np.testing.assert_array_equal(reference.linear(x, w, scale, bias, activation_bits=bits), expected + bias)
        relu = reference.linear(x, w, scale, bias, activation_bits=bits, code=ops.ACTIVATIONS["relu"])
        np.testing.assert_array_equal(relu, np.maximum(expected + bias, 0))


# --- without the extension ----------------------------------------------------------------------------------------------

WITHOUT = """
import torch
from torch import nn
import pycompress as pc
from pycompress import ops
from pycompress.nn import Int8Linear

reason = ops.extension_error()
assert reason and "_C" in reason, reason
assert [kernel["name"] for kernel in ops.kernels() if kernel["available"]] == ["numba"]
case = torch.load(sys.argv[1])
packed = ops.int8_pack(case["values"], 8)
assert torch.equal(ops.int8_unpack(packed), case["values"])
got = (*ops.int8_quantize(case["x"], 8), ops.int8_accumulate(case["x"], packed)[0])
assert all(torch.equal(a, b) for a, b in zip(got, case["integers"]))
layer = Int8Linear.from_dense(nn.Linear(40, 24), pc.Int8(activation_bits=7), "gelu")
assert layer(torch.randn(2, 3, 40)).shape == (2, 3, 24)
assert layer(torch.randn(2, 40).bfloat16()).dtype == torch.bfloat16
target = Int8Linear.from_dense(nn.Linear(40, 24), pc.Int8(activation_bits=7), "gelu")
target.load_state_dict(layer.state_dict())
x = torch.randn(2, 40)
assert torch.equal(target(x), layer(x))
model = pc.compress(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)), pc.Int8())
assert model(x).shape == (2, 5)
print(reason)
"""
ABSENT = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
sys.path.insert(0, sys.argv[2])
import pycompress
assert pycompress.__file__.startswith(sys.argv[2]), pycompress.__file__
"""


@pytest.fixture
def case(tmp_path: Path) -> Path:
    values = torch.randint(-127, 128, (24, 40), dtype=torch.int8)
    x = torch.randn(6, 40)
    integers = (*ops.int8_quantize(x, 8), ops.int8_accumulate(x, ops.int8_pack(values, 8))[0])
    torch.save({"values": values, "x": x, "integers": integers}, tmp_path / "case.pt")
    return tmp_path / "case.pt"


def test_import_without_a_place_for_the_cache_of_numba(python: Python) -> None:
    """An unprivileged user, a package that is not theirs and no home: nothing can be cached, and nothing need be."""
    result = python(
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import runpy, sys, numpy\n"
        "reference = runpy.run_path(sys.argv[1])\n"
        "reference['quantize'](numpy.zeros((1, 4), numpy.float32), 255)",
        reference.__file__,
    )
    assert result.returncode == 0, result.stderr


def test_with_the_extension_absent(case: Path, tmp_path: Path, python: Python) -> None:
    """The package as it is where no compiler was found: no file of that name at all."""
    source = Path(pycompress.__file__).parent
    shutil.copytree(
        source, tmp_path / "site" / "pycompress", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    )
    result = python(ABSENT + WITHOUT, case, tmp_path / "site")
    assert result.returncode == 0, result.stderr
