"""Factors of low rank beside an int8 residual on a CUDA device, against float64 within the bounds of ``csrc/low_rank/branch.h`` and
``csrc/int8/cuda.h``; and how they are packed.

Also run under ``compute-sanitizer --tool memcheck`` and ``--tool racecheck``, with PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import pycompress as pc
from pycompress import ops
from pycompress.methods import Dense, Int8, LowRank
from pycompress.nn import LowRankLinear
from pycompress.ops import cuda, cuda_low_rank, cuda_side_branch

device = pytest.mark.skipif(ops.cuda_error() is not None, reason=f"no CUDA here: {ops.cuda_error()}")

HALVES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # and their unit roundoffs
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@pytest.fixture(autouse=True)
def poison() -> None:
    """What the allocator hands out next holds NaN, not the zeros of fresh memory or the right results of the test before."""
    if ops.cuda_error() is not None:
        return
    torch.cuda.empty_cache()
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(4)]
        del blocks


def layer(n: int, k: int, rank: int, activation_bits: int = 8) -> LowRankLinear:
    method = LowRank(rank=rank, residual=Int8(activation_bits=activation_bits), rank_guard=False)
    return LowRankLinear.from_dense(nn.Linear(k, n), method)


def parts(n: int, k: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is packed; the residual is any bytes of the right number, which packing does not look into."""
    residual = torch.randint(0, 256, (cuda_side_branch.residual_bytes(n, k),), dtype=torch.uint8)
    return torch.randn(rank, k), torch.randn(n, rank), residual, torch.rand(n) + 0.5


