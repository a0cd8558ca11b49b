"""int8 convolutions beside torch's and ONNX Runtime's: `python benchmarks/int8_convolutions.py` writes
benchmarks/results/int8_convolutions.jsonl.

Layers of a ResNet-50 and of a MobileNetV2 at 224x224, images with the channels last and first, all in turns in one process:

- torch: the dense layer in float32, channels first and last;
- torch int8: `torch.ao.nn.quantized.Conv2d`, from float32 to float32, its input quantized with one known range; `alone`: from bytes
  to bytes;
- onnxruntime u8, s8: QuantizeLinear, QLinearConv, DequantizeLinear, from float32 to float32, with one known range; `alone`: the
  QLinearConv from bytes to bytes, as it stands between others. On x86 s8 products may saturate where the processor has no VNNI.

`ours` takes float32 and finds each image's range; `ours static` is given one; `ours bytes` goes from bytes to bytes, the channels
last, as between layers that hand them on. Printed are microseconds of ours (channels first, last, static first, static last,
bytes), and how many times as long each peer takes as the faster of the first two, or as `ours bytes` from bytes to bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import pycompress as pc
from pycompress import benchmark, cli
from pycompress.benchmark.harness import geometric_mean
from pycompress.kinds import Conv2dGeometry
from pycompress.nn import Int8Conv2d
from pycompress.ops.cpu import int8_conv

RESULTS = Path(__file__).parent / "results"
# Channels in and out, kernel, size of the image, stride, groups.
RESNET = (
    (3, 64, 7, 224, 2, 1), (64, 64, 1, 56, 1, 1), (64, 64, 3, 56, 1, 1), (64, 256, 1, 56, 1, 1), (256, 64, 1, 56, 1, 1),
    (128, 128, 3, 28, 1, 1), (256, 512, 1, 56, 2, 1), (512, 128, 1, 28, 1, 1), (256, 256, 3, 14, 1, 1), (1024, 256, 1, 14, 1, 1),
    (512, 512, 3, 7, 1, 1), (512, 2048, 1, 7, 1, 1),
)  # fmt: skip
MOBILENET = (
    (3, 32, 3, 224, 2, 1), (16, 96, 1, 112, 1, 1), (144, 24, 1, 56, 1, 1), (32, 192, 1, 28, 1, 1), (384, 64, 1, 14, 1, 1),
    (96, 576, 1, 14, 1, 1), (160, 960, 1, 7, 1, 1), (320, 1280, 1, 7, 1, 1),
)  # fmt: skip
DEPTHWISE = (
    (32, 32, 3, 112, 1, 32), (96, 96, 3, 112, 2, 96), (144, 144, 3, 56, 1, 144), (192, 192, 3, 28, 1, 192),
    (384, 384, 3, 14, 1, 384), (576, 576, 3, 14, 2, 576), (960, 960, 3, 7, 1, 960),
)  # fmt: skip
OURS = ("ours", "ours last", "ours static", "ours static last", "ours bytes")
Run = Callable[[], Any]


def own_of(peer: str, us: dict[str, float]) -> float:
    """What a peer is compared with."""
    return us["ours bytes"] if peer.endswith("alone") else min(us["ours"], us["ours last"])


def onnxruntime_runs(conv: nn.Conv2d, x: Tensor, signed: bool, threads: int) -> tuple[Run, Run]:
    """From float32 to float32, and the QLinearConv alone."""
    w = conv.weight.detach().numpy()
    scale = (np.abs(w).reshape(len(w), -1).max(1) / 127).astype(np.float32)
    low, high = float(x.min()), float(x.max())
    step, zero, dtype = (
        (max(-low, high) / 127, 0, np.int8)
        if signed
        else ((high - low) / 255, round(-low / (high - low) * 255), np.uint8)
    )
    integers = np.clip(np.rint(w / scale[:, None, None, None]), -127, 127).astype(np.int8)
    constants = {
        "s": np.float32(step), "z": dtype(zero), "w": integers, "ws": scale, "wz": np.zeros(len(w), np.int8),
    }  # fmt: skip
    walk = {
        "kernel_shape": conv.kernel_size,
        "strides": conv.stride,
        "group": conv.groups,
        "pads": [conv.padding[0]] * 4,
    }
    node = helper.make_node("QLinearConv", ["q", "s", "z", "w", "ws", "wz", "s", "z"], ["p"], **walk)
    ends = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"]),
    ]

    def session(nodes: list[Any], source: str, result: str, kind: int) -> onnxruntime.InferenceSession:
        given = helper.make_tensor_value_info(source, kind, list(x.shape))
        made = helper.make_tensor_value_info(result, kind, None)
        stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
        graph = helper.make_graph(nodes, "conv", [given], [made], stored)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    whole = session([ends[0], node, ends[1]], "x", "y", TensorProto.FLOAT)
    alone = session([node], "q", "p", TensorProto.INT8 if signed else TensorProto.UINT8)
    info = np.iinfo(dtype)
    q = np.clip(np.rint(x.numpy() / step) + zero, info.min, info.max).astype(dtype)
    return lambda: whole.run(None, {"x": x.numpy()}), lambda: alone.run(None, {"q": q})


def torch_int8(conv: nn.Conv2d, x: Tensor) -> tuple[Run, Run]:
    """From float32 to float32, and from bytes to bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.ao.nn.quantized.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups
        )  # fmt: skip
        reach = conv.weight.detach().abs().amax((1, 2, 3)) / 127
        zeros = torch.zeros(len(reach), dtype=torch.int64, device="cpu")
        made.set_weight_bias(
            torch.quantize_per_channel(conv.weight.detach(), reach, zeros, 0, torch.qint8), conv.bias.detach()
        )  # type: ignore[union-attr]
        step = float((x.max() - x.min()) / 255)
        zero = round(-float(x.min()) / step)
        made.scale, made.zero_point = step, zero
        last = x.contiguous(memory_format=torch.channels_last)
        q = torch.quantize_per_tensor(last, step, zero, torch.quint8)
    return lambda: made(torch.quantize_per_tensor(last, step, zero, torch.quint8)).dequantize(), lambda: made(q)


