"""``ops/cuda`` calls the native module as ``_cuda.pyi`` says, with what the form says: without a device, where nothing runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

import pycompress
from pycompress import ops
from pycompress.methods import Int4, Int8, LowRank, Sparse
from pycompress.ops.cuda import bitmap, blocks, int4, int8, low_rank, native, sparse, structured, tiles, weight_only

N, K = 5, 70
BYTES = 4096  # of every buffer and workspace
RESULTS = {"bitmap_pack": (bytes(BYTES), 368), "blocks_pack": (bytes(BYTES), 3)}
Calls = list[tuple[str, dict[str, Any]]]


def declared() -> dict[str, Callable[..., Any]]:
    """The functions of ``_cuda.pyi``, which do nothing."""
    names: dict[str, Any] = {}
    exec((Path(pycompress.__file__).parent / "_cuda.pyi").read_text(), names)
    return {name: value for name, value in names.items() if inspect.isfunction(value)}


def fits(value: Any, hint: Any) -> bool:
    if parts := get_args(hint):
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(fits, value, parts))
    return value is None if hint is type(None) else isinstance(value, (int, float) if hint is float else hint)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the native functions are called with, in order; tensors on the CPU pass for those of a device, number 3."""
    seen: Calls = []

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature, hints = inspect.signature(function), get_type_hints(function)

        def call(*operands: Any) -> Any:
            given = signature.bind(*operands).arguments
            for parameter, value in given.items():
                is_device = parameter == "device" and value is None  # the index of the CPU's device
                assert is_device or fits(value, hints[parameter]), f"{name}: {parameter} is {value!r}"
            seen.append((name, given))
            return RESULTS.get(name, BYTES if hints["return"] is int else None)

        return call

    module = SimpleNamespace(**{name: recording(name, function) for name, function in declared().items()})
    for door in (bitmap, blocks, int8, low_rank, structured, tiles, weight_only):
        monkeypatch.setattr(door, "native", lambda *_: module)
        monkeypatch.setattr(door, "stream_of", lambda _: 7, raising=False)
    for door in (native, int4, int8):
        monkeypatch.setattr(door, "check_devices", lambda *_: None)
    for cached in (bitmap._workspace, low_rank._workspace, weight_only._workspace):
        cached.cache_clear()
    return seen


def arguments(calls: Calls, name: str, **expected: Any) -> dict[str, Any]:
    """Of the last call, which was of this function and had these."""
    found, given = calls[-1]
    assert found == name
    assert {key: given[key] for key in expected} == expected
    return given


def check_round(door: Any, weight: Any, dtype: torch.dtype, layout: str = "") -> tuple[Tensor, str]:
    """Packs a weight, unpacks it, makes it dense: all shapes are as they should be."""
    packed, form = door.pack(weight.parts(), weight.shape, weight.settings(), layout)
    of = ops.parse(form)
    assert (of.n, of.k, of.activation_bits) == (N, K, weight.activation_bits or 0)
    assert packed.dtype is torch.uint8
    if layout != "bitmap" and door is not sparse:
        found = door.unpack(packed, form)
        expected = {name: (part.shape, part.dtype) for name, part in weight.parts().items()}
        assert {name: (part.shape, part.dtype) for name, part in found.items()} == expected
    assert door.dense(packed, form).shape == (N, K)
    y = door.linear(torch.randn(2, 3, K).to(dtype), packed, form, torch.randn(N), "gelu")
    assert (y.shape, y.dtype) == ((2, 3, N), dtype)
    assert door.linear(torch.randn(0, K).to(dtype), packed, form, None, "none").shape == (0, N)
    return packed, form


@pytest.mark.parametrize("bits", [7, 8])
def test_int8(calls: Calls, bits: int) -> None:
    weight, x = Int8(activation_bits=bits).compress(torch.randn(N, K)), torch.randn(6, K)
    packed, form = check_round(int8, weight, torch.float32)
    begin, sizes = packed.data_ptr(), {"n": N, "k": K, "packed_bytes": BYTES}
    assert torch.equal(int8.unpack(packed, form)["scale"], weight.scale)
    y = int8.linear(x, packed, form, None, "relu", "name")
    own = {**sizes, "m": 6, "ldx": K, "activation_bits": bits, "kernel": "name", "x": x.data_ptr(), "y": y.data_ptr()}
    arguments(calls, "int8_linear", packed=begin, weight_scale=begin + BYTES, bias=0, activation=1, **own)
    gate = torch.randn(6, 2 * K)[:, :K]
    int8.fused_linear(x, "silu_gate", None, None, 0.5, gate, packed, form, None, "none")
    arguments(calls, "int8_linear", before=(3, 0, 0, 0.5, gate.data_ptr(), 2 * K))
    q, scale, zero_point = int8.quantize(x, bits)
    assert (q.shape, scale.shape, zero_point.dtype) == ((6, K), (6,), torch.int32)
    acc, scale, zero_point = int8.accumulate(x, packed, form)
    arguments(calls, "int8_multiply", y=acc.data_ptr(), y_type=ops.checks.INT32, weight_scale=0, **sizes)
    assert (acc.shape, scale.shape, zero_point.shape) == ((6, N), (6,), (6,))


