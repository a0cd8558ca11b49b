"""int8 LSTMs and GRUs beside torch's: `python benchmarks/recurrent.py` writes benchmarks/results/recurrent.jsonl.

    pip install --no-deps resemblyzer==0.1.4 pyannote.audio==3.3.2   (for their files alone: a trained network, and speech)

- The speaker encoder of resemblyzer (GE2E, Wan et al. 2018, arXiv:1710.10467: 40 mel bands, three LSTM layers of 256, a linear
  one): embeddings of 1.6 s windows of a conversation of two, int8 against float32. Its input is power, not its logarithm: half of
  the numbers are below 1e-5, the largest is 5, so that one range for each row loses much. Cosines are given of the windows, and of
  what the windows of each speaker give together; and how many windows are nearer to their own speaker.
- LSTMs and GRUs of several sizes, 50 steps, in turns in one process: torch in float32, torch's `quantize_dynamic` (its last for
  recurrent layers, deprecated), and ours.
"""

from __future__ import annotations

import json
import warnings
import wave
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

import pycompress as pc
from pycompress import benchmark, cli

RESULTS = Path(__file__).parent / "results"
RATE, WINDOW, HOP, BANDS = 16000, 400, 160, 40  # of resemblyzer's hparams.py
FRAMES, STRIDE = 160, 40  # of a window of speech
STEPS = 50
Array = npt.NDArray[Any]


class Encoder(nn.Module):
    """The network of resemblyzer's ``VoiceEncoder``: mels [batch, frames, 40] -> embeddings [batch, 256] of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return normalize(torch.relu(self.linear(hidden[-1])))


def trained() -> Encoder:
    found = torch.load(distribution("resemblyzer").locate_file("resemblyzer/pretrained.pt"), "cpu", weights_only=True)
    model = Encoder().eval()
    state = {name: one for name, one in found["model_state"].items() if not name.startswith("similarity")}
    model.load_state_dict(state)
    return model


def speech() -> Array:
    """Two speakers, 30 s, float32."""
    path = distribution("pyannote.audio").locate_file("pyannote/audio/sample/sample.wav")
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    level = 10 ** (-30 / 20) / np.sqrt(np.mean(samples**2))  # resemblyzer's: raised to -30 dBFS, never lowered
    return samples * np.float32(max(1.0, level))


def speakers() -> list[tuple[float, float, str]]:
    """Who speaks from when to when, in seconds."""
    path = distribution("pyannote.audio").locate_file("pyannote/audio/sample/sample.rttm")
    rows = [line.split() for line in Path(str(path)).read_text().splitlines()]
    return [(float(row[3]), float(row[3]) + float(row[4]), row[7]) for row in rows]


def speaker_of(window: int) -> str:
    """Who alone speaks for most of a window; '' where it is nobody, or both."""
    start, length = window * STRIDE * HOP / RATE, FRAMES * HOP / RATE
    share: dict[str, float] = {}
    for begin, end, name in speakers():
        overlap = max(0.0, min(end, start + length) - max(begin, start))
        share[name] = share.get(name, 0.0) + overlap / length
    best = max(share, key=lambda name: share[name])
    return best if share[best] > 0.7 and sum(share.values()) - share[best] < 0.1 else ""


def mels(samples: Array) -> Tensor:
    """Mel bands of power, on Slaney's scale and of equal area (what librosa's ``melspectrogram`` does by default): [frames, 40]."""
    padded = np.pad(samples, WINDOW // 2)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP] * hann
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2

    step = np.log(6.4) / 27  # above 1000 Hz the scale is logarithmic

    def hertz(mel: Array) -> Array:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(step * (mel - 15)))

    edges = hertz(np.linspace(0, 15 + np.log(RATE / 2 / 1000) / step, BANDS + 2))
    bins = np.fft.rfftfreq(WINDOW, 1 / RATE)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy((power @ filters.T).astype(np.float32))


def dynamic(model: nn.Module) -> nn.Module:
    """torch's own int8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.GRU, nn.Linear}, torch.qint8)
    return made