def ours_bytes(layer: Int8Conv2d, last: Tensor) -> Run:
    """From bytes to bytes of the range of the input."""
    target = int8_conv.input_target(
        layer.packed, layer.form
    )  # (a layer that changes nothing hands on the bytes of its input)
    assert target is not None
    to = layer.geometry
    walk = (to.kernel_size, to.stride, to.sides, to.dilation, to.groups)
    one = Int8Conv2d.from_weight(
        pc.Int8(activation="static", observer=pc.Known(float(last.min()), float(last.max()))).compress(
            torch.eye(last.shape[1])
        ),
        Conv2dGeometry(last.shape[1], (1, 1)),
    )
    q = int8_conv.hand_on(
        last, one.packed, one.form, None, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, "none", target, True
    )
    assert q is not None
    return lambda: int8_conv.hand_on(q, layer.packed, layer.form, layer.bias32, *walk, "none", target, True)


def measure(layer: tuple[int, ...], images: int, rounds: int, threads: int) -> benchmark.Record:
    channels, n, kernel, size, stride, groups = layer
    conv = nn.Conv2d(channels, n, kernel, stride, kernel // 2, groups=groups, dtype=torch.float32, device="cpu")
    last_conv = nn.Conv2d(channels, n, kernel, stride, kernel // 2, groups=groups, dtype=torch.float32, device="cpu")
    last_conv.load_state_dict(conv.state_dict())
    last_conv = last_conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(images, channels, size, size, dtype=torch.float32, device="cpu")
    last = x.contiguous(memory_format=torch.channels_last)
    fixed = pc.Int8(activation="static", observer=pc.Known(float(x.min()), float(x.max())))
    ours, static = Int8Conv2d.from_dense(conv), Int8Conv2d.from_dense(conv, fixed)
    u8, u8_alone = onnxruntime_runs(conv, x, signed=False, threads=threads)
    s8, s8_alone = onnxruntime_runs(conv, x, signed=True, threads=threads)
    quantized, quantized_alone = torch_int8(conv, x)
    runs: dict[str, Run] = {
        "ours": lambda: ours(x), "ours last": lambda: ours(last), "ours static": lambda: static(x),
        "ours static last": lambda: static(last), "ours bytes": ours_bytes(static, last), "torch": lambda: conv(x),
        "torch last": lambda: last_conv(last),
        "torch int8": quantized, "torch int8 alone": quantized_alone, "onnxruntime u8": u8, "onnxruntime u8 alone": u8_alone,
        "onnxruntime s8": s8,
        "onnxruntime s8 alone": s8_alone,
    }  # fmt: skip
    with torch.inference_mode():
        times = benchmark.interleave(runs, rounds=rounds, min_time_s=0.01, pause_s=0.02)
    shape = {
        "in_channels": channels,
        "out_channels": n,
        "kernel": kernel,
        "size": size,
        "stride": stride,
        "groups": groups,
    }
    us = {name: own.median * 1e6 for name, own in times.items()}
    return {**shape, "images": images, "us": us}


@click.command()
@click.option("--rounds", type=click.IntRange(min=3), default=9, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "int8_convolutions.jsonl")
def convolutions(*, rounds: int, threads: int, output: Path) -> None:
    """Times as long as ours: what each peer takes."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    environment = benchmark.Environment.collect()
    console = cli.console()
    console.print(cli.environment_text(environment.as_dict()))
    records = []
    for name, layers in (("ResNet-50", RESNET), ("MobileNetV2", MOBILENET), ("depthwise", DEPTHWISE)):
        for images in (1, 8):
            own = [{"net": name, **measure(layer, images, rounds, threads)} for layer in layers]
            records += own
            for record in own:
                times = record["us"]
                sizes = (record["in_channels"], record["out_channels"], record["kernel"], record["stride"])
                kernel = f"{sizes[0]}-{sizes[1]} {sizes[2]}/{sizes[3]}"
                ratios = " ".join(
                    f"{peer} {times[peer] / own_of(peer, times):.2f}" for peer in times if not peer.startswith("ours")
                )
                mine = " ".join(f"{times[own]:.0f}" for own in OURS)
                console.print(f"{images} {kernel:18} {record['size']:3} us {mine} | {ratios}", highlight=False)
            for peer in (peer for peer in own[0]["us"] if peer not in OURS):
                mean = geometric_mean([r["us"][peer] / own_of(peer, r["us"]) for r in own])
                console.print(f"{name}, {images} images: {peer} takes {mean:.2f} times as long", highlight=False)
    benchmark.write_json_lines(output, environment, records)


if __name__ == "__main__":
    convolutions()
