"""The CUDA kernels: addresses on the device and streams as integers; `ops.cuda` has checked what they point to."""

from typing import Any, TypeAlias

# What stands in front of the layer: which, weight and bias of a norm, its eps, a gate and its row stride.
_Before: TypeAlias = tuple[int, int, int, float, int, int]
_WeightOnly: TypeAlias = tuple[int, int, int, int, bool]  # bits, n, k, group, symmetric
_Bitmap: TypeAlias = tuple[int, int, int, int, int]  # n, k, element, bytes, those of the largest unit
_Structured: TypeAlias = tuple[int, int, int]  # n, k, element
_Blocks: TypeAlias = tuple[int, int, int, int, int]  # n, k, element, size of a block, how many are stored

def compute_capability(device: int, /) -> int: ...
def int8_workspace(m: int, k: int, /) -> int: ...
def int8_linear(
    device: int, stream: int, x: int, x_type: int, m: int, ldx: int, before: _Before, n: int, k: int, activation_bits: int,
    packed: int, packed_bytes: int, weight_scale: int, bias: int, activation: int, y: int, y_type: int, workspace: int,
    kernel: str, /,
) -> None: ...  # fmt: skip
def int8_quantize(
    device: int, stream: int, x: int, x_type: int, m: int, k: int, ldx: int, before: _Before, activation_bits: int,
    workspace: int, /,
) -> None: ...  # fmt: skip
def int8_multiply(
    device: int, stream: int, m: int, n: int, k: int, packed: int, packed_bytes: int, weight_scale: int, bias: int,
    activation: int, y: int, y_type: int, workspace: int, kernel: str, /,
) -> None: ...  # fmt: skip
def int8_unsigned_rows(device: int, stream: int, workspace: int, m: int, k: int, q: int, /) -> None: ...
def int8_packed_bytes(n: int, k: int, /) -> int: ...
def int8_pack(device: int, stream: int, values: int, n: int, k: int, packed: int, refused: int, /) -> None: ...
def int8_unpack(device: int, stream: int, packed: int, packed_bytes: int, n: int, k: int, values: int, /) -> None: ...
def int8_kernels() -> list[dict[str, Any]]: ...
def int8_chosen_kernel(m: int, n: int, k: int, arch: int, multiprocessors: int, /) -> str: ...
def weight_only_workspace(device: int, sizes: _WeightOnly, x_type: int, m: int, kernel: str, splits: int, /) -> int: ...
def weight_only_linear(
    device: int, stream: int, sizes: _WeightOnly, x: int, x_type: int, m: int, ldx: int, packed: int, packed_bytes: int,
    weight_scale: int, bias: int, activation: int, y: int, workspace: int, kernel: str, splits: int, /,
) -> None: ...  # fmt: skip
def weight_only_packed_bytes(sizes: _WeightOnly, /) -> int: ...
def weight_only_pack(
    device: int, stream: int, sizes: _WeightOnly, values: int, scale: int, zero_point: int, packed: int, refused: int, /
) -> None: ...
def weight_only_unpack(
    device: int, stream: int, sizes: _WeightOnly, packed: int, packed_bytes: int, values: int, scale: int, zero_point: int, /
) -> None: ...  # fmt: skip
def weight_only_kernels() -> list[dict[str, Any]]: ...
def weight_only_chosen_kernel(sizes: _WeightOnly, x_type: int, m: int, multiprocessors: int, /) -> tuple[str, int]: ...
def bitmap_workspace(device: int, sizes: _Bitmap, m: int, kernel: str, splits: int, /) -> int: ...
def bitmap_linear(
    device: int, stream: int, sizes: _Bitmap, x: int, x_type: int, m: int, ldx: int, packed: int, bias: int,
    activation: int, y: int, workspace: int, kernel: str, splits: int, /,
) -> None: ...  # fmt: skip
def bitmap_pack(
    mask: int, values: int, count: int, element: int, n: int, k: int, /
) -> tuple[bytes, int]: ...  # on the host
def bitmap_unpack(device: int, stream: int, sizes: _Bitmap, packed: int, weight: int, /) -> None: ...
def bitmap_kernels() -> list[dict[str, Any]]: ...
def bitmap_chosen_kernel(sizes: _Bitmap, m: int, multiprocessors: int, /) -> tuple[str, int]: ...
def structured_linear(
    device: int, stream: int, sizes: _Structured, activation_bits: int, x: int, x_type: int, m: int, ldx: int, packed: int,
    packed_bytes: int, scale: int, bias: int, activation: int, y: int, y_type: int, workspace: int, kernel: str, /,
) -> None: ...  # fmt: skip
def structured_packed_bytes(sizes: _Structured, /) -> int: ...
def structured_pack(device: int, stream: int, sizes: _Structured, dense: int, packed: int, refused: int, /) -> None: ...
def structured_unpack(
    device: int, stream: int, sizes: _Structured, packed: int, packed_bytes: int, dense: int, /
) -> None: ...
def structured_kernels() -> list[dict[str, Any]]: ...
def structured_chosen_kernel(sizes: _Structured, m: int, arch: int, multiprocessors: int, /) -> str: ...
def blocks_linear(
    device: int, stream: int, sizes: _Blocks, activation_bits: int, x: int, x_type: int, m: int, ldx: int, packed: int,
    packed_bytes: int, scale: int, bias: int, activation: int, y: int, y_type: int, workspace: int, kernel: str, /,
) -> None: ...  # fmt: skip
def blocks_pack(
    mask: int, values: int, count: int, element: int, size: int, n: int, k: int, /
) -> tuple[bytes, int]: ...  # on the host
def blocks_unpack(device: int, stream: int, sizes: _Blocks, packed: int, packed_bytes: int, dense: int, /) -> None: ...
def blocks_kernels() -> list[dict[str, Any]]: ...
def blocks_chosen_kernel(sizes: _Blocks, m: int, arch: int, multiprocessors: int, /) -> str: ...
def low_rank_workspace(
    device: int, n: int, k: int, rank: int, x_type: int, m: int, kernel: str, splits: int, /
) -> int: ...
def low_rank_linear(
    device: int, stream: int, x: int, x_type: int, m: int, ldx: int, n: int, k: int, rank: int, packed: int, bias: int,
    activation: int, y: int, workspace: int, kernel: str, splits: int, /,
) -> None: ...  # fmt: skip
def low_rank_kernels() -> list[dict[str, Any]]: ...
def side_branch_workspace(n: int, k: int, rank: int, m: int, /) -> int: ...
def side_branch_linear(
    device: int, stream: int, x: int, x_type: int, m: int, ldx: int, n: int, k: int, rank: int, activation_bits: int,
    factors: int, residual: int, weight_scale: int, bias: int, activation: int, y: int, workspace: int, kernel: str, /,
) -> None: ...  # fmt: skip
def side_branch_quantize(
    device: int, stream: int, x: int, x_type: int, m: int, ldx: int, n: int, k: int, rank: int, activation_bits: int,
    factors: int, residual: int, workspace: int, /,
) -> None: ...  # fmt: skip
