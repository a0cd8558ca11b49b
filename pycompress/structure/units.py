"""``Units``: parts of a model that can go, such as the heads of an attention; where they lie, and who makes use of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pycompress.kinds import pruned_names, replaced_code
from pycompress.surgery import shared_parameters

KINDS = ("neurons", "heads", "channels")


@dataclass(frozen=True, eq=False)
class Slice:
    """The positions of each unit in a parameter or buffer.

    Attributes:
        tensor: its name in the model.
        positions: int64 [units, b], along ``dim``.
    """

    tensor: str
    dim: int
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Input:
    """A layer that multiplies the units.

    Attributes:
        layer: its name in the model.
        columns: int64 [units, b], of its matrix [n, k].
    """

    layer: str
    columns: Tensor


@dataclass(frozen=True)
class Number:
    """An attribute that is a multiple of how many units there are."""

    module: str
    name: str
    each: int = 1


@dataclass(frozen=True, eq=False)
class Units:
    """Units of one place, of which any may go.

    Attributes:
        kind: one of :data:`KINDS`.
        name: of the layer that makes them.
        slices: all tensors in which they lie, also those of ``inputs``.
        held: bool [size], which have to stay.
    """

    kind: str
    name: str
    size: int
    slices: tuple[Slice, ...]
    inputs: tuple[Input, ...]
    numbers: tuple[Number, ...] = ()
    held: Tensor | None = None


@dataclass(frozen=True)
class Left:
    """What cannot shrink, and why."""

    kind: str
    name: str
    reason: str


class Unplain(Exception):  # noqa: N818 - no error: a reason
    """Why a layer's tensors cannot be cut."""


def joined(*names: str) -> str:
    """The names of a module and of what is inside, as one."""
    return ".".join(name for name in names if name)


def check_plain(model: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    """The module of this name. Raises Unplain where it may be something else than its class says, or shares its parameters."""
    module = model.get_submodule(name)
    if type(module) not in kinds:
        raise Unplain(f"{name} is a {type(module).__name__}, expected {' or '.join(kind.__name__ for kind in kinds)}")
    if pruned_names(module):
        raise Unplain(f"{name} is masked by torch.nn.utils.prune, expected prune.remove() before")
    if "weight" not in module._parameters:
        raise Unplain(f"the weight of {name} is computed, expected a parameter")
    if code := replaced_code(module):
        raise Unplain(f"{name}: {code}")
    shared = shared_parameters(model)
    for parameter in module.parameters(recurse=False):
        if id(parameter) in shared:
            raise Unplain(f"{name} shares a parameter with another layer")
    return module
