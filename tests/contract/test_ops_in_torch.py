"""The ops as torch sees them: opcheck, fakes, compile, vmap, and tensors that are not what they seem."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from packing import backend, backends  # noqa: F401
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from contract.packed import CASES, EACH, FEW, FLOATS, Case, K, over

Same = Callable[[Tensor, Tensor], bool]
Sample = Callable[[Sequence[Any], int], Sequence[Any]]
Forked = Callable[..., Any]

on_every_backend = pytest.mark.usefixtures("backend")
EVERY, SOME = over(CASES), over(FEW)


def op(case: Case, function: str = "linear") -> Any:
    return getattr(torch.ops.pycompress, f"{case.name}_{function}").default


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def of_wider_rows(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


INPUTS: dict[str, tuple[Tensor, bool, str]] = {
    "float32": (torch.randn(3, K), True, "none"),
    "bfloat16": (torch.randn(2, 3, K).bfloat16(), False, "relu"),
    "float16": (torch.randn(K).half(), True, "gelu"),
    "requires a gradient": (torch.randn(3, K, requires_grad=True), True, "gelu"),
    "no rows": (torch.randn(0, K), False, "silu"),
    "transposed": (transposed(torch.randn(5, K)), True, "gelu_tanh"),
    "transposed in three dimensions": (transposed(torch.randn(2, 5, K)).half(), False, "none"),
    "of wider rows": (of_wider_rows(torch.randn(5, K)), True, "none"),
}


def test_opcheck(sample: Sample, backend: str) -> None:  # noqa: F811
    unread = {"windows", "chains"} if backend == "scalar" else set()  # no scalar kernel reads these formats
    cases = [case for case in CASES if (case in FEW or case.name == "sparse") and case.layout not in unread]
    given = INPUTS if backend == "native" else ["float32"]  # what is checked is around the kernel
    for case, what in sample(list(itertools.product(cases, [*given, "unpack", "dense"])), 14):
        packed, form, bias = case.made()
        if what in INPUTS:
            x, with_bias, activation = INPUTS[what]
            torch.library.opcheck(op(case), (x, packed, form, bias if with_bias else None, activation))
        else:
            torch.library.opcheck(op(case, what), (packed, form))


@on_every_backend
@EVERY
def test_fake_has_the_strides_of_the_real_result(case: Case) -> None:
    packed, form, bias = case.made()
    for x in (torch.randn(2, 5, K), transposed(torch.randn(2, 5, K)), of_wider_rows(torch.randn(2, 5, K))):
        real = case.op.linear(x, packed, form, bias)
        fake = case.op.linear(x.to("meta"), packed.to("meta"), form, bias.to("meta"))
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
        assert fake.is_meta and real.is_contiguous()


# --- compile -------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """x through a weight of each of some cases: what its op gives, times the weight, and what was packed."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.cases, made = cases, [case.made() for case in cases]
        self.forms = [form for _, form, _ in made]
        for i, (packed, _, bias) in enumerate(made):
            self.register_buffer(f"packed{i}", packed)
            self.register_buffer(f"bias{i}", bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        results = []
        for i, (case, form) in enumerate(zip(self.cases, self.forms, strict=True)):
            packed, bias = getattr(self, f"packed{i}"), getattr(self, f"bias{i}")
            y = case.op.linear(x, packed, form, bias, "gelu")
            results += [y, y.float() @ case.op.dense(packed, form), *case.op.unpack(packed, form).values()]
        return results


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(found: list[Tensor], expected: list[Tensor], same: Same) -> None:
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compile_fullgraph(same: Same, sample: Sample) -> None:
    for name, dtype in sample(list(itertools.product(("native", "scalar", "twin"), FLOATS)), 2):
        with backends(name):
            model, x = Model(sample(FEW, 5)), torch.randn(3, 5, K).to(dtype)
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            for rows in (x, x.transpose(0, 1)):
                check(compiled(rows), model(rows), same)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_once_for_every_batch_size(same: Same, sample: Sample) -> None:
    model, counter = Model(sample(FEW, 5)), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 7, 33):
        x = torch.randn(batch, K)
        check(compiled(x), model(x), same)
    assert counter.frame_count == 1


# --- derivatives ----------------------------------------------------------------------------------------------------------