# --- without a device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 15, 64, 65, 128])
@pytest.mark.parametrize(("n", "k"), [(130, 140), (200, 129), (1000, 256)])
def test_packing_loses_nothing(n: int, k: int, rank: int) -> None:
    given = parts(n, k, rank)
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x00000001, 0x00008000, 0x7F7F7FFF])
    given[0][0, :5], given[1][0, 0] = bits.to(torch.int32).view(torch.float32), -0.0
    packed = cuda_side_branch.pack(*given)
    assert packed.shape[:2] == (rank, k)
    sizes = ops.cuda_low_rank_sizes(n, k, rank, "int8")
    found = torch.ops.pycompress.low_rank_unpack.default.redispatch(CUDA, packed, *sizes)
    for mine, theirs in zip(given, (*found[:2], *found[4:]), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    assert all(tensor.numel() == 0 for tensor in found[2:4])


def test_each_part_is_packed_as_its_own_kernels_read_it() -> None:
    n, k, rank = 130, 70, 17
    down, up, residual, scale = parts(n, k, rank)
    packed = cuda_side_branch.pack(down, up, residual, scale)
    layout, flat = cuda_side_branch._layout(n, k, rank), packed.flatten()
    assert packed.shape == (rank, k, layout.row)
    assert layout.residual % 128 == layout.scale % 128 == 0
    assert torch.equal(flat[: layout.factors], cuda_low_rank.pack(down, up).flatten())
    assert torch.equal(flat[layout.residual :][: residual.numel()], residual)
    assert torch.equal(flat[layout.scale :][: 4 * n].view(torch.float32), scale)


def test_the_size_of_the_residual_is_that_of_the_int8_kernels() -> None:
    module, why = cuda._load()
    if module is None:
        pytest.skip(f"the native module was not built: {why}")
    for n in (1, 127, 128, 129, 4096):
        for k in (1, 63, 64, 65, 4096):
            assert cuda_side_branch.residual_bytes(n, k) == module.int8_packed_bytes(n, k)


def test_the_shape_tells_other_weights_apart() -> None:
    packed = cuda_side_branch.pack(*parts(130, 70, 17))
    for n, k in ((130, 71), (130, 64), (128, 70), (400, 70)):
        with pytest.raises(ValueError, match=rf"packed is torch\.uint8 \[17, 70, .*expected for n = {n}, k = {k} what"):
            cuda_side_branch.unpack(packed, n, k)
    for other in (packed[0], packed.float(), packed[:, :, 1:], packed.transpose(0, 1)):
        with pytest.raises(ValueError, match="expected for n = 130, k = 70 what low_rank_pack returns"):
            cuda_side_branch.unpack(other, 130, 70)
    sizes = ops.cuda_low_rank_sizes(130, 70, 16, "int8")
    with pytest.raises(ValueError, match=r"the packed weight is \(130, 70, 17, .*not \(130, 70, 16"):
        torch.ops.pycompress.low_rank_unpack.default.redispatch(CUDA, packed, *sizes)


def test_what_packing_refuses() -> None:
    down, up, residual, scale = parts(140, 150, 16)
    with pytest.raises(ValueError, match="the rank is 129, expected 1 to 128 beside an int8 residual"):
        cuda_side_branch.pack(*parts(140, 150, 129))
    with pytest.raises(ValueError, match="holds NaN, Inf or a value that rounds to it"):
        cuda_side_branch.pack(down * torch.inf, up, residual, scale)
    with pytest.raises(ValueError, match="no kernels for int8 factors"):
        cuda_side_branch.pack(down.to(torch.int8), up.to(torch.int8), residual, scale)
    for bad in (residual[1:], residual.float()):
        with pytest.raises(
            ValueError, match=rf"residual is .*expected a dense torch\.uint8 vector of {len(residual)} "
        ):
            cuda_side_branch.pack(down, up, bad, scale)
    with pytest.raises(ValueError, match=r"residual_scale is .*expected a dense torch\.float32 vector of 140 values"):
        cuda_side_branch.pack(down, up, residual, scale[1:])
    with pytest.raises(ValueError, match=r"residual_scale is None, expected torch\.float32 \[140\]"):
        cuda_side_branch.pack(down, up, residual, None)
    with pytest.raises(ValueError, match="residual is None"):
        cuda_side_branch.pack(down, up, None, scale)


def test_kernels_for_cuda_name_the_devices() -> None:
    down, up, residual, scale = parts(8, 16, 2)
    packed = cuda_side_branch.pack(down, up, residual, scale)
    for op, operands in {
        torch.ops.pycompress.low_rank_linear.default: (torch.randn(3, 16), packed, 8, None, "none"),
        torch.ops.pycompress.low_rank_pack.default: (down, up, None, None, 0, "int8", residual, scale),
    }.items():
        with pytest.raises(RuntimeError, match="on cpu, expected all of them on one CUDA device or on the CPU"):
            op.redispatch(CUDA, *operands)


def test_compilers_see_the_shapes() -> None:
    with FakeTensorMode():
        packed = torch.empty(4, 16, 100, dtype=torch.uint8, device="cuda")
        x = torch.empty(3, 16, dtype=torch.bfloat16, device="cuda")
        assert torch.ops.pycompress.low_rank_linear.default(x, packed, 8, None, "none").shape == (3, 8)
        sizes = ops.cuda_low_rank_sizes(8, 16, 4, "int8")
        found = torch.ops.pycompress.low_rank_unpack.default(packed, *sizes)
    shapes = [(4, 16), (8, 4), (0,), (0,), (cuda_side_branch.residual_bytes(8, 16),), (8,)]
    assert [tuple(tensor.shape) for tensor in found] == shapes


def test_a_layer_that_cannot_be_packed_stays_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: LowRankLinear, tensors: Any) -> Tensor:
        raise ValueError("no kernels there")

    made, x = layer(16, 24, 4), torch.randn(3, 24)
    expected = made(x)
    with monkeypatch.context() as patched:
        patched.setattr(LowRankLinear, "_packs_anew", lambda *_: True)
        patched.setattr(LowRankLinear, "_pack", refuses)
        with pytest.raises(ValueError, match="no kernels there"):
            made.to("meta")
    assert torch.equal(made(x), expected)


# --- with one -----------------------------------------------------------------------------------------------------------


def rounded(factor: Tensor) -> Tensor:
    """To bfloat16, ties away from zero, as float64."""
    return (factor.view(torch.int32) + 0x8000 >> 16 << 16).view(torch.float32).double()


def of_steps(count: float, parts: int) -> float:
    return 2.0**-23 * (17 * (count + 1) + parts + 8)


