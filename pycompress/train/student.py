"""The model that is trained: the dense one, with what a compressed model computes in the places of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from pycompress.kinds import kind_of, pruned_names
from pycompress.methods.held import held
from pycompress.nn import CompressedLayer
from pycompress.nn.layer import RECORD
from pycompress.nn.trained import can_train, canonical, is_trained, train_as
from pycompress.records import LayerRecord, leave_records, relative_error
from pycompress.surgery import compressed_layers, swap
from pycompress.weights import Weight


def begin(student: nn.Module, compressed: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Makes of a dense copy what computes as the compressed model does. Layers inside the blocks become trained twins, the others,
    and those that cannot be trained, are compressed; of all parameters those in the blocks, and no others, have gradients.

    Raises:
        ValueError: a parameter in a block that is not float32, or pruned by torch.nn.utils.prune.
    """
    inside = {module for block in blocks for module in block.modules()}
    layers = compressed_layers(compressed)
    fixed: dict[nn.Module, CompressedLayer] = {}
    for name, layer in layers.items():
        module, weight = student.get_submodule(name), layer.canonical()
        if pruned_names(module):
            raise ValueError(f"reconstruct: {name} is pruned by torch.nn.utils.prune, expected it to be removed there")
        keep = held(weight)
        if module not in inside or keep is None or not can_train(module, keep):
            # (What stands beside a layer, padding and activations, stays in a student.)
            geometry = layer.geometry if isinstance(module, CompressedLayer) else layer.kind.geometry(module)
            fixed[module] = type(layer).build(weight, geometry, layer.bias32)
            fixed[module].stand_for(module)
            continue
        train_as(module, keep, weight)
        if layer.bias32 is not None:
            _set_bias(module, layer.bias32)
    swap(student, fixed)
    own = {name: value for name, value in compressed.state_dict().items() if name.rpartition(".")[0] not in layers}
    student.load_state_dict(own, strict=False)
    student.requires_grad_(False)
    for module in inside:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"reconstruct: the {name} of a {type(module).__name__} in a block is {parameter.dtype}, expected float32: "
                    "model.float() makes it so"
                )
            # The weight of a twin that is trained as factors only stands there.
            parameter.requires_grad_(not (name == "weight" and "low_rank_down" in module._parameters))


def _set_bias(module: nn.Module, bias: Tensor) -> None:
    if module.bias is None:  # the method gave it one
        module.bias = nn.Parameter(bias.clone())
    else:
        module.bias.data.copy_(bias)  # type: ignore[operator]


def training(student: nn.Module, mode: bool) -> None:
    """Has the twins compute as in training, or by the kernels; the rest, dropout for one, stays in evaluation mode."""
    for module in student.modules():
        if is_trained(module):
            module.training = mode


def write_into(compressed: nn.Module, student: nn.Module, dense: nn.Module, note: Callable[[str], str]) -> None:
    """Gives the compressed model the weights of the student, and the records of trained layers a note by their name."""
    records: list[LayerRecord] = []
    weights: dict[tuple[int, str], Weight] = {}  # what is shared is shared again
    for name, module in student.named_modules():
        if isinstance(module, CompressedLayer):
            continue
        if not is_trained(module):
            _copy_own(compressed.get_submodule(name), module)
            continue
        layer = compressed.get_submodule(name)
        assert isinstance(layer, CompressedLayer)
        record: LayerRecord | None = vars(layer).get(RECORD)
        key = id(module.weight), layer.weight_type.name
        weight = weights.setdefault(key, canonical(module))
        _load(layer, weight, module.bias)
        kind = kind_of(dense_module := dense.get_submodule(name))
        assert record is not None
        assert kind is not None
        record.error = relative_error(kind.matrix(dense_module).detach(), weight.decompress())
        record.note = "; ".join(filter(None, [record.note, note(name)]))
        records.append(record)
    leave_records(compressed, records)


def _load(layer: CompressedLayer, weight: Weight, bias: Tensor | None) -> None:
    state: dict[str, Tensor] = {
        **weight.tensors(),
        "weight": torch.tensor([weight.version], dtype=torch.uint8, device="cpu"),
    }
    if bias is not None:
        state["bias"] = bias.detach()
    layer.load_state_dict(state)


def _copy_own(target: nn.Module, source: nn.Module) -> None:
    """Parameters and buffers of the module itself."""
    own: Mapping[str, Tensor | None] = {**source._parameters, **source._buffers}
    there: Mapping[str, Tensor | None] = {**target._parameters, **target._buffers}
    with torch.no_grad():
        for name, tensor in own.items():
            other = there.get(name)
            if tensor is not None and other is not None:
                other.copy_(tensor)
