"""The harness, the peers and the grids. Nothing here asserts a time: the clock is faked where it matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pycompress import benchmark
from pycompress.benchmark import (
    Record,
    UnavailableError,
    environment,
    grid,
    harness,
    int4,
    int8,
    low_rank,
    peers,
    sparse,
)
from pycompress.benchmark.break_even import Crossing, crossing
from pycompress.benchmark.harness import Timing
from pycompress.benchmark.sparse import Candidate
from pycompress.methods import Int4

ALL = {**int8.OURS, **int8.PEERS, **int8.SPINNING, **sparse.PEERS}


class Clock:
    """A clock that only advances when a candidate says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def candidate(self, name: str, seconds: float) -> Callable[[], object]:
        def run() -> None:
            self.now += seconds
            self.log.append(name)

        return run

    def pause(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(harness.time, "perf_counter", lambda: fake.now)
    monkeypatch.setattr(harness.time, "sleep", fake.pause)
    return fake


def test_timing_gives_median_and_quartiles() -> None:
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)


def test_ratio_is_taken_round_by_round() -> None:
    # The rounds drift by a factor of ten, the ratio does not: 2, 4, 3. The ratio of the medians would be 4.
    found = benchmark.ratio(Timing((2.0, 4.0, 60.0)), Timing((1.0, 1.0, 20.0)))
    assert found == (3.0, 2.5, 3.5)


def test_ratio_refuses_different_numbers_of_rounds() -> None:
    with pytest.raises(ValueError, match="shorter"):
        benchmark.ratio(Timing((1.0, 2.0)), Timing((1.0,)))


def test_geometric_mean() -> None:
    assert harness.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert harness.geometric_mean([1.0, 10.0, 100.0]) == pytest.approx(10.0)


def test_candidates_take_turns(clock: Clock) -> None:
    candidates = {name: clock.candidate(name, 1.0) for name in "abc"}
    timings = benchmark.interleave(candidates, rounds=4, min_time_s=0.5)
    assert clock.log[-12:] == list("abc" * 4)
    assert {name: timing.seconds for name, timing in timings.items()} == dict.fromkeys("abc", (1.0,) * 4)


def test_a_turn_lasts_about_the_time_asked_for(clock: Clock) -> None:
    candidates = {"fast": clock.candidate("fast", 2**-10), "slow": clock.candidate("slow", 1.0)}
    timings = benchmark.interleave(candidates, rounds=1, min_time_s=2**-4)
    warm_call_and_turn = clock.log[: -1 - clock.log[::-1].index("slow", 1) : -1].count("fast")
    assert warm_call_and_turn == 1 + 64
    assert timings["fast"].seconds == (2**-10,)
    assert timings["slow"].seconds == (1.0,)


def test_pauses_are_not_timed(clock: Clock) -> None:
    timings = benchmark.interleave({"a": clock.candidate("a", 1.0)}, rounds=3, min_time_s=0.5, pause_s=7.0)
    assert timings["a"].seconds == (1.0, 1.0, 1.0)


def test_interleave_refuses_zero_rounds() -> None:
    with pytest.raises(ValueError, match="rounds is 0"):
        benchmark.interleave({}, rounds=0, min_time_s=0.0)


@pytest.mark.parametrize(("rounds", "done"), [(2, 2), (3, 3), (9, 3)])
def test_a_spent_budget_ends_the_rounds_but_not_before_the_third(clock: Clock, rounds: int, done: int) -> None:
    candidates = {name: clock.candidate(name, 1.0) for name in "ab"}
    timings = benchmark.interleave(candidates, rounds=rounds, min_time_s=0.5, budget_s=0.0)
    assert [len(timing.seconds) for timing in timings.values()] == [done, done]


def test_a_budget_is_spent_in_whole_rounds(clock: Clock) -> None:
    candidates = {name: clock.candidate(name, 1.0) for name in "ab"}
    # 4 s to warm up and 2 s a round: the sixth round begins at 14 s, the seventh would at 16 s.
    timings = benchmark.interleave(candidates, rounds=9, min_time_s=0.5, budget_s=15.0)
    assert [len(timing.seconds) for timing in timings.values()] == [6, 6]


def test_rotating_calls_each_in_turn() -> None:
    run = harness.rotating([lambda: "a", lambda: "b", lambda: "c"])
    assert [run() for _ in range(7)] == list("abcabca")


def test_cache_size_is_read_from_the_system(tmp_path: Any) -> None:
    assert environment.l3_bytes(tmp_path) == 32 << 20
    for index, size in enumerate(("48K\n", "2048K\n", "36M\n")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size)
    assert environment.l3_bytes(tmp_path) == 36 << 20


def test_environment_is_json() -> None:
    found = json.loads(json.dumps(environment.Environment.collect().as_dict()))
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["processor"]


def test_dense_linear_repeats_its_weights() -> None:
    for weights in ("gaussian", "uniform"):
        a, b = (peers.dense_linear(48, 32, weights) for _ in range(2))
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.bias, b.bias)
        assert 0.4 / 48**0.5 < float(a.weight.std()) < 1.2 / 48**0.5
    with pytest.raises(ValueError, match="'normal'"):
        peers.dense_linear(4, 4, "normal")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("m", [1, 5])
