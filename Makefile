PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: help setup train test test-slow lint

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

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

.venv/.compiled: pyproject.toml CMakeLists.txt src/involution/csrc/involution.cpp | $(BIN)/python
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --no-compile --no-deps -e .
	@touch $@

train: setup ## Train a small RedNet and its mirrored ResNet on handwritten digits and compare them
	$(BIN)/involution compare

test: setup lint ## Check style, types and imports, then run the default tests
	$(BIN)/python -m pytest

test-slow: setup ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
