# Everything here sets itself up from nothing: a virtual environment in .venv, CRIU and the demo model in the data folder
# ($DORMOUSE_HOME, else ~/.local/share/dormouse). No system package is installed and no system file is changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench setup model clean

PYTHON ?= python3
PYTEST_ARGS ?=
# Files side by side: most tests wait for processes most of the time.
WORKERS ?= 3
RUNS ?= 5
MODEL := smollm2-135m
BIN := .venv/bin

# Tests and demo start hundreds of Pythons: each would compile Dormouse anew where this is set (empty counts as unset).
export PYTHONDONTWRITEBYTECODE :=

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup model ## Watch a model answer, fall asleep to disk and wake again (needs root)
	@$(BIN)/dormouse doctor >.venv/doctor.txt || { cat .venv/doctor.txt; exit 4; }
	@$(BIN)/python demo/demo.py

test: ## Check style and types, run all tests (needs root)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint setup
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: .venv/installed ## Check style and types only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: setup model ## Measure cold starts against wake-ups (RUNS=5)
	$(BIN)/dormouse bench start $(MODEL) --runs $(RUNS)

clean: ## Remove the virtual environment and caches; models and snapshots stay
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: .venv/installed
	@$(BIN)/dormouse setup criu

model: .venv/installed
	@$(BIN)/dormouse ls --json | grep -q '"name": "$(MODEL)"' || $(BIN)/dormouse import $(MODEL) --name $(MODEL)

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is not: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: install the package python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[transformers,dev]'
	@touch $@