def test_every_candidate_is_close_to_fp32(name: str, m: int) -> None:
    usable, missing = peers.available({name: ALL[name]})
    if not usable:
        pytest.skip(f"{name}: {missing[name]}")
    linear = peers.dense_linear(96, 80)
    x = torch.randn(m, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        call = ALL[name](linear)(x)
        call.run()
        y = call.output()
        assert y.shape == (m, 80)
        assert peers.relative_error(y, linear(x)) < 0.06  # u8 * s8 that saturates is the farthest


def test_torch_engine_is_put_back() -> None:
    before = torch.backends.quantized.engine
    peers.available(int8.PEERS)
    assert torch.backends.quantized.engine == before
    with pytest.raises(UnavailableError, match="no_such_engine"):
        benchmark.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), "no_such_engine")
    assert torch.backends.quantized.engine == before


def test_a_peer_that_fails_is_reported() -> None:
    def broken(linear: nn.Linear) -> peers.Bind:
        raise UnavailableError("not installed: something")

    usable, missing = peers.available({"broken": broken, "torch_fp32": peers.torch_fp32})
    assert list(usable) == ["torch_fp32"]
    assert missing == {"broken": "not installed: something"}


def test_cells_have_cold_weights_at_one_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "l3_bytes", lambda: 1 << 20)
    cells = int8.GRID.cells([(1024, 512), (64, 64)], [1, 8])
    assert [(c["k"], c["m"], c["weights"]) for c in cells] == [
        (1024, 1, "warm"),
        (1024, 8, "warm"),
        (1024, 1, "cold"),
        (64, 1, "warm"),  # 384 copies of this one would be needed
        (64, 8, "warm"),
    ]
    assert grid.copies_to_leave_cache(1024 * 512) == 3
    assert grid.copies_to_leave_cache(1 << 30) == 2


def test_measuring_a_small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "l3_bytes", lambda: 1 << 12)
    builds = {**int8.OURS, "torch_fp32": peers.torch_fp32}
    cells = int8.GRID.cells([(64, 32)], [1, 4])
    measured = list(int8.GRID.measure(cells, builds, rounds=2, min_time_s=0.0, pause_s=0.0))
    assert [[record["candidate"] for record in records] for records in measured] == [list(builds)] * 3
    for cell, records in zip(cells, measured, strict=True):
        for record in records:
            assert {key: record[key] for key in cell} == cell
            assert record["gops"] == pytest.approx(2e-3 * cell["m"] * 64 * 32 / record["us"])
            assert record["relative_error"] < 0.05
            assert set(record["time_ratio"]) == set(builds) - {record["candidate"]}


def record(candidate: str, m: int, weights: str = "warm", **time_ratio: float) -> Record:
    ratios = {peer: [value, value, value] for peer, value in time_ratio.items()}
    return {"candidate": candidate, "m": m, "k": 64, "n": 32, "weights": weights, "time_ratio": ratios}


def test_summary_compares_with_the_fastest_peer_of_each_cell() -> None:
    lines = int8.summarize(
        [
            record("pycompress_a7", 1, torch_fp32=8.0, ort_s8=2.0, ort_s8_spinning=1.0),
            record("pycompress_a7", 128, torch_fp32=0.5, ort_s8=2.0),
            record("pycompress_a7", 1, "cold", torch_fp32=3.0),
            record("torch_fp32", 1, ort_s8=0.1),
        ]
    )
    found = {line.scope: (line.cells, line.geometric_mean, line.worst, line.worst_cell) for line in lines}
    assert found == {
        "whole grid": (2, pytest.approx(1.0), 0.5, "m=128 k=64 n=32"),
        "m >= 128": (1, pytest.approx(0.5), 0.5, "m=128 k=64 n=32"),
        "m = 1": (1, pytest.approx(2.0), 2.0, "m=1 k=64 n=32"),
        "m = 1, cold weights": (1, pytest.approx(3.0), 3.0, "m=1 k=64 n=32"),
        "m = 1, ONNX Runtime spinning": (1, pytest.approx(1.0), 1.0, "m=1 k=64 n=32"),
    }


def test_summary_keeps_exact_and_saturating_peers_apart() -> None:
    measured = record("pycompress_a8", 128, torch_fbgemm=1.5, ort_u8=1.2, ort_s8=0.9, torch_fp32=0.5)
    found = {(line.against, line.scope): line.worst for line in int8.summarize([measured])}
    assert found["the best exact peer", "m >= 128"] == 1.2
    assert found["ONNX Runtime s8, which saturates", "m >= 128"] == 0.9


def test_json_lines_round_trip(tmp_path: Any) -> None:
    found = environment.Environment.collect()
    records = [record("pycompress_a7", 1, torch_fp32=2.0), record("torch_fp32", 1)]
    path = tmp_path / "results" / "int8.jsonl"
    benchmark.write_json_lines(path, found, records)
    first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    assert first == {"environment": json.loads(json.dumps(found.as_dict()))}
    assert rest == records


