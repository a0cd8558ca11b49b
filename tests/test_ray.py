"""``workers="ray"``: the same bits as in one process, whoever dies."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.search import Front, Machine

ray = pytest.importorskip("ray", reason="needs the extra ray")
Cluster = pytest.importorskip("ray.cluster_utils").Cluster
pytestmark = pytest.mark.slow

CANDIDATES = {"int8": pc.Int8(), "int4": pc.Int4(), "thin": pc.LowRank(12, rank_guard=False)}
KEYS = {(layer, name) for layer in "02" for name in CANDIDATES}


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 32)).eval()


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(64, 48)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2 * torch.get_num_threads(), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def metric(log: Path, then: Callable[[int], None] = lambda count: None) -> Callable[[nn.Module], float]:
    """A quality that notes in a file who asked for it, and does something else besides."""
    x = batches()[0]

    def quality(model: nn.Module) -> float:
        line = f"{os.getpid():9} {torch.get_num_threads():6}\n".encode()
        with open(log, "ab", buffering=0) as file:
            file.write(line)
            count = file.tell() // len(line)  # behind its own line, whoever else writes: each number comes once
        then(count)
        return -float(model(x).square().mean())

    return quality


def sensitivity(own: Any, workers: str | None = None, **more: Any) -> Any:
    return pc.sensitivity(chain(), CANDIDATES, batches(), metric=own, exact=True, workers=workers, **more)


def test_sensitivity_is_the_same_and_not_from_here(cluster: None, tmp_path: Path) -> None:
    log = tmp_path / "log"
    local, found = sensitivity(metric(tmp_path / "here")), sensitivity(metric(log), "ray")
    assert set(found) == KEYS
    assert {key: own.exact for key, own in found.items()} == {key: own.exact for key, own in local.items()}
    asked = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    assert len(asked) == 1 + len(KEYS)  # the original, here
    assert all((pid == os.getpid()) == (i == 0) for i, (pid, _) in enumerate(asked))
    assert {threads for _, threads in asked} == {torch.get_num_threads()}


def test_a_worker_that_is_killed(cluster: None, tmp_path: Path) -> None:
    driver, marker = os.getpid(), tmp_path / "killed"

    def kill(count: int) -> None:
        if os.getpid() != driver and count == 4 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    found = sensitivity(metric(tmp_path / "log", kill), "ray")
    assert marker.exists()
    local = sensitivity(metric(tmp_path / "here"))
    assert {key: own.exact for key, own in found.items()} == {key: own.exact for key, own in local.items()}


def test_a_metric_that_fails_and_what_was_found_before(cluster: None, tmp_path: Path) -> None:
    log, cache, broken = tmp_path / "log", tmp_path / "cache", tmp_path / "broken"
    broken.touch()

    def fail(count: int) -> None:
        if count == 4 and broken.exists():
            raise ArithmeticError("no more")

    own = metric(log, fail)
    with pytest.raises(RuntimeError, match=r"the metric .*quality failed for [02] as \w+: ArithmeticError: no more"):
        sensitivity(own, "ray", cache=cache)
    before = sum(1 for line in cache.read_text().splitlines() if line.endswith("]]"))
    assert before >= 2
    broken.unlink()
    count = len(log.read_text().splitlines())
    found = sensitivity(own, "ray", cache=cache)
    assert len(log.read_text().splitlines()) == count + 1 + len(KEYS) - before  # none twice; the original, once more
    assert all(own.exact is not None for own in found.values())


@pytest.mark.parametrize("target", [False, True])
def test_a_front_is_the_same(cluster: None, target: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the times are, which are taken here."""

    def model_us(dense: nn.Module, other: nn.Module, inputs: Any) -> tuple[float, float]:
        size = sum(p.numel() * p.element_size() for p in (*other.parameters(), *other.buffers()))
        return 100.0, 0.1 + size / 1e5

    monkeypatch.setattr(import_module("pycompress.search.plans"), "model_us", model_us)
    monkeypatch.setattr(import_module("pycompress.search.timing"), "layer_us", lambda *_: (40.0, 10.0))
    cells = {name: tuple((m, n, n, us * m * n * n) for m in (1, 99) for n in (8, 99)) for name, us in
             {"dense": 4.0, "int8": 1.0, "int4": 2.0, "thin": 0.5}.items()}  # fmt: skip
    there = Machine("a board", ("scalar",), 1, 10**9, cells) if target else None

    def find(workers: str | None, log: Path) -> Front:
        return pc.search(
            chain(), CANDIDATES, batches(), {"quality": -1.0}, example_inputs=batches()[0], metric=metric(log), target=there,
            points=3, workers=workers,
        )  # fmt: skip

    local, found = find(None, tmp_path / "here"), find("ray", tmp_path / "log")
    assert [*found] == [*local]
    assert found.measured == local.measured
    asked = [int(line.split()[0]) for line in (tmp_path / "log").read_text().splitlines()]
    assert len({*asked} - {os.getpid()}) >= 1
    assert asked.count(os.getpid()) <= 3  # the original; what no worker was asked before


def test_no_cluster_of_the_users(tmp_path: Path) -> None:
    """One is made, and ends."""
    ray.shutdown()  # (that of the tests before)
    found = sensitivity(metric(tmp_path / "log"), "ray")
    assert all(own.exact is not None for own in found.values())
    assert not ray.is_initialized()


def test_nodes_with_fewer_processors_than_threads_of_which_one_is_lost(two_threads: None, tmp_path: Path) -> None:
    ray.shutdown()  # (that of the tests before)
    log, asked, driver = tmp_path / "log", tmp_path / "asked", os.getpid()
    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    other, stays = two.add_node(num_cpus=1), two.head_node.node_id

    def lose() -> None:
        while not asked.exists():
            time.sleep(0.01)
        two.remove_node(other, allow_graceful=False)

    def wait(count: int) -> None:
        """On the node that is lost, until it is."""
        if os.getpid() != driver and ray.get_runtime_context().get_node_id() != stays:
            asked.touch()
            time.sleep(60)

    try:
        ray.init(address=two.address, log_to_driver=False, logging_level="ERROR")
        threading.Thread(target=lose, daemon=True).start()
        found = sensitivity(metric(log, wait), "ray")
    finally:
        ray.shutdown()
        two.shutdown()
    assert asked.exists()
    local = sensitivity(metric(tmp_path / "here"))
    assert {key: own.exact for key, own in found.items()} == {key: own.exact for key, own in local.items()}
    assert {int(line.split()[1]) for line in log.read_text().splitlines()} == {2}


def test_wrong_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    x = batches()
    with pytest.raises(ValueError, match="workers is 'dask', expected None or 'ray'"):
        pc.sensitivity(chain(), CANDIDATES, x, exact=True, workers="dask")
    with pytest.raises(ValueError, match="workers is 'ray' with exact=False, for which no model is rated"):
        pc.sensitivity(chain(), CANDIDATES, x, workers="ray")
    monkeypatch.delitem(sys.modules, "pycompress.integrations.ray", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "pycompress\[ray\]"'):
        pc.search(chain(), CANDIDATES, x, {"quality": 0.9}, example_inputs=x[0], workers="ray")
