"""The example of the guide "From Keras and JAX to two runtimes", all of it; `make migrate` installs what it needs."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

MISSING = [
    name for name in ("keras", "jax2onnx", "openvino") if find_spec(name) is None
]  # (the example chooses Keras's backend)
if MISSING:
    pytest.skip(f"{MISSING[0]} is not installed: `make migrate` installs it apart", allow_module_level=True)

EXAMPLE = Path(__file__).parent.parent / "examples" / "migrate.py"


@pytest.mark.slow
def test_all_the_way() -> None:
    example = runpy.run_path(str(EXAMPLE))
    found = example["main"](["onnxruntime", "openvino"], epochs=10)
    assert [*found] == ["Keras, CNN", "JAX, MLP"]
    for steps in found.values():
        framework, imported, compressed, *deployed = steps
        assert framework.accuracy > 0.95
        assert imported.agrees == 1
        assert [step.place for step in deployed] == ["onnxruntime", "openvino"]
        for step in (compressed, *deployed):
            assert step.agrees > 0.98
            assert step.bytes < 0.3 * framework.bytes
