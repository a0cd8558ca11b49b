"""``Form``: how a packed weight lies on a device, said by a static string that a compiler and a launcher can read.

``layout n=384 k=1536 key=value ...``; behind `` + `` the form of a residual. Whoever holds the string needs neither a look into
the packed tensor, which may be on a device or not be there yet, nor its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

Sizes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of the parts of a weight


@dataclass(frozen=True)
class Form:
    """What a form says; further keys are attributes too: ``parse("groups n=8 k=64 group=32").group`` is 32.

    Attributes:
        layout: the name of the layout, e.g. ``chains``.
        n, k: the shape of the weight.
        keys: what else there is, in its order: whole numbers, or words.
        residual: the form of what stands beside the weight; None without one. Its weight's name is the key ``residual``.
    """

    layout: str
    n: int
    k: int
    keys: Mapping[str, int | str] = field(default_factory=dict)
    residual: Form | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["keys"][name]
        except KeyError:
            raise AttributeError(f"the form '{self}' has no key {name!r}") from None

    def __str__(self) -> str:
        sizes = {"n": self.n, "k": self.k, **self.keys}
        own = " ".join(
            (self.layout, *(f"{name}={int(v) if v is True or v is False else v}" for name, v in sizes.items()))
        )
        return own if self.residual is None else f"{own} + {self.residual}"

    @property
    def residual_name(self) -> str:
        """The name of the residual's weight, e.g. ``int8``; '' without one."""
        return str(self.keys.get("residual", ""))


def written(layout: str, n: int, k: int, *, beside: str = "", **keys: int | str) -> str:
    """The form with these keys, and behind them, where it is given, the form of the residual."""
    return str(Form(layout, n, k, keys, parse(beside) if beside else None))


@lru_cache(maxsize=1 << 16)
def parse(form: str) -> Form:
    """The inverse of :func:`written`. Raises ValueError where the string is no form."""
    own, _, beside = form.partition(" + ")
    layout, *pairs = own.split(" ")
    keys: dict[str, int | str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier() or name in keys:
            raise ValueError(_message(form))
        keys[name] = int(value) if value.isdecimal() else value
    n, k = keys.pop("n", 0), keys.pop("k", 0)
    if not layout or not isinstance(n, int) or not isinstance(k, int) or n < 1 or k < 1:
        raise ValueError(_message(form))
    return Form(layout, n, k, keys, parse(beside) if beside else None)


def _message(form: str) -> str:
    return f"the form of the packed weight is {form!r}, expected 'layout n=... k=... key=value ...' as packing gives it"
