"""What a machine is, in a file: times between those that were measured, plans for it, and a model that is too large for it."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pycompress as pc
from pycompress.nn import CompressedLayer
from pycompress.profiles import PROFILES
from pycompress.search import DoesNotFit, Machine

MACHINES = Path(__file__).parent / "machines"  # what `profile` measured; test_the_machines_here says how
INT8, INT7, INT4 = repr(pc.Int8()), repr(pc.Int8(7)), repr(pc.Int4())


def cells(ns: float, rows: tuple[int, ...] = (1, 16, 256), sizes: tuple[int, ...] = (32, 256)) -> tuple[Any, ...]:
    """Of layers that take so many ns for a multiply-add."""
    return tuple((m, n, k, ns * m * n * k / 1000) for m in rows for n in sizes for k in sizes)


def machine(memory: int = 10**9, **ns: float) -> Machine:
    names = {"int8": INT8, "int7": INT7, "int4": INT4}
    times = {names.get(name, name): cells(own) for name, own in ({"dense": 4.0} | ns).items()}
    return Machine("a board", ("scalar",), 1, memory, times)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).eval()


def test_times_between_those_that_were_measured() -> None:
    there = machine()
    for m, n, k in ((1, 32, 32), (256, 256, 32), (7, 100, 200), (1000, 3, 5000)):
        assert there.us("dense", m, n, k) == pytest.approx(4.0 * m * n * k / 1000)
    overhead = Machine("x", (), 1, 1, {"dense": tuple((m, n, k, 5 + m * n * k / 1000) for m, n, k, _ in cells(1.0))})
    for m, n, k, us in overhead.times["dense"]:
        assert overhead.us("dense", m, n, k) == pytest.approx(us)
    assert overhead.us("dense", 16, 32, 32) < overhead.us("dense", 64, 32, 32) < overhead.us("dense", 256, 32, 32)
    holes = Machine("x", (), 1, 1, {"dense": (*cells(4.0)[:-1],)})
    assert holes.us("dense", 256, 256, 256) == pytest.approx(4.0 * 256**3 / 1000)


def test_a_profile_of_this_machine_comes_back(tmp_path: Path) -> None:
    found = pc.profile(
        {"int8": pc.Int8(), "thin": pc.LowRank(16, rank_guard=False)}, name="here", rows=(1, 8), sizes=(16, 64)
    )
    assert (
        found.threads == torch.get_num_threads() and found.memory_bytes > 10**8 and "scalar" in found.instruction_sets
    )
    assert {name: len(own) for name, own in found.times.items()} == {"dense": 8, "int8": 8, "thin": 8}
    found.save(tmp_path / "here.toml")
    back = Machine.load(tmp_path / "here.toml")
    assert back == found and back.us("thin", 3, 20, 30) == found.us("thin", 3, 20, 30)
    too_thick = pc.profile({"thin": pc.LowRank(32, rank_guard=False)}, rows=(1,), sizes=(16, 64))
    assert [cell[1:3] for cell in too_thick.times["thin"]] == [(64, 64)] and too_thick.name


def written(threads: int = 1, us: int = 1) -> str:
    machine = f"[machine]\nname='x'\ninstruction_sets=[]\nthreads={threads}\nmemory_bytes=1"
    return f"version = 1\n{machine}\n[times.dense]\ncells=[[1,2,3,{us}]]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = 2", "version is 2, expected 1"),
        ("version = 1", "no profile of a machine: KeyError"),
        ("version = 1\n[machine]\nname='x'\n[times]", "no profile of a machine"),
        (written(us=-1), "above 0"),
        (written(threads=0), "threads is 0"),
        (written().replace("[1,2,3,1]", "[1,2,3]"), "not enough values"),
        ("x", "not TOML"),
    ],
)
def test_files_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        Machine.load(tmp_path / "m")
    assert str(tmp_path / "m") in str(raised.value)


def test_compress_takes_the_precision_that_is_fast_there() -> None:
    def bits(there: Machine) -> set[Any]:
        small = pc.compress(model(), target=there, example_inputs=torch.randn(4, 64))
        assert isinstance(small, nn.Sequential)
        own = small[0].settings["activation_bits"] if isinstance(small[0], CompressedLayer) else None
        return {(layer.method, own) for layer in pc.summary(small).layers}

    assert bits(machine(int8=1.0, int7=2.0)) == {("int8", 8)}
    assert bits(machine(int8=2.0, int7=1.0)) == {("int8", 7)}
    assert bits(machine(int8=1.0, int4=0.1)) == {("int8", 8)}  # it fits, and is more exact
    assert bits(machine(int8=9.0, int4=0.1)) == {(None, None)}
    dense = sum(p.numel() * 4 for p in model().parameters())
    assert bits(machine(dense // 2, int8=9.0, int4=0.1)) == {("int8", 8)}  # slower, but dense does not fit
    assert bits(machine(dense // 5, int8=1.0, int4=0.1)) == {("int4", 8)}


def test_what_a_plan_needs_is_what_the_model_takes() -> None:
    small = pc.compress(model(), pc.Int4())
    needs = pc.summary(small).bytes
    with pytest.raises(DoesNotFit) as raised:
        pc.compress(model(), target=machine(needs - 1, int8=1.0, int4=1.0))
    assert (raised.value.needs, raised.value.has) == (needs, needs - 1)
    assert pc.summary(pc.compress(model(), target=machine(needs, int8=1.0, int4=1.0))).bytes == needs
    with pytest.raises(DoesNotFit, match=r"the model needs 3\.1 GB, the target phone has 2 GB"):
        raise DoesNotFit("phone", 3.1e9, 2e9)


class Mixed(nn.Module):
    """An embedding, convolutions, one with a padding module, and linear layers, of which two share the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.pad = nn.Embedding(64, 32), nn.ConstantPad1d(1, 0.0)
        self.conv, self.depthwise = nn.Conv1d(32, 32, 3), nn.Conv1d(32, 32, 3, groups=32)
        self.tied, self.alone, self.own = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, bias=False)
        self.own.weight = self.tied.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.conv(self.pad(self.words(tokens).mT))).mT
        return self.own(self.alone(x) + self.tied(tokens[:, :6]))


