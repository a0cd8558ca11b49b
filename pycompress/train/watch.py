"""What a model was called with last, and what some of its modules gave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pycompress.train.calls import tensor_of


class Watch:
    """The last call of a model: its arguments, and the results of some of its modules."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model = [model]  # in a list it is no child of whoever has it
        self._names = sorted(names)
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._inner: list[Any] = []
        self._outer: list[Any] = []
        self.results: dict[str, Tensor] = {}

    @property
    def model(self) -> nn.Module:
        return self._model[0]

    def always(self) -> None:
        """Watches every call of the model from now on; its modules have hooks only while it runs."""
        self._outer = [
            self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.model.register_forward_hook(self._leave, always_call=True),
        ]

    def close(self) -> None:
        for handle in (*self._outer, *self._inner):
            handle.remove()
        self._outer, self._inner = [], []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the calls within."""
        self._hook()
        try:
            yield
        finally:
            self._leave()

    def taken(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the last call, once."""
        if self._call is None:
            raise RuntimeError("the model was not called, expected its result of just now")
        call, self._call = self._call, None
        return call

    def _enter(self, _: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._call = args, keywords
        self._leave()
        self._hook()

    def _hook(self) -> None:
        self.results.clear()

        def note(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, result: Any) -> None:
                self.results[name] = tensor_of(result)

            return hook

        self._inner = [self.model.get_submodule(name).register_forward_hook(note(name)) for name in self._names]

    def _leave(self, *_: Any) -> None:
        for handle in self._inner:
            handle.remove()
        self._inner = []
