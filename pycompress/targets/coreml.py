"""Core ML: a ``.mlpackage`` whose weights are constexpr operators of our integers (https://apple.github.io/coremltools/docs-guides).

The converter has no way for 4-bit weights with zero points, nor for sparse ones. So it is given the model with float weights; in
the program that it makes of that, before anything else is done to it, each weight takes the place of the constant of its floats.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pycompress.nn import CompressedLayer
from pycompress.targets.rounding import NOT_ROUNDED, rounds_rows
from pycompress.targets.source import Source
from pycompress.targets.target import Carried, Target
from pycompress.targets.twins import Encoded, as_floats, factors_of, twin_of
from pycompress.weights import (
    DenseWeight,
    Int4Weight,
    Int8Weight,
    LowRankConv2dWeight,
    LowRankWeight,
    SparseWeight,
    Weight,
)

Shape = tuple[int, ...]
TAKEN = (torch.float32, torch.float16, torch.int32, torch.int64)  # inputs; of whole numbers it makes int32


class CoreMl(Target):
    """One ``.mlpackage`` for iOS 18, macOS 15 or later, whose own floats are float32."""

    name, title, suffix, extra = "coreml", "Core ML", ".mlpackage", "targets-coreml"
    packages = ("coremltools",)

    @property
    def absent(self) -> str:
        return "" if sys.platform == "darwin" else "Core ML runs on macOS only"

    def carried(self, layer: CompressedLayer) -> Carried:
        if layer.kind.recurrent:
            return Carried("refused", "", "recurrent layers have no twin in plain operators")
        parts = _parts(layer.canonical())
        encoding = " + ".join(dict.fromkeys(map(_encoding, parts)))
        if bad := next((part for part in parts if not _known(part)), None):
            return Carried("refused", "", f"Core ML has no operator for {bad.name} weights")
        if reason := next(filter(None, map(_uneven, parts)), ""):
            return Carried("widened", encoding, reason)
        return Carried("kept", encoding, NOT_ROUNDED if rounds_rows(layer, static=True) else "")

    def write(self, source: Source, path: str) -> None:
        import coremltools

        for name, x in source.call.tensors.items():
            if x.dtype not in TAKEN:
                raise ValueError(
                    f"deploy: the input {name} is {x.dtype}, expected one of {', '.join(map(str, TAKEN))} for Core ML"
                )
        found = _Weights()
        program = source.program(lambda name, layer: twin_of(layer, found.encode(name)))
        options: dict[str, Any] = {
            "minimum_deployment_target": coremltools.target.iOS18,
            "compute_precision": coremltools.precision.FLOAT32,
        }
        try:
            inner = coremltools.convert(
                program.run_decompositions({}),
                convert_to="milinternal",
                pass_pipeline=coremltools.PassPipeline.EMPTY,
                **options,
            )
        except Exception as error:
            raise RuntimeError(f"deploy: coremltools could not convert the model: {error}") from error
        found.put_into(inner)
        made = coremltools.convert(inner, convert_to="mlprogram", skip_model_load=True, **options)
        description = made.get_spec()
        _name(description, source)
        coremltools.models.MLModel(description, weights_dir=made.weights_dir, skip_model_load=True).save(path)

    def run(self, path: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        import coremltools

        model = coremltools.models.MLModel(path)
        description = model.get_spec().description
        fed = {}
        for one, x in zip(description.input, inputs.values(), strict=True):
            fed[one.name] = x.detach().cpu().to(torch.float32 if x.is_floating_point() else torch.int32).numpy()
        found = model.predict(fed)
        return [torch.from_numpy(np.asarray(found[one.name])) for one in description.output]


class _Weights:
    """The weights of a model, by the floats that they stand for."""

    def __init__(self) -> None:
        self._by_floats: dict[bytes, tuple[Weight, Shape]] = {}
        self._names: dict[bytes, list[str]] = {}

    def encode(self, name: str) -> Any:
        """For :func:`twin_of` a layer of this name."""

        def encoded(weight: Weight, shape: Shape) -> Encoded:
            floats = as_floats(weight, shape)
            if isinstance(weight, Int8Weight | Int4Weight | SparseWeight) and not _uneven(weight):
                key = _key(floats.weight.values.numpy())  # type: ignore[operator]
                self._by_floats[key] = weight, shape
                self._names.setdefault(key, []).append(name)
            return floats

        return encoded

    def put_into(self, program: Any) -> None:
        """Raises RuntimeError where a weight is not found in the program."""
        from coremltools.converters.mil.mil import Builder
        from coremltools.converters.mil.mil.passes.helper import block_context_manager
        from coremltools.converters.mil.mil.scope import ScopeInfo, ScopeSource

        left = {*self._by_floats}

        @block_context_manager  # type: ignore[untyped-decorator]
        def replace(block: Any) -> None:
            for op in [*block.operations]:
                value = op.outputs[0].val if op.op_type == "const" else None
                if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.ndim < 2:
                    continue
                key = _key(value)
                if key not in self._by_floats:
                    continue
                weight, shape = self._by_floats[key]
                new = _constexpr(Builder, weight, shape, op, f"{op.name}_{weight.name}")
                block.replace_uses_of_var_after_op(anchor_op=op, old_var=op.outputs[0], new_var=new)
                block.remove_ops([op])
                left.discard(key)

        with Builder.scope(ScopeInfo(source=ScopeSource.COREMLTOOLS_GRAPH_PASS, data=["pycompress"])):
            for function in program.functions.values():
                replace(function)
        if left:
            names = sorted({name for key in left for name in self._names[key]})
            raise RuntimeError(
                f"deploy: the weights of {', '.join(names)} are not in what coremltools made of the model: it has changed them, or "
                "the model does not call these layers"
            )


def _key(values: npt.NDArray[Any]) -> bytes:
    return hashlib.sha256(repr(values.shape).encode() + np.ascontiguousarray(values).tobytes()).digest()


def _constexpr(builder: Any, weight: Weight, shape: Shape, before: Any, name: str) -> Any:
    """The operator that gives a weight in float32 of this shape."""
    from coremltools.converters.mil.mil.types.type_mapping import np_uint1_dtype, np_uint4_dtype

    place = {"before_op": before, "name": name}
    rows = (-1, *(1,) * (len(shape) - 1))
    if isinstance(weight, Int8Weight):
        return builder.constexpr_blockwise_shift_scale(
            data=_array(weight.values).reshape(shape), scale=_array(weight.scale).reshape(rows), **place
        )
    if isinstance(weight, Int4Weight):
        return builder.constexpr_blockwise_shift_scale(
            data=_array(weight.integers()).astype(np_uint4_dtype),
            scale=_array(weight.scale.float()),
            offset=_array(weight.zero_points()).astype(np_uint4_dtype),
            **place,
        )
    assert isinstance(weight, SparseWeight)
    mask = np.unpackbits(_array(weight.mask), axis=1, count=weight.k, bitorder="little").reshape(shape)
    mask, values = mask.astype(np_uint1_dtype), _array(weight.values)
    if weight.scale is not None:
        mask, values = builder.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask, nonzero_data=values, scale=_array(weight.scale).reshape(rows), before_op=before
        )
    return builder.constexpr_sparse_to_dense(nonzero_data=values, mask=mask, **place)


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = tensor.numpy()
    return found


def _parts(weight: Weight) -> list[Weight]:
    """The matrices of a weight."""
    if not isinstance(weight, LowRankWeight):
        return [weight]
    return [*factors_of(weight), *([] if weight.residual is None else [weight.residual])]


def _known(weight: Weight) -> bool:
    return isinstance(weight, Int8Weight | Int4Weight | SparseWeight | LowRankConv2dWeight | DenseWeight)


def _uneven(weight: Weight) -> str:
    """Why Core ML has a weight in float32."""
    if isinstance(weight, Int4Weight) and weight.k % weight.group:
        return f"k = {weight.k} is no multiple of the group, {weight.group}"
    return ""


def _encoding(weight: Weight) -> str:
    if isinstance(weight, Int8Weight):
        return "int8, a scale a row"
    if isinstance(weight, Int4Weight) and not _uneven(weight):
        return "uint4, a scale and an offset a group"
    if isinstance(weight, SparseWeight):
        return f"{'int8' if weight.bits == 8 else 'float32'} values and a bit for each place"
    return "float32"


def _name(spec: Any, source: Source) -> None:
    """Inputs and outputs are called as the model calls them, and a dimension that may have other sizes may be 1, too."""
    from coremltools.models.utils import rename_feature

    inside = {output.name for output in _outputs(spec)}
    for ports, names in ((spec.description.input, source.call.tensors), (spec.description.output, source.output_names)):
        for port, name in zip(ports, names, strict=True):
            new = re.sub(r"\W", "_", name)
            while new in inside and new != port.name:
                new = f"{new}_"
            inside.add(new)
            rename_feature(spec, port.name, new)
    for port, free in zip(spec.description.input, source.sizes.values(), strict=True):
        for dimension in free:
            port.type.multiArrayType.shapeRange.sizeRanges[dimension].lowerBound = 1


def _outputs(spec: Any) -> Iterator[Any]:
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                yield from operation.outputs
