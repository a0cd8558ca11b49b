"""``Cut``: what a smaller model has left of each tensor, and a model of the same architecture made as small by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.records import CUT
from pycompress.structure.units import Left, Units, joined

VERSION = 1


@dataclass(frozen=True)
class Step:
    """What one call of ``shrink`` did.

    Attributes:
        tensors: {name of a parameter or buffer: {dimension: the positions that stay, in their order}}.
        numbers: {name of an attribute: its value}.
        modules: names of the modules that go.
    """

    tensors: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """What became of some units.

    Attributes:
        loss: by what it was judged: as :func:`shrink` says; of blocks how far the results of the model moved, squared, as a share.
    """

    kind: str
    name: str
    before: int
    after: int
    loss: float


@dataclass(frozen=True)
class Cut:
    """How a smaller model comes of the whole one, step by step; nothing of what is in its tensors. Its text is a table.

        cut = pc.Cut.of(small)
        text = cut.to_json()
        again = pc.Cut.from_json(text).apply(fresh)  # takes the state dict of small

    Attributes:
        steps: in their order.
        records, left: what became smaller, and what did not; unknown to what was read from JSON.
    """

    steps: tuple[Step, ...] = ()
    records: tuple[Record, ...] = field(default=(), compare=False)
    left: tuple[Left, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, model: nn.Module) -> Cut:
        """That of a model that :func:`shrink` returned, or compressed since; of any other one a cut without steps."""
        found = vars(model).get(CUT)
        return found if isinstance(found, cls) else cls()

    @classmethod
    def without(cls, *names: str) -> Cut:
        """The cut that leaves out these modules, members of lists: of a teacher's blocks every second one, for a student half
        as deep, with its weights."""
        return cls((Step(modules=[*names]),))

    @classmethod
    def leaving(cls, model: nn.Module, stay: Mapping[Units, Tensor]) -> Cut:
        """The cut of one step that leaves these units, bool [size] each."""
        gone: dict[tuple[str, int], list[Tensor]] = {}
        numbers: dict[str, int] = {}
        for units, kept in stay.items():
            for one in units.slices:
                gone.setdefault((one.tensor, one.dim), []).append(one.positions[~kept].flatten())
            for number in units.numbers:
                numbers[joined(number.module, number.name)] = int(kept.sum()) * number.each
        tensors: dict[str, dict[int, list[int]]] = {}
        for (name, dim), positions in gone.items():
            left = torch.ones(tensor_at(model, name).shape[dim], dtype=torch.bool, device="cpu")
            left[torch.cat(positions)] = False
            if not bool(left.all()):
                tensors.setdefault(name, {})[dim] = left.nonzero().flatten().tolist()
        return cls((Step(tensors, numbers),))

    def apply(self, model: nn.Module) -> nn.Module:
        """Makes a model as small as the one that the cut is of, in place; its numbers are those that it had, of what stays.

        Raises:
            ValueError: the model lacks what the cut names, or is smaller already. Nothing is changed then.
        """
        if Cut.of(model).steps:
            raise ValueError("Cut: the model is smaller already, expected one of the size that it had before")
        undo = _keep(model)
        try:
            for step in self.steps:
                _check(model, step)
                _apply(model, step)
        except BaseException:
            undo()
            raise
        leave_cut(model, self)
        return model

    def then(self, other: Cut) -> Cut:
        """This one, and another one behind it."""
        return Cut((*self.steps, *other.steps), (*self.records, *other.records), other.left)

    def __str__(self) -> str:
        rows = [("units", "of", "before", "after", "loss")]
        rows += [(r.kind, r.name, str(r.before), str(r.after), f"{r.loss:.4f}") for r in self.records]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(
            [*lines, *(f"{one.kind} of {one.name or 'the model'} stay: {one.reason}" for one in self.left)]
        )

    def to_json(self) -> str:
        """As text."""
        steps = [{"tensors": one.tensors, "numbers": one.numbers, "modules": one.modules} for one in self.steps]
        return json.dumps({"version": VERSION, "steps": steps})

    @classmethod
    def from_json(cls, text: str) -> Cut:
        """The inverse. Raises ValueError for anything else."""
        try:
            found = json.loads(text)
            if found["version"] != VERSION:
                raise ValueError(f"version {found['version']!r}, expected {VERSION}")
            return cls(tuple(_step(one) for one in found["steps"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"Cut: the text is none of to_json: {error}") from error


def leave_cut(model: nn.Module, cut: Cut) -> None:
    """For :meth:`Cut.of`."""
    vars(model)[CUT] = cut


def masked(model: nn.Module, stay: Mapping[Units, Tensor]) -> None:
    """Has no layer make use of the units that do not stay: zeros in their columns, in place."""
    with torch.no_grad():
        for units, kept in stay.items():
            for one in units.inputs:
                weight = tensor_at(model, f"{one.layer}.weight" if one.layer else "weight")
                weight.view(len(weight), -1)[:, one.columns[~kept].flatten()] = 0.0


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer."""
    _, table, last = _place(model, name)
    found: Tensor = table[last]
    return found


