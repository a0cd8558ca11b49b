"""What `pip install` makes of the sources where there is no C++ compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent

USE = """
import sys, warnings
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
sys.path.insert(0, sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pycompress as pc
assert pc.__file__.startswith(sys.argv[1]), pc.__file__
import torch
layer = pc.compress(torch.nn.Sequential(torch.nn.Linear(40, 24)), pc.Int8())
assert layer(torch.randn(3, 40)).shape == (3, 24)
print(*[str(warning.message) for warning in caught if "native" in str(warning.message)], sep="\\n")
"""


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A wheel of this repository in `folder`, by an environment that names compilers which are not there."""
    pytest.importorskip("scikit_build_core", reason="needs the build's requirements, which `make test` installs")
    settings = [f"build-dir={folder / 'build'}", *options]
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder, ROOT,
         *(f"--config-settings={setting}" for setting in settings)],
        env={**os.environ, "CC": "/nowhere/cc", "CXX": "/nowhere/c++"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_without_a_compiler_the_twin_is_installed(
    tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".pyd"))]
        archive.extractall(tmp_path / "site")
    used = python(USE, tmp_path / "site")
    assert used.returncode == 0, used.stderr
    assert used.stdout.count("pycompress runs without native kernels") == 1
    assert "times slower" in used.stdout


def test_a_compiler_can_be_asked_for(tmp_path: Path) -> None:
    done = build(tmp_path, "cmake.define.PYCOMPRESS_NATIVE=ON")
    assert done.returncode != 0
    assert "CMAKE_CXX_COMPILER" in done.stdout + done.stderr
