# Every target works alone on a fresh machine that has Python 3.11 (or newer) and make:
# it makes .venv with the newest Python of the machine, installs what it needs there, and runs.  A second call
# installs nothing.
#
#   make demo          train the small transformer on real text, in under two minutes
#   make demo-minilm   search with the real all-MiniLM-L6-v2, train it, give it back; installs it and torch (some GB)
#   make quick         lint, types and the tests that answer fast: what to run while working
#   make test          lint, types, tests, doctests: what CI runs
#   make docs          the documentation as a site, in site/
#   make bench         the numbers, side by side (bench-quick: a short run; bench-oldest: on the oldest Python)
#   make dist          wheel and sdist, checked, and tried in an empty environment
#   make test-modes    the tests under each of Flax's modes, on the newest and the oldest Python: docs/compatibility.md
#   make tests-oldest  the tests on the oldest Python of the machine, beside the first: what CI runs as well
#   make test-torch    the models in statewise.examples.names beside transformers on torch, which it installs (some GB)
#   make test-pre      a short part of the tests on pre-releases of JAX and the others, if there are any
#   make PYTHON=python3.13 VENV=.venv13 test      another interpreter, beside the first

SHELL := /bin/bash
.DEFAULT_GOAL := help

# The newest Python of the machine has the newest JAX and Flax.  Asked for once, and only by targets that need it.
PYTHON ?= $(eval PYTHON := $$(shell .ci/python newest))$(PYTHON)
VENV ?= .venv
# Two workers: one each for the two cores of a small machine.  JAX's own threads fill a larger one.
WORKERS ?= 2
PYTEST_ARGS ?=
BIN := $(VENV)/bin
# `uv` installs in a quarter of the time, where it is there; pip does where it is not, or cannot.
UV := $(shell command -v uv)
INSTALL = $(if $(UV),$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python $(1) ||) \
  $(BIN)/python -m pip install --quiet --disable-pip-version-check $(1)

.PHONY: help demo demo-minilm quick test tests-oldest test-pre test-slow test-torch browser-tests lint types tests docs bench bench-oldest bench-quick dist format clean

help:
	@sed -n 's/^#   //p' Makefile

# One stamp for each set of dependencies: newer than pyproject.toml means installed.  The install is editable,
# so a change of the code asks for nothing.
$(VENV)/.created:
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Statewise needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	$(call INSTALL,--editable .)
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.created
	$(call INSTALL,--editable '.[$*]')
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/statewise demo

demo-minilm: $(VENV)/.installed-minilm
	$(BIN)/python -m statewise.examples.minilm

# JAX keeps what the tests compiled: most programs come again, and a second run is faster.
tests quick: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.jax_cache

# Bytecode is kept, whatever the environment says: the suite starts hundreds of interpreters.
tests quick test-modes test-modes-fixed: export PYTHONDONTWRITEBYTECODE :=

# Most of the time of a test goes into compiling.  What runs beside the complete suite compiles without XLA's expensive
# optimizations, in two thirds of the time; so do those directories of the complete suite that are not about what a
# program computes (tests/conftest.py).  The others compile as users do.
quick tests-oldest test-modes test-modes-fixed: export JAX_DISABLE_MOST_OPTIMIZATIONS := 1

# Everything that answers fast.  Properties draw ten examples.  Left out are the directories that tests/conftest.py
# marks, files marked `heavy`, and tests that took more than 0.2 seconds in the last quick run of this checkout
# (tests/helpers/quick.py).
QUICK := not slow and not torch and not heavy and not docs and not processes and not browser and not equivalence
quick: lint types
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --quick=0.2 --hypothesis-profile=quick -m "$(QUICK)" $(PYTEST_ARGS)

test: lint types tests

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

# The doctests of every module and the code of README.md and docs/ are tests like any other (tests/docs/test_doctests.py).
tests: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# What the oldest Python and libraries can make fail, on them, in an environment beside the first.  Lint, types, the site,
# the pages and the browser's tests do not depend on them; of each property it draws fewer examples.  To leave CI time,
# `heavy` files, those that start processes, and tests that take over half a second (tests/helpers/quick.py) run on the
# newest only; `make PYTHON=... VENV=... test` runs everything.
OLDEST := not slow and not torch and not heavy and not docs and not processes and not browser
tests-oldest:
	$(MAKE) PYTHON="$$(.ci/python oldest)" VENV=.venv-oldest \
	  PYTEST_ARGS='--quick=0.5 --hypothesis-profile=quick -m "$(OLDEST)" $(PYTEST_ARGS)' tests

# What a new version of JAX, Flax, Optax or Orbax breaks first: names and jaxprs, the object graph, proofs on programs, a
# step, a checkpoint.  On their pre-releases, in an environment on top of the first; nothing runs if there are none.
PRE_TESTS := tests/test_seams.py tests/common tests/filters/test_filters.py tests/plan/test_elementwise.py \
  tests/core/test_state.py tests/step/test_effects.py tests/step/test_step.py \
  tests/checkpoint/test_orbax.py tests/checkpoint/test_golden.py
test-pre: $(VENV)/.installed-test
	@.ci/prereleases $(BIN)/python .venv-pre -n $(WORKERS) --dist worksteal $(PRE_TESTS)

# Under each of Flax's modes (tests/helpers/modes.py), on both ends; writes the table in docs/compatibility.md.
# `test-modes-fixed` is the small part that CI runs; the default mode is that of the rest of CI.
OLDEST_VENV = .venv-oldest
MODES = $(BIN)/python tests/helpers/run_modes.py --python $(BIN)/python --python $(OLDEST_VENV)/bin/python
.PHONY: test-modes test-modes-fixed environments
environments: $(VENV)/.installed-test
	$(MAKE) PYTHON="$$(.ci/python oldest)" VENV=$(OLDEST_VENV) $(OLDEST_VENV)/.installed-test

test-modes: environments
	$(MODES) --workers $(WORKERS) --demo --write

test-modes-fixed: environments
	$(MODES) --fixed --together $(addprefix --mode ,tree no-updates hijax ref sow-noop dict)

# What takes minutes: a hundred SIGKILLs in the midst of saving.
test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

# Weights of others, beside transformers and peft on torch.
test-torch: $(VENV)/.installed-torch
	$(BIN)/python -m pytest -q -m torch $(PYTEST_ARGS)

# The report's page in a real Chromium.  `make tests` runs these too, where there is a browser, and skips them where not.
browser-tests: $(VENV)/.installed-test
	.ci/chromium
	$(BIN)/python -m pytest -q -m browser $(PYTEST_ARGS)

# The site, into site/: open site/index.html.  Strict: a broken link, or a page outside the navigation, fails.
# That it builds, and that all code on its pages runs, are tests (tests/docs/).
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks

bench-quick: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks --quick

# The same on the oldest Python and libraries, whose results have a folder of their own.
BENCH_ARGS = --results benchmarks/results/oldest
bench-oldest:
	$(MAKE) PYTHON="$$(.ci/python oldest)" VENV=$(OLDEST_VENV) $(OLDEST_VENV)/.installed-bench
	$(OLDEST_VENV)/bin/python -m benchmarks $(BENCH_ARGS)

# The README's first example and the demo, run by the wheel alone, in an environment with nothing else.
dist: $(VENV)/.installed-dist
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	PYTHON="$(PYTHON)" .ci/try-wheel dist/*.whl

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-pre build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .jax_cache .quick_times.json