def test_convolutions_and_embeddings_get_smaller_where_memory_is_short() -> None:
    torch.manual_seed(0)
    big, tokens = Mixed().eval(), torch.randint(0, 50, (2, 8))

    def methods(memory: int) -> tuple[dict[str, str | None], int]:
        small = pc.compress(big, target=machine(memory, int8=1.0, int4=1.0), example_inputs=tokens)
        assert small(tokens).shape == (2, 6, 50)
        return {layer.name: layer.method for layer in pc.summary(small).layers if layer.method}, pc.summary(small).bytes

    assert methods(10**9)[0] == {"alone": "int8"}
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3))
    assert not machine(int8=1.0).plan_for(convolution)["*"]
    assert [layer.reason for layer in pc.summary(pc.compress(convolution, target=machine(int8=1.0))).layers] == [
        "the plan keeps '*' dense"
    ]
    with pytest.raises(DoesNotFit) as raised:
        methods(1)
    found, needs = methods(int(raised.value.needs))
    assert needs == raised.value.needs
    assert found == {"words": "int8", "conv": "int8", "depthwise": "int8", "alone": "int4"}
    assert methods(needs + 600)[0] == {**found, "alone": "int8"}


def test_precisions_go_by_the_method_not_by_its_name() -> None:
    there = Machine("a board", (), 1, 10**9, {"dense": cells(4.0), "eight": cells(1.0)}, methods={"eight": pc.Int8()})
    assert {layer.method for layer in pc.summary(pc.compress(model(), target=there)).layers} == {"int8"}