@on_every_backend
@EVERY
def test_derivatives_of_the_op_itself(case: Case) -> None:
    """With or without the short way in, of x and of the bias; the layers have no others."""
    packed, form, bias = case.made()
    weight, x = case.op.dense(packed, form), torch.randn(3, K)
    dx, dbias, gelu = torch.randn_like(x), torch.randn_like(bias), nn.functional.gelu
    for call in (case.op.linear, op(case)):
        sums = call(x, packed, form, bias, "none")
        offset = sums - nn.functional.linear(x, weight, bias)

        def ours(x: Tensor, bias: Tensor, call: Any = call) -> Tensor:
            y: Tensor = call(x, packed, form, bias, "gelu")
            return y

        def expected(x: Tensor, bias: Tensor, offset: Tensor = offset) -> Tensor:
            return gelu(nn.functional.linear(x, weight, bias) + offset)

        scale = float(weight.abs().max()) + 1
        for given in ((True, True), (True, False), (False, True)):
            operands = [t.clone().requires_grad_(want) for t, want in zip((x, bias), given, strict=True)]
            wanted = [t for t in operands if t.requires_grad]
            seed = torch.randn_like(sums)
            found, right = (torch.autograd.grad(f(*operands), wanted, seed) for f in (ours, expected))
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4 * scale)
        found, right = (torch.func.jvp(f, (x, bias), (dx, dbias))[1] for f in (ours, expected))
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3 * scale)
    with torch.no_grad():
        assert not case.op.linear(x.clone().requires_grad_(), packed, form, bias).requires_grad
    with pytest.raises(ValueError, match="activation is 'tanh', expected one of"):
        case.op.linear(x.clone().requires_grad_(), packed, form, bias, "tanh")


@over(EACH)
@pytest.mark.usefixtures("fresh_dynamo")
def test_derivatives_in_one_graph(case: Case) -> None:
    (packed, form, bias), x = case.made(), torch.randn(3, K)

    def loss(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
        return case.op.linear(x, packed, form, bias, "silu").square().sum()

    def first(x: Tensor, packed: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(loss, argnums=(0, 2))(x, packed, bias)

    def each(x: Tensor, packed: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))(x, packed, bias)

    for function in (first, each):
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(x, packed, bias)
        torch.testing.assert_close(found, function(x, packed, bias))


def test_what_gives_integers_has_no_derivative_and_says_so() -> None:
    x = torch.randn(3, K, requires_grad=True)
    for case in FEW:
        packed, form, _ = case.made()
        for name, function in case.others(form).items():
            with pytest.raises(ValueError, match=rf"{name}: x requires a gradient, expected x\.detach\(\)"):
                function(x, packed, form)
            with torch.no_grad():
                function(x, packed, form)
            function(x.detach(), packed, form)
            with forward_ad.dual_level():
                function(x.detach(), packed, form)
                with pytest.raises(ValueError, match=f"{name}: x has a tangent"):
                    function(forward_ad.make_dual(x.detach(), x.detach()), packed, form)


# --- tensors that are not what they seem: each has to see the dispatcher ------------------------------------------------


@on_every_backend
@EVERY
def test_vmap(case: Case, same: Same) -> None:
    linear, (packed, form, bias), x = case.op.linear, case.made(), torch.randn(4, 3, K)
    for dim in (0, 1):
        y = torch.func.vmap(lambda row: linear(row, packed, form, bias), in_dims=dim)(x)
        assert same(y, linear(x.movedim(dim, 0), packed, form, bias))
    with pytest.raises(NotImplementedError, match=f"{case.name}_linear: vmap over the weights"):
        torch.func.vmap(lambda b: linear(x[0], packed, form, b))(bias.expand(2, -1).contiguous())


class Spy(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@on_every_backend
@SOME
def test_dispatch_modes_and_tracers_see_the_op(case: Case, same: Same) -> None:
    (packed, form, bias), x = case.made(), torch.randn(7, K)
    with Spy() as spy:
        case.op.linear(x, packed, form)
    assert op(case) in spy.seen
    traced = torch.jit.trace(lambda x: case.op.linear(x, packed, form, bias), torch.randn(3, K))
    assert same(traced(x), case.op.linear(x, packed, form, bias))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn() if torch.backends.mkldnn.is_available() else x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:1]]),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
}


@on_every_backend
@over(EACH)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_other_layouts_are_refused_and_zeros_without_memory_taken(case: Case, forked: Forked) -> None:
    """torch's lazy zeros, as autograd makes them, have no data to point to."""
    packed, form, bias = case.made()
    layouts = {} if case.in_torch else LAYOUTS
    inputs = {name: change(torch.randn(3, K)) for name, change in layouts.items()}

    def run() -> tuple[list[str], bool]:
        torch.set_num_threads(1)
        taken = []
        for name, x in inputs.items():
            try:
                case.op.linear(x, packed, form, bias)
                taken.append(name)
            except (RuntimeError, NotImplementedError, TypeError, ValueError):
                pass
        y = case.op.linear(torch._efficientzerotensor((3, K)), packed, form, bias)
        return taken, torch.equal(y, bias.expand(3, -1))

    assert forked(run) == ([], True)
