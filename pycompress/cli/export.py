"""`pycompress export`."""

from __future__ import annotations

from pathlib import Path

import click

from pycompress.cli.failing import reading, working
from pycompress.cli.options import COMPRESSED, DENSE, INPUTS, JSON, writable
from pycompress.cli.terminal import console, json_text


@click.command()
@COMPRESSED
@click.option(
    "--output", "-o", required=True, type=click.Path(dir_okay=False, path_type=Path), callback=writable,
    help="The ONNX file to write.",
)  # fmt: skip
@DENSE
@INPUTS
@click.option(
    "--form", type=click.Choice(["exact", "fused", "kernels"]), default="exact", show_default=True,
    help="The integers of our kernels, what runtimes have one operator for, or our kernels themselves.",
)  # fmt: skip
@JSON
def export(path: Path, output: Path, model: Path | None, inputs: str | None, form: str, as_json: bool) -> None:
    """Write a COMPRESSED model as one ONNX file, its weights compressed."""
    import pycompress as pc
    from pycompress.cli.inputs import inputs_for
    from pycompress.cli.source import open_compressed

    err = console(stderr=True)
    with reading(), err.status(f"reading {path}"):
        source, example = open_compressed(path, model, lambda dense: inputs_for(dense, inputs))
    with working(), err.status("exporting"):
        pc.export(source.model, output, example, source.dynamic_of(example), form=form)
    size = output.stat().st_size
    if as_json:
        click.echo(json_text({"output": str(output), "bytes": size, "form": form}))
    else:
        click.echo(f"{output}: {size:,} bytes, {form} form")
