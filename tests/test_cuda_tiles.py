"""2:4 and block sparse layers on a CUDA device: integers to the bit, floats against float64 within the bounds of
``csrc/sparse/structured.h`` and ``blocks.h``; and what hands tensors to the kernels, without a device.

Also run under ``compute-sanitizer --tool memcheck`` and ``--tool racecheck``, with PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress import ops
from pycompress.methods import Sparse, SparseWeight
from pycompress.nn import SparseLinear
from pycompress.ops import cuda, cuda_blocks, cuda_sparse, cuda_structured, cuda_tiles

device = pytest.mark.skipif(ops.cuda_error() is not None, reason=f"no CUDA here: {ops.cuda_error()}")

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
PATTERNS = {"structured": "2:4", "blocks64": "64x64", "blocks32": "32x32", "blocks16": "16x16"}
FORMS = pytest.mark.parametrize("form", PATTERNS)
ELEMENTS = pytest.mark.parametrize(
    "element", cuda_tiles.ELEMENTS, ids=lambda element: str(element).removeprefix("torch.")
)


@pytest.fixture(autouse=True)
def poison() -> None:
    """What the allocator hands out next holds NaN, not the zeros of fresh memory or the right results of the test before."""
    if ops.cuda_error() is not None:
        return
    torch.cuda.empty_cache()
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(4)]
        del blocks


def layer(form: str, n: int, k: int, element: torch.dtype, density: float = 0.3) -> SparseLinear:
    """Made from a layer in a type of 16 bits, so that all float32 values are its numbers."""
    dense = nn.Linear(k, n, dtype=torch.bfloat16 if element is torch.int8 else element)
    share, bits = None if form == "structured" else density, 8 if element is torch.int8 else 32
    return SparseLinear.from_dense(dense, Sparse(share, PATTERNS[form], bits, 8))


def input_type(element: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if element is torch.int8 else element


# --- what the kernels are given: without a device -------------------------------------------------------------------------


def test_rows_are_copied_where_they_begin_anywhere() -> None:
    x = torch.randn(4, 5, 24).bfloat16()
    assert cuda.aligned_rows(x, 24) == (x, 24)
    buffer = torch.randn(3, 64).bfloat16()
    assert cuda.aligned_rows(buffer[:, 8:40], 64)[0].data_ptr() == buffer.data_ptr() + 16
    for rows, ldx in (
        (buffer[:, 1:25], 64),
        (torch.randn(3, 70).bfloat16()[:, :24], 70),
        (torch.randn(2, 3, 13).half(), 13),
    ):
        found, stride = cuda.aligned_rows(rows, ldx)
        k = rows.shape[-1]
        assert (found.data_ptr() % 16, stride % 8, found.stride()) == (0, 0, (stride, 1))
        assert torch.equal(found[:, :k], rows.reshape(-1, k))
        assert not found[:, k:].any()


class Call(NamedTuple):
    """What a native function of ``linear`` is given."""

    device: int
    stream: int
    x: int
    x_type: int
    m: int
    k: int
    ldx: int
    packed: int
    packed_bytes: int
    n: int
    scale: int
    bias: int
    activation: int
    y: int
    y_type: int
    workspace: int
    kernel: str


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Call, Tensor]]:
    """The calls of native functions, which do nothing, and the rows that they would read; tensors on the CPU pass for those of a
    device.
    """
    seen: list[tuple[Call, Tensor]] = []

    def linear(*operands: Any) -> None:
        call = Call(*operands)
        seen.append((call, in_memory(call)))

    module = SimpleNamespace(structured_linear=linear, blocks_linear=linear, int8_workspace=lambda m, k: m * (k + 8))
    monkeypatch.setattr(cuda, "native", lambda *_: module)
    monkeypatch.setattr(cuda, "check_devices", lambda *_: None)
    monkeypatch.setattr(cuda, "stream_of", lambda _: 7)
    return seen


def in_memory(call: Call) -> Tensor:
    """x as a kernel reads it."""
    dtype = {code: dtype for dtype, code in ops.native.FLOATS.items()}[call.x_type]
    data = ctypes.string_at(call.x, ((call.m - 1) * call.ldx + call.k) * dtype.itemsize)
    return torch.frombuffer(bytearray(data), dtype=dtype).as_strided((call.m, call.k), (call.ldx, 1))


def packed_like(form: str, element: torch.dtype, k: int) -> Tensor:
    """Nothing but the shape of a packed weight."""
    code = cuda_tiles.ELEMENTS[element]
    if form == "structured":
        return torch.zeros(1, k, 8 + code, dtype=torch.uint8)
    return torch.zeros(1, 1, k, 32 + code + 4 * cuda_blocks.SIZES.index(int(form[6:])), dtype=torch.uint8)


@FORMS
@pytest.mark.parametrize("element", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [16, 13])
def test_halves_come_aligned(form: str, element: torch.dtype, k: int, calls: list[tuple[Call, Tensor]]) -> None:
    packed, x, bias = packed_like(form, element, k), torch.randn(2, 3, k).to(element), torch.randn(5)
    y = cuda_sparse.linear(x, packed, 5, None, bias, "relu")
    ((call, rows),) = calls
    assert torch.equal(rows, x.view(6, k))
    assert (y.shape, y.dtype) == ((2, 3, 5), element)
    assert (call.stream, call.m, call.k, call.n, call.packed_bytes) == (7, 6, k, 5, packed.numel())
    assert (call.x % 16, call.ldx, call.kernel) == (0, 16, "")
    assert (call.packed, call.y, call.bias) == (packed.data_ptr(), y.data_ptr(), bias.data_ptr())
    assert (call.scale, call.workspace, call.activation) == (0, 0, ops.ACTIVATIONS["relu"])
    assert call.x_type == call.y_type == ops.native.FLOATS[element]
    assert (call.x == x.data_ptr()) == (k == 16), "copied where it has to be"


@FORMS
@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_int8_takes_rows_of_any_type(form: str, dtype: torch.dtype, calls: list[tuple[Call, Tensor]]) -> None:
    packed, scale = packed_like(form, torch.int8, 13), torch.rand(5)
    x = torch.randn(6, 20, dtype=dtype)[:, :13]
    y = cuda_sparse.linear(x, packed, 5, scale, None, "none")
    ((call, rows),) = calls
    assert torch.equal(rows, x)
    assert (y.dtype, call.scale, call.bias) == (dtype, scale.data_ptr(), 0)
    assert (call.x, call.ldx) == (x.data_ptr(), 20), "the quantizer reads any rows"
    assert call.workspace != 0
    assert call.x_type == call.y_type == ops.native.FLOATS[dtype]


@FORMS
def test_no_rows_and_no_channels(form: str, calls: list[tuple[Call, Tensor]]) -> None:
    packed = packed_like(form, torch.float16, 8)
    assert cuda_sparse.linear(torch.randn(2, 0, 8).half(), packed, 5, None, None, "none").shape == (2, 0, 5)
    assert not calls


@FORMS
def test_the_sums_alone(form: str, calls: list[tuple[Call, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = packed_like(form, torch.int8, 8), torch.randn(3, 8)
    packed.view(-1)[:16] = torch.tensor([1, 5, 8, 7], dtype=torch.int32).view(torch.uint8)  # magic, n, k, bits
    asked: list[int] = []

    def int8_rows(x: Tensor, _ldx: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(bits)
        return x, torch.ones(3), torch.zeros(3, dtype=torch.int32)

    monkeypatch.setattr(cuda, "int8_rows", int8_rows)
    acc, scale, zero_point = cuda_sparse.accumulate(x, 8, packed)
    ((call, rows),) = calls
    assert (acc.shape, acc.dtype, asked) == ((3, 5), torch.int32, [7])
    assert (call.y, call.y_type, call.scale, call.bias) == (acc.data_ptr(), ops.native.INT32, 0, 0)
    assert torch.equal(rows, x)
    assert (scale.tolist(), zero_point.tolist()) == ([1, 1, 1], [0, 0, 0])
    for unfit in (packed_like(form, torch.float16, 8), torch.zeros(8, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="the packed weight is float32, expected int8"):
            cuda_sparse.accumulate(x, 8, unfit)


@FORMS
def test_operands_that_do_not_fit(form: str, calls: list[tuple[Call, Tensor]]) -> None:
    half, int8 = packed_like(form, torch.float16, 8), packed_like(form, torch.int8, 8)
    x = torch.randn(3, 8).half()
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16, expected torch\.float16 as the values"):
        cuda_sparse.linear(x.bfloat16(), half, 5, None, None, "none")
    with pytest.raises(TypeError, match=r"x is torch\.float64, expected float32, bfloat16 or float16"):
        cuda_sparse.linear(x.double(), int8, 5, torch.rand(5), None, "none")
    for packed, scale, bias, message in (
        (half, torch.rand(5), None, "there is a scale, expected None: the packed weight is float32"),
        (int8, None, None, r"scale is None, expected float32 \[5\]: the packed weight is int8"),
        (int8, torch.rand(4), None, r"scale is torch\.float32 \[4\], expected a dense torch\.float32 vector of 5"),
        (
            half,
            None,
            torch.rand(5).half(),
            r"bias is torch\.float16 \[5\], expected a dense torch\.float32 vector of 5",
        ),
        (half[..., :8, :-1], None, None, r"packed is torch\.uint8 .* expected for k = 8 what sparse_pack returns"),
        (packed_like(form, torch.float16, 9), None, None, r"packed is torch\.uint8 .*9, .* expected for k = 8"),
        (
            half[..., 0, 0].flatten(),
            None,
            None,
            r"packed is torch\.uint8 \[1\], expected what sparse_pack returns on a CUDA",
        ),
        (half.int(), None, None, r"packed is torch\.int32 \[1, .*, expected what sparse_pack returns on a CUDA"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda_sparse.linear(x, packed, 5, scale, bias, "none")
    with pytest.raises(ValueError, match="activation is 'swish', expected one of"):
        cuda_sparse.linear(x, half, 5, None, None, "swish")
    assert not calls


@ELEMENTS
@pytest.mark.parametrize(("n", "k"), [(2, 9), (5, 21), (64, 64)])
def test_2_4_is_packed_from_a_dense_weight(
    n: int, k: int, element: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, read = layer("structured", n, k, element).canonical(), []
    size, kind = n * k * (1 if element is torch.int8 else 4), torch.int8 if element is torch.int8 else torch.float32

    def structured_pack(
        _device: int,
        _stream: int,
        dense: int,
        rows: int,
        columns: int,
        code: int,
        bits: int,
        _packed: int,
        refused: int,
    ) -> None:
        read.append(
            (torch.frombuffer(bytearray(ctypes.string_at(dense, size)), dtype=kind).view(rows, columns), code, bits)
        )
        ctypes.c_int32.from_address(refused).value = 0 if len(read) == 1 else 1

    module = SimpleNamespace(structured_packed_bytes=lambda _n, k, _code: 8 * k, structured_pack=structured_pack)
    monkeypatch.setattr(cuda, "native", lambda *_: module)
    monkeypatch.setattr(cuda, "stream_of", lambda _: 0)
    cpu = torch.device("cpu")
    packed = cuda_sparse.pack(weight.mask, weight.values, k, weight.activation_bits or 0, "structured", cpu)
    ((dense, code, bits),) = read
    assert packed.shape == (1, k, 8)
    scale = 1 if weight.scale is None else weight.scale[:, None]
    assert torch.equal(dense.float() * scale, weight.decompress())
    assert (code, bits) == (cuda_tiles.ELEMENTS[element], weight.activation_bits or 0)
    with pytest.raises(ValueError, match="four consecutive input features have more than two non-zeros"):
        cuda_sparse.pack(weight.mask, weight.values, k, weight.activation_bits or 0, "structured", cpu)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The native module, for its functions that run on the host."""
    found, why = cuda._load()
    if found is None:
        pytest.skip(f"it was not built: {why}")
    monkeypatch.setattr(cuda, "native", lambda *_: found)
    return found


