"""A model whose parts have every weight that a target may be asked to carry, each with an output of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods.method import Method

STATIC = pc.Int8(activation="static", observer=pc.Known(-4, 4))
GUARDLESS = pc.LowRank(4, decomposition="spatial", rank_guard=False)

LINEAR: dict[str, Method] = {
    "int8": pc.Int8(),
    "seven": pc.Int8(activation_bits=7),
    "weights": pc.Int8(activation_bits=16),
    "static": STATIC,
    "int4": pc.Int4(group=32, symmetric=True),
    "int4_wide": pc.Int4(group=64, symmetric=True),
    "zero_points": pc.Int4(group=32),
    "int4_weights": pc.Int4(group=64, symmetric=True, activation_bits=16),
    "sparse": pc.Sparse(density=0.3),
    "sparse_int8": pc.Sparse(density=0.3, bits=8, activation_bits=8),
    "low_rank": pc.LowRank(8),
    "low_rank_int8": pc.LowRank(8, bits=8, activation_bits=8),
    "beside": pc.LowRank(8, residual=pc.Int8()),
}
CONVOLUTIONS: dict[str, tuple[nn.Module, Method]] = {
    "conv": (nn.Conv2d(8, 12, 3, stride=2, padding=1), pc.Int8()),
    "fixed": (nn.Conv2d(8, 12, 1), pc.Int8(activation="static", observer=pc.Known(-16, 16))),
    "groups": (nn.Conv2d(8, 12, 3, padding=1, groups=2), pc.Int8()),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), pc.Int8()),
    "uneven": (nn.Conv2d(8, 12, (4, 3), padding="same"), pc.Int8()),
    "sparse_conv": (nn.Conv2d(8, 12, 3, padding=1), pc.Sparse(density=0.3)),
    "spatial": (nn.Conv2d(8, 12, 3, padding=1), GUARDLESS),
}
SEQUENCES: dict[str, tuple[nn.Module, Method]] = {"sequence": (nn.Conv1d(8, 12, 3, padding=1), pc.Int8())}
LOOKUPS: dict[str, Method] = {
    "rows": pc.Int8(embeddings=True),
    "narrow": pc.LowRank(8, embeddings=True),
}
NAMES = [*LINEAR, *CONVOLUTIONS, *SEQUENCES, *LOOKUPS]


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in LINEAR:
            self.add_module(name, nn.Linear(64, 48))
        for name, (layer, _) in (CONVOLUTIONS | SEQUENCES).items():
            self.add_module(name, layer)
        for name in LOOKUPS:
            self.add_module(name, nn.Embedding(50, 32))

    def forward(self, x: Tensor, image: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        own = dict(self.named_children())
        results = [own[name](x) for name in LINEAR]
        results += [own[name](image) for name in CONVOLUTIONS]
        results += [own[name](image.flatten(2)) for name in SEQUENCES]
        return (*results, *(own[name](tokens) for name in LOOKUPS))


def parts() -> nn.Module:
    """Compressed."""
    torch.manual_seed(0)
    methods = LINEAR | {name: method for name, (_, method) in (CONVOLUTIONS | SEQUENCES).items()} | LOOKUPS
    return pc.compress(Parts().eval(), methods)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 64, generator=generator)
    image = torch.randn(3, 8, 10, 9, generator=generator) * torch.tensor([1.0, 4.0, 0.2]).view(3, 1, 1, 1)
    return x, image, torch.randint(50, (2, 6), generator=generator)


def errors(found: list[Tensor], expected: tuple[Tensor, ...]) -> dict[str, float]:
    """Of each part: ||found - expected|| / ||expected||."""
    pairs = zip(NAMES, found, expected, strict=True)
    return {name: float((a - b).norm() / b.norm()) for name, a, b in pairs}
