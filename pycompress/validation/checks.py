"""One layer: its calls are compared as they happen, so that no activations are kept."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pycompress import ops
from pycompress.nn.conv import CompressedConv2d
from pycompress.nn.factors import FactorsLayer
from pycompress.nn.int4 import Int4Linear
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.layer import CompressedLayer
from pycompress.nn.low_rank import LowRankLinear
from pycompress.nn.low_rank_embedding import LowRankEmbedding
from pycompress.nn.sparse import SparseLayer, SparseLinear
from pycompress.validation.formulas import (
    EPS,
    EXACT_ACTIVATIONS,
    activation_bound,
    float32,
    numpy_factors,
    numpy_int4_linear,
    numpy_int8_linear,
    numpy_low_rank_linear,
    numpy_sparse_linear,
    numpy_weight_only,
    patches,
    sums_floats,
    weight_only,
)
from pycompress.validation.report import LayerRecord

if TYPE_CHECKING:  # an optional dependency, imported by validate()
    import onnxruntime

MAX_ROWS = 4096  # rows of input that are compared per layer, over all its calls
MAX_REASONS = 7  # lines of reason that are shown per layer: as many as one call can give

Array = npt.NDArray[Any]


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


class Check:
    """Compares the calls of one layer. A subclass knows by which formula."""

    exact: bool  # whether y of two parties must be equal
    has_integers = False  # whether there are integers, which must be equal

    def __init__(self, name: str, layer: CompressedLayer, session: onnxruntime.InferenceSession) -> None:
        self.name, self.layer, self.session = name, layer, session
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
        self.compare(x, y.cpu())

    def compare(self, x: Tensor, y: Tensor) -> None:
        """x [m, k] gave y [m, n], m > 0; y lies on the CPU."""
        raise NotImplementedError

    def _compare_y(self, parties: Mapping[str, Tensor], bound: Tensor) -> None:
        """y [m, n] of two parties in the layer's dtype; bound float64 [m, n] holds before the rounding to it."""
        (name, y), (other, reference) = parties.items()
        if torch.equal(y, reference):
            return
        same = (y == reference) | (y.isnan() & reference.isnan())
        magnitude = reference.double().abs().nan_to_num(nan=0.0)
        distance = (y.double() - reference.double()).abs().nan_to_num(nan=torch.inf).masked_fill(same, 0.0)
        relative = (distance / magnitude.amax(dim=1, keepdim=True)).masked_fill(same | bound.isinf(), 0.0)
        self.relative_error = max(self.relative_error, float(relative.max()))
        if self.exact:
            self.max_ulp = max(self.max_ulp, int(ulp_distance(y, reference).max()))
        else:
            if (
                y.dtype != torch.float32
            ):  # two values within the bound round at most one step further apart, equal ones alike
                kind = torch.finfo(y.dtype)
                step = kind.eps * magnitude.clamp(min=kind.smallest_normal, max=kind.max)
                bound = torch.where(bound > 0, bound + step, bound)
            share = (distance / bound).masked_fill(same, 0.0)
            share = share.nan_to_num(nan=0.0, posinf=torch.inf)  # Inf of Inf: anything goes
            self.share_of_bound = max(self.share_of_bound, float(share.max()))
        wrong = distance > bound
        if bool(wrong.any()):
            row, column = divmod(int(torch.where(wrong, distance, -1.0).argmax()), y.shape[1])
            self.output_reasons.append(
                f"y: {name} and {other} differ in {int(wrong.sum())} of {y.numel()}, "
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
            integers_equal=not self.integer_reasons if self.has_integers else None,
            max_ulp=self.max_ulp if self.exact else None,
            share_of_bound=None if self.exact else self.share_of_bound,
            relative_error=self.relative_error,
            status="diverged" if reasons else "ok",
            reason="\n".join(reasons),
        )


class IntegerCheck(Check):
    """int8 weights: q and acc must be equal; y too after the activations none and relu."""

    has_integers = True

    def __init__(self, name: str, layer: CompressedLayer, session: onnxruntime.InferenceSession) -> None:
        super().__init__(name, layer, session)
        self.exact = layer.activation in EXACT_ACTIVATIONS

    def compare(self, x: Tensor, y: Tensor) -> None:
        layer = self.layer
        assert isinstance(layer, Int8Linear | SparseLinear)
        x32 = float32(x)
        y_runtime, q_runtime, acc_runtime = self.session.run(["y", "q", "acc"], {"x": x32})
        q_numpy, acc_numpy, v = numpy_int8_linear(x32, layer)
        accumulate = ops.sparse_accumulate if isinstance(layer, SparseLinear) else ops.int8_accumulate
        q = ops.int8_quantize(x, layer.settings["activation_bits"])[0].cpu().numpy()
        acc = accumulate(x, layer.packed)[0].cpu().numpy()
        self.integer_reasons += _disagreements("q", {"native": q, "ONNX Runtime": q_runtime, "NumPy": q_numpy})
        self.integer_reasons += _disagreements("acc", {"native": acc, "ONNX Runtime": acc_runtime, "NumPy": acc_numpy})
        bound = torch.from_numpy(activation_bound(v, layer.activation))
        self._compare_y({"native": y, "ONNX Runtime": torch.from_numpy(y_runtime).to(y.dtype)}, bound)


