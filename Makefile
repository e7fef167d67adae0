# Every target makes its own .venv and compiles what it needs; `make demo` and `make test` are all a new user calls.

PYTHON ?= python3
BIN := .venv/bin
# Everything that ends up in the installed package, so that an edit reinstalls it.
SOURCES := pyproject.toml CMakeLists.txt $(shell find backend ccq_format converters -type f -not -name '*.pyc')
# pip keeps the wheel of llama-cpp-python: only its first installation compiles llama.cpp (6 to 15 minutes on 2 cores).
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# GCC before 12.4 and 13.3 (its bug 114098) takes stores to a tile configuration for dead: llama.cpp compiled with it crashes
# on a CPU with AMX in the first product of a q8_0 or q4_0 matrix.  Without the passes that remove dead stores it does not.
AMX := $(shell echo | $(or $(CXX),c++) -march=native -dM -E - 2>/dev/null | grep -c __AMX_INT8__)
INSTALL_LLAMA := $(if $(filter 1,$(AMX)),CXXFLAGS="$(CXXFLAGS) -fno-tree-dse -fno-dse") $(INSTALL)

.PHONY: setup demo test test-slow fuzz test-upstream test-isa fork test-fork test-hosts upstream-check bench quality-real cuda bench-cuda package generate vectors check format clean

setup: .venv/.llama ## install the package and llama.cpp into .venv

demo: .venv/.llama ## convert the bundled model, compare types, print a table
	$(BIN)/python examples/demo.py

test: .venv/.test ## the test suite
	$(BIN)/pytest

test-slow: .venv/.test ## statistics on 10^6 weights, long fuzzing, memory of a 2 GB model
	$(BIN)/pytest -m slow

FUZZ_N ?= 4000
FUZZ ?=
fuzz: .venv/.test ## damaged files through the commands, and the C kernels under sanitizers; goes on where it stopped
	PYTHONPATH=tests $(BIN)/python -m fuzz --count $(FUZZ_N) $(FUZZ)

test-upstream: .venv/.test ## against llama.cpp's own sources and converter (fetches the source archive)
	$(BIN)/pytest -m upstream

test-isa: .venv/.python ## every kernel set, emulated where this CPU lacks it: AVX-512 in Bochs, aarch64 in QEMU
	$(INSTALL) 'click>=8.1'
	$(BIN)/python tests/isa/run.py

bench: .venv/.llama ## kernels alone, then tokens per second in llama.cpp, all types (15 minutes)
	$(BIN)/python benchmarks/kernels.py --encode 1024 --effort fast
	$(BIN)/python benchmarks/speed/bench.py

quality-real: .venv/.llama ## SmolLM2-135M and Gemma 3 270M in every type, beside llama.cpp and ik_llama.cpp (hours; goes on where it stopped)
	$(INSTALL) '.[bench]'
	for model in smollm2-135m gemma3-270m; do \
		$(BIN)/python benchmarks/quality/real.py $$model --csv benchmarks/results/quality-$$model.csv --sizes README.md \
			--widths docs/quality.md || exit 1; \
	done

TREE ?= llama-cpp-python
KIND ?= static
fork: .venv/.llama ## compile the types into llama.cpp (10 to 30 minutes); backend/fork/README.md lists TREE and KIND
	$(INSTALL) 'cmake>=3.18' ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(if $(filter 1,$(AMX)),CXXFLAGS="$(CXXFLAGS) -fno-tree-dse -fno-dse") $(BIN)/python tests/fork/build.py --kind $(KIND) $(TREE)

test-fork: .venv/.test ## test what `make fork` compiled
	$(BIN)/pytest -m fork tests/fork

test-hosts: .venv/.test ## the plugin in other people's llama.cpp: Debian's newest, wheels of the package index, a fork
	$(BIN)/pytest -m hosts -rPs tests/hosts

upstream-check: .venv/.test ## whether the newest archives on the package index still fit the integration and the plugin
	$(BIN)/python tests/upstream_diff/check.py

cuda: .venv/.cuda ## build and install the CUDA kernels too (needs nvcc, no GPU; 2 minutes)

bench-cuda: .venv/.cuda ## on a machine with a GPU: check the CUDA kernels against the CPU, then measure them
	$(INSTALL) torch
	$(BIN)/python benchmarks/cuda/bench.py

PYTHONS ?= $(PYTHON)
package: .venv/.python ## build the source archive, and from it the wheel, and check both
	$(INSTALL) build twine auditwheel
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/auditwheel show dist/*.whl
	$(BIN)/python tests/check_package.py dist $(PYTHONS)

generate: .venv/.llama ## rewrite what is derived from ccq_format/layouts.py
	$(BIN)/python backend/gen.py

vectors: .venv/.llama ## rewrite the golden vectors (only with a change of format)
	$(BIN)/python spec/vectors/make_vectors.py
	$(BIN)/python spec/vectors/invalid/make_invalid.py

C_SOURCES := $(shell git ls-files backend tests | grep -E '\.(c|cpp|cu|h|inl)$$' | grep -v core/layouts.h)

check: .venv/.check ## generated files up to date, layout, lint, types
	$(BIN)/python backend/gen.py --check
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.check ## lay out the sources
	$(BIN)/clang-format -i $(C_SOURCES)
	$(BIN)/ruff format .

clean: ## remove what the targets made
	rm -rf .venv build .cache demo-out

.venv/.python:
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip
	touch $@

.venv/.llama: .venv/.python $(SOURCES)
	@echo "installing; the first time this compiles llama.cpp, which takes 6 to 15 minutes on two cores"
	$(INSTALL_LLAMA) '.[llama]'
	touch $@

.venv/.cuda: .venv/.python $(SOURCES)
	$(INSTALL) -C cmake.define.CCQ_CUDA=ON .
	touch $@

.venv/.test: .venv/.llama
	$(INSTALL_LLAMA) '.[llama,test]'
	touch $@

.venv/.check: .venv/.test
	$(INSTALL_LLAMA) '.[llama,test,check]'
	touch $@
