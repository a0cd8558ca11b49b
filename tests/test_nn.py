"""What is one layer's own: its attributes, names and texts, and what it makes of a dense layer without a method.

What all layers promise is in ``tests/contract``.
"""

from __future__ import annotations

import pytest
import torch
from contract.cases import CASES, Case, equal_states, low_rank, over, state
from torch import nn
from torch.nn.utils import prune

from pycompress import ops
from pycompress.methods import Int4, Int8
from pycompress.methods.method import Method
from pycompress.nn import (
    LAYERS,
    Int4Linear,
    Int8Conv1d,
    Int8Conv2d,
    Int8Embedding,
    Int8GRU,
    Int8Linear,
    Int8LSTM,
    LowRankConv2d,
    LowRankEmbedding,
    LowRankLinear,
    SparseConv1d,
    SparseConv2d,
    SparseLinear,
)  # fmt: skip
from pycompress.weights import (
    Int4Weight,
    Int8RecurrentWeight,
    Int8Weight,
    LowRankConv2dWeight,
    LowRankWeight,
    SparseWeight,
)

K, N = 71, 24
BY_NAME = {repr(case): case for case in CASES}

TABLE = {
    ("linear", "int8"): (Int8Linear, Int8Weight),
    ("linear", "int4"): (Int4Linear, Int4Weight),
    ("linear", "sparse"): (SparseLinear, SparseWeight),
    ("linear", "low_rank"): (LowRankLinear, LowRankWeight),
    ("conv2d", "int8"): (Int8Conv2d, Int8Weight),
    ("conv1d", "int8"): (Int8Conv1d, Int8Weight),
    ("conv2d", "sparse"): (SparseConv2d, SparseWeight),
    ("conv1d", "sparse"): (SparseConv1d, SparseWeight),
    ("conv2d", "low_rank"): (LowRankConv2d, LowRankConv2dWeight),
    ("embedding", "int8"): (Int8Embedding, Int8Weight),
    ("embedding", "low_rank"): (LowRankEmbedding, LowRankWeight),
    ("lstm", "int8"): (Int8LSTM, Int8RecurrentWeight),
    ("gru", "int8"): (Int8GRU, Int8RecurrentWeight),
}
# What a layer says of its weight.
ATTRIBUTES = {
    Int8Linear: ("activation_bits", "weight_bits", "static"),
    Int8Conv2d: ("activation_bits", "weight_bits", "static"),
    Int8Conv1d: ("activation_bits", "weight_bits", "static"),
    Int8Embedding: ("weight_bits",),
    Int4Linear: ("group", "symmetric", "activation_bits"),
    SparseLinear: ("bits", "nnz", "density", "activation_bits"),
    SparseConv2d: ("bits", "nnz", "density", "activation_bits"),
    SparseConv1d: ("bits", "nnz", "density", "activation_bits"),
    LowRankLinear: ("rank", "bits", "activation_bits"),
    LowRankConv2d: ("decomposition", "ranks"),
    LowRankEmbedding: ("rank",),
}
LOW_RANK = ["low_rank_down", "low_rank_up"]
INT8_LOW_RANK = [*LOW_RANK, "low_rank_down_scale", "low_rank_up_scale"]
NAMES = {
    "linear int8: 8": ["int8_values", "int8_scale"],
    "linear int8: a16": ["int8_values", "int8_scale"],
    "linear int8: static": ["int8_values", "int8_scale", "int8_input_scale", "int8_input_zero_point"],
    "linear int4: g32": ["int4_values", "int4_scale", "int4_zero_point"],
    "linear int4: g64 symmetric": ["int4_values", "int4_scale"],
    "linear sparse: float32": ["sparse_mask", "sparse_values"],
    "linear sparse: int8": ["sparse_mask", "sparse_values", "sparse_scale"],
    "linear low_rank: float32": LOW_RANK,
    "linear low_rank: int8": INT8_LOW_RANK,
    "linear low_rank: float32 + int8": [*LOW_RANK, "low_rank_residual_int8_values", "low_rank_residual_int8_scale"],
    "linear low_rank: float32 + dense": [*LOW_RANK, "low_rank_residual_dense_weight"],
    "linear low_rank: float32 + sparse": [*LOW_RANK, "low_rank_residual_sparse_mask", "low_rank_residual_sparse_values"],
    "linear low_rank: float32 + int4": [
        *LOW_RANK, "low_rank_residual_int4_values", "low_rank_residual_int4_scale", "low_rank_residual_int4_zero_point",
    ],
    "linear low_rank: int8 + int4": [*INT8_LOW_RANK, "low_rank_residual_int4_values", "low_rank_residual_int4_scale"],
    "linear low_rank: int8 + sparse int8": [
        *INT8_LOW_RANK, "low_rank_residual_sparse_mask", "low_rank_residual_sparse_values", "low_rank_residual_sparse_scale",
    ],
    "conv2d sparse: float32": ["sparse_mask", "sparse_values"],
    "conv2d low_rank: channel": LOW_RANK,
    "conv2d low_rank: spatial": LOW_RANK,
    "conv2d low_rank: tucker": ["low_rank_down", "low_rank_core", "low_rank_up"],
    "embedding low_rank: rank 4": LOW_RANK,
    "embedding int8: 8": ["int8_values", "int8_scale"],
}  # fmt: skip
LABELS = {
    "linear int8: 8": "int8", "linear int8: a16": "int8 a16", "linear int8: static": "int8 static",
    "linear int4: g32": "int4 g32", "linear int4: g64 symmetric": "int4 g64 symmetric", "linear int4: g128": "int4 g128",
    "linear int4: g32 a16": "int4 g32 a16", "linear int4: g128 symmetric a16": "int4 g128 symmetric a16",
    "linear sparse: float32": "sparse 25 %", "linear sparse: int8": "sparse 25 % int8", "linear sparse: density 1": "sparse 100 %",
    "linear low_rank: float32": "low rank 6", "linear low_rank: int8": "low rank 6 int8",
    "linear low_rank: the whole rank": "low rank 24", "linear low_rank: int8 + dense": "low rank 6 int8 + dense",
    "linear low_rank: float32 + int8": "low rank 6 + int8", "linear low_rank: float32 + sparse int8": "low rank 6 + sparse",
    "linear low_rank: float32 + int4": "low rank 6 + int4", "linear low_rank: int8 + int4": "low rank 6 int8 + int4",
    "conv2d sparse: float32": "sparse 30 %", "conv2d low_rank: spatial": "low rank 4 spatial",
    "conv2d low_rank: tucker": "low rank 4x4 tucker", "embedding low_rank: rank 4": "low rank 4", "embedding int8: 8": "int8",
}  # fmt: skip
CONV = "out_channels=19, in_channels=5, kernel_size=(3, 2), stride=(1, 2), padding=(1, 1), dilation=(1, 1)"
CONV_1 = "out_channels=19, in_channels=5, kernel_size=(5,), stride=(2,), padding=(1,), dilation=(1,)"
LINEAR = "in_features=71, out_features=24"
REPRS = {  # without an activation, and with another one and no bias
    "linear int8: 8": (
        f"Int8Linear({LINEAR}, bias=True, activation_bits=8, weight_bits=8)",
        f"Int8Linear({LINEAR}, bias=False, activation_bits=8, weight_bits=8, activation=silu)",
    ),
    "linear int8: static": (
        f"Int8Linear({LINEAR}, bias=True, activation_bits=8, weight_bits=8, static=True)",
        f"Int8Linear({LINEAR}, bias=False, activation_bits=8, weight_bits=8, static=True, activation=silu)",
    ),
    "linear int4: g64 symmetric": (
        f"Int4Linear({LINEAR}, bias=True, group=64, symmetric=True, activation_bits=8)",
        f"Int4Linear({LINEAR}, bias=False, group=64, symmetric=True, activation_bits=8, activation=silu)",
    ),
    "linear sparse: float32": (
        f"SparseLinear({LINEAR}, bias=True, density=0.25, bits=32)",
        f"SparseLinear({LINEAR}, bias=False, density=0.25, bits=32, activation=silu)",
    ),
    "linear sparse: int8": (
        f"SparseLinear({LINEAR}, bias=True, density=0.25, bits=8, activation_bits=8)",
        f"SparseLinear({LINEAR}, bias=False, density=0.25, bits=8, activation_bits=8, activation=silu)",
    ),
    "linear low_rank: float32": (
        f"LowRankLinear({LINEAR}, bias=True, rank=6, bits=32)",
        f"LowRankLinear({LINEAR}, bias=False, rank=6, bits=32, activation=silu)",
    ),
    "linear low_rank: int8 + int8": (
        f"LowRankLinear({LINEAR}, bias=True, rank=6, bits=8, activation_bits=7, residual=int8)",
        f"LowRankLinear({LINEAR}, bias=False, rank=6, bits=8, activation_bits=7, residual=int8, activation=silu)",
    ),
    "conv2d sparse: float32": (
        f"SparseConv2d({CONV}, bias=True, density=0.3, bits=32)",
        f"SparseConv2d({CONV}, bias=False, density=0.3, bits=32, activation=silu)",
    ),
    "conv1d int8: 8": (
        f"Int8Conv1d({CONV_1}, bias=True, activation_bits=8, weight_bits=8)",
        f"Int8Conv1d({CONV_1}, bias=False, activation_bits=8, weight_bits=8, activation=silu)",
    ),
    "conv2d low_rank: channel": (
        f"LowRankConv2d({CONV}, bias=True, decomposition=channel, ranks=(4,))",
        f"LowRankConv2d({CONV}, bias=False, decomposition=channel, ranks=(4,), activation=silu)",
    ),
}


