# Two commands do everything on a fresh Debian: `make run` shows a live node, `make test` passes every test.
# Everything is set up in .venv on the first use, and again when pyproject.toml, requirements.txt or a C source changes.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := uv==0.13.8
STAMP  := $(VENV)/.stamp
NATIVE := $(wildcard rkmetrics/*.c rkmetrics/*.h)

.PHONY: run test lint types bench docs dashboards lock clean tools
.DEFAULT_GOAL := run
.NOTPARALLEL:

run: $(STAMP)
	@$(BIN)/rkmetrics serve --demo --open

test: tools $(STAMP)
	@.ci/suite $(BIN)/python

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pyright is JavaScript: it runs where node is, and mypy everywhere.
types: $(STAMP)
	$(BIN)/mypy
	@if command -v node >/dev/null; then $(BIN)/pyright; else echo "no node here: pyright is left out"; fi

bench: $(STAMP)
	$(BIN)/uv pip install -q --python $(BIN)/python -c requirements.txt --group bench
	$(BIN)/python -m tests.bench

docs: $(STAMP)
	$(BIN)/rkmetrics assets docs

# dashboards/*.json, from what tools/dashboards declares.
dashboards: $(STAMP)
	$(BIN)/python -m tools.dashboards

# requirements.txt: pinned and hashed for every platform and Python version, and it names no registry.
lock: $(STAMP)
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-header --no-emit-index-url --python-version 3.11 \
		--all-extras --group test --group lint pyproject.toml -o requirements.txt

# The servers that tests start, and a compiler for the native cells: installed where that is possible, else named.
tools:
	@.ci/tools test

# --no-build-isolation: setuptools is one of the pinned packages, so nothing is fetched without its hash.
# editable_mode=compat: a path that type checkers follow from any folder; the default is a hook that only Python runs.
$(STAMP): pyproject.toml requirements.txt $(NATIVE)
	@.ci/tools run
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(UV)
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements.txt
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation \
		--config-settings editable_mode=compat -e .
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info rkmetrics/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis bench-results.json
