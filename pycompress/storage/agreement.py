"""What a file and a model have to have in common: all that either of them says, before anything is changed."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycompress.kinds import Geometry, alteration, has_foreign_hooks, kind_of, replaced_code, zeros_around
from pycompress.kinds.folded import LAYERS, NORMS, emptied
from pycompress.nn import CompressedLayer
from pycompress.passes.activations import activation_name
from pycompress.references import References
from pycompress.storage.plan import Entry, Plan, activations_of, dense_layers_of, fail
from pycompress.storage.reading import File, same_bits
from pycompress.surgery import names_of, split
from pycompress.weights import Expected


@dataclass(frozen=True)
class Change:
    """What loading does to a model.

    Attributes:
        layers: {module: the compressed layer that takes its place}.
        emptied: the activations and norms that layers apply now, and what stands in their places.
        folded: the layers into which norms are folded, with the names of these.
        biases: [(dense layer, the bias that it gets for one)]; its values are in ``state``.
        state: {name: (tensor of the model, its values)}: the rest of the state dict.
        buffers: [(tensor of the model, its values)]: what is on the meta device and not in the state dict.
    """

    layers: dict[nn.Module, CompressedLayer]
    emptied: dict[nn.Module, nn.Identity]
    folded: dict[nn.Module, str]
    biases: list[tuple[nn.Module, nn.Parameter]]
    state: dict[str, tuple[Tensor, Tensor]]
    buffers: list[tuple[Tensor, Tensor]]


def read(model: nn.Module, file: File, plan: Plan) -> Change:
    """All of a file that goes into a model, which is only looked at. Raises ValueError where they do not agree."""
    return _Agreement(model, file, plan).change()


class _Agreement:
    def __init__(self, model: nn.Module, file: File, plan: Plan) -> None:
        self.model, self.file, self.plan = model, file, plan
        self.names = names_of(model)
        self.modules = {name: module for module, names in self.names.items() for name in names}
        self.leaving = {*plan.layers, *plan.identities}

    def fail(self, message: str) -> ValueError:
        return fail(self.file.path, message)

    def change(self) -> Change:
        """Everything is checked first, then read."""
        geometries = {name: self._geometry(name, entry) for name, entry in self.plan.layers.items()}
        self._check_norms()
        self._check_identities()
        self._check_activations()
        self._check_dense_layers()
        self._check_names()
        biases = self._biases()
        state = self._state(biases)
        buffers = self._others_on_meta(state)
        layers: dict[nn.Module, CompressedLayer] = {}
        earlier: dict[str, list[CompressedLayer]] = {}
        for name, geometry in geometries.items():
            if self.modules[name] not in layers:
                layers[self.modules[name]] = self._layer(name, geometry, earlier)
        return Change(
            layers,
            {
                module: emptied(self.plan.norms[name]) if name in self.plan.norms else nn.Identity()
                for name in self.plan.identities
                if type(module := self.modules[name]) is not nn.Identity
            },
            {layers.get(module := self.modules[name], module): norms for name, norms in self.plan.folded.items()},
            [(self.modules[name], bias) for name, bias in biases.items()],
            {name: (tensor, self.file.read(name)) for name, tensor in state.items()},
            [(tensor, self.file.read(name)) for name, tensor in buffers.items()],
        )

    # --- layers -----------------------------------------------------------------------------------------------------

    def _geometry(self, name: str, entry: Entry) -> Any:
        """The model has a layer of the right kind, shape and geometry at this name, and the file its tensors."""
        if name not in self.modules:
            raise self.fail(f"the model has no layer {name!r}")
        module = self.modules[name]
        kind = module.kind if isinstance(module, CompressedLayer) else kind_of(module)
        if kind is None or kind.name != entry.layer.kind.name:
            raise self.fail(f"{name} is a {type(module).__name__} in the model, expected {entry.layer.kind.phrase}")
        if isinstance(module, CompressedLayer):
            shape, bias, geometry = (module.n, module.k), module.bias32 is not None, module.geometry
        else:
            try:
                shape, bias, geometry = kind.shape(module), kind.bias(module) is not None, kind.geometry(module)
            except ValueError as error:
                raise self.fail(f"{name} is a {type(module).__name__} in the model: {error}") from None
        stored = geometry if entry.geometry is None else entry.geometry
        if kind.pads and not isinstance(module, CompressedLayer):  # of a padding module (:meth:`_check_identities`)
            geometry = replace(geometry, around=stored.around)  # type: ignore[union-attr]
        bias = bias or name in self.plan.folded
        if (shape, bias, geometry) != (entry.shape, entry.bias, stored):
            here, there = _outline(shape, bias, geometry), _outline(entry.shape, entry.bias, stored)
            raise self.fail(f"{name} is {here} in the model, {there} in the file")
        if reason := alteration(module) or ("" if isinstance(module, CompressedLayer) else kind.misfit(module)):
            raise self.fail(f"{name} cannot be replaced in the model: {reason}")
        for kind_of_tensor, (size, dtype) in _tensors(entry).items():
            self.file.expect(_joined(name, kind_of_tensor), size, dtype)
        return geometry

    def _layer(self, name: str, geometry: Any, earlier: dict[str, list[CompressedLayer]]) -> CompressedLayer:
        """With the geometry of its place; ``earlier``: those before it, by where the file keeps their weight."""
        entry = self.plan.layers[name]
        tensors = {kind: self.file.read(_joined(name, kind)) for kind in entry.expected}
        try:
            layer = entry.build(geometry, tensors, self.file.read(_joined(name, "bias")) if entry.bias else None)
        except ValueError as error:
            raise self.fail(f"layer {name}: {error}") from None
        layer.stand_for(self.modules[name])
        layer.tie(earlier.setdefault(self.file.stored(_joined(name, next(iter(entry.expected)))), []))
        return layer

    def _check_names(self) -> None:
        """A module that has several names in the model is one in the file, too."""
        for module, names in self.names.items():
            found = {self._what_is(name) for name in names}
            if len(found) > 1:
                raise self.fail(f"{' and '.join(names)} are one module in the model, in the file they are several")
            if isinstance(module, CompressedLayer) and names[0] not in self.plan.layers:
                raise self.fail(f"the model's layer {names[0]} is compressed, in the file it is dense")

    def _what_is(self, name: str) -> Any:
        """Alike for names that stand for one and the same in the file."""
        if name in self.plan.layers:
            entry = self.plan.layers[name]
            return *(self.file.stored(_joined(name, kind)) for kind in _tensors(entry)), entry.activation
        return name in self.plan.identities

    # --- norms, activations, and layers that stay dense -------------------------------------------------------------

    def _check_norms(self) -> None:
        """Those that are folded there stand in the model, or are folded here, too."""
        if unknown := {*self.plan.norms, *self.plan.folded} - self.modules.keys():
            raise self.fail(f"the model has no module {min(unknown)!r}")
        if other := self.plan.norms.keys() - set(self.plan.identities):
            raise self.fail(f"{min(other)} is a norm that is folded in the file, expected an identity")
        for name, channels in self.plan.norms.items():
            module = self.modules[name]
            here = f"{name} is a {type(module).__name__} in the model"
            if type(module) is nn.Identity:
                continue
            if type(module) not in NORMS or module.num_features != channels:
                raise self.fail(f"{here}, in the file a norm of {channels} channels that is folded into a layer")
            if has_foreign_hooks(module) or replaced_code(module):
                raise self.fail(f"{here} with hooks or a forward of its own, which would be lost")

    def _biases(self) -> dict[str, nn.Parameter]:
        """Those that dense layers get with their norms: of the model none has one, and the file does."""
        found = {}
        for name in self.plan.folded:
            module: Any = self.modules[name]
            if name in self.plan.layers or isinstance(module, CompressedLayer):
                continue
            if type(module) not in LAYERS:
                raise self.fail(
                    f"{name} is a {type(module).__name__} in the model, in the file a layer that a norm is folded into"
                )
            if module.bias is None:
                transposed = getattr(module, "transposed", False)
                size = module.weight.shape[1] * module.groups if transposed else len(module.weight)
                weight = module.weight
                found[name] = nn.Parameter(weight.new_empty(size), weight.requires_grad)
        return found

    def _check_identities(self) -> None:
        """What is an Identity in either is one in the other, too, or an activation, or padding, that a layer beside it does."""
        if unknown := set(self.plan.identities) - self.modules.keys():
            raise self.fail(f"the model has no module {min(unknown)!r}")
        for name, module in self.modules.items():
            if type(module) is nn.Identity and name not in self.leaving:
                raise self.fail(f"{name} is an Identity in the model, in the file it is none")
        applied, taken = self._applied()
        for name in self.plan.identities:
            module, parent = self.modules[name], split(name)[0]
            if type(module) is nn.Identity or name in self.plan.norms:
                continue
            nothing = (sides := zeros_around(module)) is not None and not any(sides)
            here, one = f"{name} is a {type(module).__name__} in the model", _beside(module)
            if not nothing and (one is None or one not in applied[parent]):
                what = _ACTIVATION if one is None else one[0]
                raise self.fail(f"{here}, in the file {what} that a layer applies itself")
            if has_foreign_hooks(module) or replaced_code(module):
                raise self.fail(f"{here} with hooks or a forward of its own, which would be lost")
            if one is not None and not nothing:
                taken[parent][one] += 1
        for parent, what in itertools.product({**applied, **taken}, (_ACTIVATION, _PADDING)):
            here, there = (
                ", ".join(sorted(text for kind, text in found[parent].elements() if kind == what)) or "none"
                for found in (taken, applied)
            )
            if here != there:
                raise self.fail(
                    f"the layers of {parent or 'the model'} apply {_PLURAL[what]} {there} in the file, of which the "
                    f"model has {here}; expected it as it was before it was compressed, or as it was saved"
                )

    def _applied(self) -> tuple[Applied, Applied]:
        """What layers apply themselves, by the modules that hold them: in the file, and those that are compressed in the model."""
        applied, taken = Applied(Counter), Applied(Counter)
        for name, entry in self.plan.layers.items():
            module, parent = self.modules[name], split(name)[0]
            if name:
                applied[parent].update(_done(entry.activation, entry.geometry))
            if isinstance(module, CompressedLayer) and name:
                taken[parent].update(_done(module.activation, module.geometry))
        return applied, taken

    def _check_activations(self) -> None:
        """Those that stay."""
        if self.plan.activations is None:
            return
        here = activations_of({name: module for name, module in self.modules.items() if name not in self.leaving})
        for name in sorted(here.keys() | self.plan.activations.keys()):
            in_model, in_file = here.get(name, "no such activation"), self.plan.activations.get(name, "none")
            if in_model != in_file:
                module = type(self.modules.get(name)).__name__
                raise self.fail(f"{name} is a {module} in the model, in the file its activation is {in_file}")

    def _check_dense_layers(self) -> None:
        """As far as both know what they are: a class of somebody else may stand for one."""
        here = dense_layers_of(self.modules)
        for name, there in (self.plan.dense or {}).items():
            if here.get(name, there) != there:
                raise self.fail(f"{name} is {here[name]} in the model, {there} in the file")

    # --- tensors ----------------------------------------------------------------------------------------------------

    def _state(self, biases: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """The model's tensors in its state dict that are no compressed layer's."""
        gone = {*self.plan.layers, *self.plan.norms}
        known = {_joined(name, kind) for name, entry in self.plan.layers.items() for kind in _tensors(entry)}
        state = {
            name: tensor
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if name not in known and name.rpartition(".")[0] not in gone
        }
        state |= {_joined(name, "bias"): bias for name, bias in biases.items()}
        if unknown := self.file.names - known - state.keys() - set(self.plan.buffers):
            raise self.fail(f"the model has no tensor {min(unknown)!r}")
        first: dict[int, str] = {}
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise self.fail(
                    f"the model's state dict holds {name} of type {type(tensor).__name__}, expected a tensor"
                )
            if is_lazy(tensor):
                raise self.fail(f"{name} is not initialized in the model yet")
            self.file.expect(name, tuple(tensor.shape), tensor.dtype, exact=False)
            other = first.setdefault(id(tensor), name)
            if self.file.stored(name) != self.file.stored(other) and not same_bits(
                *(self.file.read(one).to(tensor.dtype) for one in (name, other))
            ):
                raise self.fail(f"{other} and {name} are one tensor in the model, in the file they are two")
        return state

    def _others_on_meta(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The buffers on the meta device that are not in the state dict, by the names that the file has for them."""
        filled = {id(tensor) for tensor in state.values()}
        found, names = dict[str, Tensor](), dict[int, str]()
        for owner, module in self.modules.items():
            if owner in self.leaving:
                continue
            for kind, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is None or not tensor.is_meta:
                    continue
                name = _joined(owner, kind)
                names.setdefault(id(tensor), name)
                if name in self.plan.buffers and id(tensor) not in filled:
                    self.file.expect(name, tuple(tensor.shape), tensor.dtype, exact=False)
                    found[name] = tensor
                    filled.add(id(tensor))
        if not names:
            return {}
        references = References(self.model, shut=[self.modules[name] for name in self.leaving])
        missing = {
            names.get(id(tensor), reference.text(references.path(reference.owner), reference.key))
            for reference in references
            if isinstance(tensor := reference.value, Tensor) and tensor.is_meta and id(tensor) not in filled
        }
        if missing:
            listed = ", ".join(sorted(missing))
            raise self.fail(f"the file has no values for what the model has on the meta device: {listed}")
        return found


