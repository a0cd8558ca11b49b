"""The fixture ``isa``: a test runs with all that the processor has, and again with the scalar specification alone.

A file imports it and asks for it in every test with ``pytestmark = pytest.mark.usefixtures("isa")``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from pycompress import ops


@pytest.fixture(params=["best", "scalar"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.capped("scalar") if request.param == "scalar" else nullcontext():
        yield request.param
