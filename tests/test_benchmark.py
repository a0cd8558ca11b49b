"""The harness and the peers. Nothing here asserts a time: the clock is faked where it matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pycompress import benchmark
from pycompress.benchmark import Record, Timing, UnavailableError

ALL = {**benchmark.OURS, **benchmark.PEERS, **benchmark.SPINNING}


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
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: fake.now)
    monkeypatch.setattr(benchmark.time, "sleep", fake.pause)
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
    assert benchmark.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert benchmark.geometric_mean([1.0, 10.0, 100.0]) == pytest.approx(10.0)


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


def test_rotating_calls_each_in_turn() -> None:
    run = benchmark.rotating([lambda: "a", lambda: "b", lambda: "c"])
    assert [run() for _ in range(7)] == list("abcabca")


def test_cache_size_is_read_from_the_system(tmp_path: Any) -> None:
    assert benchmark.l3_bytes(tmp_path) == 32 << 20
    for index, size in enumerate(("48K\n", "2048K\n", "36M\n")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size)
    assert benchmark.l3_bytes(tmp_path) == 36 << 20


def test_environment_is_json() -> None:
    found = json.loads(json.dumps(benchmark.Environment.collect().as_dict()))
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["processor"]


def test_dense_linear_repeats_its_weights() -> None:
    for weights in ("gaussian", "uniform"):
        a, b = (benchmark.dense_linear(48, 32, weights) for _ in range(2))
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.bias, b.bias)
        assert 0.4 / 48**0.5 < float(a.weight.std()) < 1.2 / 48**0.5
    with pytest.raises(ValueError, match="'normal'"):
        benchmark.dense_linear(4, 4, "normal")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("m", [1, 5])
def test_every_candidate_is_close_to_fp32(name: str, m: int) -> None:
    usable, missing = benchmark.available({name: ALL[name]})
    if not usable:
        pytest.skip(f"{name}: {missing[name]}")
    linear = benchmark.dense_linear(96, 80)
    x = torch.randn(m, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        call = ALL[name](linear)(x)
        call.run()
        y = call.output()
        assert y.shape == (m, 80)
        assert benchmark.relative_error(y, linear(x)) < 0.06  # u8 * s8 that saturates is the farthest


def test_torch_engine_is_put_back() -> None:
    before = torch.backends.quantized.engine
    benchmark.available(benchmark.PEERS)
    assert torch.backends.quantized.engine == before
    with pytest.raises(UnavailableError, match="no_such_engine"):
        benchmark.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), "no_such_engine")
    assert torch.backends.quantized.engine == before


def test_a_peer_that_fails_is_reported() -> None:
    def broken(linear: nn.Linear) -> benchmark.Bind:
        raise UnavailableError("not installed: something")

    usable, missing = benchmark.available({"broken": broken, "torch_fp32": benchmark.torch_fp32})
    assert list(usable) == ["torch_fp32"]
    assert missing == {"broken": "not installed: something"}


def test_cells_have_cold_weights_at_one_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "l3_bytes", lambda: 1 << 20)
    cells = benchmark.int8_cells([(1024, 512), (64, 64)], [1, 8])
    assert [(c["k"], c["m"], c["weights"]) for c in cells] == [
        (1024, 1, "warm"),
        (1024, 8, "warm"),
        (1024, 1, "cold"),
        (64, 1, "warm"),  # 384 copies of this one would be needed
        (64, 8, "warm"),
    ]
    assert benchmark.copies_to_leave_cache(1024 * 512) == 3
    assert benchmark.copies_to_leave_cache(1 << 30) == 2


def test_measuring_a_small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "l3_bytes", lambda: 1 << 12)
    builds = {**benchmark.OURS, "torch_fp32": benchmark.torch_fp32}
    cells = benchmark.int8_cells([(64, 32)], [1, 4])
    measured = list(benchmark.measure_int8(cells, builds, rounds=2, min_time_s=0.0, pause_s=0.0))
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
    lines = benchmark.summarize(
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
    found = {(line.against, line.scope): line.worst for line in benchmark.summarize([measured])}
    assert found["the best exact peer", "m >= 128"] == 1.2
    assert found["ONNX Runtime s8, which saturates", "m >= 128"] == 0.9


def test_json_lines_round_trip(tmp_path: Any) -> None:
    environment = benchmark.Environment.collect()
    records = [record("pycompress_a7", 1, torch_fp32=2.0), record("torch_fp32", 1)]
    path = tmp_path / "results" / "int8.jsonl"
    benchmark.write_json_lines(path, environment, records)
    first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    assert first == {"environment": json.loads(json.dumps(environment.as_dict()))}
    assert rest == records
