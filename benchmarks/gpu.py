"""The int8 layer on a CUDA device beside torch bf16, fp16, `_int_mm`, fp8 and cuBLASLt: prints a line for each and writes
benchmarks/results/gpu.jsonl. Without a device it says why there is none, and fails.
"""

import argparse
import sys
from pathlib import Path

from pycompress.benchmark.cuda import run_cuda


def shape(text: str) -> tuple[int, int, int]:
    """Parses 4096x4096x14336: rows m, in_features k, out_features n."""
    m, k, n = map(int, text.split("x"))
    return m, k, n


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shapes", "-s", type=shape, nargs="+", default=[], metavar="MxKxN")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--every-kernel", action="store_true", help="Also force each kernel of the table.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.jsonl")
    chosen = parser.parse_args()
    try:
        for line in run_cuda(
            chosen.shapes, every_kernel=chosen.every_kernel, rounds=chosen.rounds, output=chosen.output
        ):
            print(line, flush=True)
    except RuntimeError as error:
        sys.exit(str(error))