class FloatCheck(Check):
    """float32 products: y of the three parties, each within its own bound of the exact result."""

    exact = False

    def compare(self, x: Tensor, y: Tensor) -> None:
        x32 = float32(x)
        (y_runtime,) = self.session.run(["y"], {"x": x32})
        self._compare_rows(x32, y, y_runtime)

    def _compare_rows(self, x: Array, y: Tensor, y_runtime: Array) -> None:
        """x float32 [m, k], or int64 [m] for an embedding, gave y [m, n]."""
        if isinstance(self.layer, SparseLayer):
            y_numpy, bound, bound_runtime = numpy_sparse_linear(x, self.layer)
        elif isinstance(self.layer, Int4Linear | Int8Linear):
            y_numpy, bound = numpy_weight_only(x, self.layer)
            bound_runtime = bound
        else:
            assert isinstance(self.layer, FactorsLayer)
            y_numpy, bound = numpy_factors(x, self.layer)
            bound_runtime = bound
        self._compare_all(y, y_runtime, y_numpy, bound, bound_runtime)

    def _compare_all(
        self,
        y: Tensor,
        y_runtime: Array,
        y_numpy: Array,
        bound: Array,
        bound_runtime: Array,
        bound_numpy: Array | None = None,
    ) -> None:
        """y [m, n] of the three parties, and how far each may lie from the exact one: NumPy's by its rounding, if not said."""
        if bound_numpy is None:
            bound_numpy = EPS * np.abs(np.nan_to_num(y_numpy))
        parties = {
            "native": (y, bound),
            "ONNX Runtime": (torch.from_numpy(y_runtime).to(y.dtype), bound_runtime),
            "NumPy": (torch.from_numpy(y_numpy).to(y.dtype), bound_numpy),
        }
        for (name, (a, bound_a)), (other, (b, bound_b)) in combinations(parties.items(), 2):
            self._compare_y({name: a, other: b}, torch.from_numpy(bound_a + bound_b))


class Int4Check(FloatCheck):
    """4-bit weights and 8-bit activations: q must be equal, and y natively and in NumPy after the activations none and relu.

    ONNX Runtime adds up the products in another order, so its y is compared by its bound.
    """

    has_integers = True

    def compare(self, x: Tensor, y: Tensor) -> None:
        layer = self.layer
        assert isinstance(layer, Int4Linear)
        x32 = float32(x)
        y_runtime, q_runtime = self.session.run(["y", "q"], {"x": x32})
        result = numpy_int4_linear(x32, layer)
        q = _quantized(x, 8).cpu().numpy()
        self.integer_reasons += _disagreements("q", {"native": q, "ONNX Runtime": q_runtime, "NumPy": result.q})
        own = activation_bound(result.v, layer.activation) / 2
        bound_numpy = np.zeros(own.shape) if layer.activation in EXACT_ACTIVATIONS else None
        self._compare_all(y, y_runtime, result.y, own, result.bound, bound_numpy)


