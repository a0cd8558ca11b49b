"""Every kernel of the table equals int64 NumPy to the bit: at its tile edges, on adversarial values, for 1 and 2 threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from isa import isa  # noqa: F401
from packing import pack_int8

from pycompress import ops

KERNELS = [kernel for kernel in ops.kernels() if kernel["op"] == "int8"]
AVAILABLE = [kernel for kernel in KERNELS if kernel["available"]]


def edges(tile: int) -> list[int]:
    return sorted({1, max(tile - 1, 1), tile, tile + 1, 2 * tile + 3})


def weights(kind: str, n: int, k: int, top: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "gaussian":
        return np.clip(np.rint(rng.standard_normal((n, k)) * 38), -top, top).astype(np.int8)
    if kind == "uniform":
        return rng.integers(-top, top + 1, (n, k)).astype(np.int8)
    if kind == "extreme":
        return rng.choice(np.array([-top, top], np.int8), (n, k))
    if kind == "zeros":  # most groups of four positions are empty, and some channels
        dense = rng.integers(-top, top + 1, (n, k)).astype(np.int8)
        return dense * np.repeat(rng.random((n, -(-k // 4))) < 0.05, 4, axis=1)[:, :k]
    signs = np.where(np.arange(n * k).reshape(n, k) // 64 % 2, 1, -1)  # whole lanes of one sign
    return (top * signs).astype(np.int8)


def activations(kind: str, m: int, k: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "extreme":
        return rng.choice(np.array([-1, 1], np.float32), (m, k))
    if kind == "runs":
        return np.ones((m, k), np.float32)  # every activation at its largest
    return rng.standard_normal((m, k)).astype(np.float32)


def expected(x: np.ndarray, w: np.ndarray, bits: int) -> np.ndarray:
    q, _, zero_point = ops.int8_quantize(torch.from_numpy(x), bits)
    centred = q.numpy().astype(np.int64) - zero_point.numpy().astype(np.int64)[:, None]
    return centred @ w.astype(np.int64).T


def check(kernel: str, m: int, n: int, k: int, bits: int, kind: str, top: int = 127) -> None:
    rng = np.random.default_rng([m, n, k, bits])
    w, x = weights(kind, n, k, top, rng), activations(kind, m, k, rng)
    packed = pack_int8(torch.from_numpy(w), bits, kernel=kernel)
    np.testing.assert_array_equal(ops.unpack("int8", *packed)["values"].numpy(), w)
    reference = expected(x, w, bits)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            acc, _, _ = ops.int8_accumulate(torch.from_numpy(x), *packed)
            np.testing.assert_array_equal(
                acc.numpy(), reference, err_msg=f"{kernel=} {m=} {n=} {k=} {bits=} {kind=} threads={count}"
            )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", ["int8", "sparse", "dense", "int4", "weight_only"])
def test_the_scalar_specification_is_always_there(op: str) -> None:
    kernels = [kernel for kernel in ops.kernels() if kernel["op"] == op]
    names = [kernel["name"] for kernel in kernels if kernel["available"]]
    assert names, "no kernel can run here: its suite would test nothing"
    assert all(min(kernel["mr"], kernel["nr"], kernel["kr"]) >= 1 for kernel in kernels)
    if ops.extension_error() is None:
        assert names[-1].startswith("scalar") and kernels[-1]["isa"] == "scalar"


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("kind", ["gaussian", "uniform", "extreme", "runs", "zeros"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel["name"])
def test_tile_edges(kernel: dict[str, object], kind: str, bits: int) -> None:
    if not kernel["available"]:
        pytest.skip(f"{kernel['name']} needs {kernel['isa']}, which this processor lacks or PYCOMPRESS_ISA excludes")
    for m in edges(int(kernel["mr"])):  # type: ignore[call-overload]
        for n in edges(int(kernel["nr"])):  # type: ignore[call-overload]
            for k in edges(int(kernel["kr"])):  # type: ignore[call-overload]
                check(str(kernel["name"]), m, n, k, bits, kind)


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("kind", ["gaussian", "uniform", "extreme", "runs", "zeros"])
@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda kernel: kernel["name"])
def test_blocks_of_k_and_threads(kernel: dict[str, object], kind: str, bits: int) -> None:
    name = str(kernel["name"])
    for k in (31, 32, 33, 1023, 1024, 1025, 2051):
        check(name, 5, 19, k, bits, kind)
    check(name, 131, 67, 384, bits, kind)  # rows split among threads
    check(name, 9, 259, 640, bits, kind)  # channels split among threads
    check(name, 9, 67, 384, bits, kind, top=63)  # 7-bit weights


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda kernel: kernel["name"])
def test_the_longest_sum_does_not_overflow(kernel: dict[str, object]) -> None:
    k = ops.MAX_IN_FEATURES
    w = torch.full((1, k), 127, dtype=torch.int8)
    acc, _, zero_point = ops.int8_accumulate(torch.ones(1, k), *pack_int8(w, kernel=str(kernel["name"])))
    assert zero_point.item() == 0
    assert acc.item() == 255 * 127 * k


def test_the_lane_budget_is_spent() -> None:
    """On Gaussian weights the AVX2 packer finds chains of four for 7-bit activations, and every item is in some chain."""
    name = next((kernel["name"] for kernel in AVAILABLE if kernel["isa"] == "avx2"), None)
    if name is None:
        pytest.skip("no AVX2 kernel can run here")
    w = torch.from_numpy(weights("gaussian", 64, 768, 127, np.random.default_rng(0)))
    seven, eight = (ops.int8_depths(*pack_int8(w, bits, kernel=name)) for bits in (7, 8))
    assert seven["items"][0] > 0.95 * seven["groups"]
    assert sum(seven["items"]) == seven["groups"]  # nothing had to be split
    assert eight["items"][1] > 0.4 * eight["groups"]
    assert sum(eight["items"]) >= eight["groups"]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 7, 8, 31, 32, 76])
def test_a_row_that_is_not_finite_is_marked_wherever_it_breaks(bad: float, position: int) -> None:
    x = torch.randn(3, 77)
    clean = ops.int8_quantize(x, 8)
    x[1, position] = bad
    q, scale, zero_point = ops.int8_quantize(x, 8)
    assert scale[1].isnan() and zero_point[1] == 0 and not q[1].any()
    for got, was in zip((q, scale, zero_point), clean, strict=True):
        assert torch.equal(got[[0, 2]], was[[0, 2]])
    assert ops.int8_round(x, 8).isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("m", "k"), [(0, 5), (1, 1), (3, 77), (300, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_rows_are_what_the_integers_mean(m: int, k: int, dtype: torch.dtype) -> None:
    x = torch.randn(m, 2 * k).to(dtype)[:, ::2][:, :k]
    for bits in (7, 8):
        q, scale, zero_point = ops.int8_quantize(x, bits)
        assert torch.equal(ops.int8_round(x, bits), (q.float() - zero_point[:, None]) * scale[:, None])
