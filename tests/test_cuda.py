"""The int8 ops and layers on a CUDA device: the same integers as int64, the same bits as the CPU's.

Also run under ``compute-sanitizer --tool memcheck`` and ``--tool racecheck``, with PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_cuda import nothing_waits, poison  # noqa: F401
from torch import Tensor, nn

import pycompress as pc
from pycompress import ops
from pycompress.nn import Int8Linear
from pycompress.ops.cuda import int8, native
from pycompress.ops.int8_fused import BEFORE

pytestmark = pytest.mark.skipif(ops.cuda_error() is not None, reason=f"no CUDA here: {ops.cuda_error()}")

KERNELS = ops.cuda_kernels()
ARCH = 0 if ops.cuda_error() is not None else native.native("tests").compute_capability(0)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def edges(tile: int) -> list[int]:
    return sorted({1, tile - 1, tile, tile + 1, 2 * tile + 3})


def pack(w: Tensor, scale: Tensor | None = None, bits: int = 8) -> tuple[Tensor, str]:
    """On the weight's device; scales of one where none are given."""
    scale = torch.ones(w.shape[0], device=w.device) if scale is None else scale
    return ops.pack("int8", {"values": w, "scale": scale}, tuple(w.shape), {"activation_bits": bits}, w.device)


def activations(kind: str, m: int, k: int, rng: np.random.Generator) -> Tensor:
    if kind == "extreme":
        return torch.from_numpy(rng.choice(np.array([-1, 1], np.float32), (m, k)))
    if kind == "runs":
        return torch.ones(m, k)
    return torch.from_numpy(rng.standard_normal((m, k)).astype(np.float32))


def weights(kind: str, n: int, k: int, rng: np.random.Generator) -> Tensor:
    if kind == "uniform":
        return torch.from_numpy(rng.integers(-127, 128, (n, k)).astype(np.int8))
    return torch.from_numpy(rng.choice(np.array([-127, 127] if kind == "extreme" else [127], np.int8), (n, k)))


def check_sums(kernel: str, m: int, n: int, k: int, kind: str = "uniform", bits: int = 8) -> None:
    rng = np.random.default_rng([m, n, k, bits])
    w, x = weights(kind, n, k, rng), activations(kind, m, k, rng)
    q, scale, zero_point = ops.int8_quantize(x, bits)
    centred = q.numpy().astype(np.int64) - zero_point.numpy().astype(np.int64)[:, None]
    acc, own_scale, own_zero_point = int8.accumulate(x.cuda(), *pack(w.cuda(), bits=bits), kernel)
    # float64 products of integers below 2^53 are exact, and fast
    expected = centred.astype(np.float64) @ w.numpy().astype(np.float64).T
    np.testing.assert_array_equal(
        acc.cpu().numpy(), expected.astype(np.int64), err_msg=f"{kernel=} {m=} {n=} {k=} {kind=}"
    )
    assert torch.equal(own_scale.cpu(), scale)
    assert torch.equal(own_zero_point.cpu(), zero_point)


def runs_here(kernel: dict[str, Any]) -> bool:
    return bool(kernel["arch"] == ARCH if kernel["arch"] == 90 else kernel["arch"] <= ARCH)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel["name"])
def test_sums_are_exact_at_the_tile_edges(kernel: dict[str, Any]) -> None:
    if not runs_here(kernel):
        with pytest.raises(ValueError, match="needs compute capability"):
            check_sums(kernel["name"], 1, 1, 1)
        return
    for m in edges(kernel["bm"]):
        for n in edges(kernel["bn"]):
            for k in (*edges(kernel["bk"]), kernel["bk"] * (2 * kernel["stages"] + 1) + 7):
                check_sums(kernel["name"], m, n, k)
    for kind in ("extreme", "runs"):
        for k in (4096, 16384, 65536):
            check_sums(kernel["name"], 33, 70, k, kind)
    check_sums(kernel["name"], 1025, 777, 519, bits=7)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 5, 8, 63, 64, 65, 1000, 1024, 4096, 4100, 16384, 16388, 65536])
