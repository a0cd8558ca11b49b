"""The plan: what a file says of a model besides its tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycompress import ops
from pycompress.kinds import Geometry, Kind, channels_emptied, folded_into, kind_of
from pycompress.nn import LAYERS, CompressedLayer
from pycompress.nn.layers import weights_of
from pycompress.passes.activations import activation_name
from pycompress.replacing import FilePath
from pycompress.weights import Expected

# 1 had no kinds, and the settings of a weight among its entry's; 2 said nothing of activations and layers that stay, of buffers
# that are not in the state dict, and of an embedding's padding_idx; 3 knew no norms that are folded into layers.
VERSION = 4
KEY = "pycompress"  # in the metadata of the file


def fail(path: FilePath, message: str) -> ValueError:
    """The error that refuses a file."""
    return ValueError(f"load: {path}: {message}")


# --- of a model ---------------------------------------------------------------------------------------------------------


def describe(model: nn.Module, aliases: dict[str, str], buffers: list[str]) -> str:
    """The plan of a model, whose tensors are stored under their names or ``aliases``; ``buffers``: those not in its state dict."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return json.dumps({
        "version": VERSION,
        "aliases": aliases,
        "buffers": buffers,
        "identities": [name for name, module in modules.items() if type(module) is nn.Identity],
        "norms": {name: channels for name, module in modules.items() if (channels := channels_emptied(module)) is not None},
        "folded": {name: norms for name, module in modules.items() if (norms := folded_into(module))},
        "activations": activations_of(modules),
        "dense": dense_layers_of(modules),
        "layers": {name: entry_of(module) for name, module in modules.items() if isinstance(module, CompressedLayer)},
    })  # fmt: skip


def activations_of(modules: dict[str, nn.Module]) -> dict[str, str]:
    """The modules that are an activation which a layer could apply itself."""
    found = ((name, activation_name(module)) for name, module in modules.items())
    return {name: activation for name, activation in found if activation}


def dense_layers_of(modules: dict[str, nn.Module]) -> dict[str, Any]:
    """What else than tensors makes a dense layer: tensors of one shape can mean another matrix, or be used otherwise."""
    found = {}
    for name, module in modules.items():
        kind = kind_of(module)
        if kind and not any(is_lazy(p) for p in module._parameters.values() if p is not None):
            found[name] = {"kind": type(kind).__name__, **_geometry_of(kind, module)}
    return found


def _geometry_of(kind: Kind, module: nn.Module) -> dict[str, Any]:
    try:
        geometry = kind.geometry(module)
    except ValueError:  # one that none of ours has
        return {"geometry": None}
    return {} if geometry is None else {"geometry": geometry.settings()}


def entry_of(layer: CompressedLayer) -> dict[str, Any]:
    """What a file says of a compressed layer besides its tensors."""
    geometry = {} if layer.geometry is None else {"geometry": layer.geometry.settings()}
    return {
        "kind": layer.kind.name,
        **geometry,
        "weight": layer.weight_type.name,
        "version": layer.weight_type.version,
        "settings": layer.settings,
        "shape": [layer.n, layer.k],
        "bias": layer.bias32 is not None,
        "activation": layer.activation,
    }