@ELEMENTS
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 65), (64, 128), (200, 150)])
@pytest.mark.parametrize("block", cuda_blocks.SIZES)
def test_blocks_are_packed_on_the_host(n: int, k: int, block: int, element: torch.dtype, module: Any) -> None:
    made = layer(f"blocks{block}", n, k, element, 0.5)
    weight, cpu = made.canonical(), torch.device("cpu")
    bits = weight.activation_bits or 0
    packed = cuda_sparse.pack(weight.mask, weight.values, k, bits, f"blocks{block}", cpu)
    assert packed.shape[:3] == (1, 1, k)
    assert cuda_sparse.format_of(packed) == f"blocks{block}"
    # Where both types of 16 bits have all values, as of a weight that is empty, the first is taken.
    found = element if weight.nnz or element is torch.int8 else torch.bfloat16
    assert cuda_tiles.element_of("test", packed, k) is found
    for arch, multiprocessors in ((80, 108), (89, 142), (90, 132)):
        name = module.blocks_chosen_kernel(packed.numel(), 4096, n, k, arch, multiprocessors)
        assert name in {row["name"] for row in module.blocks_kernels() if row["arch"] <= arch}
    if element is torch.int8:
        header = packed.flatten()[:16].view(torch.int32).tolist()
        assert header[1:] == [n, k, bits]


