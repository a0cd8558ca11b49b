"""Of each kind of layer a small dense one, a line that a new kind has to have; and what its inputs look like."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

# An odd width: half a byte of nibbles, one bit of the last byte of a mask, and with groups of 32 an odd number of them.
K, N = 71, 24
DENSE: dict[str, Callable[[bool], nn.Module]] = {
    "linear": lambda bias: nn.Linear(K, N, bias=bias),
    "conv2d": lambda bias: nn.Conv2d(5, 19, (3, 2), stride=(1, 2), padding=1, bias=bias),
    "embedding": lambda _: nn.Embedding(30, 12),
}
LARGE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(1024, 1024),
    "conv2d": lambda: nn.Conv2d(32, 64, 3, padding=1),
    "embedding": lambda: nn.Embedding(3000, 96),
}
SIZES = {"height": 7, "width": 6}  # of an input, where the kind leaves them open
LEADS: dict[str, list[tuple[int, ...]]] = {  # the dimensions in front of an item
    "linear": [(5,), (2, 3), ()],
    "conv2d": [(2,), ()],
    "embedding": [(7,), (3, 5), ()],
}
