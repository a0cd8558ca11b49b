"""Convolutions of every geometry: as the dense one with their weight."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from packing import backends
from torch import nn

from contract.bounds import within
from contract.cases import CASES, Case, Same, equal_states, over, state
from contract.kinds import CONVS

EVERY = pytest.mark.parametrize("name", CONVS)
SIZES = ("rank", "density")  # of a weight, on which nothing here depends
EACH = over([case for case in CASES if case.kind.name == "conv2d" and not any(word in case.variant for word in SIZES)])
ATTRIBUTES = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:`torch.jit")


def shaped(case: Case, name: str) -> Case:
    return replace(case, make=lambda bias: nn.Conv2d(9, 19, **CONVS[name], bias=bias))


@EVERY
@EACH
def test_as_the_dense_convolution(case: Case, name: str, same: Same) -> None:
    case = shaped(case, name)
    for backend, bias in (("native", True), ("twin", False)):
        with backends(backend):
            dense = case.dense(bias=bias)
            plain = case.layer_type.from_dense(dense, case.method)
            made, conv = case.twin(plain, "silu"), case.as_dense(plain)
            assert {at: getattr(made, at) for at in ATTRIBUTES} == {at: getattr(dense, at) for at in ATTRIBUTES}
            torch.testing.assert_close(made.weight, conv.weight.detach())
            for shape in ((2, 9, 11, 8), (2, 9, 8, 17), (9, 10, 12)):
                x = torch.randn(shape, requires_grad=True)
                y, expected = made(x), nn.functional.silu(conv(x))
                assert within(case, plain, x.detach(), plain(x.detach()))
                if plain.settings.get("activation_bits"):  # what it multiplies is not x, but its derivative is W
                    y, expected = plain(x), conv(x)
                    torch.testing.assert_close(made(x), nn.functional.silu(y), rtol=1e-5, atol=1e-6)
                else:
                    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
                seed = torch.randn_like(y)
                (ours,), (theirs,) = (torch.autograd.grad(of, x, seed) for of in (y, expected))
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
                half = x.detach().bfloat16()
                assert same(made(half), made(half.float()).bfloat16())
            empty = torch.randn(0, 9, 9, 8)
            assert made(empty).shape == conv(empty).shape == made(input=empty).shape


@EVERY
@EACH
def test_copies_and_state(case: Case, name: str, same: Same) -> None:
    case = shaped(case, name)
    made, other, x = case.layer("gelu"), case.layer("gelu"), torch.randn(2, 9, 9, 8)
    other.load_state_dict(made.state_dict())
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), other):
        assert same(again(x), made(x)) and repr(again) == repr(made) and again.geometry == made.geometry
        assert equal_states(state(again), state(made))
    real, fake = made(x), copy.deepcopy(made).to("meta")(x.to("meta"))
    assert fake.is_meta and (fake.shape, fake.dtype) == (real.shape, real.dtype)
    assert case.runs_in_torch or fake.stride() == real.stride()
