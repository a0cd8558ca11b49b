"""A row of somebody else's, in the table before the promises are collected, has to keep them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from contract import cases
from pycompress.nn import LAYERS, PlainLinear

Python = Callable[..., subprocess.CompletedProcess[str]]

# The toys of test_open_tables: a format with a layer, for which no line is written here, and a kind of layers, for which one is.
RUN = """
import sys
import pytest
from torch import nn
import test_open_tables as toys
from pycompress.nn import LAYERS, register

for row in [row for row in LAYERS if row[0] == "conv1d"]:  # whose modules are of the toys' kind then
    del LAYERS[row]
for layer in (toys.SignLinear, toys.SignPointwise):
    layer.default_method = toys.Signs()
    register(layer)
from contract.kinds import DENSE
DENSE["pointwise"] = lambda bias: nn.Conv1d(6, 10, 1, bias=bias)
files = [f"contract/test_{name}.py" for name in ("state", "compute", "gradient", "threads")]
sys.exit(pytest.main([*files, "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "signs", "--tb=short"]))
"""


def test_a_row_without_variants_has_one() -> None:
    class Layer(PlainLinear):
        weight_type = LAYERS["linear", "int8"].weight_type
        default_method = LAYERS["linear", "int8"].default_method

    (case,) = cases.cases({("linear", "of somebody else"): Layer})
    assert (case.variant, case.method, type(case.layer())) == ("by default", Layer.default_method, Layer)
    with pytest.raises(KeyError, match="a kind"):
        cases.cases({("a kind", "int8"): Layer})


def test_new_rows_keep_the_promises(python: Python) -> None:
    result = python(RUN)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr
    assert int(result.stdout.split(" passed")[0].split()[-1]) > 60, result.stdout[-500:]