def test_the_table() -> None:
    assert {row: (layer, layer.weight_type) for row, layer in LAYERS.items()} == TABLE


@over([case for case in CASES if case.layer_type in ATTRIBUTES])
def test_a_layer_says_what_its_weight_is(case: Case) -> None:
    made, weight = case.layer(), case.layer().canonical()
    weight = made.canonical()
    for name in ATTRIBUTES[case.layer_type]:
        assert getattr(made, name) == getattr(weight, name), name
    if isinstance(made, LowRankLinear):
        assert made.residual == ("" if weight.residual is None else weight.residual.name)
    if isinstance(made, Int8Linear):
        assert torch.equal(made.weight, weight.values * weight.scale[:, None])
    if isinstance(made, Int4Linear):
        assert torch.equal(made.op.dense(made.packed, made.form), made.weight)
    if isinstance(made, SparseLinear | SparseConv2d):
        assert made.format in ops.SPARSE_FORMATS
        nnz = made.nnz
        assert (made.to("meta").format, made.nnz) == ("", nnz)
    if case.kind.name == "linear":
        assert (made.in_features, made.out_features) == (K, N)


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_state_dict(name: str) -> None:
    made = BY_NAME[name].layer()
    assert list(made.state_dict()) == [*NAMES[name], "weight", *(["bias"] if made.bias is not None else [])]


