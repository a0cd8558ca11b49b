"""Prove a compressed model: every layer on its real inputs, then the whole model, against ONNX Runtime.

Each layer is computed by three parties: the native kernel, the lowered layer in ONNX Runtime, and NumPy.
Their integers must be equal, and a disagreement between any two is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.model import compressed_layers
from pycompress.nn.int8 import Int8Linear

if TYPE_CHECKING:  # an optional dependency, imported by validate()
    import onnxruntime

MAX_ROWS = 4096  # rows of input that are compared per layer, over all its calls
MAX_REASONS = 7  # lines of reason that are shown per layer: as many as one call can give
# A last-bit difference after gelu or silu flips a rounding in a later layer, that flips more of them, and after a
# few layers the outputs differ by as much as compression itself cost. So no bound can be derived for the outputs;
# they are held against what the native model does to itself when those activations move by PERTURBATION.
SMALLEST_COSINE = 0.999  # always good enough
PERTURBATION = 2.0**-20  # relative; what activation_bound() allows for two evaluations
PERTURBATION_FACTOR = 4.0  # on 1 - cosine
EXACT_ACTIVATIONS = ("none", "relu")
WHOLE_MODEL = "(whole model)"

Array = npt.NDArray[Any]
Forward = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What was found for one layer. The figures are None for a layer that was never called."""

    name: str
    rows: int  # compared
    rows_seen: int  # more than ``rows`` where MAX_ROWS cut them
    integers_equal: bool | None  # q and acc: native, ONNX Runtime and NumPy
    # How far native y is from ONNX Runtime's. After none and relu in ulp_distance(); after the others, whose values near
    # zero are billions of ulps from 0, as a share of activation_bound(). The figure that does not apply is None.
    max_ulp: int | None
    share_of_bound: float | None
    relative_error: float | None  # the largest distance over the largest |y| of its row
    status: str  # "ok", "diverged" or "not called"
    reason: str  # why it diverged or was not compared, one line for each disagreement


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """The floating-point outputs of the whole model: native against every layer computed by ONNX Runtime."""

    tensors: int
    max_difference: float
    cosine: float  # the smallest over the tensors
    perturbed_cosine: float | None  # native against itself, perturbed; None where the outputs must be equal
    status: str  # "ok" or "diverged"
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of :func:`validate`. ``str()`` gives a table whose last line is the verdict."""

    layers: list[LayerRecord]  # in the order of their first call, then those never called
    model: ModelRecord
    onnxruntime_version: str

    @property
    def first_divergence(self) -> str | None:
        """The layer that ran first of those that diverge, WHOLE_MODEL if only the outputs do, or None."""
        for record in self.layers:
            if record.status == "diverged":
                return record.name
        return WHOLE_MODEL if self.model.status == "diverged" else None

    @property
    def not_called(self) -> list[str]:
        """The layers that the run never reached."""
        return [record.name for record in self.layers if record.status == "not called"]

    @property
    def ok(self) -> bool:
        """True where nothing diverged and at least one layer was compared."""
        return self.first_divergence is None and any(record.rows for record in self.layers)

    @property
    def verdict(self) -> str:
        """One line: OK, DIVERGED or NOTHING COMPARED, and what was left out."""
        cut = sum(record.rows < record.rows_seen for record in self.layers)
        left_out = f"; {cut} layer(s) only in the first {MAX_ROWS} rows" if cut else ""
        if self.not_called:
            left_out += f"; NOT CALLED and so not compared: {', '.join(self.not_called)}"
        if self.first_divergence is not None:
            return f"DIVERGED: first at {self.first_divergence}{left_out}"
        if not self.ok:
            return f"NOTHING COMPARED{left_out}"
        compared = len(self.layers) - len(self.not_called)
        version = self.onnxruntime_version
        return f"OK: {compared} layer(s) and the whole model agree with ONNX Runtime {version}{left_out}"

    def __str__(self) -> str:
        header = ("layer", "rows", "integers", "max ulp", "of bound", "relative error", "status")
        rows = [header, *(_cells(record) for record in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        reasons = ["", *(record.reason for record in self.layers)]
        lines = []
        for row, reason in zip(rows, reasons, strict=True):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
            lines += [f"    {line}" for line in reason.splitlines()]
        lines.append(
            f"whole model: {self.model.tensors} output(s), max difference {self.model.max_difference:.3g}, "
            f"cosine {self.model.cosine:.9f}, {self.model.status}"
        )
        if self.model.perturbed_cosine is not None:
            lines.append(
                f"    gelu and silu amplify last bits: moved by {PERTURBATION:.1g}, the native model has cosine "
                f"{self.model.perturbed_cosine:.9f} to itself"
            )
        lines += [f"    {line}" for line in self.model.reason.splitlines()]
        return "\n".join([*lines, self.verdict])


def _cells(record: LayerRecord) -> tuple[str, ...]:
    rows = str(record.rows) if record.rows == record.rows_seen else f"{record.rows} of {record.rows_seen}"
    integers = "-" if record.integers_equal is None else "equal" if record.integers_equal else "DIFFER"
    ulp = "-" if record.max_ulp is None else str(record.max_ulp)
    share = "-" if record.share_of_bound is None else f"{record.share_of_bound:.2f}"
    error = "-" if record.relative_error is None else f"{record.relative_error:.2g}"
    return record.name, rows, integers, ulp, share, error, record.status


def validate(model: nn.Module, inputs: Any, *, layers: Iterable[str] | None = None) -> Report:
    """Compares a compressed model with ONNX Runtime and NumPy, layer by layer and as a whole.

    The model runs two or three times, in evaluation mode and without gradients, and is left as it was, also
    after an exception. In the first run every layer computes natively, and what it was given and gave is
    compared:

    - the quantized rows q and the accumulators acc must be equal between native, ONNX Runtime and NumPy;
    - y must equal ONNX Runtime's after the activations none and relu, and lie within
      :func:`activation_bound` of it after the others. For inputs in bfloat16 and float16 the reference gets
      them as float32, and its y is rounded to that dtype.

    In the second run ONNX Runtime computes the layers. The outputs must be equal where all activations are
    none or relu. Elsewhere a third run tells how far the native model moves when the other activations move by
    PERTURBATION, and ONNX Runtime's outputs must be SMALLEST_COSINE close or about as close as that.

    Args:
        model: has at least one compressed layer.
        inputs: a Tensor, a tuple of positional arguments, or a dict of keyword arguments.
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

    chosen = _choose(compressed_layers(model), layers)
    sessions = {layer: onnx.session(onnx.lower(layer)) for layer in chosen}
    checks = {layer: _Check(name, layer, sessions[layer]) for layer, name in chosen.items()}
    in_order: list[_Check] = []

    def checked(layer: Int8Linear, native: Forward) -> Forward:
        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            if checks[layer].calls == 0:
                in_order.append(checks[layer])
            y = native(*args, **kwargs)
            checks[layer](_only(args, kwargs), y)
            return y

        return forward

    def by_onnxruntime(layer: Int8Linear, _native: Forward) -> Forward:
        return lambda *args, **kwargs: _run_session(sessions[layer], _only(args, kwargs))

    smooth = [layer for layer in chosen if layer.activation not in EXACT_ACTIVATIONS]
    perturbed = None
    with _evaluation(model):
        with _forwards(chosen, checked):
            expected = _outputs(model, inputs)
        with _forwards(chosen, by_onnxruntime):
            actual = _outputs(model, inputs)
        if smooth:
            with _forwards(smooth, _perturbed()):
                perturbed = _outputs(model, inputs)
    in_order += [check for check in checks.values() if check.calls == 0]
    record = _compare_outputs(expected, actual, perturbed)
    return Report([check.record() for check in in_order], record, onnxruntime.__version__)


