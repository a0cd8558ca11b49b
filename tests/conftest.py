"""What the tests share: which of them run, a seed, a fresh interpreter, a forked child, and a few small models.

Without an option, what `make test` runs: no test that is marked `slow`, and of a test with three or more parameters as many
cases as it takes for every pair of values to occur; by its full name (`file::test`) any test runs. `--all`: everything.
"""

from __future__ import annotations

import itertools
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
T = TypeVar("T")

# --- which tests run ----------------------------------------------------------------------------------------------------

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core, so a thread a worker, before torch opens its pool
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pycompress", "which tests run")
    for tier, text in (
        ("all", "all tests"),
        ("rest", "those alone that a run without this option leaves out"),
        ("one", "one case of each test, none of the slow ones"),
    ):
        group.addoption(f"--{tier}", dest="tier", action="store_const", const=tier, default="everyday", help=text)


def pairs(item: pytest.Item) -> frozenset[tuple[tuple[str, str], ...]]:
    """The pairs of values of this case's parameters; of a single parameter, its value."""
    call = getattr(item, "callspec", None)
    values = sorted((name, repr(value)) for name, value in call.params.items()) if call is not None else []
    return frozenset(itertools.combinations(values, min(2, len(values))))


def covering(cases: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Some of the cases of a test, in which every pair of values that any has occurs: each time the case with most new ones.

    A library for such sets makes cases out of lists of values; here the cases are there, and not all values go together.
    """
    left = {case: pairs(case) for case in cases}
    missing = frozenset().union(*left.values())
    taken = []
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        missing -= left.pop(best)
        taken.append(best)
    return taken


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tier: str = config.option.tier
    if tier == "all" or (tier == "everyday" and any("::" in argument for argument in config.args)):
        return
    tests: dict[tuple[Any, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.parent, getattr(item, "originalname", item.name)].append(item)
    chosen: set[pytest.Item] = set()
    for cases in tests.values():
        if not any(case.get_closest_marker("slow") for case in cases):
            chosen.update(cases[:1] if tier == "one" else covering(cases))
    if tier == "rest":  # a test that takes a sample has taken none but that
        chosen = {item for item in chosen if "sample" not in getattr(item, "fixturenames", ())}
    kept = [item for item in items if (item in chosen) != (tier == "rest")]
    config.hook.pytest_deselected(items=[item for item in items if (item in chosen) == (tier == "rest")])
    items[:] = kept


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run in which every test was skipped has shown nothing, and fails."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.exitstatus != pytest.ExitCode.OK or session.config.option.collectonly:
        return  # a worker, a failure, or nothing was to run
    if not {"passed", "xfailed"} & reporter.stats.keys():
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were skipped, each reason once."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture
def sample(request: pytest.FixtureRequest) -> Callable[[Sequence[T], int], Sequence[T]]:
    """``sample(cases, count)``: so many of them, the first, the last and some between; with `--all` all."""

    def take(cases: Sequence[T], count: int) -> Sequence[T]:
        if request.config.option.tier in {"all", "rest"} or len(cases) <= count:
            return cases
        return [cases[i * (len(cases) - 1) // (count - 1)] for i in range(count)]

    return take


# --- what they use ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Any:
    """torch.set_num_threads(2) for one test, so that the kernels open parallel regions on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a fresh interpreter, outside the repository: ``python(code, *arguments, VARIABLE="value")``."""

    def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, **environment},
            cwd=os.path.dirname(__file__),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def forked() -> Callable[..., Any]:
    """``forked(call)``: the result of ``call()`` in a forked child. Fails where the child dies, raises or takes too long."""

    def run(call: Callable[[], Any], timeout: float = 30) -> Any:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                result: tuple[bool, Any] = (True, call())
            except BaseException:
                result = (False, traceback.format_exc())
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(result, pipe)
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            if not select.select([pipe], [], [], timeout)[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail(f"the forked child did not answer within {timeout} s")
            answer = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 0, f"the forked child died with status {status} (negative: a signal)"
        good, value = pickle.loads(answer)
        assert good, f"in the forked child:\n{value}"
        return value

    return run


class Block(nn.Module):
    """A residual block as transformers have them; ``up`` is followed by the activation and nothing else."""

    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.act = activation
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.act(self.up(self.norm(x))))
        return x + down


@pytest.fixture
def block() -> Callable[..., Block]:
    """``block(width, activation)``: a module with the linear layers ``up`` (fused with its activation) and ``down``."""

    def make(width: int = 48, activation: nn.Module | None = None) -> Block:
        return Block(width, nn.GELU() if activation is None else activation).eval()

    return make


class Lookup(nn.Module):
    """Tokens in, logits out: an embedding, blocks, a head; the head's weight may be the embedding's."""

    def __init__(self, width: int, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width, nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(width, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for one in self.blocks:
            x = one(x)
        logits: Tensor = self.head(x)
        return logits


@pytest.fixture
def lookup() -> Callable[..., Lookup]:
    """``lookup(width, tied=...)``: an embedding, two blocks and a head."""

    def make(width: int = 32, *, tied: bool = False) -> Lookup:
        return Lookup(width, tied=tied).eval()

    return make


@pytest.fixture
def same() -> Callable[[Tensor, Tensor], bool]:
    """``same(a, b)``: equal shape, dtype and bits (so NaN equals NaN and -0 differs from 0)."""

    def equal(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return not a.numel() or torch.equal(
            a.detach().contiguous().flatten().view(torch.uint8), b.detach().contiguous().flatten().view(torch.uint8)
        )

    return equal


@pytest.fixture
def snapshot() -> Callable[[nn.Module], Callable[[], bool]]:
    """``unchanged = snapshot(model)``; ``unchanged()``: the same module objects, parameters and bits as then."""

    def take(model: nn.Module) -> Callable[[], bool]:
        modules = dict(model.named_modules(remove_duplicate=False))
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        bits = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in modules.items()}

        def unchanged() -> bool:
            now = dict(model.named_modules(remove_duplicate=False))
            held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
            return (
                now.keys() == modules.keys()
                and all(now[name] is module for name, module in modules.items())
                and {n: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for n, m in now.items()} == hooks
                and held.keys() == tensors.keys()
                and all(held[name] is tensor and torch.equal(tensor, bits[name]) for name, tensor in tensors.items())
            )

        return unchanged

    return take


@pytest.fixture
def at_once() -> Callable[[Callable[[int], None], int], None]:
    """``at_once(call, count)``: call(0) to call(count - 1), each in a thread of its own; all of them come to an end."""

    def run(call: Callable[[int], None], count: int) -> None:
        workers = [threading.Thread(target=call, args=(index,)) for index in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)
        assert not any(worker.is_alive() for worker in workers)

    return run
