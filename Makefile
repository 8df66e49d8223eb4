PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

# Where this is set, every start of python would compile torch, timm and others anew: eight seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup train test test-slow test-browser explore bench-gpu bench-scenes package-weights sanitize arm64 lint

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: ## Make the virtual environment .venv with pinned versions and the compiled library
	@$(MAKE) --no-print-directory -j2 .venv/.dependencies .venv/.compiled
	@echo 'Ready: .venv/bin/involution'

# Each stamp is re-made only when what it is made from changes; the two run side by side.
$(BIN)/python:
	$(PYTHON) -m venv .venv

# Byte-compiling is left to the first import of each module: few are ever imported.
.venv/.dependencies: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --no-compile -r constraints.txt
	@touch $@

.venv/.compiled: pyproject.toml CMakeLists.txt $(wildcard src/involution/csrc/*) | $(BIN)/python
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --no-compile --no-deps -e .
	@touch $@

train: setup ## Train a small RedNet and its mirrored ResNet on handwritten digits and compare them
	$(BIN)/involution compare

test: setup lint ## Check style, types and imports, then run the default tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test-slow: setup ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-browser: setup ## Drive the explorer page in Chromium, which must be installed
	$(BIN)/python -m pip install --quiet playwright==1.65.2
	$(BIN)/python -m pytest -m browser

explore: setup ## Write the explorer page for a scene of digits, with kernels that really were learnt
	$(BIN)/involution show sample --out runs/explore

# Preloaded, as python itself is not linked with it; libstdc++ so that it finds the exceptions of others.
ASAN := LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)"
# Fresh memory is all ones, which is NaN; python leaks on purpose.
ASAN += ASAN_OPTIONS=detect_leaks=0:redzone=512:malloc_fill_byte=255:max_malloc_fill_size=1000000000
ASAN += UBSAN_OPTIONS=print_stacktrace=1

sanitize: setup build/sanitized/.compiled ## Run the operator's tests under the address and undefined behaviour sanitizers
	$(ASAN) $(BIN)/python -m pytest --capture=sys --libraries build/sanitized \
		tests/ops/test_implementations.py tests/ops/test_generated.py tests/ops/test_inference.py \
		tests/ops/test_follow.py tests/ops/test_inferred.py tests/ops/sanitized.py

build/sanitized/.compiled: CMakeLists.txt $(wildcard src/involution/csrc/*)
	cmake -S . -B build/sanitized -DSANITIZE=ON -DCMAKE_CXX_COMPILER=g++
	cmake --build build/sanitized --parallel 2
	@touch $@

bench-gpu: setup ## On a machine with a GPU: test the programs, then time them into benchmarks/gpu.csv
	$(BIN)/python -m pytest -m gpu tests/ops/test_triton.py
	$(BIN)/involution bench gpu --out benchmarks
	$(BIN)/involution bench readme

SCENES := faster_rcnn mask_rcnn semantic_fpn detr

bench-scenes: setup ## Train the recipes SCENES on scenes of digits, each with its mirror, into benchmarks/scenes
	mkdir -p benchmarks/scenes
	set -e; for recipe in $(SCENES); do \
		rm -rf build/scenes/$$recipe; \
		$(BIN)/involution compare --config scenes/$$recipe --folder build/scenes/$$recipe; \
		cp build/scenes/$$recipe/results.csv benchmarks/scenes/$$recipe.csv; \
	done

package-weights: ## Train the network that comes with the library, and pack it
	$(MAKE) bench-scenes SCENES=semantic_fpn
	$(BIN)/python -m involution.show.packaged build/scenes/semantic_fpn

arm64: ## Compile the library for arm64, without running it
	@if command -v aarch64-linux-gnu-g++ >/dev/null; then compiler=aarch64-linux-gnu-g++; \
	elif echo '#include <cstdint>' | clang++ --target=aarch64-linux-gnu -x c++ -fsyntax-only - 2>/dev/null; then compiler=clang++; \
	else echo 'There is no compiler for arm64 here: install the Debian package g++-aarch64-linux-gnu.'; exit 1; fi; \
	rm -rf build/arm64 && cmake -S . -B build/arm64 -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS=-Werror \
		-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=$$compiler -DCMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu && cmake --build build/arm64

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
