"""``deploy``: a compressed model as a target's file, and what became of each layer."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycompress.calls import Inputs, uncompiled
from pycompress.copying import copied
from pycompress.flat_call import Dynamic
from pycompress.nn import CompressedLayer
from pycompress.nn.trained import is_trained
from pycompress.passes import whole
from pycompress.replacing import FilePath, replacing
from pycompress.targets.adjust import Adjustment, adjustments, given
from pycompress.targets.source import Source
from pycompress.targets.target import Carried, Target

SMALLEST_COSINE = (
    0.995  # dynamic int8 rounds a value the other way now and then, and after some layers outputs differ by percents
)


@dataclass(frozen=True)
class Checked:
    """The file, run here, beside the model.

    Attributes:
        cosine: the smallest of an output's.
        error: the largest ||y - model's|| / ||model's|| of an output.
        reason: why it does not count as the same model, or ''.
    """

    cosine: float
    error: float
    reason: str = ""


@dataclass(frozen=True)
class Adjusted:
    """What was changed in the model before it went to the target.

    Attributes:
        name, what: of the adjustment.
        places: how many there were; 0: nothing to change.
        cosine, error: of the model with this adjustment and those before it to the model as it was given, as in :class:`Checked`.
    """

    name: str
    what: str
    places: int
    cosine: float
    error: float

    def __str__(self) -> str:
        if not self.places:
            return f"adjusted: {self.name}: nothing to change"
        return (
            f"adjusted: {self.name} ({self.what}), {self.places} place{'s' if self.places > 1 else ''}: cosine "
            f"{self.cosine:.6f}, relative error {self.error:.2g} to the model as it was"
        )


@dataclass(frozen=True)
class Deployment:
    """What was written.

    Attributes:
        target, path: its name, and the file or folder.
        layers: by name: our method as a table calls it, and how it is carried.
        bytes: on disk.
        ours: bytes of the model's parameters and buffers as we save them.
        checked: the file beside the adjusted model; None where the target does not run here; ``absent`` says why.
        adjusted: what was asked to be changed before, one by one.
    """

    target: str
    path: str
    layers: dict[str, tuple[str, Carried]]
    bytes: int
    ours: int
    checked: Checked | None
    absent: str = ""
    adjusted: tuple[Adjusted, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the file was run here and gave what the model gives."""
        return self.checked is not None and not self.checked.reason

    @property
    def verdict(self) -> str:
        """One line."""
        if self.checked is None:
            return f"written, not run: {self.absent}"
        if self.checked.reason:
            return f"NOT the same model: {self.checked.reason}"
        model = "the adjusted model" if any(one.places for one in self.adjusted) else "the model"
        return f"OK: cosine {self.checked.cosine:.6f}, relative error {self.checked.error:.2g} to {model}"

    def __str__(self) -> str:
        rows = table(self.layers)
        size = f"{self.path}: {self.bytes / 1e6:.2f} MB, {self.ours / 1e6:.2f} MB as we save it"
        return "\n".join([*rows, *map(str, self.adjusted), size, self.verdict])


def deploy(
    model: nn.Module,
    target: str,
    path: FilePath,
    example_inputs: Inputs,
    dynamic: Dynamic | None = None,
    *,
    widen: bool = False,
    adjust: str | Adjustment | Iterable[str | Adjustment] = (),
) -> Deployment:
    """Writes a compressed model for a target, with its weights in encodings of that target, and holds the result against the model.

    Args:
        model: has at least one compressed layer. It is left as it was.
        target: one of :data:`pycompress.targets.TARGETS`.
        path: of the file, or folder, which takes the place of an older one whole or not at all.
        example_inputs, dynamic: as for :func:`pycompress.export`; dimensions are those of the adjusted inputs. A target whose
            files know no open sizes takes no ``dynamic``.
        widen: whether layers whose encoding the target lacks may be stored in a wider one. Without it they are an error.
        adjust: what may be changed first, in a copy, because the platform lacks it: names from
            :data:`pycompress.targets.ADJUSTMENTS`, or such adjustments themselves, one behind the other. Nothing else is changed.
    Returns:
        What became of each layer, what each adjustment cost, the sizes, and how far the file is from the (adjusted) model.
    Raises:
        ValueError: the target or an adjustment is not known; dimensions that the target cannot leave open; the model has no
            compressed layer, or is prepared; a layer that the target refuses, or would widen: each is named with the reason, and
            nothing is written.
        TypeError: inputs, or adjustments, of another type; a model that is to be adjusted and cannot be copied.
        RuntimeError: torch or the target could not convert the model.
        ImportError: the target's extra is not installed. OSError: the file could not be written.
    """
    from pycompress.targets import TARGETS

    if target not in TARGETS:
        raise ValueError(f"deploy: target is {target!r}, expected one of {', '.join(TARGETS)}")
    place = TARGETS[target]
    if dynamic is not None and not place.open_sizes:
        raise ValueError(
            f"deploy: dynamic is {dynamic!r}, but a file of {place.title} runs at the sizes of its example inputs only, expected "
            "None, and one file for each size"
        )
    model = uncompiled(model)
    if twin := next((name for name, module in model.named_modules() if is_trained(module)), None):
        raise ValueError(f"deploy: {twin or 'the model'} is prepared, expected compress(model) first")
    asked = adjustments(adjust)
    source = Source.of(model, example_inputs, dynamic)
    adjusted: list[Adjusted] = []
    if asked:
        source, adjusted = _adjusted(source, asked, dynamic)
    layers = {name: (layer.label, place.carried(layer)) for name, layer in source.layers.items()}
    bad = {
        name: found for name, found in layers.items() if found[1].fate in ("refused", *(() if widen else ("widened",)))
    }
    if bad:
        remedy = (
            "a plan that the target carries"
            if widen
            else "a plan that the target carries, or widen=True for what is widened"
        )
        raise ValueError(
            "\n".join([f"deploy: {place.title} cannot carry these layers, expected {remedy}:", *table(bad)])
        )
    place.check_installed()
    with _replacing(place, path) as temporary:
        place.write(source, temporary)
        absent = place.absent
        checked = None if absent else compared(source.outputs, place.run(temporary, source.call.tensors))
    return Deployment(
        place.name, os.fspath(path), layers, size_of(path), _saved_bytes(model), checked, absent, tuple(adjusted)
    )


