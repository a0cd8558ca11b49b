"""Poolings of sentence-transformers, read into one op (:mod:`pycompress.nn.pooling`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pycompress.nn.assigned import assign, assigned, original_class, restore
from pycompress.nn.pooling import normalized, pooled

# By the names of module and class, because the package need not be installed.
_KNOWN = {
    ("sentence_transformers.sentence_transformer.modules.pooling", "Pooling"): pooled,
    ("sentence_transformers.base.modules.normalize", "Normalize"): normalized,
}


def install(model: nn.Module) -> None:
    """Has means of tokens, and what normalizes them, run as one op, where that then gives what it gave before."""
    for module in [*model.modules()]:
        call = _KNOWN.get((type(module).__module__, type(module).__qualname__))
        if call is not None and assigned(module) is None and "forward" not in vars(module):
            assign(module, call)
            if not _agrees(module):
                restore(module)


def _agrees(module: nn.Module) -> bool:
    """Whether the op gives what the original forward gives, of random features."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    tokens = torch.randn((3, 5, 8), generator=generator, dtype=torch.float32, device="cpu")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.int64, device="cpu")
    given = {"token_embeddings": tokens, "attention_mask": mask, "sentence_embedding": tokens[:, 0]}
    try:
        with torch.no_grad():
            expected: dict[str, Tensor] = original_class(module).forward(module, dict(given))
            found: dict[str, Tensor] = module.forward(dict(given))
    except Exception:  # it takes other arguments
        return False
    return expected.keys() == found.keys() and all(
        torch.allclose(found[one], expected[one], atol=1e-5) for one in expected
    )
