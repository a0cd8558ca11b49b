"""Which part of what a layer's inputs look like is gathered: what the plan's methods need, and no more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from pycompress.methods.inputs import PARTS
from pycompress.methods.method import is_method, needs_of

Gather = str | Collection[str]


def parts_asked(gather: Gather) -> frozenset[str]:
    """Raises ValueError for what is no part."""
    parts = frozenset([gather] if isinstance(gather, str) else gather)
    if not parts or not parts <= set(PARTS):
        raise ValueError(f"calibrate: gather is {gather!r}, expected one or several of {', '.join(PARTS)}")
    return parts


def parts_needed(plan: Any, names: Mapping[Any, list[str]]) -> dict[Any, frozenset[str]]:
    """What the plan's method for each layer needs; ``names``: all that the model has for it.

    As in a plan the first glob that matches one of its names decides, and a glob that is a layer's name means this one.

    Raises:
        TypeError: no plan.
    """
    rules: Mapping[str, Any] = plan if isinstance(plan, Mapping) else {"*": plan}
    for glob, method in rules.items():
        if not isinstance(glob, str) or not (method is None or is_method(method)):
            raise TypeError(f"calibrate: the plan maps {glob!r} to {method!r}, expected a glob and a method, or None")
    known = {name for own in names.values() for name in own}

    def needs(own: list[str]) -> frozenset[str]:
        for glob, method in rules.items():
            if any(name == glob if glob in known else fnmatchcase(name, glob) for name in own):
                return frozenset() if method is None else needs_of(method)
        return frozenset()

    return {module: needs(own) for module, own in names.items()}
