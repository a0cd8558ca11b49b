"""Which tests run in which tier (conftest.py)."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import covering, pairs

SUITE = """
import pytest

@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("c", range(2))
def test_product(a, b, c): pass

@pytest.mark.parametrize("a", range(4))
def test_one_parameter(a): pass

@pytest.mark.slow
def test_slow(): pass

def test_sample(sample):
    print(f"took {list(sample(range(9), 3))}")

@pytest.mark.skip(reason="none here")
def test_skipped(): pass
"""


class Case:
    def __init__(self, **params: object) -> None:
        self.callspec = SimpleNamespace(params=params)


def test_every_pair_of_values_that_a_case_has_occurs() -> None:
    product = [
        Case(a=a, b=b, c=c, d=d)
        for a, b, c, d in itertools.product(range(5), "xyz", (True, False), (None, 1.5))
        if not (a == 2 and b == "y")
    ]
    some = covering(product)  # type: ignore[type-var]
    assert set().union(*map(pairs, some)) == set().union(*map(pairs, product))  # type: ignore[arg-type]
    assert len(product) == 56
    assert len(some) <= 18


@pytest.mark.slow
def test_the_tiers(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow")

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "conftest", "-rA", *arguments],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    for options, passed, took in (
        ((), 12 + 4 + 1, "took [0, 4, 8]"),
        (("--rest",), 12 + 1 + 1, f"took {list(range(9))}"),
        (("--all",), 24 + 4 + 1 + 1, f"took {list(range(9))}"),
        (("--one",), 3, "took [0, 4, 8]"),
        (("test_suite.py::test_slow",), 1, ""),
    ):
        status, said = run(*options)
        assert status == 0
        assert f" {passed} passed" in said, (options, said)
        assert took in said
    status, said = run("test_suite.py::test_skipped")
    assert status == pytest.ExitCode.NO_TESTS_COLLECTED, "a run that showed nothing fails"
    assert "1 skipped: none here" in said
