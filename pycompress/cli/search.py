"""`pycompress search` and `pycompress profile`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pycompress.cli.failing import reading, working
from pycompress.cli.options import INPUTS, JSON, SOURCE, writable
from pycompress.cli.terminal import console, json_text

if TYPE_CHECKING:
    from pycompress.methods.method import Method

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)


@click.command()
@SOURCE
@click.option("--output", "-o", required=True, type=OUTPUT, callback=writable, help="The TOML file of the best plan.")
@click.option(
    "--calibrate", multiple=True, required=True, type=FILE,
    help="A .txt file with a text in each line, or an .npz file, from which layers are compressed. May be given several times.",
)  # fmt: skip
@click.option(
    "--judge", multiple=True, type=FILE, help="Such files by which quality is measured; else those of --calibrate."
)
@click.option("--ms", type=click.FloatRange(0, min_open=True), help="The most milliseconds of a call.")
@click.option("--mb", type=click.FloatRange(0, min_open=True), help="The most bytes of the model, in 1e6.")
@click.option(
    "--layer-mb", type=click.FloatRange(0, min_open=True), help="The most bytes of the layers searched, in 1e6."
)
@click.option("--quality", type=float, help="The least cosine of the outputs to those of the dense model.")
@click.option("--candidates", type=FILE, help="TOML or YAML: a table `candidates`, each in the words of a plan.")
@click.option("--target", type=FILE, help="The machine that the plan is for: a file of `pycompress profile`.")
@click.option("--workers", type=click.Choice(["ray"]), help="Who rates plans: a Ray cluster; else this process.")
@click.option("--cache", type=OUTPUT, help="Keeps measurements, so that a search that was stopped repeats none.")
@INPUTS
@JSON
def search(
    source_path: Path, output: Path, calibrate: tuple[Path, ...], judge: tuple[Path, ...], ms: float | None, mb: float | None,
    layer_mb: float | None, quality: float | None, candidates: Path | None, target: Path | None, workers: str | None,
    cache: Path | None, inputs: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Find a plan for MODEL under limits of time, size and quality, by measuring.

    The exit code is 1 where no plan keeps to the limits: the nearest one is written, and what it misses is said.
    """
    import pycompress as pc
    from pycompress.cli.inputs import batches, inputs_for
    from pycompress.cli.plan import read_candidates
    from pycompress.cli.source import open_source
    from pycompress.search.machine import Machine

    given = {"ms": ms, "mb": mb, "layer_mb": layer_mb, "quality": quality}
    limits = {name: value for name, value in given.items() if value is not None}
    if not limits:
        raise click.UsageError("no limit is given, expected some of --ms, --mb, --layer-mb, --quality")
    err = console(stderr=True)
    with reading():
        own: dict[str, Method] = {"int8": pc.Int8(), "int8 a7": pc.Int8(7), "int4": pc.Int4()}
        methods = read_candidates(candidates) if candidates else own
        machine = Machine.load(target) if target else None
        with err.status(f"reading {source_path}"):
            source = open_source(source_path)
        example, seen = inputs_for(source, inputs), batches(source, calibrate)
        judged = batches(source, judge) if judge else seen
    with reading():  # what these refuse is what was given, for this model
        calibration = pc.calibrate(source.model, seen)
        front = pc.search(
            source.model,
            methods,
            judged,
            limits,
            example_inputs=example,
            calibration=calibration,
            target=machine,
            workers=workers,
            cache=cache,
        )
    with working():
        front.best.plan.save(output)
    if as_json:
        points = [
            {**asdict(point.measured), "predicted": asdict(point.predicted), "best": point is front.best,
             "plan": {name: repr(method) for name, method in point.plan.items()}}
            for point in front
        ]  # fmt: skip
        click.echo(json_text({"output": str(output), "limits": limits, "missed": front.missed, "front": points}))
    else:
        click.echo(str(front))
        click.echo(f"{output}: the best plan")
    if front.missed:
        raise click.exceptions.Exit(1)


@click.command()
@click.option("--output", "-o", required=True, type=OUTPUT, callback=writable, help="The TOML file to write.")
@click.option("--name", default="", help="Of the machine; its processor's otherwise.")
@click.option("--candidates", type=FILE, help="TOML or YAML, as for `search`; int8 and int4 otherwise.")
def profile(output: Path, name: str, candidates: Path | None) -> None:
    """Measure this machine: how long layers of each candidate take, for searches of plans elsewhere."""
    import pycompress as pc
    from pycompress.cli.plan import read_candidates

    with reading():
        machine = pc.profile(read_candidates(candidates) if candidates else None, name=name)
    with working():
        machine.save(output)
    click.echo(f"{output}: {machine.name}, {machine.threads} threads")