# --- sparse -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 7])
def test_torch_csr_says_which_form_it_took(m: int) -> None:
    linear = sparse.pruned(peers.dense_linear(48, 32), "unstructured", 75)
    x = torch.randn(m, 48, generator=torch.Generator().manual_seed(0))
    call = peers.torch_csr(linear)(x)
    assert call.form in {"F.linear", "torch.addmm"}
    assert call.weight_bytes == 4 * 33 + (4 + 4) * 48 * 32 // 4
    with torch.inference_mode():
        assert peers.relative_error(call.output(), linear(x)) < 1e-6


@pytest.mark.parametrize(("pattern", "zeros"), [("unstructured", 80), ("16x4", 50), ("4:16", 75)])
def test_pruned_layers_keep_what_they_keep(pattern: str, zeros: int) -> None:
    linear = peers.dense_linear(64, 32)
    found = sparse.pruned(linear, pattern, zeros)
    kept = found.weight != 0
    assert int(kept.sum()) == round(64 * 32 * (100 - zeros) / 100)
    assert torch.equal(found.weight[kept], linear.weight[kept])
    assert torch.equal(found.bias, linear.bias)
    assert not found.weight.requires_grad


def test_dense_candidates_get_the_layer_itself() -> None:
    linear = peers.dense_linear(16, 16)
    assert sparse.pruned(linear, "dense", 0) is linear


def test_the_first_layer_of_each_shape_is_taken() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)))
    assert sparse.linear_layers(model) == {(8, 4): model[0], (4, 8): model[2][0]}


def test_sparse_candidates_without_peers_are_ours() -> None:
    everything = sparse.sparse_candidates(sparse.PEERS)
    ours = sparse.sparse_candidates({})
    assert set(everything) - set(ours) == {*grid.DENSE_FP32, *(f"torch_csr_{zeros}" for zeros in sparse.ZEROS)}
    assert set(sparse.INT8) < set(ours)
    assert everything["16x4_int8_80"].pattern == "16x4"
    assert everything["4:16_int8"].zeros == 75


def test_the_floor_is_the_longer_of_computing_and_reading() -> None:
    peaks = {"fp32_fma": 100.0, "maddubs_d2": 400.0}
    computing = {32: 2_000_000}  # 20 us
    assert grid.floor_us(computing, peaks, 1_000_000, 10.0) == pytest.approx(100.0)
    assert grid.floor_us(computing, peaks, 1_000, 10.0) == pytest.approx(20.0)
    assert grid.floor_us(computing, peaks, 1_000_000, None) == pytest.approx(20.0)
    assert grid.floor_us({**computing, 8: 2_000_000}, peaks, 1_000, 10.0) == pytest.approx(25.0)  # one after the other
    assert grid.floor_us(computing, {}, 1_000_000, 10.0) == pytest.approx(100.0)
    assert grid.floor_us(computing, {}, 1_000_000, None) is None


def stand_ins() -> dict[str, Candidate]:
    """Dense layers under the names of sparse ones: the grid cannot tell."""
    return {
        "torch_fp32": Candidate(peers.torch_fp32),
        "sparse_fp32_80": Candidate(peers.torch_fp32, 32, "unstructured", 80),
        "torch_csr_80": Candidate(peers.torch_csr, 32, "unstructured", 80),
        "sparse_int8_80": Candidate(peers.torch_fp32, 8, "unstructured", 80),
    }


def test_measuring_a_small_sparse_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"fp32_fma": 100.0, "maddubs_d2": 250.0}
    monkeypatch.setattr(grid, "probe_peaks", lambda: peaks)
    monkeypatch.setattr(grid, "probe_bandwidth", lambda n_bytes, seconds: 10.0)
    candidates = stand_ins()
    cells = sparse.GRID.cells([(64, 32), (32, 16)], [1, 128])
    found = list(sparse.GRID.measure(cells, candidates, rounds=2, min_time_s=0.0, pause_s=0.0))
    assert [[record["candidate"] for record in records] for records in found] == [list(candidates)] * 4
    for cell, records in zip(cells, found, strict=True):
        m, k, n = cell["m"], cell["k"], cell["n"]
        for record in records:
            nnz = round(0.2 * k * n) if record["zeros"] else k * n
            assert {key: record[key] for key in cell} == cell
            assert record["nnz"] == nnz
            assert record["rounds"] == 2
            assert record["gops"] == pytest.approx(2e-3 * m * k * n / record["us"])
            assert record["effective_gops"] == pytest.approx(record["gops"] * nnz / (k * n))
            assert record["relative_error"] < 1e-6
            references = {
                name for name in candidates if name.startswith("torch_") or name in ("ort_fp32", "dense_int8")
            }
            assert set(record["time_ratio"]) == references - {record["candidate"]}
            computing = 2e-3 * m * nnz / peaks["maddubs_d2" if record["bits"] == 8 else "fp32_fma"]
            reading = 1e-3 * record["weight_bytes"] / 10.0 if m == 1 else 0.0
            assert record["floor_us"] == pytest.approx(max(computing, reading))
            assert record["share_of_floor"] == pytest.approx(record["floor_us"] / record["us"])
            json.dumps(record)