@pytest.mark.parametrize("dtype", native.HALVES)
def test_weight_only(calls: Calls, dtype: torch.dtype) -> None:
    for method in (Int8(activation_bits=16), Int4(64, True, activation_bits=16), Int4(32, activation_bits=16)):
        weight, door = method.compress(torch.randn(N, K)), int8 if isinstance(method, Int8) else int4
        packed, form = check_round(door, weight, dtype)
        sizes = (8, N, K, 0, True) if isinstance(method, Int8) else (4, N, K, method.group, method.symmetric)
        door.linear(torch.randn(6, K).to(dtype), packed, form, None, "none")
        scale = packed.data_ptr() + BYTES if isinstance(method, Int8) else 0
        arguments(calls, "weight_only_linear", sizes=sizes, packed_bytes=BYTES, weight_scale=scale, m=6, ldx=K)
        with pytest.raises(
            TypeError, match=r"expected bfloat16 or float16 on a CUDA device for activations of 16 bits"
        ):
            door.linear(torch.randn(6, K), packed, form, None, "none")
    with pytest.raises(ValueError, match="activation_bits is 16, expected 7 or 8: there are no integers"):
        int8.accumulate(torch.randn(6, K), *int8.pack(**_of(Int8(activation_bits=16))))


def _of(method: Any) -> dict[str, Any]:
    weight = method.compress(torch.randn(N, K))
    return {"parts": weight.parts(), "shape": weight.shape, "settings": weight.settings()}


def test_sparse(calls: Calls) -> None:
    for method, layout, sizes in (
        (Sparse(0.3), "bitmap", (N, K, 0, BYTES, 368)),
        (Sparse(pattern="2:4"), "structured", (N, K, 0)),
        (Sparse(0.3, "32x32"), "blocks32", (N, K, 0, 32, 3)),
    ):
        weight = method.compress(torch.randn(N, K).bfloat16())
        packed, form = check_round(sparse, weight, torch.bfloat16, layout)
        assert ops.parse(form).layout == layout
        name = "blocks" if layout == "blocks32" else layout
        sparse.linear(torch.randn(6, K).bfloat16(), packed, form, None, "none")
        arguments(calls, f"{name}_linear", sizes=sizes, m=6, packed=packed.data_ptr(), bias=0)
    weight = Sparse(pattern="2:4", bits=8).compress(torch.randn(N, K))
    packed, form = check_round(sparse, weight, torch.float32, "structured")
    assert torch.equal(native.scale_in(packed, BYTES), weight.scale)
    acc, _, _ = sparse.accumulate(torch.randn(6, K), packed, form)
    arguments(calls, "structured_linear", sizes=(N, K, 2), activation_bits=7, y=acc.data_ptr(), scale=0)


def test_low_rank(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    method = LowRank(rank=3, rank_guard=False)
    packed, form = check_round(low_rank, method.compress(torch.randn(N, K)), torch.bfloat16)
    x = torch.randn(40, K).bfloat16()
    low_rank.linear(x, packed, form, None, "silu")
    given = arguments(calls, "low_rank_linear", n=N, k=K, rank=3, m=40, packed=packed.data_ptr(), activation=4)
    assert (given["ldx"] % 8, given["x"] % 16) == (0, 0)

    for name, door in (("int8", int8), ("sparse", sparse)):  # as they are on a device
        monkeypatch.setitem(low_rank.OPS, name, SimpleNamespace(
            pack=lambda parts, shape, settings, _device, layout, door=door: door.pack(parts, shape, settings, layout),
            unpack=door.unpack, dense=door.dense, linear=door.linear,
        ))  # fmt: skip
    beside = LowRank(rank=3, rank_guard=False, residual=Int8(activation_bits=7)).compress(torch.randn(N, K))
    packed, form = check_round(low_rank, beside, torch.float16)
    at, begin = ops.parse(form).bytes, packed.data_ptr()
    low_rank.linear(x, packed, form, None, "none", "name")
    own = {"n": N, "k": K, "rank": 3, "activation_bits": 7, "factors": begin, "residual": begin + at, "kernel": "name"}
    arguments(calls, "side_branch_linear", weight_scale=begin + at + BYTES, **own)

    residual = Sparse(0.3, "32x32").compress(torch.randn(N, K).bfloat16())  # any other weight: a call of its own
    parts = {**beside.parts(), **{f"residual_{name}": part for name, part in residual.parts().items()}}
    packed, form = low_rank.pack(parts, (N, K), {"residual": {"method": "sparse", **residual.settings()}}, "blocks32")
    assert ops.parse(form).layout == "beside"
    y = low_rank.linear(x, packed, form, torch.randn(N), "relu")
    assert (y.shape, y.dtype) == ((40, N), torch.bfloat16)
    assert not (y < 0).any()
    assert [name for name, _ in calls[-2:]] == ["low_rank_linear", "blocks_linear"]
    arguments(calls, "blocks_linear", packed=packed.data_ptr() + at, bias=0, activation=0)
    assert low_rank.dense(packed, form).shape == (N, K)


def test_the_module_that_was_built_is_as_declared() -> None:
    module, why = native._load()
    if module is None:
        pytest.skip(f"it was not built: {why}")
    functions = declared()
    assert {name for name in dir(module) if not name.startswith("_")} == functions.keys()
    for name, function in functions.items():
        count = len(inspect.signature(function).parameters)
        assert getattr(module, name).__doc__.count("arg") == count, name
