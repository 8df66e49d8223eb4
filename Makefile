PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help setup train test test-slow lint

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(INSTALLED) ## Make the virtual environment .venv with pinned versions and the compiled library

# Re-made only when what it is made from changes. Byte-compiling is left to the first import: it would double the time.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt src/involution/csrc/involution.cpp
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --progress-bar on -c constraints.txt -e '.[dev]'
	@touch $@
	@$(BIN)/python -c 'import involution; print("Installed. Implementations:", involution.implementations())'

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
