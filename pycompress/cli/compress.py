"""`pycompress compress`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from rich.progress import track

from pycompress.cli.failing import reading, working
from pycompress.cli.options import INPUTS, JSON, SOURCE, writable
from pycompress.cli.terminal import console, json_text


@click.command()
@SOURCE
@click.option(
    "--plan", "plan_path", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML or YAML: for each glob of layers a method and its settings.",
)  # fmt: skip
@click.option(
    "--output", "-o", required=True, type=click.Path(dir_okay=False, path_type=Path), callback=writable,
    help="The safetensors file to write.",
)  # fmt: skip
@click.option(
    "--calibrate", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A .txt file with a text in each line, or an .npz file with an array for each input. May be given several times.",
)  # fmt: skip
@INPUTS
@click.option("--only-if-faster", is_flag=True, help="Keep layers dense that are not faster, measured here.")
@JSON
def compress(
    source_path: Path, plan_path: Path, output: Path, calibrate: tuple[Path, ...], inputs: str | None, only_if_faster: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Compress MODEL by a plan.

    MODEL is a folder of transformers (config.json, *.safetensors), an exported program (.pt2) or an ONNX file. What is written
    knows where MODEL lies; the commands that take it need MODEL again, of a folder the config alone.
    """
    import pycompress as pc
    from pycompress.cli.inputs import batches, inputs_for
    from pycompress.cli.plan import read_plan
    from pycompress.cli.source import open_source

    err = console(stderr=True)
    with reading():
        plan = read_plan(plan_path)
        with err.status(f"reading {source_path}"):
            source = open_source(source_path)
        example = inputs_for(source, inputs) if inputs or source.ports or only_if_faster else None
        seen = batches(source, calibrate)
    with reading():  # what these refuse is the plan, for this model
        calibration = None
        if seen:
            watched = track(seen, "calibrating", console=err, transient=True)
            calibration = pc.calibrate(source.model, watched, plan=plan)
        with err.status("compressing"):
            model = pc.compress(
                source.model,
                plan,
                calibration=calibration,
                example_inputs=example,
                only_if_faster=only_if_faster,
                inplace=True,
            )
    with working():
        pc.save(model, output, about=source.about(output))
    summary = pc.summary(model)
    if as_json:
        facts = {"output": str(output), "file_bytes": output.stat().st_size, "dense_bytes": summary.dense_bytes}
        click.echo(json_text({**facts, "bytes": summary.bytes, "layers": [*map(asdict, summary.layers)]}))
        return
    click.echo(str(summary))
    click.echo(f"{output}: {output.stat().st_size:,} bytes")
