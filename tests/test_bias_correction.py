"""The bias of a compressed layer keeps the mean of its outputs, where a calibration saw its inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods.bias import correction
from pycompress.methods.method import Method


def batches(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape) + 2 for _ in range(3)]


@pytest.mark.parametrize(
    "method", [pc.Int8(7), pc.Int4(32), pc.Sparse(0.3), pc.Sparse(0.3, choose="wanda"), pc.LowRank(4)], ids=repr
)
@torch.no_grad()
def test_the_mean_stays(method: Method) -> None:
    dense, seen = nn.Linear(40, 24), batches(50, 40)
    calibration = pc.calibrate(dense, seen)
    plain = pc.compress(dense, method, calibration=calibration, correct_bias=False)
    result = pc.compress(dense, method, calibration=calibration)
    assert torch.equal(plain.bias32, dense.bias)
    x = torch.cat(seen).double()
    errors = [(dense.weight - layer.canonical().decompress()).double() for layer in (plain, result)]
    assert torch.allclose(result.bias32.double(), dense.bias + x.mean(0) @ errors[1].T, atol=1e-6)
    gained = (result.bias32 - dense.bias).double()
    assert float((x @ errors[1].T - gained).mean(0).abs().max()) < 1e-5
    assert float((x @ errors[0].T).mean(0).abs().max()) > 1e-5


def test_a_convolution() -> None:
    dense, seen = nn.Conv2d(6, 8, 3, padding=1), batches(2, 6, 9, 9)
    result = pc.compress(dense, pc.Sparse(0.2, choose="magnitude"), calibration=pc.calibrate(dense, seen))
    x = torch.cat(seen)
    error = (result(x) - dense(x)).detach()
    assert float(error.mean((0, 2, 3)).abs().max()) < 1e-5
    assert float(error.abs().max()) > 0.1


def test_only_what_was_seen_and_has_a_bias() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, bias=False)).eval()
    bias = model[0].bias.detach().clone()
    seen = pc.calibrate(model, batches(16, 8))
    method = pc.Sparse(0.5, choose="magnitude")
    corrected = pc.compress(model, method, calibration=seen)
    assert corrected[1].bias is None
    assert not torch.equal(corrected[0].bias32, bias)
    assert torch.equal(model[0].bias, bias)
    assert torch.equal(pc.compress(model, method)[0].bias32, bias)
    assert torch.equal(pc.compress(model, method, calibration={})[0].bias32, bias)


def test_it_is_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 8)).eval()
    result = pc.compress(model, pc.Int4(32), calibration=pc.calibrate(model, batches(16, 32)))
    pc.save(result, tmp_path / "m.safetensors")
    loaded = pc.load(model, tmp_path / "m.safetensors")
    assert torch.equal(loaded[0].bias32, result[0].bias32)
    assert pc.validate(loaded, batches(4, 32)[0]).ok


def test_correction_is_what_the_mean_loses() -> None:
    w, other, mean = torch.randn(3, 5), torch.randn(3, 5), torch.randn(5, dtype=torch.float64)
    assert torch.allclose(correction(w, other, mean), (w.double() - other.double()) @ mean, atol=0, rtol=0)
