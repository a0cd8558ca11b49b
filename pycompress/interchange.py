"""Models out of files of other frameworks."""

from __future__ import annotations

import os

from torch import fx


def from_onnx(path: str | os.PathLike[str]) -> fx.GraphModule:
    """An ONNX model as an ``nn.Module``, in evaluation mode.

    Products with constant weights become ``nn.Linear``, ``nn.Conv1d`` to ``nn.Conv3d`` (and transposed), ``nn.Embedding``,
    ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, under the names that the file has for them, so that all that is done to layers works
    on them; norms and activations become modules, too. The rest is a graph of torch calls, whose code can be read
    (``model.print_readable()``), copied, pickled, compiled and exported; sizes that the file leaves open stay open. Weights that
    are equal to the bit are one parameter.

    Args:
        path: of the file. Its external data must lie below its folder, and not behind links.
    Returns:
        A module that takes the inputs of the file by position or by name, and gives its output, or a tuple of them. Its other
        tensors are buffers. Tensors that the file makes of sizes are made on the CPU. An ``nn.Embedding`` takes no tokens below
        zero.
    Raises:
        ImportError: onnx is not installed (the extra ``onnx``).
        NotImplementedError: an operator, or something about it, that is not imported; the node is named.
        ValueError: the file is no ONNX file, or an invalid one.
        OSError: it cannot be read.
    """
    from pycompress.onnx.importing.importer import import_file

    return import_file(path)
