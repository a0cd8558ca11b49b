"""The gradient of the input, straight through what is quantized; the layer itself is not trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from contract.cases import EACH_FLOAT_ROW, EVERY_FLOAT, Case, equal_states, state
from pycompress import ops


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