def _choose(layers: Mapping[str, Int8Linear], patterns: Iterable[str] | None) -> dict[Int8Linear, str]:
    """The layers that fit any of the patterns, each once, with the first of its names."""
    if not layers:
        raise ValueError("validate: the model has no compressed layer, expected one that compress() returned")
    if isinstance(patterns, str):
        raise TypeError(f"validate: layers is the string {patterns!r}, expected a list of names or patterns")
    patterns = ["*"] if patterns is None else list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"validate: no compressed layer fits {pattern!r}, there are: {', '.join(layers)}")
    chosen: dict[Int8Linear, str] = {}
    for name, layer in layers.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            chosen.setdefault(layer, name)
    return chosen


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and each module's own training flag afterwards.

    ``no_grad`` and not ``inference_mode``: a tensor that the model keeps must not make later training fail.
    """
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def _forwards(layers: Iterable[Int8Linear], make: Callable[[Int8Linear, Forward], Forward]) -> Iterator[None]:
    """Replaces the layers' forward by ``make(layer, forward)`` for the length of the block.

    In the instances and not by hooks: a model's own hooks may change what a hook sees before or after them.
    """
    own = {layer: layer.__dict__.get("forward") for layer in layers}
    try:
        for layer in own:
            layer.__dict__["forward"] = make(layer, layer.forward)
        yield
    finally:
        for layer, forward in own.items():
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward


def _only(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """The one argument of a layer's forward."""
    (x,) = (*args, *kwargs.values())
    return x.detach()


