"""``shrink``: neurons, heads and blocks of transformers; what it asks, what it leaves, and what becomes of the smaller model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.structure.pace import share_for

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 32,
    "initializer_range": 0.2,
}  # fmt: skip
TOKENS = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
MASK[0, 5:] = 0
BATCH = {"input_ids": TOKENS, "attention_mask": MASK}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def bert(**other: Any) -> Any:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SIZES, **other)).eval()


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **sizes)).eval()


def distilbert() -> Any:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32, initializer_range=0.2
    )
    return transformers.DistilBertModel(config).eval()


MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (bert, BATCH), "distilbert": (distilbert, BATCH), "vit": (vit, {"pixel_values": IMAGES}),
}  # fmt: skip


def result(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).last_hidden_state
    return found


def closeness(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).mean())


@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_model_is_a_dense_model(name: str, tmp_path: Path) -> None:
    """In every way in which a model is used; the one passed in is as it was."""
    make, batch = MODELS[name]
    dense = make()
    state = copy.deepcopy(dense.state_dict())
    seen = pc.calibrate(dense, [batch])
    small = pc.shrink(dense, neurons=0.5, heads=0.5, calibration=seen, example_inputs=batch)

    assert all(torch.equal(one, dense.state_dict()[key]) for key, one in state.items())
    records = pc.Cut.of(small).records
    assert {(r.kind, r.before) for r in records} == {("neurons", 64), ("heads", 4)}
    assert sum(r.after for r in records if r.kind == "neurons") == 64
    assert sum(r.after for r in records if r.kind == "heads") == 4
    assert all(r.after >= 1 for r in records)
    expected = result(small, batch)
    assert closeness(expected, result(dense, batch)) > 0.5
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(result(again, batch), expected)
        assert pc.Cut.of(again) == pc.Cut.of(small)
    small.train()(**batch).last_hidden_state.sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in small.parameters())
    small.eval()

    fresh = pc.Cut.from_json(pc.Cut.of(small).to_json()).apply(make())
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(result(fresh, batch), expected)

    packed = pc.compress(small, pc.Int8())
    assert closeness(result(packed, batch), expected) > 0.99
    pc.save(packed, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="load"):
        pc.load(make(), tmp_path / "small.safetensors")
    loaded = pc.load(pc.Cut.of(packed).apply(make()), tmp_path / "small.safetensors")
    assert torch.equal(result(loaded, batch), result(packed, batch))


def test_blocks_of_a_smaller_model_run_as_one_op() -> None:
    from pycompress.passes.blocks import blocks_of

    small = pc.shrink(bert(), neurons=0.5, heads=0.75)
    packed = pc.compress(small, pc.Int8())
    heads = [one.description.form.heads for one in blocks_of(packed).values()]
    if not heads:
        pytest.skip("no native block runs here")
    assert heads == [one.attention.self.num_attention_heads for one in small.encoder.layer]
    assert sum(heads) == 6


def test_numbers_say_what_the_tensors_are() -> None:
    small = pc.shrink(bert(), heads={"*.0.*": 0.25, "*": 0.5}, neurons=0.25)
    for layer, heads in zip(small.encoder.layer, (1, 2), strict=True):
        attention = layer.attention.self
        assert attention.num_attention_heads == heads
        assert attention.all_head_size == attention.query.out_features == attention.query.weight.shape[0] == 8 * heads
        assert attention.attention_head_size == 8
        assert layer.attention.output.dense.in_features == 8 * heads
        assert (
            layer.intermediate.dense.out_features
            == layer.output.dense.in_features
            == layer.output.dense.weight.shape[1]
        )


def test_what_adds_nothing_goes_and_costs_nothing() -> None:
    """Neurons that are never on, and heads that are copies of others."""
    dense = bert()
    with torch.no_grad():
        for layer in dense.encoder.layer:
            layer.output.dense.weight[:, 40:] = 0.0
            layer.attention.output.dense.weight[:, 8:24] = 0.0
    seen = pc.calibrate(dense, [BATCH])
    small = pc.shrink(dense, neurons=40 / 64, heads=0.5, calibration=seen)
    assert [r.after for r in pc.Cut.of(small).records] == [40, 40, 2, 2]
    torch.testing.assert_close(result(small, BATCH), result(dense, BATCH), atol=1e-5, rtol=1e-5)


def test_fitting_makes_good_what_copies_say() -> None:
    dense = bert()
    with torch.no_grad():
        for layer in dense.encoder.layer:
            for name in ("weight", "bias"):
                own = getattr(layer.intermediate.dense, name)
                own[32:] = own[:32]
    seen = pc.calibrate(dense, [{"input_ids": torch.randint(1, 50, (16, 16))}])
    expected = result(dense, BATCH)
    fitted, cut = (result(pc.shrink(dense, neurons=0.5, calibration=one), BATCH) for one in (seen, None))
    assert (fitted - expected).norm() < 0.2 * (cut - expected).norm()


def test_fisher_holds_what_the_results_need() -> None:
    dense = bert()
    with torch.no_grad():  # the second block's MLP counts for nothing
        dense.encoder.layer[1].output.LayerNorm.weight[:16] = 0.0
    batches = [BATCH] * 4
    counts = pc.fisher(dense, batches)
    assert counts["encoder.layer.1.output.dense"].shape == (32,)
    labelled = pc.fisher(dense, [(BATCH, 1.0)], lambda found, target: (found.last_hidden_state.mean() - target) ** 2)
    assert labelled.keys() == counts.keys() - {"pooler.dense"}
    seen = pc.calibrate(dense, batches)
    small = pc.shrink(dense, neurons=0.5, calibration=seen, fisher=counts)
    assert sum(r.after for r in pc.Cut.of(small).records) == 64
    assert all(p.grad is None for p in dense.parameters())
    with pytest.raises(ValueError, match=r"output.dense is missing"):
        pc.shrink(dense, neurons=0.5, fisher={})


def test_whole_blocks_go_and_the_names_close_up() -> None:
    dense = bert()
    with torch.no_grad():
        block = dense.encoder.layer[0]
        block.attention.output.dense.weight.zero_()
        block.output.dense.weight.zero_()
    small = pc.shrink(dense, blocks=0.5, example_inputs=BATCH)
    assert len(small.encoder.layer) == small.config.num_hidden_layers == 1
    assert dense.config.num_hidden_layers == 2
    assert torch.equal(small.encoder.layer[0].output.dense.weight, dense.encoder.layer[1].output.dense.weight)
    fresh = pc.Cut.from_json(pc.Cut.of(small).to_json()).apply(bert())
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(result(fresh, BATCH), result(small, BATCH))
    twice = pc.shrink(small, neurons=0.5)  # and what is left shrinks further
    again = pc.Cut.of(twice).apply(bert())
    again.load_state_dict(twice.state_dict())
    assert torch.equal(result(again, BATCH), result(twice, BATCH))


def test_blocks_go_by_their_names() -> None:
    dense = bert()
    small = pc.shrink(dense, blocks=["encoder.layer.1"])
    expected = pc.Cut.without("encoder.layer.1").apply(bert())
    assert pc.Cut.of(small) == pc.Cut.of(expected) and torch.equal(result(small, BATCH), result(expected, BATCH))
    (record,) = pc.Cut.of(pc.shrink(dense, blocks=["encoder.layer.1"], example_inputs=BATCH)).records
    assert (record.name, record.before, record.after) == ("encoder.layer.*", 2, 1) and record.loss > 0
    assert pc.shrunk(dense, [], [BATCH]) is dense
    assert pc.Cut.of(pc.shrunk(dense, [{"blocks": ["encoder.layer.1"]}, {"neurons": 0.5}], [BATCH])).steps[0].modules


def test_a_student_has_the_blocks_that_stay() -> None:
    teacher = bert()
    student: Any = pc.Cut.without("encoder.layer.0").apply(copy.deepcopy(teacher))
    assert len(student.encoder.layer) == student.config.num_hidden_layers == 1
    layer, other = student.encoder.layer[0].state_dict(), teacher.encoder.layer[1].state_dict()
    assert all(torch.equal(value, other[name]) for name, value in layer.items())
    assert pc.Cut.from_json(pc.Cut.of(student).to_json()) == pc.Cut.without("encoder.layer.0")


def test_encoder_layers_of_torch_lose_neurons_and_keep_heads() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    small = pc.shrink(dense, neurons=0.5, example_inputs=x)
    assert sum(one.linear1.out_features for one in small.layers) == 32
    assert small(x).shape == x.shape
    with pytest.raises(ValueError, match="as many features for its heads as its input"):
        pc.shrink(dense, heads=0.5)


def test_what_is_left_is_named() -> None:
    dense = bert()
    dense.encoder.layer[0].output.dense.weight = dense.encoder.layer[1].output.dense.weight
    nn.utils.prune.l1_unstructured(dense.encoder.layer[1].intermediate.dense, "weight", 0.1)
    with pytest.raises(ValueError, match="shares a parameter"):
        pc.shrink(dense, neurons=0.5)
    left = pc.Cut.of(pc.shrink(dense, heads={"*.0.*": 0.5, "*": None})).left
    assert not left
    one = bert()
    nn.utils.prune.l1_unstructured(one.encoder.layer[1].intermediate.dense, "weight", 0.1)
    small = pc.shrink(one, neurons=0.5)
    assert ["masked by torch.nn.utils.prune" in one.reason for one in pc.Cut.of(small).left] == [True]
    assert "masked by" in str(pc.Cut.of(small))


def test_the_same_bits_for_every_number_of_threads() -> None:
    dense = bert()
    seen = pc.calibrate(dense, [BATCH])
    before = torch.get_num_threads()
    states = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            states.append(pc.shrink(dense, neurons=0.5, heads=0.5, calibration=seen).state_dict())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())


def test_a_share_for_a_time() -> None:
    assert share_for(2.0, lambda share: 1 / max(share, 0.1)) == pytest.approx(0.5, abs=1 / 64)
    with pytest.raises(ValueError, match=r"1\.50 times as fast"):
        share_for(2.0, lambda _: 1.5)


def test_speedup_shares_out_over_neurons_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_size(dense: nn.Module, small: nn.Module, _: Any) -> float:
        count = [sum(p.numel() for p in one.encoder.parameters()) for one in (dense, small)]  # type: ignore[union-attr]
        return count[0] / count[1]

    monkeypatch.setattr("pycompress.structure.shrinking.speedup_of", by_size)
    dense = bert()
    small = pc.shrink(dense, neurons=True, heads=True, speedup=1.5, example_inputs=BATCH)
    assert 1.5 <= by_size(dense, small, None) < 1.65


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "is needed"),
        ({"neurons": 0.0}, "neurons is 0.0"),
        ({"neurons": True}, "need each other"),
        ({"neurons": 0.5, "speedup": 2.0}, "need each other"),
        ({"channels": 0.5}, "needs example_inputs"),
        ({"blocks": 0.5, "neurons": 0.5, "example_inputs": BATCH}, "a call of their own"),
        ({"neurons": {"nothing": 0.5}}, "'nothing' matches nothing"),
        ({"blocks": []}, "blocks is \\[\\], expected a share, {glob: share}, or a list of names"),
        ({"blocks": "encoder.layer.0"}, "blocks is 'encoder.layer.0', expected a share"),
        ({"blocks": ["encoder.layer.2"]}, "blocks has 'encoder.layer.2', expected different members"),
        (
            {"blocks": ["encoder.layer.0", "encoder.layer.1"]},
            "blocks has all members of encoder.layer, expected one to stay",
        ),
        ({"blocks": {"nothing": 0.5}, "example_inputs": BATCH}, "'nothing' matches no block"),
        ({"neurons": 0.5, "calibration": {}}, "never saw encoder.layer.0.output.dense"),
    ],
)
def test_what_does_not_fit_is_said(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pc.shrink(bert(), **arguments)


def test_compressed_models_and_others_are_refused() -> None:
    with pytest.raises(TypeError, match="model is int"):
        pc.shrink(3, neurons=0.5)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="is compressed"):
        pc.shrink(pc.compress(bert(), pc.Int8()), neurons=0.5)


def test_a_cut_fits_one_architecture() -> None:
    cut = pc.Cut.of(pc.shrink(bert(), neurons=0.5))
    small = cut.apply(bert())
    with pytest.raises(ValueError, match="smaller already"):
        cut.apply(small)
    other = vit()
    with pytest.raises(ValueError, match="not of the architecture"):
        cut.apply(other)
    assert not pc.Cut.of(other).steps
    with pytest.raises(ValueError, match="none of to_json"):
        pc.Cut.from_json("[]")
