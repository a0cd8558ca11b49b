"""all-MiniLM-L6-v2 end to end: `python benchmarks/models.py` writes benchmarks/results/models.jsonl, with `--low-rank`
the low-rank variants beside Int8 and torch, to low_rank_models.jsonl.

Beside the variants of the demo: torch's onednn engine, ONNX Runtime's dynamic int8 per channel, per channel
with reduced range, and with u8 weights; and ONNX Runtime as it comes, its workers spinning on, which pays at
one row.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from pycompress import benchmark, cli, demo
from pycompress.demo import Recipe
from pycompress.methods import Int8, LowRank

RESULTS = Path(__file__).parent / "results"
SHAPES = (*demo.SHAPES, (1, 16))

# 192 is half the rank of every layer; float32 factors of that rank are no smaller than a 384x384 layer, which the guard would
# leave dense. With 8 bits a rank of 252 takes as many bytes as Int8.
HALF, EQUAL_BYTES = 192, 252
BESIDE = LowRank(8, bits=8, residual=Int8(7))
LOW_RANK = {
    "Int8(8)": Recipe(Int8(8)),
    "Int8(7)": Recipe(Int8(7)),
    "half rank": Recipe(LowRank(HALF, rank_guard=False)),
    "half rank, calibrated": Recipe(LowRank(HALF, rank_guard=False), calibrated=True),
    "half rank, int8 factors, calibrated": Recipe(LowRank(HALF, bits=8), calibrated=True),
    "rank 252, int8 factors": Recipe(LowRank(EQUAL_BYTES, bits=8)),
    "rank 252, int8 factors, calibrated": Recipe(LowRank(EQUAL_BYTES, bits=8), calibrated=True),
    "rank 8, int8 factors + Int8(7), calibrated": Recipe(BESIDE, calibrated=True),
    "the same, 2 alternations": Recipe(replace(BESIDE, alternations=2), calibrated=True),
    "rank 32 + Int8(7), calibrated": Recipe(LowRank(32, residual=Int8(7)), calibrated=True),
    "rank 32 + Int8(8), calibrated": Recipe(LowRank(32, residual=Int8(8)), calibrated=True),
}


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
@click.option("--low-rank", is_flag=True, help="The low-rank variants, without peers.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--sentences", type=click.IntRange(min=2), default=512, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines; a file of benchmarks/results by default.")
def models(*, quick: bool, low_rank: bool, rounds: int, sentences: int, output: Path | None) -> None:
    """Size, latency and closeness to fp32 of every way to run the model."""
    model, tokenizer = demo.load()
    environment = benchmark.Environment.collect()
    output = output or RESULTS / ("low_rank_models.jsonl" if low_rank else "models.jsonl")
    chosen = {} if low_rank else demo.PEERS if quick else peers()
    texts = demo.docstring_sentences(sentences)
    with TemporaryDirectory() as folder:
        others = demo.docstring_sentences(demo.CALIBRATION_SENTENCES, besides=texts)
        calibration = demo.calibrated(model, tokenizer, others)
        recipes = LOW_RANK if low_rank else demo.RECIPES
        variants, missing = demo.build(model, Path(folder), chosen, recipes, calibration)
        records = demo.measure(
            variants,
            tokenizer,
            sentences=texts,
            shapes=SHAPES,
            rounds=3 if quick else rounds,
        )
    benchmark.write_json_lines(output, environment, records)
    console = cli.console()
    console.print(cli.environment_text(environment.as_dict()))
    console.print(demo.table(records, missing))


if __name__ == "__main__":
    models()
