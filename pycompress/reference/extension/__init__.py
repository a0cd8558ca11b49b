"""The functions of the native module ``_C``, with the same signatures: this package stands where that was not built."""

from __future__ import annotations

from typing import Any

from pycompress.reference.extension.int4 import int4_header, int4_linear, int4_pack, int4_unpack
from pycompress.reference.extension.int8 import (
    int8_header,
    int8_linear,
    int8_pack,
    int8_quantize,
    int8_round,
    int8_unpack,
)
from pycompress.reference.extension.int8_conv import (
    int8_conv2d,
    int8_conv2d_hand_on,
    int8_conv2d_header,
    int8_conv2d_pack,
    int8_conv2d_unpack,
)
from pycompress.reference.extension.low_rank import low_rank_header, low_rank_linear, low_rank_pack, low_rank_unpack
from pycompress.reference.extension.recurrent import int8_recurrent
from pycompress.reference.extension.sparse import (
    SPARSE_FORMATS,
    sparse_conv2d,
    sparse_header,
    sparse_linear,
    sparse_pack,
    sparse_unpack,
)

__all__ = [
    "SPARSE_FORMATS",
    "bandwidth",
    "cap_isa",
    "force_kernel",
    "instruction_sets",
    "int4_header",
    "int4_linear",
    "int4_pack",
    "int4_unpack",
    "int8_conv2d",
    "int8_conv2d_hand_on",
    "int8_conv2d_header",
    "int8_conv2d_pack",
    "int8_conv2d_unpack",
    "int8_header",
    "int8_linear",
    "int8_pack",
    "int8_quantize",
    "int8_recurrent",
    "int8_round",
    "int8_unpack",
    "kernels",
    "low_rank_header",
    "low_rank_linear",
    "low_rank_pack",
    "low_rank_unpack",
    "peak",
    "sparse_conv2d",
    "sparse_header",
    "sparse_linear",
    "sparse_pack",
    "sparse_unpack",
    "use_exchange",
]


def kernels() -> list[dict[str, Any]]:
    numba = {"name": "numba", "isa": "scalar", "mr": 1, "nr": 1, "kr": 1, "available": True}
    sparse = ({"op": "sparse", **numba, "format": name} for name in SPARSE_FORMATS)
    return [
        {"op": "int8", **numba},
        *sparse,
        *({"op": op, **numba} for op in ("int8_conv2d", "dense", "int4", "weight_only", "embed", "pool", "recurrent")),
    ]


def instruction_sets() -> dict[str, bool]:
    return {"scalar": True}


def cap_isa(name: str) -> str:
    if name not in ("", "scalar"):
        raise ValueError(
            f"cap_isa: the instruction set is {name!r}, expected scalar: the native extension was not built"
        )
    return ""


def force_kernel(op: str, name: str) -> str:
    ops = {row["op"] for row in kernels()}
    if op not in ops:
        raise ValueError(f"force_kernel: the op is {op!r}, expected one of {', '.join(sorted(ops))}")
    if name not in ("", "numba"):
        raise ValueError(f"no {op} kernel is named {name!r}")
    return ""


def use_exchange(_capsule: object) -> bool:
    return False


def peak(loop: str, _seconds: float, _threads: int) -> float:
    raise ValueError(f"peak: the loop {loop} needs the native extension, which was not built")


def bandwidth(n_bytes: int, _seconds: float, _threads: int) -> float:
    raise ValueError(f"bandwidth: reading {n_bytes} bytes needs the native extension, which was not built")
