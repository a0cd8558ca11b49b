"""Sparse layers on a CUDA device: which packed form a weight takes, and what is refused; single weights under a bitmap against
float64 within the bound of ``csrc/sparse/cuda.h``. 2:4 and blocks: ``test_cuda_tiles.py``.

Also run under ``compute-sanitizer --tool memcheck`` and ``--tool racecheck``, with PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import pycompress as pc
from pycompress import ops
from pycompress.methods import Sparse, SparseWeight
from pycompress.nn import SparseConv2d, SparseLinear
from pycompress.ops import cuda, cuda_sparse

device = pytest.mark.skipif(ops.cuda_error() is not None, reason=f"no CUDA here: {ops.cuda_error()}")

HALVES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # and their unit roundoffs


@pytest.fixture(autouse=True)
def poison() -> None:
    """What the allocator hands out next holds NaN, not the zeros of fresh memory or the right results of the test before."""
    if ops.cuda_error() is not None:
        return
    torch.cuda.empty_cache()
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(4)]
        del blocks


def layer(n: int, k: int, density: float = 0.3, dtype: torch.dtype = torch.bfloat16) -> SparseLinear:
    """Made from a layer in dtype, so that all weights are its numbers."""
    return SparseLinear.from_dense(nn.Linear(k, n, dtype=dtype), Sparse(density))


def check(y: Tensor, x: Tensor, weight: SparseWeight, bias: Tensor) -> None:
    w, x64, bias64 = weight.decompress().double(), x.cpu().double(), bias.cpu().double()
    expected, magnitude = x64 @ w.T + bias64, x64.abs() @ w.abs().T
    relative = 2.0**-23 * (17 * (x.shape[-1] / 16 + 5) + 16 + 8 + 8)
    bound = relative * magnitude + (HALVES[x.dtype] + 2.0**-23) * (expected.abs() + bias64.abs()) + 2.0**-24
    assert ((y.cpu().double() - expected).abs() <= bound).all()


def moved(made: SparseLinear) -> tuple[SparseWeight, Tensor]:
    """Takes the layer to the device; what it was before."""
    weight, bias = made.canonical(), made.bias
    assert bias is not None
    made.cuda()
    return weight, bias


# --- which form: without a device ---------------------------------------------------------------------------------------


def mask_of(kept: Tensor) -> NDArray[np.uint8]:
    """uint8 [n, ceil(k / 8)] of bool [n, k]."""
    return np.packbits(kept.numpy(), axis=1, bitorder="little")


@pytest.mark.parametrize("block", [16, 32, 64])
def test_the_share_of_blocks_that_are_present(block: int) -> None:
    for n, k in [(1, 1), (block - 1, block + 1), (block, 2 * block), (2 * block + 3, 3 * block + 9)]:
        for density in (0.0, 0.002, 0.01, 1.0):
            kept = torch.rand(n, k) < density
            pieces = [kept[r : r + block, c : c + block].any() for r in range(0, n, block) for c in range(0, k, block)]
            assert cuda_sparse.share_of_blocks(mask_of(kept), block) == np.mean(pieces)


@pytest.mark.parametrize("place", [(0, 0), (0, 63), (63, 0), (63, 63)])
def test_a_weight_in_a_corner_makes_a_block_present(place: tuple[int, int]) -> None:
    kept = torch.zeros(128, 128, dtype=torch.bool)
    kept[64 + place[0], place[1]] = True
    assert cuda_sparse.share_of_blocks(mask_of(kept), 64) == 1 / 4


def test_two_of_four() -> None:
    for bits in range(256):
        byte = np.array([[bits]], np.uint8)
        assert cuda_sparse.is_two_of_four(byte) == all(
            f"{bits:08b}"[half : half + 4].count("1") <= 2 for half in (0, 4)
        )
    kept = torch.zeros(3, 21, dtype=torch.bool)
    kept[:, 2:6] = True  # four that follow each other, but no three in a group
    assert cuda_sparse.is_two_of_four(mask_of(kept))
    kept[2, 20] = kept[1, 18] = kept[1, 17] = kept[0, 7] = True
    assert not cuda_sparse.is_two_of_four(mask_of(kept))


@pytest.mark.parametrize(
    ("pattern", "density", "form"),
    [
        ("64x64", 0.5, "blocks64"),
        ("64x64", 0.1, "blocks64"),
        ("64x64", 13 / 25, "bitmap"),
        ("32x32", 0.4, "blocks32"),
        ("32x32", 0.41, "bitmap"),
        ("16x16", 0.35, "blocks16"),
        ("16x16", 0.3525, "bitmap"),
        ("2:4", None, "structured"),
        ("4:8", None, "bitmap"),
        ("unstructured", 0.0, "blocks64"),
        ("unstructured", 0.1, "bitmap"),
        ("unstructured", 1.0, "bitmap"),
    ],
)
def test_the_form_of_a_pattern(pattern: str, density: float | None, form: str) -> None:
    """Up to the limits, and one block above them."""
    mask = Sparse(density, pattern).compress(torch.randn(320, 320)).mask.numpy()
    assert cuda_sparse.chosen_format(mask, int8=False) == form
    if form != "bitmap":
        assert cuda_sparse.chosen_format(mask, int8=True) == form
        return
    with pytest.raises(
        ValueError, match=r"of the blocks .* % of 64x64, .* % of 32x32, .* % of 16x16 are present; expected"
    ):
        cuda_sparse.chosen_format(mask, int8=True)


def test_what_packing_refuses() -> None:
    int8 = Sparse(0.3, bits=8).compress(torch.randn(64, 70))
    half = Sparse(0.3).compress(torch.randn(64, 70).bfloat16())
    device = torch.device("cuda:0")
    for weight, bits, form, message in (
        (int8, 7, "", "expected on a CUDA device the pattern 2:4, or of the blocks at most 50 %, 40 %, 35 %"),
        (int8, 0, "", r"activation_bits is 0, expected 7 or 8 for torch\.int8"),
        (half, 8, "", r"activation_bits is 8, expected 0 for torch\.float32"),
        (int8, 7, "bitmap", r"values is torch\.int8, expected float32 for the format bitmap"),
        (half, 0, "rows", "format is 'rows', expected one of bitmap, structured, blocks64, blocks32, blocks16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            cuda_sparse.pack(weight.mask, weight.values, 70, bits, form, device)
    with pytest.raises(ValueError, match=rf"there are {half.nnz - 1} values, the mask has {half.nnz} bits set"):
        cuda_sparse.pack(half.mask, half.values[1:], 70, 0, "", device)
    with pytest.raises(ValueError, match=r"mask is \[0, 9\], expected \[n > 0"):
        cuda_sparse.pack(half.mask[:0], half.values[:0], 70, 0, "", device)


@pytest.mark.parametrize("form", ops.CUDA_SPARSE_FORMATS)
def test_what_a_compiler_sees_of_packing(form: str) -> None:
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env):
        mask, values = torch.empty(64, 9, dtype=torch.uint8, device="cuda"), torch.empty(100, device="cuda")
        packed = ops.sparse_pack(mask, values, 70, 0, form)
        assert (packed.dtype, packed.device.type, packed.shape[-2]) == (torch.uint8, "cuda", 70)
        assert packed.dim() == {"bitmap": 2, "structured": 3}.get(form, 4)
        with pytest.raises(NotImplementedError, match="format is '' on a CUDA device, where it depends on the mask"):
            ops.sparse_pack(mask, values, 70)


def test_the_form_stands_in_the_shape() -> None:
    forms = {cuda_sparse.format_of(torch.empty(shape, device="meta")) for shape in ((8, 3), (1, 8, 4))}
    assert forms == {"bitmap", "structured"}
    blocks = [cuda_sparse.format_of(torch.empty(1, 1, 8, 32 + code, device="meta")) for code in range(11)]
    assert blocks == [f"blocks{size}" for size in (64, 64, 64, 64, 32, 32, 32, 32, 16, 16, 16)]
    with pytest.raises(ValueError, match=r"\[1, 1, 8, 44\] is none that sparse_pack returns"):
        cuda_sparse.format_of(torch.empty(1, 1, 8, 44, device="meta"))


# --- what holds the values: without a device -----------------------------------------------------------------------------


def packed_with(monkeypatch: pytest.MonkeyPatch, values: Tensor) -> tuple[Tensor, torch.dtype]:
    """A bitmap of a weight [1, 8] with these values, its native part replaced, and their type."""
    seen: list[Any] = []

    def sparse_pack(*operands: int) -> bytes:
        seen.append(operands)
        return bytes(range(16))

    monkeypatch.setattr(cuda, "native", lambda *_: SimpleNamespace(sparse_pack=sparse_pack))
    mask = torch.tensor([[(1 << values.numel()) - 1]], dtype=torch.uint8)
    packed = cuda_sparse.pack(mask, values, 8, 0, "bitmap", mask.device)
    count, kind, n, k = seen[0][2:]
    assert (count, n, k) == (values.numel(), 1, 8)
    return packed, {code: dtype for dtype, code in ops.native.FLOATS.items()}[kind]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, -2.5], torch.bfloat16),  # both types have them
        ([2.0**100, -1.5], torch.bfloat16),  # above the largest float16
        ([2.0**-30], torch.bfloat16),  # below the smallest
        ([1.0 + 2.0**-10, -1.0], torch.float16),
        ([2.0**-24, 1.0 + 2.0**-9], torch.float16),  # a subnormal one
        ([], torch.bfloat16),
    ],
)
def test_the_type_is_one_that_has_all_values(
    monkeypatch: pytest.MonkeyPatch, values: list[float], dtype: torch.dtype
) -> None:
    packed, found = packed_with(monkeypatch, torch.tensor(values))
    assert found is dtype
    assert packed.shape == (8, 2)
    assert packed.flatten().tolist() == list(range(16))


@pytest.mark.parametrize("values", [[0.1], [1.0, 1.0 + 2.0**-11], [2.0**100, 1.0 + 2.0**-9], [2.0**-140]])
def test_values_that_would_be_rounded_are_refused(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """The last are too exact for one of the types each, or a subnormal float32 (2^-140), which neither has."""
    with pytest.raises(ValueError, match="expected bfloat16 or float16 numbers on a CUDA device, where nothing is"):
        packed_with(monkeypatch, torch.tensor(values))


def test_kernels_for_cuda_name_the_devices() -> None:
    """What torch calls for tensors on CUDA, called with the tensors at hand (a machine without CUDA has no others)."""
    made, keys = layer(8, 16), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    mask, values = (made.state_dict()[name] for name in ("weight_mask", "weight_values"))
    for op, operands in {
        torch.ops.pycompress.sparse_linear.default: (torch.randn(3, 16), made.packed, 8, None, made.bias, "none"),
        torch.ops.pycompress.sparse_pack.default: (mask, values, 16, 0, ""),
    }.items():
        with pytest.raises(RuntimeError, match="on cpu, expected all of them on one CUDA device or on the CPU"):
            op.redispatch(keys, *operands)


def test_which_layers_are_packed_anew() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert layer(8, 16)._packs_anew(cpu, gpu)
    assert not SparseConv2d.from_dense(nn.Conv2d(2, 4, 3))._packs_anew(cpu, gpu)


def test_the_kernels_are_listed_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module, why = cuda._load()
    if module is None:
        pytest.skip(f"it was not built: {why}")
    monkeypatch.setattr(cuda, "native", lambda _: module)  # packing runs on the host
    assert {row["type"] for row in module.sparse_kernels()} == {ops.native.FLOATS[dtype] for dtype in HALVES}
    made = layer(64, 128)
    weight = made.canonical()
    packed = cuda_sparse.pack(weight.mask, weight.values, 128, 0, "bitmap", weight.mask.device)
    name, splits = module.sparse_chosen_kernel(packed.numel(), 64, 128, 8, 132)
    assert name.startswith("sparse_bf16")
    assert 1 <= splits <= 2


# --- with one -----------------------------------------------------------------------------------------------------------


@device
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("density", [0.02, 0.3, 0.6, 1.0])
def test_every_number_of_rows(density: float, dtype: torch.dtype) -> None:
    made = layer(200, 712, density, dtype)
    weight, bias = moved(made)
    for m in (*range(1, 35), 64, 65, 130):
        x = torch.randn(m, 712, dtype=dtype, device="cuda")
        check(made(x), x, weight, bias)


@device
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 33), (33, 64), (65, 65), (4096, 1000), (64, 16384), (1000, 4099)])
def test_shapes(n: int, k: int) -> None:
    made = layer(n, k)
    weight, bias = moved(made)
    for m in (1, 17):
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        check(made(x), x, weight, bias)
        spread = torch.full((m, k + 3), torch.nan, dtype=torch.bfloat16, device="cuda")
        spread[:, :k] = x
        assert torch.equal(made(spread[:, :k]), made(x))
    assert made(torch.empty(0, k, dtype=torch.bfloat16, device="cuda")).shape == (0, n)


@device
def test_no_weights_at_all() -> None:
    made = layer(40, 70, 0.0)
    _, bias = moved(made)
    y = made(torch.randn(5, 70, dtype=torch.bfloat16, device="cuda"))
    assert torch.equal(y.cpu(), bias.to(torch.bfloat16).expand(5, 40))


@device
def test_the_same_bits_at_every_call() -> None:
    made, x = layer(256, 16384).cuda(), torch.randn(16, 16384, dtype=torch.bfloat16, device="cuda")
    expected = made(x)
    for _ in range(20):
        assert torch.equal(made(x), expected)


@device
def test_activations() -> None:
    made = layer(96, 80, 0.5, torch.float16).cuda()
    x = torch.randn(5, 80, dtype=torch.float16, device="cuda")
    plain = made(x).float()
    for name, activation in {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}.items():
        made.activation = name
        torch.testing.assert_close(made(x).float(), activation(plain), rtol=2e-3, atol=2e-3)


@device
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "k", "density"), [(70, 130, 0.4), (1, 1, 1.0), (33, 65, 0.0), (64, 71, 1.0)])
def test_there_and_back(n: int, k: int, density: float, dtype: torch.dtype, tmp_path: Path) -> None:
    made = layer(n, k, density, dtype)
    state, packed = made.state_dict(), made.packed
    made.to("cuda", torch.bfloat16)  # what is meant for activations does not touch the weight
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor.cpu(), state[name]), name
    pc.save(nn.Sequential(made), tmp_path / "cuda.safetensors")
    loaded = pc.load(nn.Sequential(nn.Linear(k, n)), tmp_path / "cuda.safetensors")[0]
    assert torch.equal(loaded.packed, packed)
    assert torch.equal(copy.deepcopy(made).cpu().packed, packed)
    assert torch.equal(pickle.load(io.BytesIO(pickle.dumps(made))).cpu().packed, packed)
    fresh = layer(n, k, density, dtype).cuda()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.packed, made.packed)


@device
def test_dense_and_gradient() -> None:
    made, x = layer(70, 130), torch.randn(3, 130, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    dense = made.weight
    made.cuda()
    assert torch.equal(ops.sparse_dense(made.packed, (70, 130, 32)).cpu(), dense)
    assert torch.equal(made.weight, dense)
    made(x).sum().backward()
    expected = torch.ones(3, 70, dtype=torch.bfloat16, device="cuda") @ dense.cuda().to(torch.bfloat16)
    assert torch.equal(x.grad, expected)  # type: ignore[arg-type]


@device
def test_not_finite_rows_stay_apart() -> None:
    made, x = layer(96, 80).cuda(), torch.randn(4, 80, dtype=torch.bfloat16, device="cuda")
    expected = made(x)
    x[1, 79], x[2, 0] = torch.inf, torch.nan
    y = made(x)
    assert not y[1].isfinite().any()
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 3]], expected[[0, 3]])


@device
def test_a_cuda_graph_beside_another_stream() -> None:
    """Sums over parts of k that several blocks share must not meet those of the same layer elsewhere."""
    made, there = layer(64, 16384).cuda(), torch.zeros(8, 16384, dtype=torch.bfloat16, device="cuda")
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
def test_compile_export_opcheck_and_waiting() -> None:
    made, x = layer(96, 80).cuda().eval(), torch.randn(5, 80, dtype=torch.bfloat16, device="cuda")
    expected = made(x)
    with torch.inference_mode():
        assert torch.equal(torch.compile(made, fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(made, (x,)).module()(x), expected)
    torch.library.opcheck(torch.ops.pycompress.sparse_linear.default, (x, made.packed, 96, None, made.bias, "silu"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        made(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@device
def test_errors_say_what_came() -> None:
    made = layer(96, 80).cuda()
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(TypeError, match=rf"x is {dtype}, expected torch\.bfloat16 as the values"):
            made(torch.randn(3, 80, dtype=dtype, device="cuda"))
    with pytest.raises(ValueError, match=r"packed is torch\.uint8 \[80, .*expected for k = 40"):
        made(torch.randn(3, 40, dtype=torch.bfloat16, device="cuda"))
    with pytest.raises(ValueError, match="no packed weight 5000x80 has"):
        ops.sparse_linear(torch.randn(3, 80, dtype=torch.bfloat16, device="cuda"), made.packed, 5000)
    with pytest.raises(ValueError, match="expected bfloat16 or float16 numbers on a CUDA device"):
        layer(96, 80, dtype=torch.float32).cuda()
    with pytest.raises(
        ValueError, match="more than two non-zeros in four consecutive input features, and of the blocks 100 %"
    ):
        SparseLinear.from_dense(nn.Linear(80, 96), Sparse(0.3, bits=8)).cuda()
    conv = SparseConv2d.from_dense(nn.Conv2d(2, 4, 3)).cuda()
    with pytest.raises(RuntimeError, match="this layer has CPU kernels only"):
        conv(torch.randn(1, 2, 8, 8, device="cuda"))


@device
def test_kernels_forced() -> None:
    module, (n, k) = cuda.native("tests"), (100, 1000)
    for dtype in HALVES:
        made, kind = layer(n, k, dtype=dtype), ops.native.FLOATS[dtype]
        weight, _ = moved(made)
        for row in (row for row in module.sparse_kernels() if row["type"] == kind):
            for splits in (1, 2, 5):
                m, packed_bytes = row["rows"], made.packed.numel()
                x = torch.randn(m, k, dtype=dtype, device="cuda")
                y = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
                size = module.sparse_workspace(0, packed_bytes, n, k, m, row["name"], splits)
                workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
                module.sparse_linear(
                    0, cuda.stream_of(0), x.data_ptr(), kind, m, k, k, made.packed.data_ptr(), packed_bytes, n, 0, 0,
                    y.data_ptr(), workspace.data_ptr(), row["name"], splits,
                )  # fmt: skip
                check(y, x, weight, torch.zeros(n))
