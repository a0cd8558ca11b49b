"""Sparse().compress and SparseWeight: exact counts, optimal masks, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn
from torch.nn.utils import prune

from pycompress.methods.int8 import Int8
from pycompress.methods.masks import BLOCKS, N_OF_M
from pycompress.methods.sparse import Sparse
from pycompress.weights import SparseWeight

SHAPES = [(1, 1), (1, 40), (3, 5), (17, 33), (16, 64), (50, 47), (33, 3)]
SQUARES = {"16x16": 16, "32x32": 32, "64x64": 64}
# Each pattern with each shape; square blocks with the shapes around one and two of them too.
GRIDS = [
    *((pattern, shape) for pattern in BLOCKS for shape in SHAPES),
    *(
        (pattern, shape)
        for pattern, b in SQUARES.items()
        for shape in [(b - 1, b + 1), (b, 2 * b), (2 * b + 3, 5 * b + 1)]
    ),
]
TINY = torch.finfo(torch.float32).tiny


def blocks_of(shape: tuple[int, int], block: tuple[int, int]) -> list[list[tuple[slice, slice]]]:
    """The grid of blocks, as slices of the weight."""
    (n, k), (rows, columns) = shape, block
    return [
        [(slice(r, min(r + rows, n)), slice(c, min(c + columns, k))) for c in range(0, k, columns)]
        for r in range(0, n, rows)
    ]


def largest(scores: list[float], count: int) -> list[int]:
    """The positions of the largest scores, the first of equal ones: a sort, where the code partitions."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def by_sorting(weight: Tensor, pattern: str, density: float, scope: str) -> Tensor:
    """The mask as the documentation defines it, block by block."""
    grid = blocks_of((weight.shape[0], weight.shape[1]), BLOCKS[pattern])
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    rows = grid if scope == "row" else [[place for row in grid for place in row]]
    for row in rows:
        scores = [float(weight[place].double().square().sum()) for place in row]
        for i in largest(scores, round(density * len(row))):
            mask[row[i]] = True
    return mask


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("density", [0, 0.05, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(("pattern", "shape"), GRIDS)
def test_the_largest_blocks_stay(pattern: str, shape: tuple[int, int], density: float, scope: str) -> None:
    # Multiples of 1/8: all sums of squares are exact, so that the order of addition decides no tie.
    w = (torch.randn(shape) * 8).round() / 8
    mask = Sparse(density, pattern, scope=scope).prune(w)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, by_sorting(w, pattern, density, scope))


@pytest.mark.parametrize(("pattern", "shape"), GRIDS)
def test_exact_counts_whatever_the_ties(pattern: str, shape: tuple[int, int]) -> None:
    """Of equal weights the first stay."""
    grid = blocks_of(shape, BLOCKS[pattern])
    full = [[place for place in row if _is_full(place, pattern)] for row in grid]
    for density in (0.0, 0.3, 0.5, 1.0):
        mask = Sparse(density, pattern).prune(torch.ones(shape))
        kept = [bool(mask[place].all()) for row in grid for place in row]
        assert kept == [bool(mask[place].any()) for row in grid for place in row], "blocks stay or go as a whole"
        assert sum(kept) == round(density * len(kept))
        first = [bool(mask[place].all()) for row in full for place in row]
        assert first == sorted(first, reverse=True)


def _is_full(place: tuple[slice, slice], pattern: str) -> bool:
    return tuple(part.stop - part.start for part in place) == BLOCKS[pattern]


@pytest.mark.parametrize("pattern", BLOCKS)
def test_ties_between_rows_are_broken_in_each_row(pattern: str) -> None:
    rows, columns = (max(least, size) for least, size in zip((16, 4), BLOCKS[pattern], strict=True))
    w = torch.ones(2 * rows, 4 * columns)
    w[:rows] = 2.0
    mask = Sparse(0.25, pattern, scope="row").prune(w)
    assert mask[:, :columns].all() and not mask[:, columns:].any()
    whole, count = Sparse(0.25, pattern).prune(w), w.numel() // 4
    assert int(whole.sum()) == count
    assert not whole[rows:].any(), "the larger rows first"
    assert whole[: rows // 2 if BLOCKS[pattern][0] == 1 else rows].sum() == count


@pytest.mark.parametrize(
    ("pattern", "shape", "count"),
    [
        ("16x1", (17, 3), 3),
        ("16x4", (18, 10), 3),
        ("1x4", (3, 9), 4),
        ("1x4", (2, 7), 2),
        ("16x16", (33, 40), 4),
        ("64x64", (65, 140), 2),
    ],
)
def test_no_other_blocks_hold_more(pattern: str, shape: tuple[int, int], count: int) -> None:
    """Brute force over every choice of as many blocks, edge blocks included: their plain sums count."""
    places = [place for row in blocks_of(shape, BLOCKS[pattern]) for place in row]
    for _ in range(5):
        w = torch.randn(shape)
        sums = [float(w[place].double().square().sum()) for place in places]
        best = max(sum(sums[i] for i in chosen) for chosen in combinations(range(len(places)), count))
        mask = Sparse(count / len(places), pattern).prune(w)
        assert sum(bool(mask[place].any()) for place in places) == count
        assert float(w[mask].double().square().sum()) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("k", [1, 3, 4, 5, 7, 8, 9, 15, 16, 19])
@pytest.mark.parametrize("pattern", N_OF_M)
def test_no_other_n_of_m_mask_keeps_more(pattern: str, k: int) -> None:
    kept, group = N_OF_M[pattern]
    w = torch.randn(3, k)
    mask = Sparse(pattern=pattern).prune(w)
    for row in range(3):
        for start in range(0, k, group):
            part, own = w[row, start : start + group].abs().double(), mask[row, start : start + group]
            count = min(kept, len(part))
            assert int(own.sum()) == count
            best = max(float(part[list(chosen)].sum()) for chosen in combinations(range(len(part)), count))
            assert float(part[own].sum()) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("pattern", N_OF_M)
@pytest.mark.parametrize("shape", SHAPES)
def test_n_of_m_ties_go_to_the_first(pattern: str, shape: tuple[int, int]) -> None:
    kept, group = N_OF_M[pattern]
    for value in (1.0, 0.0):
        mask = Sparse(pattern=pattern).prune(torch.full(shape, value))
        assert torch.equal(mask, (torch.arange(shape[1]) % group < kept).expand(shape))


@pytest.mark.parametrize("pattern", N_OF_M)
def test_a_weight_that_obeys_the_pattern_stays_as_it_is(pattern: str) -> None:
    w = Sparse(pattern=pattern).compress(torch.randn(9, 37)).decompress()
    w[:, 8:16] = 0.0  # fewer than N are fine too
    assert torch.equal(Sparse(pattern=pattern).compress(w).decompress(), w)
    kept, group = N_OF_M[pattern]
    assert torch.equal(Sparse(kept / group, pattern).prune(w), Sparse(None, pattern).prune(w))


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 20), st.integers(1, 20)),
        elements=st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-40, 0.5, -0.5, 1.0, -3.0, 3e38]),
    ),
    st.floats(0, 1),
    st.sampled_from(["layer", "row"]),
)
@settings(max_examples=200, deadline=None)
def test_any_weight_any_density(w: np.ndarray[Any, np.dtype[np.float32]], density: float, scope: str) -> None:
    mask = Sparse(density, scope=scope).prune(torch.from_numpy(w))
    rows = (w if scope == "row" else w.reshape(1, -1)).astype(np.float64)
    for row, own in zip(np.abs(rows).tolist(), mask.reshape(rows.shape).tolist(), strict=True):
        assert [i for i, stays in enumerate(own) if stays] == largest(row, round(density * len(row)))