def test_wrong_uses() -> None:
    with pytest.raises(ValueError, match="fits the target a board as it is, and has embeddings only"):
        pc.compress(nn.Sequential(nn.Embedding(9, 8)), target=machine(int8=1.0))
    with pytest.raises(TypeError, match="only_if_faster is 1, expected True, False, or the profile of a machine"):
        pc.compress(model(), pc.Int8(), example_inputs=torch.randn(4, 64), only_if_faster=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both a plan and a target are given"):
        pc.compress(model(), pc.Int8(), target=machine(int8=1.0))
    with pytest.raises(ValueError, match="has times of dense, expected some of Int8"):
        pc.compress(model(), target=machine())
    with pytest.raises(ValueError, match="no layer to compress for a target"):
        pc.compress(nn.Sequential(nn.LSTM(4, 4)), target=machine(int8=1.0))
    x, there = torch.randn(4, 64), machine(int8=1.0)
    with pytest.raises(ValueError, match="has no times of int4, expected one of dense, Int8"):
        pc.search(model(), {"int4": pc.Int4()}, [x], {"ms": 1}, example_inputs=x, target=there)
    with pytest.raises(ValueError, match=r"rows is \(\), sizes \(4,\)"):
        pc.profile(rows=(), sizes=(4,))


def test_a_plan_for_another_machine() -> None:
    """What is fast differs, so the plan does; what it loses is what it loses here."""
    x = torch.randn(64, 64)
    plans = []
    for ns in ({"int8": 1.0, "int4": 3.0}, {"int8": 3.0, "int4": 1.0}):
        front = pc.search(
            model(), [pc.Int8(), pc.Int4()], [x], {"quality": 0.9}, example_inputs=x, target=machine(**ns), points=2
        )
        assert front.target == "a board" and front.best.plan.about["target"] == "a board"
        (fast,) = {name for name, own in ns.items() if own == 1.0}
        plans.append({method.name for method in front.best.plan.values() if method is not None})
        assert plans[-1] == {fast}
        layers = sum(64 * n * k for n, k in ((128, 64), (128, 128), (10, 128))) / 1e6
        dense = next(point for point in front.measured if point.uniform == "dense").measured.ms
        assert dense >= 4.0 * layers and front.best.measured.ms < dense
        small = pc.compress(model(), front.best.plan, calibration=pc.calibrate(model(), [x]))
        cosine = torch.cosine_similarity(small(x).double(), model()(x).double()).mean()
        assert front.best.measured.quality == pytest.approx(float(cosine.detach()), abs=1e-6)


# --- machines that were measured --------------------------------------------------------------------------------------------


def layers(depth: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(depth))).eval()


def plan(there: Machine, **limits: float) -> set[Any]:
    """The methods that a search takes, of three."""
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(1))
    seen = pc.calibrate(layers(), [torch.randn(1024, 256, generator=torch.Generator().manual_seed(2))])
    candidates = [pc.Int8(), pc.Int8(7), pc.Sparse(pattern="4:16", bits=8)]
    front = pc.search(
        layers(),
        {repr(one): one for one in candidates},
        [x],
        limits,
        example_inputs=x,
        target=there,
        calibration=seen,
        points=2,
    )
    return set(front.best.plan.values())


def test_a_plan_for_each_machine_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """One processor, capped by PYCOMPRESS_ISA: 7-bit activations are faster than 8-bit ones where products are added in 16 bits,
    and so are 4 of 16 weights; with VNNI they are not; and without vectors dense layers are, which torch runs on vectors.

    .. code-block:: python

        candidates = [pc.Int8(), pc.Int8(7), pc.Int4(), pc.Sparse(pattern="4:16", bits=8)]  # torch.set_num_threads(1)
        pc.profile(candidates, name=name, rows=(1, 16, 128), sizes=(128, 512, 1536)).save(path)
    """
    monkeypatch.setattr(
        import_module("pycompress.search.timing"), "layer_us", lambda *_: (1.0, 1.0)
    )  # here: nothing counts
    monkeypatch.setattr(import_module("pycompress.search.plans"), "model_us", lambda *_: (3.0, 1.0))
    machines = {name: Machine.load(MACHINES / f"{name}.toml") for name in ("avx2", "avx512_vnni", "scalar")}
    x = torch.randn(128, 256)

    def chosen(name: str, **arguments: Any) -> set[Any]:
        small = pc.compress(layers(), **arguments, example_inputs=x)
        assert isinstance(small, nn.Sequential)
        return {layer.settings["activation_bits"] if isinstance(layer, CompressedLayer) else None for layer in small}

    assert {name: chosen(name, target=there) for name, there in machines.items()} == {
        "avx2": {7}, "avx512_vnni": {8}, "scalar": {None},
    }  # fmt: skip
    sparse = pc.Sparse(pattern="4:16", bits=8)
    assert {name: plan(there, quality=0.2) for name, there in machines.items()} == {
        "avx2": {sparse}, "avx512_vnni": {pc.Int8()}, "scalar": {None},
    }  # fmt: skip
    assert plan(machines["avx2"], quality=0.999) == {pc.Int8(7)}
    kept = {
        name: chosen(name, plan=pc.Int8(), only_if_faster=there, calibration=pc.calibrate(layers(), [x]))
        for name, there in machines.items()
    }
    assert kept == {"avx2": {8}, "avx512_vnni": {8}, "scalar": {None}}


