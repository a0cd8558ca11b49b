"""The native module: pointers as integers; `ops` has checked what they point to."""

from typing import Any

def int8_linear(
    x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int, weight_scale: int,
    bias: int, activation: int, y: int, y_type: int, row_scale: int, zero_point: int, threads: int, /,
) -> None: ...  # fmt: skip
def use_exchange(capsule: object, /) -> bool: ...
def int8_linear_tensors(
    x: object, packed: object, bias: object, activation: int, y: object, threads: int, /
) -> bool: ...
def int8_pack(
    values: int, n: int, k: int, activation_bits: int, kernel: str, threads: int, input_scale: float,
    input_zero_point: int, /,
) -> bytes: ...  # fmt: skip
def int8_unpack(packed: int, packed_bytes: int, values: int, /) -> None: ...
def int8_header(packed: int, packed_bytes: int, /) -> dict[str, Any]: ...
def int8_quantize(
    x: int, x_type: int, m: int, k: int, ldx: int, bits: int, input_scale: float, input_zero_point: int, q: int,
    scale: int, zero_point: int, /,
) -> None: ...  # fmt: skip
def int8_round(
    x: int, x_type: int, m: int, k: int, ldx: int, bits: int, input_scale: float, input_zero_point: int, y: int,
    threads: int, /,
) -> None: ...  # fmt: skip
def int8_conv2d(
    x: int, x_type: int, channels_last: bool, images: int, channels: int, height: int, width: int, packed: int,
    packed_bytes: int, n: int, weight_scale: int, bias: int, activation: int, stride_h: int, stride_w: int, pad_top: int,
    pad_left: int, dilation_h: int, dilation_w: int, out_h: int, out_w: int, y: int, y_type: int, scale: int,
    zero_point: int, threads: int, /,
) -> None: ...  # fmt: skip
def int8_conv2d_hand_on(
    x: int, x_type: int, channels_last: bool, images: int, channels: int, height: int, width: int, packed: int,
    packed_bytes: int, n: int, weight_scale: int, bias: int, activation: int, stride_h: int, stride_w: int, pad_top: int,
    pad_left: int, dilation_h: int, dilation_w: int, out_h: int, out_w: int, y: int, y_type: int, y_channels_last: bool,
    to_scale: float, to_zero_point: int, to_amax: int, behind: int, threads: int, /,
) -> bool: ...  # fmt: skip
def int8_conv2d_pack(
    values: int, n: int, channels: int, groups: int, kernel_h: int, kernel_w: int, activation_bits: int, kernel: str,
    threads: int, input_scale: float, input_zero_point: int, /,
) -> bytes: ...  # fmt: skip
def int8_conv2d_unpack(packed: int, packed_bytes: int, values: int, /) -> None: ...
def int8_conv2d_header(packed: int, packed_bytes: int, /) -> dict[str, Any]: ...
def int4_linear(
    x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int, bias: int, activation: int,
    y: int, y_type: int, threads: int, /,
) -> None: ...  # fmt: skip
def int4_linear_tensors(
    x: object, packed: object, bias: object, activation: int, y: object, threads: int, /
) -> bool: ...
def int4_pack(
    values: int, scale: int, zero_point: int, n: int, k: int, group: int, activation_bits: int, threads: int, /
) -> bytes: ...
def int4_unpack(packed: int, packed_bytes: int, values: int, scale: int, zero_point: int, /) -> None: ...
def int4_header(packed: int, packed_bytes: int, /) -> dict[str, Any]: ...
def sparse_linear(
    x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int, weight_scale: int,
    bias: int, activation: int, y: int, y_type: int, row_scale: int, zero_point: int, threads: int, /,
) -> None: ...  # fmt: skip
def sparse_conv2d(
    x: int, x_type: int, images: int, channels: int, height: int, width: int, packed: int, packed_bytes: int, n: int,
    bias: int, activation: int, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_top: int, pad_left: int,
    dilation_h: int, dilation_w: int, out_h: int, out_w: int, y: int, threads: int, /,
) -> None: ...  # fmt: skip
def sparse_linear_tensors(
    x: object, packed: object, bias: object, activation: int, y: object, threads: int, /
) -> bool: ...
def sparse_pack(
    mask: int, values: int, n: int, k: int, nnz: int, bits: int, activation_bits: int, layout: str, threads: int, /
) -> bytes: ...
def sparse_unpack(packed: int, packed_bytes: int, mask: int, values: int, /) -> None: ...
def sparse_header(packed: int, packed_bytes: int, /) -> dict[str, Any]: ...
def low_rank_linear(
    x: int, x_type: int, m: int, k: int, ldx: int, packed: int, packed_bytes: int, n: int, bias: int, activation: int,
    y: int, y_type: int, intermediate: int, threads: int, /,
) -> None: ...  # fmt: skip
def low_rank_linear_tensors(
    x: object, packed: object, bias: object, activation: int, y: object, threads: int, /
) -> bool: ...
def low_rank_pack(
    down: int, up: int, n: int, k: int, rank: int, bits: int, activation_bits: int, down_scale: int, up_scale: int,
    residual_kind: int, residual: int, residual_bytes: int, residual_scale: int, threads: int, /,
) -> bytes: ...  # fmt: skip
def low_rank_unpack(
    packed: int, packed_bytes: int, down: int, up: int, down_scale: int, up_scale: int, residual: int,
    residual_scale: int, /,
) -> None: ...  # fmt: skip
def low_rank_header(packed: int, packed_bytes: int, /) -> dict[str, Any]: ...
def embed_tensors(
    tables: list[Any], scales: list[Any], ids: list[Any], padding: int, weight: object, shift: object, eps: float,
    norm: bool, y: object, threads: int, /,
) -> bool: ...  # fmt: skip
def int8_recurrent(
    cell: int, x: int, x_type: int, rows: int, k: int, ldx: int, of_input: tuple[int, int, int, int],
    of_hidden: tuple[int, int, int, int], batch_sizes: int, steps: int, batch: int, size: int, reverse: bool, h: int, c: int,
    y: int, ldy: int, threads: int, /,
) -> None: ...  # fmt: skip
def pool_tensors(x: object, mask: object, normalize: bool, y: object, threads: int, /) -> bool: ...
def kernels() -> list[dict[str, Any]]: ...
def instruction_sets() -> dict[str, bool]: ...
def cap_isa(name: str, /) -> str: ...
def force_kernel(op: str, name: str, /) -> str: ...
def peak(loop: str, seconds: float, threads: int, /) -> float: ...
def bandwidth(n_bytes: int, seconds: float, threads: int, /) -> float: ...