def test_subnormals_are_ranked_whatever_the_processor_does_with_them() -> None:
    w = torch.tensor([[1e-45, 3e-45, 0.0, -5e-45]])
    torch.set_flush_denormal(True)
    try:
        weight = Sparse(0.5).compress(w)
        untouched = Sparse().compress(w)
        back = untouched.decompress()
    finally:
        torch.set_flush_denormal(False)
    assert weight.mask.tolist() == [[0b1010]]
    assert untouched.mask.tolist() == [[0b1011]]
    assert back.view(torch.int32).tolist() == w.view(torch.int32).tolist()


def test_squares_neither_overflow_nor_vanish() -> None:
    w = torch.zeros(4, 8)
    w[0, 0], w[1, 4], w[2, 0], w[3, 4] = 3e38, 2e38, 1e-30, 2e-30
    order = [(0, 0), (1, 4), (3, 4), (2, 0)]
    for count in range(5):
        mask = Sparse(count / 8, "1x4").prune(w)
        assert [bool(mask[place]) for place in order] == [i < count for i in range(4)]


@pytest.mark.parametrize("pattern", [*BLOCKS, *N_OF_M])
def test_importance_ranks_instead_of_magnitude(pattern: str) -> None:
    w, importance = torch.randn(150, 200), torch.rand(150, 200)
    method = Sparse(0.4 if pattern in BLOCKS else None, pattern)
    mask = method.prune(w, importance)
    assert torch.equal(mask, method.prune(importance))
    assert not torch.equal(mask, method.prune(w))
    assert torch.equal(method.compress(w, importance).decompress(), w * mask)
    assert torch.equal(method.prune(w, w.abs()), method.prune(w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_weight_and_importance(dtype: torch.dtype) -> None:
    w, importance = torch.randn(8, 24).to(dtype), torch.rand(8, 24).to(dtype)
    for pattern in ("unstructured", "16x4", "2:4"):
        method = Sparse(0.5, pattern)
        assert torch.equal(method.prune(w), method.prune(w.float()))
        assert torch.equal(method.prune(w, importance), method.prune(w, importance.float()))
        assert torch.equal(method.compress(w).decompress(), method.compress(w.float()).decompress())


def test_views_and_parameters() -> None:
    w = nn.Parameter(torch.randn(24, 16))
    for view in (w.T, w[::2, 1::3], w.expand(24, 16)):
        dense = view.detach().contiguous()
        for method in (
            Sparse(0.3),
            Sparse(0.3, scope="row"),
            Sparse(0.5, "16x4"),
            Sparse(pattern="4:8"),
            Sparse(bits=8),
        ):
            weight = method.compress(view)
            assert torch.equal(weight.decompress(), method.compress(dense).decompress())
            assert not weight.values.requires_grad


def test_does_not_write_to_the_weight() -> None:
    w, mask = torch.randn(20, 30), torch.rand(20, 30) > 0.5
    before, mask_before = w.clone(), mask.clone()
    method = Sparse.from_mask(mask)
    method.prune(w).fill_(True)
    for one in (method, Sparse(0.2), Sparse(pattern="2:4"), Sparse(0.5, "1x4", bits=8)):
        one.compress(w).values.fill_(7)
    assert torch.equal(w, before)
    assert torch.equal(mask, mask_before)
    assert method.mask is not None and torch.equal(method.mask, mask_before)
    mask.fill_(True)
    assert torch.equal(method.mask, mask_before)


# --- what is stored of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", [*BLOCKS, *N_OF_M])
def test_compress_keeps_what_prune_says(pattern: str, shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    method = Sparse(0.4 if pattern in BLOCKS else None, pattern)
    weight, mask = method.compress(w), method.prune(w)
    assert weight.shape == shape and weight.bits == 32
    assert weight.nnz == int(mask.sum()) and weight.density == weight.nnz / w.numel()
    assert torch.equal(weight.decompress(), torch.where(mask, w, 0.0))
    assert torch.equal(weight.values, w[mask])


@pytest.mark.parametrize("activation_bits", [7, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_that_of_the_pruned_weight(shape: tuple[int, int], activation_bits: int) -> None:
    w = torch.randn(shape)
    method = Sparse(0.6, bits=8, activation_bits=activation_bits)
    weight = method.compress(w)
    expected = Int8(activation_bits).compress(torch.where(method.prune(w), w, 0.0))
    assert (weight.bits, weight.activation_bits, weight.values.dtype) == (8, activation_bits, torch.int8)
    assert weight.scale is not None and torch.equal(weight.scale, expected.scale)
    assert torch.equal(weight.decompress(), expected.decompress())
    assert torch.equal(weight.values, expected.values[expected.values != 0])


def test_weights_that_round_to_zero_leave_the_mask() -> None:
    w = torch.tensor([[127.0, 0.4, -0.4, 0.5, 0.6, 0.0, 1.0]])
    weight = Sparse(1.0, bits=8).compress(w)
    assert weight.values.tolist() == [127, 1, 1]
    assert weight.mask.tolist() == [[0b1010001]]


def test_kept_zeros_leave_the_mask() -> None:
    w = torch.tensor([[0.0, -0.0, 2.0, 1.0]])
    method = Sparse(0.75)
    assert method.prune(w, torch.tensor([[3.0, 2.0, 1.0, 0.0]])).tolist() == [[True, True, True, False]]
    weight = method.compress(w, torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
    assert weight.mask.tolist() == [[0b100]] and weight.values.tolist() == [2.0]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("method", [{}, {"density": 0.5}, {"density": 1.0}, {"pattern": "2:4"}, {"pattern": "16x4"}])
def test_rows_of_zeros_and_nothing_but_zeros(method: dict[str, Any], bits: int) -> None:
    w = torch.randn(6, 12)
    w[1], w[4] = 0.0, -0.0
    weight = Sparse(**method, bits=bits).compress(w)
    assert torch.equal(weight.decompress()[[1, 4]], torch.zeros(2, 12))
    assert not weight.mask[[1, 4]].any()
    nothing = Sparse(**method, bits=bits).compress(torch.zeros(6, 12))
    assert (nothing.nnz, nothing.density) == (0, 0.0)
    assert torch.equal(nothing.decompress(), torch.zeros(6, 12))
    assert (nothing.scale is None) == (bits == 32)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("pattern", BLOCKS)
def test_density_zero_and_one(pattern: str, bits: int) -> None:
    w = torch.randn(18, 21)
    assert Sparse(0, pattern, bits).compress(w).nnz == 0
    whole = Sparse(1, pattern, bits).compress(w)
    assert torch.equal(whole.decompress(), w if bits == 32 else Int8(7).compress(w).decompress())


@pytest.mark.parametrize("largest", [1e-45, 1e-40, TINY, 100 * TINY, 128 * TINY, 1e-30, 3e38])
def test_extreme_rows(largest: float) -> None:
    w = torch.tensor([[largest, -largest, largest / 4, 0.0]])
    assert torch.equal(Sparse().compress(w).decompress(), w)
    weight = Sparse(bits=8).compress(w)
    assert torch.isfinite(weight.decompress()).all()
    assert weight.scale is not None
    assert weight.nnz in (0, 3)
    assert (weight.decompress() - w).abs().max() <= (0.501 * float(weight.scale) if weight.nnz else 127 * TINY)


def test_none_keeps_what_pruning_left() -> None:
    layer = nn.Linear(33, 17)
    prune.random_unstructured(layer, "weight", amount=0.7)
    assert torch.equal(Sparse().compress(layer.weight).decompress(), layer.weight)
    prune.remove(layer, "weight")
    weight = Sparse().compress(layer.weight)
    assert weight.nnz == int((layer.weight != 0).sum()) == 17 * 33 - round(0.7 * 17 * 33)
    assert torch.equal(weight.decompress(), layer.weight)
    assert torch.equal(Sparse().prune(layer.weight), layer.weight != 0)
    assert torch.equal(Sparse(pattern="16x4").prune(layer.weight), layer.weight != 0), "no blocks without a density"


def test_from_mask() -> None:
    w, mask = torch.randn(17, 33), torch.rand(17, 33) < 0.3
    w[mask.nonzero()[0][0], mask.nonzero()[0][1]] = 0.0
    assert torch.equal(Sparse.from_mask(mask).prune(w), mask)
    assert torch.equal(Sparse.from_mask(mask).compress(w).decompress(), w * mask)
    weight = Sparse.from_mask(mask, bits=8, activation_bits=8).compress(w)
    assert torch.equal(weight.decompress(), Int8(8).compress(w * mask).decompress())
    assert torch.equal(Sparse.from_mask(mask.T).prune(w.T), mask.T)


# --- all layers of a model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0, 0.1, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("pattern", BLOCKS)
def test_model_scope_has_one_threshold(pattern: str, density: float) -> None:
    weights = [
        (torch.randn(n, k) * s * 8).round() / 8 for n, k, s in ((17, 33, 1.0), (1, 1, 9.0), (16, 64, 0.3), (50, 7, 3.0))
    ]
    method = Sparse(density, pattern, bits=8, activation_bits=8, scope="model")
    own = method.for_layers(weights)
    assert all((one.scope, one.pattern, one.bits, one.activation_bits) == ("layer", pattern, 8, 8) for one in own)
    grids = [blocks_of((w.shape[0], w.shape[1]), BLOCKS[pattern]) for w in weights]
    masks = [one.prune(w) for one, w in zip(own, weights, strict=True)]
    sums: list[float] = []
    stays: list[bool] = []
    for w, mask, grid in zip(weights, masks, grids, strict=True):
        for place in (place for row in grid for place in row):
            sums.append(float(w[place].double().square().sum()))
            stays.append(bool(mask[place].all()))
            assert stays[-1] == bool(mask[place].any())
    # The threshold, and that ties go to the first layer and the lowest position in it.
    assert [i for i, stay in enumerate(stays) if stay] == largest(sums, round(density * len(sums)))


def test_model_scope_with_nothing_but_ties() -> None:
    weights = [torch.ones(3, 5), torch.zeros(2, 4), torch.ones(7, 2), torch.ones(1, 1)]
    own = Sparse(20 / 38, scope="model").for_layers(weights)
    assert [int(one.prune(w).sum()) for one, w in zip(own, weights, strict=True)] == [15, 0, 5, 0]
    own = Sparse(33 / 38, scope="model").for_layers(weights)
    assert [int(one.prune(w).sum()) for one, w in zip(own, weights, strict=True)] == [15, 3, 14, 1]


@given(st.integers(1, 2**31 - 1), st.floats(0, 1))
def test_a_count_survives_as_a_density(size: int, share: float) -> None:
    """What for_layers relies on."""
    count = round(share * size)
    assert round(count / size * size) == count


def test_other_scopes_need_no_other_layer() -> None:
    weights = [torch.randn(3, 5), torch.randn(4, 4)]
    for method in (
        Sparse(),
        Sparse(0.3),
        Sparse(0.3, scope="row"),
        Sparse(pattern="2:4"),
        Sparse.from_mask(weights[0] > 0),
    ):
        assert method.for_layers(weights) == [method, method]
    assert Sparse(0.3, scope="model").for_layers([]) == []


def test_model_scope_needs_the_layers() -> None:
    method = Sparse(0.5, scope="model")
    for call in (method.prune, method.compress):
        with pytest.raises(ValueError, match=r"scope is 'model', expected the method that for_layers\(weights\) gives"):
            call(torch.randn(3, 4))
    nan = torch.randn(3, 4)
    nan[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"\[3, 4\] holds 1 NaN or Inf"):
        method.for_layers([torch.randn(2, 2), nan])
    with pytest.raises(TypeError, match="expected floating point"):
        method.for_layers([torch.ones(2, 2, dtype=torch.int8)])


# --- the method as a value --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", ["0.5", True, [0.5], torch.tensor(0.5)])
def test_density_must_be_a_number(density: Any) -> None:
    with pytest.raises(TypeError, match=r"density is .*, expected a number in \[0, 1\] or None"):
        Sparse(density)


@pytest.mark.parametrize("density", [-0.1, 1.0001, 50, float("nan"), float("inf")])
def test_density_lies_in_zero_to_one(density: float) -> None:
    with pytest.raises(ValueError, match=r"density is .*, expected a number in \[0, 1\] or None"):
        Sparse(density)


@pytest.mark.parametrize(("pattern", "good"), [("2:4", 0.5), ("4:8", 0.5), ("4:16", 0.25)])
def test_n_of_m_fixes_the_density(pattern: str, good: float) -> None:
    Sparse(good, pattern)
    for density in (0, 0.3, 1.0, 1 - good + 0.01):
        with pytest.raises(ValueError, match=rf"density is {density}, expected {good} or None for {pattern}"):
            Sparse(density, pattern)
    for scope in ("row", "model"):
        with pytest.raises(ValueError, match=f"scope is '{scope}', expected 'layer': {pattern} holds in every group"):
            Sparse(good, pattern, scope=scope)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:8"}, "pattern is '2:8', expected one of unstructured, 16x1"),
        ({"pattern": None}, "pattern is None"),
        ({"bits": 16}, "bits is 16, expected 8 or 32"),
        ({"bits": 8.0}, "bits is 8.0"),
        ({"bits": True}, "bits is True"),
        ({"activation_bits": 6}, "activation_bits is 6, expected 7 or 8"),
        ({"activation_bits": None}, "activation_bits is None"),
        ({"scope": "global", "density": 0.5}, "scope is 'global', expected one of layer, row, model"),
        ({"scope": "row"}, "scope is 'row', expected 'layer' where no density is given"),
        ({"scope": "model"}, "scope is 'model', expected 'layer' where no density is given"),
        (
            {"mask": torch.ones(2, 2, dtype=torch.bool), "density": 0.5},
            "density is 0.5, .* expected neither beside a mask",
        ),
        ({"mask": torch.ones(2, 2, dtype=torch.bool), "pattern": "2:4"}, "pattern is '2:4', expected neither"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool, device="meta")}, "mask is on meta"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sparse(**options)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 2), torch.ones(4, dtype=torch.bool), [[True]], np.ones((2, 2), bool), None]
)
def test_what_is_no_mask(mask: Any) -> None:
    with pytest.raises(TypeError, match=r"mask is .*, expected a tensor of bool \[n, k\]"):
        Sparse.from_mask(mask)
    if mask is not None:
        with pytest.raises(TypeError, match=r"expected a tensor of bool \[n, k\]"):
            Sparse(mask=mask)


def test_method_is_a_value() -> None:
    assert Sparse.name == SparseWeight.name == "sparse"
    assert Sparse(0.5) == Sparse(density=0.5) != Sparse(0.4)
    assert Sparse(1) == Sparse(1.0) and hash(Sparse(1)) == hash(Sparse(1.0))
    assert Sparse(0.5) != "sparse"
    mask = torch.rand(4, 5) > 0.5
    one, same, other = Sparse.from_mask(mask), Sparse.from_mask(mask.clone()), Sparse.from_mask(~mask)
    assert one == same and hash(one) == hash(same) and len({one, same, other}) == 2
    assert one != other and one != Sparse() and one != Sparse.from_mask(mask, bits=8)
    for method in (one, Sparse(0.2, "16x4", 8, 8, "model")):
        assert pickle.loads(pickle.dumps(method)) == copy.deepcopy(method) == method
    with pytest.raises(AttributeError):
        one.density = 0.5  # type: ignore[misc]


def test_repr_is_short() -> None:
    assert repr(Sparse()) == "Sparse()"
    assert repr(Sparse(0.2, "16x4", 8, scope="model")) == "Sparse(density=0.2, pattern='16x4', bits=8, scope='model')"
    assert repr(Sparse.from_mask(torch.ones(300, 500, dtype=torch.bool))) == "Sparse(mask=[300, 500])"
    assert repr(Sparse(0.5).compress(torch.ones(3, 4))) == "SparseWeight(shape=[3, 4], bits=32, nnz=6)"


# --- weights and importances that are refused -------------------------------------------------------------------------

METHODS = [Sparse(), Sparse(0.5), Sparse(0.5, "16x4"), Sparse(pattern="2:4", bits=8)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_weights_that_are_refused(method: Sparse) -> None:
    nan = torch.randn(4, 8)
    nan[2, 3], nan[0, 0] = float("nan"), float("-inf")
    for call in (method.compress, method.prune):
        for wrong in (torch.randn(8), torch.randn(2, 3, 4), torch.ones(2, 2, dtype=torch.int32), torch.ones(2, 2) * 1j):
            with pytest.raises(TypeError, match=r"the weight is torch\..*, expected floating point \[n, k\]"):
                call(wrong)
        with pytest.raises(ValueError, match=r"\[4, 8\] holds 2 NaN or Inf"):
            call(nan)
        with pytest.raises(ValueError, match="NaN or Inf"):
            call(torch.full((2, 2), 1e300, dtype=torch.float64))
        with pytest.raises(ValueError, match="meta device"):
            call(torch.empty(2, 2, device="meta"))
        for shape in ((0, 4), (4, 0), (1, 65537)):
            with pytest.raises(ValueError, match=rf"\[{shape[0]}, {shape[1]}\], expected \[n > 0, 1 to 65536\]"):
                call(torch.empty(shape))


def test_importances_that_are_refused() -> None:
    w, method = torch.randn(4, 8), Sparse(0.5)
    for value in (-1e-45, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="importance holds 1 values that are negative, NaN or Inf"):
            method.compress(w, torch.ones(4, 8).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value)))
    for shape in ((8, 4), (4, 1), (32,)):
        with pytest.raises(ValueError, match=r"importance is torch.float32 .*, expected floating point \[4, 8\]"):
            method.prune(w, torch.ones(shape))
    wrong: Any
    for wrong in (torch.ones(4, 8, dtype=torch.int64), torch.ones(4, 8) > 0, [[1.0]], np.ones((4, 8))):
        with pytest.raises(TypeError, match=r"importance is .*, expected floating point \[4, 8\]"):
            method.prune(w, wrong)
    with pytest.raises(ValueError, match="importance is on the meta device"):
        method.prune(w, torch.ones(4, 8, device="meta"))
    for unranked in (Sparse(), Sparse.from_mask(w > 0), Sparse(pattern="16x4")):
        with pytest.raises(
            ValueError, match="importance was given, expected none: without a density nothing is ranked"
        ):
            unranked.prune(w, torch.ones(4, 8))
    assert torch.equal(method.prune(w, torch.full((4, 8), -0.0)), method.prune(torch.zeros(4, 8)))


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"the weight is \[3, 4\], the mask \[4, 3\]"):
        Sparse.from_mask(torch.ones(4, 3, dtype=torch.bool)).compress(torch.ones(3, 4))


