"""Factors of low rank beside an int8 residual on a CUDA device, against float64 within the bounds of ``csrc/low_rank/branch.h`` and
``csrc/int8/cuda.h``; and how they are packed.

Also run under ``compute-sanitizer --tool memcheck`` and ``--tool racecheck``, with PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from torch._subclasses import FakeTensorMode

import pycompress as pc
from pycompress import ops
from pycompress.methods import Dense, Int8, LowRank
from pycompress.nn import LowRankLinear
from pycompress.ops.cuda import int8, low_rank, native
from pycompress.ops.registry import OPS


def layer(n: int, k: int, rank: int, activation_bits: int = 8) -> LowRankLinear:
    method = LowRank(rank=rank, residual=Int8(activation_bits=activation_bits), rank_guard=False)
    return LowRankLinear.from_dense(nn.Linear(k, n), method)


SETTINGS = {"bits": 32, "residual": {"method": "int8", "activation_bits": 7, "weight_bits": 8}}


def parts(n: int, k: int, rank: int) -> dict[str, Tensor]:
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    residual = {"residual_values": values, "residual_scale": torch.rand(n) + 0.5}
    return {"down": torch.randn(rank, k), "up": torch.randn(n, rank), **residual}


def pack(given: dict[str, Tensor]) -> tuple[Tensor, str]:
    shape = given["up"].shape[0], given["down"].shape[1]
    return low_rank.pack(given, shape, {**SETTINGS, "rank": len(given["down"])})


# --- without a device ---------------------------------------------------------------------------------------------------


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual's own packing, on the host: its sums, then its rows in whole tiles."""

    def size(n: int, k: int) -> int:
        return -(-n // 128) * 128 * (4 + -(-k // 64) * 64)

    def there(parts: dict[str, Tensor], shape: tuple[int, int], settings: Any, *_: Any) -> tuple[Tensor, str]:
        values, (n, k), bits = parts["values"], shape, settings["activation_bits"]
        buffer = torch.zeros(size(n, k), dtype=torch.uint8)
        buffer[: n * k] = values.view(torch.uint8).flatten()
        form = f"tiles n={n} k={k} activation_bits={bits} bytes={len(buffer)}"
        return native.with_scale("int8_pack", buffer, parts["scale"], n), form

    def back(packed: Tensor, form: str) -> dict[str, Tensor]:
        of = int8.gemm_layout("test", form)
        native.check_vector("int8_unpack", "packed", packed, torch.uint8, of.size)
        values = packed[: of.n * of.k].view(torch.int8).view(of.n, of.k).clone()
        return {"values": values, "scale": native.scale_in(packed, of.bytes)}

    fake = replace(OPS["int8"], pack=there, unpack=back)
    monkeypatch.setitem(low_rank.OPS, "int8", fake)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("rank", [1, 15, 64, 65, 128])
@pytest.mark.parametrize(("n", "k"), [(130, 140), (200, 129), (1000, 256)])
def test_packing_loses_nothing(n: int, k: int, rank: int) -> None:
    given = parts(n, k, rank)
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x00000001, 0x00008000, 0x7F7F7FFF])
    given["down"][0, :5], given["up"][0, 0] = bits.to(torch.int32).view(torch.float32), -0.0
    packed, form = pack(given)
    of, found = ops.parse(form), low_rank.unpack(packed, form)
    assert (of.layout, of.n, of.k, of.rank, of.residual_name) == ("factors", n, k, rank, "int8")
    assert of.residual is not None
    assert (of.residual.n, of.residual.k, of.residual.activation_bits) == (n, k, 7)
    assert found.keys() == given.keys()
    for name, mine in given.items():
        assert mine.dtype == found[name].dtype
        assert torch.equal(mine.view(torch.uint8), found[name].view(torch.uint8)), name


@pytest.mark.usefixtures("host")
def test_each_part_is_packed_as_its_own_kernels_read_it() -> None:
    given = parts(130, 70, 17)
    packed, form = pack(given)
    at = ops.parse(form).bytes
    own = {name.removeprefix("residual_"): part for name, part in given.items() if name.startswith("residual_")}
    residual, beside = low_rank.OPS["int8"].pack(own, (130, 70), {"activation_bits": 7})
    assert form.endswith(f" + {beside}")
    assert at % 128 == 0
    assert torch.equal(packed[:at], low_rank.factors(given["down"], given["up"]))
    assert torch.equal(packed[at:], residual)


