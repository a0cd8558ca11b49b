"""The low-rank ops and layers on a CUDA device, against float64 within the bound of ``csrc/low_rank/cuda.h``;
and how they are packed.

Also run under ``compute-sanitizer --tool memcheck`` and ``--tool racecheck``, with PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import pytest
import torch
from on_cuda import (
    DISPATCH,
    HALVES,
    check_a_graph_beside_another_stream,
    device,
    nothing_waits,
    poison,  # noqa: F401
    rounded,
)
from torch import Tensor, nn

import pycompress as pc
from pycompress import ops
from pycompress.methods import Int4, LowRank
from pycompress.nn import LowRankLinear
from pycompress.ops.cuda import low_rank, native


def layer(n: int, k: int, rank: int) -> LowRankLinear:
    return LowRankLinear.from_dense(nn.Linear(k, n), LowRank(rank=rank, rank_guard=False))


def pack(down: Tensor, up: Tensor) -> tuple[Tensor, str]:
    return low_rank.pack({"down": down, "up": up}, (up.shape[0], down.shape[1]), {"rank": len(down), "bits": 32})


def of_steps(count: int) -> float:
    return 2.0**-23 * (17 * (count / 16 + 5) + 16 + 4 + 8)


class Case:
    """A layer on the device and what is expected of it."""

    def __init__(self, n: int, k: int, rank: int) -> None:
        self.layer = layer(n, k, rank)
        state = self.layer.state_dict()
        self.down, self.up, self.bias = (
            rounded(state["low_rank_down"]),
            rounded(state["low_rank_up"]),
            state["bias"].double(),
        )
        self.layer.cuda()

    def check(self, y: Tensor, x: Tensor) -> None:
        x64, u = x.cpu().double(), HALVES[x.dtype]
        t, up = x64 @ self.down.T, self.up.abs().T
        d = of_steps(x.shape[-1]) * (x64.abs() @ self.down.abs().T) + (u + 2.0**-23) * t.abs() + 2.0**-24
        expected = t @ self.up.T + self.bias
        bound = d @ up + of_steps(self.up.shape[1]) * ((t.abs() + d) @ up)
        bound += (u + 2.0**-23) * (expected.abs() + bound + self.bias.abs()) + 2.0**-24
        assert ((y.cpu().double() - expected).abs() <= bound).all()


# --- without a device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 63, 64, 65, 129])
@pytest.mark.parametrize(("n", "k"), [(70, 130), (200, 71), (129, 64), (150, 151)])
def test_packing_loses_nothing(n: int, k: int, rank: int) -> None:
    rank = min(rank, n, k)
    down, up = torch.randn(rank, k), torch.randn(n, rank)
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x00000001, 0x00008000, 0x7F7F7FFF, 0])
    down[0, :8], up[0, 0] = bits.to(torch.int32).view(torch.float32), -0.0  # ties to even and to odd, subnormal ones
    down[0, 8:16] = -down[0, :8]
    packed, form = pack(down, up)
    of, found = ops.parse(form), low_rank.unpack(packed, form)
    assert (of.n, of.k, of.rank, packed.shape) == (n, k, rank, (of.bytes,))
    assert of.bytes % 128 == 0
    for name, mine in (("down", down), ("up", up)):
        assert torch.equal(mine.view(torch.int32), found[name].view(torch.int32))
    torch.testing.assert_close(low_rank.dense(packed, form)[1:, 16:], (up @ down)[1:, 16:])


def test_the_layout_is_that_of_the_kernels() -> None:
    """Value by value as ``csrc/low_rank/cuda.h`` says it."""
    n, k, rank = 33, 70, 17
    down, up = torch.randn(rank, k), torch.randn(n, rank)
    halves = pack(down, up)[0].view(torch.int16)
    begin = 0
    for matrix, (rows, columns) in ((down, (64, 128)), (up, (128, 64))):
        expected = torch.zeros(rows, columns, dtype=torch.float64)
        expected[: matrix.shape[0], : matrix.shape[1]] = rounded(matrix)
        found = halves[begin : begin + rows * columns].view(torch.bfloat16).double()
        assert torch.equal(found, expected.flatten())
        begin += rows * columns


def test_what_packing_refuses() -> None:
    good = torch.randn(4, 8), torch.randn(8, 4)
    for bad in (torch.inf, torch.nan, 3.4e38):
        with pytest.raises(ValueError, match="holds NaN, Inf or a value that rounds to it"):
            pack(torch.full((4, 8), bad), good[1])
    with pytest.raises(ValueError, match="no kernels for int8 factors"):
        pack(good[0].to(torch.int8), good[1].to(torch.int8))
    packed, form = pack(*good)
    with pytest.raises(ValueError, match=r"expected a dense torch\.uint8 vector of"):
        low_rank.dense(packed[:-1], form)
    with pytest.raises(ValueError, match="the factors are 8x8, expected 8x9"):
        low_rank.pack({"down": good[0], "up": good[1]}, (8, 9), {})


def test_kernels_for_cuda_name_the_devices() -> None:
    made = layer(8, 16, 2)
    op = torch.ops.pycompress.low_rank_linear.default
    with pytest.raises(RuntimeError, match="on cpu, expected all of them on one CUDA device or on the CPU"):
        op.redispatch(
            DISPATCH,
            torch.randn(3, 16),
            *pack(*(made.state_dict()[f"low_rank_{name}"] for name in ("down", "up"))),
            None,
            "none",
        )


# --- with one -----------------------------------------------------------------------------------------------------------


@device
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [20, 90, 130])
def test_every_number_of_rows(rank: int, dtype: torch.dtype) -> None:
    case = Case(200, 712, rank)
    for m in (*range(1, 35), 63, 64, 65, 127, 128, 129, 257, 1000, 4099):
        x = torch.randn(m, 712, dtype=dtype, device="cuda")
        case.check(case.layer(x), x)


@device
@pytest.mark.parametrize(
    ("n", "k", "rank"),
    [(1, 1, 1), (31, 33, 16), (65, 65, 17), (4096, 1000, 125), (64, 16384, 64), (1000, 4099, 200), (2048, 2048, 512)],
)
def test_shapes(n: int, k: int, rank: int) -> None:
    case = Case(n, k, rank)
    for m in (1, 17, 40, 600):
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        y = case.layer(x)
        case.check(y, x)
        spread = torch.full((m, k + 3), torch.nan, dtype=torch.bfloat16, device="cuda")
        spread[:, :k] = x
        assert torch.equal(case.layer(spread[:, :k]), y)
    assert case.layer(torch.empty(0, k, dtype=torch.bfloat16, device="cuda")).shape == (0, n)


@device
def test_rows_of_a_wider_tensor_are_read_in_place() -> None:
    case, wide = Case(300, 256, 100), torch.randn(5, 70, 264, dtype=torch.float16, device="cuda")
    for x in (wide[0, :, :256], wide[..., 8:]):
        case.check(case.layer(x).reshape(-1, 300), x.reshape(-1, 256))


@device
def test_the_same_bits_beside_another_stream_and_in_a_graph() -> None:
    check_a_graph_beside_another_stream(layer(64, 16384, 64).cuda(), 8, 16384, torch.bfloat16)


@device
def test_activations() -> None:
    made, x = layer(96, 80, 40).cuda(), torch.randn(5, 80, dtype=torch.float16, device="cuda")
    plain = made(x).float()
    for name, activation in {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}.items():
        made.activation = name
        torch.testing.assert_close(made(x).float(), activation(plain), rtol=2e-3, atol=2e-3)


@device
def test_there_and_back(tmp_path: Path) -> None:
    made = layer(70, 130, 33)
    state, packed, weight = made.state_dict(), made.packed, made.weight
    made.to("cuda", torch.bfloat16)  # what is meant for activations does not touch the weight
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor.cpu(), state[name]), name
    torch.testing.assert_close(ops.dense("low_rank", made.packed, made.form).cpu(), weight)
    pc.save(nn.Sequential(made), tmp_path / "cuda.safetensors")
    loaded = pc.load(nn.Sequential(nn.Linear(130, 70)), tmp_path / "cuda.safetensors")[0]
    assert torch.equal(loaded.packed, packed)
    assert torch.equal(copy.deepcopy(made).cpu().packed, packed)


@device
def test_compile_export_opcheck_and_waiting() -> None:
    made, x = layer(96, 80, 20).cuda().eval(), torch.randn(5, 80, dtype=torch.bfloat16, device="cuda")
    expected = made(x)
    with torch.inference_mode():
        assert torch.equal(torch.compile(made, fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(made, (x,)).module()(x), expected)
    torch.library.opcheck(torch.ops.pycompress.low_rank_linear.default, (x, made.packed, made.form, made.bias, "silu"))
    with nothing_waits():
        made(x)


@device
def test_errors_say_what_came() -> None:
    made = layer(96, 80, 20).cuda()
    with pytest.raises(TypeError, match=r"x is torch\.float32, expected bfloat16 or float16 on a CUDA device"):
        made(torch.randn(3, 80, device="cuda"))
    with pytest.raises(ValueError, match=r"x is \[3, 40\], the packed weight expects k = 80"):
        made(torch.randn(3, 40, dtype=torch.bfloat16, device="cuda"))
    with pytest.raises(ValueError, match="no kernels for int8 factors"):
        LowRankLinear.from_dense(nn.Linear(80, 96), LowRank(rank=20, bits=8, rank_guard=False)).cuda()
    with pytest.raises(ValueError, match="activation_bits is 8, expected 16 on a CUDA device"):
        LowRankLinear.from_dense(nn.Linear(80, 96), LowRank(rank=20, residual=Int4(), rank_guard=False)).cuda()


def ranks_of(row: dict[str, object]) -> tuple[int, ...]:
    """Those that a kernel runs with."""
    if str(row["name"]).startswith("fused"):
        return {64: (16, 60), 128: (70, 128)}[cast("int", row["channels"])]
    return (60, 140)


@device
def test_kernels_forced() -> None:
    module, (n, k) = native.native("tests"), (300, 1000)
    cases = {rank: Case(n, k, rank) for rank in (16, 60, 70, 128, 140)}
    for rank, case in cases.items():
        case.bias = torch.zeros(n, dtype=torch.float64)
        for row in (row for row in module.low_rank_kernels() if rank in ranks_of(row)):
            dtype = next(dtype for dtype in HALVES if ops.checks.FLOATS[dtype] == row["type"])
            kind = row["type"]
            for splits in (1, 2, 5):
                m = 2 * max(row["rows"], 64) + 3
                x = torch.randn(m, k, dtype=dtype, device="cuda")
                y = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
                size = module.low_rank_workspace(0, n, k, rank, kind, m, row["name"], splits)
                workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
                module.low_rank_linear(
                    0, native.stream_of(0), x.data_ptr(), kind, m, k, n, k, rank, case.layer.packed.data_ptr(), 0, 0,
                    y.data_ptr(), workspace.data_ptr(), row["name"], splits,
                )  # fmt: skip
                case.check(y, x)
