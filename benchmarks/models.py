"""Whole models beside the whole of what a user would pick: `python benchmarks/models.py` writes benchmarks/results/models.jsonl.

all-MiniLM-L6-v2 in torch, ONNX Runtime, OpenVINO, CTranslate2 and here, at lengths that are full and at those of real text. With
`--blocks` one block of BERT-base and of ViT-base beside the sum of its products alone, to blocks.jsonl; with `--low-rank` the
low-rank variants beside Int8 and torch, to low_rank_models.jsonl. Each number of threads gets a process of its own, because not
every peer can change it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click
import numpy as np
import torch
from torch import nn

from pycompress import benchmark, cli, demo
from pycompress.benchmark import Environment, Record, Timing
from pycompress.benchmark.results import best_ratio, measured, time_ratios
from pycompress.demo import BASELINE, Batch, BuildVariant, Recipe, Variant
from pycompress.methods import Int8, LowRank
from pycompress.model import compress, compressed_layers
from pycompress.storage import load, save

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"
SHAPES = ((1, 16), (1, 64), (1, 128), (8, 64), (32, 128))  # (batch, length)
SENTENCES = (8, 32)  # batches of real text: each as long as its longest sentence, the others padded
WIDTH = 200  # of a table with a column for each of these

# ------------------------------------------------------------------------------------------------------ ours

BITS = (8, 7)
# For compress() and load(), by what is behind the name. Without blocks there are our layers, with the model's own code in between.
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    ", padding skipped": {"skip_padding": True},
    ", layers alone": {"blocks": False},
}


def our_name(bits: int, way: str = "") -> str:
    return f"pycompress Int8({bits}){way}"


def pycompress_int8(model: nn.Module, folder: Path, *, bits: int, **options: Any) -> Variant:
    """Compressed, saved, and loaded again into the dense model, as the demo does it."""
    path = folder / f"int8-{bits}.safetensors"
    save(compress(model, Int8(bits), **options), path)
    loaded = load(copy.deepcopy(model), path, **options)
    size = path.stat().st_size
    return Variant(partial(demo.call_module, loaded), size, demo.linear_share(model, size))


def ours() -> dict[str, BuildVariant]:
    return {
        our_name(bits, way): partial(pycompress_int8, bits=bits, **options)
        for way, options in WAYS.items()
        for bits in BITS
    }


# ----------------------------------------------------------------------------------------------------- peers


def torch_compile(model: nn.Module, _: Path) -> Variant:
    """As its users call it: the second shape makes it compile for all."""
    compiled = torch.compile(copy.deepcopy(model))
    size = sum(parameter.nbytes for parameter in model.parameters())
    return Variant(partial(demo.call_module, compiled), size, None)


def fused(model: Any, folder: Path) -> Path:
    """The ONNX graph, its blocks fused by ONNX Runtime's own tool, which knows attention only as it is written out."""
    path = folder / "fused.onnx"
    if not path.exists():
        written_out = copy.deepcopy(model)
        written_out.set_attn_implementation("eager")
        (folder / "eager").mkdir()
        source = demo.exported(written_out, folder / "eager")
        with demo.quiet():
            from onnxruntime.transformers.optimizer import optimize_model

            config = model.config
            optimized = optimize_model(
                str(source), "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
            )
            count = optimized.get_fused_operator_statistics()["Attention"]
            if count != config.num_hidden_layers:
                raise benchmark.UnavailableError(f"attention was fused in {count} blocks")
            optimized.save_model_to_file(str(path))
    return path


def ort_fused(model: nn.Module, folder: Path) -> Variant:
    return demo.ort_variant(fused(model, folder))


def ort_fused_dynamic(model: nn.Module, folder: Path) -> Variant:
    """The fused graph quantized as it stays closest: per channel, and with weights of 7 bits, whose products do not saturate."""
    source = fused(model, folder)
    from onnx import TensorProto

    options = {"per_channel": True, "reduce_range": True, "extra_options": {"DefaultTensorType": TensorProto.FLOAT}}
    return demo.ort_variant(demo.ort_quantized(source, folder / "fused-int8.onnx", **options))


