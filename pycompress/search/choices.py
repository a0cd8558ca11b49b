"""What each layer of a model could become: every candidate's compressed layers, made once, on a copy of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from pycompress.calibration import Calibration, calibrate
from pycompress.calls import Inputs, uncompiled
from pycompress.copying import copied
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.low_rank import BREAK_EVEN
from pycompress.methods.method import Method, is_method, needs_of
from pycompress.model import layers_of, planned
from pycompress.nn import CompressedLayer
from pycompress.passes import whole
from pycompress.plan import Target, targets_of
from pycompress.race import makes, replacements
from pycompress.search.cache import Cache, digest
from pycompress.search.quality import checked
from pycompress.search.score import output_error
from pycompress.surgery import Swap, switch_off_fast_paths

Candidates = Sequence[Method] | Mapping[str, Method]


def named(candidates: Candidates | Method, caller: str) -> dict[str, Method]:
    """The candidates by name; those of a sequence by their ``repr``.

    Raises:
        TypeError: one that is no method. ValueError: none, two of one name, or one whose size depends on other
        layers or on a measurement.
    """
    if is_method(candidates):
        candidates = [candidates]
    if not isinstance(candidates, Sequence | Mapping):
        raise TypeError(f"{caller}: candidates is {type(candidates).__name__}, expected several methods such as Int8()")
    pairs = [*candidates.items()] if isinstance(candidates, Mapping) else [(repr(one), one) for one in candidates]
    if not pairs:
        raise ValueError(f"{caller}: candidates is empty, expected methods such as Int8()")
    found: dict[str, Method] = {}
    for name, method in pairs:
        if not is_method(method):
            raise TypeError(f"{caller}: candidate {name} is {method!r}, expected a method such as Int8()")
        if getattr(method, "scope", "") == "model":
            raise ValueError(f"{caller}: candidate {name} looks at all its layers together, expected scope='layer'")
        if getattr(method, "rank", None) == BREAK_EVEN:
            raise ValueError(f"{caller}: candidate {name} has a rank that is measured, expected numbers")
        if name in found:
            raise ValueError(f"{caller}: two candidates are called {name}, expected different ones")
        found[name] = method
    return found


@dataclass
class Fact:
    """What is known of a layer and a candidate without a run of the model.

    Attributes:
        reason: why the candidate does not take the layer; '' where it does.
        bytes: of weight and bias, of the first of the layers that share a weight.
        error: the share of the squares of its outputs that is error (:func:`pycompress.search.score.output_error`).
        makes: what else the time of the compressed layer may depend on than the shape of its input.
    """

    reason: str = ""
    bytes: int = 0
    error: float = 0.0
    makes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Layer:
    """A layer that some candidate takes.

    Attributes:
        names: all that the model has for it.
        kind, shape: as a summary has them.
        bytes: of the dense layer; 0 where another that shares its weight counts it.
        tie: the first name of the first of the layers that share its weight, or its own: these have one candidate together.
        facts: by the name of the candidate.
    """

    names: list[str]
    kind: str
    shape: tuple[int, ...]
    bytes: int
    tie: str
    facts: dict[str, Fact] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.names[0]


class Choices:
    """All candidates for all layers of a model.

    Args:
        calibration: what was gathered of the layers' inputs; None where no batches are there to gather it from.
        inputs: an example, for passes that try what they do.
        cache: what is known already. A candidate is compressed when its layers are asked for, not before.
        caller: begins the messages.
    Raises:
        ValueError: no candidate takes any layer.
    Attributes:
        model: a copy of the dense model, into which layers are put and out of which they are taken again.
        layers: by first name, those that any candidate takes.
        owners: of the same names, what each layer is, before anything is made of it.
        refused: {(layer, candidate): reason} of all others that were asked.
        key: alike for a model, calibration and inputs of the same content.
    """

    def __init__(
        self, model: nn.Module, candidates: Mapping[str, Method], calibration: Mapping[str, InputStatistics] | None,
        inputs: Inputs | None, cache: Cache, caller: str,
    ) -> None:  # fmt: skip
        model = uncompiled(model)
        with whole.without(model):
            self.model = copied(model, ())
        whole.remove(self.model)
        self.candidates, self.calibration, self.inputs = dict(candidates), calibration, inputs
        self.key = digest(model, calibration, inputs)
        self._made: dict[str, dict[str, tuple[Target, CompressedLayer]]] = {}
        self._reasons: dict[str, dict[str, str]] = {}
        self._cache = cache
        self.owners: dict[str, Target] = {}
        self.layers = {layer.name: layer for layer in self._layers()}
        if not self.layers:
            raise ValueError(
                f"{caller}: no candidate takes a layer inside of the model, expected one such as nn.Linear"
            )
        self.refused: dict[tuple[str, str], str] = {}

    def _layers(self) -> list[Layer]:
        found: dict[str, Layer] = {}
        ties: dict[int, str] = {}
        for method in self.candidates.values():
            for target in targets_of(self.model, method):
                if target.method is not None and target.names[0] not in found and target.module is not self.model:
                    self.owners[target.names[0]] = target
                    tie = ties.setdefault(id(target.kind.stored(target.module)), target.names[0])
                    record, bias = target.record, target.kind.bias(target.module)
                    own = 0 if bias is None else bias.numel() * bias.element_size()
                    size = record.dense_bytes if tie == target.names[0] else own
                    found[target.names[0]] = Layer(target.names, record.kind, record.shape, size, tie)
        order = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        return sorted(found.values(), key=lambda layer: order[layer.name])

    def learn(self, candidate: str) -> None:
        """Fills in the facts of a candidate: from the cache, else by compressing all layers with it."""
        key = digest("facts", self.key, self.candidates[candidate])
        known = self._cache.get(key)
        if known is None:
            known = self._cache.put(key, {name: asdict(fact) for name, fact in self._facts(candidate).items()})
        for name, layer in self.layers.items():
            fact = Fact(**known[name])
            if fact.reason:
                self.refused[name, candidate] = fact.reason
            else:
                layer.facts[candidate] = fact

    def _facts(self, candidate: str) -> dict[str, Fact]:
        made = self.made(candidate)
        reasons = self._reasons[candidate]
        facts = {}
        for name in self.layers:
            if name not in made:
                facts[name] = Fact(reasons.get(name, "the candidate takes no such layer"))
                continue
            target, layer = made[name]
            shares = self.layers[name].tie != name
            size = (0 if shares else layer.canonical_bytes()) + (0 if layer.bias32 is None else layer.bias32.nbytes)
            error = output_error(target.dense, layer.canonical().decompress(), self._seen(target, layer.k))
            facts[name] = Fact("", size, error, makes(target, layer))
        return facts

    def _seen(self, target: Target, k: int) -> InputStatistics | None:
        """What is known of the rows that a layer's matrix [n, k] meets."""
        found = next((self.calibration[name] for name in target.names if name in (self.calibration or {})), None)  # type: ignore[index]
        if found is None or (found.counts is None and found.features != k):
            return None
        if found.counts is not None and len(found.counts) != target.dense.shape[0]:
            return None
        return found

    def made(self, candidate: str) -> Mapping[str, tuple[Target, CompressedLayer]]:
        """The compressed layer of each layer that a candidate takes, by first name; what is replaced by it."""
        if candidate not in self._made:
            self._made[candidate], self._reasons[candidate] = self._make(candidate)
        return self._made[candidate]

    def _make(self, candidate: str) -> tuple[dict[str, tuple[Target, CompressedLayer]], dict[str, str]]:
        method = self.candidates[candidate]
        names = [t.names[0] for t in targets_of(self.model, method) if t.names[0] in self.layers]
        try:
            return self._planned(method, names)
        except ValueError:  # one layer stops all of them: which one, and why?
            made: dict[str, tuple[Target, CompressedLayer]] = {}
            reasons: dict[str, str] = {}
            for name in names:
                try:
                    own, why = self._planned(method, [name])
                except ValueError as error:
                    own, why = {}, {name: str(error).removeprefix("compress: ")}
                made |= own
                reasons |= why
            return made, reasons

    def _planned(
        self, method: Method, names: list[str]
    ) -> tuple[dict[str, tuple[Target, CompressedLayer]], dict[str, str]]:  # fmt: skip
        targets, _ = planned(self.model, dict.fromkeys(names, method), self.calibration, self.inputs)
        layers = layers_of(targets, self.calibration or {})
        own = {target.names[0]: target for target in targets if target.names[0] in names}
        made = {name: (t, layers[t.module]) for name, t in own.items() if t.method is not None}
        return made, {name: target.record.reason for name, target in own.items() if name not in made}

    @contextmanager
    def applied(self, plan: Mapping[str, str | None], *, blocks: bool) -> Iterator[nn.Module]:
        """In the block, the copy of the model has these layers, {name: candidate, or None for dense}.

        Args:
            blocks: have known blocks run as one op each, as ``compress`` does it.
        """
        places: dict[nn.Module, nn.Module] = {}
        for name, candidate in plan.items():
            if candidate is not None:
                target, layer = self.made(candidate)[name]
                places |= replacements([target], {target.module: layer})
        change = Swap(self.model, places)
        change.do()
        try:
            switch_off_fast_paths(self.model)
            if blocks:
                whole.install(self.model)
            yield self.model
        finally:
            whole.remove(self.model)
            change.undo()


def calibrated(
    model: nn.Module, candidates: Mapping[str, Method], batches: Sequence[Inputs], given: Any, caller: str
) -> Mapping[str, InputStatistics]:  # fmt: skip
    """The calibration that was given, or one by the batches that were, or by these, of all that the candidates make use of."""
    if given is None or not isinstance(given, Mapping):
        needs = frozenset[str]().union(*(needs_of(method) for method in candidates.values())) | {"moments"}
        data = batches if given is None else checked(given, caller, "calibration")
        return calibrate(model, data, gather=sorted(needs - {"diagonals"}))
    if isinstance(given, Calibration) and given.running:
        raise ValueError(f"{caller}: the calibration is still running, expected its `with` block to have ended")
    return given
