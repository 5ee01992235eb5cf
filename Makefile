# Two commands do everything on a fresh machine: `make compare` and `make test`. A second call skips what is done.
PYTHON ?= python3
EXPERIMENT ?= arithmetic
BIN := .venv/bin
INSTALLED := .venv/.installed
SMOLLM2 := .cache/smollm2

.PHONY: setup compare test clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "== Making .venv and installing rlzoo and its tools into it (some minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlzoo needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

compare: $(INSTALLED)
	@echo "== Comparing the seven objectives: experiments/$(EXPERIMENT).yaml"
	$(BIN)/rlzoo compare $(EXPERIMENT)

test: $(INSTALLED)
	@echo "== Lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== Types"
	$(BIN)/mypy
	@echo "== Fetching SmolLM2-135M for the tests of a real model (skipped if it cannot be had)"
	@$(BIN)/python tests/fetch_smollm2.py $(SMOLLM2)
	@echo "== Tests of a real model"
	$(BIN)/pytest -m real_model
	@echo "== Tests"
	$(BIN)/pytest -m "not real_model" --numprocesses auto --dist worksteal

clean:
	rm -rf .venv .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