def openvino_fp32(model: nn.Module, folder: Path) -> Variant:
    path = folder / "openvino.xml"
    if not path.exists():
        import openvino

        example = tuple(torch.ones(3, 2, 8, dtype=torch.int64, device="cpu"))
        with demo.quiet():
            converted = openvino.convert_model(demo.LastHiddenState(model).eval(), example_input=example)
        openvino.save_model(converted, path, compress_to_fp16=False)
    return openvino_variant(path)


def openvino_int8(model: nn.Module, folder: Path, *, tokenizer: Any, calibration: Sequence[str]) -> Variant:
    path = folder / "openvino-int8.xml"
    if not path.exists():
        import nncf
        import openvino

        openvino_fp32(model, folder)
        tokens = (tokenizer(sentence, return_tensors="np") for sentence in calibration)
        dataset = nncf.Dataset([[of[name] for name in demo.INPUTS] for of in tokens])
        with demo.quiet(), contextlib.redirect_stdout(io.StringIO()):
            source = openvino.Core().read_model(folder / "openvino.xml")
            quantized = nncf.quantize(
                source, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration)
            )
        openvino.save_model(quantized, path)
    return openvino_variant(path)


def openvino_variant(path: Path) -> Variant:
    """In float32 where nothing else was asked for: where the processor has bfloat16, it would take that of itself."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_HYPER_THREADING": True,  # or two threads of one core would be one
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def forward(batch: Batch) -> torch.Tensor:
        inputs = [batch[name].numpy() for name in demo.INPUTS]
        return torch.from_numpy(request.infer(inputs, share_inputs=True, share_outputs=True)[0])

    return Variant(forward, path.stat().st_size + path.with_suffix(".bin").stat().st_size, None)


def ctranslate2_int8(model: Any, folder: Path, *, tokenizer: Any) -> Variant:
    """It takes lengths, not masks: the same where padding comes last; and all tokens are of the first type."""
    import ctranslate2

    path = folder / "ctranslate2"
    if not path.exists():
        with demo.quiet():
            model.save_pretrained(folder / "hf")
            tokenizer.save_pretrained(folder / "hf")
            ctranslate2.converters.TransformersConverter(str(folder / "hf")).convert(str(path), quantization="int8")
    encoder = ctranslate2.Encoder(str(path), compute_type="int8", intra_threads=torch.get_num_threads())

    def view(tensor: torch.Tensor) -> Any:
        return ctranslate2.StorageView.from_array(tensor.int().numpy())

    def forward(batch: Batch) -> torch.Tensor:
        output = encoder.forward_batch(view(batch["input_ids"]), view(batch["attention_mask"].sum(dim=1)))
        return torch.from_numpy(np.asarray(output.last_hidden_state))

    return Variant(forward, (path / "model.bin").stat().st_size, None)


def peers(tokenizer: Any, calibration: Sequence[str]) -> dict[str, BuildVariant]:
    return {
        "torch.compile fp32": torch_compile,
        **demo.PEERS,
        "onnxruntime fp32, fused": ort_fused,
        "onnxruntime dynamic int8, fused": ort_fused_dynamic,
        "openvino fp32": openvino_fp32,
        "openvino int8": partial(openvino_int8, tokenizer=tokenizer, calibration=calibration),
        "ctranslate2 int8": partial(ctranslate2_int8, tokenizer=tokenizer),
    }


# Whom ours are compared with: the fastest of each.
RIVALS = {
    "onnxruntime int8": ("onnxruntime dynamic int8", "onnxruntime dynamic int8, fused"),
    "openvino": ("openvino fp32", "openvino int8"),
    "ctranslate2": ("ctranslate2 int8",),
}

# ------------------------------------------------------------------------------------------------- measuring


class Measured(NamedTuple):
    """What was measured with one number of threads."""

    environment: Environment
    records: list[Record]


def in_a_process(threads: int, function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns in a new process that has so many threads from the start."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=begin, initargs=(threads,)) as child:
        return child.submit(function, *arguments).result()


def begin(threads: int) -> None:
    torch.set_num_threads(threads)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # no peer tells anybody about the run


def sentence_batch(tokenizer: Any, count: int) -> Batch:
    """So many sentences of any length, padded to the longest."""
    tokens = tokenizer(demo.docstring_sentences(count), padding=True, return_tensors="pt")
    return {name: tokens[name] for name in demo.INPUTS}


def build(
    model: nn.Module, folder: Path, others: Mapping[str, BuildVariant], batch: Batch
) -> tuple[dict[str, Variant], dict[str, str]]:
    """The baseline, the peers that run here, tried on a batch, and ours, by name; why the other peers do not."""
    variants, missing = {BASELINE: demo.torch_fp32(model, folder)}, {}
    for name, build_variant in others.items():
        try:
            variant = build_variant(model, folder)
            with torch.inference_mode():
                variant.forward(batch)
        except Exception as error:  # whatever keeps a peer from running is reported; it is no failure of ours
            missing[name] = (str(error) or type(error).__name__).splitlines()[0]
        else:
            variants[name] = variant
    return {**variants, **{name: build_variant(model, folder) for name, build_variant in ours().items()}}, missing


def measure(
    variants: Mapping[str, Variant], tokenizer: Any, *, batches: Sequence[Batch], sentences: Sequence[str], rounds: int
) -> list[Record]:
    """One record per variant: latency per batch, of ours beside everybody's, and closeness to the baseline's embeddings."""
    timings = [demo.timed(variants, batch, rounds) for batch in batches]
    reference = demo.embed(variants[BASELINE].forward, tokenizer, sentences)
    return [
        {
            "model": "all-MiniLM-L6-v2",
            "threads": torch.get_num_threads(),
            "sentences": len(sentences),
            "candidate": name,
            "file_bytes": variant.file_bytes,
            "cores": busy_cores(partial(variant.forward, batches[-1])),
            **demo.closeness(demo.embed(variant.forward, tokenizer, sentences), reference),
            "latency": [
                {
                    **demo.latency(name, batch, found),
                    "tokens": int(batch["attention_mask"].sum()),
                    "time_ratio": time_ratios(name, found) if name in ours() else {},
                }
                for batch, found in zip(batches, timings, strict=True)
            ],
        }
        for name, variant in variants.items()
    ]


def busy_cores(run: Callable[[], object], seconds: float = 0.2) -> float:
    """How many cores a call keeps busy: what a variant makes of its threads."""
    time.sleep(0.05)  # until the workers of the one before sleep
    with torch.inference_mode():
        run()
        start, used = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            run()
    return (time.process_time() - used) / (time.perf_counter() - start)


def measure_models(folder: Path, rounds: int, sentences: int, quick: bool) -> Measured:
    """MiniLM, with the number of threads that torch has. Files that are in the folder are not made again."""
    environment = Environment.collect()
    model, tokenizer = demo.load()
    texts = demo.docstring_sentences(sentences)
    others = demo.docstring_sentences(demo.CALIBRATION_SENTENCES, besides=texts)
    batches = [demo.token_batch(tokenizer, texts, *shape) for shape in SHAPES]
    batches += [sentence_batch(tokenizer, count) for count in SENTENCES]
    chosen = demo.PEERS if quick else peers(tokenizer, others)
    variants, missing = build(model, folder, chosen, batches[0])
    records = measure(variants, tokenizer, batches=batches, sentences=texts, rounds=rounds)
    absent = [{"threads": torch.get_num_threads(), "candidate": name, "missing": why} for name, why in missing.items()]
    return Measured(environment, records + absent)


# --------------------------------------------------------------------------------- blocks beside their products

BLOCKS = {"BERT-base": ("Bert", 128), "ViT-base": ("ViT", 197)}  # as transformers calls it, and the tokens
BATCHES = (1, 8, 32)


def one_block(family: str) -> tuple[nn.Module, str]:
    """A model of one block in its usual sizes, with random weights, and the block's name."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=1)
    model: nn.Module = getattr(transformers, f"{family}Model")(config, add_pooling_layer=False).eval()
    names = [name for name, module in model.named_modules() if type(module).__name__ == f"{family}Layer"]
    return model, names[0]


