"""The derivative of the input, straight through what is quantized; the layer itself is not trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from contract.cases import EACH_FLOAT_ROW, EVERY_FLOAT, Case, equal_states, state
from pycompress import ops

Function = Callable[[Tensor], Tensor]


@EVERY_FLOAT
def test_it_is_that_of_the_dense_weight_and_of_the_activation(case: Case) -> None:
    for activation in ops.ACTIVATIONS:
        made = case.layer(activation)
        plain, dense = case.twin(made, "none"), case.as_dense(made)
        for lead in case.leads:
            x = case.given(lead).requires_grad_()
            y = made(x)
            seed = torch.randn_like(y)
            (gradient,) = torch.autograd.grad(y, x, seed)
            sums = plain(x.detach()).requires_grad_()
            (inner,) = torch.autograd.grad(ops.DIFFERENTIABLE[activation](sums), sums, seed)
            (expected,) = torch.autograd.grad(dense(x), x, inner)
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(y, made(x.detach()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY_FLOAT
def test_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    made, x = case.layer(), case.x().to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(made(x).sum(), x)
    exact = x.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(case.as_dense(made)(exact).sum(), exact)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.float(), expected, rtol=0.05, atol=0.05)


@EACH_FLOAT_ROW
def test_training_a_layer_before_it_lowers_the_loss(case: Case) -> None:
    width = case.item()[-1]
    made, before = nn.Sequential(nn.Linear(width, width), case.layer("gelu")), nn.Linear(width, width)
    model = nn.Sequential(before, made[1])
    kept, x = state(made[1]), case.x(32)
    target = made[1](x + torch.randn_like(x)).detach()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert equal_states(state(made[1]), kept), "the compressed layer itself is not trained"


@EACH_FLOAT_ROW
def test_through_checkpointing(case: Case) -> None:
    made, x = case.layer("silu"), case.x().requires_grad_()
    (expected,) = torch.autograd.grad(made(x).sum(), x)
    (got,) = torch.autograd.grad(checkpoint(made, x, use_reentrant=False).sum(), x)
    torch.testing.assert_close(got, expected)


# --- whoever asks for it ------------------------------------------------------------------------------------------------


def dual(f: Function, x: Tensor, dx: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, dx))).tangent
    assert tangent is not None
    return tangent


def reverse(f: Function, x: Tensor, seed: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, seed)[0]


def second(f: Function, x: Tensor, dx: Tensor) -> Tensor:
    """d/dx of the derivative along dx, by reverse mode twice."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad((first * dx).sum(), x)[0]


def summed(f: Function) -> Function:
    return lambda x: f(x).square().sum()


WAYS: dict[str, Callable[[Function, Tensor, Tensor, Tensor], Any]] = {  # of a function, at x, along dx, for a seed of y's shape
    "backward": lambda f, x, _dx, seed: reverse(f, x, seed),
    "backward twice": lambda f, x, dx, _seed: second(f, x, dx),
    "dual tensors": lambda f, x, dx, _seed: dual(f, x, dx),
    "dual tensors that require a gradient": lambda f, x, dx, _seed: dual(f, x.clone().requires_grad_(), dx).detach(),
    "grad": lambda f, x, _dx, _seed: grad(summed(f))(x),
    "vjp": lambda f, x, _dx, seed: vjp(f, x)[1](seed)[0],
    "jvp": lambda f, x, dx, _seed: jvp(f, (x,), (dx,))[1],
    "jacfwd": lambda f, x, _dx, _seed: jacfwd(f)(x),
    "jacrev": lambda f, x, _dx, _seed: jacrev(f)(x),
    "forward over reverse": lambda f, x, dx, _seed: jvp(grad(summed(f)), (x,), (dx,))[1],
    "reverse over forward": lambda f, x, dx, _seed: grad(lambda x: jvp(summed(f), (x,), (dx,))[1])(x),
    "reverse over reverse": lambda f, x, dx, _seed: grad(lambda x: (grad(summed(f))(x) * dx).sum())(x),
    "forward over forward": lambda f, x, dx, _seed: jvp(lambda x: jvp(summed(f), (x,), (dx,))[1], (x,), (dx,))[1],
    "hessian": lambda f, x, _dx, _seed: hessian(summed(f))(x),
}  # fmt: skip


def straight_through(case: Case, made: Any, x: Tensor) -> Function:
    """At x what a layer computes, in operators that torch differentiates."""
    dense = case.as_dense(made)
    offset = (case.twin(made, "none")(x) - dense(x)).detach()
    return lambda x: ops.DIFFERENTIABLE[made.activation](dense(x) + offset)


@EACH_FLOAT_ROW
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_derivative(case: Case, way: str) -> None:
    for activation in ("none", "gelu"):
        made = case.layer(activation)
        x = case.x(2)
        dx, seed, expected = torch.randn_like(x), torch.randn_like(made(x)), straight_through(case, made, x)
        torch.testing.assert_close(made(x), expected(x).detach(), rtol=1e-4, atol=1e-4)
        found, right = (WAYS[way](f, x, dx, seed) for f in (made, expected))
        assert found.abs().max() > 0
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


@EVERY_FLOAT
def test_forward_mode_of_every_variant(case: Case) -> None:
    made, x = case.layer("silu"), case.x(2)
    dx, expected = torch.randn_like(x), straight_through(case, made, x)
    for tangent in (dual(made, x, dx), jvp(made, (x,), (dx,))[1]):
        torch.testing.assert_close(tangent, jvp(expected, (x,), (dx,))[1], rtol=1e-3, atol=1e-3)
    with forward_ad.dual_level():  # of which nobody asks anything
        torch.testing.assert_close(made(x), made(x.clone()))


@EACH_FLOAT_ROW
def test_derivatives_of_each_item(case: Case) -> None:
    made, x = case.layer("silu"), case.x(3)
    dx, f = torch.randn_like(x), summed(made)
    alone = [(grad(f)(one), jvp(made, (one,), (along,))[1]) for one, along in zip(x, dx, strict=True)]
    torch.testing.assert_close(vmap(grad(f))(x), torch.stack([first for first, _ in alone]), rtol=1e-4, atol=1e-4)
    tangents = vmap(lambda x, dx: jvp(made, (x,), (dx,))[1])(x, dx)
    torch.testing.assert_close(tangents, torch.stack([along for _, along in alone]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad(lambda x: vmap(f)(x).sum())(x), grad(f)(x), rtol=1e-4, atol=1e-4)


@EACH_FLOAT_ROW
def test_of_the_bias(case: Case) -> None:
    """It is a buffer; who asks for its derivative gets it."""
    made, x = case.layer("silu"), case.x(2)
    dense, bias, plain = case.as_dense(made), made.bias, case.twin(made, "none")(x)

    def with_bias(bias: Tensor) -> Tensor:
        return functional_call(made, {"bias": bias}, (x,)).square().sum()

    def as_dense(bias: Tensor) -> Tensor:
        sums = plain + functional_call(dense, {"bias": bias}, (x,)) - dense(x).detach()
        return ops.DIFFERENTIABLE["silu"](sums).square().sum()

    torch.testing.assert_close(grad(with_bias)(bias), grad(as_dense)(bias), rtol=1e-4, atol=1e-4)
    along = torch.randn_like(bias)
    torch.testing.assert_close(
        jvp(with_bias, (bias,), (along,))[1], jvp(as_dense, (bias,), (along,))[1], rtol=1e-4, atol=1e-3
    )
