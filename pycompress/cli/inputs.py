"""With what a model is run: inputs that are given, that its file holds, or that are drawn for the sizes that it tells."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pycompress.cli.source import Port, Source

BATCH, LENGTH = 4, 16  # of inputs that are drawn
ROWS = 16  # of a batch of a calibration


def inputs_for(source: Source, asked: str | None) -> dict[str, Tensor]:
    """Inputs of a model by name.

    Args:
        asked: ``batch=8,length=64``, sizes of inputs to draw; the path of an .npz file; or None.
    Raises:
        ValueError: it is neither, or does not fit the model; nothing tells what the inputs are.
    """
    if asked is not None and asked.endswith(".npz"):
        return arrays(source, Path(asked))
    sizes = _sizes(asked)
    if source.examples:
        if sizes:
            raise ValueError(f"--inputs {asked}: a program has inputs of its own, expected none, or an .npz file")
        return dict(source.examples)
    if not source.ports:
        raise ValueError(
            f"nothing tells what the inputs of {type(source.model).__name__} are, expected --inputs FILE.npz"
        )
    known = {word for port in source.ports for d in range(len(port.sizes)) for word in _words(port, d)}
    if unknown := sizes.keys() - known:
        raise ValueError(
            f"--inputs: no input has a size {min(unknown)}, there are: {', '.join(sorted(known)) or 'none'}"
        )
    return _drawn(source, sizes)


def arrays(source: Source, path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file by name, in the types that the model takes. Raises ValueError, OSError."""
    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: torch.from_numpy(file[name]) for name in file.files}
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path}: {error}; expected an .npz file of numbers") from None
    types = {port.name: port.dtype for port in source.ports}
    exact = source.kind != "transformers"  # of one of those the ports are some of many arguments
    if not found or (exact and found.keys() != types.keys()):
        raise ValueError(f"{path} holds {', '.join(found) or 'nothing'}, expected {', '.join(types) or 'arrays'}")
    return {
        name: x.to(types.get(name, torch.float32 if x.is_floating_point() else x.dtype)) for name, x in found.items()
    }


def batches(source: Source, paths: Sequence[Path]) -> list[Mapping[str, Any]]:
    """What a calibration runs: lines of text files, through the tokenizer beside the model, and rows of .npz files.

    Raises:
        ValueError: a file of another kind, or without a row; text for a model without a tokenizer. OSError.
    """
    found: list[Mapping[str, Any]] = []
    for path in paths:
        if path.suffix == ".npz":
            found += _split(arrays(source, path), path)
        elif path.suffix == ".txt":
            found += tokens(source, [line for line in path.read_text("utf-8").splitlines() if line.strip()], path)
        else:
            raise ValueError(
                f"{path}: expected a .txt file with a text in each line, or an .npz file with an array for each input"
            )
    return found


def tokens(source: Source, texts: Sequence[str], path: Path) -> Iterator[Mapping[str, Any]]:
    """Texts in batches. Raises ValueError where there is none, or no tokenizer."""
    if source.kind != "transformers":
        raise ValueError(f"{path}: text needs the tokenizer of a transformers folder, expected an .npz file")
    if not texts:
        raise ValueError(f"{path} has no text, expected one in each line")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(tokenizer.model_max_length, getattr(source.model.config, "max_position_embeddings", 512))
    for start in range(0, len(texts), ROWS):
        yield dict(
            tokenizer(
                texts[start : start + ROWS], return_tensors="pt", padding=True, truncation=True, max_length=longest
            )
        )


def _split(found: dict[str, Tensor], path: Path) -> Iterator[Mapping[str, Tensor]]:
    rows = {x.shape[0] if x.dim() else 0 for x in found.values()}
    if len(rows) != 1 or rows == {0}:
        raise ValueError(f"{path}: its arrays have {sorted(rows)} rows, expected the same number, above 0")
    for start in range(0, rows.pop(), ROWS):
        yield {name: x[start : start + ROWS] for name, x in found.items()}


def _sizes(asked: str | None) -> dict[str, int]:
    if not asked:
        return {}
    if not re.fullmatch(r"[^=,]+=[1-9]\d*(,[^=,]+=[1-9]\d*)*", asked):
        raise ValueError(f"--inputs is {asked!r}, expected sizes such as batch=8,length=64, or a file .npz")
    return {name: int(size) for name, size in (part.split("=") for part in asked.split(","))}


def _drawn(source: Source, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Normal numbers, tokens of the embedding that they go to, and ones where there is none: masks."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(0)
    shapes = {port.name: [_size(port, d, sizes) for d in range(len(port.sizes))] for port in source.ports}
    found = {
        port.name: torch.randn(shapes[port.name], generator=generator, dtype=torch.float32, device="cpu").to(port.dtype)
        if port.dtype.is_floating_point
        else torch.zeros(shapes[port.name], dtype=port.dtype, device="cpu")
        for port in source.ports
    }
    whole = {port.name for port in source.ports if not port.dtype.is_floating_point}
    if not whole:
        return found
    if source.vocabulary is not None:
        vocabularies = {"input_ids": source.vocabulary}
    else:
        vocabularies = _vocabularies(source.model, {name: x for name, x in found.items() if name in whole}, found)
    for name in whole:
        x = found[name]
        ids = torch.randint(vocabularies.get(name, 1), x.shape, generator=generator, dtype=x.dtype, device="cpu")
        found[name] = ids if name in vocabularies else torch.ones_like(x)
    return found


def _words(port: Port, dimension: int) -> list[str]:
    """The names that a size has for who asks for inputs; none: it is a number."""
    size = port.sizes[dimension]
    if isinstance(size, int):
        return []
    usual = ["batch"] * (dimension == 0) + ["length"] * (dimension == 1 and not port.dtype.is_floating_point)
    return [word for word in dict.fromkeys([size, *usual]) if word]


def _size(port: Port, dimension: int, sizes: Mapping[str, int]) -> int:
    size, words = port.sizes[dimension], _words(port, dimension)
    if isinstance(size, int):
        return size
    for word in words:
        if word in sizes:
            return sizes[word]
    for word, usual in (("batch", BATCH), ("length", LENGTH)):
        if word in words:
            return usual
    raise ValueError(
        f"dimension {dimension} of {port.name} has no size, expected --inputs {f'{size}=...' if size else 'FILE.npz'}"
    )


def _vocabularies(model: nn.Module, tokens: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """For each input that goes to embeddings: how many rows the smallest has."""
    from torch import nn

    from pycompress.calls import call_model, evaluating

    found: dict[str, int] = {}

    def seen(module: nn.Embedding, args: tuple[Any, ...]) -> None:
        for name, x in tokens.items():
            if args and args[0].data_ptr() == x.data_ptr():
                found[name] = min(found.get(name, module.num_embeddings), module.num_embeddings)

    hooks = [one.register_forward_pre_hook(seen) for one in model.modules() if isinstance(one, nn.Embedding)]
    try:
        with evaluating(model, inputs):
            call_model(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
