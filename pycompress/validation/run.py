"""The runs of the model: natively, with ONNX Runtime in the place of the layers, and perturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pycompress.calls import Inputs, only_argument, uncompiled
from pycompress.nn.layer import CompressedLayer
from pycompress.passes import whole
from pycompress.surgery import compressed_layers
from pycompress.validation.checks import Check
from pycompress.validation.formulas import EXACT_ACTIVATIONS, array
from pycompress.validation.outputs import compare_outputs, outputs_of
from pycompress.validation.recurrent import RecurrentCheck
from pycompress.validation.report import PERTURBATION, Report
from pycompress.validation.table import check_of

if TYPE_CHECKING:  # an optional dependency, imported by validate()
    import onnxruntime

Forward = Callable[..., Any]


def validate(model: nn.Module, inputs: Inputs, *, layers: Iterable[str] | None = None) -> Report:
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

    Args:
        model: has at least one compressed layer; also one that ``torch.compile`` made, whose layers run eagerly here.
        inputs: a tensor, a sequence of positional or a mapping of keyword arguments for ``model``.
        layers: names or glob patterns of the layers to compare, all by default. Others always run natively.
    Returns:
        The report. Layers that were never called are listed in it; a layer under several names is there once.
    Raises:
        ValueError: the model has no compressed layer, or a pattern fits none.
        TypeError: inputs of another type, or a model whose output holds no floating-point tensor.
        ImportError: the extra ``pycompress[onnx]`` is not installed.
    """
    from pycompress import onnx  # first: its error names the extra

    import onnxruntime  # isort: skip

    model = uncompiled(model)
    chosen = _choose(compressed_layers(model), layers)
    sessions = {layer: onnx.session(onnx.lower(layer)) for layer in chosen}
    checks = {layer: check_of(name, layer, sessions[layer]) for layer, name in chosen.items()}
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

    inexact = [layer for layer in chosen if checks[layer].floats or layer.activation not in EXACT_ACTIVATIONS]
    perturbed = None
    with whole.without(model):  # each layer is called
        with _forwards(chosen, checked):
            expected = outputs_of(model, inputs)
        with _forwards(chosen, by_onnxruntime):
            actual = outputs_of(model, inputs)
        if inexact:
            with _forwards(inexact, _perturbed()):
                perturbed = outputs_of(model, inputs)
        again = outputs_of(model, inputs)
    in_order += [check for check in checks.values() if check.calls == 0]
    record = compare_outputs(expected, actual, perturbed, again)
    return Report([check.record() for check in in_order], record, onnxruntime.__version__)


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

    def make(_layer: CompressedLayer, native: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            y = native(*args, **kwargs)
            step = max(PERTURBATION, torch.finfo(y.dtype).eps)
            moved = torch.rand(y.shape, generator=generator, dtype=torch.float32, device="cpu") < PERTURBATION / step
            sign = torch.randint(2, y.shape, generator=generator, dtype=torch.int64, device="cpu") * 2 - 1
            return y * (1 + step * sign * moved).to(y.device, y.dtype)

        return forward

    return make
