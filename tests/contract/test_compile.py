"""torch.compile in one graph, torch.export; on one variant of each row, on all of them in `make test-all`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract.cases import CASES, EACH_FLOAT_ROW, EACH_ROW, ROWS, Case, Same, over

Python = Callable[..., subprocess.CompletedProcess[str]]
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:`torch.jit")
OTHERS = [case for case in CASES if case not in ROWS]
WITH_INDUCTOR = [case for case in ROWS if not case.runs_in_torch]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def equal(case: Case, same: Same, a: Tensor, b: Tensor) -> bool:
    """To the bit, but for what torch's own operators compute."""
    if not case.runs_in_torch:
        return same(a, b)
    torch.testing.assert_close(a, b)
    return True


def others(case: Case) -> list[Tensor]:
    """Of strides that only the op knows how to walk, and of images of another size and memory format."""
    if case.kind.tokens:
        return []
    x = case.x(3)
    found = [x.transpose(-1, -2).contiguous().transpose(-1, -2)]
    if case.kind.dims > 1:
        found.append(torch.cat([x, x], -1))
    return [*found, x.to(memory_format=torch.channels_last)] if x.dim() == 4 else found


def compiled(module: nn.Module, backend: str = "aot_eager") -> Any:
    return torch.compile(module, fullgraph=True, backend=backend)


def check(case: Case, same: Same) -> None:
    model = nn.Sequential(case.layer("gelu"), nn.Tanh()).eval()
    call = compiled(model)
    with torch.no_grad():
        for x in (case.x(3), case.x(5), case.given(case.leads[-1])):
            assert equal(case, same, call(x), model(x))
        for x in others(case):
            assert equal(case, same, call(x), model(x))


def check_gradient(case: Case) -> None:
    model, x = case.layer("silu"), case.x().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(model)(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


@EACH_ROW
def test_in_one_graph(case: Case, same: Same) -> None:
    check(case, same)


@EACH_FLOAT_ROW
def test_with_a_gradient(case: Case) -> None:
    check_gradient(case)


@pytest.mark.slow
@over(OTHERS)
def test_every_other_variant(case: Case, same: Same) -> None:
    check(case, same)
    if not case.kind.tokens:
        check_gradient(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EACH_FLOAT_ROW
def test_in_half_precision(case: Case, dtype: torch.dtype, same: Same) -> None:
    model, x = nn.Sequential(case.layer("gelu"), nn.Tanh()).eval().to(dtype), case.x().to(dtype)
    with torch.no_grad():
        assert equal(case, same, compiled(model)(x), model(x))


def check_inductor(case: Case, same: Same) -> None:
    model = case.layer("relu").eval()
    call = compiled(model, "inductor")
    with torch.no_grad():
        for x in (case.x(5), *others(case)):
            torch.testing.assert_close(call(x), model(x))
            assert case.runs_in_torch or same(call(x), model(x))


@compiler
@over(WITH_INDUCTOR)
def test_with_inductor(case: Case, same: Same) -> None:
    check_inductor(case, same)


@compiler
@pytest.mark.slow
@over([case for case in CASES if case not in WITH_INDUCTOR])
def test_every_other_variant_with_inductor(case: Case, same: Same) -> None:
    check_inductor(case, same)


def exported(case: Case) -> torch.export.ExportedProgram:
    # Not on its own: torch.export miscounts the buffers of a root module of which one is None.
    model, sizes = nn.Sequential(case.layer("gelu"), nn.Tanh()).eval(), {0: torch.export.Dim("items", min=1, max=64)}
    return torch.export.export(model, (case.x(),), dynamic_shapes=(sizes,))


LOAD = """
import sys, torch, pycompress
for x, expected, path in torch.load(sys.argv[1]):
    torch.testing.assert_close(torch.export.load(path).module()(x), expected)
"""


def test_export_save_and_load_elsewhere(tmp_path: Path, python: Python) -> None:
    found = []
    for case in ROWS:
        program, path, x = exported(case), str(tmp_path / f"{len(found)}.pt2"), case.x(9)
        ops = [str(node.target) for node in program.graph.nodes]
        assert case.runs_in_torch or sum(name.startswith("pycompress.") for name in ops) == 1, ops
        torch.export.save(program, path)
        found.append((x, program.module()(x).detach(), path))
    torch.save(found, tmp_path / "expected.pt")
    result = python(LOAD, tmp_path / "expected.pt")
    assert result.returncode == 0, result.stderr


@over(OTHERS)
@pytest.mark.slow
def test_every_other_variant_is_exported(case: Case) -> None:
    program, x = exported(case), case.x(9)
    assert program.module()(x).shape[0] == 9
