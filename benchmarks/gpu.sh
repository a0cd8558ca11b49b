#!/usr/bin/env bash
# All that needs a CUDA device, in order of worth, within 12 minutes: build _cuda for this device alone, its tests, a sample of them
# under compute-sanitizer, the benchmark. A stage that fails or runs out of time does not keep the next one from running.
#
#   benchmarks/gpu.sh          needs a device, torch with CUDA, nvcc, and the build's requirements; nothing from a network
#   benchmarks/gpu.sh --dry    says what it would do, and compiles one file; needs no device, only nvcc
set -uo pipefail
cd "$(dirname "$0")/.."
outer=${PYTHON:-python3}
folder=build/gpu
python=$folder/venv/bin/python
dry=
[ "${1-}" != --dry ] || dry=yes
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
failed=() unfinished=()
SECONDS=0

# stage LIMIT NAME COMMAND...: runs it for LIMIT seconds at most and says how it went
stage() {
  local limit=$1 name=$2 start=$SECONDS
  shift 2
  printf '\n== %s (from second %d, for %d s at most)\n   %s\n' "$name" "$start" "$limit" "$*"
  [ -z "$dry" ] || return 0
  timeout --signal=INT --kill-after=10 "$limit" "$@"
  local status=$? how=passed
  case $status in
    0) ;;
    124) how="out of time" unfinished+=("$name") ;;
    *) how="FAILED with status $status" failed+=("$name") ;;
  esac
  printf '== %s: %s after %d s\n' "$name" "$how" $((SECONDS - start))
  return $status
}

if [ -n "$dry" ]; then
  arch=${ARCH:-90}
  device=example
else
  found=$("$outer" -c '
try:
    import torch
except ModuleNotFoundError as error:
    raise SystemExit(f"make gpu needs torch with CUDA in the environment of PYTHON: {error}")
if not torch.cuda.is_available():
    raise SystemExit(f"make gpu needs a CUDA device, and torch {torch.__version__} finds none; make gpu-dry needs none")
major, minor = torch.cuda.get_device_capability()
name = torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "-")
print(f"{major}{minor}", name)') || exit 1
  read -r arch device <<<"$found"
fi
results=${RESULTS:-benchmarks/results}/gpu-$device.jsonl

if ! command -v nvcc >/dev/null; then
  echo "make gpu needs nvcc, which is not on the PATH" >&2
  exit 1
fi
if [ -n "$dry" ]; then
  mkdir -p $folder
  echo "compiling csrc/int8/quantize.cu for $arch"
  nvcc -std=c++17 --fmad=false -O3 "-arch=sm_$arch" -Xptxas=-warn-spills,-warn-lmem-usage,-Werror -cubin \
    -o $folder/quantize.cubin csrc/int8/quantize.cu || exit 1
fi

# An environment of its own over the packages of the one that has torch, be that a virtual environment or the system's.
if [ -z "$dry" ]; then
  "$outer" -m venv --without-pip $folder/venv || exit 1
  "$outer" -c 'import sys; print(*(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))), sep="\n")' \
    >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
fi
stage 210 build "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps \
  --config-settings build-dir=$folder/cmake --config-settings cmake.define.PYCOMPRESS_CUDA=ON \
  --config-settings "cmake.define.CMAKE_CUDA_ARCHITECTURES=$arch-real" --editable . || exit 1
stage 30 load "$python" -c 'import sys; from pycompress import ops; sys.exit(ops.cuda_error())' || exit 1

workers=()
[ -n "$dry" ] || ! "$python" -c 'import xdist' 2>/dev/null || workers=(-n 4 --dist worksteal)
stage 120 tests "$python" -m pytest ${workers[@]+"${workers[@]}"} --durations=5 tests/test_cuda*.py
kernels=()
for file in tests/test_cuda*.py; do
  [[ $file == *_host.py || $file == *_benchmark.py ]] || kernels+=("$file")
done
for tool in memcheck racecheck; do
  stage 45 "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --error-exitcode 1 --tool $tool "$python" -m pytest --one "${kernels[@]}"
done
stage $((700 - SECONDS)) benchmark "$python" benchmarks/gpu.py --output "$results"

[ ! -s "$results" ] || echo "the measurements so far are in $results"
[ ${#unfinished[@]} = 0 ] || printf 'out of time: %s\n' "${unfinished[*]}"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[*]}"
  exit 1
fi
