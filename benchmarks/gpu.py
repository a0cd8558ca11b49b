"""Layers on a CUDA device beside torch (bf16, fp16, `_int_mm`, fp8, CSR, BSR, two linears), cuBLASLt and cuSPARSELt: prints a line
for each and writes benchmarks/results/gpu.jsonl. Without a device it says why there is none, and fails.
"""

import argparse
import sys
from pathlib import Path

from pycompress.benchmark.cuda import run_cuda
from pycompress.benchmark.cuda_int8 import INT8
from pycompress.benchmark.cuda_low_rank import LOW_RANK_WIDE, SIDE_BRANCH
from pycompress.benchmark.cuda_sparse import BLOCK_SPARSE, STRUCTURED

OPS = {
    "int8": INT8,
    "structured": STRUCTURED,
    "blocks": BLOCK_SPARSE,
    "low_rank_wide": LOW_RANK_WIDE,
    "side_branch": SIDE_BRANCH,
}


def shape(text: str) -> tuple[int, int, int]:
    """Parses 4096x4096x14336: rows m, in_features k, out_features n."""
    m, k, n = map(int, text.split("x"))
    return m, k, n


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--op", nargs="+", choices=list(OPS), default=list(OPS), help="All, unless told otherwise.")
    parser.add_argument("--shapes", "-s", type=shape, nargs="+", default=[], metavar="MxKxN")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--every-kernel", action="store_true", help="Also force each kernel of the tables.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.jsonl")
    chosen = parser.parse_args()
    cases = [case for op in chosen.op for case in OPS[op]]
    try:
        for line in run_cuda(
            cases, chosen.shapes, every_kernel=chosen.every_kernel, rounds=chosen.rounds, output=chosen.output
        ):
            print(line, flush=True)
    except RuntimeError as error:
        sys.exit(str(error))
