"""`pycompress validate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from pycompress.cli.failing import reading
from pycompress.cli.options import COMPRESSED, DENSE, INPUTS, JSON
from pycompress.cli.terminal import console, json_text


@click.command()
@COMPRESSED
@DENSE
@INPUTS
@click.option("--layer", "layers", multiple=True, help="Name or glob of layers to compare; all by default.")
@click.option(
    "--exported", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Hold a file that was exported from the model against it.",
)  # fmt: skip
@JSON
def validate(
    path: Path, model: Path | None, inputs: str | None, layers: tuple[str, ...], exported: Path | None, as_json: bool
) -> None:
    """Hold a COMPRESSED model against ONNX Runtime, layer by layer and as a whole.

    COMPRESSED is a file that `pycompress compress` wrote. The exit code is 1 where a difference was found, or nothing compared.
    """
    import pycompress as pc
    from pycompress.cli.inputs import inputs_for
    from pycompress.cli.source import open_compressed

    with reading():
        with console(stderr=True).status(f"reading {path}"):
            source, example = open_compressed(path, model, lambda dense: inputs_for(dense, inputs))
        with console(stderr=True).status("validating"):
            report = pc.validate(source.model, example, layers=layers or None, exported=exported)
    if as_json:
        facts = {**asdict(report), "ok": report.ok, "verdict": report.verdict}
        click.echo(json_text(facts))
    else:
        click.echo(str(report))
    if not report.ok:
        raise click.exceptions.Exit(1)
