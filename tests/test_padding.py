"""Padding left out: zeros there, and everywhere else what each sequence gives alone, to the bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import CASES, build
from test_block_ops import HEADS, KERNELS, METHODS, D, Made, by, made, native
from torch import Tensor

import pycompress as pc
from pycompress import ops

LENGTHS = (7, 1, 33, 0, 12, 33, 2, 26, 5)
LENGTH = 33
LONG = (7, 33, 12, 2, 26, 5)  # (a causal mask of no more than one token is one of keys)


def skipping(block: Made) -> Made:
    return block[0], block[1].replace(" causal=0", " causal=0 skip_padding=1").replace(
        " causal=1", " causal=1 skip_padding=1"
    ), block[2]  # fmt: skip


def shown(side: str, of: tuple[int, ...] = LENGTHS) -> Tensor:
    """bool [sequences, LENGTH]: which tokens there are."""
    lengths, at = torch.tensor(of)[:, None], torch.arange(LENGTH)
    if side == "right":
        return at < lengths
    if side == "left":
        return at >= LENGTH - lengths
    order = torch.rand(len(of), LENGTH, generator=torch.Generator().manual_seed(4)).argsort(1)
    return (at < lengths).gather(1, order)


def alone(x: Tensor, seen: Tensor, block: Made, bias: Tensor | None = None) -> Tensor:
    """Each sequence by itself, without its padding; zeros there."""
    y = torch.zeros_like(x)
    for i, own in enumerate(seen):
        if own.any():
            of_pairs = None if bias is None else bias[..., own, :][..., own]
            y[i, own] = native(x[i : i + 1, own], block, None, of_pairs, threads=1)[0]
    return y


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("side", ["right", "left", "scattered"])
def test_the_bits_of_each_sequence_alone(method: Any, side: str) -> None:
    block = made(method)
    seen, x = shown(side), torch.randn(len(LENGTHS), LENGTH, D)
    x[~seen] = torch.nan  # is not read
    for some in (
        slice(0, 9),
        slice(2, 3),
        slice(3, 4),
        slice(0, 2),
        slice(1, 5),
    ):  # rows, heads or sequences shared out
        expected = alone(x[some], seen[some], block)
        for threads in (1, 2, 3, 7):
            y = native(x[some], skipping(block), seen[some, None, None], threads=threads)
            assert torch.equal(y, expected), (some, threads)


@pytest.mark.parametrize("kernel", ["", *KERNELS])
@pytest.mark.parametrize("side", ["right", "left", "scattered"])
def test_masks_of_all_kinds_and_biases(kernel: str, side: str) -> None:
    block = made(pc.Int8(), causal=True, pre_norm=True)
    seen, x = shown(side), torch.randn(len(LENGTHS), LENGTH, D)
    bias = torch.randn(1, HEADS, LENGTH, LENGTH)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None, None]
    pairs = added.expand(-1, 1, LENGTH, -1).contiguous()
    with by(kernel):
        expected = alone(x, seen, block, bias)
        masks = [added, added.bfloat16(), pairs, pairs.expand(-1, HEADS, -1, -1).contiguous(), pairs.mT.contiguous().mT]
        for mask in masks:
            assert torch.equal(native(x, skipping(block), mask, bias), expected)
        assert torch.equal(native(x, skipping(block), added, bias.bfloat16()), alone(x, seen, block, bias.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    block = made(pc.Int8())
    seen, x = shown("left"), torch.randn(len(LENGTHS), LENGTH, D).to(dtype)
    assert torch.equal(native(x, skipping(block), seen[:, None, None]), alone(x, seen, block))


def _causal(mask: Tensor) -> Tensor:
    return (mask & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()).contiguous()


OTHERS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda _: None,
    "of queries": _causal,
    "of heads": lambda mask: mask & (torch.arange(LENGTH) != torch.arange(HEADS)[:, None])[:, None],
    "weights of keys": lambda mask: torch.where(mask, 0.5, -torch.inf),
    "nothing hidden": lambda mask: torch.zeros_like(mask, dtype=torch.float32),
}


@pytest.mark.parametrize("what", OTHERS)
def test_any_other_mask_is_no_padding(what: str) -> None:
    block = made(pc.Int8())
    x, mask = torch.randn(len(LONG), LENGTH, D), OTHERS[what](shown("right", LONG)[:, None, None])
    assert torch.equal(native(x, skipping(block), mask), native(x, block, mask))


def test_each_sequence_has_a_mask_of_its_own() -> None:
    block = made(pc.Int8())
    x, seen = torch.randn(len(LONG), LENGTH, D), shown("right", LONG)
    mask = _causal(seen[:, None, None])
    mask[-1] = seen[-1]
    y, full = native(x, skipping(block), mask), native(x, block, mask)
    assert torch.equal(y[:-1], full[:-1])
    assert torch.equal(y[-1, seen[-1]], full[-1, seen[-1]]) and not y[-1, ~seen[-1]].any()


@pytest.mark.parametrize("what", [*OTHERS, "padding"])
def test_the_twin_skips_the_same(what: str) -> None:
    block = skipping(made(pc.Int8(activation_bits=16)))
    x, mask = torch.randn(len(LONG), LENGTH, D), shown("scattered", LONG)[:, None, None]
    mask = OTHERS[what](mask) if what in OTHERS else mask
    y, twin = native(x, block, mask), ops.cpu.block.twin(x, mask, None, *block[:2])
    assert torch.equal(y == 0, twin == 0) and bool((y == 0).any()) == (what == "padding")
    torch.testing.assert_close(y, twin, rtol=3e-5, atol=3e-5)


# --- models -------------------------------------------------------------------------------------------------------------

ENCODERS = ["encoder layer", "encoder layer pre-norm", "BERT", "DistilBERT", "MPNet", "T5"]


@pytest.mark.parametrize("name", ENCODERS)
def test_models_give_each_sequence_alone(name: str) -> None:
    case, dense = CASES[name], build(name)
    assert case.masked is not None
    model, full = pc.compress(dense, pc.Int8(), skip_padding=True), pc.compress(dense, pc.Int8())
    inputs = case.masked(3, 9)
    with torch.inference_mode():
        y, expected = model(**inputs)[0], full(**inputs)[0]
    skipped = (y == 0).all(-1)
    assert not (expected == 0).all(-1).any()
    assert skipped.any() and not skipped.all()
    assert torch.equal(y[~skipped], expected[~skipped])


def test_what_is_left_of_a_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    dense = build("BERT")
    model = pc.compress(dense, pc.Int8(), skip_padding=True)
    tokens = torch.randint(2, 30, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = mask[2, :2] = 0
    mask[1] = 0
    with torch.inference_mode():
        y = model(tokens, mask).last_hidden_state
        assert torch.equal(y[0, :5], model(tokens[:1, :5]).last_hidden_state[0])
        assert torch.equal((y == 0).all(-1), mask == 0)
        assert isinstance(model, transformers.BertModel)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(tokens, attention_mask=mask).last_hidden_state, y)
        exported = torch.export.export(model, (tokens, mask)).module()
        assert torch.equal(exported(tokens, mask).last_hidden_state, y)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(tokens, mask).last_hidden_state, y)
        pc.save(model, tmp_path / "m.safetensors")
        loaded = pc.load(build("BERT", seed=1), tmp_path / "m.safetensors", skip_padding=True)
        assert torch.equal(loaded(tokens, mask).last_hidden_state, y)
        plain = pc.load(build("BERT", seed=1), tmp_path / "m.safetensors")
        assert not (plain(tokens, mask).last_hidden_state[2] == 0).any()
        assert torch.equal(
            pc.load(model, tmp_path / "m.safetensors")(tokens, mask).last_hidden_state,
            plain(tokens, mask).last_hidden_state,
        )


def test_the_summary_says_so() -> None:
    model = pc.compress(build("BERT"), pc.Int8(), skip_padding=True)
    assert "encoder.layer.0: BertLayer runs as one op (bert, padding skipped)" in str(pc.summary(model))
    assert all(one.skips_padding for one in pc.summary(model).blocks)


def test_only_blocks_skip_padding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compress: skip_padding=True and blocks=False, expected blocks"):
        pc.compress(build("BERT"), pc.Int8(), blocks=False, skip_padding=True)
    with pytest.raises(ValueError, match="load: skip_padding=True"):
        pc.load(build("BERT"), tmp_path / "none", blocks=False, skip_padding=True)


def test_embeddings_of_sentences_stay() -> None:
    """Means over the mask see no padding."""
    dense = build("BERT")
    tokens = torch.randint(2, 30, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = mask[2, :2] = 0
    with torch.inference_mode():
        y, expected = (
            ops.pool(pc.compress(dense, pc.Int8(), skip_padding=skip)(tokens, mask).last_hidden_state, mask)
            for skip in (True, False)
        )
    assert torch.equal(y, expected)
