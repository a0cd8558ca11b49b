"""What a layer computes: what its weight says, within what its numbers allow, for every input that its kind takes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from packing import backends
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from contract.bounds import step, within
from contract.cases import (
    CASES,
    EACH_FLOAT_ROW,
    EACH_ROW,
    EVERY,
    EVERY_FLOAT,
    ROWS,
    Case,
    Same,
    equal_states,
    over,
    state,
)
from pycompress import ops

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.mark.parametrize("backend", ["native", "scalar", "twin"])
@EVERY
def test_it_computes_what_the_weight_says(case: Case, backend: str) -> None:
    with backends(backend):
        for activation in ("none", "gelu"):
            for bias in (True, False):
                made, x = case.layer(activation, bias=bias), case.x(7)
                assert within(case, made, x, made(x)), (activation, bias)


@over([case for case in CASES if case.layer_type.op is not None and case.kind.name == "linear"])
def test_it_is_its_op_on_the_packed_weight(case: Case, same: Same) -> None:
    made, x = case.layer("silu"), case.x()
    weight = made.canonical()
    packed, form = ops.pack(made.op.name, weight.parts(), weight.shape, weight.settings())
    assert torch.equal(packed, made.packed) and form == made.form
    assert same(made(x), made.op.linear(x, packed, form, made.bias, "silu"))


@EVERY
def test_the_twin_keeps_the_same_state(case: Case, same: Same) -> None:
    made, x = case.layer("relu"), case.x()
    weight, found, y = made.canonical(), made.state_dict(), made(x)
    with backends("twin"):
        other = case.layer_type.build(weight, made.geometry, made.bias, made.activation)
        loaded = case.layer("relu")
        loaded.load_state_dict(found)
        for one in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other)), loaded):
            assert list(one.state_dict()) == list(found)
            assert all(same(tensor, found[name]) for name, tensor in one.state_dict().items())
            torch.testing.assert_close(one(x), y, rtol=1e-4, atol=1e-5)


@over([case for case in CASES if case.kind.epilogue])
def test_activations_follow_the_sums(case: Case, same: Same) -> None:
    plain, x = case.layer(), case.x(9)
    for activation in ops.ACTIVATIONS:
        y, expected = case.twin(plain, activation)(x), ops.DIFFERENTIABLE[activation](plain(x))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert not case.runs_in_torch or same(y, expected)


@EVERY
def test_leading_dimensions(case: Case, same: Same) -> None:
    made = case.layer("silu")
    dense = case.as_dense(made)
    for lead in case.leads:
        x = case.given(lead)
        y = made(x)
        assert y.shape == dense(x).shape and y.dtype == torch.float32
        rows, inner = case.kind.items(x), case.kind.items(x).shape[1:]
        expected = made(rows).reshape(y.shape)
        if case.runs_in_torch:
            torch.testing.assert_close(y, expected)
        else:
            assert same(y, expected), inner
        assert same(made(input=x), y), "and the keyword of the dense layer"


@EVERY_FLOAT
def test_no_items(case: Case) -> None:
    made, dense = case.layer("gelu"), case.dense()
    none = case.x()[:0]
    empties = [none, none.expand(4, *none.shape)] if case.kind.dims == 1 else [none]
    for empty in empties:
        assert made(empty).shape == dense(empty).shape
        x = empty.clone().requires_grad_()
        made(x).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


@over([case for case in ROWS if case.kind.tokens])
def test_no_tokens(case: Case) -> None:
    for shape in ((0,), (2, 0, 4)):
        tokens = torch.zeros(shape, dtype=torch.int64)
        assert case.layer()(tokens).shape == case.dense()(tokens).shape


@HALVES
@EVERY_FLOAT
def test_half_precision_is_the_rounded_float32(case: Case, dtype: torch.dtype, same: Same) -> None:
    made = case.layer("relu")
    for lead in case.leads:
        x = case.given(lead).to(dtype)
        assert same(made(x), made(x.float()).to(dtype)), "converted exactly, rounded once"


CHANGES: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    lambda x: torch.stack([x, x + 1])[0],
    lambda x: torch.stack([x, x + 1], -1)[..., 0],
    lambda x: nn.functional.pad(x, (3, 1))[..., 3:-1],
    lambda x: x.flip(0).repeat_interleave(2, 0)[::2].flip(0),
    lambda x: torch._neg_view(-x),
]


def lies_as_it_may(y: Tensor, x: Tensor) -> bool:
    """Contiguous; of images, or sequences, with the channels last, these last too."""
    last = torch.channels_last
    if x.dim() == 3 and x.transpose(1, 2).is_contiguous() and y.transpose(1, 2).is_contiguous():
        return True
    return y.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=last) and y.is_contiguous(memory_format=last)
    )


@EVERY_FLOAT
def test_strides(case: Case, same: Same) -> None:
    made, x = case.layer(), case.x(4)
    y, changed = made(x), [(change(x), x) for change in CHANGES]
    changed += [(x[:1].expand(4, *x.shape[1:]), x[:1].repeat(4, *[1] * (x.dim() - 1)))]
    changed += [(x.to(memory_format=torch.channels_last), x)] if x.dim() == 4 else []
    for other, plain in changed:
        assert torch.equal(other, plain)
        if case.runs_in_torch:
            torch.testing.assert_close(made(other), made(plain))
        else:
            assert same(made(other), made(plain)) and lies_as_it_may(made(other), other)
    assert same(made(x), y), "inputs are read only"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@EVERY_FLOAT
def test_nan_and_inf_show_where_they_count_and_nowhere_else(case: Case, bad: float, same: Same) -> None:
    """In the results whose weights meet them, or in all of their row where it is quantized."""
    made, x = case.layer(), case.x()
    expected = made(x)
    x.view(3, -1)[1, x[1].numel() // 2 + 1] = bad
    y = made(x)
    assert same(y[::2], expected[::2]) or case.runs_in_torch
    torch.testing.assert_close(y[::2], expected[::2])
    where = ~case.kind.rows(case.kind.items(x), made.geometry).isfinite()
    if made.settings.get("activation_bits") in (7, 8):  # all that has one scale
        together = ~case.kind.quantized_together(case.kind.items(x)).isfinite()
        of_each = together.any(-1).repeat_interleave(len(where) // len(together))
        where = where | of_each[:, None]
    meets = where.double() @ (made.canonical().decompress() != 0).double().T > 0
    rows, plain = case.kind.results(y), case.kind.results(expected)
    settings = made.settings
    if {settings.get("activation_bits"), settings.get("residual", {}).get("activation_bits")} & {7, 8}:
        meets = where.any(1, keepdim=True).expand_as(meets) if settings.get("activation_bits") in (7, 8) else meets
        assert rows[where.any(1)].isnan().all()
    assert bool((~rows.isfinite())[meets].all())
    finite = ~meets if "nnz" in settings else ~where.any(1)  # zeros that are left out are not multiplied
    torch.testing.assert_close(rows[finite], plain[finite])


# --- bad input ----------------------------------------------------------------------------------------------------------


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "of the layout torch.sparse_coo": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor(list(x.detach().unbind())),
    "nested ": lambda x: torch.nested.nested_tensor(list(x.detach().unbind()), layout=torch.jagged),
    **({"of the layout torch._mkldnn": lambda x: x.to_mkldnn()} if torch.backends.mkldnn.is_available() else {}),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@EVERY_FLOAT
def test_bad_input_names_what_was_expected(case: Case, same: Same) -> None:
    made, good = case.layer(), case.x(2)
    expected = made(good)
    for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=rf"x is {dtype}, expected float32, bfloat16 or float16"):
            made(good.to(dtype))
    for name, change in LAYOUTS.items():
        for x in (change(good), change(good.clone().requires_grad_())):
            with pytest.raises(TypeError, match=f"x is {name.strip()}, expected a dense tensor"):
                made(x)
    for none in (None, [1.0], good.numpy()):
        with pytest.raises(TypeError, match=f"x is {type(none).__name__}, expected a tensor"):
            made(none)
    with pytest.raises(RuntimeError, match="meta"):
        made(good.to("meta"))
    with pytest.raises(TypeError, match=r"x is torch\.float64, expected float32"):
        made(good.double().requires_grad_())
    wide = torch.cat([good, good], -case.kind.dims)
    for x in (wide, wide.clone().requires_grad_()):
        with pytest.raises((ValueError, RuntimeError), match=str(wide.shape[-case.kind.dims])):
            made(x)
    if case.kind.name == "linear" and made.op is not None:
        name = f"{made.op.name}_linear"
        with pytest.raises(ValueError, match=rf"{name}: x is \[3, 100\], the packed weight expects k = {made.k}"):
            made(torch.randn(3, 100))
        with pytest.raises(TypeError, match=rf"{name}: x is torch\.float64"):
            made(good.double())
        with pytest.raises(ValueError, match=f"{name}: x is a scalar"):
            made(torch.tensor(1.0))
    with pytest.raises((ValueError, RuntimeError)):
        made(torch.tensor(1.0))
    assert same(made(good), expected)


@over([case for case in ROWS if case.kind.tokens])
def test_bad_tokens_are_refused_as_the_dense_layer_does(case: Case) -> None:
    made, dense = case.layer(), case.dense()
    for tokens, error in (
        (torch.tensor([made.n]), IndexError),
        (torch.tensor([-1]), IndexError),
        (torch.ones(2), RuntimeError),
    ):
        for module in (made, dense):
            with pytest.raises(error):
                module(tokens)
    for none in (None, [1]):
        with pytest.raises(TypeError, match=f"x is {type(none).__name__}, expected a tensor"):
            made(none)


# --- modes --------------------------------------------------------------------------------------------------------------


@EVERY
def test_inference_mode(case: Case, same: Same) -> None:
    dense, x = case.dense(), case.x()
    made = case.layer_type.from_dense(dense, case.method)
    expected = made(x)
    with torch.inference_mode():
        assert same(made(x), expected) and made(x.clone()).is_inference()
        inside = case.layer_type.from_dense(dense, case.method)
        y = made(case.x())
        assert y.is_inference()
    for one in (inside, copy.deepcopy(inside), case.twin(inside)):
        assert same(one(x), expected)


@HALVES
@EACH_ROW
def test_autocast(case: Case, dtype: torch.dtype, same: Same) -> None:
    """The dtype that the dense layer gives; of x in that dtype what it is without autocast."""
    made, x = case.layer("relu"), case.x(2)
    dense, exact = case.as_dense(made), made(x)
    with torch.autocast("cpu", dtype):
        y = made(x)
        assert y.dtype == dense(x).dtype
        with torch.autocast("cpu", enabled=False):
            assert same(made(x), exact)
    torch.testing.assert_close(y, exact.to(y.dtype), rtol=0.05, atol=0.05)
    if case.kind.tokens:
        assert same(y, exact)
        return
    half, wide = x.to(dtype), x.clone().requires_grad_()
    expected = made(half)
    with torch.autocast("cpu", dtype):
        assert same(made(half), expected)
        assert same(y, exact.to(dtype) if case.runs_in_torch else expected), "rounded once"
        (gradient,) = torch.autograd.grad(made(wide).float().sum(), wide)
        assert gradient.dtype == torch.float32
        torch._dynamo.reset()
        assert same(torch.compile(made, fullgraph=True, backend="aot_eager")(x), y)
        with pytest.raises(TypeError, match="float64"):
            made(x.double())
    wide.grad = None
    (right,) = torch.autograd.grad(made(wide).sum(), wide)
    torch.testing.assert_close(gradient, right, rtol=0.05, atol=0.05)
    assert same(made(x), exact), "and nothing stays"


@EVERY
def test_weights_under_autocast_are_the_same(case: Case, same: Same) -> None:
    dense = case.dense()
    made = case.layer_type.from_dense(dense, case.method)
    weight = made.canonical().decompress()
    by_op = None if made.op is None else made.op.dense(made.packed, made.form)
    with torch.autocast("cpu", torch.bfloat16):
        inside = case.layer_type.from_dense(dense, case.method)
        assert same(made.canonical().decompress(), weight)
        assert by_op is None or same(made.op.dense(made.packed, made.form), by_op)
    assert equal_states(state(inside), state(made))


@EACH_FLOAT_ROW
def test_no_grad_and_detached_results(case: Case) -> None:
    made, x = case.layer(), case.x().requires_grad_()
    with torch.no_grad():
        assert not made(x).requires_grad
    assert made(x).requires_grad
    assert not made(x.detach()).requires_grad


@over([case for case in ROWS if case.kind.tokens])
def test_tokens_of_any_integer_type_give_the_same(case: Case, same: Same) -> None:
    made, x = case.layer(), case.x()
    assert same(made(x.int()), made(x)) and not made(x).requires_grad


# --- what looks on ------------------------------------------------------------------------------------------------------


@EACH_ROW
def test_dispatch_modes_see_what_runs(case: Case, same: Same) -> None:
    seen: list[str] = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    made, x = case.layer("relu"), case.x()
    expected = made(x)
    for mode in (Dispatch, Function):
        seen.clear()
        with mode():
            assert same(made(x), expected)
        assert case.runs_in_torch or mode is Function or any("pycompress" in name for name in seen), seen


@EVERY
def test_vmap(case: Case, same: Same) -> None:
    made, x = case.layer("relu"), case.x(4, 5)
    for axis in (0, 1):
        y = torch.func.vmap(made, in_dims=axis, out_dims=axis)(x)
        expected = torch.stack([made(one) for one in x.unbind(axis)], axis)
        if case.runs_in_torch:
            torch.testing.assert_close(y, expected)
        else:
            assert same(y, expected)
    torch.testing.assert_close(torch.func.vmap(made)(x[0]), made(x[0]))


def test_the_bounds_are_no_wider_than_they_have_to_be() -> None:
    """A layer whose weight is another, by a thousandth, is outside them."""
    for case in ROWS:
        made, x = case.layer(), case.x(64)
        if made.settings.get("activation_bits") in (7, 8):
            assert not within(case, made, x, made(x) + 0.1 * made(x).abs().max())
        else:
            assert not within(case, made, x, made(x) * (1 + 1e-3))
    assert math.isclose(float(step(torch.tensor([[-1.0, 1.0]]), 8)), 2 / 255, rel_tol=1e-6)
