"""The runs of the model: natively, with ONNX Runtime in the place of the layers, and perturbed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pycompress.calls import Inputs, only_argument, uncompiled
from pycompress.nn.layer import CompressedLayer
from pycompress.passes import whole
from pycompress.replacing import FilePath
from pycompress.storage.plan import entry_of
from pycompress.surgery import compressed_layers
from pycompress.validation.checks import Absent, Check, KernelCheck
from pycompress.validation.formulas import EXACT_ACTIVATIONS, array
from pycompress.validation.fused import FusedCheck, as_fused, differs
from pycompress.validation.outputs import SMALLEST_COSINE, SMALLEST_COSINE_OF_FILES, compare_outputs, outputs_of
from pycompress.validation.recurrent import RecurrentCheck
from pycompress.validation.report import PERTURBATION, Report
from pycompress.validation.table import check_of

if TYPE_CHECKING:  # an optional dependency, imported by validate()
    import onnxruntime

Forward = Callable[..., Any]


def validate(
    model: nn.Module, inputs: Inputs, *, layers: Iterable[str] | None = None, exported: FilePath | None = None
) -> Report:  # fmt: skip
    """Compares a compressed model with ONNX Runtime and NumPy, layer by layer and as a whole.

    The model runs three or four times, in evaluation mode and without gradients; it, the inputs and the random state are left as
    they were, also after an exception, and so each run begins with the same. In the first run every layer computes natively, and
    what it was given and gave is compared:

    - int8 weights: the quantized rows q and the accumulators acc must be equal between native, ONNX Runtime and
      NumPy; y must equal ONNX Runtime's after the exact activations (none, relu, relu6, hardswish), and lie
      within :func:`activation_bound` of it after the others;
    - float32 weights: y natively and from ONNX Runtime must lie within the bounds of
      :func:`numpy_sparse_linear` of the exact result, and within their sum of each other. Where a row of x
      holds NaN or Inf, ONNX Runtime, which multiplies the zeros too, has no say: the layer's y must be NaN and
      Inf where NumPy says that a weight meets them, and within its bound elsewhere.
    - int4 weights: q as above; natively y must equal NumPy's after none, relu and relu6, ONNX Runtime's must lie within the bound
      of :func:`numpy_steps`; with 16-bit activations, as for int8 weights with such, all three within the bounds of
      :func:`numpy_weight_only`.
    - low-rank layers: as float32 weights are, by the bounds of :func:`numpy_steps` and :func:`numpy_factors`; q and
      acc of what is int8 in them must be equal, what lies between int8 factors to the bit, and so y where nothing is float32;
      of a residual in int4 q must be equal, and ONNX Runtime's y lie within a bound for the order of its sums;
    - recurrent layers: the integers of every step, y and the last states must be equal;
    - weights that ``validation.table.CHECKS`` does not know: all three within the bounds of :func:`numpy_dense`.

    A convolution is compared as a linear layer on what each position of its result is made of, an embedding token by token.

    For inputs in bfloat16 and float16 the references get them as float32, and their y is rounded to that dtype.

    In the second run ONNX Runtime computes the layers (but not rows with NaN or Inf for float32 weights, in a
    convolution whole images). The outputs must be equal where all weights are int8 and all activations
    exact. Elsewhere a third run tells how far the native model moves when the results of the other layers move by
    PERTURBATION, and ONNX Runtime's outputs must be SMALLEST_COSINE close or about as close as that. A last run is native again:
    where its outputs are not those of the first, the model keeps something between runs that could not be put back. Of such a
    model, and of one that moves far by itself, the report is not OK, and says that no verdict was reached.

    With ``exported`` it is a file of :func:`pycompress.export` that is compared: each layer with the nodes and constants that the
    file has for it (to the bit, where it runs as our own op), and the outputs with those of the whole file, run in ONNX Runtime on
    the same inputs. These are never equal to the bit by promise, since what lies between the layers is in the file too: they must
    be SMALLEST_COSINE_OF_FILES close (SMALLEST_COSINE, in the form ``fused``), or about as close as the native model is to itself
    when the results of its layers move.

    Args:
        model: has at least one compressed layer; also one that ``torch.compile`` made, whose layers run eagerly here.
        inputs: a tensor, a sequence of positional or a mapping of keyword arguments for ``model``.
        layers: names or glob patterns of the layers to compare, all by default. Others always run natively.
        exported: the path of a file that was exported from this model.
    Returns:
        The report. Layers that were never called are listed in it; a layer under several names is there once.
    Raises:
        ValueError: the model has no compressed layer, or a pattern fits none; the file is none that export wrote, or of another
            model.
        TypeError: inputs of another type, or a model whose output holds no floating-point tensor.
        ImportError: the extra ``pycompress[onnx]`` is not installed.
    """
    from pycompress import onnx  # first: its error names the extra

    import onnxruntime  # isort: skip

    model = uncompiled(model)
    chosen = _choose(compressed_layers(model), layers)
    file = None if exported is None else _opened(exported, model)
    if file is None:
        sessions = {layer: onnx.session(onnx.lower(layer)) for layer in chosen}
    else:
        sessions = {layer: onnx.session(file.layer(name)) for layer, name in chosen.items() if name in file.layers}
    form = "exact" if file is None else file.form
    fused = [*filter(differs, compressed_layers(model).values())] if form not in ("exact", "kernels") else []

    def check_for(name: str, layer: CompressedLayer) -> Check:
        if layer not in sessions:
            return Absent(name, layer)
        ours = form == "kernels" and onnx.runs(layer)
        return (KernelCheck if ours else FusedCheck if layer in fused else check_of)(name, layer, sessions[layer])

    checks = {layer: check_for(name, layer) for layer, name in chosen.items()}
    in_order: list[Check] = []

    def checked(layer: CompressedLayer, native: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if checks[layer].calls == 0:
                in_order.append(checks[layer])
            y = native(*args, **kwargs)
            checks[layer].seen(args, kwargs, y)
            return y

        return forward

    def by_onnxruntime(layer: CompressedLayer, native: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            check = checks[layer]
            if isinstance(check, RecurrentCheck):
                return check.by_runtime(*args)
            x = only_argument(args, kwargs).detach()
            y = _run_session(layer, sessions[layer], x)
            if check.floats and not bool(x.isfinite().all()):
                broken = ~x.flatten(-layer.kind.dims).isfinite().all(dim=-1)
                y[broken] = native(*args, **kwargs)[broken]
            return y

        return forward

    # (the rest of a file is computed by ONNX Runtime too, whose norms are not torch's to the bit)
    inexact = [
        layer
        for layer in chosen
        if file is not None or checks[layer].floats or layer.activation not in EXACT_ACTIVATIONS
    ]
    perturbed = None
    with whole.without(model), _forwards(fused, as_fused):  # each layer is called, and computes as the file has it
        with _forwards(chosen, checked):
            expected = outputs_of(model, inputs)
        if file is None:
            with _forwards(chosen, by_onnxruntime):
                actual = outputs_of(model, inputs)
        else:
            actual = file.run(onnx.session(file.path), model, inputs)
        if inexact:
            with _forwards(inexact, _perturbed()):
                perturbed = outputs_of(model, inputs)
        again = outputs_of(model, inputs)
    in_order += [check for check in checks.values() if check.calls == 0]
    # (what a runtime fuses it rounds in its own way: ONNX Runtime makes biases between static ranges integers)
    smallest = SMALLEST_COSINE_OF_FILES if file is not None and form in ("exact", "kernels") else SMALLEST_COSINE
    record = compare_outputs(expected, actual, perturbed, again, smallest)
    return Report([check.record() for check in in_order], record, onnxruntime.__version__)


def _opened(path: FilePath, model: nn.Module) -> Any:
    """The ``Exported`` file, whose layers have to be those of the model."""
    from pycompress.onnx.exported import Exported

    file, layers = Exported(path), compressed_layers(model)
    for name, entry in file.layers.items():
        layer = layers.get(name)
        if layer is None:
            raise ValueError(f"validate: {path} has a layer {name}, which the model has not")
        if own := [key for key, value in json.loads(json.dumps(entry_of(layer))).items() if entry.get(key) != value]:
            raise ValueError(
                f"validate: {path}: {own[0]} of {name} is {entry.get(own[0])!r}, of the model's layer {entry_of(layer)[own[0]]!r}"
            )
    return file


def _choose(layers: Mapping[str, CompressedLayer], patterns: Iterable[str] | None) -> dict[CompressedLayer, str]:
    """The layers that fit any of the patterns, each once, with the first of its names."""
    if not layers:
        raise ValueError("validate: the model has no compressed layer, expected one that compress() returned")
    if isinstance(patterns, str):
        raise TypeError(f"validate: layers is the string {patterns!r}, expected a list of names or patterns")
    patterns = ["*"] if patterns is None else list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"validate: no compressed layer fits {pattern!r}, there are: {', '.join(layers)}")
    chosen: dict[CompressedLayer, str] = {}
    for name, layer in layers.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            chosen.setdefault(layer, name)
    return chosen


@contextmanager
def _forwards(layers: Iterable[CompressedLayer], make: Callable[[CompressedLayer, Forward], Forward]) -> Iterator[None]:
    """Replaces the layers' forward, or what of it computes, by ``make(layer, forward)`` for the length of the block.

    In the instances and not by hooks: a model's own hooks may change what a hook sees before or after them.
    """
    own = {layer: layer.__dict__.get(layer.computes) for layer in layers}
    try:
        for layer in own:
            layer.__dict__[layer.computes] = make(layer, getattr(layer, layer.computes))
        yield
    finally:
        for layer, forward in own.items():
            layer.__dict__.pop(layer.computes, None)
            if forward is not None:
                layer.__dict__[layer.computes] = forward


def _run_session(layer: CompressedLayer, session: onnxruntime.InferenceSession, x: Tensor) -> Tensor:
    """The layer's forward in ONNX Runtime, on x's device and in its dtype; tokens give that of the layer's geometry."""
    dtype = layer.dtype if layer.kind.tokens else x.dtype
    (y,) = session.run(["y"], {"x": array(layer.kind.items(x))})
    shape = (*x.shape[: x.dim() - layer.kind.dims], *y.shape[1:])
    return x.new_empty(shape, dtype=dtype).copy_(torch.from_numpy(y).reshape(shape))


def _perturbed() -> Callable[[CompressedLayer, Forward], Forward]:
    """Native forwards whose results move by PERTURBATION up or down; in 16 bits few do, by one step."""
    generator = torch.Generator(device="cpu").manual_seed(0)  # the model's own random numbers stay the same

    def moved(y: Tensor) -> Tensor:
        step = max(PERTURBATION, torch.finfo(y.dtype).eps)
        some = torch.rand(y.shape, generator=generator, dtype=torch.float32, device="cpu") < PERTURBATION / step
        sign = torch.randint(2, y.shape, generator=generator, dtype=torch.int64, device="cpu") * 2 - 1
        return y * (1 + step * sign * some).to(y.device, y.dtype)

    def make(_layer: CompressedLayer, native: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            y = native(*args, **kwargs)
            return [moved(one) for one in y] if isinstance(y, list) else moved(y)  # (recurrent: the last states, too)

        return forward

    return make