def measure_block(
    name: str, model: nn.Module, path: str, *, length: int, batch: int, rounds: int, min_time_s: float = 0.05
) -> list[Record]:
    """One record per number of bits and per way to run the block, each beside the products alone."""
    dense = model.get_submodule(path)
    generator = torch.Generator().manual_seed(0)
    widths = {layer.in_features for layer in dense.modules() if isinstance(layer, nn.Linear)}
    inputs = {k: torch.randn(batch, length, k, dtype=torch.float32, device="cpu", generator=generator) for k in widths}
    x = inputs[min(widths)]
    records = []
    for bits in BITS:
        layers_alone = compress(model, Int8(bits), blocks=False).get_submodule(path)
        whole = compress(model, Int8(bits)).get_submodule(path)
        blocks = {our_name(bits): whole, our_name(bits, ", layers alone"): layers_alone}
        products = {
            key: partial(layer, inputs[layer.in_features]) for key, layer in compressed_layers(layers_alone).items()
        }
        calls = {BASELINE: partial(dense, x), **{key: partial(block, x) for key, block in blocks.items()}, **products}
        with torch.inference_mode():
            timings = benchmark.interleave(calls, rounds=rounds, min_time_s=min_time_s, pause_s=0.02)
        total = Timing(tuple(map(sum, zip(*(timings[key].seconds for key in products), strict=True))))
        for candidate in blocks:
            over = benchmark.ratio(timings[candidate], total)
            faster = benchmark.ratio(timings[BASELINE], timings[candidate])
            records.append(
                {
                    "model": f"{name} block",
                    "threads": torch.get_num_threads(),
                    "batch": batch,
                    "length": length,
                    "candidate": candidate,
                    "ms": timings[candidate].median * 1e3,
                    "ms_quartiles": [value * 1e3 for value in timings[candidate].quartiles],
                    "products_ms": sum(timings[key].median for key in products) * 1e3,
                    "over_products": over.median,
                    "over_products_quartiles": [over.low, over.high],
                    "dense_ms": timings[BASELINE].median * 1e3,
                    "speedup": faster.median,
                    "speedup_quartiles": [faster.low, faster.high],
                }
            )
    return records


