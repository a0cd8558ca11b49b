"""all-MiniLM-L6-v2 end to end: `python benchmarks/models.py` writes benchmarks/results/models.jsonl.

Beside the variants of the demo: torch's onednn engine, ONNX Runtime's dynamic int8 per channel, per channel
with reduced range, and with u8 weights; and ONNX Runtime as it comes, its workers spinning on, which pays at
one row.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from pycompress import benchmark, cli, demo

RESULTS = Path(__file__).parent / "results"
SHAPES = (*demo.SHAPES, (1, 16))


def peers() -> dict[str, demo.BuildVariant]:
    """The peers of the demo and their further settings."""
    dynamic = demo.ort_dynamic
    try:
        from onnxruntime.quantization import QuantType

        u8_weights = {"onnxruntime dynamic int8, u8 weights": partial(dynamic, weight_type=QuantType.QUInt8)}
    except ModuleNotFoundError:
        u8_weights = {}
    return {
        **demo.PEERS,
        "torch quantize_dynamic, onednn": partial(demo.torch_dynamic, engine="onednn"),
        "onnxruntime dynamic int8, spinning": partial(dynamic, spinning=True),
        "onnxruntime dynamic int8, per channel": partial(dynamic, per_channel=True),
        "onnxruntime dynamic int8, reduced range": partial(dynamic, per_channel=True, reduce_range=True),
        **u8_weights,
    }


@click.command()
@click.option("--quick", is_flag=True, help="The demo's peers, 3 rounds.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--sentences", type=click.IntRange(min=2), default=512, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "models.jsonl")
def models(*, quick: bool, rounds: int, sentences: int, output: Path) -> None:
    """Size, latency and closeness to fp32 of every way to run the model."""
    model, tokenizer = demo.load()
    environment = benchmark.Environment.collect()
    with TemporaryDirectory() as folder:
        variants, missing = demo.build(model, Path(folder), demo.PEERS if quick else peers())
        records = demo.measure(
            variants,
            tokenizer,
            sentences=demo.docstring_sentences(sentences),
            shapes=SHAPES,
            rounds=3 if quick else rounds,
        )
    benchmark.write_json_lines(output, environment, records)
    console = cli.console()
    console.print(cli.environment_text(environment.as_dict()))
    console.print(demo.table(records, missing))


if __name__ == "__main__":
    models()
