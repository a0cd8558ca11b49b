"""``Target``: a place to deploy to, and what it makes of a compressed layer."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from pycompress.nn import CompressedLayer
from pycompress.targets.source import Source

Fate = Literal["kept", "widened", "refused"]
Run = Callable[[Mapping[str, Tensor]], list[Tensor]]  # a written model, called as :meth:`Target.run` is


@dataclass(frozen=True)
class Carried:
    """How a target carries the weight of one layer.

    Attributes:
        fate: ``kept``: the numbers of our weight, in no more bits. ``widened``: the same numbers in a wider encoding, such
            as float32 with the zeros of a sparse weight in them. ``refused``: not at all.
        encoding: what the target stores, in its own words, e.g. ``int8 per channel, rows quantized dynamically``; '' where refused.
        reason: what is not as in our kernels (the weight's encoding, or how the input is rounded), or why it is refused.
    """

    fate: Fate
    encoding: str
    reason: str = ""


class Target(ABC):
    """A place to deploy to. One file of the room each, one object in the table.

    Attributes:
        name: in ``deploy(target=...)`` and on the command line.
        title: how its makers write it.
        suffix: of the file, or folder, that is written.
        extra: of pycompress, which installs what it needs.
        packages: what has to be importable for that.
        open_sizes: whether dimensions of inputs may stay open; else a file runs at the sizes of the example inputs only.
        absent: why no file can be run here; '' where it can.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffix: ClassVar[str]
    extra: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    open_sizes: ClassVar[bool] = True

    @property
    def absent(self) -> str:
        """(a property, so that a target can look at the machine)"""
        return ""

    @abstractmethod
    def carried(self, layer: CompressedLayer) -> Carried:
        """What would become of a layer. Needs none of the target's packages."""

    @abstractmethod
    def write(self, source: Source, path: str) -> None:
        """Writes a model, none of whose layers is refused, to a path where nothing is yet."""

    @abstractmethod
    def run(self, path: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """What the written model gives for inputs by name, in the order of :attr:`Source.outputs`, on this machine."""

    def open(self, path: str) -> Run:
        """The same to be called many times, where a target can keep the file loaded."""
        return partial(self.run, path)

    def check_installed(self) -> None:
        """Raises ImportError, which names the extra, where a package is missing."""
        for package in self.packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ImportError(
                    f'deploy: {self.title} needs {package} ({error}): pip install "pycompress[{self.extra}]"'
                ) from error
