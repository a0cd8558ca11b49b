"""`pycompress compress`, `validate`, `export` and `deploy`: models from folders, programs and ONNX files."""

from __future__ import annotations

import json
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("click", reason="the command line needs the extra pycompress[cli]")
pytest.importorskip("rich", reason="the command line needs the extra pycompress[cli]")
pytest.importorskip("yaml", reason="the command line needs the extra pycompress[cli]")
pytest.importorskip("onnxruntime", reason="these commands need the extra pycompress[onnx]")
pytest.importorskip("onnxscript", reason="these commands need the extra pycompress[onnx]")
pytest.importorskip("transformers", reason="folders of transformers need it")

import transformers
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper, save

import pycompress as pc
from pycompress import cli
from pycompress.search.machine import Machine

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "sees",
    "has",
    "small",
    "red",
    "old",
]
PLAN = '[layers."*.query"]\nmethod = "LowRank"\nrank = 4\nresidual = { method = "Int8" }\n\n[layers."*"]\nmethod = "Int8"\n'


def invoke(*arguments: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.pycompress, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception  # no traceback
    return result


def said(result: Result) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def bert(home: Path) -> Path:
    """A folder as transformers' save_pretrained leaves it, with its tokenizer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    folder = home / "bert"
    transformers.BertModel(config).eval().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    (home / "texts.txt").write_text("the cat sees the dog\na small red house\n\nthe old dog has a house\n")
    return folder


@pytest.fixture(scope="module")
def graph(home: Path) -> Path:
    """An ONNX file of an embedding, a mask and two products."""
    rng = np.random.default_rng(0)
    weights = {
        "words": rng.normal(size=(50, 32)),
        "first": rng.normal(size=(32, 64)),
        "second": rng.normal(size=(64, 8)),
    }
    nodes = [
        helper.make_node("Gather", ["words", "tokens"], ["a"]),
        helper.make_node("Cast", ["mask"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["b", "last"], ["c"]),
        helper.make_node("Mul", ["a", "c"], ["d"]),
        helper.make_node("MatMul", ["d", "first"], ["e"]),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("MatMul", ["f", "second"], ["y"]),
    ]
    constants = [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()]
    constants.append(numpy_helper.from_array(np.array([-1]), "last"))
    ports = [helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "words"]) for name in ("tokens", "mask")]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "words", 8])
    path = home / "graph.onnx"
    made = helper.make_graph(nodes, "g", ports, [y], constants)
    save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def plan(home: Path) -> Path:
    path = home / "plan.toml"
    path.write_text(PLAN)
    return path


@pytest.fixture(scope="module")
def every(home: Path) -> Path:
    path = home / "int8.yaml"
    path.write_text('layers:\n  "*": {method: Int8}\n')
    return path


def test_a_folder_of_transformers(bert: Path, home: Path, plan: Path) -> None:
    small = home / "bert.safetensors"
    done = invoke("compress", bert, "--plan", plan, "-o", small, "--calibrate", home / "texts.txt", "--json")
    facts = json.loads(done.stdout)
    assert facts["file_bytes"] == small.stat().st_size
    assert facts["bytes"] < facts["dense_bytes"]
    labels = {layer["name"]: layer["label"] for layer in facts["layers"]}
    assert labels["encoder.layer.0.attention.self.query"].startswith("low rank 4")
    assert labels["encoder.layer.0.attention.self.key"].startswith("int8")

    dense = transformers.BertModel.from_pretrained(bert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    texts = [line for line in (home / "texts.txt").read_text().splitlines() if line]
    seen = [dict(tokenizer(texts, return_tensors="pt", padding=True))]
    rules = {"*.query": pc.LowRank(4, residual=pc.Int8()), "*": pc.Int8()}
    expected = pc.compress(dense, rules, calibration=pc.calibrate(dense, seen, plan=rules))
    loaded = pc.load(transformers.BertModel.from_pretrained(bert).eval(), small)
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if isinstance(ours[name], torch.Tensor))

    assert "agree with ONNX Runtime" in invoke("validate", small).output
    report = json.loads(invoke("validate", small, "--inputs", "batch=2,length=5", "--layer", "*.key", "--json").stdout)
    assert report["ok"]
    assert [layer["rows"] for layer in report["layers"]] == [10]


@pytest.mark.slow
def test_what_is_loaded_needs_no_dense_weights(bert: Path, home: Path, every: Path) -> None:
    small, alone = home / "small.safetensors", home / "alone"
    invoke("compress", bert, "--plan", every, "-o", small)
    alone.mkdir()
    (alone / "config.json").write_bytes((bert / "config.json").read_bytes())
    assert json.loads(invoke("validate", small, "--model", alone, "--json").stdout)["ok"]
    assert "has no *.safetensors" in said(
        invoke("compress", alone, "--plan", every, "-o", home / "x.safetensors", code=2)
    )


@pytest.mark.slow
def test_a_folder_in_16_bits_stays_in_16_bits(bert: Path, home: Path, every: Path) -> None:
    half, small = home / "half", home / "half.safetensors"
    transformers.BertModel.from_pretrained(bert).to(torch.bfloat16).save_pretrained(half)
    invoke("compress", half, "--plan", every, "-o", small)
    from pycompress.cli.source import open_compressed

    source, _ = open_compressed(small, None, lambda _: {})
    assert source.model.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_an_onnx_file(graph: Path, home: Path) -> None:
    plan, small = home / "graph.yaml", home / "graph.safetensors"
    plan.write_text('layers:\n  words: {method: Int8, embeddings: true}\n  "*": {method: Int8}\n')
    out = invoke("compress", graph, "--plan", plan, "-o", small).output
    assert "int8+relu" in out
    assert f"{small}: {small.stat().st_size:,} bytes" in out
    assert invoke("validate", small, "--inputs", "rows=3,words=7").output.splitlines()[1].split()[1] == "21"
    np.savez(home / "graph.npz", tokens=np.array([[1, 2, 49]]), mask=np.array([[1, 1, 0]]))
    assert invoke("validate", small, "--inputs", home / "graph.npz").output.splitlines()[1].split()[1] == "3"


@pytest.mark.slow
def test_out_of_an_onnx_file(graph: Path, home: Path, every: Path) -> None:
    small = home / "out.safetensors"
    invoke("compress", graph, "--plan", every, "-o", small)
    exported = home / "exported.onnx"
    facts = json.loads(invoke("export", small, "-o", exported, "--json").stdout)
    assert facts["bytes"] == exported.stat().st_size
    assert "agree" in invoke("validate", small, "--exported", exported).output
    session = pc.onnx.session(exported)
    feeds = {"tokens": np.arange(10).reshape(2, 5), "mask": np.ones((2, 5), np.int64)}
    assert session.run(None, feeds)[0].shape == (2, 5, 8)

    facts = json.loads(invoke("deploy", "onnxruntime", small, "-o", home / "deployed.onnx", "--json").stdout)
    assert facts["ok"]
    assert {layer["fate"] for layer in facts["layers"].values()} == {"kept"}
    assert (home / "deployed.onnx").stat().st_size == facts["bytes"]


@pytest.mark.slow
def test_an_exported_program(home: Path, every: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    path, small = home / "program.pt2", home / "program.safetensors"
    rows = torch.export.Dim("rows")
    torch.export.save(torch.export.export(model, (torch.randn(3, 16),), dynamic_shapes=({0: rows},)), path)
    np.savez(home / "rows.npz", input=np.random.default_rng(0).normal(size=(40, 16)))
    out = invoke("compress", path, "--plan", every, "-o", small, "--calibrate", home / "rows.npz").output
    assert "int8+relu" in out
    assert json.loads(invoke("validate", small, "--json").stdout)["layers"][0]["rows"] == 3
    refused = invoke("validate", small, "--inputs", "batch=3", code=2)
    assert "a program has inputs of its own" in said(refused)
    invoke("deploy", "onnxruntime", small, "-o", home / "program.onnx")


@pytest.mark.parametrize("suffix", [".md", ".html"])
def test_a_page_about_it(graph: Path, every: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("jinja2", reason="pages need the extra pycompress[report]")
    pytest.importorskip("matplotlib", reason="pages need the extra pycompress[report]")
    small, page = tmp_path / "small.safetensors", tmp_path / f"page{suffix}"
    invoke("compress", graph, "--plan", every, "-o", small)
    invoke("report", small, "--plan", every, "-o", page)
    text = page.read_text()
    assert "second" in text
    assert "agree with ONNX Runtime" in text
    assert "Int8(" in text
    assert "expected" in said(invoke("report", small, "-o", tmp_path / "page.pdf", code=1))


def test_a_moved_model_is_asked_for(graph: Path, every: Path, tmp_path: Path) -> None:
    here, small = tmp_path / "here.onnx", tmp_path / "small.safetensors"
    here.write_bytes(graph.read_bytes())
    invoke("compress", here, "--plan", every, "-o", small)
    here.rename(tmp_path / "there.onnx")
    assert "was made of here.onnx, which is not there" in said(invoke("validate", small, code=2))
    invoke("validate", small, "--model", tmp_path / "there.onnx")


def test_another_model_is_refused(graph: Path, bert: Path, home: Path, every: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    invoke("compress", graph, "--plan", every, "-o", small)
    assert str(small) in said(invoke("validate", small, "--model", bert, code=2)).replace(" ", "")


@pytest.mark.slow
def test_a_difference_has_exit_code_1(graph: Path, every: Path, tmp_path: Path) -> None:
    small, exported = tmp_path / "small.safetensors", tmp_path / "other.onnx"
    invoke("compress", graph, "--plan", every, "-o", small)
    model = pc.load(pc.from_onnx(graph), small)
    inputs = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "mask": torch.ones(2, 3, dtype=torch.int64)}
    state = model.state_dict()
    model.load_state_dict({**state, "first.int8_scale": 1.5 * state["first.int8_scale"]})
    pc.export(model, exported, inputs, {0: "rows", 1: "words"})
    assert "DIVERGED" in invoke("validate", small, "--exported", exported, code=1).output
    report = json.loads(invoke("validate", small, "--exported", exported, "--json", code=1).stdout)
    assert not report["ok"]


def test_a_layer_that_the_target_refuses_has_exit_code_1(
    graph: Path, every: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pycompress.targets import TARGETS
    from pycompress.targets.target import Carried

    small = tmp_path / "small.safetensors"
    invoke("compress", graph, "--plan", every, "-o", small)
    monkeypatch.setattr(type(TARGETS["onnxruntime"]), "carried", lambda *_: Carried("refused", "", "for a test"))
    result = invoke("deploy", "onnxruntime", small, "-o", tmp_path / "x.onnx", code=1)
    assert "refused for a test" in said(result)
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[layers."*"]\nmethod = "Int9"',
            "*: method is 'Int9', expected 'dense' or one of Int8, Int4, Sparse, LowRank",
        ),
        (
            '[layers."*"]\nmethod = "Int8"\nbits = 8',
            "*: Int8 has no 'bits', expected some of activation, activation_bits",
        ),
        ('[layers."*"]\nmethod = "Int8"\nweight_bits = 3', "*: Int8: weight_bits is 3"),
        ('[layers."*"]\nmethod = "LowRank"\nrank = 4\nresidual = {method = "Int7"}', "*: residual: method is 'Int7'"),
        ('[layers."nothing.*"]\nmethod = "Int8"', "the glob 'nothing.*' matches no layer"),
        ("[layers.\nmethod = 1", "at line 1"),
        ("", "layers is None"),
    ],
)
def test_a_bad_plan_is_wrong_usage(graph: Path, tmp_path: Path, text: str, message: str) -> None:
    plan, output = tmp_path / "plan.toml", tmp_path / "small.safetensors"
    plan.write_text(text)
    result = invoke("compress", graph, "--plan", plan, "-o", output, code=2)
    assert message in said(result)
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers:\n  *: {method: Int8}\n", 'a glob such as "*" needs quotes'),
        ('layers:\n  "*": {method: Int8}\n  "*": {method: Int4}\n', "'*' is there twice"),
        ("- Int8\n", "it holds list"),
        ('layers:\n  "*": !!python/object/apply:os.getcwd []\n', "could not determine a constructor"),
    ],
)
def test_a_bad_yaml_plan_is_wrong_usage(graph: Path, tmp_path: Path, text: str, message: str) -> None:
    plan = tmp_path / "plan.yml"
    plan.write_text(text)
    assert message in said(invoke("compress", graph, "--plan", plan, "-o", tmp_path / "x.safetensors", code=2))


def test_both_languages_say_the_same(tmp_path: Path) -> None:
    """The two plans of the guide."""
    from pycompress.cli.plan import read_plan

    page = (Path(__file__).parent.parent / "docs" / "guide" / "command-line.md").read_text()
    expected = {"*.query": pc.LowRank(96, residual=pc.Int8()), "pooler.*": None, "*": pc.Int8(activation_bits=8)}
    for language in ("toml", "yaml"):
        (text,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
        path = tmp_path / f"plan.{language}"
        path.write_text(text)
        found = read_plan(path)
        assert [*found] == [*expected]
        assert [*map(repr, found.values())] == [*map(repr, expected.values())]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil"),)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pkl"])
def test_pickles_are_never_loaded(suffix: str, every: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, output = tmp_path / f"model{suffix}", tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    assert "is a pickle" in said(invoke("compress", path, "--plan", every, "-o", output, code=2))
    (tmp_path / "folder").mkdir()
    transformers.BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path / "folder")
    path.rename(tmp_path / "folder" / f"pytorch_model{suffix}")
    assert "is a pickle" in said(invoke("compress", tmp_path / "folder", "--plan", every, "-o", output, code=2))
    assert not (tmp_path / "evil").exists()


def test_pickles_in_programs_are_never_loaded(every: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    monkeypatch.chdir(tmp_path)
    good, bad, worse = (tmp_path / f"{name}.pt2" for name in ("good", "bad", "worse"))
    torch.export.save(torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),)), good)
    torch.save(({"x": Evil()},), tmp_path / "evil.pt")
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(bad, "w") as one, zipfile.ZipFile(worse, "w") as two:
        for name in archive.namelist():
            inputs = "sample_inputs" in name
            one.writestr(name, (tmp_path / "evil.pt").read_bytes() if inputs else archive.read(name))
            two.writestr(name, archive.read(name))
        two.writestr("good/data/constants/opaque_obj_0", pickle.dumps(Evil()))
    for path, message in ((bad, "bad.pt2 could not be read"), (worse, "opaque_obj_0, a pickled object")):
        assert message in said(invoke("compress", path, "--plan", every, "-o", tmp_path / "x.safetensors", code=2))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("rows", "expected sizes such as batch=8,length=64"),
        ("rows=0", "expected sizes such as"),
        ("height=3", "no input has a size height, there are: batch, length, rows, words"),
        ("none.npz", "No such file"),
    ],
)
def test_bad_inputs_are_wrong_usage(graph: Path, every: Path, tmp_path: Path, inputs: str, message: str) -> None:
    result = invoke("compress", graph, "--plan", every, "-o", tmp_path / "x.safetensors", "--inputs", inputs, code=2)
    assert message in said(result)


def test_arrays_that_do_not_fit_are_wrong_usage(graph: Path, every: Path, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        return said(
            invoke("compress", graph, "--plan", every, "-o", tmp_path / "x.safetensors", "--inputs", path, code=2)
        )

    np.savez(tmp_path / "few.npz", tokens=np.zeros((1, 2), np.int64))
    assert "few.npz holds tokens, expected tokens, mask" in refused(tmp_path / "few.npz")
    np.savez(tmp_path / "objects.npz", tokens=np.array([Evil()], object), mask=np.zeros(1))
    assert "expected an .npz file of numbers" in refused(tmp_path / "objects.npz")
    (tmp_path / "text.npz").write_text("no archive")
    assert "expected an .npz file of numbers" in refused(tmp_path / "text.npz")


def test_what_is_no_model_is_wrong_usage(every: Path, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        return said(invoke("compress", path, "--plan", every, "-o", tmp_path / "x.safetensors", code=2))

    for name, text in (("model.onnx", b"no model"), ("model.pt2", b"no archive"), ("model.txt", b"")):
        (tmp_path / name).write_bytes(text)
        assert name in refused(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path / "empty")
    assert "'nowhere' is none, expected one of onnxruntime" in said(
        invoke("deploy", "nowhere", every, "-o", tmp_path / "x", code=2)
    )
    assert "expected a file that pycompress compress wrote" in said(invoke("validate", every, code=2))


def test_json_has_no_numbers_that_are_not_finite() -> None:
    from pycompress.cli.terminal import json_text

    assert json.loads(json_text({"a": [float("nan"), 1.5, (float("inf"),)]})) == {"a": [None, 1.5, [None]]}


def test_about_stays_in_the_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = pc.compress(nn.Sequential(nn.Linear(8, 8)), pc.Int8())
    pc.save(model, tmp_path / "m.safetensors", about={"made by": "a test"})
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert file.metadata()["made by"] == "a test"
    pc.load(nn.Sequential(nn.Linear(8, 8)), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="about has 'pycompress', expected another name"):
        pc.save(model, tmp_path / "m.safetensors", about={"pycompress": "{}"})


@pytest.mark.slow
def test_a_plan_is_searched_and_compresses(graph: Path, home: Path) -> None:
    found, data, candidates = home / "found.toml", home / "tokens.npz", home / "candidates.yaml"
    rng = np.random.default_rng(0)
    np.savez(data, tokens=rng.integers(0, 50, (16, 8)), mask=np.ones((16, 8), np.int64))
    candidates.write_text("candidates:\n  eight: {method: Int8}\n  four: {method: Int4}\n")
    asked = ("search", graph, "--calibrate", data, "--candidates", candidates, "--cache", home / "cache", "-o", found)
    facts = json.loads(invoke(*asked, "--quality", 0.9, "--json").stdout)
    (best,) = (point for point in facts["front"] if point["best"])
    assert facts["missed"] == {}
    assert best["quality"] >= 0.9
    assert all(set(point["plan"]) == set(best["plan"]) for point in facts["front"])
    invoke("compress", graph, "--plan", found, "-o", home / "found.safetensors")
    out = said(invoke(*asked, "--mb", 1e-6, code=1))
    assert "no plan keeps to mb = 1e-06: the nearest misses it by" in out
    assert "no limit is given" in said(invoke(*asked, code=2))
    candidates.write_text("candidates:\n  eight: {method: Int9}\n")
    assert "Int9" in said(invoke(*asked, "--quality", 0.9, code=2))
    candidates.write_text('layers:\n  "*": {method: Int8}\n')
    assert "it holds layers, expected a table candidates" in said(invoke(*asked, "--quality", 0.9, code=2))


def test_a_machine_is_profiled(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pc, "profile", partial(pc.profile, rows=(1,), sizes=(32,)))
    path = home / "machine.toml"
    assert "here, " in invoke("profile", "-o", path, "--name", "here").output
    assert Machine.load(path).name == "here"


def test_adjustments_are_named(graph: Path, every: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    invoke("compress", graph, "--plan", every, "-o", small)
    out = invoke("deploy", "onnxruntime", small, "-o", tmp_path / "x.onnx", "--adjust", "int32_tokens").output
    assert "adjusted: int32_tokens" in out
    refused = invoke("deploy", "onnxruntime", small, "-o", tmp_path / "x.onnx", "--adjust", "int31", code=2)
    assert "'int31' is none, expected some of gelu_tanh" in said(refused)
