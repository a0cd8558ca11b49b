"""`pycompress report`."""

from __future__ import annotations

from pathlib import Path

import click

from pycompress.cli.failing import reading, working
from pycompress.cli.options import COMPRESSED, DENSE, INPUTS, writable
from pycompress.cli.terminal import console


@click.command()
@COMPRESSED
@click.option(
    "--output", "-o", required=True, type=click.Path(dir_okay=False, path_type=Path), callback=writable,
    help="The page to write: .html, .md or .json.",
)  # fmt: skip
@DENSE
@INPUTS
@click.option(
    "--plan", "plan_path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="To stand on it."
)
def report(path: Path, output: Path, model: Path | None, inputs: str | None, plan_path: Path | None) -> None:
    """Write a page about a COMPRESSED model: its layers before and after, and what the validation finds."""
    import pycompress as pc
    from pycompress.cli.inputs import inputs_for
    from pycompress.cli.plan import read_plan
    from pycompress.cli.source import open_compressed, open_source, path_of_dense

    err = console(stderr=True)
    with reading(), err.status(f"reading {path}"):
        plan = None if plan_path is None else dict(read_plan(plan_path))
        place = model or path_of_dense(path)
        dense = open_source(place)
        source, example = open_compressed(path, place, lambda found: inputs_for(found, inputs))
    with working(), err.status("validating"):
        pc.report(
            dense.model, source.model, output, validation=pc.validate(source.model, example), plan=plan, title=path.name
        )
    click.echo(f"{output}: {output.stat().st_size:,} bytes")
