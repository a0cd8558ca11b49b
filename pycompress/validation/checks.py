"""One layer: its calls are compared as they happen, so that no activations are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pycompress import ops
from pycompress.calls import only_argument
from pycompress.nn.int4 import Int4Linear
from pycompress.nn.int8 import Int8Linear
from pycompress.nn.int8_conv import Int8Conv2d
from pycompress.nn.layer import CompressedLayer
from pycompress.nn.low_rank import LowRankLinear
from pycompress.nn.sparse import SparseLinear
from pycompress.validation import formulas
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
    floats = False  # whether floating-point products are added up, so that y depends on their order
    has_integers = False  # whether there are integers, which must be equal

    def __init__(self, name: str, layer: CompressedLayer, session: onnxruntime.InferenceSession | None) -> None:
        self.name, self.layer = name, layer
        self.session: onnxruntime.InferenceSession = session
        self.calls = self.rows = self.rows_seen = self.max_ulp = 0
        self.relative_error = self.share_of_bound = 0.0
        self.integer_reasons: list[str] = []
        self.output_reasons: list[str] = []

    def seen(self, args: tuple[Any, ...], keywords: Mapping[str, Any], y: Any) -> None:
        """Compares one call of what the layer computes with."""
        self(only_argument(args, keywords).detach(), y)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Compares one call: x gave y. Where an item of x makes several rows of y, in rows that lie evenly spread."""
        kind = self.layer.kind
        x, y = kind.items(x), kind.results(y.detach())
        total = len(y)
        count = min(total, MAX_ROWS - self.rows)
        self.calls += 1
        self.rows_seen += total
        self.rows += count
        if count == 0:
            return
        chosen = torch.arange(count, dtype=torch.int64, device="cpu")
        if total == len(x):
            x = x[:count]
        else:
            chosen = chosen * total // count
        self.compare(x, y.cpu()[chosen], chosen)

    def compare(self, x: Tensor, y: Tensor, chosen: Tensor) -> None:
        """The items x gave, in the chosen rows, y [m, n], m > 0, which lies on the CPU."""
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


class KernelCheck(Check):
    """A layer of an exported file that runs as our own op: y must be equal to the bit."""

    exact = True

    def compare(self, x: Tensor, y: Tensor, chosen: Tensor) -> None:  # noqa: ARG002
        (y_runtime,) = self.session.run(["y"], {"x": formulas.array(x)})
        bound = torch.zeros(y.shape, dtype=torch.float64, device="cpu")
        self._compare_y({"native": y, "ONNX Runtime": torch.from_numpy(y_runtime).to(y.dtype)}, bound)


class FloatCheck(Check):
    """float32 products, added up in whatever order: y of the three parties, each within its own bound of the exact result."""

    exact = False
    floats = True

    def __init__(
        self,
        name: str,
        layer: CompressedLayer,
        session: onnxruntime.InferenceSession,
        formula: Callable[[Array, Any], tuple[Array, ...]] = formulas.numpy_dense,
    ) -> None:
        """formula: of the rows x float32 [m, k], or tokens int64 [m], and the layer: y; how far the layer's own may lie from it;
        and ONNX Runtime's, if that is not as far."""
        super().__init__(name, layer, session)
        self.formula = formula

    def compare(self, x: Tensor, y: Tensor, chosen: Tensor) -> None:
        kind = self.layer.kind
        (y_runtime,) = self.session.run(["y"], {"x": formulas.array(x)})
        rows = kind.rows(x, self.layer.geometry, chosen.to(x.device))
        y_numpy, *bounds = self.formula(formulas.array(rows), self.layer)
        runtime = kind.results(torch.from_numpy(y_runtime))[chosen].numpy()
        self._compare_all(y, runtime, y_numpy, bounds[0], bounds[-1])

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
            bound_numpy = formulas.EPS * np.abs(np.nan_to_num(y_numpy))
        parties = {
            "native": (y, bound),
            "ONNX Runtime": (torch.from_numpy(y_runtime).to(y.dtype), bound_runtime),
            "NumPy": (torch.from_numpy(y_numpy).to(y.dtype), bound_numpy),
        }
        for (name, (a, bound_a)), (other, (b, bound_b)) in combinations(parties.items(), 2):
            self._compare_y({name: a, other: b}, torch.from_numpy(bound_a + bound_b))


WeightOnlyCheck = partial(FloatCheck, formula=formulas.numpy_weight_only)  # quantized weights, and x in floating point
# float32 weights of which the layer multiplies no zeros, but ONNX Runtime does.
SparseCheck = partial(FloatCheck, formula=formulas.numpy_sparse_linear)
FactorsCheck = partial(FloatCheck, formula=formulas.numpy_factors)  # chains of products with float32 factors


