"""The low-rank convolution: its decompositions against float64, the module against the dense one, and the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.methods import InputStatistics, LowRank, Refused, low_rank_conv
from pycompress.model import compressed_layers
from pycompress.nn import Conv2dGeometry, LowRankConv2d
from pycompress.profiles import PROFILES
from pycompress.weights.low_rank_conv import DECOMPOSITIONS, LowRankConv2dWeight, largest_ranks

Same = Callable[[Tensor, Tensor], bool]
Snapshot = Callable[[nn.Module], Callable[[], bool]]

EPS = float(torch.finfo(torch.float32).eps)
EACH = pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
SHAPES = [(1, 1, 1, 1), (7, 5, 3, 3), (5, 7, 1, 4), (19, 3, 5, 2), (4, 33, 3, 1)]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:`torch.jit")


def method(rank: int | None = None, decomposition: str = "channel", **options: Any) -> LowRank:
    return LowRank(rank, decomposition=decomposition, **{"rank_guard": False, **options})


def compressed(weight: Tensor, how: LowRank, stride: tuple[int, int] = (1, 1)) -> LowRankConv2dWeight:
    """weight [n, c, kh, kw]."""
    made = how.for_convolution(tuple(weight.shape), stride).compress(weight.flatten(1))  # type: ignore[arg-type]
    assert isinstance(made, LowRankConv2dWeight)
    return made


def lost(weight: Tensor, made: LowRankConv2dWeight) -> float:
    """||W - W'||^2 / ||W||^2."""
    w = weight.double().flatten(1)
    return float((w - made.decompress().double()).square().sum() / w.square().sum())


