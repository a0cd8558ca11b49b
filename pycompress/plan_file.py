"""A plan in a file: for each glob the name of a method and those of its settings that are not the default ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from torch import Tensor

from pycompress import methods, toml
from pycompress.methods import InputStatistics
from pycompress.methods.method import Method, is_method
from pycompress.profiles import Profile
from pycompress.replacing import FilePath

VERSION = 1
_DENSE = "dense"  # how a file says that a layer stays as it is

# What may stand in a file: methods, and what their settings may be made of.
KNOWN: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(methods.Int8, methods.Int4, methods.Sparse, methods.LowRank, methods.Dense, Profile),
        *(methods.MinMax, methods.MovingAverage, methods.Percentile, methods.MeanSquaredError, methods.Entropy, methods.Known),
    )
}  # fmt: skip


class WrittenPlan(Mapping[str, Method | None]):
    """{glob: method or None}, as :func:`compress` takes it, that can be written to a TOML file and read again.

    .. code-block:: toml

        version = 1

        [layers."*.query"]
        method = "LowRank"
        rank = 96

        [layers."*"]
        method = "Int8"

    Args:
        rules: the plan; a single method is one for ``*``. The first glob that matches a layer counts.
        about: text and numbers to stand on top of the file: where the plan comes from.
        shrink: the calls of ``shrink`` that make the model smaller for which the plan is, ``[shrink.1]`` and so on in a file;
            :func:`pycompress.shrunk` does them. ``compress`` refuses a model that was not made smaller.
    Raises:
        TypeError: no plan.
    """

    def __init__(
        self, rules: Method | Mapping[str, Method | None], about: Mapping[str, Any] | None = None,
        shrink: Sequence[Mapping[str, Any]] = (),
    ) -> None:  # fmt: skip
        self._rules = dict(rules) if isinstance(rules, Mapping) else {"*": rules}
        self.about, self.shrink = dict(about or {}), tuple(dict(call) for call in shrink)
        for glob, method in self._rules.items():
            if not isinstance(glob, str) or not (method is None or is_method(method)):
                raise TypeError(
                    f"WrittenPlan: {glob!r}: {method!r}, expected a glob and a method such as Int8(), or None"
                )

    def __getitem__(self, glob: str) -> Method | None:
        return self._rules[glob]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __repr__(self) -> str:
        return f"WrittenPlan({self._rules!r})"

    def save(self, path: FilePath) -> None:
        """Writes a TOML file, which takes the place of an older one whole or not at all.

        Raises:
            TypeError: a method that is no dataclass, or a setting that no file can hold: a mask, what calibration saw. The inputs
                of layers are no part of a plan: ``compress(..., calibration=...)`` is given them.
        """
        layers = {
            glob: {"method": _DENSE} if method is None else table_of(method, f"plan: {glob}")
            for glob, method in self.items()
        }
        calls = {str(i): call for i, call in enumerate(self.shrink, 1)}
        table = {"about": self.about, "shrink": calls}
        toml.write(path, {"version": VERSION, **{name: own for name, own in table.items() if own}, "layers": layers})

    @classmethod
    def load(cls, path: FilePath, known: Iterable[type] = ()) -> WrittenPlan:
        """What :meth:`save` wrote, or somebody by hand.

        Args:
            known: classes of methods besides those of this package; a file cannot name others.
        Raises:
            ValueError: it is no TOML, or says something else; the place is named. OSError: it cannot be read.
        """
        return cls.of_table(toml.read(path, "plan"), f"plan: {path}", known)

    @classmethod
    def of_table(cls, table: Mapping[str, Any], place: str = "plan", known: Iterable[type] = ()) -> WrittenPlan:
        """The plan that a file's whole table says; ``place`` begins the messages. Raises ValueError as :meth:`load` does."""
        if table.get("version") != VERSION:
            raise ValueError(f"{place}: version is {table.get('version')!r}, expected {VERSION}")
        layers, about = table.get("layers"), table.get("about", {})
        if not isinstance(layers, Mapping) or not layers:
            raise ValueError(f"{place}: layers is {layers!r}, expected a table for each glob")
        if not isinstance(about, Mapping) or (others := set(table) - {"version", "about", "shrink", "layers"}):
            raise ValueError(
                f"{place}: about is {about!r}, and there is {sorted(others)}, expected a table, and nothing"
            )
        calls = table.get("shrink", {})
        numbers = [str(i) for i in range(1, len(calls) + 1)] if isinstance(calls, Mapping) else []
        if not isinstance(calls, Mapping) or not all(isinstance(calls.get(i), Mapping) for i in numbers):
            raise ValueError(f"{place}: shrink is {calls!r}, expected tables shrink.1, shrink.2 and so on")
        rules = {glob: _rule(entry, f"{place}: {glob}", known) for glob, entry in layers.items()}
        return cls(rules, about, [calls[i] for i in numbers])


def table_of(value: Any, place: str) -> dict[str, Any]:
    """The name of a method and its settings, as they stand in a file. Raises TypeError for one that no file can hold."""
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{place}: {value!r} is no dataclass, whose fields could be written")
    table: dict[str, Any] = {"method": type(value).__name__}
    for field in fields(value):
        own = getattr(value, field.name)
        if not field.init or _is_default(field, own):
            continue
        if isinstance(own, Tensor | InputStatistics):
            raise TypeError(
                f"{place}: {field.name} of {type(value).__name__} is {type(own).__name__}, which no plan can hold"
            )
        table[field.name] = table_of(own, place) if is_dataclass(own) else own
    return table


def _is_default(field: Field[Any], value: Any) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return type(value) is type(default) and bool(value == default)


def method_of(entry: Any, place: str, known: Iterable[type] = ()) -> Method:
    """The method whose table it is. Raises ValueError where it is none."""
    found = _made(entry, place, KNOWN | {kind.__name__: kind for kind in known})
    if not is_method(found):
        raise ValueError(f"{place}: {found!r} is no method")
    return found


def _rule(entry: Any, place: str, known: Iterable[type]) -> Method | None:
    if isinstance(entry, Mapping) and dict(entry) == {"method": _DENSE}:
        return None
    return method_of(entry, place, known)


def _made(entry: Any, place: str, known: Mapping[str, type]) -> Any:
    """The value that :func:`table_of` wrote."""
    name = entry.get("method") if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{place}: method is {name!r}, expected {_DENSE!r} or one of {', '.join(known)}")
    kind = known[name]
    names = {field.name for field in fields(kind) if field.init}
    settings = {}
    for key, value in entry.items():
        if key == "method":
            continue
        if key not in names or key == "inputs":
            raise ValueError(
                f"{place}: {name} has no {key!r}, expected some of {', '.join(sorted(names - {'inputs'}))}"
            )
        settings[key] = (
            _made(value, f"{place}: {key}", known) if isinstance(value, Mapping) and "method" in value else value
        )
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None
