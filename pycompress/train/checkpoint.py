"""A training that was interrupted, in a file: replaced whole, and read only by a training that is the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def fingerprint(state: Mapping[str, Tensor], *settings: object) -> str:
    """Of all that a training begins with: other for another plan, model, calibration or setting."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(path: Path, fingerprint: str, content: Mapping[str, Any]) -> None:
    """At once or not at all."""
    beside = path.with_name(path.name + ".new")
    torch.save({"fingerprint": fingerprint, **content}, beside)
    os.replace(beside, path)


def read(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What :func:`write` wrote, or None where there is no such file.

    Raises:
        ValueError: the file is none of these, or that of another training.
    """
    if not path.exists():
        return None
    try:
        content: Any = torch.load(path, weights_only=True)
        written = content.pop("fingerprint")
    except Exception as error:
        raise ValueError(f"reconstruct: {path} is no checkpoint of a training ({error})") from error
    if written != fingerprint:
        raise ValueError(
            f"reconstruct: {path} is the checkpoint of another training, expected the same model, plan, calibration, number of "
            "batches and settings; or a path where there is none"
        )
    return content  # type: ignore[no-any-return]
