"""2:4 and block sparse layers on a CUDA device: integers to the bit, floats against float64 within the bounds of
``cuda.h`` of ``csrc/sparse/structured`` and ``csrc/sparse/blocks``; and what hands tensors to the kernels, without a device.

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
from on_cuda import check_a_graph_beside_another_stream, device, nothing_waits, poison  # noqa: F401
from torch import Tensor, nn

import pycompress as pc
from pycompress import ops
from pycompress.methods import Sparse
from pycompress.nn import SparseLinear
from pycompress.ops.cuda import blocks, int8, native, sparse, structured, tiles
from pycompress.ops.cuda.sparse_layout import ELEMENTS as CODES
from pycompress.ops.cuda.sparse_layout import element_name, layout
from pycompress.weights import SparseWeight

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
PATTERNS = {"structured": "2:4", "blocks64": "64x64", "blocks32": "32x32", "blocks16": "16x16"}
FORMS = pytest.mark.parametrize("form", PATTERNS)
ELEMENTS = pytest.mark.parametrize("element", CODES, ids=element_name)


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
    assert native.aligned_rows(x, 24) == (x, 24)
    buffer = torch.randn(3, 64).bfloat16()
    assert native.aligned_rows(buffer[:, 8:40], 64)[0].data_ptr() == buffer.data_ptr() + 16
    for rows, ldx in (
        (buffer[:, 1:25], 64),
        (torch.randn(3, 70).bfloat16()[:, :24], 70),
        (torch.randn(2, 3, 13).half(), 13),
    ):
        found, stride = native.aligned_rows(rows, ldx)
        k = rows.shape[-1]
        assert (found.data_ptr() % 16, stride % 8, found.stride()) == (0, 0, (stride, 1))
        assert torch.equal(found[:, :k], rows.reshape(-1, k))
        assert not found[:, k:].any()


class Call(NamedTuple):
    """What a native function of ``linear`` is given."""

    device: int
    stream: int
    sizes: tuple[int, ...]
    activation_bits: int
    x: int
    x_type: int
    m: int
    ldx: int
    packed: int
    packed_bytes: int
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
    monkeypatch.setattr(tiles, "native", lambda *_: module)
    monkeypatch.setattr(tiles, "stream_of", lambda _: 7)
    monkeypatch.setattr(native, "check_devices", lambda *_: None)
    return seen


def in_memory(call: Call) -> Tensor:
    """x as a kernel reads it."""
    dtype = {code: dtype for dtype, code in ops.checks.FLOATS.items()}[call.x_type]
    k = call.sizes[1]
    data = ctypes.string_at(call.x, ((call.m - 1) * call.ldx + k) * dtype.itemsize)
    return torch.frombuffer(bytearray(data), dtype=dtype).as_strided((call.m, k), (call.ldx, 1))


def packed_like(form: str, element: torch.dtype, k: int, n: int = 5) -> tuple[Tensor, str]:
    """Nothing but the form and the length of a packed weight."""
    bits, activation_bits = (8, 7) if element is torch.int8 else (32, 0)
    keys = f"n={n} k={k} nnz=3 bits={bits} activation_bits={activation_bits} element={element_name(element)} bytes=128"
    keys += "" if form == "structured" else f" block={form[6:]} stored=2"
    return torch.zeros(128 + (4 * n if bits == 8 else 0), dtype=torch.uint8), f"{form} {keys}"


def sizes_of(form: str, element: torch.dtype, k: int) -> tuple[int, ...]:
    """Of such a weight, as the native functions are told."""
    return (5, k, CODES[element], *(() if form == "structured" else (int(form[6:]), 2)))


@FORMS
@pytest.mark.parametrize("element", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [16, 13])
def test_halves_come_aligned(form: str, element: torch.dtype, k: int, calls: list[tuple[Call, Tensor]]) -> None:
    packed, x, bias = packed_like(form, element, k), torch.randn(2, 3, k).to(element), torch.randn(5)
    y = sparse.linear(x, *packed, bias, "relu")
    ((call, rows),) = calls
    assert torch.equal(rows, x.view(6, k))
    assert (y.shape, y.dtype) == ((2, 3, 5), element)
    assert (call.stream, call.m, call.sizes, call.packed_bytes) == (7, 6, sizes_of(form, element, k), 128)
    assert (call.x % 16, call.ldx, call.kernel) == (0, 16, "")
    assert (call.packed, call.y, call.bias) == (packed[0].data_ptr(), y.data_ptr(), bias.data_ptr())
    assert (call.scale, call.workspace, call.activation) == (0, 0, ops.ACTIVATIONS["relu"])
    assert call.x_type == call.y_type == ops.checks.FLOATS[element]
    assert (call.x == x.data_ptr()) == (k == 16), "copied where it has to be"


@FORMS
@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_int8_takes_rows_of_any_type(form: str, dtype: torch.dtype, calls: list[tuple[Call, Tensor]]) -> None:
    packed, x = packed_like(form, torch.int8, 13), torch.randn(6, 20, dtype=dtype)[:, :13]
    y = sparse.linear(x, *packed, None, "none")
    ((call, rows),) = calls
    assert torch.equal(rows, x)
    assert (y.dtype, call.scale, call.bias) == (dtype, packed[0].data_ptr() + 128, 0)
    assert (call.sizes, call.activation_bits) == (sizes_of(form, torch.int8, 13), 7)
    assert (call.x, call.ldx) == (x.data_ptr(), 20), "the quantizer reads any rows"
    assert call.workspace != 0
    assert call.x_type == call.y_type == ops.checks.FLOATS[dtype]


@FORMS
def test_no_rows(form: str, calls: list[tuple[Call, Tensor]]) -> None:
    packed = packed_like(form, torch.float16, 8)
    assert sparse.linear(torch.randn(2, 0, 8).half(), *packed, None, "none").shape == (2, 0, 5)
    assert not calls


@FORMS
def test_the_sums_alone(form: str, calls: list[tuple[Call, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = packed_like(form, torch.int8, 8), torch.randn(3, 8)
    asked: list[int] = []

    def rows_of(x: Tensor, _ldx: int, bits: int) -> int8.Rows:
        asked.append(bits)
        return int8.Rows(x, torch.ones(3), torch.zeros(3, dtype=torch.int32))

    monkeypatch.setattr(int8, "rows", rows_of)
    acc, scale, zero_point = sparse.accumulate(x, *packed)
    ((call, rows),) = calls
    assert (acc.shape, acc.dtype, asked) == ((3, 5), torch.int32, [7])
    assert (call.y, call.y_type, call.scale, call.bias) == (acc.data_ptr(), ops.checks.INT32, 0, 0)
    assert torch.equal(rows, x)
    assert (scale.tolist(), zero_point.tolist()) == ([1, 1, 1], [0, 0, 0])
    with pytest.raises(ValueError, match="the packed weight is float32, expected int8"):
        sparse.accumulate(x, *packed_like(form, torch.float16, 8))


@FORMS
def test_operands_that_do_not_fit(form: str, calls: list[tuple[Call, Tensor]]) -> None:
    (half, of_half), int8 = packed_like(form, torch.float16, 8), packed_like(form, torch.int8, 8)
    x = torch.randn(3, 8).half()
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16, expected torch\.float16 as the values"):
        sparse.linear(x.bfloat16(), half, of_half, None, "none")
    with pytest.raises(TypeError, match=r"x is torch\.float64, expected float32, bfloat16 or float16"):
        sparse.linear(x.double(), *int8, None, "none")
    for packed, of_packed, bias, message in (
        (half, int8[1], None, r"packed is torch\.uint8 \[128\], expected a dense torch\.uint8 vector of 148"),
        (
            half,
            of_half,
            torch.rand(5).half(),
            r"bias is torch\.float16 \[5\], expected a dense torch\.float32 vector of 5",
        ),
        (half[:-1], of_half, None, r"packed is torch\.uint8 \[127\], expected a dense torch\.uint8 vector of 128"),
        (half, of_half.replace("k=8", "k=9"), None, r"x is \[3, 8\], the packed weight expects k = 9"),
        (half[None], of_half, None, r"packed is torch\.uint8 \[1, 128\], expected a dense"),
        (half.int(), of_half, None, r"packed is torch\.int32 \[128\], expected a dense torch\.uint8 vector"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse.linear(x, packed, of_packed, bias, "none")
    with pytest.raises(ValueError, match="activation is 'swish', expected one of"):
        sparse.linear(x, half, of_half, None, "swish")
    assert not calls


def pack(weight: SparseWeight, form: str, device: str = "cpu") -> tuple[Tensor, str]:
    """In this form, whichever dispatch would take."""
    parts = {name: part.to(device) for name, part in weight.parts().items()}
    return sparse.pack(parts, weight.shape, weight.settings(), form)


@ELEMENTS
@pytest.mark.parametrize(("n", "k"), [(2, 9), (5, 21), (64, 64)])
def test_2_4_is_packed_from_a_dense_weight(
    n: int, k: int, element: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, read = layer("structured", n, k, element).canonical(), []
    size, kind = n * k * (1 if element is torch.int8 else 4), torch.int8 if element is torch.int8 else torch.float32

    def structured_pack(
        _device: int, _stream: int, sizes: tuple[int, int, int], dense: int, _packed: int, refused: int
    ) -> None:
        read.append((torch.frombuffer(bytearray(ctypes.string_at(dense, size)), dtype=kind).view(n, k), sizes))
        ctypes.c_int32.from_address(refused).value = 0 if len(read) == 1 else 1

    module = SimpleNamespace(structured_packed_bytes=lambda _: 8 * k, structured_pack=structured_pack)
    monkeypatch.setattr(structured, "native", lambda *_: module)
    monkeypatch.setattr(structured, "stream_of", lambda _: 0)
    packed, form = pack(weight, "structured")
    ((dense, sizes),) = read
    assert len(packed) == layout(form).size == 8 * k + (4 * n if element is torch.int8 else 0)
    scale = 1 if weight.scale is None else weight.scale[:, None]
    assert torch.equal(dense.float() * scale, weight.decompress())
    assert sizes == layout(form).shape == (n, k, CODES[element])
    with pytest.raises(ValueError, match="four consecutive input features have more than two non-zeros"):
        pack(weight, "structured")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The native module, for its functions that run on the host."""
    found, why = native._load()
    if found is None:
        pytest.skip(f"it was not built: {why}")
    monkeypatch.setattr(blocks, "native", lambda *_: found)
    return found


