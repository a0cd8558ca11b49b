"""Nothing follows what the process has set for others: torch's default dtype, its default device, autocast, deterministic fills."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from contract.cases import EACH_ROW, EVERY, Case, Same
from contract.packed import CASES, over
from contract.packed import Case as OpCase
from pycompress import ops


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """torch fills what is allocated with NaN then."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


DEFAULTS: dict[str, Callable[[], Any]] = {
    **{
        str(dtype): lambda dtype=dtype: default_dtype(dtype) for dtype in (torch.bfloat16, torch.float64, torch.float16)
    },  # type: ignore[misc]
    "meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
}
UNDER_EACH = pytest.mark.parametrize("default", DEFAULTS)


def tensors(found: Any) -> list[Any]:
    """All that is in nested results, in order."""
    if isinstance(found, dict):
        return [one for value in found.values() for one in tensors(value)]
    if isinstance(found, (list, tuple)):
        return [one for value in found for one in tensors(value)]
    return [found]


def check(run: Callable[[], Any], default: str, same: Same) -> None:
    expected = tensors(run())
    with DEFAULTS[default]():
        found = tensors(run())
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert same(a, b) if isinstance(a, Tensor) else a == b


@UNDER_EACH
@EVERY
def test_a_layer_is_the_same(case: Case, default: str, same: Same) -> None:
    dense, x = case.dense(), case.x()
    leaf = None if case.kind.tokens else x.clone().requires_grad_()

    def run() -> list[Any]:
        made = case.layer_type.from_dense(dense, case.method, "gelu" if case.kind.epilogue else "none")
        weight, loaded = made.canonical(), copy.deepcopy(made)
        loaded.load_state_dict(made.state_dict())
        again = pickle.loads(pickle.dumps(made))
        gradient = [] if leaf is None else [torch.autograd.grad(made(leaf).float().sum(), leaf)]
        return [
            made(x), loaded(x), again(x), made.state_dict(), weight.decompress(), weight.tensors(), gradient, str(made),
            made.packed, made.form,
        ]  # fmt: skip

    check(run, default, same)


@UNDER_EACH
@over(CASES)
def test_the_ops_are_the_same(case: OpCase, default: str, same: Same) -> None:
    weight, x, bias = case.weight(24, 40), torch.randn(5, 40), torch.randn(24)

    def run() -> list[Any]:
        packed, form = case.pack(weight)
        integers = {}
        for name, function in case.others(form).items():
            integers[name] = function(x, packed, form)
        return [
            case.op.linear(x, packed, form, bias, "silu"), case.op.linear(x.bfloat16(), packed, form, bias),
            case.op.unpack(packed, form), case.op.dense(packed, form), integers,
        ]  # fmt: skip

    check(run, default, same)


@UNDER_EACH
@EACH_ROW
def test_whole_models_are_the_same(case: Case, default: str, same: Same, tmp_path: Path) -> None:
    dense, x, path = nn.Sequential(case.dense()).eval(), case.x(8), tmp_path / "model.safetensors"

    def run() -> list[Any]:
        seen = pc.calibrate(dense, [x])
        model = pc.compress(dense, case.method, calibration=seen)
        pc.save(model, path)
        loaded = pc.load(copy.deepcopy(dense), path)
        report = pc.validate(model, x)
        return [model(x), loaded(x), report.ok, str(pc.summary(model))]

    check(run, default, same)


def test_the_smallest_buffers_are_whole() -> None:
    """What crashed: float32 written into what a default of half the size had allocated."""
    with ExitStack() as stack:
        stack.enter_context(default_dtype(torch.bfloat16))
        for rows in range(1, 40):
            _, scale, zero_point = ops.int8_quantize(torch.ones(rows, 8, dtype=torch.float32), 8)
            assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