def _float32(x: Tensor) -> Array:
    return np.ascontiguousarray(x.detach().float().cpu().numpy())


def _run_session(session: onnxruntime.InferenceSession, x: Tensor) -> Tensor:
    """The layer's forward in ONNX Runtime: x [..., k] to y [..., n] of x's dtype, on x's device."""
    (y,) = session.run(["y"], {"x": _float32(x.reshape(-1, x.shape[-1]))})
    shape = (*x.shape[:-1], y.shape[-1])
    return x.new_empty(shape).copy_(torch.from_numpy(y).reshape(shape))


def _perturbed() -> Callable[[Int8Linear, Forward], Forward]:
    """Native forwards whose results move by PERTURBATION up or down; in 16 bits few do, by one step."""
    generator = torch.Generator().manual_seed(0)  # the model's own random numbers stay the same

    def make(_layer: Int8Linear, native: Forward) -> Forward:
        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            y = native(*args, **kwargs)
            step = max(PERTURBATION, torch.finfo(y.dtype).eps)
            moved = torch.rand(y.shape, generator=generator) < PERTURBATION / step
            sign = torch.randint(2, y.shape, generator=generator) * 2 - 1
            return y * (1 + step * sign * moved).to(y.device, y.dtype)

        return forward

    return make


def numpy_int8_linear(x: Array, layer: Int8Linear) -> tuple[Array, Array, Array]:
    """The int8 formula in NumPy, up to the activation.

    Args:
        x: float32 [m, k]. Rows with NaN or Inf quantize to zeros and go on as NaN.
        layer: gives the weight, the scales and the bias.
    Returns:
        q uint8 [m, k]; acc int64 [m, n], summed in float64, which is exact: all sums stay below 2^31; and
        float32 [m, n], what goes into the activation.
    """
    weight = layer.canonical()
    amax = np.float32(2**weight.activation_bits - 1)
    half_amax, zero, one_half = amax / np.float32(2), np.float32(0), np.float32(0.5)
    finite = np.isfinite(x).all(axis=1, keepdims=True)
    x = np.where(finite, x, zero)
    with np.errstate(all="ignore"):
        low = np.minimum(x.min(axis=1, keepdims=True), zero)
        high = np.maximum(x.max(axis=1, keepdims=True), zero)
        half = one_half * high - one_half * low
        flat = half < np.float32(2.0**-100)
        scale = np.where(flat, zero, half / half_amax)
        inverse = np.where(flat, zero, half_amax / half)
        zero_point = np.clip(np.rint(-low * inverse), zero, amax)
        q = np.clip(np.rint(x * inverse) + zero_point, zero, amax)
        values = weight.values.cpu().numpy().astype(np.float64)
        acc = ((q - zero_point).astype(np.float64) @ values.T).astype(np.int64)
        v = (acc.astype(np.float32) * scale) * _float32(weight.scale)
        if layer.bias is not None:
            v = v + _float32(layer.bias)
    return q.astype(np.uint8), acc, np.where(finite, v, np.float32(np.nan))


def activation_bound(v: Array, activation: str) -> Array:
    """How far two float32 evaluations of ``activation(v)`` may lie apart, elementwise: 0 for none and relu.

    For the others one evaluation errs by at most 8 u |v|, u = 2^-24, and two lie within 16 u |v|. All have
    the form v s with s in [0, 1], and s is 0.5 (1 + erf(v / sqrt 2)) or 1 / (1 + exp(-t)):

    - an implementation's erf is within 4 u, rounding its argument moves it by up to u, and the sum rounds by
      up to u, so half of it is within 3 u;
    - an argument t that is off by 8 u |t| moves s by at most 8 u |t| s (1 - s) < 1.8 u, and an exp off by 4 u
      of its value by 4 u s (1 - s) <= u.

    The sum, quotient and product that remain round by up to u |v| each: 6 u in all, and 8 u covers the rest.
    2^-126 allows for results below the normal range, which an implementation may round to 0. An infinite v
    leaves the result open (Inf, NaN or 0, by the order of the factors); a NaN leaves nothing open.
    """
    if activation in EXACT_ACTIVATIONS:
        return np.zeros(v.shape)
    magnitude = np.where(np.isnan(v), 0.0, np.abs(v.astype(np.float64)))
    return 2 * 8 * 2.0**-24 * magnitude + 2.0**-126


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """How many steps between neighbouring values of their dtype lie between a and b.

    Args:
        a, b: float32, bfloat16 or float16, of one dtype and shape.
    Returns:
        int64 of their shape. The two zeros are one value, and so are all NaN; NaN is 2^32 from any number.
    """
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16

    def ordinal(t: Tensor) -> Tensor:
        integer = t.contiguous().view(bits).to(torch.int64)
        return torch.where(integer < 0, torch.iinfo(bits).min - integer, integer)

    distance = (ordinal(a) - ordinal(b)).abs()
    distance = torch.where(a.isnan() | b.isnan(), 2**32, distance)
    return torch.where(a.isnan() & b.isnan(), 0, distance)