def test_a_sparse_grid_takes_the_layers_it_is_given() -> None:
    layer = peers.dense_linear(24, 8)
    layer.weight.data[:, ::2] = 0
    cells = sparse.GRID.cells([(24, 8)], [2], source="somewhere")
    candidates = {"torch_fp32": Candidate(peers.torch_fp32)}
    (records,) = sparse.GRID.measure(cells, candidates, layer=lambda *_: layer, rounds=1, min_time_s=0.0)
    assert records[0]["nnz"] == 24 * 8 // 2
    assert records[0]["source"] == "somewhere"


def test_every_sparse_candidate_is_close_to_fp32() -> None:
    usable, _ = peers.available(sparse.PEERS)
    candidates = sparse.sparse_candidates(usable)
    cells = sparse.GRID.cells([(96, 64)], [1, 5])
    for records in sparse.GRID.measure(cells, candidates, rounds=1, min_time_s=0.0, pause_s=0.0):
        for record in records:
            assert record["relative_error"] < (1e-5 if record["bits"] == 32 else 0.05), record["candidate"]


def sparse_record(candidate: str, m: int, n: int = 32, **time_ratio: float) -> Record:
    zeros = candidate.rsplit("_", 1)[-1]
    return {**record(candidate, m, **time_ratio), "n": n, "zeros": int(zeros) if zeros.isdigit() else 0}


def test_sparse_summary() -> None:
    lines = sparse.summarize(
        [
            sparse_record("sparse_fp32_80", 1, torch_fp32=0.5, ort_fp32=0.25, torch_csr_80=2.0),
            sparse_record("sparse_fp32_80", 512, torch_fp32=4.0, ort_fp32=3.0, torch_csr_80=8.0),
            sparse_record("sparse_fp32_80", 512, n=48, torch_fp32=12.0, torch_csr_80=8.0),
            sparse_record("16x4_int8_80", 32, torch_fp32=2.0, dense_int8=1.0),
            sparse_record("16x4_int8_80", 512, torch_fp32=6.0, dense_int8=3.0),
            sparse_record("4:16_int8", 32, torch_fp32=5.0, dense_int8=2.5),
            sparse_record("torch_fp32", 512, dense_int8=0.1),
        ]
    )
    found = {
        (line.candidate, line.against, line.scope): (line.cells, line.geometric_mean, line.worst) for line in lines
    }
    dense = "the best dense fp32"
    assert found == {
        ("sparse_fp32_80", dense, "m = 1"): (1, pytest.approx(0.25), 0.25),
        ("sparse_fp32_80", dense, "m = 512"): (2, pytest.approx(6.0), 3.0),
        ("sparse_fp32_80", "torch CSR", "whole grid"): (3, pytest.approx(128 ** (1 / 3)), 2.0),
        ("sparse_fp32_80", "torch CSR", "m >= 128"): (2, pytest.approx(8.0), 8.0),
        ("16x4_int8_80", dense, "m >= 128"): (1, pytest.approx(6.0), 6.0),
        ("16x4_int8_80", "our dense int8", "m >= 128"): (1, pytest.approx(3.0), 3.0),
        ("4:16_int8", dense, "m >= 32"): (1, pytest.approx(5.0), 5.0),
    }
    worst = next(line for line in lines if line.scope == "m = 512")
    assert worst.worst_cell == "m=512 k=64 n=32"


def test_the_forms_of_torch_csr_are_counted() -> None:
    records = [
        {**sparse_record("torch_csr_80", 8, n=n), "form": form}
        for n, form in ((16, "F.linear"), (32, "torch.addmm"), (48, "torch.addmm"))
    ]
    (line,) = sparse.csr_forms([*records, sparse_record("sparse_fp32_80", 8)])
    assert line.endswith("m = 8: torch.addmm (2), F.linear (1)")
    assert sparse.csr_forms([sparse_record("sparse_fp32_80", 8)]) == []


def test_crossing_is_interpolated_in_the_logarithm() -> None:
    assert crossing({0.2: 4.0, 0.4: 0.25, 0.1: 8.0}) == Crossing(pytest.approx(0.3))
    assert crossing({0.2: 2.0, 0.5: 0.25}) == Crossing(pytest.approx(0.3))
    assert crossing({0.2: 1.0, 0.5: 0.5}) == Crossing(pytest.approx(0.2))


def test_crossing_beyond_what_was_measured() -> None:
    assert crossing({0.05: 0.9, 0.5: 0.4}) == Crossing(0.05, "below")
    assert crossing({0.05: 9.0, 0.8: 1.1}) == Crossing(0.8, "above")
    assert str(Crossing(0.05, "below")) == "below 5%"
    assert str(Crossing(0.423)) == "42%"


def test_the_first_crossing_counts() -> None:
    assert crossing({0.1: 4.0, 0.3: 0.25, 0.5: 2.0, 0.8: 0.5}) == Crossing(pytest.approx(0.2))


