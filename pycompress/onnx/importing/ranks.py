"""How many dimensions the result of an operator has, as far as its operands say it."""

from __future__ import annotations

from collections.abc import Sequence

from pycompress.onnx.operators import OPERATORS

_FIRST = {
    "Transpose", "Concat", "Slice", "Pad", "Tile", "Cast", "CastLike", "Softmax", "LogSoftmax", "Hardmax", "CumSum",
    "GatherElements", "ScatterElements", "ScatterND", "Scatter", "Split", "TopK", "Trilu", "EyeLike", "DepthToSpace",
    "SpaceToDepth", "Resize", "Upsample", "AveragePool", "MaxPool", "LpPool", "GlobalAveragePool", "GlobalMaxPool",
    "GlobalLpPool", "Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GroupNormalization",
    "LayerNormalization", "RMSNormalization", "LpNormalization", "LRN", "MeanVarianceNormalization", "QuantizeLinear",
    "DequantizeLinear", "ConvInteger",
}  # fmt: skip
_FIXED = {"Flatten": 2, "Gemm": 2, "NonZero": 2, "Range": 1, "Shape": 1, "Size": 0}
_OTHERS = {
    "Einsum",
    "OneHot",
    "GatherND",
    "Compress",
    "ArgMax",
    "ArgMin",
    "Expand",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Gather",
}


def rank_of(
    operator: str, ranks: Sequence[int | None], keepdims: bool, axes: int | None, sizes: int | None
) -> int | None:
    """None where it is not known.

    Args:
        ranks: of the operands.
        keepdims: whether a reduction keeps its axes.
        axes: how many axes it has, where they are known.
        sizes: how many numbers a constant shape has.
    """
    first = ranks[0] if ranks else None
    if operator in _FIXED:
        return _FIXED[operator]
    if operator == "Unsqueeze":
        return None if first is None or axes is None else first + axes
    if operator == "Squeeze":
        return None if first is None or axes is None else first - axes
    if operator in ("Reshape", "ConstantOfShape"):
        return sizes
    if operator == "Expand":
        return None if first is None or sizes is None else max(first, sizes)
    if operator == "Gather":
        second = ranks[1]
        return None if first is None or second is None else first + second - 1
    if operator.startswith("Reduce") or operator in ("ArgMax", "ArgMin"):
        if keepdims:
            return first
        count = 1 if operator.startswith("Arg") else axes
        return None if first is None or count is None else first - count
    if operator in _FIRST:
        return first
    if operator in _OTHERS or operator not in OPERATORS:
        return None
    known = [rank for rank in ranks if rank is not None]  # what is broadcast
    return max(known) if known and len(known) == len(ranks) else None