class _Check:
    """Compares the calls of one layer as they happen, so that no activations are kept."""

    def __init__(self, name: str, layer: Int8Linear, session: onnxruntime.InferenceSession) -> None:
        self.name, self.layer, self.session = name, layer, session
        self.exact = layer.activation in EXACT_ACTIVATIONS
        self.calls = self.rows = self.rows_seen = self.max_ulp = 0
        self.relative_error = self.share_of_bound = 0.0
        self.integer_reasons: list[str] = []
        self.output_reasons: list[str] = []

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Compares one call: x [..., k] gave y [..., n]."""
        x, y = x.reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1])
        self.calls += 1
        self.rows_seen += len(x)
        x, y = x[: MAX_ROWS - self.rows], y[: MAX_ROWS - self.rows]
        if len(x) == 0:
            return
        self.rows += len(x)
        x32 = _float32(x)
        y_runtime, q_runtime, acc_runtime = self.session.run(["y", "q", "acc"], {"x": x32})
        q_numpy, acc_numpy, v = numpy_int8_linear(x32, self.layer)
        q = ops.int8_quantize(x, self.layer.activation_bits)[0].cpu().numpy()
        acc = ops.int8_accumulate(x, self.layer.packed)[0].cpu().numpy()
        self.integer_reasons += _disagreements("q", {"native": q, "ONNX Runtime": q_runtime, "NumPy": q_numpy})
        self.integer_reasons += _disagreements("acc", {"native": acc, "ONNX Runtime": acc_runtime, "NumPy": acc_numpy})
        bound = torch.from_numpy(activation_bound(v, self.layer.activation))
        self._compare_y(y.cpu(), torch.from_numpy(y_runtime).to(y.dtype), bound)

    def _compare_y(self, y: Tensor, reference: Tensor, bound: Tensor) -> None:
        """y and reference [m, n] in the layer's dtype; bound float64 [m, n] holds before the rounding."""
        if torch.equal(y, reference):
            return
        same = (y == reference) | (y.isnan() & reference.isnan())
        magnitude = reference.double().abs().nan_to_num(nan=0.0)
        distance = (y.double() - reference.double()).abs().nan_to_num(nan=torch.inf).masked_fill(same, 0.0)
        relative = (distance / magnitude.amax(dim=1, keepdim=True)).masked_fill(same, 0.0)
        self.relative_error = max(self.relative_error, float(relative.max()))
        if self.exact:
            self.max_ulp = max(self.max_ulp, int(ulp_distance(y, reference).max()))
        else:
            if y.dtype != torch.float32:  # two values within the bound round at most one step further apart
                kind = torch.finfo(y.dtype)
                bound = bound + kind.eps * magnitude.clamp(min=kind.smallest_normal, max=kind.max)
            share = (distance / bound).masked_fill(same, 0.0).nan_to_num(nan=0.0)  # Inf of Inf: anything goes
            self.share_of_bound = max(self.share_of_bound, float(share.max()))
        wrong = distance > bound
        if bool(wrong.any()):
            row, column = divmod(int(torch.where(wrong, distance, -1.0).argmax()), y.shape[1])
            self.output_reasons.append(
                f"y: native and ONNX Runtime differ in {int(wrong.sum())} of {y.numel()}, "
                f"worst [{row}, {column}]: {float(y[row, column]):.9g} and "
                f"{float(reference[row, column]):.9g}, expected within {float(bound[row, column]):.3g}"
            )

    def record(self) -> LayerRecord:
        """The findings of all calls so far."""
        if self.calls == 0:
            return LayerRecord(self.name, 0, 0, None, None, None, None, "not called", "the run never reached it")
        reasons = self.integer_reasons + self.output_reasons
        if len(reasons) > MAX_REASONS:
            reasons = [*reasons[:MAX_REASONS], f"and {len(reasons) - MAX_REASONS} more"]
        return LayerRecord(
            name=self.name,
            rows=self.rows,
            rows_seen=self.rows_seen,
            integers_equal=not self.integer_reasons,
            max_ulp=self.max_ulp if self.exact else None,
            share_of_bound=None if self.exact else self.share_of_bound,
            relative_error=self.relative_error,
            status="diverged" if reasons else "ok",
            reason="\n".join(reasons),
        )