def test_break_even_per_number_of_rows() -> None:
    records = [
        sparse_record("sparse_fp32_80", 8, torch_fp32=4.0),
        sparse_record("sparse_fp32_60", 8, torch_fp32=1.0, ort_fp32=0.25),
        sparse_record("sparse_fp32_80", 8, n=48, torch_fp32=16.0),
        sparse_record("sparse_fp32_60", 8, n=48, torch_fp32=2.0),
        sparse_record("sparse_fp32_80", 1, torch_fp32=0.5),
        sparse_record("16x4_int8_80", 8, torch_fp32=4.0),
        sparse_record("torch_fp32", 8),
    ]
    one, eight = sparse.break_even_density(records)
    assert (one.m, one.mean) == (1, Crossing(0.2, "below"))
    assert eight.m == 8
    assert eight.shapes == {(64, 32): Crossing(pytest.approx(0.3)), (64, 48): Crossing(0.4, "above")}
    assert eight.mean.share == pytest.approx(0.2 + 0.2 * 3 / 3.5)  # from a mean of 8 to one of 1 / sqrt 2
    assert "m = 8: 37% non-zeros over 2 shape(s), from 30% to above 40%" in str(eight)
    assert "20%, 40%" in str(eight)


# --- low rank -----------------------------------------------------------------------------------------------------------


def test_two_linears_repeat_their_weights() -> None:
    a, b = (peers.two_linears(48, 8, 32) for _ in range(2))
    assert all(torch.equal(*both) for both in zip(a.parameters(), b.parameters(), strict=True))
    assert [list(weight.shape) for weight in a.parameters()] == [[8, 48], [32, 8], [32]]
    assert peers.two_linears(48, 8, 32, bias=False).up.bias is None


def test_low_rank_candidates_without_peers_are_ours() -> None:
    everything = low_rank.low_rank_candidates(low_rank.PEERS)
    without = low_rank.low_rank_candidates({})
    assert set(everything) - set(without) == {"torch_fp32", "ort_fp32", "ort_two_8"}
    assert set(low_rank.REFERENCES) < set(everything)
    assert {*low_rank.RANKS, *low_rank.SPEEDS} < set(without)
    assert set(low_rank.HIGHER_RANKS) < set(low_rank.RANKS)


@pytest.mark.parametrize(("k", "n", "rank"), [(96, 64, 16), (64, 96, 16), (3, 9, 1)])
def test_the_rank_of_a_share(k: int, n: int, rank: int) -> None:
    candidate = low_rank.low_rank_candidates({})["low_rank_4"]
    assert low_rank.rank_of(candidate, k, n) == rank


def test_a_branch_in_a_small_layer_is_narrower() -> None:
    candidate = low_rank.low_rank_candidates({})["int8_branch_32"]
    assert low_rank.rank_of(candidate, 768, 64) == 32
    assert low_rank.rank_of(candidate, 768, 24) == 24


def test_measuring_a_small_low_rank_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"fp32_fma": 100.0, "maddubs_d2": 250.0, "maddubs_d8": 350.0}
    monkeypatch.setattr(grid, "probe_peaks", lambda: peaks)
    monkeypatch.setattr(grid, "probe_bandwidth", lambda n_bytes, seconds: 10.0)
    candidates = low_rank.low_rank_candidates({"torch_fp32": peers.torch_fp32})
    cells = low_rank.GRID.cells([(96, 64), (40, 48)], [1, 128])
    found = list(low_rank.GRID.measure(cells, candidates, rounds=2, min_time_s=0.0, pause_s=0.0))
    assert [[record["candidate"] for record in records] for records in found] == [list(candidates)] * 4
    factors = {(96, 64): {"low_rank_8": 8, "low_rank_int8_4": 16, "int8_branch_32": 32, "int8_two_call_32": 32}}
    factors[40, 48] = {"low_rank_8": 5, "low_rank_int8_4": 10, "int8_branch_32": 32, "int8_two_call_32": 32}
    for cell, records in zip(cells, found, strict=True):
        m, k, n = cell["m"], cell["k"], cell["n"]
        for record in records:
            name = record["candidate"]
            assert {key: record[key] for key in cell} == cell
            assert record["rounds"] == 2
            assert record["gops"] == pytest.approx(2e-3 * m * k * n / record["us"])
            assert record["effective_gops"] == pytest.approx(2e-3 * m * record["multiply_adds"] / record["us"])
            bits = min(record[key] for key in ("main_bits", "factor_bits") if record[key] is not None)
            assert record["relative_error"] < {32: 1e-5, 8: 0.06, 4: 0.12}[bits], name
            references = {other for other in low_rank.REFERENCES if other in candidates}
            assert set(record["time_ratio"]) == references - {name}
            assert record["rank"] == factors[k, n].get(name, record["rank"])
            main = {"": 0, "dense": k * n, "sparse": round(0.2 * k * n)}[record["main"]]
            thin = record["rank"] * (n + k)
            assert record["multiply_adds"] == main + thin
            gops = {32: peaks["fp32_fma"], 8: peaks["maddubs_d2"], 4: peaks["maddubs_d8"], None: 1.0}
            computing = 2e-3 * m * (main / gops[record["main_bits"]] + thin / gops[record["factor_bits"]])
            reading = 1e-3 * record["weight_bytes"] / 10.0 if m == 1 else 0.0
            assert record["floor_us"] == pytest.approx(max(computing, reading))
            json.dumps(record)


