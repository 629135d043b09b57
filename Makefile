# Every target works alone on a fresh machine that has Python 3.11 (or newer) and make:
# it makes .venv, installs what it needs there, and runs.  A second call installs nothing.
#
#   make demo          train the small transformer on real text, in under two minutes
#   make test          lint, types, tests, doctests: what CI runs
#   make docs          the documentation as a site, in site/
#   make bench         the numbers, side by side (bench-quick: a short run)
#   make PYTHON=python3.13 VENV=.venv13 test      another interpreter, beside the first

SHELL := /bin/bash
.DEFAULT_GOAL := help

# `python3.11 -c ''` and not `command -v`: a version manager's shim may be there with nothing behind it.
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV ?= .venv
# Two workers: one each for the two cores of a small machine.  JAX's own threads fill a larger one.
WORKERS ?= 2
PYTEST_ARGS ?=
BIN := $(VENV)/bin

.PHONY: help demo test test-slow browser-tests lint types tests docs bench bench-quick format clean

help:
	@sed -n 's/^#   //p' Makefile

# One stamp for each set of dependencies: newer than pyproject.toml means installed.  The install is editable,
# so a change of the code asks for nothing.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Statewise needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/statewise demo

test: lint types tests

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

# The doctests of every module and the code of README.md and docs/ are tests like any other (tests/test_doctests.py).
tests: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# What takes minutes: a hundred SIGKILLs in the midst of saving.
test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

# The report's page in a real Chromium.  `make tests` runs these too, where there is a browser, and skips them where not.
browser-tests: $(VENV)/.installed-test
	.ci/chromium
	$(BIN)/python -m pytest -q tests/report $(PYTEST_ARGS)

# The site, into site/: open site/index.html.  Strict: a broken link, or a page outside the navigation, fails.
# That it builds, and that all code on its pages runs, are tests (tests/test_docs.py, tests/test_doctests.py).
docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks

bench-quick: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks --quick

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