@ELEMENTS
def test_the_kernels_are_listed_without_a_device(element: torch.dtype, module: Any) -> None:
    code = cuda_tiles.ELEMENTS[element]
    for rows in (module.structured_kernels(), module.blocks_kernels()):
        assert {row["arch"] for row in rows if row["element"] == code} == {80, 90}
    for m in (1, 4096):
        for arch, multiprocessors in ((80, 108), (89, 142), (90, 132)):
            name = module.structured_chosen_kernel(m, 4096, 4096, code, arch, multiprocessors)
            (row,) = [row for row in module.structured_kernels() if row["name"] == name]
            assert row["element"] == code
            assert row["arch"] <= arch
    assert module.structured_packed_bytes(100, 300, code) % (300 * 4) == 300 * code


# --- with a device ------------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """A weight on the device and what it was made of."""

    weight: SparseWeight
    packed: Tensor
    scale: Tensor | None
    bias: Tensor

    def __call__(self, x: Tensor, kernel: str = "") -> Tensor:
        forced = cuda_structured if self.packed.dim() == 3 else cuda_blocks
        return forced.linear(x, self.packed, self.weight.shape[0], self.scale, self.bias, "none", kernel)


def packed(form: str, n: int, k: int, element: torch.dtype, density: float = 0.3) -> Packed:
    """In this form, whichever dispatch would take."""
    made = layer(form, n, k, element, density)
    weight, bias = made.canonical(), made.bias
    assert bias is not None
    there = ops.sparse_pack(weight.mask.cuda(), weight.values.cuda(), k, weight.activation_bits or 0, form)
    return Packed(weight, there, None if weight.scale is None else weight.scale.cuda(), bias.cuda())


