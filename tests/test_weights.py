"""Canonical weights: what holds of every one of the table, the rules of each, versions, and weights of somebody else's."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pycompress import ops
from pycompress.methods import Dense, Int4, Int8, LowRank, Sparse
from pycompress.methods.method import Method
from pycompress.weights import (
    MAX_IN_FEATURES,
    WEIGHTS,
    DenseWeight,
    Field,
    Int4Weight,
    Int8Weight,
    LowRankWeight,
    Setting,
    SparseWeight,
    Weight,
    register,
)
from pycompress.weights.low_rank_conv import DECOMPOSITIONS, MAX_STEP
from pycompress.weights.rules import finite, one_of
from pycompress.weights.weight import OPTIONAL, Nested

N, K = 9, 14
NAN, INF = math.nan, math.inf
TINY = torch.finfo(torch.float32).tiny
PLAIN: dict[str, Method] = {
    "int8": Int8(), "int8 7": Int8(7, 7), "int8 16": Int8(16), "int4": Int4(), "int4 symmetric": Int4(64, symmetric=True),
    "sparse": Sparse(0.3), "sparse int8": Sparse(0.3, bits=8), "dense": Dense(),
}  # fmt: skip
RESIDUALS: dict[str, Method | None] = {"": None, **{name: m for name, m in PLAIN.items() if name != "int8 16"}}
METHODS: dict[str, Method] = {
    **PLAIN,
    **{
        f"low_rank {bits} {name}": LowRank(4, bits=bits, residual=method, rank_guard=False)
        for bits in (32, 8)
        for name, method in RESIDUALS.items()
    },
    **{
        f"conv {kind}": LowRank(3, decomposition=kind, rank_guard=False).for_convolution((N, 2, 7, 1), (1, 1))
        for kind in DECOMPOSITIONS
    },
}
EACH = pytest.mark.parametrize("name", METHODS)


def example(name: str) -> Weight:
    torch.manual_seed(0)
    return METHODS[name].compress(torch.randn(N, K))


def same(a: Weight, b: Weight) -> bool:
    pairs = zip(a.tensors().items(), b.tensors().items(), strict=True)
    return type(a) is type(b) and a.settings() == b.settings() and all(
        m == n and torch.equal(s, t) for (m, s), (n, t) in pairs
    )  # fmt: skip


def test_the_table_has_a_weight_of_each_name() -> None:
    assert {name: kind.name for name, kind in WEIGHTS.items()} == {name: name for name in WEIGHTS}
    assert {example(name).name for name in METHODS} == set(WEIGHTS)
    assert (MAX_IN_FEATURES, MAX_STEP) == (ops.MAX_IN_FEATURES, ops.MAX_STEP)


# --- what holds of all ------------------------------------------------------------------------------------------------


@EACH
def test_the_stored_form_is_all_of_it(name: str) -> None:
    weight, kind = example(name), type(example(name))
    rest = json.loads(json.dumps(weight.settings()))
    tensors = weight.tensors()
    assert kind.version == 2 and weight.shape == (N, K)
    assert same(kind.from_tensors((N, K), tensors, rest), weight)
    assert same(kind.from_parts((N, K), weight.parts(), rest), weight)
    assert same(pickle.loads(pickle.dumps(weight)), weight)
    assert torch.equal(kind.from_tensors((N, K), tensors, rest).decompress(), weight.decompress())
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == kind.expected((N, K), rest)
    assert list(tensors) == list(kind.expected((N, K), rest)), "in the order of the state"
    assert kind.names(rest) == dict(zip(weight.parts(), tensors, strict=True))
    assert kind.complete((N, K), rest) == rest == kind.measured(tensors, rest)
    assert kind.migrate(2, tensors, rest) == (tensors, rest)
    assert weight == weight and weight != example(name), "by identity, as tensors have no truth"
    shown = ", ".join(f"{key}={value!r}" for key, value in rest.items())
    assert repr(weight) == f"{kind.__name__}(shape=[9, 14]{', ' if rest else ''}{shown})"
    with pytest.raises(AttributeError):
        weight.name = "other"  # type: ignore[misc]


def test_low_rank_is_its_factors_and_the_rest() -> None:
    for name in METHODS:
        weight = example(name)
        if isinstance(weight, LowRankWeight):
            down, up = weight.factors()
            rest = 0 if weight.residual is None else weight.residual.decompress()
            assert torch.equal(up @ down + rest, weight.decompress())


@EACH
def test_settings_are_all_there_and_no_others(name: str) -> None:
    weight, kind = example(name), type(example(name))
    rest = weight.settings()
    options = {option.name: option for option in kind.options}
    for key in rest:
        others = {k: v for k, v in rest.items() if k != key}
        if options[key].default is not OPTIONAL:
            with pytest.raises(ValueError, match=rf"{kind.__name__}: the settings are \[.*{key} is None, expected "):
                kind.expected((N, K), others)
    for extra in ({"code": "import os"}, {"residuals": {}}, {"format": 2}, {"version": 1}):
        (key,) = extra
        expected = "none" if not rest else r"\["
        with pytest.raises(
            ValueError, match=rf"{kind.__name__}: the settings are .*, expected {expected}.*not \['{key}'\]"
        ):
            kind.expected((N, K), {**rest, **extra})


@EACH
def test_settings_of_a_hostile_file(name: str) -> None:
    weight, kind = example(name), type(example(name))
    rest = weight.settings()
    for key, value in rest.items():
        hostile = [
            None,
            True,
            16.5,
            float(value) if isinstance(value, int) else 2.0,
            str(value),
            "x",
            [8],
            {},
            -1,
            2**60,
        ]
        for bad in hostile:
            if (type(bad) is type(value) and bad == value) or (key == "symmetric" and bad is True):
                continue
            for make in (kind.expected, lambda shape, settings: kind.from_tensors(shape, weight.tensors(), settings)):
                with pytest.raises(ValueError, match=f"{kind.__name__}: .*{key}('s method)? is "):
                    make((N, K), {**rest, key: bad})


@EACH
@pytest.mark.parametrize("shape", [(0, K), (N, 0), (-1, K), (N, 65537), (9.0, K), (True, K), ("9", K)])
def test_hostile_shapes(name: str, shape: Any) -> None:
    weight = example(name)
    if type(weight) is Int8Weight and 0 in shape:
        assert Int8Weight.expected(shape, weight.settings()), "which may be empty"
        return
    with pytest.raises(ValueError, match=r"Weight: the shape is \[.*\], expected \[n.*, \d to 65536\]"):
        type(weight).expected(shape, weight.settings())


@EACH
def test_hostile_tensors(name: str) -> None:
    weight, kind = example(name), type(example(name))
    tensors, rest = weight.tensors(), weight.settings()
    for key, tensor in tensors.items():
        missing = {k: t for k, t in tensors.items() if k != key}
        for others in (missing, {**tensors, "other": tensor}, {"other": tensor}):
            with pytest.raises(ValueError, match=rf"{kind.__name__}: the tensors are .*, expected"):
                kind.from_tensors((N, K), others, rest)
        for wrong in (tensor.to(torch.float64), torch.cat([tensor, tensor]), tensor[1:], tensor.flatten()[None, None]):
            with pytest.raises(ValueError, match=f"{kind.__name__}: {key} is torch.*, expected"):
                kind.from_tensors((N, K), {**tensors, key: wrong}, rest)
        with pytest.raises(ValueError, match=r"Weight: .* is on meta, expected the CPU"):
            kind.from_tensors((N, K), {**tensors, key: tensor.to("meta")}, rest)
        for bad in (NAN, INF) if tensor.is_floating_point() else ():
            broken = tensor.clone()
            broken[(-1,) * broken.dim()] = bad
            with pytest.raises(ValueError, match=r"Weight: .*(NaN or Inf|positive finite|a scale is not between)"):
                kind.from_tensors((N, K), {**tensors, key: broken}, rest)
        if tensor.dtype == torch.int8:
            with pytest.raises(ValueError, match=r"Weight: .* holds -128, expected \[-(127|63), (127|63)\]"):
                kind.from_tensors((N, K), {**tensors, key: torch.full_like(tensor, -128)}, rest)
        if key.endswith("scale"):
            for bad in (-1.0, 0.0):
                with pytest.raises(ValueError, match=r"positive finite|a scale is not between"):
                    kind.from_tensors((N, K), {**tensors, key: tensor * bad}, rest)


def test_nothing_is_allocated_for_what_a_file_claims() -> None:
    huge = SparseWeight.expected((2**40, 65536), {"bits": 32, "nnz": 2**55})
    assert huge["sparse_values"] == ((2**55,), torch.float32)
    huge = LowRankWeight.expected(
        (2**40, 65536), {"rank": 65536, "bits": 32, "residual": {"method": "dense", "version": 2}}
    )
    assert huge["low_rank_residual_dense_weight"][0] == (2**40, 65536)


def test_a_state_may_bring_other_sizes() -> None:
    for settings, tensors, expected in (
        ({"bits": 32, "nnz": 3}, SparseWeight.from_dense(torch.eye(5)).tensors(), {"bits": 32, "nnz": 5}),
        ({"rank": 9, "bits": 32}, example("low_rank 32 ").tensors(), {"rank": 4, "bits": 32}),
    ):
        kind = SparseWeight if "nnz" in settings else LowRankWeight
        assert kind.measured(tensors, settings) == expected
    weight = example("low_rank 32 sparse")
    rest = weight.settings()
    other = {**rest, "rank": 1, "residual": {**rest["residual"], "nnz": 0}}
    assert type(weight).measured(weight.tensors(), other) == rest
    tucker = example("conv tucker")
    assert type(tucker).measured(tucker.tensors(), {**tucker.settings(), "ranks": [1, 1]}) == tucker.settings()


# --- the rules of each ------------------------------------------------------------------------------------------------


def int8(**changes: Any) -> Weight:
    fields = {
        "values": torch.ones(2, 3, dtype=torch.int8),
        "scale": torch.ones(2),
        "activation_bits": 8,
        "weight_bits": 8,
    }
    return Int8Weight(**{**fields, **changes})


def int4(**changes: Any) -> Weight:
    fields = {
        "values": torch.zeros(3, 34, dtype=torch.uint8), "scale": torch.ones(3, 3, dtype=torch.bfloat16),
        "zero_point": torch.zeros(3, 2, dtype=torch.uint8), "k": 67, "group": 32, "activation_bits": 8,
    }  # fmt: skip
    return Int4Weight(**{**fields, **changes})


def int4_scale(value: float) -> dict[str, Tensor]:
    scale = torch.ones(3, 3, dtype=torch.bfloat16)
    scale[2, 1] = value
    return {"scale": scale}


def sparse8(**changes: Any) -> Weight:
    fields = {
        "mask": torch.tensor([[0b101], [0b010]], dtype=torch.uint8), "values": torch.tensor([1, -2, 3], dtype=torch.int8),
        "k": 3, "scale": torch.ones(2), "activation_bits": 7,
    }  # fmt: skip
    return SparseWeight(**{**fields, **changes})


def sparse(**changes: Any) -> Weight:
    return sparse8(**{"values": torch.tensor([1.0, -2.0, 3.0]), "scale": None, "activation_bits": None, **changes})


def low_rank(**changes: Any) -> Weight:
    return LowRankWeight(**{"down": torch.ones(2, 5), "up": torch.ones(4, 2), **changes})


INTEGERS = {"down": torch.ones(2, 5).char(), "up": torch.ones(4, 2).char(), "down_scale": torch.ones(2)}
U8, I8, F64, META = torch.uint8, torch.int8, torch.float64, torch.device("meta")
GOOD = [int8(), int4(), sparse8(), sparse(), low_rank()]
BAD: list[tuple[Any, dict[str, Any], str]] = [
    (int8, {"values": torch.ones(2, 3)}, r"values is torch.float32 \[2, 3\], expected torch.int8 \[n, k\]"),
    (int8, {"values": torch.ones(6, dtype=I8)}, r"values is torch.int8 \[6\], expected torch.int8 \[n, k\]"),
    (int8, {"values": torch.full((2, 3), -128, dtype=I8)}, r"values holds -128, expected \[-127, 127\]"),
    (int8, {"values": torch.full((2, 3), 64, dtype=I8), "weight_bits": 7}, r"values holds 64, expected \[-63, 63\]"),
    (int8, {"values": torch.full((2, 3), -64, dtype=I8), "weight_bits": 7}, r"values holds -64, expected \[-63, 63\]"),
    (int8, {"scale": torch.ones(3)}, r"\[3\], expected torch.float32 \[2\]"),
    (int8, {"scale": torch.ones(2, 1)}, r"\[2, 1\], expected torch.float32 \[n\]"),
    (int8, {"scale": torch.ones(2, dtype=F64)}, "torch.float64"),
    (int8, {"scale": torch.ones(2, dtype=torch.bfloat16)}, "torch.bfloat16"),
    (int8, {"activation_bits": 6}, "activation_bits is 6, expected 7, 8 or 16"),
    (int8, {"weight_bits": 9}, "weight_bits is 9, expected 7 or 8"),
    (int4, {"values": torch.zeros(3, 33, dtype=U8)}, r"int4_values is torch.uint8 \[3, 33\].*\[3, 34\]"),
    (int4, {"values": torch.zeros(3, 34, dtype=I8)}, "values is torch.int8"),
    (int4, {"values": torch.zeros(34, dtype=U8)}, r"values is torch.uint8 \[34\]"),
    (int4, {"values": torch.full((3, 34), 16, dtype=U8)}, "values has bits set behind the last of 67"),
    (int4, {"values": torch.zeros(0, 34, dtype=U8)}, r"\[0, 67\]"),
    (int4, {"values": torch.zeros(3, 34, dtype=U8, device=META)}, "int4_values is on meta, expected the CPU"),
    (int4, {"zero_point": torch.zeros(3, 3, dtype=U8)}, r"int4_zero_point is torch.uint8 \[3, 3\]"),
    (int4, {"zero_point": torch.full((3, 2), 255, dtype=U8)}, "zero_point has bits set behind the last of 3"),
    (int4, {"scale": torch.ones(3, 2, dtype=torch.bfloat16)}, r"int4_scale is torch.bfloat16 \[3, 2\]"),
    (int4, {"scale": torch.ones(3, 3)}, "scale is torch.float32"),
    (int4, {"k": 66}, r"has bits set|\[3, 34\]"),
    (int4, {"k": 0}, r"the shape is \[3, 0\]"),
    (int4, {"k": True}, r"the shape is \[3, True\]"),
    (int4, {"group": 16}, "group is 16, expected 32, 64 or 128"),
    (int4, {"group": 32.0}, "group is 32.0"),
    (int4, {"activation_bits": 7}, "activation_bits is 7, expected 8 or 16"),
    *((int4, int4_scale(value), "a scale is not between") for value in (0, -1, TINY / 2, 2.0**125, INF, NAN)),
    *((sparse8, {"k": k}, r"the shape is \[2, .*\], expected \[n > 0, 1 to 65536\]") for k in (0, 65537, 3.0, True)),
    (sparse8, {"k": 9}, r"mask is torch.uint8 \[2, 1\], expected torch.uint8 \[2, 2\]"),
    (sparse8, {"mask": torch.ones(2, 1)}, r"mask is torch.float32 \[2, 1\], expected torch.uint8 \[n, ceil\(k / 8\)\]"),
    (sparse8, {"mask": torch.ones(2, 1, dtype=torch.bool)}, "mask is torch.bool"),
    (sparse8, {"mask": torch.ones(3, dtype=U8)}, r"mask is torch.uint8 \[3\]"),
    (sparse8, {"mask": torch.ones(0, 1, dtype=U8)}, r"the shape is \[0, 3\], expected \[n > 0"),
    (sparse8, {"mask": torch.ones(2, 1, dtype=U8, device=META)}, "sparse_mask is on meta, expected the CPU"),
    (sparse8, {"values": torch.ones(3, dtype=I8, device=META)}, "sparse_values is on meta"),
    (sparse8, {"scale": torch.ones(2, device=META)}, "sparse_scale is on meta"),
    (sparse8, {"mask": torch.tensor([[0b11], [0b1000]], dtype=U8)}, "row 1 of the mask has bits set behind k = 3"),
    (sparse8, {"mask": torch.tensor([[0b10000011], [0]], dtype=U8)}, "row 0 of the mask has bits set behind"),
    (sparse8, {"values": torch.ones(2, dtype=I8)}, "there are 2 values, the mask has 3 bits set"),
    (sparse8, {"values": torch.ones(4, dtype=I8)}, "there are 4 values, the mask has 3 bits set"),
    (sparse8, {"values": torch.ones(3, 1, dtype=I8)}, r"values is torch.int8 \[3, 1\]"),
    (sparse8, {"values": torch.ones(3, dtype=F64)}, "values is torch.float64"),
    (sparse8, {"values": torch.ones(3, dtype=U8)}, "values is torch.uint8"),
    (sparse8, {"values": torch.tensor([1, 0, 3], dtype=I8)}, "1 of the values are zero"),
    (sparse8, {"values": torch.tensor([1, -128, 3], dtype=I8)}, r"values holds -128, expected \[-127, 127\]"),
    (sparse, {"values": torch.tensor([0.0, -0.0, 1.0])}, "2 of the values are zero"),
    (sparse, {"values": torch.tensor([1.0, NAN, INF])}, "values holds NaN or Inf, .*: 2 are not"),
    (sparse, {"scale": torch.ones(2)}, "the tensors are .*'sparse_scale'.*, expected .*'sparse_values'.$"),
    (sparse, {"activation_bits": 7}, r"expected \['bits', 'nnz'\], not \['activation_bits'\]"),
    (sparse8, {"activation_bits": None}, "activation_bits is None, expected 7 or 8"),
    (sparse8, {"activation_bits": 6}, "activation_bits is 6"),
    (sparse8, {"activation_bits": 8.0}, "activation_bits is 8.0"),
    (sparse8, {"scale": None}, "the tensors are .*, expected .*'sparse_scale'"),
    (sparse8, {"scale": torch.ones(3)}, r"scale is torch.float32 \[3\], expected torch.float32 \[2\]"),
    (sparse8, {"scale": torch.ones(2, 1)}, r"\[2, 1\], expected torch.float32 \[n\]"),
    (sparse8, {"scale": torch.ones(2, dtype=F64)}, "scale is torch.float64"),
    *(
        (make, {"scale": torch.tensor([1.0, bad])}, "a scale is not a positive finite number")
        for make in (int8, sparse8)
        for bad in (0.0, -1.0, NAN, INF)
    ),
    (low_rank, {"up": torch.ones(4, 3)}, r"up is torch.float32 \[4, 3\], expected torch.float32 \[4, 2\]"),
    (low_rank, {"up": torch.ones(4, 2, dtype=I8)}, "up is torch.int8"),
    (low_rank, {"down": torch.ones(5), "up": torch.ones(4, 1)}, r"down is torch.float32 \[5\], expected .*float32 or .*int8 \["),
    (low_rank, {"down": torch.ones(2, 5).double(), "up": torch.ones(4, 2).double()}, "down is torch.float64"),
    (low_rank, {"down": torch.ones(5, 5), "up": torch.ones(4, 5)}, r"rank is 5, expected 1 to 4 for a weight \[4, 5\]"),
    (low_rank, {"down": torch.ones(0, 5), "up": torch.ones(4, 0)}, "rank is 0"),
    (low_rank, {"down": torch.ones(2, 5, device=META)}, "low_rank_down is on meta, expected the CPU"),
    (low_rank, {"down_scale": torch.ones(2)}, r"the tensors are .*_scale'\], expected \['low_rank_down', 'low_rank_up'\]"),
    (low_rank, {"activation_bits": 7}, r"not \['activation_bits'\]"),
    (low_rank, {**INTEGERS, "up_scale": torch.ones(4)}, "activation_bits is None"),
    (low_rank, {**INTEGERS, "activation_bits": 8}, "the tensors are .*, expected .*'low_rank_up_scale'"),
    (low_rank, {"residual": torch.ones(4, 5)}, "the residual is Tensor, expected .*Int8Weight"),
    (low_rank, {"residual": low_rank()}, "the residual is LowRankWeight, expected .*Int8Weight"),
    (low_rank, {"residual": Int4(activation_bits=16).compress(torch.ones(4, 5))}, "activation_bits is 16, expected 8"),
    (low_rank, {"residual": Int8(16).compress(torch.ones(4, 5))}, "activation_bits is 16, expected 7 or 8"),
    (low_rank, {"residual": DenseWeight(torch.ones(4, 6))}, r"the residual is \[4, 6\], expected \[4, 5\]"),
    (DenseWeight, {"weight": torch.ones(3, 5).double()}, "weight is torch.float64"),
    (DenseWeight, {"weight": torch.ones(3)}, r"\[3\], expected torch.float32 \[n, k\]"),
    (DenseWeight, {"weight": torch.full((1, 1), INF)}, "NaN or Inf"),
    (DenseWeight, {"weight": torch.ones(3, 5, device=META)}, "on meta"),
    (DenseWeight, {"weight": torch.ones(3, 0)}, "the shape is"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "changes", "message"), BAD)
def test_what_a_canonical_weight_must_be(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Weight: .*{message}"):
        make(**changes)


SETTINGS: list[tuple[type[Weight], dict[str, Any], str]] = [
    (Int4Weight, {}, "group is None"),
    (Int4Weight, {"group": 32, "symmetric": 1, "activation_bits": 8}, "symmetric is 1, expected True or False"),
    (SparseWeight, {}, "bits is None, expected 8 or 32"),
    (SparseWeight, {"bits": 32}, "nnz is None, expected 0 to 126"),
    (SparseWeight, {"bits": 32, "nnz": 127}, r"nnz is 127, expected 0 to 126 for a weight \[9, 14\]"),
    (SparseWeight, {"bits": 32, "nnz": 1, "activation_bits": 7}, r"the settings are .*, not \['activation_bits'\]"),
    (SparseWeight, {"bits": 8, "nnz": 1}, r"the settings are \['bits', 'nnz'\]: activation_bits is None, expected 7 or 8"),
    (SparseWeight, {"bits": 8, "nnz": 1, "activation_bits": 9}, "activation_bits is 9, expected 7 or 8"),
    (DenseWeight, {"bits": 32}, "expected none"),
    *(
        (LowRankWeight, {"rank": 4, "bits": 8, "activation_bits": 7, "residual": None, **change}, message)
        for change, message in (
            ({"rank": None}, r"rank is None, expected 1 to 9 for a weight \[9, 14\]"),
            ({"rank": 10}, "rank is 10"),
            ({"bits": 16}, "bits is 16, expected 8 or 32"),
            ({}, "residual is None, expected a dictionary"),
            ({"residual": []}, r"residual is \[\]"),
            ({"residual": {}}, "method is None, expected one of .*int8"),
            ({"residual": {"method": "low_rank", "rank": 1, "bits": 32}}, "method is 'low_rank'"),
            ({"residual": {"method": ["int8"]}}, r"method is \['int8'\]"),
            ({"residual": {"method": "int8"}}, "activation_bits is None, expected 7, 8 or 16"),
            ({"residual": {"method": "int8", "activation_bits": 8, "weight_bits": 8, "residual": {}}}, "the settings are"),
            ({"residual": {"method": "int4", "group": 16, "symmetric": True, "activation_bits": 8}}, "group is 16"),
            ({"residual": {"method": "int4", "group": 32, "activation_bits": 8}}, "symmetric is None, expected True or False"),
            ({"residual": {"method": "sparse", "bits": 32, "nnz": 127}}, "nnz is 127, expected 0 to 126"),
            ({"residual": {"method": "dense", "nnz": 3}}, "expected none"),
            ({"residual": {"method": "dense", "version": 3}}, "DenseWeight: the version is 3, expected 1 to 2"),
            ({"residual": {"method": "dense", "version": "1"}}, "DenseWeight: the version is '1', expected 1 to 2"),
        )
    ),
    (LowRankWeight, {"rank": 4, "bits": 32, "activation_bits": 7}, "the settings are"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "message"), SETTINGS)
def test_settings_that_are_refused(kind: type[Weight], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind.expected((N, K), settings)


def test_tensors_that_are_not_those_of_the_settings() -> None:
    tensors, good = int4().tensors(), int4().settings()
    with pytest.raises(ValueError, match="the tensors are"):
        Int4Weight.from_tensors((3, 67), tensors, {**good, "symmetric": True})
    with pytest.raises(ValueError, match="int4_scale is"):
        Int4Weight.from_tensors((3, 67), tensors, {**good, "group": 64})
    with pytest.raises(ValueError, match="sparse_values is"):
        SparseWeight.from_tensors((2, 3), sparse8().tensors(), {**sparse8().settings(), "nnz": 2})
    with pytest.raises(ValueError, match="bits set"):
        SparseWeight.from_tensors(
            (2, 3), {**sparse8().tensors(), "sparse_mask": torch.zeros(2, 1, dtype=U8)}, sparse8().settings()
        )
    with pytest.raises(ValueError, match=r"the tensors are \['values'\]"):
        DenseWeight.from_parts((2, 3), {"values": torch.ones(2, 3)}, {})


# --- versions, defaults, and weights of somebody else's ---------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Halves(Weight):
    """float16 numbers; of its first version they were stored negated, as ``minus``."""

    name: ClassVar[str] = "halves"
    version: ClassVar[int] = 2
    fields: ClassVar[tuple[Field, ...]] = (Field("values", torch.float16, "n, k", finite),)
    options: ClassVar[tuple[Setting, ...]] = (Setting("activation_bits", one_of(16, 8), default=16),)

    values: Tensor
    activation_bits: int = 16

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def decompress(self) -> Tensor:
        return self.values.float()

    @classmethod
    def migrate(
        cls, version: object, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        tensors, settings = super().migrate(version, tensors, settings)
        return ({"halves_values": -tensors["halves_minus"]}, settings) if version == 1 else (tensors, settings)


class MinusHalves(Halves):
    version = 1
    fields = (Field("minus", torch.float16, "n, k"),)
    options = ()


Halves.older = {1: MinusHalves}
VALUES = torch.randn(4, 5).half()


@pytest.fixture
def halves() -> Iterator[type[Halves]]:
    yield register(Halves)
    del WEIGHTS["halves"]


def test_an_older_version_is_migrated() -> None:
    assert Halves.of_version(1).expected((4, 5), {}) == {"halves_minus": ((4, 5), torch.float16)}
    tensors, settings = Halves.migrate(1, {"halves_minus": -VALUES}, {})
    assert torch.equal(Halves.from_tensors((4, 5), tensors, settings).values, VALUES)
    tensors, settings = Halves.migrate(2, {"halves_values": VALUES}, {"activation_bits": 8})
    assert Halves.from_tensors((4, 5), tensors, settings).activation_bits == 8
    for version in (0, 3, True, "1", None, 1.0):
        with pytest.raises(ValueError, match=f"Halves: the version is {version!r}, expected 1 to 2"):
            Halves.migrate(version, {"halves_values": VALUES}, {})


def test_a_setting_with_a_default_may_be_missing() -> None:
    weight = Halves.from_tensors((4, 5), {"halves_values": VALUES}, {})
    assert weight.settings() == Halves.complete((4, 5), {}) == {"activation_bits": 16}
    with pytest.raises(ValueError, match="Halves: activation_bits is None, expected 16 or 8"):
        Halves.from_tensors((4, 5), {"halves_values": VALUES}, {"activation_bits": None})


def test_a_registered_weight_is_a_residual(halves: type[Halves]) -> None:
    @dataclass(frozen=True)
    class ToHalves:
        name: ClassVar[str] = "halves"

        def compress(self, weight: Tensor) -> Halves:
            return halves(weight.half())

    w = torch.randn(4, 5)
    weight = LowRank(2, residual=ToHalves(), rank_guard=False).compress(w)
    assert (weight.decompress() - w).abs().max() < 0.01
    rest = json.loads(json.dumps(weight.settings()))
    assert rest["residual"] == {"method": "halves", "version": 2, "activation_bits": 16}
    assert list(weight.tensors()) == ["low_rank_down", "low_rank_up", "low_rank_residual_halves_values"]
    assert same(LowRankWeight.from_tensors((4, 5), weight.tensors(), rest), weight)
    old = weight.tensors()
    old["low_rank_residual_halves_minus"] = -old.pop("low_rank_residual_halves_values")
    settings = {**rest, "residual": {"method": "halves", "version": 1}}
    assert list(LowRankWeight.expected((4, 5), settings)) == [
        "low_rank_down",
        "low_rank_up",
        "low_rank_residual_halves_minus",
    ]
    assert same(LowRankWeight.from_tensors((4, 5), old, settings), weight)


def test_a_name_is_taken_once(halves: type[Halves]) -> None:
    assert register(halves) is halves, "again"
    with pytest.raises(ValueError, match="register: Halves has the name 'halves', expected one that no weight has"):
        register(MinusHalves)
    assert Nested("residual").known() == [name for name in WEIGHTS if name != "low_rank"]
