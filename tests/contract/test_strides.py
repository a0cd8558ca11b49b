"""Weights, biases and parts of any strides and dtypes: what is made of them has the bits of what a contiguous copy gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from contract.cases import EVERY, Case, Same, equal_states, equal_weights, over
from contract.packed import CASES
from contract.packed import Case as OpCase
from pycompress import ops
from pycompress.methods import Int4, Int8, LowRank, Sparse
from pycompress.methods.method import Method

Change = Callable[[Tensor], Tensor]


def last_first(w: Tensor) -> Tensor:
    """Its dimensions lie in memory in the opposite order."""
    back = tuple(range(w.dim()))[::-1]
    return w.permute(back).contiguous().permute(back)


CHANGES: dict[str, Change] = {  # of equal values
    "in the opposite order": last_first,
    "every second row": lambda w: w.repeat_interleave(2, 0)[::2],
    "every second of the last": lambda w: w.repeat_interleave(2, -1)[..., ::2],
    "inside a wider one": lambda w: nn.functional.pad(w, (3, 2))[..., 3:-2],
    "behind others": lambda w: torch.cat([w, w])[len(w) :],
    "a negative view": lambda w: torch._neg_view(-w),
    "the imaginary part of a conjugate": lambda w: torch.complex(w, -w).conj().imag,
    "a part of a structure": lambda w: torch.stack([w, w], -1)[..., 0],
    "channels last": lambda w: w.to(memory_format=torch.channels_last) if w.dim() == 4 else w,
    "that requires a gradient": lambda w: w.clone().requires_grad_() * 1,
    "float64": lambda w: w.double(),
}
ALIKE: dict[str, Change] = {  # of other values
    "expanded": lambda w: w[:1].expand(w.shape),
    "expanded along the last": lambda w: w[..., :1].expand(w.shape),
    "bfloat16": lambda w: last_first(w.bfloat16()),
    "float16": lambda w: last_first(w.half()),
}


@EVERY
def test_a_method_takes_a_matrix_of_any_strides(case: Case) -> None:
    dense = case.dense()
    matrix, method = case.kind.matrix(dense).detach(), case.kind.fitted(case.method, dense)
    expected = method.compress(matrix.contiguous())
    for name, change in CHANGES.items():
        changed = change(matrix)
        assert torch.equal(changed.detach().float(), matrix), name
        kept = changed.detach().clone()
        assert equal_weights(method.compress(changed), expected), name
        assert torch.equal(changed.detach(), kept), f"{name}: read only"
    for name, change in ALIKE.items():
        changed = change(matrix)
        assert equal_weights(method.compress(changed), method.compress(changed.float().contiguous().clone())), name


@EVERY
def test_a_layer_takes_a_module_of_any_strides(case: Case, same: Same) -> None:
    dense, x = case.dense(), case.x()
    expected = case.layer_type.from_dense(dense, case.method)
    for name, change in CHANGES.items():
        if name == "that requires a gradient":
            continue
        other = copy.deepcopy(dense)
        for parameter, tensor in list(dense.named_parameters()):
            setattr(other, parameter, nn.Parameter(change(tensor.detach())))
        made = case.layer_type.from_dense(other, case.method)
        assert equal_states(made.state_dict(), expected.state_dict()), name
        if not case.kind.tokens and name != "float64":
            assert same(made(x), expected(x)), name


@over(CASES)
def test_an_op_takes_parts_and_a_bias_of_any_strides(case: OpCase, same: Same) -> None:
    weight, x, bias = case.weight(24, 40), torch.randn(5, 40), torch.randn(24)
    packed, form = case.pack(weight)
    expected = case.op.linear(x, packed, form, bias, "silu")
    for name, change in CHANGES.items():
        if name in ("float64", "the imaginary part of a conjugate", "inside a wider one"):
            continue
        given = {
            part: tensor if name in ("a negative view", "that requires a gradient") and not tensor.is_floating_point()
            else change(tensor)
            for part, tensor in weight.parts().items()
        }  # fmt: skip
        again, _ = ops.pack(case.name, given, weight.shape, weight.settings(), layout=case.layout)
        assert torch.equal(again, packed), name
        changed = change(bias)
        if not changed.is_contiguous():
            with pytest.raises(ValueError, match="bias is"):
                case.op.linear(x, packed, form, changed, "silu")
        elif not changed.requires_grad:
            assert same(case.op.linear(x, packed, form, changed, "silu"), expected), name


def methods() -> list[Method]:
    return [Int8(), Int4(), Int4(64, symmetric=True, activation_bits=16), Sparse(0.3), Sparse(0.3, "16x4", bits=8),
            LowRank(4, rank_guard=False), LowRank(4, rank_guard=False, residual=Int4())]  # fmt: skip


@pytest.mark.parametrize("method", methods(), ids=repr)
def test_gpt2(method: Any) -> None:
    """Its Conv1D keeps the weight [k, n]."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=100, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(100, (2, 7))
    with torch.no_grad():
        exact = model(tokens).logits
        for calibration in (None, pc.calibrate(model, [{"input_ids": tokens}])):
            made = pc.compress(model, {"transformer.h.*": method}, calibration=calibration)
            layers = [m for m in made.modules() if isinstance(m, pc.nn.CompressedLayer)]
            assert len(layers) == 4
            for layer in made.modules():
                if isinstance(layer, pc.nn.CompressedLayer):
                    x = torch.randn(3, layer.k)
                    expected = x @ layer.canonical().decompress().T + layer.bias32
                    expected = ops.DIFFERENTIABLE[layer.activation](expected)
                    torch.testing.assert_close(layer(x), expected, rtol=0.05, atol=0.05)
            y = made(tokens).logits
            assert y.shape == exact.shape and bool(y.isfinite().all())
