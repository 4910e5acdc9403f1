# Every target does the set-up it needs by itself; `make help` lists them.
#
# PYTHON       interpreter that .venv is made from (default: python3, if it is 3.11 or 3.12)
# PYTEST_ARGS  more arguments for pytest, as in: make test PYTEST_ARGS="-k labels"
# RESULTS      folder for the results of benchmarks

PYTHON ?=
PYTEST_ARGS ?=
RESULTS ?= benchmarks/results
export PYTHON

VENV_PYTHON := .venv/bin/python
# `make gpu` also runs where nothing can be installed.
GPU_PYTHON = $(if $(wildcard $(VENV_PYTHON)),$(VENV_PYTHON),$(or $(PYTHON),python3))

.PHONY: help setup demo test lint bench gpu clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

setup: ## make .venv with the pinned versions (done once, checked in no time)
	@scripts/setup.sh

demo: setup ## write the digits, train a small CNN with heads, show how much it memorises
	$(VENV_PYTHON) data_prep/write_datasets.py --config configs/data/digits.yaml
	$(VENV_PYTHON) train_rlp.py --config configs/digits_cnn.yaml --run.overwrite true

test: setup ## run the tests
	$(VENV_PYTHON) -m pytest -n 2 -q -rs $(PYTEST_ARGS)

lint: setup ## ruff and pyright
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV_PYTHON) -m pyright

bench: setup ## run every benchmark on this machine
	$(VENV_PYTHON) -m benchmarks.stale --run --all --out "$(RESULTS)"

gpu: ## on a machine with a GPU: its tests, and the benchmarks whose results are older than their code
	$(GPU_PYTHON) -m benchmarks.stale --device cuda --out "$(RESULTS)"
	$(GPU_PYTHON) -m pytest -m gpu -q -rs $(PYTEST_ARGS)
	$(GPU_PYTHON) -m benchmarks.stale --device cuda --run --out "$(RESULTS)"

clean: ## remove caches and build folders (.venv, data and runs stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