def check(y: Tensor, x: Tensor, one: Packed) -> None:
    """int8: the bits of the CPU. Floats: a step of the tensor cores adds 16 products, and structured.h pads k to 128."""
    weight, bias = one.weight, one.bias.cpu()
    (n, k), x = weight.shape, x.cpu()
    if weight.scale is not None:
        there = ops.sparse_pack(weight.mask, weight.values, k, weight.activation_bits or 0)
        assert torch.equal(y.cpu(), ops.sparse_linear(x, there, n, weight.scale, bias))
        return
    w, x64, bias64 = weight.decompress().double(), x.double(), bias.double()
    expected, magnitude = x64 @ w.T + bias64, x64.abs() @ w.abs().T
    steps = max(-(-k // 16), -(-k // 128) * 4)
    bound = 2.0**-23 * (17 * (steps + 1) + 8) * magnitude
    bound += (ROUNDOFF[x.dtype] + 2.0**-23) * (expected.abs() + bias64.abs()) + 2.0**-24
    assert ((y.cpu().double() - expected).abs() <= bound).all()


@device
@FORMS
@ELEMENTS
def test_every_number_of_rows(form: str, element: torch.dtype) -> None:
    one = packed(form, 200, 712, element)
    for m in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 515):
        x = torch.randn(m, 712, dtype=input_type(element), device="cuda")
        check(one(x), x, one)


@device
@FORMS
@ELEMENTS
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (31, 33), (63, 65), (64, 128), (129, 127), (257, 512), (4096, 1000), (64, 16384), (1000, 4099)]
)
def test_shapes(n: int, k: int, form: str, element: torch.dtype) -> None:
    one = packed(form, n, k, element)
    for m in (1, 17, 130):
        x = torch.randn(m, k, dtype=input_type(element), device="cuda")
        check(one(x), x, one)
        spread = torch.full((m, k + 3), torch.nan, dtype=x.dtype, device="cuda")
        spread[:, :k] = x
        assert torch.equal(one(spread[:, :k]), one(x))
    assert one(torch.empty(0, k, dtype=input_type(element), device="cuda")).shape == (0, n)


