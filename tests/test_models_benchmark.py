"""benchmarks/models.py: whole models with fakes in the place of the model and of its peers, and what is printed of them."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

from pycompress import demo
from pycompress.benchmark import Record, Timing, UnavailableError
from pycompress.benchmark.environment import Environment

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, by a name that its child processes find, too."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("models")


class Encoder(nn.Module):
    """Tokens -> hidden state, as transformers' models answer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.linear = nn.Linear(16, 16)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.linear(self.embedding(input_ids)) * attention_mask.unsqueeze(-1))


class Tokenizer:
    """A token a word: how many letters it has."""

    cls_token_id, sep_token_id = 1, 2

    def __call__(self, texts: str | list[str], **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [min(len(word), 49) for word in texts.split()]}
        rows = [torch.tensor(self(text)["input_ids"]) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def same(model: nn.Module, folder: Path) -> demo.Variant:
    return demo.Variant(partial(demo.call_module, model), 1_000_000, None)


def absent(model: nn.Module, folder: Path) -> demo.Variant:
    raise UnavailableError("not installed: rival\nand more that nobody reads")


def fails(model: nn.Module, folder: Path) -> demo.Variant:
    def forward(batch: demo.Batch) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    return demo.Variant(forward, 0, None)


@pytest.fixture
def fake(models: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark in this process, with a model, a tokenizer and peers of nothing, two short batches and short turns."""
    others = {"openvino fp32": same, "openvino int8": absent, "ctranslate2 int8": fails}
    monkeypatch.setattr(demo, "load", lambda: (Encoder().eval(), Tokenizer()))
    monkeypatch.setattr(demo, "timed", partial(demo.timed, min_time_s=0.0))
    monkeypatch.setattr(models, "peers", lambda *_: others)
    monkeypatch.setattr(models, "SHAPES", ((2, 8),))
    monkeypatch.setattr(models, "SENTENCES", (3,))
    monkeypatch.setattr(models, "busy_cores", lambda run: 1.0)
    monkeypatch.setattr(models, "in_a_process", lambda threads, function, *arguments: function(*arguments))
    return models


def test_a_run_measures_who_runs_and_says_why_others_do_not(fake: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "models.jsonl"
    arguments = ["--rounds", "2", "--sentences", "12", "--output", str(output)]
    result = CliRunner().invoke(fake.models, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    first, *records = map(json.loads, output.read_text().splitlines())
    assert first["environment"]["threads"] == torch.get_num_threads()
    found = {record["candidate"]: record for record in records}
    assert found["openvino int8"]["missing"] == "not installed: rival"
    assert found["ctranslate2 int8"]["missing"] == "no such instruction"
    assert "openvino int8: not installed: rival" in result.output
    for name in (demo.BASELINE, "openvino fp32", *fake.ours()):
        assert [(cell["batch"], cell["length"]) for cell in found[name]["latency"]][:1] == [(2, 8)]
        assert found[name]["cosine_min"] > 0.99
        assert name in result.output
    ours = found["pycompress Int8(7)"]["latency"]
    assert [set(cell["time_ratio"]) for cell in ours] == [found.keys() - {"openvino int8", "ctranslate2 int8"} - {
        "pycompress Int8(7)"
    }] * 2  # fmt: skip
    assert ours[1]["tokens"] < ours[1]["batch"] * ours[1]["length"]
    assert "pycompress Int8(7) / openvino" in result.output
    assert "3 mixed" in result.output


def test_each_number_of_threads_has_its_environment(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = Environment.collect()
    asked = []

    def child(threads: int, *_: Any) -> Any:
        asked.append(threads)
        return models.Measured(environment, [record("torch fp32", threads=threads)])

    monkeypatch.setattr(models, "in_a_process", child)
    output = tmp_path / "of" / "models.jsonl"
    arguments = ["--threads", "1", "--threads", "2", "--output", str(output)]
    result = CliRunner().invoke(models.models, arguments, catch_exceptions=False)
    assert asked == [1, 2]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert ["environment" in line for line in lines] == [True, False] * 2
    assert "1 thread(s)" in result.output
    assert "2 thread(s)" in result.output


def test_a_process_has_its_threads(models: ModuleType) -> None:
    assert models.in_a_process(3, torch.get_num_threads) == 3


def record(candidate: str, threads: int = 2, **ratios: float) -> Record:
    cell = {
        "batch": 1, "length": 16, "tokens": 16, "ms": 12.5, "speedup": 1.0,
        "time_ratio": {name.replace("_", " "): [value, value, value] for name, value in ratios.items()},
    }  # fmt: skip
    return {
        "model": "all-MiniLM-L6-v2", "threads": threads, "sentences": 4, "candidate": candidate, "file_bytes": 90.9e6,
        "cores": 1.96, "cosine_mean": 1.0, "cosine_min": 0.9991, "latency": [cell],
    }  # fmt: skip


def test_ours_are_compared_with_the_fastest_of_each_group(models: ModuleType) -> None:
    records = [
        record("torch fp32"),
        record("pycompress Int8(7)", openvino_fp32=3.0, openvino_int8=1.25, onnxruntime_dynamic_int8=1.5),
        record("pycompress Int8(8), layers alone", openvino_fp32=9.0),
    ]
    assert list(models.comparisons(records)) == [
        ("pycompress Int8(7) / onnxruntime int8", ["1.50x"]),
        ("pycompress Int8(7) / openvino", ["1.25x"]),
    ]
    console = Console(width=models.WIDTH, record=True)
    console.print(models.table(records))
    row = next(line.split() for line in console.export_text().splitlines() if "90.9" in line)
    assert row == ["torch", "fp32", "90.9", "12.5", "1.00x", "2.0", "1.0000", "0.9991"]


def test_every_rival_is_a_peer(models: ModuleType) -> None:
    known = models.peers(None, [])
    assert [name for names in models.RIVALS.values() for name in names if name not in known] == []


def test_a_block_stands_beside_the_sum_of_its_products(models: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"torch fp32": (8.0, 8.0), "up": (1.0, 2.0), "down": (2.0, 2.0)}
    called = {}

    def interleave(calls: dict[str, Any], **_: Any) -> dict[str, Timing]:
        called.update({name: call().shape for name, call in calls.items()})
        return {name: Timing(seconds.get(name, (6.0, 6.0))) for name in calls}

    monkeypatch.setattr(models.benchmark, "interleave", interleave)
    block = nn.Sequential()
    block.add_module("up", nn.Linear(16, 32))
    block.add_module("down", nn.Linear(32, 16))
    model = nn.Sequential(block)
    first, *_ = records = models.measure_block("small", model, "0", length=5, batch=3, rounds=2)
    assert called["up"] == (3, 5, 32)
    assert called["down"] == called["torch fp32"] == called["pycompress Int8(8)"] == (3, 5, 16)
    assert {record["candidate"] for record in records} >= {"pycompress Int8(8)", "pycompress Int8(7)"}
    assert first["products_ms"] == 3500.0
    assert first["over_products"] == pytest.approx((6 / 3 + 6 / 4) / 2)
    assert first["speedup"] == pytest.approx(8 / 6)
    console = Console(width=models.WIDTH, record=True)
    console.print(models.block_table(records))
    assert "small block, 3x5" in console.export_text()


@pytest.mark.parametrize("name", ["BERT-base", "ViT-base"])
def test_the_blocks_are_of_the_usual_sizes(models: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra pycompress[demo]")
    family, _ = models.BLOCKS[name]
    if family == "Bert":  # the words are none of the block's
        monkeypatch.setattr(transformers, "BertConfig", partial(transformers.BertConfig, vocab_size=8))
    model, path = models.one_block(family)
    block = model.get_submodule(path)
    shapes = sorted(tuple(layer.weight.shape) for layer in block.modules() if isinstance(layer, nn.Linear))
    assert shapes == sorted([(768, 768)] * 4 + [(3072, 768), (768, 3072)])
