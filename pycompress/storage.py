"""Saving and loading: canonical weights in a safetensors file, with a versioned plan (JSON) in its metadata.

Nothing in a file is executed or imported. Everything is checked against the model before a tensor is read, so that a truncated or
hostile file is refused with an error and the model stays as it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pycompress import ops
from pycompress.kinds import Geometry, kind_of
from pycompress.nn import LAYERS, CompressedLayer
from pycompress.nn.layers import weights_of
from pycompress.passes.activations import activation_name
from pycompress.records import RECORDS
from pycompress.surgery import compressed_layers, install, switch_off_fast_paths
from pycompress.weights import Expected

VERSION = 2  # of the plan; 1 had no kinds, and the settings of a weight among its entry's
_KEY = "pycompress"
ModelT = TypeVar("ModelT", bound=nn.Module)
Path = str | PathLike[str]
_FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float32: "F32", torch.bfloat16: "BF16",
}  # fmt: skip


def _unique(state: dict[str, Tensor], layers: dict[str, CompressedLayer]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Splits a state dict into tensors to store and aliases {name: the stored name of the same tensor}."""
    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: set[int] = set()
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        key: Any = name
        if owner in layers and kind not in layers[owner]._buffers:
            # Layers that share their packed weight unpack it anew each time: compare that one.
            key = (layers[owner].packed.data_ptr(), kind)
        elif tensor.numel():
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            memory = tensor.untyped_storage().data_ptr()
            # A view into what is stored already is stored as a tensor of its own: safetensors takes no overlaps.
            tensors[name] = tensor.detach().clone() if memory in stored else tensor.detach().contiguous()
            stored.add(memory)
    return tensors, aliases


def save(model: nn.Module, path: Path) -> None:
    """Writes a model with compressed layers to a safetensors file that :func:`load` reads on any processor.

    Raises:
        ValueError: the model has no compressed layer. TypeError: its state holds something that is not a tensor.
    """
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, CompressedLayer)}
    if not layers:
        raise ValueError("save: the model has no compressed layer; save a dense model with safetensors itself")
    state = model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"save: the state dict holds {name} of type {type(tensor).__name__}, expected tensors only")
    tensors, aliases = _unique(state, layers)
    plan = {
        "version": VERSION,
        "aliases": aliases,
        "identities": [n for n, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Identity],
        "layers": {name: _described(layer) for name, layer in layers.items()},
    }
    save_file(tensors, path, metadata={"format": "pt", _KEY: json.dumps(plan)})


def _described(layer: CompressedLayer) -> dict[str, Any]:
    """The plan's entry for a layer."""
    geometry = {} if layer.geometry is None else {"geometry": layer.geometry.settings()}
    return {
        "kind": layer.kind.name,
        **geometry,
        "weight": layer.weight_type.name,
        "version": layer.weight_type.version,
        "settings": layer.settings,
        "shape": [layer.n, layer.k],
        "bias": layer.bias is not None,
        "activation": layer.activation,
    }


