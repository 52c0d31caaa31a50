# Each target sets up what it needs in .venv, once; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# For the kernels' tests where torch brings no Triton (its CPU builds): the interpreter and the compiler need no GPU.
TRITON := triton==3.9.0

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-torch lint format bench explore gpu

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

$(STAMP): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make setup needs Python 3.11 or newer (the pinned numpy and scipy do); pass PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && ! $(BIN)/python -c 'import triton' 2>/dev/null; then \
		echo "$(BIN)/python -m pip install $(TRITON)"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$(TRITON)"; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

setup: $(STAMP) ## create .venv with the pinned versions and this package, once

demo: $(STAMP) ## train a GraphSAGE on PubMed, plain and compressed (ARGS="--epochs 20" for options)
	$(BIN)/python -m actcompile demo $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint ## lint, then the tests that need neither long compiles nor a GPU, a process a core (ARGS="-k demo" for options)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not gpu" $(ARGS)

test-all: lint ## lint, then all tests, also those that compile with Inductor; those for a GPU skip without one
	$(BIN)/python -m pytest $(ARGS)

# An environment of its own for one version of torch, with which the tests run; the rest as in requirements-dev.txt, but
# for NumPy: Triton 3.6, that of torch 2.11, has an interpreter that makes numbers of arrays, which NumPy 2.4 refuses.
TORCH ?= 2.13.0
OTHER := .venv-torch-$(TORCH)

$(OTHER)/.ready: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(OTHER)
	sed -e 's/^torch==.*/torch==$(TORCH)/' -e 's/^numpy==.*/numpy==2.3.5/' requirements-dev.txt >$(OTHER)/requirements.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -r $(OTHER)/requirements.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test-torch: $(OTHER)/.ready ## as test, with another torch: make test-torch TORCH=2.11.0 (ARGS="-m slow" for those with Inductor)
	OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(OTHER)/inductor TRITON_CACHE_DIR=$(CURDIR)/$(OTHER)/triton \
		$(OTHER)/bin/python -m pytest -n auto -m "not slow and not gpu" $(ARGS)

# A machine with a GPU often has a torch of its own and no network: with PYTHON given, that Python is used as it is.
ifeq ($(origin PYTHON),file)
gpu: GPU_PYTHON := $(BIN)/python
gpu: $(STAMP)
else
gpu: GPU_PYTHON := $(PYTHON)
endif
gpu: ## on a machine with a GPU, 8 minutes: its tests, kernels and steps (PYTHON=python3: with that Python's own torch)
	$(GPU_PYTHON) -m bench gpu $(ARGS)

explore: $(STAMP) ## draw models and graphs, and look for one that is compressed wrongly (ARGS="--cases 10000 --seed 0")
	$(BIN)/python -m tests.explore $(ARGS)

bench: $(STAMP) ## all benchmarks, written to bench/results (ARGS="sage-arxiv" for one, ARGS="list" for the list)
	$(BIN)/python -m bench $(or $(ARGS),all)