def test_the_quantizer_has_the_bits_of_the_cpu(dtype: torch.dtype, k: int) -> None:
    x = torch.randn(9, k)
    x[1], x[2] = 0, x[2] * 2**-110
    x[3, -1], x[4, 0], x[5, -1] = float("nan"), float("inf"), -float("inf")
    x[6] = torch.randint(-127, 128, (k,)) * 0.5
    x = x.to(dtype)
    for bits in (7, 8):
        for part in (x, x[:, : max(k - 1, 1)], x.flip(0)):  # the second one is not aligned and not dense
            ours, expected = ops.int8_quantize(part.cuda(), bits), ops.int8_quantize(part, bits)
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_has_the_bits_of_the_cpu(dtype: torch.dtype, activation: str) -> None:
    for m, n, k in ((1, 1, 1), (5, 7, 9), (16, 64, 128), (130, 260, 300), (257, 384, 1536)):
        w, scale, bias = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) * 1e-2, torch.randn(n)
        x = torch.randn(m, k).to(dtype)
        x[0, -1] = float("nan") if m > 1 else 1.0
        for own_bias in (bias, None):
            expected = ops.int8_linear(x, *pack(w, scale), own_bias, activation)
            on_device = None if own_bias is None else own_bias.cuda()
            y = ops.int8_linear(x.cuda(), *pack(w.cuda(), scale), on_device, activation)
            assert y.dtype == dtype
            torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_shapes_and_strides() -> None:
    w, scale = torch.randint(-127, 128, (12, 20), dtype=torch.int8), torch.rand(12)
    packed, on_device = pack(w, scale), pack(w.cuda(), scale)
    base = torch.randn(6, 4, 40)
    for x in (base[..., :20], base[..., ::2], base[0, 0, :20], base[:0, :, :20], base.transpose(0, 1)[..., 3:23]):
        y = ops.int8_linear(x.cuda(), *on_device)
        assert y.shape == (*x.shape[:-1], 12)
        assert y.is_contiguous()
        torch.testing.assert_close(y.cpu(), ops.int8_linear(x, *packed), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("before", BEFORE)
def test_what_stands_in_front_of_a_layer(before: str, dtype: torch.dtype) -> None:
    """As on the CPU up to a step of the quantizer: torch's norms and activations round in another order there."""
    for k in (20, 300, 4096, 40000):
        x, gate = torch.randn(4, k).to(dtype), torch.randn(4, k).to(dtype)
        vectors = [torch.randn(k).to(dtype) for _ in range(2)]
        operands = {"gate": gate} if before.endswith("gate") else {"weight": vectors[0]}
        if before == "layer_norm":
            operands["shift"] = vectors[1]
        w, scale = torch.randint(-127, 128, (24, k), dtype=torch.int8), torch.full((24,), 1 / 127 / k**0.5)
        expected = ops.int8_fused_linear(x, before, *pack(w, scale), **operands)  # type: ignore[arg-type]
        there = {name: tensor.cuda() for name, tensor in operands.items()}
        y = ops.int8_fused_linear(x.cuda(), before, *pack(w.cuda(), scale), **there)  # type: ignore[arg-type]
        assert y.dtype == dtype
        error = torch.linalg.norm((y.cpu() - expected).double()) / torch.linalg.norm(expected.double())
        assert error < (0.02 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("shape", [(1, 1), (127, 63), (128, 64), (129, 65), (300, 1000)])
def test_packing_there_and_back(shape: tuple[int, int]) -> None:
    w = torch.randint(-127, 128, shape, dtype=torch.int8)
    scale = torch.rand(shape[0])
    packed, form = pack(w.cuda(), scale, 7)
    parts = ops.unpack("int8", packed, form)
    assert torch.equal(parts["values"].cpu(), w)
    assert torch.equal(parts["scale"].cpu(), scale)
    of = ops.parse(form)
    assert (of.n, of.k, of.activation_bits) == (*shape, 7)
    assert packed.shape == (of.bytes + 4 * of.n,)
    assert torch.equal(ops.dense("int8", packed, form).cpu(), w * scale[:, None])


def test_errors_say_what_came() -> None:
    w, x = torch.randint(-127, 128, (12, 20), dtype=torch.int8).cuda(), torch.randn(3, 20, device="cuda")
    packed, form = pack(w)
    with pytest.raises(ValueError, match=r"x is \[3, 19\], the packed weight expects k = 20"):
        ops.int8_linear(x[:, :19], packed, form)
    with pytest.raises(ValueError, match=r"packed is torch\.uint8 .*, expected a dense torch\.uint8 vector of"):
        ops.int8_linear(x, packed[:-4], form)
    with pytest.raises(ValueError, match=r"a packed weight 12x100 has .* bytes, this one"):
        ops.int8_linear(torch.randn(3, 100, device="cuda"), packed, form.replace("k=20", "k=100"))
    with pytest.raises(ValueError, match="a weight is -128"):
        pack(torch.full((3, 3), -128, dtype=torch.int8, device="cuda"))
    with pytest.raises(ValueError, match="activation_bits is 9"):
        pack(w, bits=9)
    with pytest.raises(ValueError, match="no int8 kernel for CUDA is named 'fast'"):
        int8.linear(x, packed, form, None, "none", kernel="fast")
    with pytest.raises(TypeError, match="float64"):
        ops.int8_linear(x.double(), packed, form)
    with pytest.raises(ValueError, match="bias"):
        ops.int8_linear(x, packed, form, torch.ones(11, device="cuda"))
    with pytest.raises(ValueError, match=r"expected a dense torch\.uint8 vector of"):
        ops.unpack("int8", torch.zeros(100, dtype=torch.uint8, device="cuda"), form)


# --- layers -------------------------------------------------------------------------------------------------------------


def layer(n: int = 96, k: int = 80, activation: str = "gelu") -> Int8Linear:
    return Int8Linear.from_dense(nn.Linear(k, n), activation=activation)


def test_a_layer_there_and_back() -> None:
    made, x = layer(), torch.randn(5, 80)
    expected, state, packed = made(x), made.state_dict(), made.packed
    moved = made.cuda()
    assert moved is made
    assert {name: tensor.device.type for name, tensor in made.named_buffers()} == dict.fromkeys(
        ("bias", "packed"), "cuda"
    )
    assert torch.equal(made(x.cuda()).cpu(), expected)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor.cpu(), state[name])
    made.to(torch.float16)
    assert made.canonical().scale.dtype == torch.float32
    assert torch.equal(made.cpu().packed, packed)
    assert torch.equal(made(x), expected)


def test_state_of_a_layer_on_a_device() -> None:
    made, x = layer(), torch.randn(5, 80)
    expected = made(x)
    made.cuda()
    assert torch.equal(copy.deepcopy(made)(x.cuda()).cpu(), expected)
    assert torch.equal(pickle.loads(pickle.dumps(made))(x.cuda()).cpu(), expected)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, map_location="cpu", weights_only=False)(x), expected)
    other = layer().cuda()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x.cuda()).cpu(), expected)
    fresh = layer()
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(x), expected)