Applied = defaultdict[str, Counter[tuple[str, str]]]
_ACTIVATION, _PADDING = "an activation", "padding"
_PLURAL = {_ACTIVATION: "the activations", _PADDING: "the padding"}


def _done(activation: str, geometry: Any) -> list[tuple[str, str]]:
    """What a layer applies itself that a module beside it did."""
    around = getattr(geometry, "around", ())
    own = {_ACTIVATION: "" if activation == "none" else activation, _PADDING: _written(around) if any(around) else ""}
    return [(what, text) for what, text in own.items() if text]


def _beside(module: nn.Module) -> tuple[str, str] | None:
    """What a layer beside a module can apply in its place; None where that is nothing."""
    if sides := zeros_around(module):
        return _PADDING, _written(sides)
    activation = activation_name(module)
    return (_ACTIVATION, activation) if activation else None


def _written(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))


def _joined(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _tensors(entry: Entry) -> Expected:
    """Of the layer that the file holds, by their names in it."""
    bias: Expected = {"bias": (entry.shape[:1], torch.float32)} if entry.bias else {}
    return {**entry.expected, **bias}


def _outline(shape: tuple[int, int], bias: bool, geometry: Geometry | None) -> str:
    return f"{list(shape)} with bias={bias}" + (f", {geometry}" if geometry is not None and geometry.settings() else "")