@ELEMENTS
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 65), (64, 128), (200, 150)])
@pytest.mark.parametrize("block", blocks.SIZES)
def test_blocks_are_packed_on_the_host(n: int, k: int, block: int, element: torch.dtype, module: Any) -> None:
    weight = layer(f"blocks{block}", n, k, element, 0.5).canonical()
    packed, form = pack(weight, f"blocks{block}")
    of = layout(form)
    assert ops.parse(form).layout == f"blocks{block}"
    assert (of.n, of.k, of.nnz, of.activation_bits, of.size) == (
        n,
        k,
        weight.nnz,
        weight.activation_bits or 0,
        len(packed),
    )
    if weight.scale is not None:
        assert torch.equal(native.scale_in(packed, of.bytes), weight.scale)
    # Where both types of 16 bits have all values, as of a weight that is empty, the first is taken.
    assert of.element is (element if weight.nnz or element is torch.int8 else torch.bfloat16)
    for arch, multiprocessors in ((80, 108), (89, 142), (90, 132)):
        name = module.blocks_chosen_kernel(of.shape, 4096, arch, multiprocessors)
        assert name in {row["name"] for row in module.blocks_kernels() if row["arch"] <= arch}


@ELEMENTS
def test_the_kernels_are_listed_without_a_device(element: torch.dtype, module: Any) -> None:
    code = CODES[element]
    for rows in (module.structured_kernels(), module.blocks_kernels()):
        assert {row["arch"] for row in rows if row["element"] == code} == {80, 90}
    for m in (1, 4096):
        for arch, multiprocessors in ((80, 108), (89, 142), (90, 132)):
            name = module.structured_chosen_kernel((4096, 4096, code), m, arch, multiprocessors)
            (row,) = [row for row in module.structured_kernels() if row["name"] == name]
            assert row["element"] == code
            assert row["arch"] <= arch
    assert module.structured_packed_bytes((100, 300, code)) > 100 * 300 // 2