def test_saved_on_one_device_and_loaded_on_the_other(tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Linear(80, 96), nn.ReLU(), nn.Linear(96, 16)).eval()
    model, x = pc.compress(copy.deepcopy(dense), pc.Int8()), torch.randn(5, 80)
    expected = model(x)
    pc.save(model.cuda(), tmp_path / "cuda.safetensors")
    loaded = pc.load(copy.deepcopy(dense), tmp_path / "cuda.safetensors")
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded.cuda()(x.cuda()).cpu(), expected)


def test_tensors_on_several_devices() -> None:
    made, x = layer(), torch.randn(5, 80)
    with pytest.raises(RuntimeError, match="on cpu, cuda:0, expected all of them on one CUDA device or on the CPU"):
        made(x.cuda())
    with pytest.raises(ValueError, match="on cuda:0, expected a dense torch\\.uint8 vector on the CPU"):
        made.cuda()(x)


def test_gradient_of_the_input() -> None:
    made = layer(activation="relu")
    x = torch.randn(5, 80, requires_grad=True)
    made(x).sum().backward()
    there = x.detach().cuda().requires_grad_()
    made.cuda()(there).sum().backward()
    torch.testing.assert_close(there.grad.cpu(), x.grad)  # type: ignore[union-attr]


def test_layers_without_cuda_kernels_say_so() -> None:
    sparse = pc.compress(nn.Sequential(nn.Linear(64, 64)), pc.Sparse(density=0.2)).cuda()
    with pytest.raises(RuntimeError, match="this layer has CPU kernels only"):
        sparse(torch.randn(3, 64, device="cuda"))