def test_the_size_of_the_residual_is_that_of_the_int8_kernels() -> None:
    module, why = native._load()
    if module is None:
        pytest.skip(f"the native module was not built: {why}")
    for n in (1, 127, 128, 129, 4096):
        for k in (1, 63, 64, 65, 4096):
            assert module.int8_packed_bytes(n, k) == -(-n // 128) * 128 * (4 + -(-k // 64) * 64)


@pytest.mark.usefixtures("host")
def test_a_packed_weight_of_another_size_is_refused() -> None:
    packed, form = pack(parts(130, 70, 17))
    for other in (packed[:-4], packed.float(), packed[::2], packed[None]):
        with pytest.raises(ValueError, match=r"expected a dense torch\.uint8 vector of"):
            low_rank.unpack(other, form)


@pytest.mark.usefixtures("host")
def test_what_packing_refuses() -> None:
    good = parts(140, 150, 16)
    down, up = good["down"], good["up"]
    with pytest.raises(ValueError, match="the rank is 129, expected 1 to 128 beside an int8 residual"):
        pack(parts(140, 150, 129))
    with pytest.raises(ValueError, match="holds NaN, Inf or a value that rounds to it"):
        pack({**good, "down": down * torch.inf})
    with pytest.raises(ValueError, match="no kernels for int8 factors"):
        pack({**good, "down": down.to(torch.int8), "up": up.to(torch.int8)})
    with pytest.raises(ValueError, match="the factors are 140x150, expected 140x151"):
        low_rank.pack(good, (140, 151), SETTINGS)
    with pytest.raises(ValueError, match="the residual is 'round', expected one of"):
        low_rank.pack(good, (140, 150), {"residual": {"method": "round"}})


@pytest.mark.usefixtures("host")
def test_kernels_for_cuda_name_the_devices() -> None:
    op = torch.ops.pycompress.low_rank_linear.default
    with pytest.raises(RuntimeError, match="on cpu, expected all of them on one CUDA device or on the CPU"):
        op.redispatch(DISPATCH, torch.randn(3, 16), *pack(parts(8, 16, 2)), None, "none")


def test_compilers_see_the_shapes() -> None:
    form = "factors n=8 k=16 rank=4 bits=32 activation_bits=0 bytes=49152 residual=int8"
    form += " + tiles n=8 k=16 activation_bits=8 bytes=8704"
    with FakeTensorMode():
        packed = torch.empty(49152 + 8704 + 32, dtype=torch.uint8, device="cuda")
        x = torch.empty(3, 16, dtype=torch.bfloat16, device="cuda")
        assert torch.ops.pycompress.low_rank_linear.default(x, packed, form, None, "none").shape == (3, 8)
        found = ops.unpack("low_rank", packed, form)
    shapes = {"down": (4, 16), "up": (8, 4), "residual_values": (8, 16), "residual_scale": (8,)}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes


def test_a_layer_that_cannot_be_packed_stays_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: LowRankLinear, *_: Any) -> Tensor:
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


def of_steps(count: float, parts: int) -> float:
    return 2.0**-23 * (17 * (count + 1) + parts + 8)