def _place(model: nn.Module, name: str) -> tuple[nn.Module, dict[str, Any], str]:
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    table: dict[str, Any] = owner._parameters if last in owner._parameters else owner._buffers
    if table.get(last) is None:
        raise AttributeError(f"{type(owner).__name__} has no parameter or buffer {last}")
    return owner, table, last


def _step(found: dict[str, Any]) -> Step:
    tensors = {str(k): {int(d): [int(i) for i in v] for d, v in dims.items()} for k, dims in found["tensors"].items()}
    return Step(
        tensors, {str(k): int(v) for k, v in found["numbers"].items()}, [str(name) for name in found["modules"]]
    )


def _keep(model: nn.Module) -> Callable[[], None]:
    """What a cut may change in a model: a function that puts it back."""
    own = [vars(module) for module in model.modules()]
    own += [vars(config) for one in own if hasattr(config := one.get("config"), "__dict__")]
    tables = [table for one in own for name in ("_parameters", "_buffers", "_modules") if (table := one.get(name))]
    before = [(table, dict(table)) for table in (*own, *tables)]

    def put_back() -> None:
        for table, entries in before:
            table.clear()
            table.update(entries)

    return put_back


def _check(model: nn.Module, step: Step) -> None:
    """Raises ValueError where a step does not fit the model."""
    try:
        for name in step.modules:
            model.get_submodule(name)
        for name, dims in step.tensors.items():
            shape = tensor_at(model, name).shape
            for dim, positions in dims.items():
                if dim >= len(shape) or not positions or max(positions) >= shape[dim] or min(positions) < 0:
                    raise ValueError(f"Cut: {name} is {list(shape)}, expected more in dimension {dim}")
        for name in step.numbers:
            path, _, last = name.rpartition(".")
            getattr(model.get_submodule(path), last)
    except AttributeError as error:
        raise ValueError(f"Cut: the model is not of the architecture that was cut: {error}") from error


def _apply(model: nn.Module, step: Step) -> None:
    owners: dict[nn.Module, None] = {}
    for name, dims in step.tensors.items():
        owner, table, last = _place(model, name)
        tensor = table[last]
        made = tensor.detach()
        for dim, positions in dims.items():
            made = made.index_select(dim, torch.tensor(positions, device=made.device, dtype=torch.int64))
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, tensor.requires_grad)
        table[last] = made
        owners[owner] = None
    for owner in owners:
        _resize(owner)
    for name, value in step.numbers.items():
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, value)
    _remove(model, step.modules)


def _resize(module: Any) -> None:
    """Has the attributes of a module say what its tensors are now."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        first, second, *_ = module.weight.shape
        if module.groups == module.in_channels > 1 and not module.transposed:  # (second is 1)
            module.groups = first * module.groups // module.out_channels
        inner, outer = (first, second * module.groups) if module.transposed else (second * module.groups, first)
        module.in_channels, module.out_channels = inner, outer
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensors = (module.running_mean, module.weight)
        module.num_features = next(len(one) for one in tensors if one is not None)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _remove(model: nn.Module, names: list[str]) -> None:
    """Takes modules out of the lists in which they stand, which close up."""
    lists: dict[str, list[int]] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        lists.setdefault(path, []).append(int(last))
    for path, places in lists.items():
        owner: Any = model.get_submodule(path)
        before = len(owner)
        for place in sorted(places, reverse=True):
            del owner[place]
        for module in model.modules():  # what counts the list's modules
            config = getattr(module, "config", None)
            if getattr(config, "num_hidden_layers", None) == before:
                config.num_hidden_layers = len(owner)  # type: ignore[union-attr]
