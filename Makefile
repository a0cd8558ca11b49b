# `make demo` and `make test` need Python >= 3.10 with pip, a C++17 compiler and CMake; everything else they install themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml constraints.txt

.PHONY: demo test lint format bench sanitize clean

demo: $(READY)
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

# The C++ core alone under AddressSanitizer and UBSan; and the CUDA kernels' source, where the toolkit's headers are.
sanitize:
	cmake -S . -B build/sanitize -DPYCOMPRESS_NATIVE_TESTS=ON -DPYCOMPRESS_SANITIZE=ON
	cmake --build build/sanitize --parallel
	build/sanitize/tests/native/kernels
	test ! -x build/sanitize/tests/native/cuda/cuda_kernels || build/sanitize/tests/native/cuda/cuda_kernels

# The environment is made once, and again when a source of the native module or a dependency changes.
$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build
