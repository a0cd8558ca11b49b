"""`pycompress demo`."""

from __future__ import annotations

import click

from pycompress.cli.terminal import console


@click.command()
@click.option("--sentences", type=click.IntRange(min=2), default=512, show_default=True, help="For the cosines.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Turns of each variant.")
def demo(sentences: int, rounds: int) -> None:
    """A trained sentence transformer, compressed, beside torch and ONNX Runtime."""
    from pycompress.demo import docstring_sentences, run

    try:
        texts = docstring_sentences(sentences)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not run(console(), texts, rounds=rounds):
        raise click.ClickException("the validation found a difference, see above")
