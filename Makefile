# `make demo` and `make test` need Python >= 3.10 with pip, a C++17 compiler and CMake; everything else they install themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CPU_READY := $(VENV)/.cpu-ready
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml constraints.txt

.PHONY: demo test lint format bench sanitize clean

# Where all is installed, that does; else the CPU's kernels are enough, for which nvcc need not run for minutes.
demo: $(or $(wildcard $(READY)),$(CPU_READY))
	$(BIN)/pycompress demo

test: $(READY)
	$(BIN)/python -m pytest
	PYCOMPRESS_ISA=scalar $(BIN)/python -m pytest tests/test_kernels.py tests/test_ops.py tests/test_int4_ops.py tests/test_sparse_ops.py \
		tests/test_low_rank_ops.py -k "not twin"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(READY)
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/kernels.py --op int4
	$(BIN)/python benchmarks/kernels.py --op sparse
	$(BIN)/python benchmarks/kernels.py --op low_rank
	$(BIN)/python benchmarks/models.py

EMULATED := build/sanitize/tests/native/cuda/cuda_kernels

# The C++ core alone under AddressSanitizer and UBSan; and the CUDA kernels' source, where the toolkit's headers are.
sanitize:
	cmake -S . -B build/sanitize -DPYCOMPRESS_NATIVE_TESTS=ON -DPYCOMPRESS_SANITIZE=ON
	cmake --build build/sanitize --parallel
	build/sanitize/tests/native/kernels
	test ! -x $(EMULATED) || $(EMULATED) --list | xargs -d '\n' -n 1 -P "$$(nproc)" $(EMULATED)

# The environment is made once, and again when a source of the native modules or a dependency changes.
# $(call install,AUTO|OFF): with the CUDA kernels where there is nvcc, or without
define install
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
$(BIN)/pip install --quiet --upgrade pip
$(BIN)/pip install --quiet --constraint constraints.txt --config-settings cmake.define.PYCOMPRESS_CUDA=$(1) --editable '.[dev]'
touch $@
endef

$(READY): $(SOURCES)
	$(call install,AUTO)

$(CPU_READY): $(SOURCES)
	$(call install,OFF)

clean:
	rm -rf $(VENV) build
