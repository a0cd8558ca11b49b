"""`pycompress deploy`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from pycompress.cli.failing import reading, working
from pycompress.cli.options import COMPRESSED, DENSE, INPUTS, JSON
from pycompress.cli.terminal import console, json_text


@click.command()
@click.argument("target")
@COMPRESSED
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="The file, or folder, that is written."
)
@DENSE
@INPUTS
@click.option("--widen", is_flag=True, help="Let layers be stored in a wider encoding where the target lacks theirs.")
@click.option(
    "--adjust",
    multiple=True,
    metavar="NAME",
    help="What may be changed first, such as gelu_tanh. May be given several times.",
)
@JSON
def deploy(
    target: str, path: Path, output: Path, model: Path | None, inputs: str | None, widen: bool, adjust: tuple[str, ...],
    as_json: bool,
) -> None:  # fmt: skip
    """Write a COMPRESSED model for TARGET, such as onnxruntime, and say what becomes of each layer.

    The exit code is 1 where the target would refuse or widen a layer, or where its file, run here, gives something else.
    """
    import pycompress as pc
    from pycompress.cli.inputs import inputs_for
    from pycompress.cli.source import open_compressed
    from pycompress.targets import ADJUSTMENTS, TARGETS

    if target not in TARGETS:
        raise click.BadParameter(f"{target!r} is none, expected one of {', '.join(TARGETS)}", param_hint="TARGET")
    if other := [name for name in adjust if name not in ADJUSTMENTS]:
        raise click.BadParameter(
            f"{other[0]!r} is none, expected some of {', '.join(ADJUSTMENTS)}", param_hint="--adjust"
        )
    err = console(stderr=True)
    with reading(), err.status(f"reading {path}"):
        source, example = open_compressed(path, model, lambda dense: inputs_for(dense, inputs))
    with working(), err.status(f"deploying to {TARGETS[target].title}"):
        dynamic = source.dynamic_of(example) if TARGETS[target].open_sizes else None
        done = pc.deploy(source.model, target, output, example, dynamic, widen=widen, adjust=adjust)
    if as_json:
        layers = {name: {"method": label, **asdict(carried)} for name, (label, carried) in done.layers.items()}
        click.echo(json_text({**asdict(done), "layers": layers, "ok": done.ok, "verdict": done.verdict}))
    else:
        click.echo(str(done))
        if not TARGETS[target].open_sizes:
            click.echo("it runs at the sizes of the example inputs only")
    if done.checked is not None and not done.ok:
        raise click.exceptions.Exit(1)