def measure_blocks(rounds: int) -> Measured:
    environment = Environment.collect()
    records = []
    for name, (family, length) in BLOCKS.items():
        model, path = one_block(family)
        for batch in BATCHES:
            records += measure_block(name, model, path, length=length, batch=batch, rounds=rounds)
    return Measured(environment, records)


# -------------------------------------------------------------------------------------------------- low rank

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


def measure_low_rank(rounds: int, sentences: int) -> Measured:
    environment = Environment.collect()
    model, tokenizer = demo.load()
    texts = demo.docstring_sentences(sentences)
    others = demo.docstring_sentences(demo.CALIBRATION_SENTENCES, besides=texts)
    with TemporaryDirectory() as folder:
        calibration = demo.calibrated(model, tokenizer, others)
        variants, _ = demo.build(model, Path(folder), {}, LOW_RANK, calibration)
        shapes = (*demo.SHAPES, (1, 16))
        return Measured(environment, demo.measure(variants, tokenizer, sentences=texts, shapes=shapes, rounds=rounds))


# -------------------------------------------------------------------------------------------------- printing


def empty_table(title: str, *headings: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    result = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        result.add_column(heading, justify="left" if heading == headings[0] else "right", no_wrap=True)
    return result


def shape_of(cell: Record) -> str:
    """8x64, or `8 mixed` where some of it is padding."""
    full = cell["tokens"] == cell["batch"] * cell["length"]
    return f"{cell['batch']}x{cell['length']}" if full else f"{cell['batch']} mixed"


def three_digits(value: float) -> str:
    """3.14, 31.4, 314, 3142."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def table(records: Sequence[Record]) -> Table:
    """One row per variant, then how many times as fast as the fastest of each group of rivals ours are."""
    ran = [record for record in records if "missing" not in record]
    first = ran[0]
    title = f"{first['model']}, {first['threads']} thread(s): ms, and speed over torch fp32; below, ours over the fastest of each"
    shapes = [shape_of(cell) for cell in first["latency"]]
    result = empty_table(title, "variant", "MB", *shapes, "cores", "cosine", "least")
    for record in ran:
        result.add_row(
            record["candidate"],
            f"{record['file_bytes'] / 1e6:.1f}",
            *(f"{three_digits(cell['ms'])} {cell['speedup']:.2f}x" for cell in record["latency"]),
            f"{record['cores']:.1f}",
            f"{record['cosine_mean']:.4f}",
            f"{record['cosine_min']:.4f}",
        )
    result.add_section()
    for label, ratios in comparisons(ran):
        result.add_row(label, "", *ratios)
    return result


def comparisons(records: Sequence[Record]) -> Iterator[tuple[str, list[str]]]:
    """Of each number of bits and group of rivals: the fastest rival's time over ours, per shape."""
    whole = [our_name(bits, way) for bits in BITS for way in ("", ", padding skipped")]
    for record in records:
        for rival, names in RIVALS.items():
            cells = record["latency"]
            if record["candidate"] in whole and any(measured(cell, names) for cell in cells):
                yield f"{record['candidate']} / {rival}", [f"{best_ratio(cell, names):.2f}x" for cell in cells]


def block_table(records: Sequence[Record]) -> Table:
    threads = records[0]["threads"]
    title = f"one block beside the sum of its products, {threads} thread(s), ms"
    columns = ("candidate", "torch fp32", "block", "speed", "products", "block / products")
    result = empty_table(title, "block", *columns)
    for record in records:
        result.add_row(
            f"{record['model']}, {record['batch']}x{record['length']}",
            record["candidate"],
            three_digits(record["dense_ms"]),
            three_digits(record["ms"]),
            f"{record['speedup']:.2f}x",
            three_digits(record["products_ms"]),
            f"{record['over_products']:.3f}",
        )
    return result


# ---------------------------------------------------------------------------------------------------- command


@click.command()
@click.option("--quick", is_flag=True, help="The demo's peers, 3 rounds.")
@click.option("--blocks", is_flag=True, help="One block beside the sum of its products.")
@click.option("--low-rank", is_flag=True, help="The low-rank variants, without peers.")
@click.option(
    "--threads", type=click.IntRange(min=1), multiple=True, help="Those torch takes by default; several times."
)
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--sentences", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines; a file of benchmarks/results by default.")
def models(
    *, quick: bool, blocks: bool, low_rank: bool, threads: tuple[int, ...], rounds: int, sentences: int,
    output: Path | None,
) -> None:  # fmt: skip
    """Size, latency and closeness to fp32 of every way to run the model."""
    kind = "blocks" if blocks else "low_rank_models" if low_rank else "models"
    rounds = 3 if quick else rounds
    console = cli.console()
    console.width = max(console.width, WIDTH)
    output = output or RESULTS / f"{kind}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = ""
    with TemporaryDirectory() as folder:
        measures: dict[str, Callable[[int], Measured]] = {
            "blocks": lambda count: in_a_process(count, measure_blocks, rounds),
            "low_rank_models": lambda count: in_a_process(count, measure_low_rank, rounds, sentences),
            "models": lambda count: in_a_process(count, measure_models, Path(folder), rounds, sentences, quick),
        }
        for count in threads or (torch.get_num_threads(),):
            with console.status(f"measuring with {count} thread(s)"):
                environment, records = measures[kind](count)
            lines += benchmark.json_lines(environment, records)
            output.write_text(lines)
            console.print(cli.environment_text(environment.as_dict()))
            console.print({"blocks": block_table, "models": table}.get(kind, partial(demo.table, missing={}))(records))
            for record in records:
                if "missing" in record:
                    console.print(f"{record['candidate']}: {record['missing']}", markup=False)


if __name__ == "__main__":
    models()