# --- SparseWeight -----------------------------------------------------------------------------------------------------


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 35)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False) | st.just(0.0),
        fill=st.just(0.0),
    )
)
@settings(max_examples=150, deadline=None)
def test_float_round_trip(dense: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    weight = SparseWeight.from_dense(torch.from_numpy(dense))
    back = weight.decompress().numpy()
    assert np.array_equal(back.view(np.int32), np.where(dense == 0, np.float32(0), dense).view(np.int32)), (
        "-0 becomes 0"
    )
    bits = np.unpackbits(weight.mask.numpy(), axis=1, bitorder="little")
    assert np.array_equal(bits[:, : dense.shape[1]] == 1, dense != 0)
    assert not bits[:, dense.shape[1] :].any()
    _check_storage(weight)


@given(
    arrays.arrays(
        np.int8, st.tuples(st.integers(1, 9), st.integers(1, 35)), elements=st.integers(-127, 127) | st.just(0)
    ),
    st.sampled_from([7, 8]),
)
@settings(max_examples=150, deadline=None)
def test_int8_round_trip(dense: np.ndarray[Any, np.dtype[np.int8]], activation_bits: int) -> None:
    scale = torch.logspace(-3, 3, len(dense))
    weight = SparseWeight.from_dense(torch.from_numpy(dense), scale, activation_bits)
    assert torch.equal(weight.decompress(), torch.from_numpy(dense).float() * scale[:, None])
    assert weight.nnz == int((dense != 0).sum())
    _check_storage(weight)


def _check_storage(weight: SparseWeight) -> None:
    """tensors() and settings() hold all of it, are what expected() says, and survive JSON."""
    rest = json.loads(json.dumps(weight.settings()))
    tensors = weight.tensors()
    expected = SparseWeight.expected(weight.shape, rest)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == expected
    back = SparseWeight.from_tensors(weight.shape, tensors, rest)
    assert torch.equal(back.decompress(), weight.decompress())
    assert back.settings() == weight.settings() and back.shape == weight.shape and back.bits == weight.bits


def test_the_documented_bits() -> None:
    dense = torch.zeros(2, 10)
    dense[0, 0], dense[0, 9], dense[1, 3], dense[1, 7] = 1.0, 2.0, 3.0, 4.0
    weight = SparseWeight.from_dense(dense)
    assert weight.mask.tolist() == [[0b1, 0b10], [0b10001000, 0]]
    assert weight.values.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert (weight.k, weight.shape, weight.bits, weight.nnz, weight.density) == (10, (2, 10), 32, 4, 0.2)
    assert (weight.scale, weight.activation_bits) == (None, None)
    assert weight.settings() == {"bits": 32, "nnz": 4}
    assert list(weight.tensors()) == ["sparse_mask", "sparse_values"]


def canonical(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "mask": torch.tensor([[0b101], [0b010]], dtype=torch.uint8),
        "values": torch.tensor([1, -2, 3], dtype=torch.int8),
        "k": 3,
        "scale": torch.ones(2),
        "activation_bits": 7,
    }
    return {**fields, **changes}


def floats(**changes: Any) -> dict[str, Any]:
    return canonical(**{"values": torch.tensor([1.0, -2.0, 3.0]), "scale": None, "activation_bits": None, **changes})


def test_a_good_canonical_weight() -> None:
    weight = SparseWeight(**canonical(scale=torch.tensor([2.0, 0.5])))
    assert torch.equal(weight.decompress(), torch.tensor([[2.0, 0.0, -4.0], [0.0, 1.5, 0.0]]))
    assert weight.settings() == {"bits": 8, "nnz": 3, "activation_bits": 7}
    assert torch.equal(SparseWeight(**floats()).decompress(), torch.tensor([[1.0, 0.0, -2.0], [0.0, 3.0, 0.0]]))
    assert weight == weight and weight != SparseWeight(**canonical()), "by identity, as tensors have no truth"
    with pytest.raises(AttributeError):
        weight.k = 4  # type: ignore[misc]


def test_subnormal_values_are_values() -> None:
    for value in (1e-45, -1e-40, TINY / 2):
        flushed = torch.tensor([value, 1.0, 1.0])
        assert SparseWeight(**floats(values=flushed)).nnz == 3


@pytest.mark.parametrize(
    "dense", [torch.ones(3), torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool)]
)
def test_from_dense_takes_matrices_of_float32_or_int8(dense: Tensor) -> None:
    with pytest.raises(ValueError, match=r"the dense weight is torch\..*, expected float32 or int8 \[n, k\]"):
        SparseWeight.from_dense(dense)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 65537)])
def test_from_dense_of_an_empty_or_too_wide_matrix(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="SparseWeight: "):
        SparseWeight.from_dense(torch.zeros(shape))
