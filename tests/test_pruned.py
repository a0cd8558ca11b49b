"""Layers that torch.nn.utils.prune has pruned: taken with their masks, as they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import pycompress as pc
from pycompress import race
from pycompress.kinds import kind_of, pruned_names, without_pruning
from pycompress.methods import Int8, Sparse
from pycompress.model import compressed_layers
from pycompress.nn import Int8Linear, SparseLinear
from pycompress.records import LayerRecord

Same = Callable[[Tensor, Tensor], bool]
Snapshot = Callable[[nn.Module], Callable[[], bool]]


def records(model: nn.Module) -> dict[str, LayerRecord]:
    return {record.name: record for record in pc.summary(model).layers}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 8)).eval()


def pruned(amount: float = 0.8) -> nn.Sequential:
    """Layers "0" (weight and bias) and "2" (weight) are pruned, "4" is not."""
    model = net()
    prune.l1_unstructured(model[0], "weight", amount=amount)
    prune.l1_unstructured(model[0], "bias", amount=0.5)
    prune.l1_unstructured(model[2], "weight", amount=amount)
    return model


def removed(model: nn.Module) -> nn.Module:
    """The same model as prune.remove makes it."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name in pruned_names(module):
            prune.remove(module, name)
    return plain


def called(model: nn.Module) -> nn.Module:
    """After a call without gradients the products in a pruned module have no history, and deepcopy takes them."""
    with torch.no_grad():
        model(torch.zeros(1, 24))
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_what_was_pruned_stays_pruned(inplace: bool) -> None:
    model, x = pruned(), torch.randn(9, 24)
    expected, weights = model(x), {i: kind_of(model[i]).matrix(model[i]).clone() for i in (0, 2)}
    result = pc.compress(model, {"4": None, "*": Sparse()}, inplace=inplace)
    for i, weight in weights.items():
        assert isinstance(result[i], SparseLinear)
        assert torch.equal(result[i].weight, weight)
        assert result[i].density == pytest.approx(0.2, abs=0.001)
    assert int((result[0].bias == 0).sum()) == 20
    torch.testing.assert_close(result(x), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_of_the_pruning_is_left(inplace: bool) -> None:
    result = pc.compress(pruned(), Sparse(bits=8), inplace=inplace)
    assert not [name for name in result.state_dict() if name.endswith("_orig")]
    assert set(result.state_dict()) == {
        f"{i}.{name}" for i in (0, 2, 4) for name in ("sparse_mask", "sparse_values", "sparse_scale", "weight", "bias")
    }
    assert not any(module._forward_pre_hooks for module in result.modules())
    assert not list(result.parameters())


@pytest.mark.parametrize("method", [Int8(), Sparse(0.1), Sparse(0.1, bits=8), Sparse(0.1, scope="model")])
def test_it_is_compressed_as_if_the_masks_were_applied_for_good(method: Any, same: Same) -> None:
    model = called(pruned())
    result, expected = pc.compress(model, method), pc.compress(removed(model), method)
    x = torch.randn(5, 24)
    assert same(result(x), expected(x))
    assert result.state_dict().keys() == expected.state_dict().keys()
    assert [vars(r) for r in pc.summary(result).layers] == [vars(r) for r in pc.summary(expected).layers]


def test_the_masks_are_no_bytes_of_the_dense_model() -> None:
    model = pruned()
    dense = sum(p.numel() * p.element_size() for p in net().parameters())
    found = pc.summary(pc.compress(model, Sparse()))
    assert found.dense_bytes == dense
    assert found.layers[0].dense_bytes == 4 * (24 * 40 + 40)


def test_the_original_stays_as_it_was(snapshot: Snapshot) -> None:
    model = pruned()
    unchanged = snapshot(model)
    pc.compress(model, Sparse())
    assert unchanged()
    assert pruned_names(model[0]) == {"weight", "bias"}


def test_a_weight_that_was_trained_since_the_last_call(same: Same) -> None:
    """``weight`` is out of date then: the next call would make it anew."""
    model = called(pruned())
    with torch.no_grad():
        model[0].weight_orig.mul_(3)
        model[0].bias_orig.add_(1)
    result, x = pc.compress(model, Sparse()), torch.randn(5, 24)
    torch.testing.assert_close(result(x), model(x))


@pytest.mark.parametrize(
    "cut",
    [
        lambda m: prune.ln_structured(m, "weight", amount=0.5, n=2, dim=0),
        lambda m: prune.random_unstructured(m, "weight", amount=0.5),
        lambda m: prune.identity(m, "weight"),
        lambda m: prune.custom_from_mask(m, "weight", torch.rand(40, 24) < 0.1),
        lambda m: prune.global_unstructured([(m, "weight")], prune.L1Unstructured, amount=0.7),
        lambda m: prune.custom_from_mask(m, "weight", torch.zeros(40, 24)),
        lambda m: [prune.l1_unstructured(m, "weight", amount=0.5) for _ in range(3)],  # a container of methods
    ],
)
def test_ways_to_prune(cut: Callable[[nn.Module], Any]) -> None:
    model, x = net(), torch.randn(5, 24)
    cut(model[0])
    result = pc.compress(model, {"0": Sparse()})
    assert isinstance(result[0], SparseLinear)
    torch.testing.assert_close(result(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pruned_in_half_precision(dtype: torch.dtype) -> None:
    model = pruned().to(dtype)
    result = pc.compress(model, Sparse())
    assert torch.equal(result[0].weight, kind_of(model[0]).matrix(model[0]).float())
    assert result(torch.randn(2, 24, dtype=dtype)).dtype == dtype


def test_a_pruned_conv1d(same: Same) -> None:
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    model, x = nn.Sequential(utils.Conv1D(12, 24)), torch.randn(5, 24)
    prune.l1_unstructured(model[0], "weight", amount=0.75)
    result = pc.compress(model, Sparse())
    assert (result[0].nf, result[0].nx, result[0].density) == (12, 24, 0.25)
    torch.testing.assert_close(result(x), model(x))
    assert same(without_pruning(model[0])(x), model(x))


# --- what keeps a pruned layer dense ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_another_hook_keeps_the_layer(kind: str) -> None:
    model = pruned()
    getattr(model[0], kind)(lambda *arguments: None)
    result = pc.compress(model, Sparse())
    assert type(result[0]) is nn.Linear
    assert records(result)["0"].reason == "it has hooks, which would be lost"
    assert isinstance(result[2], SparseLinear)


def test_pruning_of_something_else_keeps_the_layer() -> None:
    model = net()
    model[0].gain = nn.Parameter(torch.ones(4))
    prune.random_unstructured(model[0], "gain", amount=0.5)
    assert "hooks" in records(pc.compress(model, Sparse()))["0"].reason


def test_weight_norm_is_no_pruning() -> None:
    model = net()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    with torch.no_grad():
        model(torch.randn(1, 24))
    assert "hooks" in records(pc.compress(model, Sparse()))["0"].reason


@pytest.mark.parametrize("plan", [{"0": Sparse()}, {"4": Sparse()}])
def test_pruned_layers_that_stay_can_be_copied(plan: Any, same: Same) -> None:
    """What autograd made of mask and weight cannot be deep-copied: torch makes it anew at the next call."""
    model, x = pruned(), torch.randn(3, 24)
    result = pc.compress(model, plan)
    torch.testing.assert_close(result(x), model(x))
    assert type(result[2]) is nn.Linear
    assert result[2].weight_orig is not model[2].weight_orig
    assert pruned_names(result[2]) == {"weight"}
    with torch.no_grad():
        result[2].weight_mask.zero_()
    assert not torch.equal(result(x), model(x)), "the copy's hook reads the copy's mask"


def test_a_pruned_convolution_beside_it() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    result, x = pc.compress(model, {"1": Sparse()}), torch.randn(2, 4, 8)
    torch.testing.assert_close(result(x), model(x))


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_nan_in_a_pruned_layer_is_refused(where: str, snapshot: Snapshot) -> None:
    model = pruned()
    with torch.no_grad():
        getattr(model[0], f"{where}_orig").view(-1)[0] = torch.nan
    modules = list(model.modules())
    for inplace in (False, True):
        with pytest.raises(ValueError, match=f"the {where} of 0 holds NaN or Inf"):
            pc.compress(model, Sparse(), inplace=inplace)
    assert list(model.modules()) == modules


# --- shared weights -----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 24)
        self.first, self.second, self.third = (nn.Linear(24, 24) for _ in range(3))
        self.second.weight = self.third.weight = self.first.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.third(self.second(self.first(self.embedding(tokens)).tanh()).tanh())
        return y


def test_a_pruned_head_of_an_embedding_stays_dense() -> None:
    model = Tied()
    model.third = nn.Linear(24, 24)
    model.third.weight = model.embedding.weight  # type: ignore[assignment]
    prune.l1_unstructured(model.third, "weight", amount=0.5)
    result = pc.compress(model, Sparse())
    assert records(result)["third"].reason == "its weight is shared with embedding: compressing it would add bytes"
    assert result.third.weight_orig is result.embedding.weight
    tokens = torch.arange(24)
    torch.testing.assert_close(result(tokens), model(tokens))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_tied_weight_that_is_masked_in_one_of_its_layers(inplace: bool, bits: int) -> None:
    """The layers share a parameter but do not compute with one weight."""
    model, tokens = Tied(), torch.arange(24)
    for name in ("second", "third"):
        prune.l1_unstructured(getattr(model, name), "weight", amount=0.5)
    expected = model(tokens)
    result = pc.compress(model, Sparse(bits=bits), inplace=inplace)
    assert result.second.packed is result.third.packed, "masked alike"
    assert result.first.packed is not result.second.packed
    assert (result.first.density, round(result.third.density, 1)) == (pytest.approx(1, abs=0.02), 0.5)
    torch.testing.assert_close(result(tokens), expected, rtol=1, atol=1e-5 if bits == 32 else 0.1)
    assert records(result)["third"].bytes == 4 * 24, "its bias"
    assert records(result)["second"].dense_bytes == 4 * 24


# --- measured, saved ----------------------------------------------------------------------------------------------------


def test_measured_against_the_weight_without_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Applying the mask at each call is no cost that a dense layer would have."""
    model, seen = pruned(), []

    def measured(first: Callable[[], Tensor], second: Callable[[], Tensor], **_: Any) -> tuple[float, float]:
        before = model[0].weight_orig._version, model[0].__dict__["weight"]
        torch.testing.assert_close(first(), second())
        assert (model[0].weight_orig._version, model[0].__dict__["weight"]) == before, "the hook did not run"
        seen.append(1)
        return 2.0, 1.0

    monkeypatch.setattr(race, "interleaved_us", measured)
    monkeypatch.setattr(race, "model_us", lambda *_: (2.0, 1.0))
    result = pc.compress(model, Sparse(), example_inputs=torch.randn(5, 24), only_if_faster=True)
    assert len(seen) == len(compressed_layers(result)) == 3
    assert len(model[0]._forward_pre_hooks) == 2


def test_without_pruning_leaves_the_layer_alone(snapshot: Snapshot) -> None:
    dense, x = pruned()[0], torch.randn(3, 24)
    unchanged = snapshot(dense)
    plain = without_pruning(dense)
    assert type(plain) is nn.Linear
    assert set(plain.state_dict()) == {"weight", "bias"}
    assert torch.equal(plain(x), dense(x))
    assert unchanged()
    assert without_pruning(plain) is plain


def test_a_file_fits_the_model_pruned_or_not(tmp_path: Path, same: Same) -> None:
    path, x = tmp_path / "model.safetensors", torch.randn(3, 24)
    model = pc.compress(pruned(), {"2": None, "*": Sparse()})
    pc.save(model, path)
    again = called(pruned(0.3))
    assert same(pc.load(again, path)(x), model(x))
    assert isinstance(again[0], SparseLinear)
    partly = net()
    prune.identity(partly[2], "weight")
    assert same(pc.load(partly, path)(x), model(x))
    with pytest.raises(ValueError, match=r"2\.weight"):
        pc.load(net(), path)  # "2" is dense and not pruned there


def test_int8_of_a_pruned_layer() -> None:
    model = pruned()
    result = pc.compress(model, {"0": Int8()})
    assert isinstance(result[0], Int8Linear)
    assert int((result[0].weight == 0).sum()) >= 768