def _disagreements(what: str, parties: Mapping[str, Array]) -> list[str]:
    """One line for every two parties whose integers [rows, columns] are not equal."""
    reasons = []
    for (name_a, a), (name_b, b) in combinations(parties.items(), 2):
        if a.shape != b.shape:
            reasons.append(f"{what}: {name_a} has shape {list(a.shape)}, {name_b} {list(b.shape)}")
        elif not np.array_equal(a, b):
            places = np.argwhere(a != b)
            row, column = places[0]
            reasons.append(
                f"{what}: {name_a} and {name_b} differ in {len(places)} of {a.size}, "
                f"first [{row}, {column}]: {a[row, column]} and {b[row, column]}"
            )
    return reasons


def _outputs(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Runs the model without advancing the random state. Its floating-point outputs as float64 copies."""
    with torch.random.fork_rng(devices=[]):
        if isinstance(inputs, Tensor):
            result = model(inputs)
        elif isinstance(inputs, tuple):
            result = model(*inputs)
        elif isinstance(inputs, Mapping):
            result = model(**inputs)
        else:
            raise TypeError(f"validate: inputs is {type(inputs).__name__}, expected a Tensor, a tuple or a dict")
    outputs = {
        path: tensor.detach().to("cpu", torch.float64, copy=True)
        for path, tensor in _tensors(result)
        if tensor.is_floating_point()
    }
    if not outputs:
        kind = type(result).__name__
        raise TypeError(f"validate: the model returned {kind}, expected at least one floating-point tensor in it")
    return outputs


def _tensors(value: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, lists, dicts (also transformers' ModelOutput) and dataclasses."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{path}[{i}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name), f"{path}.{field.name}")


def _compare_outputs(
    expected: dict[str, Tensor], actual: dict[str, Tensor], perturbed: dict[str, Tensor] | None
) -> ModelRecord:
    """perturbed: the outputs of the third run; None where the outputs must be equal."""
    reasons, max_difference, smallest, perturbed_smallest = [], 0.0, 1.0, 1.0
    for path, a in expected.items():
        b = actual.get(path)
        if b is None or a.shape != b.shape:
            shape = "absent" if b is None else list(b.shape)
            reasons.append(f"{path} is {list(a.shape)} with native layers, {shape} with ONNX Runtime's")
            continue
        difference, cosine = _largest_difference(a, b), _cosine(a, b)
        max_difference, smallest = max(max_difference, difference), min(smallest, cosine)
        if perturbed is None:
            if difference > 0:
                reasons.append(f"{path} differs by {difference:.3g}, expected 0")
            continue
        own = _cosine(a, perturbed[path]) if path in perturbed and perturbed[path].shape == a.shape else 1.0
        perturbed_smallest = min(perturbed_smallest, own)
        limit = min(SMALLEST_COSINE, 1 - PERTURBATION_FACTOR * (1 - own))
        if difference == np.inf or cosine < limit:
            reasons.append(f"{path} differs by {difference:.3g}, cosine {cosine:.6f}, expected at least {limit:.6f}")
    return ModelRecord(
        tensors=len(expected),
        max_difference=max_difference,
        cosine=smallest,
        perturbed_cosine=None if perturbed is None else perturbed_smallest,
        status="diverged" if reasons else "ok",
        reason="\n".join(reasons),
    )


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Of two float64 tensors; Inf where one holds NaN or Inf and the other does not hold the same."""
    if a.numel() == 0:
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=torch.inf)).max())


def _cosine(a: Tensor, b: Tensor) -> float:
    """Of two float64 tensors, over the elements that are finite in both; 1 where these are equal."""
    finite = a.isfinite() & b.isfinite()
    a, b = a[finite], b[finite]
    if torch.equal(a, b):
        return 1.0
    return float(torch.dot(a, b) / (a.norm() * b.norm())) if a.any() and b.any() else 0.0
