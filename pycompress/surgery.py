"""Find modules in a model, and put others in their places."""

from __future__ import annotations

from torch import nn

from pycompress.nn import CompressedLayer


def split(name: str) -> tuple[str, str]:
    """A dotted name as (name of the parent, attribute)."""
    parent, _, attribute = name.rpartition(".")
    return parent, attribute


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Each module with all the names that the model has for it, in the order of the first ones."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The compressed layers of a model by name, each module once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLayer)}


def install(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer into its place, in the mode (training or not) of the one that was there."""
    parent, attribute = split(name)
    layer.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), attribute, layer)


def switch_off_fast_paths(model: nn.Module) -> None:
    """torch's transformer encoder has a fast path that reads float weights, and packs padded batches for it: not with ours."""
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) or not compressed_layers(module):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        else:
            module.use_nested_tensor = module.enable_nested_tensor = False
