"""What a canonical weight is: a table of tensors and one of settings, from which its stored form and its checks follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pycompress.weights.rules import Allowed, matrix_shape

if TYPE_CHECKING:
    from typing_extensions import Self

Shape = tuple[int, int]
Settings = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]  # stored name of a tensor -> its shape and dtype
When = Callable[[Settings], bool]
Rule = Callable[[str, Tensor, Any], str]  # name, tensor and the weight that it is of -> what is wrong, or ''

REQUIRED = object()  # a setting without a default: a file that lacks it is refused
OPTIONAL = object()  # one that may be left out, which means that there is none


@dataclass(frozen=True)
class Field:
    """One tensor of a weight.

    Attributes:
        attribute: its name in the weight. In state dicts and files it is stored behind the weight's: ``int8_values``.
        dtype: or, where it depends on the setting ``bits``, one for each value of that.
        shape: one size after another, each a name of :meth:`Weight.sizes`, a number or ``ceil(size / size)``: ``n, ceil(k / 8)``.
        rule: what else must hold.
        when: the settings with which it is there; None: always.
    """

    attribute: str
    dtype: torch.dtype | Mapping[int, torch.dtype]
    shape: str
    rule: Rule | None = None
    when: When | None = None

    def form(self, sizes: Mapping[str, int], settings: Settings) -> tuple[tuple[int, ...], torch.dtype]:
        dtype = self.dtype if isinstance(self.dtype, torch.dtype) else self.dtype[settings["bits"]]
        return tuple(_size(text, sizes) for text in self.shape.split(", ")), dtype

    def check(self, kind: str, tensor: object) -> None:
        """As far as it can be told before shape and settings are known. Raises ValueError."""
        dtypes = [self.dtype] if isinstance(self.dtype, torch.dtype) else list(self.dtype.values())
        dims = self.shape.count(",") + 1
        if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes or tensor.dim() != dims:
            expected = f"{' or '.join(map(str, dtypes))} [{self.shape}]"
            raise ValueError(f"{kind}: {self.attribute} is {described(tensor)}, expected {expected}")


def _size(text: str, sizes: Mapping[str, int]) -> int:
    if text.startswith("ceil("):
        whole, part = text[len("ceil(") : -1].split(" / ")
        return -(-_size(whole, sizes) // _size(part, sizes))
    return int(text) if text.isdigit() else sizes[text]


@dataclass(frozen=True)
class Setting:
    """One value of a weight that is no tensor.

    Attributes:
        name: in the weight, in files, and of the method's argument.
        allowed: see :mod:`pycompress.weights.rules`; it may look at the settings that stand before this one in the table.
        default: what a file that lacks it means, :data:`REQUIRED` or :data:`OPTIONAL`.
        when: the settings with which it is there; None: always.
        measured: the value that follows from the tensors (by attribute), if it does: a state dict may bring others than the layer
            had.
    """

    name: str
    allowed: Allowed
    default: object = REQUIRED
    when: When | None = None
    measured: Callable[[Tensors], object] | None = None

    def check(self, kind: str, value: object, shape: Shape = (1, 1), settings: Settings | None = None) -> None:
        """Raises ValueError where the value is not allowed; ``kind``: who asks."""
        expected = self.allowed(value, shape, settings or {})
        if expected:
            raise ValueError(f"{kind}: {self.name} is {value!r}, expected {expected}")


class Weight:
    """A canonical weight [n, k]: what is saved, exported and compared; independent of any processor.

    A subclass is a frozen dataclass of its tensors and of what they do not tell. It says its tables, ``shape`` and ``decompress``;
    its constructor raises ValueError where anything breaks the rules of the tables, or lies elsewhere than on the CPU.

    Attributes:
        name: in plans, files and summaries: that of the method that makes it; it stands before the names of stored tensors, so
            that no dense layer has one of these.
        version: of the stored form. Who changes that raises it, keeps what was in ``older``, and lets :meth:`migrate` read what
            it left. A new setting with a default needs no new version.
        older: by version, the class with its tables; or, where tensors had other names and nothing else was different, these
            names by attribute, and then :meth:`migrate` needs nothing.
        stored: the names of stored tensors by attribute, where they are others than ``<name>_<attribute>``.
        fields, options: the tables.
        smallest: of n and of k.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    older: ClassVar[Mapping[int, type[Weight] | Mapping[str, str]]] = {}
    stored: ClassVar[Mapping[str, str]] = {}
    fields: ClassVar[tuple[Field, ...]]
    options: ClassVar[tuple[Setting, ...]] = ()
    smallest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        kind = type(self).__name__
        given = [field for field in self.fields if field.when is None or getattr(self, field.attribute) is not None]
        for field in given:
            field.check(kind, getattr(self, field.attribute))
        shape = matrix_shape(kind, self.shape, self.smallest)
        for option in self._nested():
            option.check_weight(kind, getattr(self, option.name), shape)
        tensors = self.tensors()
        check_tensors(kind, tensors, self.expected(shape, self.settings()))
        for name, tensor in tensors.items():
            if tensor.device.type != "cpu":
                raise ValueError(f"{kind}: {name} is on {tensor.device}, expected the CPU")
        for field in given:
            wrong = "" if field.rule is None else field.rule(field.attribute, getattr(self, field.attribute), self)
            if wrong:
                raise ValueError(f"{kind}: {wrong}")

    @property
    def shape(self) -> Shape:
        """(n, k) of the dense weight."""
        raise NotImplementedError

    def decompress(self) -> Tensor:
        """float32 [n, k]."""
        raise NotImplementedError

    def __repr__(self) -> str:
        rest = [f"{name}={value!r}" for name, value in self.settings().items()]
        return f"{type(self).__name__}({', '.join([f'shape={list(self.shape)}', *rest])})"

    # --- what it is made of ---------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Tensor]:
        """Its tensors, by the names of its attributes; those of a weight inside it (a residual) behind that one's and ``_``."""
        found = {field.attribute: getattr(self, field.attribute) for field in self.fields}
        for option in self._nested():
            inner: Weight | None = getattr(self, option.name)
            found |= {} if inner is None else {option.prefix + name: part for name, part in inner.parts().items()}
        return {name: part for name, part in found.items() if part is not None}

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names that it has below the layer's."""
        found = {self._stored_as(field.attribute): getattr(self, field.attribute) for field in self.fields}
        for option in self._nested():
            inner: Weight | None = getattr(self, option.name)
            prefix = self._prefix(option)
            found |= {} if inner is None else {prefix + name: part for name, part in inner.tensors().items()}
        return {name: part for name, part in found.items() if part is not None}

    def settings(self) -> dict[str, Any]:
        """The rest, for JSON: numbers, strings, lists and dictionaries of them."""
        values = {option.name: getattr(self, option.name, None) for option in self.options}
        return {name: _plain(value) for name, value in values.items() if value is not None}

    # --- from tensors and settings --------------------------------------------------------------------------------

    @classmethod
    def complete(cls, shape: Shape, settings: Settings) -> dict[str, Any]:
        """The settings of a weight [n, k], checked, with the default of each one that is missing and has one.

        Raises:
            ValueError: a setting that is missing, unknown, of the wrong type or out of range, or an impossible shape.
        """
        kind, shape = cls.__name__, matrix_shape(cls.__name__, shape, cls.smallest)
        found: dict[str, Any] = {}
        options = []
        for option in cls.options:
            if option.when is not None and not option.when(found):
                continue
            options.append(option.name)
            if option.name in settings or option.default is not OPTIONAL:
                value = settings.get(option.name, None if option.default is REQUIRED else option.default)
                hint = kind if option.name in settings else f"{kind}: the settings are {list(settings)}"
                option.check(hint, value, shape, found)
                found[option.name] = value
        if unknown := [name for name in settings if name not in found]:
            expected = str(options) if options else "none"
            raise ValueError(f"{kind}: the settings are {list(settings)}, expected {expected}, not {unknown}")
        return found

    @classmethod
    def sizes(cls, n: int, k: int, settings: Settings) -> dict[str, int]:
        """What the shapes of the table are made of: n, k and the settings that are whole numbers."""
        return {"n": n, "k": k, **{name: value for name, value in settings.items() if type(value) is int}}

    @classmethod
    def expected(cls, shape: Shape, settings: Settings) -> Expected:
        """Shape and dtype of each of the :meth:`tensors` of a weight [n, k] with these settings; allocates nothing.

        Raises:
            ValueError: as :meth:`complete`.
        """
        settings = cls.complete(shape, settings)
        sizes = cls.sizes(*shape, settings)
        found = {cls._stored_as(field.attribute): field.form(sizes, settings) for field in cls._there(settings)}
        for option in cls._nested(settings):
            inner, rest = option.table(settings)
            found |= {cls._prefix(option) + name: form for name, form in inner.expected(shape, rest).items()}
        return found

    @classmethod
    def from_tensors(cls, shape: Shape, tensors: Tensors, settings: Settings) -> Self:
        """The inverse of :meth:`tensors` and :meth:`settings`. Raises ValueError where anything does not fit."""
        settings = cls.complete(shape, settings)
        check_tensors(cls.__name__, tensors, cls.expected(shape, settings))
        values = {**settings, "n": shape[0], "k": shape[1]}
        values |= {field.attribute: tensors[cls._stored_as(field.attribute)] for field in cls._there(settings)}
        values |= {
            option.name: option.weight(shape, cls._inside(option, tensors), settings)
            for option in cls._nested(settings)
        }
        return cls(**{field.name: values.get(field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]

    @classmethod
    def from_parts(cls, shape: Shape, parts: Tensors, settings: Settings) -> Self:
        """The inverse of :meth:`parts` and :meth:`settings`. Raises ValueError where anything does not fit."""
        names = cls.names(cls.complete(shape, settings))
        return cls.from_tensors(shape, {names.get(name, name): part for name, part in parts.items()}, settings)

    @classmethod
    def names(cls, settings: Settings) -> dict[str, str]:
        """{name of a part: its stored name}, of a weight with these settings."""
        found = {field.attribute: cls._stored_as(field.attribute) for field in cls._there(settings)}
        for option in cls._nested(settings):
            inner, rest = option.table(settings)
            found |= {option.prefix + name: cls._prefix(option) + stored for name, stored in inner.names(rest).items()}
        return found

    @classmethod
    def measured(cls, tensors: Tensors, settings: Settings) -> dict[str, Any]:
        """The settings, with those that follow from stored tensors (a rank, a number of non-zeros) as these tensors have them."""
        parts = {field.attribute: tensors[cls._stored_as(field.attribute)] for field in cls._there(settings)}
        there = [option for option in cls.options if option.name in settings]
        found = {option.name: option.measured(parts) for option in there if option.measured is not None}
        for option in cls._nested(settings):
            inner, rest = option.table(settings)
            found[option.name] = {**settings[option.name], **inner.measured(cls._inside(option, tensors), rest)}
        return {**settings, **found}

    @classmethod
    def _stored_as(cls, attribute: str) -> str:
        return cls.stored.get(attribute, f"{cls.name}_{attribute}")

    @classmethod
    def _prefix(cls, option: Nested) -> str:
        """What stands before the names of the stored tensors of a weight inside this one."""
        return f"{cls._stored_as(option.name)}_"

    @classmethod
    def _inside(cls, option: Nested, tensors: Tensors) -> dict[str, Tensor]:
        """The stored tensors of a weight inside this one, by its own names."""
        prefix = cls._prefix(option)
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    @classmethod
    def _there(cls, settings: Settings) -> list[Field]:
        return [field for field in cls.fields if field.when is None or field.when(settings)]

    @classmethod
    def _nested(cls, settings: Settings | None = None) -> list[Nested]:
        """With settings, those that are there."""
        nested = [option for option in cls.options if isinstance(option, Nested)]
        return [option for option in nested if settings is None or option.name in settings]

    # --- versions ---------------------------------------------------------------------------------------------------

    @classmethod
    def of_version(cls, version: object) -> type[Weight]:
        """The class with the tables of a version. Raises ValueError for a newer one, or none."""
        if type(version) is not int or not 1 <= version <= cls.version:
            expected = "1" if cls.version == 1 else f"1 to {cls.version}"
            raise ValueError(f"{cls.__name__}: the version is {version!r}, expected {expected}")
        if version == cls.version:
            return cls
        older = cls.older[version]
        return older if isinstance(older, type) else _renamed(cls, version)  # type: ignore[arg-type] # a class is hashable

    @classmethod
    def migrate(cls, version: object, tensors: Tensors, settings: Settings) -> tuple[Tensors, Settings]:
        """What a file of an older version holds -> the tensors and settings of the present one. Raises as :meth:`of_version`."""
        older = cls.of_version(version)
        if isinstance(cls.older.get(older.version), Mapping):
            names = cls.names(settings)
            tensors = {names[part]: tensors[stored] for part, stored in older.names(settings).items()}
        return tensors, settings


@cache
def _renamed(weight_type: type[Weight], version: int) -> type[Weight]:
    """The class of an older version, in which tensors had other names."""
    return type(weight_type.__name__, (weight_type,), {"version": version, "stored": weight_type.older[version]})


def _plain(value: object) -> object:
    if isinstance(value, Weight):
        version = {} if value.version == 1 else {"version": value.version}
        return {"method": value.name, **version, **value.settings()}
    return list(value) if isinstance(value, tuple) else value


# --- weights by their names, and one inside another ---------------------------------------------------------------------

WEIGHTS: dict[str, type[Weight]] = {}  # of matrices, by name; open to others by `register`
WeightT = TypeVar("WeightT", bound=type[Weight])


def register(weight_type: WeightT) -> WeightT:
    """Adds a class of weights to :data:`WEIGHTS`; also as a decorator. Raises ValueError where another has its name."""
    known = WEIGHTS.setdefault(weight_type.name, weight_type)
    if known is not weight_type:
        raise ValueError(f"register: {known.__qualname__} has the name {known.name!r}, expected one that no weight has")
    return weight_type


class Nested(Setting):
    """A weight [n, k] inside another one, described by its name (``method``), its version (where it is above 1) and its settings.

    It may be any registered weight that has none inside itself. Its tensors are stored behind the setting's name and ``_``, which
    stand where the attribute of a field does: ``low_rank_residual_int8_values``.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, lambda *_: "", OPTIONAL)

    @property
    def prefix(self) -> str:
        return f"{self.name}_"

    def known(self) -> list[str]:
        """The names of the weights that may stand there."""
        return [name for name, weight_type in WEIGHTS.items() if not weight_type._nested()]

    def check(self, kind: str, value: object, shape: Shape = (1, 1), settings: Settings | None = None) -> None:  # noqa: ARG002
        """Raises ValueError for a description that is none, or is that of a weight that cannot stand there."""
        if not isinstance(value, Mapping):
            raise ValueError(f"{kind}: {self.name} is {value!r}, expected a dictionary with a method and its settings")
        method, known = value.get("method"), self.known()
        if not isinstance(method, str) or method not in known:
            raise ValueError(f"{kind}: the {self.name}'s method is {method!r}, expected one of {', '.join(known)}")
        inner, rest = self.table({self.name: value})
        inner.complete(shape, rest)

    def check_weight(self, kind: str, weight: object, shape: Shape) -> None:
        """Raises ValueError for something that cannot stand there, in a weight of this shape."""
        if weight is not None and (not isinstance(weight, Weight) or weight.name not in self.known()):
            expected = ", ".join(WEIGHTS[name].__name__ for name in self.known())
            raise ValueError(f"{kind}: the {self.name} is {type(weight).__name__}, expected {expected} or None")
        if weight is not None and weight.shape != shape:
            raise ValueError(f"{kind}: the {self.name} is {list(weight.shape)}, expected {list(shape)}")

    def table(self, settings: Settings) -> tuple[type[Weight], dict[str, Any]]:
        """The class that has the tables for what these settings of the outer weight describe, and the inner one's own settings."""
        inner = settings[self.name]
        rest = {name: value for name, value in inner.items() if name not in ("method", "version")}
        return WEIGHTS[inner["method"]].of_version(inner.get("version", 1)), rest

    def weight(self, shape: Shape, tensors: Tensors, settings: Settings) -> Weight:
        """The inner weight, from its stored tensors and the settings of the outer one."""
        inner = settings[self.name]
        own, rest = WEIGHTS[inner["method"]].migrate(inner.get("version", 1), tensors, self.table(settings)[1])
        return WEIGHTS[inner["method"]].from_tensors(shape, own, rest)


# --- checks ---------------------------------------------------------------------------------------------------------------


def described(value: object) -> str:
    """A value in a message: dtype and shape of a tensor, the type of anything else."""
    if value is None:
        return "None"
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_tensors(kind: str, tensors: Tensors, expected: Expected) -> None:
    """Raises ValueError where the tensors are not those that are expected, by name, shape and dtype."""
    if set(tensors) != set(expected):
        raise ValueError(f"{kind}: the tensors are {list(tensors)}, expected {list(expected)}")
    for name, (shape, dtype) in expected.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise ValueError(f"{kind}: {name} is {described(found)}, expected {dtype} {list(shape)}")
