"""Plans in TOML files: every method and setting goes out and comes back; what means nothing is refused by its place."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import pycompress as pc
from pycompress import methods, toml
from pycompress.nn.layers import LAYERS
from pycompress.plan_file import KNOWN, WrittenPlan
from pycompress.profiles import PROFILES, Profile

MINE = Profile("mine", {"factors 32": 0.8, "int8": 3.0}, largest_rms=0.3)
OBSERVERS = (
    pc.MinMax(), pc.MovingAverage(0.5), pc.Percentile(99.5), pc.MeanSquaredError(), pc.Entropy(), pc.Known(-1.5, 2.0),
)  # fmt: skip
METHODS: list[Any] = [
    pc.Int8(), pc.Int8(7, 7), pc.Int8(fit="none"), pc.Int8(fit=MINE), pc.Int8(16, embeddings=True),
    *(pc.Int8(activation="static", observer=one) for one in OBSERVERS),
    pc.Int4(), pc.Int4(64, symmetric=True), pc.Int4(activation_bits=16),
    pc.Sparse(), pc.Sparse(0.25), pc.Sparse(1), pc.Sparse(pattern="4:16", bits=8, activation_bits=8),
    pc.Sparse(0.5, pattern="16x4", scope="row", choose="wanda"), pc.Sparse(0.5, bits=8, fit=PROFILES["none"]),
    pc.LowRank(8), pc.LowRank("break-even"), pc.LowRank(energy=0.9), pc.LowRank(error=0.1), pc.LowRank(share=0.5, scope="model"),
    pc.LowRank(8, bits=8, activation_bits=8, algorithm="exact", rank_guard=False, embeddings=True),
    pc.LowRank(8, decomposition="tucker", profile=MINE), pc.LowRank(8, residual=pc.Int4(128), alternations=2),
    pc.LowRank(8, residual=methods.Dense()), pc.LowRank(4, residual=pc.Sparse(0.5, bits=8)),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: repr(method)[:60])
def test_a_method_comes_back(method: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    WrittenPlan(method).save(path)
    (back,) = WrittenPlan.load(path).values()
    assert type(back) is type(method)
    for field in fields(method):
        assert getattr(back, field.name) == getattr(method, field.name), field.name


def test_every_weight_and_every_setting_is_among_them() -> None:
    made = {method.name for method in METHODS}
    assert made == {weight for _, weight in LAYERS if weight in {"int8", "int4", "sparse", "low_rank"}}
    kinds = {type(method) for method in METHODS} | {type(m.observer) for m in METHODS if isinstance(m, pc.Int8)}
    assert kinds | {methods.Dense, Profile} == set(KNOWN.values())
    for kind in {type(method) for method in METHODS}:
        settings = {field.name: field for field in fields(kind) if field.name not in ("inputs", "mask")}
        for name, field in settings.items():
            assert any(getattr(m, name) != field.default for m in METHODS if type(m) is kind), (kind, name)


def test_order_globs_and_dense_layers(tmp_path: Path) -> None:
    names = ['a."b".0', "*.query", "häuser\n\t\x7f", "[0-9]", "plain-name_2", "", "*"]
    plan = WrittenPlan({name: None if i % 2 else pc.Int8() for i, name in enumerate(names)}, {"ms": 1.5, "why": "it's"})
    plan.save(tmp_path / "p")
    back = WrittenPlan.load(tmp_path / "p")
    assert [*back.items()] == [*plan.items()] and back.about == plan.about
    assert repr(back) == repr(plan)


def test_compress_takes_a_plan_from_a_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8)).eval()
    (tmp_path / "p").write_text(
        'version = 1\n[layers]\n"0" = {method = "Int4", group = 64}\n"*" = {method = "dense"}\n'
    )
    small = pc.compress(model, WrittenPlan.load(tmp_path / "p"))
    assert [record.method for record in pc.summary(small).layers] == ["int4", None]


def test_toml_comes_back(tmp_path: Path) -> None:
    table = {
        "text": 'a "b" \\ \n é \x00', "whole": -(2**62), "number": 1e-300, "more": 0.1, "never": float("inf"), "yes": True,
        "list": [1, 2.5, "x", [True]], "a b": {"": {"deep.er": {"x": 1}}, "empty": {}}, "last": {"y": [[1, 2], [3, 4]]},
    }  # fmt: skip
    toml.write(tmp_path / "t", table)
    assert toml.read(tmp_path / "t", "test") == table
    with pytest.raises(TypeError, match="None is NoneType"):
        toml.write(tmp_path / "t", {"x": None})
    assert toml.read(tmp_path / "t", "test") == table


@dataclass(frozen=True)
class Mine:
    name: ClassVar[str] = "int8"
    bits: int = 8

    def compress(self, weight: torch.Tensor) -> Any:
        return pc.Int8().compress(weight)


def test_a_method_of_ones_own(tmp_path: Path) -> None:
    WrittenPlan(Mine(4)).save(tmp_path / "p")
    with pytest.raises(ValueError, match="method is 'Mine', expected 'dense' or one of Int8"):
        WrittenPlan.load(tmp_path / "p")
    assert dict(WrittenPlan.load(tmp_path / "p", [Mine])) == {"*": Mine(4)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = ", "not TOML"),
        ("[layers.a]\nmethod='Int8'", "version is None, expected 1"),
        ("version = 2", "version is 2, expected 1"),
        ("version = 1", "layers is None, expected a table for each glob"),
        ("version = 1\nlayers = 3", "layers is 3"),
        ("version = 1\nlayer = 1\n[layers.a]\nmethod='Int8'", "there is \\['layer'\\]"),
        ("version = 1\nshrink = 3\n[layers.a]\nmethod='Int8'", "shrink is 3, expected tables shrink.1, shrink.2"),
        ("version = 1\n[shrink.2]\nheads=0.5\n[layers.a]\nmethod='Int8'", "shrink is {'2'"),
        ("version = 1\n[layers.a]\ngroup=1", "a: method is None, expected 'dense' or one of"),
        ("version = 1\n[layers]\na = 1", "a: method is None"),
        ("version = 1\n[layers.a]\nmethod='os.system'", "a: method is 'os.system'"),
        ("version = 1\n[layers.a]\nmethod='MinMax'", "a: MinMax.* is no method"),
        ("version = 1\n[layers.a]\nmethod='Int8'\ngroup=32", "a: Int8 has no 'group', expected some of activation"),
        ("version = 1\n[layers.a]\nmethod='Int4'\ninputs=1", "a: Int4 has no 'inputs'"),
        ("version = 1\n[layers.a]\nmethod='Int4'\ngroup=33", "a: Int4: group is 33"),
        ("version = 1\n[layers.a]\nmethod='dense'\nx=1", "method is 'dense'"),
        (
            "version = 1\n[layers.a]\nmethod='LowRank'\nrank=4\n[layers.a.residual]\nmethod='x'",
            "a: residual: method is 'x'",
        ),
    ],
)
def test_what_means_nothing_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        WrittenPlan.load(path)
    assert str(path) in str(raised.value)


def test_what_no_file_can_hold(tmp_path: Path) -> None:
    seen = pc.calibrate(nn.Sequential(nn.Linear(4, 4)), [torch.randn(8, 4)])["0"]
    for method, message in (
        (pc.Sparse.from_mask(torch.ones(2, 2, dtype=torch.bool)), "mask of Sparse is Tensor"),
        (pc.Int4().with_inputs(seen), "inputs of Int4 is InputStatistics"),
    ):
        with pytest.raises(TypeError, match=message):
            WrittenPlan({"a": method}).save(tmp_path / "p")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(TypeError, match="expected a glob and a method"):
        WrittenPlan({"a": 3})  # type: ignore[dict-item]


def test_a_reader_is_there_on_every_python() -> None:
    assert toml.tomllib.__name__ == ("tomllib" if sys.version_info >= (3, 11) else "tomli")