# --- the decompositions -------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_reproduces_the_weight(decomposition: str, shape: tuple[int, int, int, int]) -> None:
    weight = torch.randn(shape)
    most = largest_ranks(decomposition, shape)
    made = compressed(weight, method(max(most), decomposition))
    assert made.ranks == most
    assert (made.shape4, made.shape) == (shape, (shape[0], weight[0].numel()))
    torch.testing.assert_close(made.decompress(), weight.flatten(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("decomposition", ["channel", "spatial"])
def test_no_weight_of_this_rank_is_closer(decomposition: str, rank: int) -> None:
    """The error is the tail of the singular values (Eckart & Young), of the matrix that each decomposition factors."""
    weight = torch.randn(7, 5, 3, 2)
    matrix = weight.flatten(1) if decomposition == "channel" else weight.permute(0, 3, 1, 2).reshape(14, 15)
    squares = torch.linalg.svdvals(matrix.double()).square()
    made = compressed(weight, method(rank, decomposition))
    assert made.ranks == (rank,)
    assert lost(weight, made) == pytest.approx(float(squares[rank:].sum() / squares.sum()), rel=1e-5)


def tucker_tails(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the best r_in, and the best r_out directions leave out, as a share: [r]."""
    sides = []
    for dim in (1, 0):
        squares = torch.linalg.svdvals(weight.double().movedim(dim, 0).flatten(1)).square()
        sides.append(torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) / squares.sum())
    return sides[0], sides[1]


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (5, 2), (4, 6), (5, 7)])
def test_tucker_is_between_its_bounds_and_no_round_loses(
    ranks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(7, 5, 3, 3)
    t_in, t_out = (float(tail[r]) for tail, r in zip(tucker_tails(weight), ranks, strict=True))
    found = lost(weight, low_rank_conv.tucker(weight, ranks))
    assert max(t_in, t_out) - 1e-6 <= found <= t_in + t_out + 1e-6
    rounds = []
    for count in (1, 2, 5, 10):
        monkeypatch.setattr(low_rank_conv, "HOOI_ROUNDS", count)
        rounds.append(lost(weight, low_rank_conv.tucker(weight, ranks)))
    assert all(after <= before + 1e-6 for before, after in pairwise(rounds))


def test_tucker_finds_a_weight_that_has_these_ranks() -> None:
    core, up, down = torch.randn(3, 2, 3, 3), torch.randn(9, 3, 1, 1), torch.randn(2, 8, 1, 1)
    weight = LowRankConv2dWeight("tucker", down, up, core).decompress().view(9, 8, 3, 3)
    assert low_rank_conv.tucker_ranks(weight, 1e-10) == (2, 3)
    assert compressed(weight, method(error=1e-5, decomposition="tucker")).ranks == (2, 3)
    assert lost(weight, low_rank_conv.tucker(weight, (2, 3))) < 1e-10


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.0])
def test_tucker_ranks_are_the_cheapest_that_hosvd_allows(share: float, stride: tuple[int, int]) -> None:
    weight = torch.randn(6, 5, 3, 3) * torch.logspace(0, -2, 5)[:, None, None]
    t_in, t_out = tucker_tails(weight)
    fits = [
        (low_rank_conv.multiply_adds("tucker", (6, 5, 3, 3), (i, o), stride), (i, o))
        for i in range(1, 6)
        for o in range(1, 7)
        if float(t_in[i] + t_out[o]) <= share + 1e-12
    ]
    assert low_rank_conv.tucker_ranks(weight, share, stride) == min(fits)[1]


@EACH
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_energy_and_error_are_kept(decomposition: str, share: float) -> None:
    weight = torch.randn(12, 8, 3, 3) * torch.logspace(0, -2, 8)[:, None, None]
    by_energy = compressed(weight, method(energy=share, decomposition=decomposition))
    by_error = compressed(weight, method(error=(1 - share) ** 0.5, decomposition=decomposition))
    assert by_energy.ranks == by_error.ranks
    assert lost(weight, by_energy) <= 1 - share + 1e-6
    if decomposition != "tucker":
        smaller = compressed(weight, method(by_energy.ranks[0] - 1 or 1, decomposition))
        assert by_energy.ranks == (1,) or lost(weight, smaller) > 1 - share


def test_calibrated_channels_lose_less_of_the_outputs() -> None:
    weight, x = torch.randn(16, 4, 3, 3), torch.randn(200, 36) * torch.logspace(0, -3, 36)
    moment = (x.T @ x).double() / len(x)
    statistics = InputStatistics(len(x), moment, x.double().mean(0))

    def output_error(made: LowRankConv2dWeight) -> float:
        return float(((weight.flatten(1) - made.decompress()) @ x.T).norm() / (weight.flatten(1) @ x.T).norm())

    plain, aware = (compressed(weight, how) for how in (method(6), method(6).with_inputs(statistics)))
    optimal = torch.linalg.svdvals((weight.flatten(1) @ x.T).double()).square()
    assert output_error(aware) == pytest.approx(float((optimal[6:].sum() / optimal.sum()).sqrt()), rel=0.05)
    assert output_error(aware) < 0.7 * output_error(plain)
    with pytest.raises(ValueError, match="inputs are 36 features wide"):
        compressed(torch.randn(8, 5, 3, 3), method(2).with_inputs(statistics))


def test_a_rank_beyond_the_largest_is_refused() -> None:
    weight = torch.randn(8, 4, 3, 3)
    for decomposition, most in (("channel", 8), ("spatial", 12), ("tucker", 8)):
        compressed(weight, method(most, decomposition))
        with pytest.raises(ValueError, match=rf"LowRank: rank is {most + 1}, expected at most {most} for a weight"):
            compressed(weight, method(most + 1, decomposition))
    with pytest.raises(ValueError, match=r"LowRank: the weight is \[8, 35\], expected"):
        method(2).for_convolution((8, 4, 3, 3), (1, 1)).compress(torch.randn(8, 35))


@EACH
@pytest.mark.parametrize("stride", [(1, 1), (1, 2), (2, 2)])
def test_the_guard_takes_what_is_cheaper_and_names_the_break_even(decomposition: str, stride: tuple[int, int]) -> None:
    shape = (32, 24, 3, 3)
    weight, most = torch.randn(shape), max(largest_ranks(decomposition, shape))
    limits = largest_ranks(decomposition, shape)

    def cost(rank: int) -> float:
        return low_rank_conv.cost(
            decomposition, shape, tuple(min(rank, limit) for limit in limits), stride, PROFILES["avx2"]
        )

    even = max((rank for rank in range(1, most + 1) if cost(rank) < 1), default=0)
    assert 0 < even < most
    compressed(weight, method(even, decomposition, rank_guard=True), stride)
    with pytest.raises(
        Refused, match=rf"rank {even + 1}.*the break-even is rank {even}\b|the break-even is rank .*x{even}\b"
    ):
        compressed(weight, method(even + 1, decomposition, rank_guard=True), stride)


def test_the_cost_counts_what_runs_before_a_stride() -> None:
    shape = (8, 4, 3, 5)
    count = low_rank_conv.multiply_adds
    assert count("channel", shape, (2,), (2, 3)) == 2 * 4 * 15 + 2 * 8
    assert count("spatial", shape, (2,), (2, 3)) == 2 * 4 * 3 * 3 + 2 * 8 * 5
    assert count("tucker", shape, (2, 3), (2, 3)) == 2 * 4 * 6 + 2 * 3 * 15 + 3 * 8
    assert low_rank_conv.share_of_bytes("tucker", shape, (2, 3)) == (8 + 90 + 24) / (8 * 4 * 15)


# --- the canonical weight -----------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "channel": {"decomposition": "channel", "kernel_size": [3, 2], "rank": 3},
    "spatial": {"decomposition": "spatial", "kernel_size": [3, 2], "rank": 3},
    "tucker": {"decomposition": "tucker", "kernel_size": [3, 2], "ranks": [2, 3]},
}


def canonical(decomposition: str, shape: tuple[int, int] = (7, 30)) -> LowRankConv2dWeight:
    sizes = LowRankConv2dWeight.expected(shape, SETTINGS[decomposition])
    tensors = {name: torch.randn(size) for name, (size, _) in sizes.items()}
    return LowRankConv2dWeight.from_tensors(shape, tensors, SETTINGS[decomposition])


@EACH
def test_the_stored_form(decomposition: str, same: Same) -> None:
    weight = canonical(decomposition)
    assert json.loads(json.dumps(weight.settings())) == SETTINGS[decomposition]
    again = LowRankConv2dWeight.from_tensors(weight.shape, weight.tensors(), weight.settings())
    assert same(again.decompress(), weight.decompress())
    assert weight.decompress().shape == weight.shape == (7, 30)
    assert weight.kernel_size == (3, 2)


HOSTILE: dict[str, tuple[str, dict[str, Any], str]] = {
    "another decomposition": ("channel", {"decomposition": "cp"}, "decomposition is 'cp', expected one of"),
    "a decomposition that is none": ("channel", {"decomposition": ["channel"]}, "decomposition is"),
    "rank 0": ("channel", {"rank": 0}, "rank is 0, expected 1 to 7"),
    "a rank too large": ("spatial", {"rank": 15}, "rank is 15, expected 1 to 14"),
    "a boolean": ("channel", {"rank": True}, "rank is True, expected 1 to 7"),
    "an enormous rank": ("channel", {"rank": 2**62}, "rank is 4611686018427387904, expected 1 to 7"),
    "no number": ("channel", {"rank": "3"}, "rank is '3'"),
    "another key": ("channel", {"bits": 8}, "the settings are"),
    "ranks for one rank": ("channel", {"ranks": [2, 3]}, "the settings are"),
    "one of two ranks": ("tucker", {"ranks": [2]}, r"ranks is \[2\], expected two numbers"),
    "a rank of two": ("tucker", {"ranks": [6, 3]}, r"ranks is \[6, 3\], expected 1 to 5 and 7"),
    "ranks that are none": ("tucker", {"ranks": [2.0, 3]}, "ranks is .*expected two numbers"),
    "ranks that are a number": ("tucker", {"ranks": 2}, "ranks is 2, expected two numbers"),
    "a kernel that does not divide": ("channel", {"kernel_size": [4, 2]}, r"kernel_size is \[4, 2\], expected a divisor of k = 30"),
    "an enormous kernel": ("channel", {"kernel_size": [2**40, 1]}, "kernel_size is .*expected two numbers from 1 to 65536"),
    "a kernel of one number": ("channel", {"kernel_size": [3]}, "kernel_size is"),
    "a kernel of three numbers": ("channel", {"kernel_size": [3, 2, 1]}, "kernel_size is"),
    "a kernel that is none": ("channel", {"kernel_size": None}, "kernel_size is None"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_settings_are_refused(case: str) -> None:
    decomposition, change, message = HOSTILE[case]
    with pytest.raises(ValueError, match=f"LowRankConv2dWeight: {message}"):
        LowRankConv2dWeight.expected((7, 30), {**SETTINGS[decomposition], **change})


@EACH
def test_missing_settings_and_wrong_tensors_are_refused(decomposition: str) -> None:
    weight = canonical(decomposition)
    for name in SETTINGS[decomposition]:
        with pytest.raises(ValueError, match="LowRankConv2dWeight: "):
            LowRankConv2dWeight.expected((7, 30), {k: v for k, v in SETTINGS[decomposition].items() if k != name})
    for name, tensor in weight.tensors().items():
        for wrong in (
            tensor.double(),
            tensor.flatten(),
            tensor[:-1],
            torch.full_like(tensor, torch.nan),
            tensor.to("meta"),
        ):
            with pytest.raises(ValueError, match="LowRankConv2dWeight: "):
                LowRankConv2dWeight.from_tensors((7, 30), {**weight.tensors(), name: wrong}, weight.settings())
            if wrong.shape != tensor[:-1].shape:  # fewer output channels are another weight
                with pytest.raises(ValueError, match="LowRankConv2dWeight: "):
                    LowRankConv2dWeight(decomposition, **{**weight.parts(), name.removeprefix("low_rank_"): wrong})
        with pytest.raises(ValueError, match="LowRankConv2dWeight: the tensors are"):
            LowRankConv2dWeight.from_tensors((7, 30), {name: tensor}, weight.settings())


def test_fields_that_do_not_fit_each_other() -> None:
    weight = canonical("tucker")
    for wrong in ("channel", "spatial", "cp"):
        with pytest.raises(ValueError, match="LowRankConv2dWeight: "):
            LowRankConv2dWeight(wrong, weight.down, weight.up, weight.core)
    with pytest.raises(ValueError, match=r"ranks is \[\d\], expected two numbers"):
        LowRankConv2dWeight("tucker", weight.down, weight.up)


# --- the module ---------------------------------------------------------------------------------------------------------

# The arguments of nn.Conv2d behind the channels.
CONVS: dict[str, dict[str, Any]] = {
    "1x1": {"kernel_size": 1},
    "1x1 with a stride and padding": {"kernel_size": 1, "stride": 2, "padding": 1},
    "3x3 padded": {"kernel_size": 3, "padding": 1},
    "3x3 padded with a stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "3x3 dilated, same": {"kernel_size": 3, "dilation": (1, 3), "padding": "same"},
    "3x3, a stride beyond the kernel": {"kernel_size": 3, "stride": (4, 5)},
    "3x3, more padding than kernel": {"kernel_size": 3, "padding": (4, 5)},
    "5x5": {"kernel_size": 5, "padding": (2, 1), "stride": (1, 3)},
    "1x7": {"kernel_size": (1, 7), "padding": (0, 3)},
    "7x1": {"kernel_size": (7, 1), "stride": (3, 2)},
    "4x2, same": {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)},
    "2x3, valid": {"kernel_size": (2, 3), "padding": "valid"},
    "3x3 reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "3x5 circular with a stride": {
        "kernel_size": (3, 5),
        "padding": (2, 3),
        "stride": (2, 1),
        "padding_mode": "circular",
    },
}
EVERY = pytest.mark.parametrize("name", CONVS)


def dense(name: str = "3x3 padded", channels: int = 6, n: int = 9, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, n, **CONVS[name], bias=bias)


def layer(
    name: str = "3x3 padded", decomposition: str = "channel", rank: int = 4, activation: str = "none", **sizes: Any
) -> LowRankConv2d:
    return LowRankConv2d.from_dense(dense(name, **sizes), method(rank, decomposition), activation)


@EACH
@EVERY
def test_at_full_rank_it_is_the_dense_layer(name: str, decomposition: str) -> None:
    conv = dense(name)
    made = LowRankConv2d.from_dense(
        conv, method(max(largest_ranks(decomposition, tuple(conv.weight.shape))), decomposition)
    )  # type: ignore[arg-type]
    for attribute in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    ):  # fmt: skip
        assert getattr(made, attribute) == getattr(conv, attribute), attribute
    for x in (torch.randn(2, 6, 9, 12), torch.randn(6, 9, 12), torch.randn(0, 6, 9, 12)):
        torch.testing.assert_close(made(x), conv(x), rtol=1e-4, atol=1e-5)
    assert made(input=x).shape == conv(input=x).shape
    assert not list(made.parameters())


def test_bad_calls_are_refused() -> None:
    made, weight = layer(), canonical("channel")
    with pytest.raises(RuntimeError, match="to have 6 channels, but got 5"):
        made(torch.randn(1, 5, 5, 5))
    with pytest.raises(ValueError, match=r"LowRankConv2d: the weight is .*expected k = 24"):
        LowRankConv2d.from_weight(weight, Conv2dGeometry(4, (3, 2)))
    with pytest.raises(ValueError, match=r"LowRankConv2d: kernel_size is \(2, 3\), expected \(3, 2\) as in the weight"):
        LowRankConv2d.from_weight(weight, Conv2dGeometry(5, (2, 3)))
    with pytest.raises(TypeError, match="the dense layer is Linear, expected Conv2d"):
        LowRankConv2d.replacing(nn.Linear(30, 7), weight)


# --- the whole model ----------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding="valid"),
        nn.BatchNorm2d(48),
        nn.SiLU(),
        nn.Conv2d(48, 48, 3, groups=3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 32),
    ).eval()


@EACH
def test_compress(decomposition: str, snapshot: Snapshot) -> None:
    model = network()
    unchanged = snapshot(model)
    plan = {"8": None, "*": method(6, decomposition)}
    made = pc.compress(model, plan)
    assert unchanged()
    assert [type(module) for module in compressed_layers(made).values()] == [LowRankConv2d] * 2
    assert isinstance(made[1], nn.Identity)
    assert made[0].activation == "relu"
    table = pc.summary(made)
    records = {record.name: record for record in table.layers}
    assert records["2"].method == "low_rank"
    assert records["2"].label == made[2].label
    assert records["2"].bytes == 4 * (48 + sum(t.numel() for t in made[2].canonical().tensors().values()))
    weight = model[2].weight.detach()
    assert records["2"].error == pytest.approx(float((made[2].weight - weight).norm() / weight.norm()), rel=1e-4)
    assert "groups is 3" in records["5"].reason
    assert f"{made[2].label}" in str(table)


def test_a_refused_layer_stays_dense_with_the_reason() -> None:
    made = pc.compress(network(), {"8": None, "*": LowRank(12)})
    records = {record.name: record for record in pc.summary(made).layers}
    assert records["0"].method is None
    assert "the break-even is rank" in records["0"].reason
    assert records["2"].method == "low_rank"
    for how, reason in ((LowRank(4, bits=8), "linear layers only"), (LowRank("break-even"), "linear layers only")):
        dense_still = pc.compress(network(), {"8": None, "*": how})
        assert reason in {record.name: record for record in pc.summary(dense_still).layers}["2"].reason


def test_only_if_faster_and_calibration() -> None:
    model, x = network(), torch.randn(4, 3, 12, 12)
    how = method(6)
    with pc.calibrate(model) as calibration:
        model(x)
    aware, plain = (pc.compress(model, {"8": None, "*": how}, calibration=c) for c in (calibration, None))
    patches = nn.functional.unfold(model[:2](x).detach(), 3, stride=2).movedim(1, 2).flatten(0, 1)
    errors = [float((patches @ (model[2].weight.detach() - m[2].weight).flatten(1).T).norm()) for m in (aware, plain)]
    assert errors[0] < 0.9 * errors[1]
    timed = pc.compress(model, {"8": None, "*": how}, example_inputs=x, only_if_faster=True)
    assert all(record.us is not None for record in pc.summary(timed).layers if record.name in {"0", "2"})
