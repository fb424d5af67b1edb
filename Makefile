# make quickstart: train and evaluate a small model, in minutes on a laptop CPU
# make test:       the whole test command
# make test-all:   also the thorough tests, which take as long again; CI runs it
# make test-fast:  the tests that take a minute together, while working on something
# Both make a virtual environment in .venv first, from any Python >= 3.11 (PYTHON=python3.12 to choose).
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python3.14; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-all test-fast lint clean
quickstart: $(VENV)/.installed
	$(BIN)/python -m d1jax.train --config configs/quickstart.yaml

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n auto -m "not thorough"

test-all: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n auto

test-fast: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n auto -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "d1jax needs Python 3.11 or newer; none was found on PATH"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .import_linter_cache