# --- of a file ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What the plan says about one layer, checked.

    Attributes:
        geometry: None where the kind has none, and where a file of an older version leaves it to the model.
        expected: the tensors of its canonical weight, in the file's version.
    """

    layer: type[CompressedLayer]
    geometry: Geometry | None
    version: int
    settings: dict[str, Any]
    shape: tuple[int, int]
    bias: bool
    activation: str
    expected: Expected

    def build(self, geometry: Any, tensors: dict[str, Tensor], bias: Tensor | None) -> CompressedLayer:
        """With the geometry that the model has. Raises ValueError where the tensors are no canonical weight."""
        kind = self.layer.weight_type
        migrated, settings = kind.migrate(self.version, tensors, self.settings)
        weight = kind.from_tensors(self.shape, migrated, settings)
        return self.layer.build(weight, geometry, bias, self.activation)


@dataclass(frozen=True)
class Plan:
    """A plan, checked: names are those of modules and tensors of the model that was saved.

    Attributes:
        layers: its compressed layers.
        aliases: {name of a tensor: the name under which the file has it}.
        identities: what is an ``nn.Identity``.
        norms: of these the ones in the place of a norm that is folded into a layer, with its channels.
        folded: {name of a layer: the norms that are folded into it}; such a layer has a bias, whether it had one before or not.
        buffers: names of tensors that are no part of the state dict.
        activations, dense: what :func:`activations_of` and :func:`dense_layers_of` gave; None: the file does not say.
    """

    layers: dict[str, Entry]
    aliases: dict[str, str]
    identities: list[str]
    norms: dict[str, int]
    folded: dict[str, str]
    buffers: list[str]
    activations: dict[str, str] | None
    dense: dict[str, Any] | None


def read_plan(path: FilePath, metadata: dict[str, str] | None) -> Plan:
    """Raises ValueError where the metadata of a file has no plan, or any part of it means nothing here."""
    text = (metadata or {}).get(KEY)
    if text is None:
        raise fail(path, "no pycompress plan in its metadata, expected a file that pycompress.save wrote")
    try:
        plan = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise fail(path, f"its plan is not JSON: {error}") from None
    version = plan.get("version") if isinstance(plan, dict) else None
    if type(version) is not int or not 1 <= version <= VERSION:
        raise fail(path, f"its plan has version {version!r}, expected 1 to {VERSION}")
    layers = _mapping(path, plan, "layers", dict, "{name: layer}")
    aliases = _mapping(path, plan, "aliases", str, "{name: name}")
    identities = _names(path, plan, "identities")
    if version == 1:
        layers = {name: _of_version_1(entry) for name, entry in layers.items()}
    return Plan(
        {name: _entry(path, name, entry, version) for name, entry in layers.items()},
        aliases,
        identities,
        _mapping(path, plan, "norms", int, "{name: channels}") if version >= 4 else {},
        _mapping(path, plan, "folded", str, "{name: names}") if version >= 4 else {},
        _names(path, plan, "buffers") if version >= 3 else [],
        _mapping(path, plan, "activations", str, "{name: activation}") if version >= 3 else None,
        _mapping(path, plan, "dense", dict, "{name: layer}") if version >= 3 else None,
    )


def _mapping(path: FilePath, plan: dict[str, Any], key: str, kind: type, expected: str) -> dict[str, Any]:
    found = plan.get(key)
    if not isinstance(found, dict) or not all(isinstance(value, kind) for value in found.values()):
        raise fail(path, f"its plan has no {key}, expected {expected}")
    return found


def _names(path: FilePath, plan: dict[str, Any], key: str) -> list[str]:
    found = plan.get(key)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise fail(path, f"its plan has no {key}, expected a list of names")
    return found


def _of_version_1(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of version 1, where the settings of the weight stood beside everything else, as one of version 2."""
    settings = dict(entry)
    common: dict[str, Any] = {name: settings.pop(name) for name in ("shape", "bias", "activation") if name in settings}
    kind: dict[str, Any] = {"kind": "linear"}
    if "conv2d" in settings:
        kind = {"kind": "conv2d", "geometry": settings.pop("conv2d")}
    elif settings.get("embedding") is True:
        del settings["embedding"]
        kind = {"kind": "embedding", "geometry": {}}
    return {**common, **kind, "weight": settings.pop("method", None), "version": 1, "settings": settings}


def _entry(path: FilePath, name: str, entry: dict[str, Any], plan_version: int) -> Entry:
    def bad(key: str, expected: str) -> ValueError:
        return fail(path, f"layer {name}: {key} is {entry.get(key)!r}, expected {expected}")

    kinds = dict.fromkeys(kind for kind, _ in LAYERS)
    kind, weight, shape, bias, activation = (entry.get(k) for k in ("kind", "weight", "shape", "bias", "activation"))
    settings, geometry = entry.get("settings"), entry.get("geometry")
    if not isinstance(kind, str) or kind not in kinds:
        raise bad("kind", " or ".join(map(repr, kinds)))
    if not isinstance(weight, str) or (kind, weight) not in LAYERS:
        raise bad("weight", " or ".join(map(repr, weights_of(kind))))
    layer = LAYERS[kind, weight]
    if type(bias) is not bool or (bias and not layer.kind.biased):
        raise bad("bias", "true or false" if layer.kind.biased else "false")
    known = tuple(ops.ACTIVATIONS) if layer.kind.epilogue else ("none",)
    if not isinstance(activation, str) or activation not in known:
        raise bad("activation", f"one of {known}")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
        raise bad("shape", "[out_features, in_features]")
    if not isinstance(settings, dict):
        raise bad("settings", "those of the weight")
    if layer.kind.geometry_type is None and geometry is not None:
        raise bad("geometry", "none")
    if layer.kind.geometry_type is not None and not isinstance(geometry, dict):
        raise bad("geometry", f"that of {layer.kind.phrase}")
    n, k = shape
    own = None
    try:
        expected = layer.weight_type.of_version(entry.get("version")).expected((n, k), settings)
        if layer.kind.geometry_type is not None and (plan_version >= 3 or geometry):
            own = layer.kind.geometry_type.from_settings(k, geometry or {})
        if reason := layer.misfit(own, settings):
            raise ValueError(reason)
    except ValueError as error:
        raise fail(path, f"layer {name}: {error}") from None
    return Entry(layer, own, entry["version"], settings, (n, k), bias, activation, expected)
