# `make demo` and `make test` need Python >= 3.10 with pip, a C++17 compiler and CMake; everything else they install themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := $(VENV)/.tools
READY := $(VENV)/.ready
CUDA_READY := $(VENV)/.cuda-ready
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml constraints.txt
PYTEST := $(BIN)/python -m pytest
TARGETS := executorch litert openvino coreml
WORKERS := -n auto --maxprocesses 8 --dist worksteal
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

.PHONY: demo test test-all targets stress emulated spills gpu gpu-dry lint format bench models migrate sanitize docs clean drawn

demo: $(READY)
	$(BIN)/pycompress demo

# The everyday loop: tests/conftest.py says what it leaves out.
test: $(READY)
	$(PYTEST) $(WORKERS)

# That, and what it left out: the slow tests, all combinations of parameters, the CUDA module and the CUDA kernels' source on the host.
test-all: test $(CUDA_READY)
	$(PYTEST) $(WORKERS) --rest

# The targets whose packages are heavy, each in an environment of its own, where its tests run.
targets: $(TARGETS:%=build/targets/%/.tested)

build/targets/.wheel: $(READY) $(shell find pycompress -name '*.py')
	rm -rf build/targets/wheel
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --config-settings cmake.define.PYCOMPRESS_CUDA=OFF --wheel-dir build/targets/wheel .
	touch $@

build/targets/%/.tested: build/targets/.wheel tests/test_targets_%.py tests/deployed.py $(wildcard pycompress/targets/*.py)
	test -x build/targets/$*/bin/python || $(PYTHON) -m venv build/targets/$*
	build/targets/$*/bin/pip install --quiet --constraint constraints.txt "$$(echo build/targets/wheel/*.whl)[targets-$*]" pytest
	build/targets/$*/bin/pip install --quiet --no-deps --force-reinstall build/targets/wheel/*.whl
	build/targets/$*/bin/pytest --all tests/test_targets_$*.py
	touch $@

# Kills `save` at random moments, with each version of safetensors that is allowed: the file is the old or the new one, whole.
stress: $(READY)
	for version in 0.5 0.6 0.7 0.8; do \
		$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/safetensors-$$version "safetensors==$$version.*" && \
		PYTHONPATH=build/safetensors-$$version $(BIN)/python tests/stress_save.py 200 || exit 1; \
	done

# The CUDA kernels' source alone, run on the host.
emulated: $(READY)
	$(PYTEST) tests/test_cuda_host.py::test_the_kernels_source_on_the_host

# Compiles all CUDA kernels for 8.9, too, which runs the code of 8.0; `make test-all` fails on a spill in any other.
spills: $(READY)
	cmake -S . -B build/spills -DPYCOMPRESS_CUDA=ON -DPYCOMPRESS_NO_SPILLS=ON '-DCMAKE_CUDA_ARCHITECTURES=80-real;89-real;90-real' \
		-DPython_EXECUTABLE="$$PWD/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	cmake --build build/spills --target _cuda

# On a machine with a CUDA device, torch with CUDA, nvcc and the build's requirements, nothing of which is installed: 12 minutes at most.
gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh

# What that would do, and one file compiled; needs no device.
gpu-dry:
	PYTHON=$(PYTHON) benchmarks/gpu.sh --dry

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

# Whole models and blocks beside the whole of what a user would pick, which the extra installs; one thread and two.
models: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt 'pycompress[bench]'
	$(BIN)/python benchmarks/models.py --threads 1 --threads 2
	$(BIN)/python benchmarks/models.py --blocks --threads 1 --threads 2

MIGRATE := build/migrate

# A Keras and a JAX model to two runtimes, in an environment of its own: these frameworks bring 1.2 GB.
migrate:
	test -x $(MIGRATE)/bin/python || $(PYTHON) -m venv $(MIGRATE)
	$(MIGRATE)/bin/pip install --quiet --constraint constraints.txt --config-settings cmake.define.PYCOMPRESS_CUDA=OFF \
		--config-settings build-dir=$(MIGRATE)/extension --editable '.[migrate]' pytest
	$(MIGRATE)/bin/python -m pytest --capture=no tests/test_migrate.py::test_all_the_way

EMULATED := build/sanitize/tests/native/cuda/cuda_kernels

# 2,000 models as people write them: compressed, validated, saved, loaded; an error ends it.
drawn: $(READY)
	$(BIN)/python tests/test_drawn_models.py

# The C++ core alone under AddressSanitizer and UBSan; and the CUDA kernels' source, where the toolkit's headers are.
sanitize:
	cmake -S . -B build/sanitize -DPYCOMPRESS_NATIVE_TESTS=ON -DPYCOMPRESS_SANITIZE=ON
	cmake --build build/sanitize
	build/sanitize/tests/native/kernels
	test ! -x $(EMULATED) || $(EMULATED) --list | xargs -d '\n' -n 1 -P "$$(nproc)" $(EMULATED)

# The build's requirements stay in the environment: so the build folder is kept, and one changed file is compiled alone.
$(TOOLS): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip 'scikit-build-core>=0.11' 'pybind11>=3.0'
	touch $@

# $(call install,OFF|AUTO,ON|OFF): without the CUDA module, or with it where there is nvcc; whether a spill is an error
define install
$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --config-settings cmake.define.PYCOMPRESS_CUDA=$(1) \
	--config-settings cmake.define.PYCOMPRESS_NO_SPILLS=$(2) --editable '.[dev]'
endef

$(READY): $(TOOLS) $(SOURCES)
	$(call install,OFF,OFF)
	rm -f $(CUDA_READY)
	touch $@

$(CUDA_READY): $(TOOLS) $(SOURCES)
	$(call install,AUTO,ON)
	touch $(READY) $@

clean:
	rm -rf $(VENV) build

# Warnings are errors. The pages open from the disk: build/docs/index.html. pip adds what the extra has beside what is installed.
docs: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt 'pycompress[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