def test_every_low_rank_candidate_is_close_to_fp32() -> None:
    usable, missing = peers.available(low_rank.PEERS)
    if missing:
        pytest.skip(f"{missing}")
    cells = low_rank.GRID.cells([(96, 64)], [1, 5])
    candidates = low_rank.low_rank_candidates(usable)
    for records in low_rank.GRID.measure(cells, candidates, rounds=1, min_time_s=0.0, pause_s=0.0):
        errors = {record["candidate"]: record["relative_error"] for record in records}
        assert errors.keys() == candidates.keys()
        for name, error in errors.items():
            assert error < (0.12 if "int4" in name else 0.06 if "int8" in name else 1e-5), name
        # The same int8 layer, and the same factors beside it.
        assert errors["int8_branch_32"] == pytest.approx(errors["int8_two_call_32"], rel=1e-3)


def low_rank_record(candidate: str, m: int, k: int = 64, n: int = 32, **time_ratio: float) -> Record:
    share = low_rank.RANKS.get(candidate)
    return {**record(candidate, m, **time_ratio), "k": k, "n": n, "rank_share": None if share is None else float(share)}


def test_low_rank_summary() -> None:
    lines = low_rank.summarize(
        [
            low_rank_record("low_rank_8", 1, torch_fp32=3.0, ort_fp32=2.0, torch_two_8=1.5, ort_two_8=1.2),
            low_rank_record("low_rank_8", 32, torch_fp32=4.0, torch_two_8=1.25),
            low_rank_record("low_rank_8", 128, n=48, torch_fp32=9.0, torch_two_8=0.9),
            low_rank_record("low_rank_int8_4", 8, dense_int8=9.0),
            low_rank_record("low_rank_int8_4", 128, dense_int8=1.5),
            low_rank_record("int8_branch_32", 8, dense_int8=0.5, int8_two_call_32=2.0),
            low_rank_record("int8_branch_32", 128, 768, 3072, dense_int8=0.8, int8_two_call_32=1.5),
            low_rank_record("sparse_branch_32", 8, sparse_80=0.625),
            low_rank_record("torch_fp32", 128, dense_int8=0.1),
        ]
    )
    compared = [line.of if isinstance(line, low_rank.Cost) else line for line in lines]
    found = {(line.candidate, line.against, line.scope): (line.cells, line.geometric_mean) for line in compared}
    dense, two = "the best dense fp32", "two torch layers"
    assert found == {
        ("low_rank_8", dense, "m >= 32"): (2, pytest.approx(6.0)),
        ("low_rank_8", dense, "m = 1"): (1, pytest.approx(2.0)),
        ("low_rank_8", two, "m <= 64"): (2, pytest.approx((1.5 * 1.25) ** 0.5)),
        ("low_rank_8", two, "m > 64"): (1, pytest.approx(0.9)),
        ("low_rank_8", "two MatMul of ONNX Runtime", "m <= 64"): (1, pytest.approx(1.2)),
        ("low_rank_int8_4", "our dense int8", "m >= 32"): (1, pytest.approx(1.5)),
        ("int8_branch_32", "dense_int8", "whole grid"): (2, pytest.approx(0.4**0.5)),
        ("int8_branch_32", "dense_int8", "m >= 32"): (1, pytest.approx(0.8)),
        ("int8_branch_32", "dense_int8", "768x3072, m = 128"): (1, pytest.approx(0.8)),
        ("int8_branch_32", "the same in two calls", "whole grid"): (2, pytest.approx(3.0**0.5)),
        ("sparse_branch_32", "sparse_80", "whole grid"): (1, pytest.approx(0.625)),
    }


def test_a_cost_is_what_the_branch_adds() -> None:
    records = [low_rank_record("int8_branch_32", m, dense_int8=ratio) for m, ratio in ((8, 0.5), (32, 0.8))]
    cost = low_rank.summarize(records)[0]
    assert isinstance(cost, low_rank.Cost)
    assert cost.mean == pytest.approx(0.4**-0.5 - 1)
    assert cost.worst == pytest.approx(1.0)
    assert str(cost) == (
        "int8_branch_32 over dense_int8 alone, whole grid (2 cell(s)): +58.1% time (geometric mean), "
        "worst +100.0% at m=8 k=64 n=32"
    )


