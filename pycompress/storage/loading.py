"""``load``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from copy import deepcopy
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pycompress.kinds import mark_folded
from pycompress.passes import whole
from pycompress.records import forget_records
from pycompress.replacing import FilePath
from pycompress.storage.agreement import Change, read
from pycompress.storage.plan import fail, read_plan
from pycompress.storage.reading import File, same_bits
from pycompress.surgery import swap, switch_off_fast_paths

ModelT = TypeVar("ModelT", bound=nn.Module)


def load(model: ModelT, path: FilePath, *, blocks: bool = True, skip_padding: bool = False) -> ModelT:
    """Puts the weights of a file that :func:`save` wrote into a dense model of the same architecture.

    What is loaded does not depend on the file any more; floating point has the precision that the model has. On the meta device,
    buffers that are not in the state dict get the values that they had when the model was saved; elsewhere they stay.

    Args:
        model: as it was before ``compress`` (random weights will do, the meta device too), or compressed already.
            It is changed in place, at the end, when all of the file has been read and found good; where that raises, undone.
        blocks, skip_padding: have transformer blocks run as one op each, and leave padding out, as :func:`compress` has them; the
            file knows nothing of either.
    Returns:
        ``model``; where the model itself is the layer, the compressed layer.
    Raises:
        FileNotFoundError; ValueError: not such a file, an unknown version, or anything in which the file and the model do not
        agree, by its name; ``skip_padding`` without ``blocks``; and what hooks of the model raise.
    """
    whole.check(blocks, skip_padding, "load")
    with whole.without(model):
        loaded = _loaded(model, path)
    whole.remove(loaded)
    if blocks:
        whole.install(loaded, skip_padding=skip_padding)
    return loaded


def _loaded(model: ModelT, path: FilePath) -> ModelT:
    # Wherever it is called, so that what is made here can be trained, and lies on the CPU.
    with torch.inference_mode(False), torch.device("cpu"):
        try:
            with safe_open(path, framework="pt", device="cpu") as handle:
                plan = read_plan(path, handle.metadata())
                change = read(model, File(path, handle, plan), plan)
        except SafetensorError as error:
            raise fail(path, f"not a whole safetensors file: {error}") from None
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise fail(path, str(error)) from None
        if model in change.layers:
            return change.layers[model]  # type: ignore[return-value]
        with ExitStack() as undo:
            _apply(model, change, path, undo)
            undo.pop_all()
    return model


def _apply(model: nn.Module, change: Change, path: FilePath, undo: ExitStack) -> None:
    """Changes the model, and tells ``undo`` how to put back what was changed."""
    tensors = [tensor for tensor, _ in (*change.state.values(), *change.buffers)]
    undo.callback(_keep(model, tensors))
    for module, bias in change.biases:
        module._parameters["bias"] = bias
    made = {tensor: _on_cpu(tensor) for tensor in tensors if tensor.is_meta}
    try:
        undo.callback(swap(model, {**change.layers, **change.emptied, **made}))
    except ValueError as error:
        raise fail(path, str(error)) from None
    # Only there can tensors that were made under inference_mode be changed.
    with torch.inference_mode(any(tensor.is_inference() for tensor in tensors)), torch.no_grad():
        values = {name: value for name, (_, value) in change.state.items()}
        if unknown := model.load_state_dict(values, strict=False).unexpected_keys:
            raise fail(path, f"the model does not load {unknown[0]}, which its state dict has")
        for tensor, value in change.buffers:
            made[tensor].copy_(value)
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for name, (before, value) in change.state.items():
        tensor = made.get(before, before)
        if id(tensor) in own and not same_bits(tensor, value.to(tensor.dtype)):
            raise fail(
                path, f"{name} is not what the file has once it is loaded: it shares memory, or a hook changed it"
            )
    for layer, norms in change.folded.items():
        mark_folded(layer, norms)
    switch_off_fast_paths(model)
    forget_records(model)  # of the weights that were here before


def _on_cpu(tensor: Tensor) -> Tensor:
    """A tensor without data as one that has room for it."""
    made = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    return made


def _keep(model: nn.Module, tensors: Iterable[Tensor]) -> Callable[[], None]:
    """What a model is besides its modules: a function that puts it back."""
    modules = [
        (vars(module), dict(vars(module)), [(table, dict(table)) for table in (module._parameters, module._buffers)])
        for module in model.modules()
    ]
    extra = [
        (module, deepcopy(module.get_extra_state()))
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]

    def put_back() -> None:
        for attributes, before, tables in modules:
            for table, entries in ((attributes, before), *tables):
                table.clear()
                table.update(entries)
        for tensor, value in values:
            if not same_bits(tensor, value):
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(value)
        for module, state in extra:
            module.set_extra_state(state)

    return put_back