# --- with a device ------------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """A weight on the device and what it was made of."""

    weight: SparseWeight
    packed: tuple[Tensor, str]
    bias: Tensor

    def __call__(self, x: Tensor, kernel: str = "") -> Tensor:
        return sparse.linear(x, *self.packed, self.bias, "none", kernel)


def packed(form: str, n: int, k: int, element: torch.dtype, density: float = 0.3) -> Packed:
    """In this form, whichever dispatch would take."""
    made = layer(form, n, k, element, density)
    weight, bias = made.canonical(), made.bias
    assert bias is not None
    return Packed(weight, pack(weight, form, "cuda"), bias.cuda())


def check(y: Tensor, x: Tensor, one: Packed) -> None:
    """int8: the bits of the CPU. Floats: a step of the tensor cores adds 16 products, and structured.h pads k to 128."""
    weight, bias = one.weight, one.bias.cpu()
    (_, k), x = weight.shape, x.cpu()
    if weight.scale is not None:
        there = ops.pack("sparse", weight.parts(), weight.shape, weight.settings())
        assert torch.equal(y.cpu(), ops.sparse_linear(x, *there, bias))
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
    arch, module = 10 * major + minor, native.native("tests")
    if arch not in (80, 90):
        pytest.skip(f"{arch / 10}: some tiles need more shared memory than it has")
    rows = module.structured_kernels() if form == "structured" else module.blocks_kernels()
    size = {"structured": None, "blocks64": 64}.get(form, 16)
    names = [
        row["name"]
        for row in rows
        if row["element"] == CODES[element] and row["arch"] <= arch and row.get("size") == size
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
    there = pack(SparseWeight.from_dense(values, torch.ones(n), bits), form, "cuda")
    x = torch.full((m, k), 3.0)
    x[1::3], x[2::3, ::2] = -3.0, -3.0
    x[:, 0] = torch.linspace(-5, 5, m)
    acc, scale, zero_point = ops.sparse_accumulate(x.cuda(), *there)
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
    scale, bits = (torch.ones(n), 8) if element is torch.int8 else (None, None)
    there = pack(SparseWeight.from_dense(empty, scale, bits), form, "cuda")
    x, bias = torch.randn(5, k, dtype=torch.bfloat16, device="cuda"), torch.randn(n, device="cuda")
    y = ops.sparse_linear(x, *there, bias)
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
        y = ops.sparse_linear(x, *one.packed, one.bias, name)
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
    check_a_graph_beside_another_stream(layer(form, 330, 2048, element).cuda(), 80, 2048, input_type(element))


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
    operands = (x, made.packed, made.form, made.bias, "silu")
    torch.library.opcheck(torch.ops.pycompress.sparse_linear.default, operands)
    with nothing_waits():
        made(x)


@device
def test_errors_say_what_came() -> None:
    made = layer("structured", 96, 80, torch.bfloat16).cuda()
    with pytest.raises(ValueError, match=r"x is \[3, 40\], the packed weight expects k = 80"):
        made(torch.randn(3, 40, dtype=torch.bfloat16, device="cuda"))
    parts = {"mask": torch.full((16, 2), 7, dtype=torch.uint8), "values": torch.ones(96)}
    with pytest.raises(ValueError, match="four consecutive input features have more than two non-zeros"):
        ops.pack("sparse", parts, (16, 16), {"bits": 32, "nnz": 96}, "cuda", "structured")
