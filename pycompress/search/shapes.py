"""Smaller models, whose plans stand on the same front: what was cut away, and what that alone costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pycompress.calls import Inputs, uncompiled
from pycompress.copying import copied
from pycompress.passes import whole
from pycompress.search.cache import Cache, digest
from pycompress.search.quality import Quality
from pycompress.structure.calls import SETTINGS, Settings, shrunk
from pycompress.structure.depth import skipping, without_blocks

Shapes = Mapping[str, Settings | Sequence[Settings]]


def checked_shapes(shapes: Any, caller: str) -> dict[str, list[Settings]]:
    """The calls of shrink for each shape.

    Raises:
        TypeError: no settings. ValueError: settings of another name, or a rate that is no share.
    """
    if not isinstance(shapes, Mapping):
        raise TypeError(f"{caller}: shapes is {type(shapes).__name__}, expected {{name: settings of shrink}}")
    found: dict[str, list[Settings]] = {}
    for name, calls in shapes.items():
        own = [calls] if isinstance(calls, Mapping) else calls
        if not isinstance(own, list | tuple) or not own or not all(isinstance(one, Mapping) and one for one in own):
            raise TypeError(f"{caller}: shape {name!r} is {calls!r}, expected settings of shrink, or a list of such")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{caller}: a shape is called {name!r}, expected some text: '' is the model itself")
        for key, value in ((key, value) for one in own for key, value in one.items()):
            if key not in SETTINGS:
                raise ValueError(f"{caller}: shape {name!r} has {key!r}, expected some of {', '.join(SETTINGS)}")
            rates = value.values() if isinstance(value, Mapping) else [value] if isinstance(value, int | float) else []
            for rate in rates if key != "fisher" else []:
                if rate is not None and (isinstance(rate, bool) or not 0 < rate <= 1):
                    raise ValueError(
                        f"{caller}: shape {name!r}: {key} is {rate!r}, expected a share above 0 and up to 1"
                    )
        found[name] = [*own]
    return found


def smaller(
    model: nn.Module, calls: Sequence[Settings], data: Sequence[Inputs], inputs: Inputs, quality: Quality, cache: Cache,
    caller: str,
) -> tuple[nn.Module, tuple[Settings, ...]]:  # fmt: skip
    """The smaller model, and the calls that make it again. Blocks go one after another, each the one without which the quality is
    best. Raises what :func:`pycompress.shrunk` does, behind ``caller``."""
    done = []
    try:
        for settings in calls:
            own, shares = {**settings}, settings.get("blocks")
            if isinstance(shares, float | int | Mapping):
                shares = shares if isinstance(shares, Mapping) else {"*": shares}
                own["blocks"] = _least_needed(model, shares, inputs, quality, cache)
            if own.get("blocks") != []:  # (of a share that leaves all)
                model = shrunk(model, [own], data, example_inputs=inputs)
                done.append(own)
    except (ValueError, RuntimeError) as error:
        kind = RuntimeError if isinstance(error, RuntimeError) else ValueError
        raise kind(f"{caller}: {error}") from error
    return model, tuple(done)


def _least_needed(
    model: nn.Module, shares: Mapping[str, float | None], inputs: Inputs, quality: Quality, cache: Cache
) -> list[str]:  # fmt: skip
    """The names of the blocks that go."""
    key = digest(model)
    with whole.without(uncompiled(model)):
        own = copied(uncompiled(model), ())

    def loss(names: tuple[str, ...]) -> float:
        place = digest("without", key, quality.key, sorted(names))
        known = cache.get(place)
        if known is None:
            with skipping(own, names):
                known = cache.put(place, quality.of(own, f"the model without {', '.join(names)}"))
        return -float(known)

    return without_blocks(own, shares, inputs, loss).steps[0].modules
