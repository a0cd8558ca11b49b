"""Small models of each family of blocks, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn.assigned import restore
from pycompress.nn.block import Block, block_of

Inputs = dict[str, Any]


class Case(NamedTuple):
    """A model, how its blocks are called, and inputs by what they show."""

    make: Callable[[], nn.Module]
    family: str
    inputs: Callable[[int, int], Inputs]  # of a batch and a length
    masked: Callable[[int, int], Inputs] | None = None  # the same, with padding


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, which gives a tuple as transformers' models do."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, **keywords)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, **keywords: Any) -> tuple[Tensor]:
        return (self.layers(x, **keywords),)


def transformers() -> Any:
    import pytest

    return pytest.importorskip("transformers")


def hidden(**keywords: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return {**sizes, "vocab_size": 96, **keywords}


def of(model: str, **keywords: Any) -> Callable[[], nn.Module]:
    """A model of transformers, from its config."""

    def make() -> nn.Module:
        library = transformers()
        config = getattr(library, model.replace("Model", "Config").replace("EncoderConfig", "Config"))
        return getattr(library, model)(config(**keywords))  # type: ignore[no-any-return]

    return make


def tokens(batch: int, length: int) -> Inputs:
    return {"input_ids": torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(0))}


def padded(batch: int, length: int) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[: batch // 2, length // 2 + 1 :] = 0
    return {**tokens(batch, length), "attention_mask": mask}


def images(batch: int, _length: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def sounds(batch: int, _length: int) -> Inputs:
    return {"input_features": torch.randn(batch, 8, 18, generator=torch.Generator().manual_seed(0))}


def rows(batch: int, length: int) -> Inputs:
    return {"x": torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(0))}


def rows_padded(batch: int, length: int) -> Inputs:
    return {**rows(batch, length), "src_key_padding_mask": padded(batch, length)["attention_mask"] == 0}


def turned(make: Callable[[int, int], Inputs]) -> Callable[[int, int], Inputs]:
    """x as [length, batch, d]."""
    return lambda batch, length: {**(given := make(batch, length)), "x": given["x"].transpose(0, 1)}


def causal(batch: int, length: int) -> Inputs:
    return {**rows(batch, length), "mask": nn.Transformer.generate_square_subsequent_mask(length), "is_causal": True}


def whisper() -> nn.Module:
    library = transformers()
    config = library.WhisperConfig(
        vocab_size=96, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=9, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return library.WhisperModel(config).encoder  # type: ignore[no-any-return]


_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_DISTILBERT = {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
_IMAGES = hidden(image_size=16, patch_size=4)
CASES = {
    "encoder layer": Case(lambda: Encoder(batch_first=True), "encoder layer", rows, rows_padded),
    "encoder layer causal": Case(lambda: Encoder(batch_first=True, activation=nn.GELU()), "encoder layer", rows, causal),
    "encoder layer pre-norm": Case(
        lambda: Encoder(norm_first=True, activation="gelu", layer_norm_eps=1e-3), "encoder layer", turned(rows), turned(rows_padded)
    ),
    "BERT": Case(of("BertModel", **hidden()), "bert", tokens, padded),
    "RoBERTa": Case(of("RobertaModel", **hidden()), "bert", tokens, padded),
    "XLM-R": Case(of("XLMRobertaModel", **hidden()), "bert", tokens, padded),
    "ELECTRA": Case(of("ElectraModel", **hidden(embedding_size=32)), "bert", tokens, padded),
    "DistilBERT": Case(of("DistilBertModel", **_DISTILBERT), "distilbert", tokens, padded),
    "MPNet": Case(of("MPNetModel", **hidden()), "mpnet", tokens, padded),
    "ALBERT": Case(of("AlbertModel", **hidden(embedding_size=32)), "albert", tokens, padded),
    "ViT": Case(of("ViTModel", **_IMAGES), "vit", images),
    "CLIP vision": Case(of("CLIPVisionModel", **_IMAGES), "clip", images),
    "CLIP text": Case(of("CLIPTextModel", **hidden(bos_token_id=1, eos_token_id=2)), "clip", tokens, padded),
    "Whisper": Case(whisper, "whisper", sounds),
    "T5": Case(of("T5EncoderModel", **_T5), "t5", tokens, padded),
    "T5 gated": Case(of("T5EncoderModel", **_T5, feed_forward_proj="gated-gelu"), "t5", tokens, padded),
}  # fmt: skip


def build(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return CASES[name].make().eval()


def blocks_alone(model: nn.Module) -> None:
    """Has what stands around the blocks run as it did before."""
    for module in model.modules():
        if block_of(module) is None:
            restore(module)


def pair(name: str, method: Any) -> tuple[Any, Any]:
    """The compressed model without blocks, and with them (and nothing around them)."""
    model = build(name)
    with_blocks = pc.compress(model, method)
    blocks_alone(with_blocks)
    return pc.compress(model, method, blocks=False), with_blocks


def blocks(model: nn.Module) -> dict[str, Block]:
    return {name: block for name, module in model.named_modules() if (block := block_of(module)) is not None}
