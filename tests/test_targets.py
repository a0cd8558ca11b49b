"""``deploy``: what every target promises, and what the first one does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress import targets
from pycompress.nn import CompressedLayer
from pycompress.targets import TARGETS, Carried, Target
from pycompress.targets.deployment import compared
from pycompress.targets.source import Source


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16)).eval()


@pytest.fixture(scope="module")
def compressed() -> nn.Module:
    torch.manual_seed(0)
    return pc.compress(small(), {"0": pc.Int8(), "2": pc.Sparse(density=0.3)})


class Folder(Target):
    """Writes the dense numbers into a folder; refuses int4 and widens what is sparse."""

    name, title, suffix, extra, packages = "folder", "Folders", "", "onnx", ("torch",)
    off = 0.0
    fails = False

    def carried(self, layer: CompressedLayer) -> Carried:
        fate = {"int8": "kept", "sparse": "widened"}.get(layer.weight_type.name, "refused")
        return Carried(fate, "", "of its own accord")  # type: ignore[arg-type]

    def write(self, source: Source, path: str) -> None:
        Path(path).mkdir()
        Path(path, "a").write_text("x")
        if self.fails:
            raise RuntimeError("the converter")
        torch.save(source.outputs, Path(path, "b"))

    def run(self, path: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return [y + self.off * torch.randn_like(y) for y in torch.load(Path(path, "b"))]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Folder:
    place = Folder()
    monkeypatch.setitem(TARGETS, "folder", place)
    return place


def test_every_target_says_what_it_is_by_itself() -> None:
    for name, place in TARGETS.items():
        assert place.name == name
        assert place.title
        assert place.packages


@pytest.mark.parametrize("name", [name for name, place in TARGETS.items() if not place.open_sizes])
def test_sizes_that_cannot_stay_open_are_refused(compressed: nn.Module, name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"dynamic is \{0: 'batch'\}, but a file of .* sizes of its example inputs only"
    ):
        pc.deploy(compressed, name, tmp_path / "m", torch.randn(3, 32), {0: "batch"})


def test_onnx_runtime_keeps_all_layers_and_gives_what_the_model_gives(compressed: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx")
    found = pc.deploy(compressed, "onnxruntime", tmp_path / "m.onnx", torch.randn(3, 32))
    assert found.ok, found.verdict
    assert found.checked is not None
    assert found.checked.error < 1e-5
    assert {name: one.fate for name, (_, one) in found.layers.items()} == {"0": "kept", "2": "kept"}
    assert found.bytes == (tmp_path / "m.onnx").stat().st_size
    assert all(part in str(found) for part in ("sparse", "kept", "OK"))


def test_what_is_widened_or_refused_is_an_error_that_names_the_layers(
    compressed: nn.Module, folder: Folder, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"(?s)widen=True.*2 .*sparse.*widened.*of its own accord") as caught:
        pc.deploy(compressed, "folder", tmp_path / "m", torch.randn(3, 32))
    assert "int8" not in str(caught.value)
    assert [*tmp_path.iterdir()] == []
    assert pc.deploy(compressed, "folder", tmp_path / "m", torch.randn(3, 32), widen=True).ok
    other = pc.compress(small(), pc.Int4(group=32))
    with pytest.raises(ValueError, match=r"(?s)cannot carry.*refused"):
        pc.deploy(other, "folder", tmp_path / "n", torch.randn(3, 32), widen=True)


def test_a_folder_takes_the_place_of_an_older_one_whole_or_not_at_all(
    compressed: nn.Module, folder: Folder, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    for _ in range(2):
        pc.deploy(compressed, "folder", path, torch.randn(3, 32), widen=True)
    (path / "mark").write_text("old")
    folder.fails = True
    with pytest.raises(RuntimeError, match="the converter"):
        pc.deploy(compressed, "folder", path, torch.randn(3, 32), widen=True)
    assert (path / "mark").exists()
    folder.fails = False
    pc.deploy(compressed, "folder", path, torch.randn(3, 32), widen=True)
    assert sorted(one.name for one in path.iterdir()) == ["a", "b"]
    assert [one.name for one in tmp_path.iterdir()] == ["m"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        pc.deploy(compressed, "folder", tmp_path / "file", torch.randn(3, 32), widen=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_gives_something_else_is_not_ok(compressed: nn.Module, folder: Folder, tmp_path: Path) -> None:
    folder.off = 0.3
    found = pc.deploy(compressed, "folder", tmp_path / "m", torch.randn(3, 32), widen=True)
    assert not found.ok
    assert found.verdict.startswith("NOT the same model: cosine 0.")


def test_a_missing_package_is_an_error_that_names_the_extra(
    compressed: nn.Module, folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Folder, "packages", ("no_such_package",))
    with pytest.raises(ImportError, match=r"no_such_package.*pycompress\[onnx\]"):
        pc.deploy(compressed, "folder", tmp_path / "m", torch.randn(3, 32), widen=True)


def test_what_cannot_be_deployed(compressed: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target is 'nowhere', expected one of onnxruntime, "):
        pc.deploy(compressed, "nowhere", tmp_path / "m", torch.randn(3, 32))
    with pytest.raises(ValueError, match="no compressed layer"):
        pc.deploy(small(), "onnxruntime", tmp_path / "m", torch.randn(3, 32))
    model = small()
    pc.prepare(model, pc.Int8(), steps=2)
    with pytest.raises(ValueError, match="prepared"):
        pc.deploy(model, "onnxruntime", tmp_path / "m", torch.randn(3, 32))


def test_outputs_are_held_against_the_models() -> None:
    a = torch.randn(4, 8, dtype=torch.float64)
    whole = torch.arange(4)
    assert compared([a, whole], [a, whole]) == targets.Checked(1.0, 0.0)
    assert not compared([a], [(a + 1e-3 * torch.randn_like(a)).float()]).reason
    for other in ([], [a[:2]], [a + 3], [torch.full_like(a, torch.nan)], [torch.zeros_like(a)]):
        assert compared([a], other).reason
    assert compared([whole], [whole + 1]).reason


def test_a_program_has_twins_in_the_places_of_layers_and_the_model_is_as_it_was(compressed: nn.Module) -> None:
    class Shared(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layers = [layer, layer]  # in a plain list, too
            self.a = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.layers[1](x)

    layer = pc.compress(nn.Linear(8, 8).eval(), pc.Int8())
    for model, x in ((compressed, torch.randn(4, 32)), (Shared(layer), torch.randn(1, 8)), (layer, torch.randn(2, 8))):
        before = [*model.modules()]
        source = Source.of(model, x, None)

        def twin(_: str, layer: CompressedLayer) -> nn.Module:
            dense = nn.Linear(layer.k, layer.n)
            dense.weight.data = layer.canonical().decompress()
            dense.bias.data = layer.bias32.clone()
            return dense

        program = source.program(twin)
        assert not any("pycompress" in str(node.target) for node in program.graph.nodes)
        assert [*model.modules()] == before
        (y,) = program.module()(torch.randn(5, x.shape[1]))
        assert y.shape[0] == 5
