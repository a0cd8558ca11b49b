"""An open file."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pycompress.replacing import FilePath
from pycompress.storage.plan import Plan, fail

FLOATS = {"F64", "F32", "F16", "BF16"}  # a tensor of one may be loaded as another: as copying does, outside of files


@cache
def stored_dtype(dtype: torch.dtype) -> str | None:
    """What a file calls a dtype; None where the safetensors that is installed cannot hold it."""
    try:
        file = save({"": torch.empty(2, dtype=dtype, device="cpu")})
    except Exception:  # another one in each version
        return None
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    name: str = header[""]["dtype"]
    return name if header[""]["shape"] == [2] else None  # several numbers packed into one do not come back as they were


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN and the sign of zero included."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    first, second = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


class File:
    """Shapes and dtypes without reading data, aliases resolved."""

    def __init__(self, path: FilePath, handle: Any, plan: Plan) -> None:
        self.path, self._handle, self._aliases = path, handle, plan.aliases
        stored = set(handle.keys())
        for alias, target in plan.aliases.items():
            if target not in stored or alias in stored:
                raise fail(path, f"the alias {alias!r} stands for {target!r}, expected a tensor of the file")
        self.names = stored | set(plan.aliases)
        if unknown := set(plan.buffers) - self.names:
            raise fail(path, f"the buffer {min(unknown)!r} is no tensor of the file")
        self._tied = set(plan.aliases.values())
        self._shared: dict[str, Tensor] = {}  # of these, what has been read: each name gives the same tensor

    def stored(self, name: str) -> str:
        """Where it is kept."""
        return self._aliases.get(name, name)

    def expect(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, exact: bool = True) -> None:
        """Raises ValueError where the file lacks a tensor or has another one; not ``exact``: floats may be of another precision."""
        if name not in self.names:
            raise fail(self.path, f"the tensor {name} is missing")
        piece, wanted = self._handle.get_slice(self.stored(name)), stored_dtype(dtype)
        found, size = piece.get_dtype(), tuple(piece.get_shape())
        floats = not exact and wanted in FLOATS
        if size != shape or not (found == wanted or (floats and found in FLOATS)):
            words = "floating point" if floats else wanted or dtype
            raise fail(self.path, f"{name} is {found} {list(size)}, expected {words} {list(shape)}")

    def read(self, name: str) -> Tensor:
        """A copy: what safetensors gives is the file itself, mapped into memory, and changes with it."""
        stored = self.stored(name)
        if stored not in self._shared:
            tensor: Tensor = self._handle.get_tensor(stored).clone()
            if stored not in self._tied:
                return tensor
            self._shared[stored] = tensor
        return self._shared[stored]
