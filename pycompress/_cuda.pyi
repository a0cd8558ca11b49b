"""The CUDA kernels: addresses on the device and streams as integers; `ops.cuda` has checked what they point to."""

from typing import Any, TypeAlias

# What stands in front of the layer: which, weight and bias of a norm, its eps, a gate and its row stride.
_Before: TypeAlias = tuple[int, int, int, float, int, int]

def compute_capability(device: int, /) -> int: ...
def int8_workspace(m: int, k: int, /) -> int: ...
def int8_linear(
    device: int, stream: int, x: int, x_type: int, m: int, k: int, ldx: int, before: _Before, packed: int,
    packed_bytes: int, n: int, weight_scale: int, bias: int, activation: int, y: int, y_type: int, workspace: int,
    kernel: str, /,
) -> None: ...  # fmt: skip
def int8_quantize(
    device: int, stream: int, x: int, x_type: int, m: int, k: int, ldx: int, before: _Before, activation_bits: int,
    workspace: int, /,
) -> None: ...  # fmt: skip
def int8_multiply(
    device: int, stream: int, m: int, k: int, packed: int, packed_bytes: int, n: int, weight_scale: int, bias: int,
    activation: int, y: int, y_type: int, workspace: int, kernel: str, /,
) -> None: ...  # fmt: skip
def int8_unsigned_rows(device: int, stream: int, workspace: int, m: int, k: int, q: int, /) -> None: ...
def int8_packed_bytes(n: int, k: int, /) -> int: ...
def int8_pack(
    device: int, stream: int, values: int, n: int, k: int, activation_bits: int, packed: int, refused: int, /
) -> None: ...
def int8_unpack(device: int, stream: int, packed: int, packed_bytes: int, n: int, k: int, values: int, /) -> None: ...
def int8_kernels() -> list[dict[str, Any]]: ...
def int8_chosen_kernel(m: int, n: int, k: int, arch: int, multiprocessors: int, /) -> str: ...
def weight_only_workspace(
    device: int, bits: int, packed_bytes: int, n: int, k: int, x_type: int, m: int, kernel: str, splits: int, /
) -> int: ...
def weight_only_linear(
    device: int, stream: int, bits: int, x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int,
    n: int, weight_scale: int, bias: int, activation: int, y: int, workspace: int, kernel: str, splits: int, /,
) -> None: ...  # fmt: skip
def weight_only_packed_bytes(bits: int, n: int, k: int, group: int, symmetric: bool, /) -> int: ...
def weight_only_pack(
    device: int, stream: int, bits: int, values: int, scale: int, zero_point: int, n: int, k: int, group: int,
    packed: int, refused: int, /,
) -> None: ...  # fmt: skip
def weight_only_unpack(
    device: int, stream: int, bits: int, packed: int, packed_bytes: int, n: int, k: int, group: int, values: int,
    scale: int, zero_point: int, /,
) -> None: ...  # fmt: skip
def weight_only_int4_of(packed_bytes: int, n: int, k: int, /) -> tuple[int, bool]: ...
def weight_only_kernels() -> list[dict[str, Any]]: ...
def weight_only_chosen_kernel(
    bits: int, n: int, k: int, group: int, symmetric: bool, x_type: int, m: int, multiprocessors: int, /
) -> tuple[str, int]: ...
def sparse_workspace(device: int, packed_bytes: int, n: int, k: int, m: int, kernel: str, splits: int, /) -> int: ...
def sparse_linear(
    device: int, stream: int, x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int,
    bias: int, activation: int, y: int, workspace: int, kernel: str, splits: int, /,
) -> None: ...  # fmt: skip
def sparse_type(packed_bytes: int, k: int, /) -> int: ...
def sparse_pack(mask: int, values: int, count: int, x_type: int, n: int, k: int, /) -> bytes: ...  # on the host
def sparse_dense(device: int, stream: int, packed: int, packed_bytes: int, n: int, k: int, weight: int, /) -> None: ...
def sparse_kernels() -> list[dict[str, Any]]: ...
def sparse_chosen_kernel(packed_bytes: int, n: int, k: int, m: int, multiprocessors: int, /) -> tuple[str, int]: ...
def structured_linear(
    device: int, stream: int, x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int,
    scale: int, bias: int, activation: int, y: int, y_type: int, workspace: int, kernel: str, /,
) -> None: ...  # fmt: skip
def structured_packed_bytes(n: int, k: int, element: int, /) -> int: ...
def structured_pack(
    device: int, stream: int, dense: int, n: int, k: int, element: int, activation_bits: int, packed: int, refused: int, /
) -> None: ...  # fmt: skip
def structured_unpack(
    device: int, stream: int, packed: int, packed_bytes: int, n: int, k: int, dense: int, /
) -> None: ...
def structured_kernels() -> list[dict[str, Any]]: ...
def structured_chosen_kernel(m: int, n: int, k: int, element: int, arch: int, multiprocessors: int, /) -> str: ...
def blocks_linear(
    device: int, stream: int, x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int,
    scale: int, bias: int, activation: int, y: int, y_type: int, workspace: int, kernel: str, /,
) -> None: ...  # fmt: skip
def blocks_pack(
    mask: int, values: int, count: int, element: int, size: int, activation_bits: int, n: int, k: int, /
) -> bytes: ...  # on the host
def blocks_unpack(device: int, stream: int, packed: int, packed_bytes: int, n: int, k: int, dense: int, /) -> None: ...
def blocks_kernels() -> list[dict[str, Any]]: ...
def blocks_chosen_kernel(packed_bytes: int, m: int, n: int, k: int, arch: int, multiprocessors: int, /) -> str: ...
def low_rank_workspace(
    device: int, n: int, k: int, rank: int, x_type: int, m: int, kernel: str, splits: int, /
) -> int: ...
def low_rank_linear(
    device: int, stream: int, x: int, x_type: int, m: int, k: int, ldx: int, packed: int, n: int, rank: int, bias: int,
    activation: int, y: int, workspace: int, kernel: str, splits: int, /,
) -> None: ...  # fmt: skip
def low_rank_kernels() -> list[dict[str, Any]]: ...
def side_branch_workspace(n: int, k: int, rank: int, m: int, /) -> int: ...
def side_branch_linear(
    device: int, stream: int, x: int, x_type: int, m: int, k: int, ldx: int, factors: int, residual: int,
    weight_scale: int, n: int, rank: int, bias: int, activation: int, y: int, workspace: int, kernel: str, /,
) -> None: ...  # fmt: skip
def side_branch_quantize(
    device: int, stream: int, x: int, x_type: int, m: int, k: int, ldx: int, factors: int, residual: int, n: int,
    rank: int, workspace: int, /,
) -> None: ...  # fmt: skip
