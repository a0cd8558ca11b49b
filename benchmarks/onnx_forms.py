"""The forms of an exported model in ONNX Runtime: `python benchmarks/onnx_forms.py` prints milliseconds and how many times as fast
as ONNX Runtime's float32 each is, and writes benchmarks/results/onnx_forms.jsonl.

all-MiniLM-L6-v2, in turns: ONNX Runtime's float32 and its own dynamic int8, our `Int8(8)` and `Int4()` in the forms `exact`,
`fused` and `kernels` (our kernels as custom ops), and the compressed model in torch, whose blocks run as one op each.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

import pycompress as pc
from pycompress import benchmark, cli, demo, onnx
from pycompress.benchmark import interleave, ratio
from pycompress.demo import Batch

SHAPES = ((1, 16), (1, 128), (8, 64), (32, 128))  # (batch, length)
PLANS = {"Int8(8)": pc.Int8(), "Int4()": pc.Int4()}
BASELINE = "onnxruntime fp32"


@click.command()
@click.option("--rounds", type=click.IntRange(min=3), default=9, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "onnx_forms.jsonl"
)
def main(rounds: int, threads: int, output: Path) -> None:
    """Print a line for each variant."""
    torch.set_num_threads(threads)
    environment = benchmark.Environment.collect()
    click.echo(cli.environment_text(environment.as_dict()))
    model, tokenizer = demo.load()
    batches = [demo.token_batch(tokenizer, demo.docstring_sentences(64), *shape) for shape in SHAPES]
    dynamic = {0: "batch", 1: "length"}
    records: list[benchmark.Record] = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = demo.exported(model, folder)
        sessions = {
            BASELINE: benchmark.ort_session(str(source)),
            "onnxruntime dynamic int8": benchmark.ort_session(str(demo.ort_quantized(source, folder / "int8.onnx"))),
        }
        modules = {}
        for plan, method in PLANS.items():
            small = modules[f"{plan}, in torch"] = pc.compress(model, method)
            for form in ("exact", "fused", "kernels"):
                path = folder / f"{plan}-{form}.onnx"
                with demo.quiet():
                    pc.export(small, path, batches[1], dynamic, form=form)
                sessions[f"{plan}, {form}"] = onnx.session(path, threads=threads)

        def run(name: str, batch: Batch) -> object:
            return sessions[name].run(None, {one.name: batch[one.name].numpy() for one in sessions[name].get_inputs()})

        for shape, batch in zip(SHAPES, batches, strict=True):
            runs = {name: partial(run, name, batch) for name in sessions}
            runs |= {name: partial(demo.call_module, module, batch) for name, module in modules.items()}
            with torch.inference_mode():
                times = interleave(runs, rounds=rounds, min_time_s=0.05, pause_s=0.02)
            click.echo(f"{shape[0]} x {shape[1]}")
            for name, own in times.items():
                gain = ratio(times[BASELINE], own)
                click.echo(f"  {name:28} {1e3 * own.median:8.2f} ms {gain.median:6.2f}x")
                records.append({"candidate": name, "shape": shape, "ms": 1e3 * own.median, "fp32_over": list(gain)})
    benchmark.write_json_lines(output, environment, records)


if __name__ == "__main__":
    main()