@device
@FORMS
@ELEMENTS
def test_every_kernel(form: str, element: torch.dtype) -> None:
    major, minor = torch.cuda.get_device_capability()
    arch, native = 10 * major + minor, cuda.native("tests")
    if arch not in (80, 90):
        pytest.skip(f"{arch / 10}: some tiles need more shared memory than it has")
    rows = native.structured_kernels() if form == "structured" else native.blocks_kernels()
    size = {"structured": None, "blocks64": 64}.get(form, 16)
    names = [
        row["name"]
        for row in rows
        if row["element"] == cuda_tiles.ELEMENTS[element] and row["arch"] <= arch and row.get("size") == size
    ]
    assert len(names) > 3
    one = packed(form, 300, 1000, element)
    for m in (5, 140, 600):
        x = torch.randn(m, 1000, dtype=input_type(element), device="cuda")
        for name in names:
            check(one(x, name), x, one)


@device
@FORMS
@pytest.mark.parametrize("bits", [7, 8])
def test_sums_are_exact(form: str, bits: int) -> None:
    """Runs of the extremes, at the largest k."""
    n, k, m = 70, 65536, 130
    values = torch.full((n, k), 127, dtype=torch.int8)
    values[::2] = -127
    if form == "structured":
        values[:, ::4] = values[:, 3::4] = 0
    weight = SparseWeight.from_dense(values, torch.ones(n), bits)
    there = ops.sparse_pack(weight.mask.cuda(), weight.values.cuda(), k, bits, form)
    x = torch.full((m, k), 3.0)
    x[1::3], x[2::3, ::2] = -3.0, -3.0
    x[:, 0] = torch.linspace(-5, 5, m)
    acc, scale, zero_point = ops.sparse_accumulate(x.cuda(), there)
    q, own_scale, own_zero_point = ops.int8_quantize(x, bits)
    rows = q.numpy().astype(np.int64) - own_zero_point.numpy()[:, None]
    assert np.array_equal(acc.cpu().numpy(), rows @ values.numpy().astype(np.int64).T)
    assert torch.equal(scale.cpu(), own_scale)
    assert torch.equal(zero_point.cpu(), own_zero_point)


@device
@FORMS
@ELEMENTS
def test_no_weights_at_all(form: str, element: torch.dtype) -> None:
    n, k = 40, 70
    empty = torch.zeros(n, k, dtype=torch.int8 if element is torch.int8 else torch.float32)
    scale, bits = (torch.ones(n), 8) if element is torch.int8 else (None, 0)
    weight = SparseWeight.from_dense(empty, scale, bits or None)
    there = ops.sparse_pack(weight.mask.cuda(), weight.values.cuda(), k, bits, form)
    x, bias = torch.randn(5, k, dtype=torch.bfloat16, device="cuda"), torch.randn(n, device="cuda")
    y = ops.sparse_linear(x, there, n, None if scale is None else scale.cuda(), bias)
    assert torch.equal(y, bias.to(torch.bfloat16).expand(5, n))


@device
@FORMS
@ELEMENTS
def test_the_same_bits_at_every_call(form: str, element: torch.dtype) -> None:
    one = packed(form, 256, 4096, element)
    for m in (16, 600):
        x = torch.randn(m, 4096, dtype=input_type(element), device="cuda")
        expected = one(x)
        for _ in range(20):
            assert torch.equal(one(x), expected)


