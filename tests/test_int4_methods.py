"""Int4: the canonical weight, rounding and the search for ranges, GPTQ; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import pycompress as pc
from pycompress.methods import Int8, gptq, groups
from pycompress.methods.inputs import DAMPING, InputStatistics
from pycompress.methods.int4 import Int4
from pycompress.methods.low_rank import LowRank
from pycompress.methods.notes import noted
from pycompress.weights.int4 import Int4Weight, pack_nibbles, unpack_nibbles
from pycompress.weights.int8 import Int8Weight

GROUPS = (32, 64, 128)

TINY = torch.finfo(torch.float32).tiny
WIDTHS = [1, 2, 31, 32, 33, 64, 65, 127, 128, 129, 259]


def packed(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


def fields(n: int = 3, k: int = 67, group: int = 32, *, symmetric: bool = False) -> dict[str, Any]:
    """Of a random canonical weight."""
    count = -(-k // group)
    zero_point = pack_nibbles(torch.randint(0, 16, (n, count), dtype=torch.uint8))
    return {
        "values": pack_nibbles(torch.randint(0, 16, (n, k), dtype=torch.uint8)),
        "scale": torch.logspace(-6, 6, n * count).view(n, count).bfloat16(),
        "zero_point": None if symmetric else zero_point,
        "k": k,
        "group": group,
        "activation_bits": 8,
    }


def in_groups(w: Tensor, group: int) -> Tensor:
    """[n, k] -> [n * groups, group], with zeros behind a short last group."""
    return pad(w, (0, -w.shape[1] % group)).view(-1, group)


def errors(weight: Int4Weight, w: Tensor) -> Tensor:
    """float64 [n, groups]: the squared error of each group."""
    difference = weight.decompress().double() - w.double()
    return in_groups(difference, weight.group).square().sum(1).view(weight.shape[0], -1)


def plainly(w: Tensor, method: Int4) -> Int4Weight:
    """Plain rounding."""
    found = groups.rounded(w, method.group, symmetric=method.symmetric, search=False)
    zero_point = None if method.symmetric else pack_nibbles(found.zero_point)
    return Int4Weight(pack_nibbles(found.integers), found.scale, zero_point, w.shape[1], method.group, 8)


def statistics(x: Tensor) -> InputStatistics:
    x = x.double()
    return InputStatistics(len(x), x.T @ x / len(x), x.mean(dim=0))


def correlated(k: int, rows: int = 500) -> Tensor:
    """Inputs as layers meet them: few directions hold most of them."""
    return torch.randn(rows, k, dtype=torch.float64) @ (torch.randn(k, k, dtype=torch.float64) / torch.arange(1, k + 1))


def output_errors(weight: Int4Weight | Int8Weight, w: Tensor, inputs: InputStatistics) -> Tensor:
    """float64 [n]: the mean squared error of each output."""
    difference = weight.decompress().double() - w.double()
    assert inputs.second_moment is not None
    return ((difference @ inputs.second_moment) * difference).sum(1)


# --- the canonical weight -----------------------------------------------------------------------------------------------


def test_nibbles_by_hand() -> None:
    values = packed([[1, 2, 3], [15, 0, 8]])
    assert torch.equal(pack_nibbles(values), packed([[0x21, 0x03], [0x0F, 0x08]]))
    assert torch.equal(unpack_nibbles(packed([[0x21, 0x03], [0x0F, 0x08]]), 3), values)


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_a_weight_means(k: int, group: int, symmetric: bool) -> None:
    """Against the formula in float64, position by position: exact."""
    made = fields(3, k, group, symmetric=symmetric)
    weight = Int4Weight(**made)
    low_high = [made["values"].numpy() & 15, made["values"].numpy() >> 4]
    integers = np.stack(low_high, axis=2).reshape(3, -1)
    zeros = np.full((3, 2 * weight.groups), 8)
    if not symmetric:
        nibbles = made["zero_point"].numpy()
        zeros = np.stack([nibbles & 15, nibbles >> 4], axis=2).reshape(3, -1)
    scale = made["scale"].double().numpy()
    expected = np.array(
        [
            [(float(integers[r, i]) - float(zeros[r, i // group])) * scale[r, i // group] for i in range(k)]
            for r in range(3)
        ]
    )
    assert weight.shape == (3, k) and weight.groups == -(-k // group) and weight.symmetric is symmetric
    assert torch.equal(weight.decompress().double(), torch.from_numpy(expected))
    assert torch.equal(weight.integers(), torch.from_numpy(integers[:, :k]))
    assert torch.equal(weight.zero_points(), torch.from_numpy(zeros[:, : weight.groups].astype(np.uint8)))


def with_scale(value: float) -> dict[str, Tensor]:
    scale = torch.ones(3, 3, dtype=torch.bfloat16)
    scale[2, 1] = value
    return {"scale": scale}


@pytest.mark.parametrize("value", [TINY, 2.0**124])
def test_the_smallest_and_the_largest_scale(value: float) -> None:
    weight = Int4Weight(**{**fields(), **with_scale(value)})
    assert torch.isfinite(weight.decompress()).all()
    assert not (weight.decompress().abs() < TINY).logical_and(weight.decompress() != 0).any()


# --- rounding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_plain_rounding_is_off_by_half_a_step(k: int, group: int, symmetric: bool) -> None:
    """And by what the ends of the range lose where the scale, as a bfloat16 number, is smaller by up to 2^-9: 15 times that."""
    w = torch.randn(5, k) * torch.logspace(-6, 6, 5)[:, None] + torch.tensor([0, 0, 0, 0.5, -2e6])[:, None]
    weight = plainly(w, Int4(group, symmetric))
    steps = weight.scale.double().repeat_interleave(group, dim=1)[:, :k]
    off = (weight.decompress().double() - w.double()).abs() / steps
    assert off.max() <= 0.5 + 15 * 2**-9 / (1 - 2**-9)
    low, high = (in_groups(w, group).double() * sign for sign in (-1, 1))
    reach = low.amax(1).clamp(min=0) + high.amax(1).clamp(min=0)
    if symmetric:
        reach = torch.maximum(low.amax(1), high.amax(1)) * 15 / 7
    torch.testing.assert_close(weight.scale.double().flatten(), reach / 15, rtol=2**-8, atol=0)


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_never_loses(k: int, group: int, symmetric: bool) -> None:
    method, w = Int4(group, symmetric), torch.randn(9, k) ** 3
    found, plain = errors(method.compress(w), w), errors(plainly(w, method), w)
    assert (found <= plain * (1 + 1e-5) + 1e-30).all(), "but for the float32 sums of squares that it compares"


@pytest.mark.parametrize(("symmetric", "group", "share"), [(False, 32, 0.95), (True, 32, 0.85), (False, 128, 0.92)])
def test_the_search_wins_on_gaussian_weights(symmetric: bool, group: int, share: float) -> None:
    method, w = Int4(group, symmetric), torch.randn(64, 512)
    assert errors(method.compress(w), w).sum() <= share * errors(plainly(w, method), w).sum()


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_comes_near_the_best_grid_there_is(symmetric: bool) -> None:
    """Of all zero points, and scales in steps of 1 %."""
    w = torch.randn(20, 32)
    x, best = w.double(), torch.full((20,), torch.inf, dtype=torch.float64)
    reach = x.abs().amax(1, keepdim=True) / 7.5
    for zero_point in [8] if symmetric else range(16):
        for share in np.arange(0.3, 1.6, 0.01):
            steps = (x / (reach * share)).round().clamp(-zero_point, 15 - zero_point)
            best = torch.minimum(best, (steps * reach * share - x).square().sum(1))
    assert errors(Int4(symmetric=symmetric).compress(w), w).sum() <= 1.1 * best.sum()


def test_what_a_grid_holds_already_stays() -> None:
    """Weights that are 4-bit steps of their group, both ends met, come back exactly."""
    steps = torch.arange(32).remainder(16).float()
    w = torch.stack([(steps - 3) * 0.5, (steps - 15) * 2.0**-20, steps * 1024.0])
    weight = Int4().compress(w)
    assert torch.equal(weight.decompress(), w)
    assert weight.zero_points().flatten().tolist() == [3, 15, 0]
    symmetric = Int4(symmetric=True).compress((steps.clamp(min=1) - 8)[None] * 0.25)
    assert torch.equal(symmetric.decompress(), (steps.clamp(min=1) - 8)[None] * 0.25)


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_zeros(symmetric: bool) -> None:
    w = torch.randn(3, 100)
    w[:, 32:64], w[1, 64:] = 0.0, -0.0
    weight = Int4(symmetric=symmetric).compress(w)
    assert torch.equal(weight.decompress()[:, 32:64], torch.zeros(3, 32))
    assert torch.equal(weight.scale[:, 1].float(), torch.ones(3)) and weight.scale[1, 2] == 1
    assert (weight.scale > 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_groups_have_nothing_to_do_with_each_other(
    symmetric: bool, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.randn(7, 300)
    whole = Int4(group, symmetric).compress(w)
    cut = Int4(group, symmetric).compress(w[2:5, : 2 * group].clone())
    assert torch.equal(whole.decompress()[2:5, : 2 * group], cut.decompress())
    monkeypatch.setattr(groups, "_CHUNK", group)
    chunked = Int4(group, symmetric).compress(w)
    assert all(torch.equal(t, chunked.tensors()[name]) for name, t in whole.tensors().items())


@pytest.mark.usefixtures("two_threads")
def test_the_same_on_any_number_of_threads() -> None:
    w = torch.randn(200, 700)
    methods = [Int4(), Int4(symmetric=True)]
    two = [method.compress(w).tensors() for method in methods]
    torch.set_num_threads(1)
    for method, tensors in zip(methods, two, strict=True):
        assert all(torch.equal(t, tensors[name]) for name, t in method.compress(w).tensors().items())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("method", [Int4(), Int8(weight_bits=7)], ids=repr)
def test_calibrated_the_same_on_any_number_of_threads(method: Int4 | Int8) -> None:
    w, calibrated = torch.randn(48, 300), method.with_inputs(statistics(correlated(300)))
    two, again = (calibrated.compress(w).tensors() for _ in range(2))
    torch.set_num_threads(1)
    one = calibrated.compress(w).tensors()
    assert all(torch.equal(t, one[name]) and torch.equal(t, again[name]) for name, t in two.items())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("largest", [1e-45, 1e-40, TINY, 7 * TINY, 8 * TINY, 100 * TINY, 1e-30, 1e-20, 1e20, 1e38])
def test_extreme_weights(largest: float, symmetric: bool) -> None:
    w = torch.tensor([[largest, -largest, largest / 2, 0.0]])
    for method in (Int4(symmetric=symmetric), Int4(symmetric=symmetric, inputs=statistics(torch.randn(9, 4)))):
        weight = method.compress(w)
        assert torch.isfinite(weight.decompress()).all()
        off = (weight.decompress().double() - w.double()).abs().max()
        if weight.decompress().any():
            assert off <= 1.6 * float(weight.scale[0, 0]), "clipped by 30 % of 8 steps at most, rounded by half a step"
        else:
            assert off <= 15 * TINY


def test_the_largest_weights_of_all_are_clipped() -> None:
    w = torch.tensor([[3e38, -3e38, 1e38, 0.0]])
    for symmetric in (False, True):
        weight = Int4(symmetric=symmetric).compress(w)
        assert torch.isfinite(weight.decompress()).all()
        assert torch.equal(weight.decompress().sign(), w.sign())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes(dtype: torch.dtype) -> None:
    w = torch.randn(8, 48).to(dtype)
    weight, expected = Int4().compress(w), Int4().compress(w.float())
    assert torch.equal(weight.decompress(), expected.decompress())


def test_parameters_views_and_the_weight_itself() -> None:
    w = torch.nn.Parameter(torch.randn(48, 8))
    before = w.detach().clone()
    inputs = statistics(torch.randn(50, 48))
    for method in (Int4(), Int4(inputs=inputs)):
        weight = method.compress(w.T)
        assert torch.equal(weight.decompress(), method.compress(before.T.contiguous()).decompress())
        assert not weight.scale.requires_grad
    assert torch.equal(w, before), "is only read"


# --- GPTQ ---------------------------------------------------------------------------------------------------------------


def one_by_one(w: Tensor, moment: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """GPTQ as optimal brain surgery tells it, in float64 NumPy: after each column, that with the largest inputs first, the others
    make up for its error with the inverse of what remains. The steps, float64 [n, k].

    Args:
        scale, low, high: of each weight [n, k], its step, and the first and last one.
    """
    rest, diagonal = w.double().numpy().copy(), moment.diagonal().numpy()
    inverse = np.linalg.inv(moment.numpy() + DAMPING * diagonal.mean() * np.eye(len(diagonal)))
    steps = np.zeros_like(rest)
    for i in np.argsort(-diagonal, kind="stable"):
        steps[:, i] = (
            (rest[:, i].astype(np.float32) / scale[:, i].numpy()).round().clip(low[:, i].numpy(), high[:, i].numpy())
        )
        error = rest[:, i] - steps[:, i] * scale[:, i].numpy()
        row = inverse[i] / inverse[i, i]
        rest -= np.outer(error, row)
        inverse -= np.outer(inverse[:, i], row)
    return torch.from_numpy(steps)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 67, 130])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64])
def test_gptq_is_optimal_brain_surgery_column_by_column(k: int, symmetric: bool, group: int) -> None:
    w, inputs = torch.randn(6, k), statistics(correlated(k))
    weight = Int4(group, symmetric, inputs=inputs).compress(w)
    grid = groups.rounded(w, group, symmetric=symmetric, search=True)
    scale, zeros = (t.float().repeat_interleave(group, 1)[:, :k] for t in (grid.scale, grid.zero_point))
    expected = one_by_one(w, inputs.moment("", k), scale, -zeros, 15 - zeros) * scale.double()
    plain = plainly(w, Int4(group, symmetric))
    rows = output_errors(weight, w, inputs) < output_errors(plain, w, inputs)
    assert torch.equal(weight.decompress().double()[rows], expected[rows])
    assert torch.equal(weight.decompress()[~rows], plain.decompress()[~rows]) and (k < 31 or rows.any())


@pytest.mark.parametrize("k", [1, 31, 33, 130])
@pytest.mark.parametrize("bits", [7, 8])
def test_gptq_of_int8(k: int, bits: int) -> None:
    w, inputs = torch.randn(6, k), statistics(correlated(k))
    plain = Int8(weight_bits=bits).compress(w)
    weight = Int8(weight_bits=bits, inputs=inputs).compress(w)
    assert torch.equal(weight.scale, plain.scale), "a row's range stays"
    top = torch.full((6, k), 2.0 ** (bits - 1) - 1)
    expected = one_by_one(w, inputs.moment("", k), plain.scale[:, None].expand(6, k), -top, top)
    lost, before = (output_errors(found, w, inputs) for found in (weight, plain))
    assert (lost <= before).all() and (k < 31 or lost.sum() < 0.8 * before.sum())
    rows = lost < before
    assert torch.equal(weight.values.double()[rows], expected[rows])
    assert torch.equal(weight.values[~rows], plain.values[~rows])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("k", [33, 96, 259])
def test_calibration_lowers_the_error_of_the_outputs(k: int, symmetric: bool) -> None:
    w, inputs = torch.randn(40, k), statistics(correlated(k))
    method = Int4(symmetric=symmetric)
    calibrated = output_errors(method.with_inputs(inputs).compress(w), w, inputs)
    plain = output_errors(plainly(w, method), w, inputs)
    assert (calibrated <= plain).all(), "in every row"
    assert calibrated.sum() <= 0.6 * output_errors(method.compress(w), w, inputs).sum()


def test_rows_that_plain_rounding_serves_better_are_rounded_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    w, inputs = torch.randn(4, 67), statistics(correlated(67))
    good = Int4(inputs=inputs).compress(w)

    def spoiled(*arguments: Any) -> Tensor:
        found = original(*arguments)
        assert found is not None
        found[1] = 0
        return found

    original = gptq.rounded
    monkeypatch.setattr(gptq, "rounded", spoiled)
    weight, plain = Int4(inputs=inputs).compress(w), plainly(w, Int4())
    assert torch.equal(weight.decompress()[1], plain.decompress()[1])
    assert torch.equal(weight.decompress()[[0, 2, 3]], good.decompress()[[0, 2, 3]])


def no_moment(k: int) -> InputStatistics:
    """With a negative eigenvalue, as no second moment has."""
    moment = torch.eye(k, dtype=torch.float64)
    moment[3, 3] = -1
    return InputStatistics(1, moment, torch.zeros(k, dtype=torch.float64))


@pytest.mark.parametrize("method", [Int4(), Int8(), Int8(8, 7)], ids=repr)
@pytest.mark.parametrize(
    ("inputs", "said"),
    [(statistics(torch.zeros(3, 67)), "were all zero"), (no_moment(67), "is not positive definite")],
)
def test_inputs_that_say_nothing(method: Int4 | Int8, inputs: InputStatistics, said: str) -> None:
    w = torch.randn(4, 67)
    with noted() as notes:
        weight = method.with_inputs(inputs).compress(w)
    assert torch.equal(weight.decompress(), method.compress(w).decompress())
    assert len(notes) == 1 and said in notes[0]


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(5, 67),  # duplicates
        torch.randn(1, 67),  # one sample
        torch.eye(67)[:3],  # dead features
        torch.randn(9, 67) * 1e-20,
        torch.randn(500, 67) * torch.tensor([1e6] + [1.0] * 66),  # a huge outlier
        torch.randn(500, 67) * torch.tensor([1e30] + [1e-30] * 66),
    ],
    ids=["duplicates", "one", "dead", "tiny", "outlier", "extreme"],
)
@pytest.mark.parametrize("method", [Int4(), Int8()], ids=repr)
def test_inputs_with_few_directions(x: Tensor, method: Int4 | Int8) -> None:
    w, inputs = torch.randn(4, 67), statistics(x)
    weight = method.with_inputs(inputs).compress(w)
    plain = plainly(w, method) if isinstance(method, Int4) else method.compress(w)
    assert (output_errors(weight, w, inputs) <= output_errors(plain, w, inputs)).all()
    assert (weight.decompress() - w).abs().max() < 3, "where the inputs say nothing too"


def test_the_size_of_the_inputs_makes_no_difference() -> None:
    w, x = torch.randn(4, 67), correlated(67)
    small, large = (Int4(inputs=statistics(x * size)).compress(w).decompress() for size in (2.0**-40, 2.0**40))
    assert torch.equal(small, large)


# --- options, and what is refused ---------------------------------------------------------------------------------------


def test_method_is_a_value() -> None:
    assert pc.Int4 is Int4 and pc.weights.Int4Weight is Int4Weight and Int4.name == "int4"
    assert Int4() == Int4(32, False, 8) != Int4(64) and hash(Int4(64)) == hash(Int4(64))
    assert repr(Int4()) == "Int4()"
    assert repr(Int4(128, symmetric=True, activation_bits=16)) == "Int4(group=128, symmetric=True, activation_bits=16)"
    inputs = statistics(torch.randn(3, 2))
    assert Int4(64).with_inputs(inputs) == Int4(64, inputs=inputs)
    with pytest.raises(AttributeError):
        Int4().group = 64  # type: ignore[misc]
    for bits in (8, 16):
        assert Int4(activation_bits=bits).compress(torch.randn(2, 3)).activation_bits == bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"group": group}, "group is .*, expected 32, 64 or 128") for group in (0, 16, 256, -32, 32.0, "32", None)),
        *(({"symmetric": value}, "symmetric is .*, expected True or False") for value in (1, 0, None, "yes")),
        *(({"activation_bits": bits}, "activation_bits is .*, expected 8 or 16") for bits in (7, 4, 32, 8.0, None)),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Int4: {message}"):
        Int4(**options)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.full((4, 8), torch.nan), ValueError, r"Int4: the weight \[4, 8\] holds 32 NaN or Inf"),
        (torch.full((2, 2), 1e300, dtype=torch.float64), ValueError, "NaN or Inf"),
        (torch.empty(2, 2, device="meta"), ValueError, "meta device"),
        (torch.empty(0, 4), ValueError, r"the shape is \[0, 4\]"),
        (torch.empty(4, 0), ValueError, r"the shape is \[4, 0\]"),
        (torch.empty(1, 65537), ValueError, r"the shape is \[1, 65537\]"),
        (torch.ones(8), TypeError, "expected floating point"),
        (torch.ones(2, 2, dtype=torch.int32), TypeError, "expected floating point"),
        ([[1.0]], TypeError, "the weight is list"),
    ],
)
def test_bad_weights(weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Int4().compress(weight)


def test_bad_inputs() -> None:
    w = torch.randn(4, 8)
    with pytest.raises(TypeError, match="Int4: inputs is Tensor, expected InputStatistics or None"):
        Int4(inputs=torch.eye(8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Int4: inputs are 9 features wide, the weight has k = 8"):
        Int4(inputs=statistics(torch.randn(3, 9))).compress(w)
    with pytest.raises(ValueError, match="Int4: inputs are those of an embedding"):
        Int4(inputs=InputStatistics(1, counts=torch.tensor([1]))).compress(w)


@pytest.mark.parametrize(("residual", "expected"), [(Int8(16), "7 or 8"), (Int4(activation_bits=16), "8")], ids=repr)
def test_weights_alone_are_no_residual_of_low_rank_factors(residual: Int4 | Int8, expected: str) -> None:
    """There, rows are quantized once for all that meets them."""
    with pytest.raises(
        ValueError, match=rf"LowRank: residual is Int.*activation_bits=16.*, expected activation_bits {expected}"
    ):
        LowRank(4, residual=residual)
    good = LowRank(2, residual=replace(residual, activation_bits=8), rank_guard=False).compress(torch.randn(8, 8))
    settings = good.settings()
    settings["residual"]["activation_bits"] = 16
    with pytest.raises(ValueError, match=f"the residual's activation_bits is 16, expected {expected}"):
        type(good).from_tensors((8, 8), good.tensors(), settings)
