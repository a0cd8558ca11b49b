"""``save``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycompress.nn import CompressedLayer
from pycompress.nn.trained import is_trained
from pycompress.replacing import FilePath, replacing
from pycompress.storage.plan import KEY, describe
from pycompress.storage.reading import stored_dtype


def save(model: nn.Module, path: FilePath, *, about: Mapping[str, str] | None = None) -> None:
    """Writes a model with compressed layers to a safetensors file that :func:`load` reads on any processor.

    The file holds the canonical weights, the rest of the state dict, and the buffers that are not in it, which a model on the meta
    device has to get from somewhere. It takes the place of an older one whole or not at all, whatever happens: see
    :func:`pycompress.replacing.replacing`, also for its mode and for symbolic links.

    Args:
        about: what you want to say of it, text by names: further entries of the file's metadata, which :func:`load` leaves alone.
    Raises:
        ValueError: the model has no compressed layer, or its state something that no file can hold (it is named); a name in
            ``about`` that is ours.
        TypeError: its state holds something that is not a tensor.
        OSError: the file could not be written; an older one is as it was.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if len(set(names)) < len(names):
        raise ValueError(f"save: several modules have the name {max(names, key=names.count)!r}, expected one each")
    if twin := next((name for name, module in model.named_modules() if is_trained(module)), None):
        raise ValueError(
            f"save: {twin or 'the model'} is prepared, expected compress(model) first, which freezes what was trained"
        )
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, CompressedLayer)}
    if not layers:
        raise ValueError("save: the model has no compressed layer; save a dense model with safetensors itself")
    state = _state(model, layers)
    buffers = _other_buffers(model, state)
    tensors, aliases = _unique(state, buffers)
    metadata = {"format": "pt", KEY: describe(model, aliases, list(buffers))}
    if taken := metadata.keys() & (about or {}).keys():
        raise ValueError(f"save: about has {min(taken)!r}, expected another name than ours")
    metadata |= about or {}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        raise OSError(f"save: {path} could not be written: {error}") from None
    except OSError as error:
        raise OSError(error.errno, f"save: {error.strerror}", str(path)) from None


def _state(model: nn.Module, layers: dict[str, CompressedLayer]) -> dict[str, Tensor]:
    """The state dict, checked."""
    marks = {f"{name}.weight" if name else "weight" for name in layers}  # the plan has the versions
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in marks}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"save: the state dict holds {name} of type {type(tensor).__name__}, expected tensors only")
        if reason := _obstacle(tensor):
            raise ValueError(f"save: the state dict holds {name}, {reason}, which the file cannot hold")
        if not _is_name(name):
            raise ValueError(f"save: the state dict holds {name!r}, expected another name, which the file can hold")
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        if lacking := [prefix + kind for kind in layer._expected() if prefix + kind not in state]:
            raise ValueError(f"save: the state dict lacks {lacking[0]}, expected no hook to take it away or rename it")
    return state


def _obstacle(tensor: Tensor) -> str:
    """Why the file cannot hold a tensor, or ''."""
    if is_lazy(tensor):
        return "which is not initialized yet"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}"
    if tensor.is_meta:
        return "on the meta device and so without data"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_quantized or stored_dtype(tensor.dtype) is None:
        return f"of {tensor.dtype} (safetensors is {safetensors.__version__})"
    return ""


def _is_name(name: str) -> bool:
    """Whether the file can hold a tensor under it: the header is JSON in UTF-8, with a place of its own for metadata."""
    return name != "__metadata__" and name == name.encode(errors="ignore").decode()


def _other_buffers(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The buffers that are not in the state dict, by all their names. Those that no file can hold are left out: mostly they are
    made anew with the model."""
    found = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, CompressedLayer):
            for name, buffer in module._buffers.items():
                full = f"{owner}.{name}" if owner else name
                if buffer is not None and full not in state and _is_name(full) and not _obstacle(buffer):
                    found[full] = buffer
    return found


def _unique(state: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Splits tensors into those to store and aliases {name: the stored name of the same tensor}; of ``buffers``, which modules
    often compute each for themselves, {name: the stored name of an equal one}."""
    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: set[int] = set()
    for name, tensor in {**state, **buffers}.items():
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()  # what lies in memory is what it means
        key: Any = id(tensor)  # (of a shared one without elements)
        if name in buffers:
            key = _content(plain)
        elif tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.is_conj(), tensor.is_neg())
            key = (*place, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        memory = plain.untyped_storage().data_ptr()
        # A view into what is stored already is stored as a tensor of its own: safetensors takes no overlaps.
        tensors[name] = plain.clone() if memory in stored else plain
        stored.add(memory)
    return tensors, aliases


def _content(tensor: Tensor) -> tuple[Any, ...]:
    """Alike for tensors that are equal to the bit."""
    data = tensor.cpu().view(-1).view(torch.uint8).numpy().data
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(data).digest()
