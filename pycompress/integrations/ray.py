"""Questions that are answered by the processes of a Ray cluster, on this machine or on many."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

try:
    import ray
    from ray import ObjectRef
    from ray.exceptions import RayError, RayTaskError
except ModuleNotFoundError as error:
    raise ImportError(f'workers="ray" needs ray ({error}): pip install "pycompress[ray]"') from None

Answerer = Callable[[Any], Any]

_RETRIES = 8  # of a question whose process died: more than that is no accident
_MADE: dict[str, Answerer] = {}  # in a worker: what the last pool that asked it answers with


class Pool:
    """Workers of a Ray cluster: of the one that ``ray.init`` was called for, else of one of this machine's processors, which ends
    with the block. What a worker was asked that dies is asked again.

    Args:
        build: makes what answers questions, in each worker once; it travels to them by cloudpickle, with all that it holds.
        threads: of each worker, which takes up as many processors, or all of a node that has fewer.
    Attributes:
        size: how many questions are answered at a time; 0 outside of the block.
    Raises:
        RuntimeError: no node of the cluster has a processor.
    """

    def __init__(self, build: Callable[[], Answerer], threads: int) -> None:
        self.size = 0
        self._build, self._threads, self._name = build, threads, uuid.uuid4().hex
        self._own = False

    def __enter__(self) -> Pool:  # noqa: PYI034 - Self is of Python 3.11
        self._own = not ray.is_initialized()
        if self._own:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            processors = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            if not any(processors):
                raise RuntimeError('workers="ray": no node of the cluster has a processor, expected one at least')
            # A worker is on one node, and would wait for ever for more processors than any has.
            each = min(self._threads, max(processors))
            # Kernels are chosen, and OpenMP's threads made, when a process starts; Ray would give each one thread.
            variables = {"OMP_NUM_THREADS": str(self._threads), "PYCOMPRESS_ISA": os.environ.get("PYCOMPRESS_ISA", "")}
            self._ask = ray.remote(_answered).options(
                num_cpus=each, max_retries=_RETRIES, runtime_env={"env_vars": variables}
            )
            # In a list, so that it is fetched by who has not made it yet, and by no other.
            self._sent = [ray.put(self._build)]
            self.size = sum(own // each for own in processors)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.size, self._sent = 0, []
        if self._own:
            ray.shutdown()

    def answers(self, questions: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Places and answers, as they come.

        Raises:
            What a question raised, once those that were being answered have their answers. RuntimeError: a worker dies again and
                again.
        """
        waiting = [*enumerate(questions)][::-1]
        asked: dict[ObjectRef[Any], int] = {}
        failed: BaseException | None = None
        while asked or (waiting and failed is None):
            while waiting and failed is None and len(asked) < self.size:
                place, question = waiting.pop()
                asked[self._ask.remote(self._name, self._sent, self._threads, question)] = place
            (ready,), _ = ray.wait([*asked])
            place = asked.pop(ready)
            try:
                answer = ray.get(ready)
            except RayTaskError as error:
                failed = failed or (error.cause if isinstance(error.cause, BaseException) else error)
            except RayError as error:
                failed = failed or RuntimeError(f"ray: a worker that died did not come back: {error}")
            else:
                yield place, answer
        if failed is not None:
            raise failed from None


def _answered(name: str, sent: list[ObjectRef[Any]], threads: int, question: Any) -> Any:
    """In a worker."""
    torch.set_num_threads(threads)
    if name not in _MADE:
        _MADE.clear()
        _MADE[name] = ray.get(sent[0])()
    return _MADE[name](question)
