# Everything on a fresh machine with Python 3.11 or 3.12: `make demo`, `make test`.
#
#   PYTHON       the interpreter to build the environment with
#   TORCH_INDEX  URL of an index that holds PyTorch's CPU build, when pip's own
#                configuration (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) does not lead to it

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Changes exactly when what is to be installed changes.
INSTALLED := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)

.PHONY: help demo up down status test test-integration test-fast lint format clean

help:
	@echo "make demo    start everything and put the example model into production"
	@echo "make up      start the local stack        make down    stop it"
	@echo "make status  what runs and serves         make test    tests"
	@echo "make test-integration  kill -9 everywhere, on a stack of its own"
	@echo "make lint    ruff, pyright, dg check defs make clean   remove the environment"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "Python 3.11 or 3.12 is needed, $(PYTHON) is another. To do: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/installed-*
	@echo "Installing into $(VENV): some 260 packages, a few minutes the first time"
	@# torch first and alone: the constraints below exclude its CUDA build, which would
	@# bring gigabytes along, so that a missing CPU build is an error and not a surprise.
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX),) 2> $(VENV)/pip.log \
	  || { tail -n 5 $(VENV)/pip.log; echo "PyTorch's CPU build was not found. To do: make TORCH_INDEX=URL $(MAKECMDGOALS), with the index URL that pytorch.org/get-started shows for pip and CPU"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[local,cpu,harness,dev]' 2> $(VENV)/pip.log \
	  || { tail -n 20 $(VENV)/pip.log; exit 1; }
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/llmops demo

up down status: $(INSTALLED)
	@$(BIN)/llmops $@

test: $(INSTALLED)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not stack and not integration" $(PYTEST_ARGS)
	@$(BIN)/python -m pytest -m "stack and not integration" $(PYTEST_ARGS)

test-integration: $(INSTALLED)
	@$(BIN)/python -m pytest -m integration $(PYTEST_ARGS)

test-fast: $(INSTALLED)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not stack and not integration" $(PYTEST_ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@DAGSTER_HOME= $(BIN)/dg check defs

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	@test ! -x $(BIN)/llmops || $(BIN)/llmops down
	rm -rf $(VENV)
