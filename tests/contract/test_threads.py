"""The same bits whatever the number of threads, of callers, or of forks, from layers large enough for parallel regions."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.cases import EACH_ROW, EVERY, ROWS, Case, Forked, Same, over
from contract.kinds import LARGE

AtOnce = Callable[[Callable[[int], None], int], None]


@cache
def large(case: Case) -> tuple[Any, Tensor]:
    """A layer, and an input of many rows for it; made by one thread, which is faster where others want the processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dense = LARGE[case.kind.name]() if case.kind.name in LARGE else case.dense()
    # A method of the small layer may hold a mask of its size.
    method = case.method if getattr(case.method, "mask", None) is None else case.layer_type.default_method
    layer = case.layer_type.from_dense(dense, method, "gelu" if case.kind.epilogue else "none")
    x = case.x(40, module=dense)
    torch.set_num_threads(threads)
    return layer, x


def bits_of(y: Tensor) -> bytes:
    return y.detach().numpy().tobytes()


def check_thread_counts(case: Case, same: Same) -> None:
    layer, x = large(case)
    if not case.kind.tokens:
        x = x.clone()
        x[20].view(-1)[5] = torch.nan
    before = torch.get_num_threads()
    try:
        for rows in (1, 40):
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(layer(x[-rows:]))
            for other in found[1:]:
                if case.runs_in_torch:
                    torch.testing.assert_close(other, found[0], equal_nan=True)
                else:
                    assert same(other, found[0])
        torch.set_num_threads(1)
        one = case.twin(layer)
        torch.set_num_threads(2)
        assert case.twin(layer).same_weight(one), "packing neither"
    finally:
        torch.set_num_threads(before)


@EACH_ROW
def test_every_thread_count_gives_the_same_bits(case: Case, same: Same) -> None:
    check_thread_counts(case, same)


@pytest.mark.slow
@EVERY
def test_every_variant_on_every_thread_count(case: Case, same: Same) -> None:
    check_thread_counts(case, same)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("rows", [1, 40])
@EACH_ROW
def test_eight_threads_call_one_layer_at_once(case: Case, rows: int, at_once: AtOnce) -> None:
    layer, x = large(case)
    inputs = [x.roll(index, 0)[:rows].contiguous() for index in range(8)]
    expected = [bits_of(layer(x)) for x in inputs]
    start, wrong = threading.Barrier(8), []

    def call(index: int) -> None:
        start.wait()
        for turn in range(5):
            at = (index + turn) % 8
            if bits_of(layer(inputs[at])) != expected[at]:
                wrong.append((index, at))

    at_once(call, 8)
    assert not wrong


# torch's own operators wait for the workers that are lost.
@pytest.mark.usefixtures("two_threads")
@over([case for case in ROWS if not case.runs_in_torch])
def test_a_forked_child(case: Case, forked: Forked) -> None:
    """libgomp's workers do not survive a fork; the child has to run on one thread and not wait for them."""
    layer, x = large(case)
    expected, held = bits_of(layer(x)), pickle.dumps(layer)

    def child(threads: int | None) -> bytes:
        if threads is not None:
            torch.set_num_threads(threads)
        return bits_of(layer(x))

    def unpickled() -> bytes:
        return bits_of(pickle.loads(held)(x))

    for threads in (None, 2):
        assert forked(lambda threads=threads: child(threads)) == expected
    assert forked(lambda: forked(lambda: child(2))) == expected, "and a child of the child"
    assert forked(unpickled, 10) == expected, "which packs there"
    assert bits_of(layer(x)) == expected, "the parent goes on with its threads"
