# Everything a user or CI runs, on any machine with Python >= 3.11 and make. `make` alone explains itself.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# the newest supported interpreter of this machine; override with `make PYTHON=/path/to/python ...`
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $$(test -t 1 || echo --quiet) -c constraints.txt
# tests start their own processes: two workers, one thread each, suit two cores and stay correct on more
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
PYTEST := $(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist worksteal

.PHONY: help quickstart test test-all lint format bench clean

help:  ## this list
	@echo "ModelLink. Start with \`make quickstart\`; nothing has to be installed by hand."
	@echo
	@grep -hE '^[.a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo "Variables: PYTHON (interpreter for .venv), WORKERS (parallel test workers, default 2), ARGS (more for pytest)."

# The stamps are rebuilt when a dependency changes; code changes need nothing, the package is installed in place.
.venv: $(VENV)/.installed  ## make the virtual environment (the other targets do it themselves)

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 to 3.13 found; install one or run make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $$($(PYTHON) --version)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "installing ModelLink and its dependencies (a few minutes the first time)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing the test extras"
	@$(PIP) -e '.[test]'
	@$(PIP) --no-deps --only-binary=:all: megatron-core || echo "no megatron-core for this machine: its tests will skip" >&2
	@touch $@

quickstart: $(VENV)/.installed  ## the whole job on this machine: text, tokenizer, pretrain, resume, export, SFT, chat, score
	$(BIN)/python -m modellink.quickstart

lint: $(VENV)/.installed-test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint  ## lint, types and the fast test suite
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint  ## the same with the slow tests
	$(PYTEST) $(ARGS)

bench: $(VENV)/.installed-test  ## run the benchmarks on Python's documentation; results land in benchmarks/results
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/python -m modellink.data.python_docs "$$folder" --questions 1 && \
	$(BIN)/python -m modellink.data.train_tokenizer --input "$$folder/corpus.jsonl" --output "$$folder/tokenizer" && \
	$(BIN)/python benchmarks/preprocess.py --input "$$folder/corpus.jsonl" --tokenizer "$$folder/tokenizer" \
		--output "benchmarks/results/$$(date -u +%F)-preprocess-python-docs.md"
	$(BIN)/python benchmarks/train.py

clean:  ## remove the virtual environment, caches and build output
	rm -rf $(VENV) build dist quickstart *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
