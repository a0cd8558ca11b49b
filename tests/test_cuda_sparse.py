"""Sparse layers on a CUDA device: which packed form a weight takes, and what is refused; single weights under a bitmap against
float64 within the bound of ``csrc/sparse/bitmap/cuda.h``. 2:4 and blocks: ``test_cuda_tiles.py``.

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
from on_cuda import DISPATCH, HALVES, check_a_graph_beside_another_stream, device, nothing_waits, poison  # noqa: F401
from torch import Tensor, nn

import pycompress as pc
from pycompress import ops
from pycompress.methods import Sparse
from pycompress.nn import SparseConv2d, SparseLinear
from pycompress.ops.cuda import bitmap, native, sparse
from pycompress.ops.cuda.sparse_layout import layout as layout_of
from pycompress.weights import SparseWeight


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
            assert sparse.share_of_blocks(mask_of(kept), block) == np.mean(pieces)


@pytest.mark.parametrize("place", [(0, 0), (0, 63), (63, 0), (63, 63)])
def test_a_weight_in_a_corner_makes_a_block_present(place: tuple[int, int]) -> None:
    kept = torch.zeros(128, 128, dtype=torch.bool)
    kept[64 + place[0], place[1]] = True
    assert sparse.share_of_blocks(mask_of(kept), 64) == 1 / 4


def test_two_of_four() -> None:
    for bits in range(256):
        byte = np.array([[bits]], np.uint8)
        assert sparse.is_two_of_four(byte) == all(f"{bits:08b}"[half : half + 4].count("1") <= 2 for half in (0, 4))
    kept = torch.zeros(3, 21, dtype=torch.bool)
    kept[:, 2:6] = True  # four that follow each other, but no three in a group
    assert sparse.is_two_of_four(mask_of(kept))
    kept[2, 20] = kept[1, 18] = kept[1, 17] = kept[0, 7] = True
    assert not sparse.is_two_of_four(mask_of(kept))


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
    assert sparse.chosen_format(mask, int8=False) == form
    if form != "bitmap":
        assert sparse.chosen_format(mask, int8=True) == form
        return
    with pytest.raises(
        ValueError, match=r"of the blocks .* % of 64x64, .* % of 32x32, .* % of 16x16 are present; expected"
    ):
        sparse.chosen_format(mask, int8=True)


def pack(weight: SparseWeight, layout: str = "", bits: int | None = None, **changed: Tensor) -> tuple[Tensor, str]:
    parts = {"mask": weight.mask, "values": weight.values} | ({} if weight.scale is None else {"scale": weight.scale})
    settings = {
        "bits": 8 if weight.scale is not None else 32,
        "activation_bits": weight.activation_bits if bits is None else bits,
    }
    return sparse.pack({**parts, **changed}, weight.shape, settings, layout)


def test_what_packing_refuses() -> None:
    int8 = Sparse(0.3, bits=8).compress(torch.randn(64, 70))
    half = Sparse(0.3).compress(torch.randn(64, 70).bfloat16())
    for weight, bits, form, message in (
        (int8, 7, "", "expected on a CUDA device the pattern 2:4, or of the blocks at most 50 %, 40 %, 35 %"),
        (int8, 0, "", r"activation_bits is 0, expected 7 or 8 for torch\.int8"),
        (half, 8, "", r"activation_bits is 8, expected 0 for torch\.float32"),
        (int8, 7, "bitmap", r"values is torch\.int8, expected float32 for the layout bitmap"),
        (half, 0, "rows", "layout is 'rows', expected one of bitmap, structured, blocks64, blocks32, blocks16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pack(weight, form, bits)
    with pytest.raises(ValueError, match=rf"there are {half.nnz - 1} values, the mask has {half.nnz} bits set"):
        pack(half, values=half.values[1:])
    with pytest.raises(ValueError, match=r"mask is torch\.uint8 \[0, 9\], expected uint8 \[64, 9\] for k = 70"):
        pack(half, mask=half.mask[:0])


KEYS = "n=5 k=8 nnz=9 bits=32 activation_bits=0 element=bfloat16 bytes=512"


def test_the_form_says_what_the_kernels_are_told() -> None:
    assert layout_of(f"bitmap {KEYS} unit_bytes=368")[::7] == ("bitmap", (5, 8, 0, 512, 368))
    assert layout_of(f"structured {KEYS}")[::7] == ("structured", (5, 8, 0))
    for block in (64, 32, 16):
        of = layout_of(f"blocks{block} {KEYS} block={block} stored=3")
        assert of[::7] == ("blocks", (5, 8, 0, block, 3))
        assert (of.element, of.nnz, of.size) == (torch.bfloat16, 9, 512)
    of = layout_of("structured n=5 k=8 nnz=9 bits=8 activation_bits=7 element=int8 bytes=512")
    assert (of.shape, of.activation_bits, of.size) == ((5, 8, 2), 7, 512 + 4 * 5)


# --- what holds the values: without a device -----------------------------------------------------------------------------


def packed_with(monkeypatch: pytest.MonkeyPatch, values: Tensor) -> tuple[Tensor, torch.dtype]:
    """A bitmap of a weight [1, 8] with these values, its native part replaced, and their type."""
    seen: list[Any] = []

    def bitmap_pack(*operands: int) -> tuple[bytes, int]:
        seen.append(operands)
        return bytes(range(16)), 352

    monkeypatch.setattr(bitmap, "native", lambda *_: SimpleNamespace(bitmap_pack=bitmap_pack))
    mask = torch.tensor([[(1 << values.numel()) - 1]], dtype=torch.uint8)
    packed, form = sparse.pack({"mask": mask, "values": values}, (1, 8), {"bits": 32}, "bitmap")
    count, element, n, k = seen[0][2:]
    assert (count, n, k) == (values.numel(), 1, 8)
    of = layout_of(form)
    assert of.shape == (1, 8, element, 16, 352)
    return packed, of.element


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
    assert packed.tolist() == list(range(16))


@pytest.mark.parametrize("values", [[0.1], [1.0, 1.0 + 2.0**-11], [2.0**100, 1.0 + 2.0**-9], [2.0**-140]])
def test_values_that_would_be_rounded_are_refused(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """The last are too exact for one of the types each, or a subnormal float32 (2^-140), which neither has."""
    with pytest.raises(ValueError, match="expected bfloat16 or float16 numbers on a CUDA device, where nothing is"):
        packed_with(monkeypatch, torch.tensor(values))


def test_kernels_for_cuda_name_the_devices() -> None:
    """What torch calls for tensors on CUDA, called with the tensors at hand (a machine without CUDA has no others)."""
    form = f"bitmap {KEYS} unit_bytes=368"
    with pytest.raises(RuntimeError, match="on cpu, expected all of them on one CUDA device or on the CPU"):
        torch.ops.pycompress.sparse_linear.default.redispatch(
            DISPATCH, torch.randn(3, 8), torch.zeros(512, dtype=torch.uint8), form, None, "none"
        )


def test_which_layers_are_packed_anew() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert layer(8, 16)._packs_anew(cpu, gpu)
    assert not SparseConv2d.from_dense(nn.Conv2d(2, 4, 3))._packs_anew(cpu, gpu)


def test_the_kernels_are_listed_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module, why = native._load()
    if module is None:
        pytest.skip(f"it was not built: {why}")
    monkeypatch.setattr(bitmap, "native", lambda _: module)  # packing runs on the host
    assert {row["type"] for row in module.bitmap_kernels()} == {ops.checks.FLOATS[dtype] for dtype in HALVES}
    _, form = pack(layer(64, 128).canonical(), "bitmap")
    name, splits = module.bitmap_chosen_kernel(layout_of(form).shape, 8, 132)
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
    assert torch.equal(ops.dense("sparse", made.packed, made.form).cpu(), dense)
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
    check_a_graph_beside_another_stream(layer(64, 16384).cuda(), 8, 16384, torch.bfloat16)


@device
def test_compile_export_opcheck_and_waiting() -> None:
    made, x = layer(96, 80).cuda().eval(), torch.randn(5, 80, dtype=torch.bfloat16, device="cuda")
    expected = made(x)
    with torch.inference_mode():
        assert torch.equal(torch.compile(made, fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(made, (x,)).module()(x), expected)
    torch.library.opcheck(torch.ops.pycompress.sparse_linear.default, (x, made.packed, made.form, made.bias, "silu"))
    with nothing_waits():
        made(x)


@device
def test_errors_say_what_came() -> None:
    made = layer(96, 80).cuda()
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(TypeError, match=rf"x is {dtype}, expected torch\.bfloat16 as the values"):
            made(torch.randn(3, 80, dtype=dtype, device="cuda"))
    with pytest.raises(ValueError, match=r"x is \[3, 40\], the packed weight expects k = 80"):
        made(torch.randn(3, 40, dtype=torch.bfloat16, device="cuda"))
    x = torch.randn(3, 80, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="no packed weight 5000x80 has"):
        ops.sparse_linear(x, made.packed, made.form.replace("n=96", "n=5000"))
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
    module, (n, k) = native.native("tests"), (100, 1000)
    for dtype in HALVES:
        made, kind = layer(n, k, dtype=dtype), ops.checks.FLOATS[dtype]
        weight, _ = moved(made)
        sizes = layout_of(made.form).shape
        for row in (row for row in module.bitmap_kernels() if row["type"] == kind):
            for splits in (1, 2, 5):
                m = row["rows"]
                x = torch.randn(m, k, dtype=dtype, device="cuda")
                y = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
                size = module.bitmap_workspace(0, sizes, m, row["name"], splits)
                workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
                module.bitmap_linear(
                    0, native.stream_of(0), sizes, x.data_ptr(), kind, m, k, made.packed.data_ptr(), 0, 0, y.data_ptr(),
                    workspace.data_ptr(), row["name"], splits,
                )  # fmt: skip
                check(y, x, weight, torch.zeros(n))