class Case:
    """A layer on the device and what is expected of it."""

    def __init__(self, n: int, k: int, rank: int, activation_bits: int = 8) -> None:
        self.layer = layer(n, k, rank, activation_bits)
        state = self.layer.state_dict()
        self.down, self.up, self.bias = (
            rounded(state["low_rank_down"]),
            rounded(state["low_rank_up"]),
            state["bias"].double(),
        )
        self.weight, self.weight_scale = state["low_rank_residual_int8_values"], state["low_rank_residual_int8_scale"]
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
    module, n, rank = native.native("tests"), 3, 1
    made = layer(n, k, rank, 7).cuda()
    begin = made.packed.data_ptr()
    residual = begin + ops.parse(made.form).bytes
    x = torch.randn(37, k, device="cuda")
    x[1], x[2] = 0, x[2] * 2**-20
    x[3, -1], x[4, 0], x[5, -1] = float("nan"), float("inf"), -float("inf")
    x = x.to(dtype)
    for m in (1, 16, 37):
        size = module.side_branch_workspace(n, k, rank, m)
        workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
        module.side_branch_quantize(
            0, native.stream_of(0), x.data_ptr(), ops.checks.FLOATS[dtype], m, k, n, k, rank, 7, begin, residual,
            workspace.data_ptr(),
        )  # fmt: skip
        rows, scale, zero_point = int8.rows(x[:m], k, 7)
        k_pad = -(-k // 64) * 64
        assert torch.equal(workspace[: m * k_pad], rows[: m * k_pad])
        for mine, expected in ((workspace[-8 * m : -4 * m], scale), (workspace[-4 * m :], zero_point)):
            assert torch.equal(mine, expected.view(torch.uint8))


@device
@pytest.mark.parametrize("dtype", HALVES)
def test_without_factors_it_has_the_bits_of_int8_linear(dtype: torch.dtype) -> None:
    made = layer(300, 712, 33)
    state = made.state_dict()
    state["low_rank_up"].zero_()
    made.load_state_dict(state)
    made.cuda()
    residual = {"values": state["low_rank_residual_int8_values"], "scale": state["low_rank_residual_int8_scale"]}
    packed = ops.pack("int8", residual, (300, 712), {"activation_bits": 8}, "cuda")
    for activation in ops.ACTIVATIONS:
        made.activation = activation
        for m in (1, 40, 300):
            x = torch.randn(m, 712, dtype=dtype, device="cuda")
            assert torch.equal(made(x), ops.int8_linear(x, *packed, made.bias, activation))


@device
def test_kernels_forced() -> None:
    arch, case = native.native("tests").compute_capability(0), Case(300, 1000, 70)
    for kernel in ops.cuda_kernels():
        if kernel["arch"] > arch or (kernel["arch"] == 90 and arch != 90):
            continue
        for dtype in HALVES:
            for m in (1, kernel["bm"] + 1):
                x = torch.randn(m, 1000, dtype=dtype, device="cuda")
                y = low_rank.linear(x, case.layer.packed, case.layer.form, case.layer.bias, "none", kernel["name"])
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
    check_a_graph_beside_another_stream(layer(64, 16384, 64).cuda(), 8, 16384, torch.bfloat16)


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
    made.load_state_dict(layer(70, 130, 20).state_dict())  # of another rank
    assert ops.parse(made.form).rank == 20


@device
def test_compile_export_opcheck_waiting_and_gradients() -> None:
    made, x = layer(96, 80, 20).cuda().eval(), torch.randn(5, 80, dtype=torch.bfloat16, device="cuda")
    expected = made(x)
    with torch.inference_mode():
        assert torch.equal(torch.compile(made, fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(made, (x,)).module()(x), expected)
    torch.library.opcheck(torch.ops.pycompress.low_rank_linear.default, (x, made.packed, made.form, made.bias, "silu"))
    with nothing_waits():
        made(x)
    made(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, made.weight.to(x).sum(0).expand(5, -1), rtol=0.1, atol=0.02)


@device
def test_errors_say_what_came() -> None:
    made = layer(96, 80, 20).cuda()
    with pytest.raises(TypeError, match=r"x is torch\.float32, expected bfloat16 or float16 on a CUDA device"):
        made(torch.randn(3, 80, device="cuda"))
    with pytest.raises(ValueError, match=r"x is \[3, 40\], the packed weight expects k = 80"):
        made(torch.randn(3, 40, dtype=torch.bfloat16, device="cuda"))
    with pytest.raises(RuntimeError, match="dense_pack: there are no kernels for cuda"):
        LowRankLinear.from_dense(nn.Linear(80, 96), LowRank(rank=20, residual=Dense(), rank_guard=False)).cuda()
    too_high = layer(200, 150, 129)
    with pytest.raises(ValueError, match="the rank is 129, expected 1 to 128 beside an int8 residual"):
        too_high.cuda()
    assert too_high.packed.is_cpu
    assert too_high.bias.is_cpu