class LowRankCheck(FloatCheck):
    """A LowRankLinear, by what is int8 or int4 in it: all integers, and t between int8 factors, must be equal.

    So must y after the activations none and relu where nothing is float32, but ONNX Runtime's beside a residual in int4, whose
    products it adds up in another order; elsewhere y is compared as in :class:`FloatCheck`.
    """

    def __init__(self, name: str, layer: LowRankLinear, session: onnxruntime.InferenceSession) -> None:
        super().__init__(name, layer, session)
        self.floats = sums_floats(layer)
        self.exact = not self.floats and layer.activation in EXACT_ACTIVATIONS
        self.has_integers = len(session.get_outputs()) > 1

    def compare(self, x: Tensor, y: Tensor) -> None:
        assert isinstance(self.layer, LowRankLinear)
        x32 = float32(x)
        runtime = dict(
            zip([value.name for value in self.session.get_outputs()], self.session.run(None, {"x": x32}), strict=True)
        )
        result = numpy_low_rank_linear(x32, self.layer)
        native = self._native_integers(x)
        if result.t is not None:
            parties = {"native": native["t"], "ONNX Runtime": runtime["t"], "NumPy": result.t}
            self.integer_reasons += _disagreements("t", parties)
        for name, integers in result.integers.items():
            own = {"native": native[name]} if name in native else {}
            self.integer_reasons += _disagreements(name, {**own, "ONNX Runtime": runtime[name], "NumPy": integers})
        if self.floats:
            to_the_bit = result.v.dtype == np.float32 and self.layer.activation in EXACT_ACTIVATIONS
            bound_numpy = np.zeros(y.shape) if to_the_bit else None
            self._compare_all(y, runtime["y"], result.y, result.bound, result.bound_runtime, bound_numpy)
            return
        bound = torch.from_numpy(activation_bound(result.v, self.layer.activation))
        self._compare_y({"native": y, "ONNX Runtime": torch.from_numpy(runtime["y"]).to(y.dtype)}, bound)

    def _native_integers(self, x: Tensor) -> dict[str, Array]:
        """What the kernels show of what lies between x and y: not the accumulators of the factors, for which t and y stand."""
        layer, found = self.layer, dict[str, Tensor]()
        assert isinstance(layer, LowRankLinear)
        if layer.activation_bits is not None:
            t = ops.low_rank_intermediate(x, layer.packed)
            found = {
                "t": t,
                "down_q": _quantized(x, layer.activation_bits),
                "up_q": _quantized(t, layer.activation_bits),
            }
        bits = layer.settings.get("residual", {}).get("activation_bits")
        if layer.residual == "int4":
            found["residual_q"] = _quantized(x, bits)
        elif bits is not None:
            accumulate = ops.sparse_accumulate if layer.residual == "sparse" else ops.int8_accumulate
            acc = accumulate(x, ops.low_rank_unpack(layer.packed).residual)[0]
            found |= {"residual_q": _quantized(x, bits), "residual_acc": acc}
        return {name: tensor.cpu().numpy() for name, tensor in found.items()}


def _quantized(x: Tensor, activation_bits: int) -> Tensor:
    return ops.int8_quantize(x, activation_bits)[0]


class EmbeddingCheck(FloatCheck):
    """A low-rank embedding. A row is a token."""

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Compares one call: tokens [...] gave y [..., n]."""
        super().__call__(x.reshape(-1, 1), y)

    def compare(self, x: Tensor, y: Tensor) -> None:
        tokens = x[:, 0].cpu().numpy().astype(np.int64)
        (y_runtime,) = self.session.run(["y"], {"x": tokens})
        self._compare_rows(tokens, y, y_runtime)


class ConvolutionCheck(FloatCheck):
    """float32 weights of a convolution. A row is what one position of y is made of."""

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Compares one call: x [N, C, H, W] or [C, H, W] gave y, in positions that lie evenly spread over it."""
        assert isinstance(self.layer, CompressedConv2d)
        x, y = x.reshape(-1, *x.shape[-3:]), y.detach().reshape(-1, *y.shape[-3:]).cpu()
        total = y.numel() // y.shape[1]
        count = min(total, MAX_ROWS - self.rows)
        self.calls += 1
        self.rows_seen += total
        self.rows += count
        if count == 0:
            return
        chosen = np.arange(count) * total // count
        x32 = float32(x)
        (y_runtime,) = self.session.run(["y"], {"x": x32})
        rows = [batch.movedim(1, -1).flatten(0, 2)[chosen] for batch in (y, torch.from_numpy(y_runtime))]
        self._compare_rows(patches(x32, self.layer.geometry, chosen), rows[0], rows[1].numpy())


def check_of(name: str, layer: CompressedLayer, session: onnxruntime.InferenceSession) -> Check:
    """The check that fits the layer's weight."""
    if isinstance(layer, LowRankLinear):
        return LowRankCheck(name, layer, session)
    if isinstance(layer, LowRankEmbedding):
        return EmbeddingCheck(name, layer, session)
    if isinstance(layer, CompressedConv2d):
        return ConvolutionCheck(name, layer, session)
    if isinstance(layer, Int4Linear) and not weight_only(layer):
        return Int4Check(name, layer, session)
    return (FloatCheck if sums_floats(layer) else IntegerCheck)(name, layer, session)


def _disagreements(what: str, parties: Mapping[str, Array]) -> list[str]:
    """One line for every two parties whose values [rows, columns] are not equal; NaN equals NaN."""
    reasons = []
    for (name_a, a), (name_b, b) in combinations(parties.items(), 2):
        if a.shape != b.shape:
            reasons.append(f"{what}: {name_a} has shape {list(a.shape)}, {name_b} {list(b.shape)}")
        elif (differ := (a != b) & ~(np.isnan(a) & np.isnan(b))).any():
            places = np.argwhere(differ)
            row, column = places[0]
            reasons.append(
                f"{what}: {name_a} and {name_b} differ in {len(places)} of {a.size}, "
                f"first [{row}, {column}]: {a[row, column]} and {b[row, column]}"
            )
    return reasons
