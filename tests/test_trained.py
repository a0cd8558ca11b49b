"""Twins that train: the same module, which computes as the compressed layer will."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pycompress import Int4, Int8, Known, LowRank, Sparse, compress
from pycompress.methods.held import HeldFactors, HeldInt4, Projected, held
from pycompress.nn import CompressedLayer
from pycompress.nn.rounded import quantized_rows, rounded_rows
from pycompress.nn.trained import as_dense, can_train, canonical, holder, is_trained, train_as
from pycompress.reference import int8 as reference

METHODS = [
    Int8(), Int8(7), Int8(activation="static", observer=Known(-2.0, 3.0)), Int8(16), Int8(7, weight_bits=7), Int4(),
    Int4(64, symmetric=True, activation_bits=16), Sparse(0.4),
    Sparse(pattern="2:4", bits=8), Sparse(0.3, bits=8, activation_bits=8), LowRank(8, rank_guard=False),
    LowRank(8, bits=8, rank_guard=False), LowRank(4, residual=Int4(), rank_guard=False),
]  # fmt: skip


def layer() -> nn.Linear:
    linear = nn.Linear(72, 40)
    with torch.no_grad():
        linear.weight[3] = 0  # a row of zeros
    return linear


def twin(linear: nn.Module, method: Any) -> CompressedLayer:
    """Makes a twin of the module; returns what compress makes of it."""
    compressed: Any = compress(linear, method)
    weight = compressed.canonical()
    keep = held(weight)
    assert keep is not None and can_train(linear, keep)
    train_as(linear, keep, weight)
    return compressed  # type: ignore[no-any-return]


def fit(model: nn.Module, x: Tensor, steps: int = 8, **options: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("bits", [7, 8])
def test_activations_are_rounded_to_the_kernels_integers(bits: int) -> None:
    rows = [torch.randn(1200, 256) * scale for scale in (1e-3, 1.0, 1e4)]
    x = torch.cat([*rows, torch.rand(300, 256), torch.zeros(2, 256), torch.full((1, 256), 1e-35), -torch.rand(2, 256)])
    q, scale, zero_point = quantized_rows(x, bits)
    expected = reference.quantize(x.numpy(), 2**bits - 1)
    for ours, theirs in zip((q, scale[:, 0], zero_point[:, 0]), expected, strict=True):
        assert np.array_equal(ours.numpy(), theirs)
    image = (q - zero_point) * scale
    assert torch.equal(rounded_rows(x, bits), image), "by the kernels"
    assert torch.equal(torch.compile(rounded_rows, backend="eager")(x, bits), image), "by torch"


def test_the_gradient_goes_through_the_rounding() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    rounded_rows(x, 7).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(4, 8))
    assert rounded_rows(x, 16) is x
    assert rounded_rows(torch.empty(0, 8), 8).shape == (0, 8)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_evaluated_it_is_the_compressed_layer(method: Any) -> None:
    linear, x = layer(), torch.randn(6, 72)
    compressed = twin(linear, method).eval()
    assert torch.equal(linear.eval()(x), compressed(x)), "before training"
    linear.train()
    assert torch.allclose(linear(x), compressed(x), atol=1e-5), "the simulation"
    fit(linear, x)
    now = type(compressed).replacing(linear, canonical(linear))
    assert torch.equal(linear.eval()(x), now(x)), "afterwards"
    assert not torch.equal(compressed(x), now(x))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_image_is_the_canonical_weight(method: Any) -> None:
    linear = layer()
    twin(linear, method)
    keep = held(canonical(linear))
    fit(linear, torch.randn(6, 72))
    state = vars(linear)["_pycompress_trained"]
    if isinstance(keep, HeldFactors):
        images = state.held.images(linear.low_rank_down, linear.low_rank_up)
        for image, factor in zip(images, canonical(linear).factors(), strict=True):  # type: ignore[attr-defined]
            assert torch.equal(image, factor)
    else:
        assert torch.equal(state.held.image(linear.weight), canonical(linear).decompress())


INT4 = [Int4(), Int4(64, symmetric=True, activation_bits=16)]


def learned(linear: nn.Module) -> nn.Parameter:
    """What the scales of a twin are learned by, moved from where it begins, so that some weights are clipped."""
    keep = holder(linear)
    assert isinstance(keep, HeldInt4)
    (log,) = keep.learn()
    nn.init.normal_(log, -0.2, 0.3)
    return log


@pytest.mark.parametrize("method", INT4, ids=repr)
def test_with_learned_scales_the_image_is_the_canonical_weight_too(method: Any) -> None:
    linear, x = layer(), torch.randn(6, 72)
    compressed = twin(linear, method)
    keep: Any = holder(linear)
    begun = canonical(linear).decompress()
    keep.learn()
    assert torch.equal(canonical(linear).decompress(), begun), "nothing was learned yet"
    log = learned(linear)
    fit(linear, x)
    assert log.grad is not None and bool(log.grad.any())
    now: Any = canonical(linear)
    assert torch.equal(keep.image(linear.weight), now.decompress())
    assert now.scale.dtype == torch.bfloat16, "the scale is what the weight can store"
    assert torch.equal(linear.eval()(x), type(compressed).replacing(linear, now)(x))
    log.data += 0.5
    assert not torch.equal(linear(x), type(compressed).replacing(linear, now)(x)), "scales alone changed"
    for other in (pickle.loads(pickle.dumps(linear)), copy.deepcopy(linear)):
        assert torch.equal(other(x), linear(x))


@pytest.mark.parametrize("method", INT4, ids=repr)
def test_the_gradient_of_a_scale_is_that_of_lsq(method: Any) -> None:
    """Of torch's own operators in float64, where rounding passes gradients on as they are."""
    linear, g = layer(), torch.randn(40, 72)
    twin(linear, method)
    log, keep = learned(linear), holder(linear)
    assert isinstance(keep, HeldInt4)
    (keep.image(linear.weight) * g).sum().backward()
    w = linear.weight.detach().double().requires_grad_()
    scale, zero_point = (part.double() for part in keep.grid)
    own = torch.zeros_like(scale, requires_grad=True)
    steps = nn.functional.pad(w, (0, -72 % keep.group)).view(-1, keep.group) / (scale * own.exp())
    rounded = (steps + (steps.round() - steps).detach()).clamp(-zero_point, 15 - zero_point)
    ((rounded * scale * own.exp()).view(40, -1)[:, :72] * g).sum().backward()
    assert linear.weight.grad is not None and log.grad is not None and w.grad is not None and own.grad is not None
    assert torch.allclose(linear.weight.grad.double(), w.grad)
    assert bool((w.grad == 0).any()), "some are beyond the grid"
    factor = (torch.maximum(15 - zero_point, zero_point) * keep.group).rsqrt()
    assert torch.allclose(log.grad.double(), factor * own.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_what_is_pruned_stays_zero(options: dict[str, Any]) -> None:
    linear = layer()
    optimizer = torch.optim.AdamW(linear.parameters(), 1e-2)  # with a past
    linear(torch.randn(5, 72)).sum().backward()
    optimizer.step()
    pruned = twin(linear, Sparse(0.3)).weight == 0
    fit(linear, torch.randn(6, 72), weight_decay=0.1, **options)
    assert bool((canonical(linear).decompress()[pruned] == 0).all())
    assert int((canonical(linear).decompress() == 0).sum()) == int(pruned.sum())


def test_it_is_the_same_module() -> None:
    linear, x = layer(), torch.randn(6, 72)
    parameter, keys = linear.weight, list(linear.state_dict())
    optimizer = torch.optim.SGD(linear.parameters(), 0.1, momentum=0.9)
    linear(x).sum().backward()
    optimizer.step()
    twin(linear, Int4())
    assert linear.weight is parameter and list(linear.state_dict()) == keys and isinstance(linear, nn.Linear)
    assert parameter in optimizer.state
    for other in (pickle.loads(pickle.dumps(linear)), copy.deepcopy(linear)):
        assert is_trained(other)
        assert torch.equal(other(x), linear(x))
        assert torch.equal(other.eval()(x), copy.deepcopy(linear).eval()(x))
    weight = canonical(linear)
    with as_dense(linear) as weights:
        assert type(linear) is nn.Linear and not is_trained(linear) and list(linear.state_dict()) == keys
        assert torch.equal(weights[""].decompress(), weight.decompress())
    assert is_trained(linear)


def test_factors_are_parameters_and_go_where_it_is_dense() -> None:
    linear, x = layer(), torch.randn(6, 72)
    twin(linear, LowRank(8, rank_guard=False))
    assert {"low_rank_down", "low_rank_up"} < dict(linear.named_parameters()).keys()
    fit(linear, x)
    y = linear.eval()(x)
    assert not linear.weight.requires_grad
    with as_dense(linear) as weights:
        assert list(linear.state_dict()) == ["weight", "bias"]
        dense = nn.functional.linear(x, weights[""].decompress(), linear.bias)
        assert torch.allclose(dense, y, atol=1e-5)
    assert torch.equal(linear(x), y)


def test_nothing_that_changes_the_weight_goes_unseen() -> None:
    """A version counter does not move with these."""
    linear, x = layer(), torch.randn(6, 72)
    twin(linear, Int8())
    before = linear.eval()(x)
    linear.weight.data.mul_(0.5)
    after = linear(x)
    assert not torch.allclose(before, after)
    linear.load_state_dict({"weight": linear.weight * 2, "bias": linear.bias})
    assert torch.allclose(linear(x), before, atol=1e-5)


def test_a_scale_grows_where_its_row_outgrows_it() -> None:
    linear = layer()
    scale = twin(linear, Int8(7)).canonical().scale
    with torch.no_grad():
        linear.weight[0] *= 3
    now: Any = canonical(linear)
    assert torch.allclose(now.scale[0], 3 * scale[0]) and torch.equal(now.scale[1:], scale[1:])
    assert int(now.values[0].abs().max()) == 127


def test_any_method_can_be_run_anew_at_every_step() -> None:
    linear, x = layer(), torch.randn(6, 72)
    train_as(linear, Projected(Sparse(0.5), pull=0.1))
    y = linear(x)
    y.backward(torch.zeros_like(y))
    image = canonical(linear).decompress()
    assert linear.weight.grad is not None
    assert torch.allclose(linear.weight.grad, 0.1 * (linear.weight - image)), "the pull alone"
    fit(linear, x)
    assert torch.equal(linear.eval()(x), compress(_dense(linear), Sparse(0.5))(x))


def test_convolutions() -> None:
    conv, x = nn.Conv2d(8, 6, 3, padding=1), torch.randn(2, 8, 9, 9)
    compressed = twin(conv, Sparse(0.4))
    assert torch.equal(conv.eval()(x), compressed(x))
    assert torch.allclose(conv.train()(x), compressed(x), atol=1e-5)
    fit(conv, x)
    assert int((canonical(conv).decompress() != 0).sum()) == compressed.canonical().nnz


def test_what_cannot_be_trained() -> None:
    assert held(compress(nn.Conv2d(8, 6, 3), LowRank(3, rank_guard=False)).canonical()) is None  # type: ignore[operator]
    keep = held(compress(nn.Linear(16, 16), LowRank(3, rank_guard=False)).canonical())  # type: ignore[operator]
    assert keep is not None and not can_train(nn.LayerNorm(4), keep)
    with pytest.raises(ValueError, match="LayerNorm cannot be trained"):
        train_as(nn.LayerNorm(4), keep)
    with pytest.raises(ValueError, match="the start is None, expected a LowRankWeight"):
        train_as(nn.Linear(16, 16), keep)


def _dense(linear: nn.Linear) -> nn.Linear:
    fresh = nn.Linear(linear.in_features, linear.out_features)
    fresh.load_state_dict(linear.state_dict())
    return fresh