def encoder(rounds: int) -> benchmark.Record:
    model, windows = trained(), mels(speech()).unfold(0, FRAMES, STRIDE).transpose(1, 2).contiguous()
    compressed = pc.compress(model, pc.Int8())
    theirs = dynamic(trained())
    with torch.inference_mode():
        dense, int8 = model(windows), compressed(windows)
        cosines = cosine_similarity(dense, int8)
        who = [speaker_of(i) for i in range(len(windows))]
        names = sorted({name for name in who if name})
        chosen = {name: torch.tensor([one == name for one in who]) for name in names}
        whole = [[normalize(one[of].mean(0), dim=0) for of in chosen.values()] for one in (dense, int8)]
        nearest = [(one @ torch.stack(own).T).argmax(1) for one, own in zip((dense, int8), whole, strict=True)]
        of_one = torch.tensor([bool(name) for name in who])
        truth = torch.tensor([names.index(name) if name else -1 for name in who])
        right = [float((one == truth)[of_one].float().mean()) for one in nearest]
        runs: dict[str, Callable[[], Any]] = {}
        for batch in (1, len(windows)):
            x = windows[:batch]
            runs[f"torch {batch}"], runs[f"ours {batch}"] = (lambda x=x: model(x)), (lambda x=x: compressed(x))  # type: ignore[misc]
        times = benchmark.interleave(runs, rounds=rounds, min_time_s=0.01, pause_s=0.02)
    assert pc.validate(compressed, windows[:4]).ok
    summary = pc.summary(compressed)
    return {
        "net": "resemblyzer 0.1.4", "windows": len(windows), "mean_cosine": float(cosines.mean()),
        "least_cosine": float(cosines.min()), "speakers": {name: int(of.sum()) for name, of in chosen.items()},
        "speaker_cosines": [float(a @ b) for a, b in zip(*whole, strict=True)], "speaker_right": right,
        "same_decisions": float((nearest[0] == nearest[1])[of_one].float().mean()),
        "torch_int8_mean_cosine": float(cosine_similarity(dense, theirs(windows)).mean()),
        "bytes": [summary.dense_bytes, summary.bytes], "us": {name: own.median * 1e6 for name, own in times.items()},
    }  # fmt: skip


def layer(kind: type[nn.RNNBase], size: int, batch: int, rounds: int) -> benchmark.Record:
    dense = kind(size, size).eval()
    ours, x = pc.compress(dense, pc.Int8()), torch.randn(STEPS, batch, size)
    theirs = dynamic(nn.Sequential(dense))
    runs = {"ours": lambda: ours(x), "torch": lambda: dense(x), "torch int8": lambda: theirs(x)}
    with torch.inference_mode():
        times = benchmark.interleave(runs, rounds=rounds, min_time_s=0.01, pause_s=0.02)
    return {
        "net": kind.__name__, "size": size, "batch": batch, "steps": STEPS,
        "us": {name: own.median * 1e6 for name, own in times.items()},
    }  # fmt: skip


@click.command()
@click.option("--rounds", type=click.IntRange(min=3), default=9, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "recurrent.jsonl")
def recurrent(*, rounds: int, threads: int, output: Path) -> None:
    """Times as long as ours: what each peer takes."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    environment = benchmark.Environment.collect()
    console = cli.console()
    console.print(cli.environment_text(environment.as_dict()))
    records = [encoder(rounds)]
    console.print(json.dumps(records[0], indent=1), highlight=False)
    for kind in (nn.LSTM, nn.GRU):
        for size in (128, 256, 512, 1024):
            for batch in (1, 8, 64):
                records.append(layer(kind, size, batch, rounds))
                us = records[-1]["us"]
                ratios = " ".join(f"{peer} {us[peer] / us['ours']:.2f}" for peer in us if peer != "ours")
                console.print(f"{kind.__name__} {size:5} x{batch:3}: us {us['ours']:.0f} | {ratios}", highlight=False)
    benchmark.write_json_lines(output, environment, records)


if __name__ == "__main__":
    recurrent()
