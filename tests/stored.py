"""Saved files, taken apart and put together otherwise, and what load() must do with a bad one."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import pycompress as pc

Tensors = dict[str, Tensor]
Plan = dict[str, Any]
Snapshot = Callable[[nn.Module], Callable[[], bool]]


def pieces(path: Path, model: nn.Module | None = None) -> tuple[Tensors, Plan]:
    """Tensors and plan of a file; of a model, which is saved there first."""
    if model is not None:
        pc.save(model, path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        return tensors, json.loads(file.metadata()["pycompress"])


def write(path: Path, tensors: Tensors, plan: Plan | str) -> None:
    path.unlink(missing_ok=True)
    text = plan if isinstance(plan, str) else json.dumps(plan)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"pycompress": text})


def refused(path: Path, message: str, snapshot: Snapshot, *models: nn.Module, what: object = "the file") -> None:
    """load() says what is wrong and where, for each of these models, and changes none."""
    for model in models:
        unchanged = snapshot(model)
        try:
            pc.load(model, path)
        except ValueError as error:
            found = str(error)
        else:
            pytest.fail(f"{what} was loaded, expected {message}")
        assert re.search(message, found) and str(path) in found, f"{what}: {found}, expected {message}"
        assert unchanged(), what


def header_size(whole: bytes) -> int:
    size: int = struct.unpack("<Q", whole[:8])[0]
    return size


def flipped(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    """The file with one bit flipped, in its header or a little behind it."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        position = int(torch.randint(0, 8 + header_size(whole) + 64, (1,), generator=generator))
        broken = bytearray(whole)
        broken[min(position, len(whole) - 1)] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        yield bytes(broken)


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- changes of a plan, and of tensors ----------------------------------------------------------------------------------


def edit(*keys: str, value: Any) -> Callable[[Plan], None]:
    def change(plan: Plan) -> None:
        for key in keys[:-1]:
            plan = plan[key]
        plan[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[Plan], None]:
    def change(plan: Plan) -> None:
        for key in keys[:-1]:
            plan = plan[key]
        del plan[keys[-1]]

    return change


def patch(name: str, index: int, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[index] = value

    return change


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def remove(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)
