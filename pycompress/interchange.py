"""Models out of files of other frameworks, and into such files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from torch import fx, nn

from pycompress.calibration import calibrate
from pycompress.calls import Inputs
from pycompress.model import compress, summary
from pycompress.plan import Plan
from pycompress.records import Summary
from pycompress.replacing import FilePath


def export(
    model: nn.Module,
    path: FilePath,
    example_inputs: Inputs,
    dynamic: Mapping[int, str] | Mapping[str, Mapping[int, str]] | None = None,
    *,
    form: str = "exact",
) -> None:
    """Writes a compressed model as one ONNX file, of standard operators or of ours, in which its weights stay compressed.

    ``torch.onnx`` traces the model in evaluation mode, with each compressed layer as one node, in whose place its lowering
    (:func:`pycompress.onnx.lower`) is put. Blocks, embeddings and poolings that run as one op are traced as the modules that they
    were. A layer's nodes and constants bear its name; weights that layers share are stored once. The file is checked, and takes the
    place of an older one whole or not at all; weights of more than 2 GiB go to a second file beside it. What it says of itself
    (``metadata_props``, ``pycompress``) is JSON: our version, the form, and of each layer method and settings.

    Open it by :func:`pycompress.onnx.session`, which sets what ONNX Runtime needs to compute what the model does. What
    ``pc.validate(model, inputs, exported=path)`` finds is whether it does.

    Args:
        model: has at least one compressed layer. It is left as it was.
        example_inputs: as for :func:`validate`. Their tensors are the inputs of the file, by the names of the model's parameters,
            or the keys of a mapping in them; what else is in them is fixed.
        dynamic: which dimensions may have other sizes, by names: ``{0: "batch", 1: "length"}`` of every input, or
            ``{"input_ids": {0: "batch"}, ...}``. None: the first one of every input, and the second one of those of whole numbers
            (tokens, masks).
        form: ``exact``: the integers of our kernels. ``fused``: what runtimes have one operator for (DequantizeLinear and MatMul;
            QuantizeLinear too where ranges are static); layers that quantize each row of their input leave it in floating point.
            ``kernels``: our own kernels, as custom ops of ONNX Runtime (:func:`pycompress.onnx.library`), for linear layers, other
            layers as in ``exact``.
    Raises:
        ValueError: the model has no compressed layer, or one that is prepared for training; a form or dimension that is not there;
            a layer's weight that is read as numbers by another module, or larger than 2 GiB.
        TypeError: a layer without a lowering (it is named); inputs of another type.
        RuntimeError: ``torch.export`` could not trace the model, or ``torch.onnx`` not convert it.
        OSError: the file could not be written; an older one is as it was.
        ImportError: the extra ``pycompress[onnx]`` is not installed.
    """
    from pycompress import onnx  # first: its error names the extra
    from pycompress.onnx.whole_model import export_model

    if form not in onnx.FORMS:
        raise ValueError(f"export: form is {form!r}, expected one of {', '.join(onnx.FORMS)}")
    export_model(model, path, example_inputs, dynamic, form)


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


def compress_onnx(
    path: FilePath, plan: Plan, output: FilePath, *, calibration: Iterable[Inputs] | None = None, form: str = "exact"
) -> Summary:
    """Compresses an ONNX file, which never has to become a PyTorch model: MatMul and Gemm with constant weights, outside of loops
    and branches, are replaced; all else of the file stays as it is, with its names and operators of other domains.

    A constant that is added behind a MatMul is its layer's bias. Weights that other nodes read too (embeddings that are tied to the
    last product) stay. Equal weights of several products are stored once. The file is checked, and takes the place of an older one
    whole or not at all, as that of :func:`export`, and says as much of itself.

    Args:
        path: of the file; its external data must lie below its folder.
        plan: as for :func:`compress`, of the names that :func:`from_onnx` gives the layers; activations stay behind them.
        output: where the new file goes. It may be ``path``.
        calibration: batches for methods that make use of them: each a mapping of the file's inputs, tensors or arrays, or a
            sequence in their order. ONNX Runtime runs the file on them.
        form: as for :func:`export`. ``exact`` and ``fused`` raise the file's opset to what their operators need; ``kernels`` fits
            into any.
    Returns:
        What became of each product; those that cannot be layers are not in it.
    Raises:
        ValueError: the file is none, has no such product or none that the plan compresses, or an opset that cannot be raised; what
            :func:`compress` and :func:`calibrate` raise. TypeError: the plan is none, or calibration is one batch.
        OSError: it cannot be read or written; an older file is as it was.
        ImportError: the extra ``pycompress[onnx]`` is not installed.
    """
    from pycompress import onnx  # first: its error names the extra
    from pycompress.onnx.products import Products, batches_of

    if form not in onnx.FORMS:
        raise ValueError(f"compress_onnx: form is {form!r}, expected one of {', '.join(onnx.FORMS)}")
    products = Products(path)
    seen = None if calibration is None else calibrate(products.layers, batches_of(calibration), plan=plan)
    compress(products.layers, plan, calibration=seen, inplace=True, blocks=False)
    products.write(output, form)
    return summary(products.layers)
