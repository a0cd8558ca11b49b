"""``Machine``: what a machine is, and how long it takes for products of each kind, in a file, so that others can plan for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from pycompress import toml
from pycompress.calls import Inputs
from pycompress.methods import Int4, Int8, LowRank, Sparse
from pycompress.methods.method import Method
from pycompress.nn.layers import layer_for
from pycompress.plan import Target, targets_of
from pycompress.plan_file import WrittenPlan, method_of, table_of
from pycompress.profiles import DEFAULT, PROFILES, Profile
from pycompress.race import input_shapes
from pycompress.replacing import FilePath
from pycompress.weights.int8 import Int8Weight

VERSION = 1
DENSE = "dense"  # among the names of candidates: the layer as it is
_NOISE = 0.03  # of a time, as a share
_MANY_ROWS = 32  # at which a product is no longer bound by the bytes of its weights
Cell = tuple[int, int, int, float]  # m, n, k, microseconds

# What compress(target=) chooses from, most exact first: methods that need no data.
PRECISIONS: dict[str, Method] = {repr(method): method for method in (Int8(), Int8(7), Int4(), Int4(activation_bits=16))}

_SMALL = Int8(embeddings=True)  # for what no times are measured of, where memory is short


class DoesNotFit(ValueError):  # noqa: N818 - an answer
    """A model needs more memory than a machine has, whatever is done to it.

    Attributes:
        needs, has: bytes.
    """

    def __init__(self, name: str, needs: float, has: float) -> None:
        super().__init__(f"compress: the model needs {_size(needs)}, the target {name} has {_size(has)}")
        self.needs, self.has = needs, has


def _size(count: float) -> str:
    power = 3 if count >= 1e9 else 2
    return f"{count / 1000**power:.3g} {'GB' if power == 3 else 'MB'}"


@dataclass(frozen=True)
class Machine:
    """What a machine is, as far as plans depend on it.

    Attributes:
        name: of the processor, or one of your own.
        instruction_sets: those that it has; ``kernels``: what PYCOMPRESS_ISA said when it was measured, or ''.
        threads: with how many it was measured.
        memory_bytes: that a model may take.
        times: by the name of a candidate, or ``dense``: (m, n, k, microseconds) of linear layers [n, k] at m rows.
        methods: the candidates, by the same names.
    Raises:
        ValueError: no times of dense layers, or numbers that are not above 0.
    """

    name: str
    instruction_sets: tuple[str, ...]
    threads: int
    memory_bytes: int
    times: Mapping[str, tuple[Cell, ...]]
    kernels: str = ""
    methods: Mapping[str, Method] = field(default_factory=dict)
    _grids: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.times.get(DENSE):
            raise ValueError(f"Machine: times has {sorted(self.times)}, expected {DENSE!r} among them")
        for name, cells in self.times.items():
            for cell in cells:
                if len(cell) != 4 or not all(value > 0 and math.isfinite(value) for value in cell):
                    raise ValueError(f"Machine: times of {name} has {cell}, expected m, n, k and microseconds, above 0")
        if self.threads < 1 or self.memory_bytes < 1:
            raise ValueError(f"Machine: threads is {self.threads}, memory_bytes {self.memory_bytes}, expected from 1")

    def check(self, candidates: Iterable[str], caller: str) -> None:
        """Raises ValueError where there are no times of a candidate."""
        for name in candidates:
            if not self.times.get(name):
                raise ValueError(
                    f"{caller}: the target {self.name} has no times of {name}, expected one of {', '.join(self.times)}: "
                    "pc.profile(candidates) measures them"
                )

    def us(self, candidate: str, m: int, n: int, k: int) -> float:
        """Microseconds of a linear layer [n, k] at m rows: between those that were measured the time of a multiply-add is
        interpolated in their logarithms, beyond them it is that of the nearest."""
        if candidate not in self._grids:
            self._grids[candidate] = _grid(self.times[candidate])
        *axes, rates = self._grids[candidate]
        for axis, value in zip(axes, (m, n, k), strict=True):  # each takes the first of the axes away
            place = float(np.interp(math.log(max(value, 1)), axis, np.arange(len(axis))))
            low = min(int(place), len(axis) - 1)
            high = min(low + 1, len(axis) - 1)
            rates = rates[low] + (place - low) * (rates[high] - rates[low])
        return float(np.exp(rates)) * m * n * k

    def layer_us(self, method: Method, shape: tuple[int, int], rows: int) -> tuple[float, float]:
        """Of a linear layer [n, k] at so many rows, dense and compressed: what ``compress(only_if_faster=machine)`` goes by.

        Raises:
            ValueError: the method was not measured.
        """
        name = next((name for name, own in self.methods.items() if own == method), "")
        if not name:
            have = ", ".join(map(repr, self.methods.values())) or "none"
            raise ValueError(f"the machine {self.name} has no times of {method!r}, expected one of {have}")
        return self.us(DENSE, rows, *shape), self.us(name, rows, *shape)

    def profile(self) -> Profile:
        """What methods take as ``profile=``, by these times: ``LowRank``'s ``rank_guard`` knows by it how fast products are there.

        A speed is the geometric mean over the shapes that were measured at 32 rows or more, and over the candidates with weights of
        that name.

        Raises:
            ValueError: no candidate was measured at so many rows.
        """
        found: dict[str, list[float]] = {}
        for name, method in self.methods.items():
            for m, n, k, us in self.times.get(name, ()):
                if m >= _MANY_ROWS and (speed := _speed(method, (n, k))) is not None:
                    weight, share = speed
                    found.setdefault(weight, []).append(math.log(share * self.us(DENSE, m, n, k) / us))
        if not found:
            raise ValueError(
                f"profile: {self.name} has no times of its methods at {_MANY_ROWS} rows or more, expected some"
            )
        speeds = {weight: math.exp(sum(logs) / len(logs)) for weight, logs in found.items()}
        adds_in_32_bits = any("vnni" in name or "amx" in name for name in self.instruction_sets)
        return Profile(self.name, speeds, None if adds_in_32_bits else PROFILES[DEFAULT].largest_rms)

    # --- a file -------------------------------------------------------------------------------------------------------

    def save(self, path: FilePath) -> None:
        """Writes a TOML file, which takes the place of an older one whole or not at all."""
        facts: dict[str, Any] = {
            "name": self.name,
            "instruction_sets": [*self.instruction_sets],
            "kernels": self.kernels,
        }
        facts |= {"threads": self.threads, "memory_bytes": self.memory_bytes}
        methods = {name: table_of(method, f"machine: {name}") for name, method in self.methods.items()}
        times = {
            name: {**methods.get(name, {}), "cells": [[*cell] for cell in own]} for name, own in self.times.items()
        }
        toml.write(path, {"version": VERSION, "machine": facts, "times": times})

    @classmethod
    def load(cls, path: FilePath) -> Machine:
        """What :meth:`save` wrote. Raises ValueError where the file says anything else, OSError where it cannot be read."""
        table = toml.read(path, "machine")
        if table.get("version") != VERSION:
            raise ValueError(f"machine: {path}: version is {table.get('version')!r}, expected {VERSION}")
        try:
            facts, times = dict(table["machine"]), table["times"]
            cells = {
                name: tuple((int(m), int(n), int(k), float(us)) for m, n, k, us in own["cells"])
                for name, own in times.items()
            }
            methods = {
                name: method_of({key: value for key, value in own.items() if key != "cells"}, name)
                for name, own in times.items()
                if "method" in own
            }
            facts["instruction_sets"] = tuple(map(str, facts["instruction_sets"]))
            return cls(**facts, times=cells, methods=methods)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"machine: {path}: no profile of a machine: {error!r}") from None

    # --- a plan -------------------------------------------------------------------------------------------------------

    def plan_for(self, model: nn.Module, example_inputs: Inputs | None = None) -> WrittenPlan:
        """A plan without data: each layer as fast as its precision allows, all as exact as the memory allows.

        Linear layers are dense or int8, whichever is faster here; if the model does not fit then, int8; then convolutions and
        embeddings, of which there are no times, are int8 too; then linear layers int8 or 4-bit; then 4-bit.

        Args:
            example_inputs: to know how many rows layers meet; None: one.
        Raises:
            DoesNotFit: the smallest of these does not fit. ValueError: there is no layer to compress, or no time of PRECISIONS;
                nothing but embeddings, which fit as they are.
        """
        known = {name: method for name, method in PRECISIONS.items() if self.times.get(name)}
        known |= {name: method for method in PRECISIONS.values() for name, own in self.methods.items() if own == method}
        if not known:
            have, wanted = ", ".join(self.times), ", ".join(PRECISIONS)
            raise ValueError(f"compress: the target {self.name} has times of {have}, expected some of {wanted}")
        takers = [t for t in targets_of(model, _SMALL) if t.method is not None and _becomes_int8(t)]
        if not takers:
            raise ValueError(
                "compress: the model has no layer to compress for a target, expected one such as nn.Linear"
            )
        layers = [target for target in takers if target.kind.name == "linear"]
        noted = {} if example_inputs is None else input_shapes(model, layers, example_inputs)
        rows = {id(t.module): sum(math.prod(x.shape[:-1]) for x in noted.get(id(t.module), [])) or 1 for t in layers}
        needs = []
        for weights, others in (
            ({DENSE, "int8"}, None), ({"int8"}, None), ({"int8"}, _SMALL), ({"int8", "int4"}, _SMALL), ({"int4"}, _SMALL),
        ):  # fmt: skip
            options = {DENSE: None} if DENSE in weights else dict[str, Method | None]()
            options |= {name: method for name, method in known.items() if method.name in weights}
            if not options:
                continue
            plan: dict[str, Method | None] = {t.names[0]: others for t in takers if others is not None} | {
                t.names[0]: options[self._fastest([*options], rows[id(t.module)], *t.kind.shape(t.module))]
                for t in layers
            }
            needs.append(_needed(model, takers, plan))
            if needs[-1] <= self.memory_bytes:
                if all(target.kind.name == "embedding" for target in takers) and not plan:
                    raise ValueError(
                        f"compress: the model fits the target {self.name} as it is, and has embeddings only"
                    )
                return WrittenPlan(plan or {"*": None}, {"machine": self.name})
        raise DoesNotFit(self.name, min(needs), self.memory_bytes)

    def _fastest(self, names: Sequence[str], m: int, n: int, k: int) -> str:
        """Of those that are as fast, as far as that can be told, the first: names are in the order of exactness."""
        times = [self.us(name, m, n, k) for name in names]
        return next(name for name, us in zip(names, times, strict=True) if us <= (1 + _NOISE) * min(times))


def _becomes_int8(target: Target) -> bool:
    """Whether it gets an int8 matrix [n, k]: recurrent layers get several."""
    kind = layer_for(target.kind, Int8.name)
    return kind is not None and kind.weight_type is Int8Weight


def _needed(model: nn.Module, layers: Sequence[Target], plan: Mapping[str, Method | None]) -> float:
    """Bytes of a model's parameters and buffers with this plan."""
    tensors = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    for target in layers:
        method = plan.get(target.names[0])
        if method is not None:  # (of a weight that several layers share it is written twice)
            tensors[id(target.kind.stored(target.module))] = _bytes(method, target.kind.shape(target.module))
    return float(sum(tensors.values()))