class StepsCheck(FloatCheck):
    """Layers that quantize their input, and low-rank ones: all integers must be equal, and t between int8 factors.

    So must y after the exact activations where no floating-point products are added up, but ONNX Runtime's where the sums
    of 4-bit weights are: it takes them in another order. Elsewhere y is compared as in :class:`FloatCheck`.
    """

    def __init__(self, name: str, layer: CompressedLayer, session: onnxruntime.InferenceSession) -> None:
        super().__init__(name, layer, session)
        self.floats = formulas.sums_floats(layer)
        self.exact = not self.floats and layer.activation in formulas.EXACT_ACTIVATIONS
        self.has_integers = len(session.get_outputs()) > 1

    def compare(self, x: Tensor, y: Tensor, chosen: Tensor) -> None:  # noqa: ARG002
        layer, x32 = self.layer, formulas.array(x)
        assert isinstance(layer, Int8Linear | SparseLinear | Int4Linear | LowRankLinear)
        names = [value.name for value in self.session.get_outputs()]
        runtime = dict(zip(names, self.session.run(None, {"x": x32}), strict=True))
        result, native = formulas.numpy_steps(x32, layer), _native_steps(x, layer)
        for name, expected in result.exact.items():
            own = {"native": native[name].cpu().numpy()} if name in native else {}
            self.integer_reasons += disagreements(name, {**own, "ONNX Runtime": runtime[name], "NumPy": expected})
        if self.floats:
            to_the_bit = result.v.dtype == np.float32 and layer.activation in formulas.UNROUNDED_ACTIVATIONS
            bound_numpy = np.zeros(y.shape) if to_the_bit else None
            self._compare_all(y, runtime["y"], result.y, result.own, result.bound, bound_numpy)
            return
        bound = torch.from_numpy(formulas.activation_bound(result.v, layer.activation))
        self._compare_y({"native": y, "ONNX Runtime": torch.from_numpy(runtime["y"]).to(y.dtype)}, bound)


class ConvolutionCheck(Check):
    """int8 convolutions: the integers of whole images and of the chosen positions must be equal, and y after the exact
    activations."""

    has_integers = True

    def __init__(self, name: str, layer: CompressedLayer, session: onnxruntime.InferenceSession) -> None:
        super().__init__(name, layer, session)
        self.exact = layer.activation in formulas.EXACT_ACTIVATIONS

    def compare(self, x: Tensor, y: Tensor, chosen: Tensor) -> None:
        layer, kind = self.layer, self.layer.kind
        assert isinstance(layer, Int8Conv2d)
        walk, numpy = layer.geometry, formulas.int8_convolution(x, layer, chosen)
        names = [value.name for value in self.session.get_outputs()]
        runtime = dict(zip(names, self.session.run(None, {"x": formulas.array(x)}), strict=True))
        fixed = layer.canonical().input_range
        q = ops.int8_quantize(x.flatten(1), layer.activation_bits, fixed)[0].view(x.shape)
        acc = ops.int8_conv2d_accumulate(
            walk.as_image(walk.filled(x)), layer.packed, layer.form, *walk.plane, walk.groups
        )[0]
        acc = walk.from_image(acc)

        def rows(z: Tensor) -> Tensor:
            return kind.results(z)[chosen]

        parties = {"native": q.numpy(), "ONNX Runtime": runtime["q"], "NumPy": numpy.q}
        self.integer_reasons += disagreements("q", {name: z.reshape(len(z), -1) for name, z in parties.items()})
        theirs = rows(torch.from_numpy(runtime["acc"])).numpy()
        sums = {"native": rows(acc).numpy(), "ONNX Runtime": theirs, "NumPy": numpy.acc}
        self.integer_reasons += disagreements("acc", sums)
        bound = torch.from_numpy(formulas.activation_bound(numpy.v, layer.activation))
        self._compare_y({"native": y, "ONNX Runtime": rows(torch.from_numpy(runtime["y"])).to(y.dtype)}, bound)


def _native_steps(x: Tensor, layer: CompressedLayer) -> dict[str, Tensor]:
    """What the kernels show of what lies between x and y: not the accumulators of the factors, for which t and y stand."""
    if not isinstance(layer, LowRankLinear):
        fixed = getattr(layer.canonical(), "input_range", None)
        return _native_product(
            x, layer.weight_type.name, layer.settings, lambda: (layer.packed, layer.form), input_range=fixed
        )
    found: dict[str, Tensor] = {}
    if (bits := layer.activation_bits) is not None:
        t = ops.low_rank_intermediate(x, layer.packed, layer.form)
        found = {"t": t, "down_q": ops.int8_quantize(x, bits)[0], "up_q": ops.int8_quantize(t, bits)[0]}
    if not layer.residual:
        return found
    beside = partial(ops.low_rank_residual, layer.packed, layer.form)
    return {**found, **_native_product(x, layer.residual, layer.settings["residual"], beside, "residual_")}


def _native_product(
    x: Tensor, weight: str, settings: Mapping[str, Any], packed: Callable[[], tuple[Tensor, str]], prefix: str = "",
    input_range: tuple[float, int] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """q, and of int8 values acc, of a weight of this name; nothing where x stays in floating point."""
    accumulate = {"int8": ops.int8_accumulate, "sparse": ops.sparse_accumulate, "int4": None}
    if weight not in accumulate or (bits := settings.get("activation_bits")) is None:
        return {}
    found, sums = {prefix + "q": ops.int8_quantize(x, bits, input_range)[0]}, accumulate[weight]
    return found if sums is None else {**found, prefix + "acc": sums(x, *packed())[0]}


class Absent(Check):
    """A layer of which an exported file has nothing, because the run that was exported never called it: nor must this one."""

    exact = False

    def __init__(self, name: str, layer: CompressedLayer) -> None:
        super().__init__(name, layer, None)

    def seen(self, args: tuple[Any, ...], keywords: Mapping[str, Any], y: Any) -> None:  # noqa: ARG002
        """Counts a call."""
        self.calls += 1

    def record(self) -> LayerRecord:
        """Never OK."""
        found, said = ("diverged", "this run called it") if self.calls else ("not called", "nor did this run call it")
        reason = f"the file has no such layer, {said}"
        return LayerRecord(self.name, 0, 0, None, None, None, None, found, reason)


def weight_only(layer: CompressedLayer) -> bool:
    """Whether the layer has quantized weights and leaves its input in floating point."""
    return layer.settings.get("activation_bits") == 16


def disagreements(what: str, parties: Mapping[str, Array]) -> list[str]:
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
