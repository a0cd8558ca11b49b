"""What machines are good at, as far as a method's choices depend on it: named, measured, and open to a profile of your own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Profile:
    """One kind of machine.

    Attributes:
        name: in messages and ``repr``.
        speeds: how many multiply-adds of a product take as long as one of the best dense float32 layer, by the name of the weight:
            ``int8``, or with its bits ``sparse 32``; ``factors 32`` and ``factors 8`` of a low-rank layer; ``channel``, ``spatial``
            and ``tucker`` of a low-rank convolution, against the dense convolution. 1 for what is not named.
        largest_rms: of int8 weights that meet 8-bit activations, the most that the root mean square of a row's integers may be, as
            a share of the largest integer; None: anything.
    Raises:
        TypeError: a speed or share that is no number. ValueError: one that is not above 0, a share above 1.
    """

    name: str
    speeds: Mapping[str, float] = field(default_factory=dict, hash=False)
    largest_rms: float | None = None

    def __post_init__(self) -> None:
        share = {} if self.largest_rms is None else {"largest_rms": self.largest_rms}
        for name, value in {**self.speeds, **share}.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Profile: {name} is {value!r}, expected a number")
            if not value > 0 or (name in share and value > 1):
                raise ValueError(
                    f"Profile: {name} is {value!r}, expected a number above 0{', at most 1' * (name in share)}"
                )

    def speed(self, name: str, bits: int | None = None) -> float:
        """Of a product, by the name of its weight and, where there are several, its bits."""
        return self.speeds.get(f"{name} {bits}", self.speeds.get(name, 1.0))


# By name. Methods take a profile of your own as well as one of these names; `only_if_faster` measures each layer itself.
PROFILES: dict[str, Profile] = {
    known.name: known
    for known in (
        Profile(
            "avx2",
            # At 32 and more rows, geometric means over six shapes: `python benchmarks/kernels.py --op low_rank` prints them (rank
            # min(n, k) / 8 to / 2: 0.87 to 0.95); "sparse 8" is from `--op sparse`, unstructured at 80 % zeros, "int4" from `--op
            # int4`, groups of 32 at 128 and more rows. Convolutions, where torch's oneDNN kernels get slower with fewer channels,
            # over four 3x3 layers of a ResNet-50, one image: `python benchmarks/convolutions.py` (two runs: channel 0.54 and 0.68,
            # spatial 0.60 and 0.53, tucker 0.64 and 0.48).
            {
                "factors 32": 0.9,
                "factors 8": 1.8,
                "int8": 2.1,
                "int4": 2.2,
                "sparse 32": 0.56,
                "sparse 8": 0.7,
                "channel": 0.6,
                "spatial": 0.55,
                "tucker": 0.55,
            },
            # Rows with a heavy tail lie below it anyway; a row that fills its range evenly would get steps finer than the others',
            # which buys little (its rounding error stays at 1 / (34 sqrt 12) = 0.8 % of its rms) and costs much: with larger
            # integers most pairs of weights exceed the 16-bit lane budget (csrc/int8/pack.h), and the product takes 1.4 times as
            # long. 7-bit activations leave room for any weights, and activations in floating point need none.
            # benchmarks/NOTES.md has the figures.
            largest_rms=34 / 127,
        ),
        Profile("none"),  # nothing is fitted; a multiply-add costs the same everywhere
    )
}
DEFAULT = "avx2"


def profile(kind: str, argument: str, value: object) -> Profile:
    """The profile that a method was given, itself or by name; ``kind``: who asks.

    Raises:
        TypeError: something else. ValueError: an unknown name.
    """
    if isinstance(value, Profile):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{kind}: {argument} is {value!r}, expected a Profile or one of {', '.join(PROFILES)}")
    if value not in PROFILES:
        raise ValueError(f"{kind}: {argument} is {value!r}, expected a Profile or one of {', '.join(PROFILES)}")
    return PROFILES[value]
