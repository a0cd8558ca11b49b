"""The measuring harness, the peers and the grids of `pycompress bench` and of the scripts in benchmarks/.

harness: candidates take turns. environment: the machine. peers: who else takes part. int8, int4, sparse, low_rank: the
grids. grid, break_even: what these share. results: comparisons and the file.
"""

from pycompress.benchmark.environment import PACKAGES, Environment, chosen_kernels, processor_name, versions
from pycompress.benchmark.grid import DENSE_FP32, GRID_ROWS, GRID_SHAPES
from pycompress.benchmark.harness import interleave, ratio
from pycompress.benchmark.int4 import (
    INT4_PEERS,
    INT4_SHAPES,
    INT4_SPINNING,
    int4_candidates,
    int4_cells,
    measure_int4,
    summarize_int4,
)
from pycompress.benchmark.int8 import (
    EXACT_PEERS,
    INT8_ROWS,
    INT8_SHAPES,
    OURS,
    PEERS,
    QUICK_ROWS,
    QUICK_SHAPES,
    SPINNING,
    int8_cells,
    measure_int8,
    summarize_int8,
)
from pycompress.benchmark.low_rank import (
    HIGHER_RANKS,
    LOW_RANK_PEERS,
    break_even_rank,
    low_rank_candidates,
    low_rank_cells,
    measure_low_rank,
    speeds,
    summarize_low_rank,
)
from pycompress.benchmark.peers import UnavailableError, available, dense_linear, ort_session, quantize_dynamic
from pycompress.benchmark.results import Record, best_ratio, json_lines, measured, write_json_lines
from pycompress.benchmark.sparse import (
    FEWER_ZEROS,
    SPARSE_PEERS,
    break_even_density,
    csr_forms,
    linear_layers,
    measure_sparse,
    sparse_candidates,
    sparse_cells,
    summarize_sparse,
)

__all__ = [
    "DENSE_FP32",
    "EXACT_PEERS",
    "FEWER_ZEROS",
    "GRID_ROWS",
    "GRID_SHAPES",
    "HIGHER_RANKS",
    "INT4_PEERS",
    "INT4_SHAPES",
    "INT4_SPINNING",
    "INT8_ROWS",
    "INT8_SHAPES",
    "LOW_RANK_PEERS",
    "OURS",
    "PACKAGES",
    "PEERS",
    "QUICK_ROWS",
    "QUICK_SHAPES",
    "SPARSE_PEERS",
    "SPINNING",
    "Environment",
    "Record",
    "UnavailableError",
    "available",
    "best_ratio",
    "break_even_density",
    "break_even_rank",
    "chosen_kernels",
    "csr_forms",
    "dense_linear",
    "int4_candidates",
    "int4_cells",
    "int8_cells",
    "interleave",
    "json_lines",
    "linear_layers",
    "low_rank_candidates",
    "low_rank_cells",
    "measure_int4",
    "measure_int8",
    "measure_low_rank",
    "measure_sparse",
    "measured",
    "ort_session",
    "processor_name",
    "quantize_dynamic",
    "ratio",
    "sparse_candidates",
    "sparse_cells",
    "speeds",
    "summarize_int4",
    "summarize_int8",
    "summarize_low_rank",
    "summarize_sparse",
    "versions",
    "write_json_lines",
]