def test_speeds_are_of_one_multiply_add() -> None:
    records = [
        {**low_rank_record("low_rank_8", 32, torch_fp32=4.0), "multiply_adds": 64 * 32 // 4},
        {**low_rank_record("low_rank_8", 128, torch_fp32=16.0), "multiply_adds": 64 * 32 // 4},
        {**low_rank_record("low_rank_8", 1, torch_fp32=100.0), "multiply_adds": 64 * 32 // 4},
        {**low_rank_record("dense_int8", 32, torch_fp32=1.5), "multiply_adds": 64 * 32},
        {**low_rank_record("torch_two_8", 32, torch_fp32=3.0), "multiply_adds": 64 * 32 // 4},
    ]
    (line,) = low_rank.speeds(records)
    assert line.endswith("low_rank_8 2.00, dense_int8 1.50")
    assert low_rank.speeds(records[2:3]) == []


def test_break_even_rank() -> None:
    records = [
        low_rank_record("low_rank_8", 8, torch_fp32=4.0),
        low_rank_record("low_rank_4", 8, torch_fp32=0.25, ort_fp32=0.5),
        low_rank_record("torch_two_8", 8, torch_fp32=0.1),
        low_rank_record("low_rank_int8_4", 8, torch_fp32=9.0),
    ]
    (line,) = low_rank.break_even_rank(records)
    assert line.mean == Crossing(pytest.approx(0.1875))
    assert "m = 8: 19% of min(n, k) as rank over 1 shape(s)" in str(line)


# --- int4 ---------------------------------------------------------------------------------------------------------------


def int4_parts(k: int, n: int, group: int) -> tuple[Any, torch.Tensor]:
    linear = peers.dense_linear(k, n)
    return Int4(group).compress(linear.weight), linear.bias


@pytest.mark.parametrize(
    ("k", "group"), [(96, 32), (100, 32), (33, 32), (130, 64), (300, 128)]
)  # whole and short blocks
def test_matmul_nbits_gets_the_weights_of_our_layer(k: int, group: int) -> None:
    pytest.importorskip("onnxruntime", reason="the peer needs the extra pycompress[onnx]")
    weight, bias = int4_parts(k, 17, group)
    for m in (1, 5):
        x = torch.randn(m, k)
        expected = x @ weight.decompress().T + bias
        for level, close in ((0, 1e-6), (4, 0.02)):
            call = peers.ort_int4(weight, bias, accuracy_level=level)(x)
            call.run()
            error = peers.relative_error(call.output(), expected)
            assert error < close
            assert error > 1e-3 or level == 0
            blocks = -(-k // group)
            assert call.weight_bytes == 17 * (blocks * group // 2 + 4 * blocks + (blocks + 1) // 2 + 4)


def test_int4_cells_are_cold_where_the_smallest_copies_leave_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "l3_bytes", lambda: 1 << 20)
    cells = int4.GRID.cells([(192, 192), (128, 256)], [1, 8])
    assert [(c["k"], c["m"], c["weights"]) for c in cells] == [
        (192, 1, "warm"),
        (192, 8, "warm"),
        (192, 1, "cold"),
        (128, 1, "warm"),  # 96 copies with a byte a weight, and so cold in the int8 grid
        (128, 8, "warm"),
        (128, 1, "cold"),
    ]
    assert int4.GRID.cells([(128, 128)], [1])[1:] == []  # 192 copies
    assert int8.GRID.cells([(128, 128)], [1])[1:] != []
    assert all(cell["weights"] == "warm" for cell in int4.GRID.cells([(192, 192)], [1], cold=False))


def test_peers_of_int4_that_fail_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> peers.Bind:
        raise UnavailableError("not installed: something")

    monkeypatch.setitem(int4.PEERS, "nbits_32", int4.Candidate(broken, 32))
    monkeypatch.setitem(int4.PEERS, "ort_fp32", int4.Candidate(broken))
    found, missing, _ = int4.chosen()
    assert missing.items() >= {"nbits_32": "not installed: something", "ort_fp32": "not installed: something"}.items()
    assert {*int4.OURS, *int4.INT8, "torch_fp32"} <= found.keys()
    assert not found.keys() & missing.keys()


def test_measuring_a_small_int4_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"fp32_fma": 100.0, "maddubs_d2": 250.0, "maddubs_d8": 300.0}
    monkeypatch.setattr(grid, "probe_peaks", lambda: peaks)
    monkeypatch.setattr(grid, "probe_bandwidth", lambda n_bytes, seconds: n_bytes / 4096)
    for module in (grid, int8):
        monkeypatch.setattr(module, "l3_bytes", lambda: 1 << 12)
    candidates = {**int4.OURS, **int4.INT8, "torch_fp32": int4.PEERS["torch_fp32"]}
    spinning = {"another": int4.PEERS["torch_fp32"]}
    cells = int4.GRID.cells([(96, 64)], [1, 4])
    found = list(int4.GRID.measure(cells, candidates, spinning=spinning, rounds=2, min_time_s=0.0, pause_s=0.0))
    names = [*candidates, "another"], [*candidates], [*candidates]  # warm, four rows, cold
    assert [[record["candidate"] for record in records] for records in found] == list(names)
    for cell, records in zip(cells, found, strict=True):
        others = {record["candidate"] for record in records} - int4.OURS.keys()
        for record in records:
            name, m = record["candidate"], cell["m"]
            assert {key: record[key] for key in cell} == cell
            assert record["rounds"] == 2
            assert set(record["time_ratio"]) == others - {name}
            bandwidth = (8192 if cell["weights"] == "cold" else record["weight_bytes"]) / 4096
            assert record["bandwidth_gbs"] == pytest.approx(bandwidth)
            loop = {"pycompress_int4": "maddubs_d8", "pycompress_int4_g128": "maddubs_d8"}.get(name, "fp32_fma")
            gops = peaks["maddubs_d2" if name.startswith("int8") else loop]
            computing, reading = 2e-3 * m * 96 * 64 / gops, 1e-3 * record["weight_bytes"] / bandwidth
            assert record["floor_us"] == pytest.approx(max(computing, reading))
            assert record["gops"] == pytest.approx(2e-3 * m * 96 * 64 / record["us"])
            assert record["relative_error"] < (1e-5 if name in ("torch_fp32", "another") else 0.15)
            assert record["group"] == {
                "pycompress_int4": 32,
                "pycompress_int4_g128": 128,
                "pycompress_int4_a16": 32,
            }.get(name, 0)
            json.dumps(record)


def test_every_int4_candidate_is_close_to_fp32() -> None:
    candidates, missing, _ = int4.chosen()
    if missing:
        pytest.skip(f"{missing}")
    cells = int4.GRID.cells([(160, 64)], [1, 5], cold=False)
    spinning = int4.SPINNING
    for records in int4.GRID.measure(cells, candidates, spinning=spinning, rounds=1, min_time_s=0.0, pause_s=0.0):
        errors = {record["candidate"]: record["relative_error"] for record in records}
        assert errors.keys() >= candidates.keys()
        for name, error in errors.items():
            assert error < (1e-5 if "fp32" in name else 0.02 if name.startswith("int8") else 0.15), name
        # The same weights, and x in floating point.
        assert errors["pycompress_int4_a16"] == pytest.approx(errors["nbits_32"], rel=1e-4)
        assert errors["pycompress_int4"] == pytest.approx(errors["nbits_32_a8"], rel=0.05)
        assert errors["pycompress_int4"] < errors["pycompress_int4_g128"]
        assert errors["pycompress_int4_g128"] == pytest.approx(errors["nbits_128"], rel=0.05)


def test_int4_summary() -> None:
    large = {"k": 4096, "n": 14336}
    lines = int4.summarize(
        [
            record(
                "pycompress_int4",
                1,
                torch_fp32=6.0,
                ort_fp32=4.0,
                int8_a7=1.5,
                nbits_32=3.0,
                nbits_32_a8=2.0,
                nbits_128=1.0,
            ),
            record("pycompress_int4", 128, torch_fp32=3.0, ort_fp32=2.5, int8_a8=0.9, nbits_32=8.0),
            record("pycompress_int4", 1, "cold", torch_fp32=5.0, int8_a7=1.25, nbits_32=2.5),
            {**record("pycompress_int4", 1, "cold", torch_fp32=7.0, int8_a8=1.5), **large},
            record("pycompress_int4_g128", 1, torch_fp32=9.0, nbits_32=1.0, nbits_128=2.0, nbits_128_a8_spinning=0.5),
            record("torch_fp32", 1, int8_a7=0.1),
        ]
    )
    found = {
        (line.candidate, line.against, line.scope): (line.cells, line.geometric_mean, line.worst) for line in lines
    }
    dense, ours, nbits = "the best dense fp32", "the best of our int8", "the best MatMulNBits"
    assert found == {
        ("pycompress_int4", dense, "m >= 128"): (1, pytest.approx(2.5), 2.5),
        ("pycompress_int4", dense, "m = 1"): (1, pytest.approx(4.0), 4.0),
        ("pycompress_int4", dense, "m = 1, cold"): (2, pytest.approx(35**0.5), 5.0),
        ("pycompress_int4", "torch fp32", "m = 1, cold, 4096x4096 and larger"): (1, pytest.approx(7.0), 7.0),
        ("pycompress_int4", ours, "m >= 128"): (1, pytest.approx(0.9), 0.9),
        ("pycompress_int4", ours, "m = 1"): (1, pytest.approx(1.5), 1.5),
        ("pycompress_int4", ours, "m = 1, cold"): (2, pytest.approx((1.25 * 1.5) ** 0.5), 1.25),
        ("pycompress_int4", ours, "m = 1, cold, 4096x4096 and larger"): (1, pytest.approx(1.5), 1.5),
        ("pycompress_int4", nbits, "whole grid"): (2, pytest.approx(4.0), 2.0),
        ("pycompress_int4", nbits, "m = 1, cold"): (1, pytest.approx(2.5), 2.5),
        ("pycompress_int4_g128", dense, "m = 1"): (1, pytest.approx(9.0), 9.0),
        ("pycompress_int4_g128", nbits, "whole grid"): (1, pytest.approx(2.0), 2.0),
        ("pycompress_int4_g128", "the best MatMulNBits, spinning", "m = 1"): (1, pytest.approx(0.5), 0.5),
    }