# --- streams, graphs, compilers -----------------------------------------------------------------------------------------


def test_the_current_stream_is_used() -> None:
    made, x = layer(256, 1024, "none"), torch.randn(64, 1024)
    expected = made(x)
    made, there = made.cuda(), torch.zeros(64, 1024, device="cuda")
    source, stream = x.cuda(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # x comes late: on another stream the zeros would be read
        there.copy_(source)
        y = made(there)
    stream.synchronize()
    assert torch.equal(y.cpu(), expected)


def test_a_cuda_graph() -> None:
    made, xs = layer(256, 1024), torch.randn(3, 64, 1024)
    expected = [made(x) for x in xs]
    made, there = made.cuda(), torch.zeros(64, 1024, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        made(there)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(there)
    for x, right in zip(xs, expected, strict=True):
        there.copy_(x)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y.cpu(), right)


def test_nothing_waits() -> None:
    made, x = layer().cuda(), torch.randn(5, 80, device="cuda")
    made(x)
    with nothing_waits():
        made(x)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode: str) -> None:
    model = nn.Sequential(layer(64, 80), nn.LayerNorm(64), layer(32, 64)).eval().cuda()
    x = torch.randn(5, 80, device="cuda")
    with torch.inference_mode():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), expected)


def test_export() -> None:
    made, x = layer().cuda().eval(), torch.randn(5, 80, device="cuda")
    program = torch.export.export(made, (x,))
    assert torch.equal(program.module()(x), made(x))


def test_opcheck() -> None:
    made, x = layer().cuda(), torch.randn(5, 80, device="cuda")
    torch.library.opcheck(torch.ops.pycompress.int8_linear.default, (x, made.packed, made.form, made.bias, "silu"))


def test_inference_mode_autocast_and_vmap() -> None:
    made, x = layer().cuda(), torch.randn(3, 5, 80, device="cuda")
    expected = made(x)
    with torch.inference_mode():
        assert torch.equal(made(x), expected)
    with torch.autocast("cuda", torch.bfloat16):
        assert made(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(torch.vmap(made)(x), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device() -> None:
    made, x = layer(), torch.randn(5, 80)
    expected = made(x)
    made.to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(made(x.to("cuda:1")).cpu(), expected)
    assert torch.equal(made.to("cuda:0")(x.to("cuda:0")).cpu(), expected)
    with pytest.raises(RuntimeError, match="on cuda:0, cuda:1"):
        made(x.to("cuda:1"))


Same = Callable[[Tensor, Tensor], bool]


def test_the_same_bits_every_time(same: Same) -> None:
    made, x = layer(300, 2000), torch.randn(700, 2000, device="cuda", dtype=torch.bfloat16)
    made.cuda()
    first = made(x)
    assert all(same(made(x).cpu(), first.cpu()) for _ in range(5))