def test_with_two_threads_more_stays_dense_in_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("pycompress.search.timing"), "layer_us", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(import_module("pycompress.search.plans"), "model_us", lambda *_: (3.0, 1.0))
    one, two = (Machine.load(MACHINES / f"{name}.toml") for name in ("avx512_vnni", "avx512_vnni_two_threads"))
    dense = [
        3 * there.us("dense", 128, 256, 256) / 1000 for there in (one, two)
    ]  # two layers, and the rest as long as one
    assert (one.threads, two.threads) == (1, 2)
    assert dense[1] < 0.75 * dense[0]
    limit = sum(dense) / 2
    assert plan(two, ms=limit) == {None}
    assert pc.Int8() in plan(one, ms=limit)


def test_only_if_faster_there() -> None:
    there = Machine.load(MACHINES / "scalar.toml")
    model, x = nn.Sequential(layers(), nn.Unflatten(1, (1, 16, 16)), nn.Conv2d(1, 4, 3)).eval(), torch.randn(16, 256)
    small = pc.compress(model, pc.Int8(), example_inputs=x, only_if_faster=there)
    reasons = {record.name: record.reason for record in pc.summary(small).layers}
    assert reasons["0.0"].startswith("dense is faster on Zen 5 capped to no vector instructions, one thread: ")
    assert reasons["2"].endswith("has times of linear layers only, so it could not be shown to be faster")
    record = next(iter(pc.summary(small).layers))
    assert (record.dense_us, record.us) == there.layer_us(pc.Int8(), (256, 256), 16)
    with pytest.raises(
        ValueError, match=r"compress: 0\.0: the machine Zen 5 .* has no times of Int4\(group=64\), expected one of"
    ):
        pc.compress(model, pc.Int4(group=64), example_inputs=x, only_if_faster=there)


def test_what_methods_take_as_a_profile() -> None:
    """By times of which the speed is known: a rank of 16 takes as long as so many multiply-adds of the dense layer."""
    dense = cells(4.0, rows=(1, 64), sizes=(64, 128))
    thin = tuple((m, n, k, 2.0 * m * 16 * (n + k) / 1000) for m, n, k, _ in dense)
    methods = {"thin": pc.LowRank(16, rank_guard=False), "int8": pc.Int8(), "half": pc.Sparse(0.5)}
    times = {
        "dense": dense,
        "thin": thin,
        "int8": cells(1.0, (1, 64), (64, 128)),
        "half": cells(4.0, (1, 64), (64, 128)),
    }
    there = Machine("a board", ("avx2",), 1, 1, times, methods=methods)
    profile = there.profile()
    assert profile.speeds == pytest.approx({"factors 32": 2.0, "int8": 4.0, "sparse 32": 0.5})
    assert profile.largest_rms == PROFILES["avx2"].largest_rms
    vnni = Machine("a board", ("avx2", "avx512_vnni"), 1, 1, times, methods=methods)
    assert vnni.profile().largest_rms is None
    fast, slow = (pc.LowRank(40, profile=own) for own in (profile, replace(profile, speeds={"factors 32": 0.5})))
    model = nn.Sequential(nn.Linear(96, 96)).eval()
    assert pc.summary(pc.compress(model, fast)).layers[0].method == "low_rank"
    assert "would not be smaller and faster" in pc.summary(pc.compress(model, slow)).layers[0].reason
    with pytest.raises(ValueError, match="has no times of its methods at 32 rows or more"):
        machine(int8=1.0).profile()