def _adjusted(source: Source, asked: Sequence[Adjustment], dynamic: Dynamic | None) -> tuple[Source, list[Adjusted]]:
    """A copy of the model with what was asked for, and what each step cost."""
    model, inputs, expected = copied(source.model, ()), source.inputs, source.outputs
    whole.remove(model)  # ops of several layers compute what these were
    if isinstance(model, CompressedLayer):  # what a target puts in its place would be without its hooks
        model = nn.Sequential(model)
    now, steps = source, list[Adjusted]()
    for one in asked:
        places = one.apply(model, inputs)
        cosine, error = (steps[-1].cosine, steps[-1].error) if steps else (1.0, 0.0)
        if places:
            inputs = given(inputs, one)
            now, expected = Source.of(model, inputs, dynamic), [one.taken(y) for y in expected]
            found = compared(expected, now.outputs)
            cosine, error = found.cosine, found.error
        steps.append(Adjusted(one.name, one.what, places, cosine, error))
    return now, steps


def compared(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Checked:
    """Holds what a file gave against what the model gave."""
    if len(expected) != len(found):
        return Checked(0.0, float("inf"), f"it gave {len(found)} outputs, expected {len(expected)}")
    cosine, error = 1.0, 0.0
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.shape != b.shape:
            return Checked(0.0, float("inf"), f"output {number} is {[*b.shape]}, expected {[*a.shape]}")
        if not a.is_floating_point():
            if not torch.equal(a, b.to(a.dtype)):
                return Checked(0.0, float("inf"), f"output {number}, of whole numbers, differs")
            continue
        a, b = a.flatten(), b.to(torch.float64).flatten()  # noqa: PLW2901
        if not torch.equal(a.isfinite(), b.isfinite()):
            return Checked(0.0, float("inf"), f"output {number} is not finite in the same places")
        a, b = a[a.isfinite()], b[b.isfinite()]  # noqa: PLW2901
        norms = float(a.norm()), float(b.norm())
        if torch.equal(a, b):
            continue
        cosine = min(cosine, float(a @ b) / (norms[0] * norms[1]) if all(norms) else 0.0)
        error = max(error, float((a - b).norm()) / norms[0] if norms[0] else float("inf"))
    reason = "" if cosine >= SMALLEST_COSINE else f"cosine {cosine:.6f}, expected at least {SMALLEST_COSINE}"
    return Checked(cosine, error, reason)


def table(layers: dict[str, tuple[str, Carried]]) -> list[str]:
    """A line for each layer."""
    rows = [(name, label, one.fate, one.encoding, one.reason) for name, (label, one) in layers.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]


def size_of(path: FilePath) -> int:
    """Bytes of a file, or of the files in a folder."""
    if os.path.isdir(path):
        return sum(os.path.getsize(os.path.join(folder, file)) for folder, _, files in os.walk(path) for file in files)
    return os.path.getsize(path)


def _saved_bytes(model: nn.Module) -> int:
    seen = {tensor.untyped_storage().data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


@contextmanager
def _replacing(place: Target, path: FilePath) -> Iterator[str]:
    """Gives a path at which nothing is; what the block leaves there, a file or a folder, takes the place of ``path``."""
    real = os.path.realpath(path)
    with tempfile.TemporaryDirectory(
        prefix=".pycompress-", dir=os.path.dirname(real), ignore_cleanup_errors=True
    ) as folder:
        fresh = os.path.join(folder, f"model{place.suffix}")
        yield fresh
        if not os.path.isdir(fresh):
            with replacing(path) as temporary:
                os.replace(fresh, temporary)
            return
        if os.path.lexists(real):
            if not os.path.isdir(real):
                raise NotADirectoryError(f"deploy: {os.fspath(path)} is a file, expected a folder or nothing")
            os.rename(real, os.path.join(folder, "old"))
        try:
            os.rename(fresh, real)
        except OSError:
            if os.path.isdir(os.path.join(folder, "old")):
                os.rename(os.path.join(folder, "old"), real)
            raise
        shutil.rmtree(os.path.join(folder, "old"), ignore_errors=True)
