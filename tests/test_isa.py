"""Instruction sets capped and kernels forced within one process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from packing import pack_int8, pack_low_rank

from pycompress import ops

native = pytest.mark.skipif(ops.extension_error() is not None, reason="no native kernels were built")
needs_avx2 = pytest.mark.skipif(not ops.instruction_sets().get("avx2"), reason="needs AVX2")
KERNELS = {(row["op"], row["name"]): row for row in ops.kernels()}


def available(op: str) -> list[str]:
    return [row["name"] for row in ops.kernels() if row["op"] == op and row["available"]]


def result(op: str) -> torch.Tensor:
    """Of a layer that is packed and run now: int8 integers, or float32 sums."""
    torch.manual_seed(5)
    x, values = torch.randn(7, 65), torch.randint(-127, 128, (33, 65), dtype=torch.int8)
    if op == "int8":
        return ops.int8_accumulate(x, *pack_int8(values))[0]
    down, up = torch.randn(5, 65), torch.randn(33, 5)
    return ops.low_rank_linear(x, *pack_low_rank(down, up))


@native
def test_unknown_instruction_set_fails_at_import(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = python("import pycompress", PYCOMPRESS_ISA="avx1024")
    assert result.returncode != 0
    assert "PYCOMPRESS_ISA is 'avx1024', expected scalar, avx2, avx_vnni, avx512_vnni or amx_int8" in result.stderr


@native
def test_a_cap_is_undone_and_nests() -> None:
    before = available("int8")
    with ops.capped("scalar"):
        assert available("int8") == ["scalar_4x8"]
        with ops.capped(""):
            everything = available("int8")
        assert available("int8") == ["scalar_4x8"]
        with pytest.raises(KeyError), ops.capped(""):
            raise KeyError
        assert available("int8") == ["scalar_4x8"]
    assert available("int8") == before
    assert len(everything) >= len(before)


@native
def test_caps_mean_what_the_environment_variable_means() -> None:
    allowed = {"scalar": {"scalar"}, "avx2": {"scalar", "avx2"}, "avx_vnni": {"scalar", "avx2", "avx_vnni"}}
    allowed["avx512_vnni"] = {*allowed["avx_vnni"], "avx512_vnni"}
    sets = ops.instruction_sets()
    for name, few in {**allowed, "amx_int8": set(sets)}.items():
        if not sets[name]:
            continue
        with ops.capped(name):
            assert all(row["available"] == (row["isa"] in few and sets[row["isa"]]) for row in ops.kernels())


def test_what_cannot_be_capped_or_forced() -> None:
    unknown = "expected scalar"
    for name in ("mmx", "AVX2", "neon", " "):
        with pytest.raises(ValueError, match=unknown), ops.capped(name):
            pass
    for name, there in ops.instruction_sets().items():
        if not there:
            with pytest.raises(ValueError, match=f"this processor lacks {name}"), ops.capped(name):
                pass
    with pytest.raises(ValueError, match=r"the op is 'int9', expected one of .*int8"), ops.forced("int9", ""):
        pass
    for op in ("int8", "sparse", "dense", "int4", "weight_only"):
        with pytest.raises(ValueError, match=f"no {op} kernel is named 'fast'"), ops.forced(op, "fast"):
            pass
    for (op, name), row in KERNELS.items():
        if not row["available"]:
            with pytest.raises(ValueError, match=f"kernel {name} needs {row['isa']}"), ops.forced(op, name):
                pass
    assert {(row["op"], row["name"]): row for row in ops.kernels()} == KERNELS


@native
def test_a_name_of_another_op_or_beyond_the_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="no int8 kernel is named 'scalar_6x16'"), ops.forced("int8", "scalar_6x16"):
        pass
    for (op, name), row in KERNELS.items():
        if row["isa"] != "scalar":
            with ops.capped("scalar"), pytest.raises(ValueError, match=f"kernel {name} needs"), ops.forced(op, name):
                pass


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda row: f"{row['op']} {row['name']}")
def test_a_forced_kernel_is_the_only_one(kernel: dict[str, Any]) -> None:
    op, name = kernel["op"], kernel["name"]
    if not kernel["available"]:
        pytest.skip(f"{name} needs {kernel['isa']}, which this processor lacks or PYCOMPRESS_ISA excludes")
    everything = available(op)
    with ops.forced(op, name):
        assert set(available(op)) == {name}
        with ops.capped("scalar"):  # a cap set later leaves what is forced
            assert set(available(op)) == {name}
        with ops.forced(op, ""):
            assert available(op) == everything
        assert set(available(op)) == {name}
    assert available(op) == everything


@pytest.mark.parametrize("op", ["int8", "dense"])
def test_any_kernel_can_be_forced(op: str) -> None:
    expected = result(op)
    for name in available(op):
        with ops.forced(op, name):
            torch.testing.assert_close(result(op), expected, rtol=0 if op == "int8" else 1e-4, atol=1e-4)


@native
@needs_avx2
@pytest.mark.parametrize("rows", [1, 9, 64])
def test_a_weight_packed_for_an_excluded_kernel_is_refused(rows: int) -> None:
    """On any number of threads, alone or inside another weight; it runs again behind the cap."""
    values = torch.randint(-127, 128, (300, 300), dtype=torch.int8)
    scale, x = torch.rand(300), torch.randn(rows, 300)
    packed, down, up = pack_int8(values, 8, scale), torch.randn(20, 300), torch.randn(300, 20)
    branch = pack_low_rank(down, up, residual="int8", settings={"activation_bits": 8}, values=values, scale=scale)
    before = ops.int8_linear(x, *packed), ops.low_rank_linear(x, *branch)
    for change in (ops.capped("scalar"), ops.forced("int8", "scalar_4x8")):
        with ExitStack() as stack:
            stack.enter_context(change)
            with pytest.raises(ValueError, match="pack the canonical weight again"):
                ops.int8_linear(x, *packed)
            with pytest.raises(ValueError, match="pack the canonical weight again"):
                ops.low_rank_linear(x, *branch)
            assert torch.equal(ops.unpack("int8", *packed)["values"], values)
            assert torch.equal(ops.int8_linear(x, *pack_int8(values, 8, scale)), before[0])
    assert torch.equal(ops.int8_linear(x, *packed), before[0])
    assert torch.equal(ops.low_rank_linear(x, *branch), before[1])