def _speed(method: Method, shape: tuple[int, int]) -> tuple[str, float] | None:
    """What a :class:`Profile` calls the products of a method's layers [n, k], and how many multiply-adds they have for each one of
    the dense layer; None where the profile knows no name for them."""
    n, k = shape
    if isinstance(method, Int8 | Int4):
        return method.name, 1.0
    if isinstance(method, Sparse) and method.density is not None and method.pattern == "unstructured":
        return f"sparse {method.bits}", float(method.density)
    if isinstance(method, LowRank) and isinstance(method.rank, int) and method.residual is None:
        return f"factors {method.bits}", method.rank * (n + k) / (n * k)
    return None


def _bytes(method: Method, shape: tuple[int, int]) -> int:
    """Of the canonical weight that the method makes of a matrix of this shape."""
    small = method.compress(torch.ones(1, 32, dtype=torch.float32, device="cpu"))
    return sum(
        math.prod(size) * dtype.itemsize for size, dtype in type(small).expected(shape, small.settings()).values()
    )


def _grid(cells: Sequence[Cell]) -> tuple[Any, ...]:
    """Logarithms of m, n and k, ascending, and of the time of a multiply-add [m, n, k]; of a cell that is missing that of the
    nearest."""
    axes = [sorted({math.log(cell[i]) for cell in cells}) for i in range(3)]
    known = {tuple(map(math.log, cell[:3])): math.log(cell[3] / math.prod(cell[:3])) for cell in cells}
    rates = np.empty([len(axis) for axis in axes])
    for place in product(*(range(len(axis)) for axis in axes)):
        point = tuple(axis[i] for axis, i in zip(axes, place, strict=True))
        rates[place] = known[min(known, key=lambda cell: math.dist(cell, point))]
    return (*axes, rates)
