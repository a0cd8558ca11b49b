"""The command line: `pycompress compress`, `validate`, `export`, `deploy`, `report`, `search`, `profile`, `info`, `bench`, `demo`.

Exit codes: 0 for success; 1 for a failure, such as a validation that found a difference; 2 for wrong usage, such as a plan that
names no method, or a model that cannot be read.
"""

from __future__ import annotations

import sys

try:
    import click
    import rich  # noqa: F401 - all commands print with it
except ModuleNotFoundError as error:
    sys.exit(f'pycompress: the command line needs {error.name}: pip install "pycompress[cli]"')

from pycompress.cli import bench, compress, demo, deploy, export, info, report, search, validate
from pycompress.cli.tables import environment_text
from pycompress.cli.terminal import console

__all__ = [
    "bench",
    "compress",
    "console",
    "demo",
    "deploy",
    "environment_text",
    "export",
    "info",
    "main",
    "pycompress",
    "report",
    "search",
    "validate",
]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pycompress")
def pycompress() -> None:
    """Compressed layers for PyTorch: fast int8, sparse and low-rank kernels, validated against ONNX Runtime."""


for command in (
    *(compress.compress, validate.validate, export.export, deploy.deploy, report.report, search.search),
    *(search.profile, info.info, bench.bench, demo.demo),
):
    pycompress.add_command(command)


def main() -> None:
    """The entry point of the `pycompress` command."""
    try:
        pycompress()
    except ImportError as error:  # a package of an extra is missing, or PYCOMPRESS_ISA names no instruction set
        sys.exit(f"pycompress: {error}")
