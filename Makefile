# One environment in .venv; a stamp file for each set of extras, so that installation happens once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread a process: the models here are small, and two processes on two cores beat two threads in one.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1
PYTEST_ARGS ?= -n 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check bench clean

help:
	@echo "make demo       install into .venv and run the demo (about a minute after installation)"
	@echo "make test       the whole suite"
	@echo "make test-fast  the suite without the slow tests"
	@echo "make check      ruff, mypy --strict and the direction of imports"
	@echo "make bench      the benchmarks"
	@echo "make clean      remove .venv and everything generated"
	@echo "PYTHON=python3.12 make demo chooses the interpreter (3.10 or later)"

demo: $(VENV)/.base
	$(BIN)/pullback demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests pullback

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow" tests pullback

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict pullback
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(VENV)/.dev
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.attribution
	$(BIN)/python -m benchmarks.convergence

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov *.egg-info
	find pullback tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "pullback needs Python 3.10 or later: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch by its exact version and first: any other spelling fetches gigabytes of CUDA libraries
$(VENV)/.base: constraints.txt pyproject.toml | $(BIN)/python
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) -e '.[dev,hf,series]'
	@touch $@
