"""Twins give what their layers give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn import CompressedLayer
from pycompress.surgery import compressed_layers
from pycompress.targets.source import Source
from pycompress.targets.twins import twin_of

WEIGHT_ONLY = pc.Int8(activation_bits=16)
ROWS, IMAGE, SEQUENCE = (3, 40), (2, 6, 9, 10), (2, 6, 11)
CASES = {
    "int8": (nn.Linear(40, 24), WEIGHT_ONLY, ROWS),
    "int4": (nn.Linear(40, 24), pc.Int4(group=32, activation_bits=16), (2, *ROWS)),
    "int4 symmetric": (nn.Linear(40, 24, bias=False), pc.Int4(group=32, symmetric=True, activation_bits=16), ROWS),
    "sparse": (nn.Linear(40, 24), pc.Sparse(density=0.3), ROWS),
    "low rank": (nn.Linear(40, 24), pc.LowRank(8), ROWS),
    "low rank beside sparse": (nn.Linear(40, 24), pc.LowRank(8, residual=pc.Sparse(density=0.2)), ROWS),
    "sparse conv": (nn.Conv2d(6, 8, 3, stride=2, padding=1), pc.Sparse(density=0.3), IMAGE),
    "low rank conv": (nn.Conv2d(6, 8, 3, padding=1), pc.LowRank(4, decomposition="spatial"), IMAGE),
    "tucker": (
        nn.Conv2d(6, 8, 3, stride=2, padding="valid"),
        pc.LowRank(3, decomposition="tucker", rank_guard=False),
        IMAGE[1:],
    ),
    "same": (nn.Conv2d(6, 8, (4, 3), padding="same", dilation=2), pc.Sparse(density=0.3), IMAGE),
    "reflected": (nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect"), pc.Sparse(density=0.3), IMAGE),
    "sequence": (nn.Conv1d(6, 8, 3, padding=1), pc.Sparse(density=0.3), SEQUENCE),
    "one sequence": (nn.Conv1d(6, 8, 4, padding="same"), pc.Sparse(density=0.3), SEQUENCE[1:]),
    "embedding": (nn.Embedding(30, 16), pc.Int8(embeddings=True), "tokens"),
    "low rank embedding": (nn.Embedding(30, 16), pc.LowRank(8, embeddings=True), "tokens"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_twin_gives_what_the_layer_gives(case: str, dtype: torch.dtype) -> None:
    dense, plan, shape = CASES[case]
    x = torch.randint(30, (2, 5)) if shape == "tokens" else torch.randn(shape, dtype=dtype)
    layer = pc.compress(dense.eval().to(dtype), plan)
    expected, found = layer(x), twin_of(layer)(x)
    assert found.dtype == expected.dtype
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, atol=limit, rtol=limit)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu6", "hardswish"])
def test_a_twin_has_the_activation_behind_the_layer(activation: str) -> None:
    layer = type(pc.compress(nn.Linear(8, 8), WEIGHT_ONLY)).from_dense(nn.Linear(8, 8), WEIGHT_ONLY, activation)
    x = 4 * torch.randn(16, 8)
    torch.testing.assert_close(twin_of(layer)(x), layer(x), atol=1e-5, rtol=1e-5)


def test_quantized_groups_are_twins_of_their_floats() -> None:
    """The kernels round the input to 8 bits, twins of floats do not."""
    layer = pc.compress(nn.Conv2d(4, 8, 3, groups=4), pc.Int8())
    x = torch.randn(2, 4, 6, 6)
    assert (twin_of(layer)(x) - layer(x)).norm() < 0.02 * layer(x).norm()


def test_recurrent_layers_have_none() -> None:
    with pytest.raises(TypeError, match="recurrent"):
        twin_of(pc.compress(nn.LSTM(8, 8), pc.Int8()))


def test_a_model_of_twins_can_be_traced() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x).mean((2, 3)))
            return y

    model = pc.compress(Model().eval(), pc.Sparse(density=0.5))
    assert len(compressed_layers(model)) == 2

    def twin(_: str, layer: CompressedLayer) -> nn.Module:
        return twin_of(layer)

    program = Source.of(model, torch.randn(2, 3, 8, 8), None).program(twin)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(program.module()(x)[0], model(x), atol=1e-5, rtol=1e-5)
