"""The weight-only ops and layers on a CUDA device, against float64 within the bound of ``csrc/weight_only/cuda.h``.

Also run under ``compute-sanitizer --tool memcheck`` and ``--tool racecheck``, with PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from on_cuda import HALVES, check_a_graph_beside_another_stream, nothing_waits, poison  # noqa: F401
from torch import Tensor, nn

import pycompress as pc
from pycompress import ops
from pycompress.methods import Int4, Int8
from pycompress.nn import Int4Linear, Int8Linear
from pycompress.ops.cuda import native
from pycompress.weights import Int4Weight, Int8Weight

pytestmark = pytest.mark.skipif(ops.cuda_error() is not None, reason=f"no CUDA here: {ops.cuda_error()}")

METHODS: list[Int8 | Int4] = [
    Int8(activation_bits=16),
    *(Int4(group, symmetric, activation_bits=16) for group in (32, 64, 128) for symmetric in (False, True)),
]


def layer(method: Int8 | Int4, n: int, k: int, activation: str = "none") -> Int8Linear | Int4Linear:
    made = pc.compress(nn.Sequential(nn.Linear(k, n)), method)[0]
    assert isinstance(made, Int8Linear | Int4Linear)
    made.activation = activation
    return made


def canonical(made: Int8Linear | Int4Linear) -> Int8Weight | Int4Weight:
    return made.canonical()


def check(y: Tensor, x: Tensor, weight: Int8Weight | Int4Weight, bias: Tensor) -> None:
    w, x64, bias64 = weight.decompress().double(), x.cpu().double(), bias.cpu().double()
    expected, magnitude = x64 @ w.T + bias64, x64.abs() @ w.abs().T
    k = x.shape[-1]
    relative = 2.0**-23 * (17 * (k / 16 + 5) + k / 32 + 16 + 8 + 8 + 1)
    bound = relative * magnitude + (HALVES[x.dtype] + 2.0**-23) * (expected.abs() + bias64.abs()) + 2.0**-24
    assert ((y.cpu().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_every_number_of_rows(method: Int8 | Int4, dtype: torch.dtype) -> None:
    made = layer(method, 200, 712)
    weight, bias = canonical(made), made.bias
    assert bias is not None
    made.cuda()
    for m in (*range(1, 66), 130):
        x = torch.randn(m, 712, dtype=dtype, device="cuda")
        check(made(x), x, weight, bias)


@pytest.mark.parametrize("method", METHODS[:3], ids=repr)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 33), (33, 64), (65, 65), (4096, 1000), (64, 16384), (1000, 4099)])
def test_shapes(method: Int8 | Int4, n: int, k: int) -> None:
    made = layer(method, n, k)
    weight, bias = canonical(made), made.bias
    assert bias is not None
    made.cuda()
    for m in (1, 17):
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        check(made(x), x, weight, bias)
        spread = torch.full((m, k + 3), torch.nan, dtype=torch.bfloat16, device="cuda")
        spread[:, :k] = x
        assert torch.equal(made(spread[:, :k]), made(x))


@pytest.mark.parametrize("method", METHODS[:2], ids=repr)
def test_the_same_bits_at_every_call(method: Int8 | Int4) -> None:
    made, x = layer(method, 256, 16384).cuda(), torch.randn(16, 16384, dtype=torch.bfloat16, device="cuda")
    expected = made(x)
    for _ in range(20):
        assert torch.equal(made(x), expected)


@pytest.mark.parametrize("method", METHODS[:2], ids=repr)
def test_activations(method: Int8 | Int4) -> None:
    made, x = layer(method, 96, 80).cuda(), torch.randn(5, 80, dtype=torch.float16, device="cuda")
    plain = made(x).float()
    for name, activation in {
        "relu": torch.relu,
        "gelu": nn.functional.gelu,
        "silu": nn.functional.silu,
    }.items():
        made.activation = name
        torch.testing.assert_close(made(x).float(), activation(plain), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_there_and_back(method: Int8 | Int4, tmp_path: Path) -> None:
    made = layer(method, 70, 130)
    state, packed = made.state_dict(), made.packed
    made.cuda()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor.cpu(), state[name]), name
    pc.save(nn.Sequential(made), tmp_path / "cuda.safetensors")
    loaded = pc.load(nn.Sequential(nn.Linear(130, 70)), tmp_path / "cuda.safetensors")[0]
    assert torch.equal(loaded.packed, packed)
    assert torch.equal(copy.deepcopy(made).cpu().packed, packed)


def test_int4_dense() -> None:
    for method in METHODS[1:]:
        made = layer(method, 70, 130)
        dense = ops.dense("int4", made.packed, made.form)
        made.cuda()
        assert torch.equal(ops.dense("int4", made.packed, made.form).cpu(), dense)


def test_not_finite_rows_stay_apart() -> None:
    made, x = layer(METHODS[1], 96, 80).cuda(), torch.randn(4, 80, dtype=torch.bfloat16, device="cuda")
    expected = made(x)
    x[1, 79], x[2, 0] = torch.inf, torch.nan
    y = made(x)
    assert not y[1].isfinite().any()
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("method", METHODS[:2], ids=repr)
def test_a_cuda_graph_beside_another_stream(method: Int8 | Int4) -> None:
    check_a_graph_beside_another_stream(layer(method, 64, 16384).cuda(), 8, 16384, torch.bfloat16)


def test_compile_export_opcheck_and_waiting() -> None:
    made, x = layer(METHODS[1], 96, 80).cuda().eval(), torch.randn(5, 80, dtype=torch.bfloat16, device="cuda")
    expected = made(x)
    with torch.inference_mode():
        assert torch.equal(torch.compile(made, fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(made, (x,)).module()(x), expected)
    torch.library.opcheck(torch.ops.pycompress.int4_linear.default, (x, made.packed, made.form, made.bias, "silu"))
    with nothing_waits():
        made(x)


def test_errors_say_what_came() -> None:
    int4, int8 = layer(METHODS[1], 96, 80).cuda(), layer(METHODS[0], 96, 80).cuda()
    for made in (int4, int8):
        with pytest.raises(TypeError, match=r"x is torch\.float32, expected bfloat16 or float16"):
            made(torch.randn(3, 80, device="cuda"))
    x = torch.randn(3, 40, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match=r"int4_linear: x is \[3, 40\], the packed weight expects k = 80"):
        ops.int4_linear(x, int4.packed, int4.form)
    with pytest.raises(ValueError, match=r"a packed weight 96x40 has .* bytes, this one"):
        ops.int4_linear(x, int4.packed, int4.form.replace("k=80", "k=40"))
    with pytest.raises(ValueError, match="activation_bits is 8, expected 16 on a CUDA device"):
        layer(Int4(), 96, 80).cuda()
    parts = {"values": torch.full((3, 3), -128, dtype=torch.int8), "scale": torch.ones(3)}
    with pytest.raises(ValueError, match="a weight is -128"):
        ops.pack("int8", parts, (3, 3), {"activation_bits": 16}, "cuda")


def test_kernels_forced() -> None:
    module, (n, k, m) = native.native("tests"), (100, 1000, 8)
    made, x = layer(METHODS[1], n, k), torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    weight, sizes = canonical(made), (4, n, k, made.group, made.symmetric)
    made.cuda()
    rows = [row for row in module.weight_only_kernels() if row["bits"] == 4 and row["name"].startswith("w4_bf16")]
    assert rows
    for row in rows:
        for splits in (1, 2, 5):
            y = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device="cuda")
            size = module.weight_only_workspace(0, sizes, ops.checks.FLOATS[x.dtype], m, row["name"], splits)
            workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
            module.weight_only_linear(
                0, native.stream_of(0), sizes, x.data_ptr(), ops.checks.FLOATS[x.dtype], m, k, made.packed.data_ptr(),
                made.packed.numel(), 0, 0, 0, y.data_ptr(), workspace.data_ptr(), row["name"], splits,
            )  # fmt: skip
            check(y, x, weight, torch.zeros(n))