@pytest.mark.parametrize("name", LABELS)
def test_label(name: str) -> None:
    assert BY_NAME[name].layer().label == BY_NAME[name].layer().to("meta").label == LABELS[name]


@pytest.mark.parametrize("name", REPRS)
def test_repr(name: str) -> None:
    case = BY_NAME[name]
    assert (repr(case.layer()), repr(case.layer("silu", bias=False))) == REPRS[name]
    assert repr(case.layer().to("meta")) == REPRS[name][0]


# --- int8 ---------------------------------------------------------------------------------------------------------------


def test_kernels_for_cuda_name_the_devices() -> None:
    """What torch calls for tensors on CUDA, called with the tensors at hand (a machine without CUDA has no others)."""
    made = Int8Linear.from_dense(nn.Linear(K, N))
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    operation = torch.ops.pycompress.int8_linear.default
    with pytest.raises(RuntimeError, match="on cpu, expected all of them on one CUDA device or on the CPU"):
        operation.redispatch(cuda, torch.randn(3, K), made.packed, made.form, made.bias, "none")


# --- sparse -------------------------------------------------------------------------------------------------------------


def test_without_a_method_the_zeros_stay() -> None:
    for dense, kind in (
        (nn.Linear(K, N), SparseLinear),
        (nn.Conv2d(5, 19, 3).to(memory_format=torch.channels_last), SparseConv2d),
    ):
        with torch.no_grad():
            dense.weight[torch.rand(dense.weight.shape) < 0.7] = 0
        made = kind.from_dense(dense)  # type: ignore[attr-defined]
        assert torch.equal(made.weight, dense.weight)
        assert made.nnz == int((dense.weight != 0).sum())


def test_a_layer_that_torch_pruned_is_taken_as_it_is() -> None:
    dense, x = nn.Linear(K, N), torch.randn(3, K)
    prune.l1_unstructured(dense, "weight", amount=0.8)
    prune.l1_unstructured(dense, "bias", amount=0.5)
    with torch.no_grad():
        dense.weight_orig *= 2  # `weight` is out of date now, until the next call
    made = SparseLinear.from_dense(dense, activation="relu")
    assert torch.equal(made.weight, dense.weight_orig * dense.weight_mask)
    assert made.bias is not None
    assert int((made.bias == 0).sum()) == N // 2
    torch.testing.assert_close(made(x), dense(x).relu())


def test_a_row_without_weights_gives_the_bias_alone() -> None:
    made, x = BY_NAME["linear sparse: rows without weights"].layer(), torch.randn(3, K)
    x[1] = torch.nan
    empty = torch.arange(N) % 3 != 1
    assert torch.equal(made(x)[:, empty], made.bias[empty].expand(3, -1)), "zeros are not multiplied, not even by NaN"
    assert made(x)[1, ~empty].isnan().all()


# --- low rank -----------------------------------------------------------------------------------------------------------


def test_without_a_method_all_of_the_weight_stays() -> None:
    dense = nn.Linear(K, N)
    torch.testing.assert_close(LowRankLinear.from_dense(dense).weight, dense.weight.detach())
    thin = nn.Linear(K, N)
    with torch.no_grad():
        thin.weight.copy_(torch.randn(N, 3) @ torch.randn(3, K))
    assert LowRankLinear.from_dense(thin).rank == 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Int4(64), "low_rank_residual_int4_scale"),  # fewer of them
        (Int4(symmetric=True), "low_rank_residual_int4_zero_point"),
        (Int8(), "low_rank_residual_int4_scale"),
    ],
)
def test_another_grid_of_int4_is_refused(other: Method, message: str) -> None:
    target = BY_NAME["linear low_rank: float32 + int4"].layer()
    before = state(target)
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(LowRankLinear.from_dense(nn.Linear(K, N), low_rank(residual=other)).state_dict())
    assert equal_states(state(target), before)