def _of_version_1(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of version 1, where the settings of the weight stood beside everything else, as one of the present."""
    settings = dict(entry)
    common: dict[str, Any] = {name: settings.pop(name) for name in ("shape", "bias", "activation") if name in settings}
    kind: dict[str, Any] = {"kind": "linear"}
    if "conv2d" in settings:
        kind = {"kind": "conv2d", "geometry": settings.pop("conv2d")}
    elif settings.get("embedding") is True:
        del settings["embedding"]
        kind = {"kind": "embedding", "geometry": {}}
    return {**common, **kind, "weight": settings.pop("method", None), "version": 1, "settings": settings}


def _fail(path: Path, message: str) -> ValueError:
    return ValueError(f"load: {path}: {message}")


def _read_plan(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise _fail(path, "no pycompress plan in its metadata, expected a file that pycompress.save wrote")
    try:
        plan = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _fail(path, f"its plan is not JSON: {error}") from None
    version = plan.get("version") if isinstance(plan, dict) else None
    if type(version) is not int or not 1 <= version <= VERSION:
        raise _fail(path, f"its plan has version {version!r}, expected 1 to {VERSION}")
    layers, aliases, identities = plan.get("layers"), plan.get("aliases"), plan.get("identities")
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise _fail(path, "its plan has no layers, expected {name: layer}")
    if not isinstance(aliases, dict) or not all(isinstance(target, str) for target in aliases.values()):
        raise _fail(path, "its plan has no aliases, expected {name: name}")
    if not isinstance(identities, list) or not all(isinstance(name, str) for name in identities):
        raise _fail(path, "its plan has no identities, expected a list of names")
    if version == 1:
        layers = {name: _of_version_1(entry) for name, entry in layers.items()}
    entries = {name: _entry(path, name, entry) for name, entry in layers.items()}
    return {"layers": entries, "aliases": aliases, "identities": identities}


@dataclass(frozen=True)
class _Entry:
    """What the plan says about one layer, checked; ``expected``: the tensors of its canonical weight, in the file's version."""

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


def _entry(path: Path, name: str, entry: dict[str, Any]) -> _Entry:
    def bad(key: str, expected: str) -> ValueError:
        return _fail(path, f"layer {name}: {key} is {entry.get(key)!r}, expected {expected}")

    kinds = dict.fromkeys(kind for kind, _ in LAYERS)
    kind, weight, shape, bias, activation = (entry.get(k) for k in ("kind", "weight", "shape", "bias", "activation"))
    settings, geometry = entry.get("settings"), entry.get("geometry")
    if not isinstance(kind, str) or kind not in kinds:
        raise bad("kind", " or ".join(map(repr, kinds)))
    if not isinstance(weight, str) or (kind, weight) not in LAYERS:
        raise bad("weight", " or ".join(map(repr, weights_of(kind))))
    layer = LAYERS[kind, weight]
    if type(bias) is not bool or (bias and not layer.kind.epilogue):
        raise bad("bias", "true or false" if layer.kind.epilogue else "false")
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
    try:
        expected = layer.weight_type.of_version(entry.get("version")).expected((n, k), settings)
        own = None if layer.kind.geometry_type is None else layer.kind.geometry_type.from_settings(k, geometry or {})
        if reason := layer.misfit(own, settings):
            raise ValueError(reason)
    except ValueError as error:
        raise _fail(path, f"layer {name}: {error}") from None
    return _Entry(layer, own, entry["version"], settings, (n, k), bias, activation, expected)


class _File:
    """An open file: shapes and dtypes without reading data, aliases resolved."""

    def __init__(self, path: Path, handle: Any, aliases: dict[str, str]) -> None:
        self.path, self.handle, self.stored = path, handle, set(handle.keys())
        self.aliases = aliases
        for alias, target in aliases.items():
            if target not in self.stored or alias in self.stored:
                raise _fail(path, f"the alias {alias!r} stands for {target!r}, expected a tensor of the file")
        self.names = self.stored | set(aliases)

    def expect(self, name: str, shape: tuple[int, ...], dtype: str | None) -> None:
        if name not in self.names:
            raise _fail(self.path, f"the tensor {name} is missing")
        piece = self.handle.get_slice(self.aliases.get(name, name))
        found = (tuple(piece.get_shape()), piece.get_dtype())
        if found[0] != shape or dtype not in (None, found[1]):
            raise _fail(
                self.path, f"{name} is {found[1]} {list(found[0])}, expected {dtype or 'any dtype'} {list(shape)}"
            )

    def dtype(self, name: str) -> str:
        found: str = self.handle.get_slice(self.aliases.get(name, name)).get_dtype()
        return found

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self.handle.get_tensor(self.aliases.get(name, name))
        return tensor


def _check_place(path: Path, model: nn.Module, name: str, entry: _Entry) -> Any:
    """The model has a layer of the right kind, shape and geometry at this name. Returns its geometry."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise _fail(path, f"the model has no layer {name!r}") from None
    kind = module.kind if isinstance(module, CompressedLayer) else kind_of(module)
    if kind is None or kind.name != entry.layer.kind.name:
        raise _fail(path, f"{name} is a {type(module).__name__} in the model, expected {entry.layer.kind.phrase}")
    if isinstance(module, CompressedLayer):
        shape, bias, geometry = (module.n, module.k), module.bias is not None, module.geometry
    else:
        try:
            shape, bias, geometry = kind.shape(module), kind.bias(module) is not None, kind.geometry(module)
        except ValueError as error:
            raise _fail(path, f"{name} is a {type(module).__name__} in the model: {error}") from None
    if (shape, bias, geometry) != (entry.shape, entry.bias, entry.geometry):
        here, there = _outline(shape, bias, geometry), _outline(entry.shape, entry.bias, entry.geometry)
        raise _fail(path, f"{name} is {here} in the model, {there} in the file")
    return geometry


def _outline(shape: tuple[int, int], bias: bool, geometry: Geometry | None) -> str:
    return f"{list(shape)} with bias={bias}" + (f", {geometry}" if geometry is not None and geometry.settings() else "")


def _read_layer(
    file: _File, name: str, entry: _Entry, geometry: Any, first: dict[str, list[CompressedLayer]]
) -> CompressedLayer:
    """The layer with the geometry of its place; ``first``: those before it, by where the file keeps their weight."""
    prefix = f"{name}." if name else ""
    tensors = {kind: file.read(prefix + kind) for kind in entry.expected}
    try:
        layer = entry.build(geometry, tensors, file.read(prefix + "bias") if entry.bias else None)
    except ValueError as error:
        raise _fail(file.path, f"layer {name}: {error}") from None
    main = prefix + next(iter(entry.expected))
    layer.tie(first.setdefault(file.aliases.get(main, main), []))
    return layer


def load(model: ModelT, path: Path) -> ModelT:
    """Puts the weights of a file that :func:`save` wrote into a dense model of the same architecture.

    Args:
        model: as it was before ``compress`` (random weights will do, the meta device too), or compressed already.
            It is changed in place, at the end, when all of the file has been read and found good.
    Returns:
        ``model``; where the model itself is the layer, the compressed layer.
    Raises:
        FileNotFoundError; ValueError: not such a file, an unknown version, or tensors and layers that do not fit the model.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            plan = _read_plan(path, handle.metadata())
            file = _File(path, handle, plan["aliases"])
            layers, rest = _read(model, file, plan)
    except SafetensorError as error:
        raise _fail(path, f"not a whole safetensors file: {error}") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise _fail(path, str(error)) from None
    if "" in layers:
        return layers[""]  # type: ignore[return-value]
    for name, layer in layers.items():
        install(model, name, layer)
    for name in plan["identities"]:
        if type(model.get_submodule(name)) is not nn.Identity:
            install(model, name, nn.Identity())
    switch_off_fast_paths(model)
    _assign(model, rest)
    model.__dict__.pop(RECORDS, None)  # of the weights that were here before
    return model


def _read(model: nn.Module, file: _File, plan: dict[str, Any]) -> tuple[dict[str, CompressedLayer], dict[str, Tensor]]:
    """The compressed layers, and the other tensors by name. The model is only looked at."""
    owned: set[str] = set()
    geometries: dict[str, Any] = {}
    for name, entry in plan["layers"].items():
        geometries[name] = _check_place(file.path, model, name, entry)
        prefix = f"{name}." if name else ""
        bias: Expected = {"bias": (entry.shape[:1], torch.float32)} if entry.bias else {}
        for kind, (shape, dtype) in {**entry.expected, **bias}.items():
            file.expect(prefix + kind, shape, _DTYPES[dtype])
            owned.add(prefix + kind)
    fused = {entry.activation for entry in plan["layers"].values()}
    for name in plan["identities"]:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise _fail(file.path, f"the model has no module {name!r}") from None
        if type(module) is not nn.Identity and activation_name(module) not in fused:
            kind = type(module).__name__
            raise _fail(
                file.path, f"{name} is a {kind} in the model, in the file an activation that a layer applies itself"
            )
    compressed = compressed_layers(model)
    dense = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in owned and name.rpartition(".")[0] not in plan["layers"]
    }
    stray = [name for name in compressed if name not in plan["layers"]]
    if stray:
        raise _fail(file.path, f"the model's layer {stray[0]} is compressed, in the file it is dense")
    unknown = file.names - owned - dense.keys()
    if unknown:
        raise _fail(file.path, f"the model has no tensor {min(unknown)!r}")
    for name, tensor in dense.items():
        file.expect(name, tuple(tensor.shape), None if tensor.is_floating_point() else _DTYPES.get(tensor.dtype))
        if tensor.is_floating_point() and file.dtype(name) not in _FLOATS:
            raise _fail(file.path, f"{name} is {file.dtype(name)}, expected floating point as in the model")
    first: dict[str, list[CompressedLayer]] = {}
    layers: dict[str, CompressedLayer] = {}
    same: dict[int, CompressedLayer] = {}  # one module under two names stays one module
    for name, entry in plan["layers"].items():
        module = model.get_submodule(name)
        if id(module) not in same:
            same[id(module)] = _read_layer(file, name, entry, geometries[name], first)
        layers[name] = same[id(module)]
    return layers, {name: file.read(name) for name in dense}


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    meta = any(t.is_meta for t in model.state_dict().values())
    owners = [(*name.rpartition("."), parameter) for name, parameter in model.named_parameters(remove_duplicate=False)]
    model.load_state_dict(tensors, strict=False, assign=meta)
    # Assigning makes a parameter of its own of each tensor: parameters that were one become one again.
    first: dict[int, nn.Parameter] = {}
    for parent, _, name, before in owners if meta else []:
        module = model.get_submodule(parent)
        setattr(module, name, first.setdefault(id(before), getattr(module, name)))