class Case:
    """A layer on the device and what is expected of it."""

    def __init__(self, n: int, k: int, rank: int, activation_bits: int = 8) -> None:
        self.layer = layer(n, k, rank, activation_bits)
        state = self.layer.state_dict()
        self.down, self.up, self.bias = rounded(state["down"]), rounded(state["up"]), state["bias"].double()
        self.weight, self.weight_scale = state["residual_weight"], state["residual_weight_scale"]
        self.bits = activation_bits
        self.layer.cuda()

    def integers(self, x: Tensor) -> Tensor:
        """(float(acc) * sx) * sw, to the bit."""
        q, scale, zero_point = ops.int8_quantize(x.cpu(), self.bits)
        acc = (q.double() - zero_point.double()[:, None]) @ self.weight.double().T
        return (acc.float() * scale[:, None]) * self.weight_scale

    def check(self, y: Tensor, x: Tensor) -> None:
        x64, u = x.cpu().double(), HALVES[x.dtype]
        t, up, s = x64 @ self.down.T, self.up.abs().T, self.integers(x).double()
        k, rank = x.shape[1], self.up.shape[1]
        first, second = of_steps(k / 32 / min(16, -(-k // 256)) * 2 + 4, 16), 2.0**-23 * 17 * (-(-rank // 64) * 4 + 1)
        d = first * (x64.abs() @ self.down.abs().T) + (u + 2.0**-23) * t.abs() + 2.0**-24
        expected = s + t @ self.up.T + self.bias
        bound = d @ up + second * (s.abs() + (t.abs() + d) @ up)
        bound += (u + 2.0**-23) * (expected.abs() + bound + self.bias.abs()) + 2.0**-24
        assert ((y.cpu().double() - expected).abs() <= bound).all()


@device
@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_rows(dtype: torch.dtype) -> None:
    case = Case(200, 712, 90)
    for m in (*range(1, 35), 64, 65, 130, 515):
        x = torch.randn(m, 712, dtype=dtype, device="cuda")
        case.check(case.layer(x), x)


@device
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("n", "k", "rank"),
    [(1, 1, 1), (31, 33, 16), (65, 65, 17), (4096, 1000, 125), (140, 4096, 128), (130, 16384, 33), (200, 4099, 32)],
)
def test_shapes(n: int, k: int, rank: int, dtype: torch.dtype) -> None:
    case = Case(n, k, rank, 7 if n % 2 else 8)
    for m in (1, 17, 300):
        x = torch.randn(m, k, dtype=dtype, device="cuda")
        y = case.layer(x)
        case.check(y, x)
        spread = torch.full((m, k + 3), torch.nan, dtype=dtype, device="cuda")
        spread[:, :k] = x
        assert torch.equal(case.layer(spread[:, :k]), y)
    assert case.layer(torch.empty(0, k, dtype=dtype, device="cuda")).shape == (0, n)
    assert case.layer(x.view(3, 100, k)).shape == (3, 100, n)


@device
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("k", [1, 7, 64, 65, 1000, 1024, 4088, 4096, 4097, 4104, 16384])
def test_rows_are_quantized_as_without_a_branch(k: int, dtype: torch.dtype) -> None:
    module, n, rank = cuda.native("tests"), 3, 1
    made = layer(n, k, rank, 7).cuda()
    layout, begin = cuda_side_branch._layout(n, k, rank), made.packed.data_ptr()
    x = torch.randn(37, k, device="cuda")
    x[1], x[2] = 0, x[2] * 2**-20
    x[3, -1], x[4, 0], x[5, -1] = float("nan"), float("inf"), -float("inf")
    x = x.to(dtype)
    for m in (1, 16, 37):
        size = module.side_branch_workspace(n, k, rank, m)
        workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
        module.side_branch_quantize(
            0, cuda.stream_of(0), x.data_ptr(), ops.native.FLOATS[dtype], m, k, k, begin, begin + layout.residual, n, rank,
            workspace.data_ptr(),
        )  # fmt: skip
        rows, scale, zero_point = cuda.int8_rows(x[:m], k, 7)
        k_pad = -(-k // 64) * 64
        assert torch.equal(workspace[: m * k_pad], rows[: m * k_pad])
        for mine, expected in ((workspace[-8 * m : -4 * m], scale), (workspace[-4 * m :], zero_point)):
            assert torch.equal(mine, expected.view(torch.uint8))


@device
@pytest.mark.parametrize("dtype", HALVES)
def test_without_factors_it_has_the_bits_of_int8_linear(dtype: torch.dtype) -> None:
    made = layer(300, 712, 33)
    state = made.state_dict()
    state["up"].zero_()
    made.load_state_dict(state)
    made.cuda()
    packed, scale = ops.int8_pack(state["residual_weight"].cuda(), 8), state["residual_weight_scale"].cuda()
    for activation in ops.ACTIVATIONS:
        made.activation = activation
        for m in (1, 40, 300):
            x = torch.randn(m, 712, dtype=dtype, device="cuda")
            assert torch.equal(made(x), ops.int8_linear(x, packed, scale, made.bias, activation))


@device
def test_kernels_forced() -> None:
    arch, case = cuda.native("tests").compute_capability(0), Case(300, 1000, 70)
    for kernel in ops.cuda_kernels():
        if kernel["arch"] > arch or (kernel["arch"] == 90 and arch != 90):
            continue
        for dtype in HALVES:
            for m in (1, kernel["bm"] + 1):
                x = torch.randn(m, 1000, dtype=dtype, device="cuda")
                y = cuda_side_branch.linear(x, case.layer.packed, 300, case.layer.bias, "none", kernel["name"])
                case.check(y, x)


@device
def test_a_row_that_is_not_finite_gives_nan() -> None:
    made, x = layer(70, 130, 33).cuda(), torch.randn(5, 130, dtype=torch.bfloat16, device="cuda")
    expected = made(x)
    x[1, 5], x[3, 0] = float("inf"), float("nan")
    y = made(x)
    assert y[1].isnan().all()
    assert y[3].isnan().all()
    assert torch.equal(y[[0, 2, 4]], expected[[0, 2, 4]])


@device
def test_the_same_bits_beside_another_stream_and_in_a_graph() -> None:
    made, there = layer(64, 16384, 64).cuda(), torch.zeros(8, 16384, dtype=torch.bfloat16, device="cuda")
    xs = torch.randn(3, 8, 16384, dtype=torch.bfloat16, device="cuda")
    expected = [made(x) for x in xs]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(there)
    torch.cuda.synchronize()
    for x, right in zip(xs, expected, strict=True):
        there.copy_(x)
        y.fill_(float("nan"))
        graph.replay()
        with torch.cuda.stream(stream):
            beside = [made(xs[0]) for _ in range(10)]
        torch.cuda.synchronize()
        assert torch.equal(y, right)
        assert all(torch.equal(other, expected[0]) for other in beside)


@device
def test_there_and_back(tmp_path: Path) -> None:
    made = layer(70, 130, 33)
    state, packed, weight = made.state_dict(), made.packed, made.weight
    made.to("cuda", torch.bfloat16)  # what is meant for activations does not touch the weight
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor.cpu(), state[name]), name
    torch.testing.assert_close(ops.low_rank_dense(made.packed, 70, 130).cpu(), weight)
    pc.save(nn.Sequential(made), tmp_path / "cuda.safetensors")
    loaded = pc.load(nn.Sequential(nn.Linear(130, 70)), tmp_path / "cuda.safetensors")[0]
    assert torch.equal(loaded.packed, packed)
    assert torch.equal(copy.deepcopy(made).cpu().packed, packed)
    made.load_state_dict(layer(70, 130, 20).state_dict())  # of another rank
    assert made.packed.shape[0] == 20


@device
def test_compile_export_opcheck_waiting_and_gradients() -> None:
    made, x = layer(96, 80, 20).cuda().eval(), torch.randn(5, 80, dtype=torch.bfloat16, device="cuda")
    expected = made(x)
    with torch.inference_mode():
        assert torch.equal(torch.compile(made, fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(made, (x,)).module()(x), expected)
    torch.library.opcheck(torch.ops.pycompress.low_rank_linear.default, (x, made.packed, 96, made.bias, "silu"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        made(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    made(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, made.weight.to(x).sum(0).expand(5, -1), rtol=0.1, atol=0.02)


@device
def test_errors_say_what_came() -> None:
    made = layer(96, 80, 20).cuda()
    with pytest.raises(TypeError, match=r"x is torch\.float32, expected bfloat16 or float16 on a CUDA device"):
        made(torch.randn(3, 80, device="cuda"))
    with pytest.raises(ValueError, match=r"packed is torch\.uint8 \[20, 80, .*expected for n = 96, k = 40"):
        made(torch.randn(3, 40, dtype=torch.bfloat16, device="cuda"))
    with pytest.raises(ValueError, match="residual_kind is 'dense', expected '' or 'int8' on a CUDA device"):
        LowRankLinear.from_dense(nn.Linear(80, 96), LowRank(rank=20, residual=Dense(), rank_guard=False)).cuda()
    too_high = layer(200, 150, 129)
    with pytest.raises(ValueError, match="the rank is 129, expected 1 to 128 beside an int8 residual"):
        too_high.cuda()
    assert too_high.packed.is_cpu
    assert too_high.bias.is_cpu
