"""Of each kind of layer a small dense one, a line that a new kind has to have; and what its inputs look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# An odd width: half a byte of nibbles, one bit of the last byte of a mask, and with groups of 32 an odd number of them.
K, N = 71, 24
DENSE: dict[str, Callable[[bool], nn.Module]] = {
    "linear": lambda bias: nn.Linear(K, N, bias=bias),
    "conv2d": lambda bias: nn.Conv2d(5, 19, (3, 2), stride=(1, 2), padding=1, bias=bias),
    "conv1d": lambda bias: nn.Conv1d(5, 19, 5, stride=2, padding=1, bias=bias),
    "embedding": lambda _: nn.Embedding(30, 12),
}
LARGE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(1024, 1024),
    "conv2d": lambda: nn.Conv2d(32, 64, 3, padding=1),
    "conv1d": lambda: nn.Conv1d(64, 128, 5, padding=2),
    "embedding": lambda: nn.Embedding(3000, 96),
}
SIZES = {"height": 7, "width": 6, "length": 11}  # of an input, where the kind leaves them open
LEADS: dict[str, list[tuple[int, ...]]] = {  # the dimensions in front of an item
    "linear": [(5,), (2, 3), ()],
    "conv2d": [(2,), ()],
    "conv1d": [(2,), ()],
    "embedding": [(7,), (3, 5), ()],
}

# The arguments of nn.Conv2d behind the channels.
CONVS: dict[str, dict[str, Any]] = {
    "1x1": {"kernel_size": 1},
    "1x1 with a stride and padding": {"kernel_size": 1, "stride": 2, "padding": 1},
    "3x3": {"kernel_size": 3},
    "3x3 padded": {"kernel_size": 3, "padding": 1},
    "3x3 padded with a stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "3x3 dilated": {"kernel_size": 3, "dilation": 2},
    "3x3 dilated, same": {"kernel_size": 3, "dilation": (1, 3), "padding": "same"},
    "3x3, a stride beyond the kernel": {"kernel_size": 3, "stride": (4, 5)},
    "3x3, more padding than kernel": {"kernel_size": 3, "padding": (4, 5)},
    "5x5": {"kernel_size": 5, "padding": (2, 1), "stride": (1, 3)},
    "7x7": {"kernel_size": 7, "padding": 3, "stride": 2},
    "1x7": {"kernel_size": (1, 7), "padding": (0, 3)},
    "7x1": {"kernel_size": (7, 1), "stride": (3, 2)},
    "2x2, same": {"kernel_size": 2, "padding": "same"},
    "4x2, same": {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)},
    "2x3, valid": {"kernel_size": (2, 3), "padding": "valid"},
    "3x3 reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "4x2, same, replicating": {"kernel_size": (4, 2), "padding": "same", "padding_mode": "replicate"},
    "3x5 circular with a stride": {
        "kernel_size": (3, 5),
        "padding": (2, 3),
        "stride": (2, 1),
        "padding_mode": "circular",
    },
}
