"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click


def writable(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Whether the file can be written, found out before anything is measured; it is left as it was."""
    if path is None:
        return None
    if path == Path():  # what an empty name becomes
        raise click.BadParameter("it is empty, expected the name of a file")
    missing = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise click.BadParameter(f"'{path}' cannot be written: {error.strerror}") from error
    if missing:
        path.unlink()
    return path


SOURCE = click.argument("source_path", metavar="MODEL", type=click.Path(exists=True, path_type=Path))
COMPRESSED = click.argument("path", metavar="COMPRESSED", type=click.Path(exists=True, dir_okay=False, path_type=Path))
DENSE = click.option(
    "--model", type=click.Path(exists=True, path_type=Path), help="The model that was compressed, if it has moved."
)
INPUTS = click.option(
    "--inputs", metavar="SIZES|FILE.npz", help="Sizes of inputs to draw, such as batch=8,length=64; or the inputs."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
