"""The embeddings of text encoders of transformers, read into one op (:mod:`pycompress.nn.embeddings`)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.nn.assigned import assign, assigned, original_class, restore
from pycompress.nn.embeddings import Embeddings, reads

# By the names of module and class, because the package need not be installed: whether positions are counted from the padding.
FAMILIES = {
    ("bert", "BertEmbeddings"): False,
    ("electra", "ElectraEmbeddings"): False,
    ("albert", "AlbertEmbeddings"): False,
    ("distilbert", "Embeddings"): False,
    ("roberta", "RobertaEmbeddings"): True,
    ("xlm_roberta", "XLMRobertaEmbeddings"): True,
    ("camembert", "CamembertEmbeddings"): True,
    ("mpnet", "MPNetEmbeddings"): True,
}
_KNOWN = {(f"transformers.models.{name}.modeling_{name}", kind): counts for (name, kind), counts in FAMILIES.items()}


def install(model: nn.Module) -> None:
    """Has the embeddings that can be read run as one op, where they then give what they gave before."""
    for module in [*model.modules()]:
        found = read(module)
        if found is not None:
            assign(module, found)
            if not _agrees(module):
                restore(module)


def read(module: nn.Module) -> Embeddings | None:
    """None where they are of no family that is known."""
    counts = _KNOWN.get((type(module).__module__, type(module).__qualname__))
    if counts is None or assigned(module) is not None or "forward" in vars(module):
        return None
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    return Embeddings(names, counts) if reads(module, names) else None


def _agrees(module: nn.Module) -> bool:
    """Whether the op gives what the original forward gives, of random tokens with and without types and positions."""
    training = {one: one.training for one in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            return all(_alike(module, call) for call in _calls(module))
    except Exception:  # it takes other arguments, or other children
        return False
    finally:
        for one, before in training.items():
            one.training = before


def _calls(module: nn.Module) -> list[Mapping[str, Tensor]]:
    generator = torch.Generator(device="cpu").manual_seed(0)

    def draw(table: str) -> Tensor:
        return torch.randint(
            0, getattr(module, table).num_embeddings, (2, 7), generator=generator, dtype=torch.int64, device="cpu"
        )

    tokens = draw("word_embeddings")
    tokens[0, 5:] = tokens[1, 2] = getattr(module, "padding_idx", 0) or 0
    more = {"position_ids": draw("position_embeddings")}
    if hasattr(module, "token_type_embeddings"):
        more["token_type_ids"] = draw("token_type_embeddings")
    return [{"input_ids": tokens}, {"input_ids": tokens, **more}]


def _alike(module: nn.Module, call: Mapping[str, Any]) -> bool:
    expected, found = original_class(module).forward(module, **call), assigned(module)(module, (), call)
    if found is None or (found[0].dtype, found[0].shape) != (expected.dtype, expected.shape):
        return False
    steps = 64 if expected.dtype == torch.float32 else 16  # the original rounds in between
    bound = steps * torch.finfo(expected.dtype).eps * float(expected.abs().amax())
    return bool((found[0].double() - expected.double()).abs().amax() <= bound)