@device
@FORMS
@ELEMENTS
def test_activations(form: str, element: torch.dtype) -> None:
    one, dtype = packed(form, 96, 80, element), input_type(element)
    x = torch.randn(5, 80, dtype=torch.float32 if element is torch.int8 else dtype, device="cuda")
    plain = one(x).float()
    for name, activation in {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}.items():
        y = ops.sparse_linear(x, one.packed, 96, one.scale, one.bias, name)
        torch.testing.assert_close(y.float(), activation(plain), rtol=2 * ROUNDOFF[dtype], atol=2 * ROUNDOFF[dtype])


@device
@FORMS
@ELEMENTS
def test_a_layer_there_and_back(form: str, element: torch.dtype, tmp_path: Path) -> None:
    n, k = 330, 321
    made = layer(form, n, k, element)
    state, before, dense = made.state_dict(), made.packed, made.weight
    made.to("cuda", torch.bfloat16)  # what is meant for activations does not touch the weight
    assert made.format == form
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor.cpu(), state[name]), name
    assert torch.equal(made.weight, dense)
    pc.save(nn.Sequential(made), tmp_path / "cuda.safetensors")
    loaded = pc.load(nn.Sequential(nn.Linear(k, n)), tmp_path / "cuda.safetensors")[0]
    assert torch.equal(loaded.packed, before)
    assert torch.equal(copy.deepcopy(made).cpu().packed, before)
    assert torch.equal(pickle.load(io.BytesIO(pickle.dumps(made))).cpu().packed, before)
    fresh = layer(form, n, k, element).cuda()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.packed, made.packed)
    x = torch.randn(5, k, dtype=input_type(element), device="cuda", requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.float(), dense.cuda().sum(0).expand(5, k), rtol=2.0**-6, atol=2.0**-6)


@device
@FORMS
@ELEMENTS
def test_not_finite_rows_stay_apart(form: str, element: torch.dtype) -> None:
    one, x = packed(form, 96, 80, element), torch.randn(4, 80, dtype=input_type(element), device="cuda")
    expected = one(x)
    x[1], x[2] = torch.inf, torch.nan
    y = one(x)
    stored = one.weight.decompress().any(1).cuda()
    assert not y[1, stored].isfinite().any()
    assert y[2, stored].isnan().all()
    assert torch.equal(y[[0, 3]], expected[[0, 3]])


@device
@FORMS
@ELEMENTS
def test_a_cuda_graph_beside_another_stream(form: str, element: torch.dtype) -> None:
    made, dtype = layer(form, 330, 2048, element).cuda(), input_type(element)
    there, xs = torch.zeros(80, 2048, dtype=dtype, device="cuda"), torch.randn(3, 80, 2048, dtype=dtype, device="cuda")
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
@FORMS
@ELEMENTS
def test_compile_export_opcheck_and_waiting(form: str, element: torch.dtype) -> None:
    made = layer(form, 330, 320, element).cuda().eval()
    x = torch.randn(5, 320, dtype=input_type(element), device="cuda")
    expected = made(x)
    with torch.inference_mode():
        assert torch.equal(torch.compile(made, fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(made, (x,)).module()(x), expected)
    operands = (x, made.packed, 330, made.weight_scale, made.bias, "silu")
    torch.library.opcheck(torch.ops.pycompress.sparse_linear.default, operands)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@device
def test_errors_say_what_came() -> None:
    made = layer("structured", 96, 80, torch.bfloat16).cuda()
    with pytest.raises(ValueError, match=r"packed is torch\.uint8 \[1, 80, .*expected for k = 40"):
        made(torch.randn(3, 40, dtype=torch.bfloat16, device="cuda"))
    mask, values = torch.full((16, 2), 7, dtype=torch.uint8, device="cuda"), torch.ones(96, device="cuda")
    with pytest.raises(ValueError, match="four consecutive input features have more than two non-zeros"):
        ops.sparse_pack(mask, values, 16, 0, "structured")
