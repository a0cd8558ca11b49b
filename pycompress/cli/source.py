"""A model from a path: a folder of transformers, an exported program or an ONNX file; and a compressed one in its place.

No pickle is ever read: it can run whatever code its maker wanted.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

KEY = "pycompress.source"  # in the metadata of a compressed file: which model was compressed
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
KINDS = "a folder of transformers, an exported program (.pt2) or an ONNX file (.onnx)"


@dataclass(frozen=True)
class Port:
    """One input: its sizes are numbers, names of what may differ, or ''."""

    name: str
    sizes: tuple[int | str, ...]
    dtype: torch.dtype


@dataclass
class Source:
    """A model and what is known of its inputs.

    Attributes:
        model: in evaluation mode.
        kind: ``transformers``, ``exported`` or ``onnx``.
        ports: its inputs; empty where nothing tells them.
        examples: by name, those that the file itself holds.
        vocabulary: how many tokens there are, where a config says so.
    """

    path: Path
    kind: str
    model: nn.Module
    ports: list[Port]
    examples: dict[str, Tensor] = field(default_factory=dict)
    vocabulary: int | None = None

    def dynamic_of(self, inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]] | None:
        """Which sizes of inputs may differ, as :func:`pycompress.export` takes it; None: what it takes for granted."""
        if not self.ports:
            return None
        found = {port.name: {d: s for d, s in enumerate(port.sizes) if isinstance(s, str) and s} for port in self.ports}
        return {name: found.get(name, {0: "batch"}) for name in inputs}

    def about(self, output: Path) -> dict[str, str]:
        """What the compressed file says of where it comes from: the path as seen from there."""
        path = os.path.relpath(self.path.resolve(), output.resolve().parent)
        return {KEY: json.dumps({"kind": self.kind, "path": path, "class": type(self.model).__name__})}


def open_source(path: Path, *, weights: bool = True) -> Source:
    """The model at a path. Without ``weights`` that of a transformers folder is on the meta device, made of its config alone.

    Raises:
        ValueError: it is no model of a known kind, or a pickle. OSError: it cannot be read. NotImplementedError: an operator of a
            graph that is not imported.
    """
    if path.is_dir():
        return _of_folder(path, weights)
    if path.suffix == ".pt2":
        return _of_program(path)
    if path.suffix == ".onnx":
        return _of_onnx(path)
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read, and is never loaded; expected {KINDS}"
        )
    raise ValueError(f"{path} is no model of a known kind, expected {KINDS}")


def open_compressed(
    path: Path, dense: Path | None, inputs: Callable[[Source], dict[str, Tensor]]
) -> tuple[Source, dict[str, Tensor]]:
    """A file that `pycompress compress` wrote, in the model that it was made of, and inputs for it.

    Args:
        dense: where that model lies now; None: where the file says.
        inputs: gives inputs for the model before anything is compressed in it.
    Raises:
        ValueError: it is no such file, or of another model. OSError: it, or the model, cannot be read.
    """
    from pycompress.storage import load

    source = open_source(dense or path_of_dense(path), weights=False)
    example = inputs(source)
    source.model = load(source.model, path).eval()
    return source, example


def path_of_dense(path: Path) -> Path:
    """Where the model lies that a compressed file was made of. Raises ValueError where it does not say so, or nothing is there."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}; expected a file that pycompress compress wrote") from None
    if not isinstance(about, dict) or not isinstance(about.get("path"), str):
        raise ValueError(f"{path} does not say which model was compressed, expected --model PATH")
    dense: Path = path.resolve().parent / about["path"]
    if not dense.exists():
        raise ValueError(f"{path} was made of {about['path']}, which is not there: expected --model PATH")
    return dense


def _of_folder(path: Path, weights: bool) -> Source:
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json, expected {KINDS}")
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    name = (config.architectures or ["none"])[0]
    architecture = getattr(transformers, name, None)
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise ValueError(f"{path}: its architecture is {name}, expected a model that transformers itself has")
    if not weights:
        dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
        with torch.device("meta"):
            model = architecture._from_config(config, torch_dtype=dtype)
    elif not any(path.glob("*.safetensors")):
        pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLES]
        also = f"; {pickles[0]} is a pickle, which can run code when it is read, and is never loaded" if pickles else ""
        raise ValueError(f"{path} has no *.safetensors, expected the weights as save_pretrained writes them{also}")
    else:
        model = architecture.from_pretrained(path, local_files_only=True, use_safetensors=True, torch_dtype="auto")
    return Source(path, "transformers", model.eval(), _ports_of(model, config), {}, getattr(config, "vocab_size", None))


def _ports_of(model: Any, config: Any) -> list[Port]:
    """Of models that take text or images alone; others want more than a config tells."""
    import torch

    if model.main_input_name == "input_ids" and not config.is_encoder_decoder:
        return [Port(name, ("batch", "length"), torch.int64) for name in ("input_ids", "attention_mask")]
    if model.main_input_name == "pixel_values" and isinstance(size := getattr(config, "image_size", None), int):
        return [Port("pixel_values", ("batch", config.num_channels, size, size), torch.float32)]
    return []


def _of_onnx(path: Path) -> Source:
    import onnx

    import pycompress as pc

    model = pc.from_onnx(path)  # first: it tells what is wrong with a file
    graph = onnx.load(path, load_external_data=False).graph
    return Source(path, "onnx", model.eval(), _ports_in(graph))


def _ports_in(graph: Any) -> list[Port]:
    import numpy as np
    import torch
    from onnx import helper

    constants = {one.name for one in graph.initializer}
    ports = []
    for value in graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        sizes = tuple(d.dim_param if d.HasField("dim_param") else d.dim_value or "" for d in tensor.shape.dim)
        example = np.zeros(1, helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        ports.append(Port(value.name, sizes, torch.from_numpy(example).dtype))
    return ports


def _of_program(path: Path) -> Source:
    """Through ONNX: the layers of a program are calls, and its importer makes layers of calls."""
    import torch
    from torch.utils import _pytree as pytree

    program = _program(path)
    with tempfile.TemporaryDirectory(prefix="pycompress-") as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(program, f=str(file), dynamo=True, verbose=False)
        source = _of_onnx(file)
    leaves = [leaf for leaf in pytree.tree_leaves(program.example_inputs) if isinstance(leaf, torch.Tensor)]
    if len(leaves) == len(source.ports):
        source.examples = dict(zip((port.name for port in source.ports), leaves, strict=True))
    source.path, source.kind = path, "exported"
    return source


def _program(path: Path) -> torch.export.ExportedProgram:
    from torch import export

    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no archive, expected one that torch.export.save wrote")
    with zipfile.ZipFile(path) as archive:
        objects = [name for name in archive.namelist() if "custom_obj" in name or "opaque_obj" in name]
    if objects:
        raise ValueError(f"{path} holds {objects[0]}, a pickled object, which can run code when it is read")
    with _no_pickles():
        try:
            return export.load(path)
        except Exception as error:  # many kinds, of what is no program, or holds what only a pickle could
            head = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(f"{path} could not be read as an exported program, without pickles: {head}") from error


@contextmanager
def _no_pickles() -> Iterator[None]:
    """In the block torch.load reads tensors alone, also where its caller asks for more: torch.export.load does."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
