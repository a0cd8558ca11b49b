"""``profile``: how long this machine takes for linear layers of each candidate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from pycompress.kinds import kind_of
from pycompress.measure import Clock, interleaved_us
from pycompress.methods.method import Method
from pycompress.nn.layers import layer_for
from pycompress.progress import on_a_terminal, track
from pycompress.search.choices import Candidates, named
from pycompress.search.machine import DENSE, PRECISIONS, Cell, Machine
from pycompress.search.timing import clock, here

ROWS = (1, 16, 128, 512)
SIZES = (128, 512, 2048)


def profile(
    candidates: Candidates | Method | None = None,
    *,
    name: str = "",
    rows: Sequence[int] = ROWS,
    sizes: Sequence[int] = SIZES,
    progress: bool | None = None,
) -> Machine:
    """Measures this machine: how long linear layers of each candidate take, in turns with the dense layer.

    Args:
        candidates: methods, or {name: method}; None: int8 and int4, of which ``compress(model, target=...)`` chooses.
        name: of the machine; '': that of its processor.
        rows, sizes: of inputs, and of both sides of weights, at all of which is measured.
        progress: show a progress bar; None: on a terminal.
    Returns:
        The :class:`Machine`, with as many threads as torch has now. ``save`` it.
    Raises:
        TypeError, ValueError: a candidate that is no method, or takes no linear layers; sizes below 1.
    """
    methods = named(PRECISIONS if candidates is None else candidates, "profile")
    if not rows or not sizes or min(*rows, *sizes) < 1:
        raise ValueError(f"profile: rows is {rows!r}, sizes {sizes!r}, expected numbers from 1")
    facts, tick = here(), clock()
    times: dict[str, list[Cell]] = {DENSE: [], **{key: [] for key in methods}}
    shapes = [*product(sizes, sizes)]
    generator = torch.Generator(device="cpu").manual_seed(0)
    for n, k in track(shapes, "measuring", on_a_terminal() if progress is None else progress):
        dense = nn.Linear(k, n, device="cpu", dtype=torch.float32).eval()
        # As trained weights lie: an int8 kernel that adds products in 16 bits is slower for uniform ones, which torch begins with.
        dense.weight.data.normal_(std=k**-0.5, generator=generator)
        kind = kind_of(dense)
        assert kind is not None
        for key, method in methods.items():
            layer_type = layer_for(kind, method.name)
            if layer_type is None:
                raise ValueError(f"profile: candidate {key} takes no linear layers, of which times are measured")
            try:
                layer = layer_type.from_dense(dense, method)
            except ValueError:
                continue  # such a layer would not be compressed either: a rank that is no gain, or that it cannot have
            for m in rows:
                before, after = _pair_us(
                    dense, layer, torch.randn(m, k, generator=generator, dtype=torch.float32, device="cpu"), tick
                )
                times[DENSE].append((m, n, k, before))
                times[key].append((m, n, k, after))
    found = {key: tuple(_medians(cells)) for key, cells in times.items() if cells}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        name or facts["processor"],
        tuple(facts["instruction_sets"]),
        facts["threads"],
        memory,
        found,
        facts["kernels"],
        methods,
    )


def _pair_us(dense: nn.Module, layer: nn.Module, x: Tensor, tick: Clock) -> tuple[float, float]:
    with torch.inference_mode():
        return interleaved_us(lambda: dense(x), lambda: layer(x), rounds=5, clock=tick)


def _medians(cells: Sequence[Cell]) -> list[Cell]:
    """One cell for each shape."""
    found: dict[tuple[int, int, int], list[float]] = {}
    for m, n, k, us in cells:
        found.setdefault((m, n, k), []).append(us)
    return [(m, n, k, float(np.median(own))) for (m, n, k), own in found.items()]
