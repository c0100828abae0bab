# Two commands do everything: `make demo` and `make test`. Both set up what is missing first.
#
#   make demo        train the quickstart recipe here and show the results table
#   make test        the tests, those on a real Slurm included; PKG=planning for one package's
#   make check       lint, types, and the tests that start no process: a minute and a half
#   make test-all    the nightly tests too (slow ones; GPU tests where there is a GPU)
#   make test-newest the tests with the newest releases, beyond the upper bounds (nightly)
#   make lint        ruff, mypy, vulture, and the links of the documentation
#   make lock        renew constraints.txt, the tested versions
#   make house       print the structure of the package: rooms, floors, arrows, circles
#   make docs        regenerate the reference pages, tables and the drawing
#   make site        build the documentation as a web site in build/site
#   make slurm       start a real Slurm of four nodes on this machine to try things on
#   make slurm-stop  stop it
#   make clean       remove the environment and what was built

SHELL := bash
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
HPCFT := $(VENV)/bin/hpcft

# The newest Python from 3.11 on that is here; override with `make PYTHON=…`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# The tested versions, torch's among them. Whether its CPU or its CUDA build is installed is decided
# by pip's configured indexes: point PIP_INDEX_URL at a CPU index to save gigabytes. GPUs that the
# tested build has no code for need another: `make TORCH='torch==…'`.
LOCK := constraints.txt
TESTED_TORCH := $(shell sed -n '/^torch==/p' $(LOCK))
TORCH ?= $(TESTED_TORCH)
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# The demo has two ranks, one a GPU: on a machine with a single GPU, one.
DEMO_RANKS := $(if $(filter 1,$(shell nvidia-smi -L 2>/dev/null | wc -l)),-o resources.gpus_per_node=1)

AS_ROOT := $(shell [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo yes)
SLURM_PACKAGES := slurmctld slurmd slurm-client munge slurmdbd mariadb-server
APT_INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends

.PHONY: help setup system slurm-packages demo test check test-all test-newest lock lint house docs site slurm slurm-stop clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(VENV)/.ready

# A compiler for DeepSpeed's operators, and venv where the distribution splits it off.
system:
	@if [ -n "$(AS_ROOT)" ] && ! { command -v c++ && $(PYTHON) -c 'import ensurepip, venv' && \
	    [ -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; \
	  } >/dev/null 2>&1; then \
	  echo "==> installing a compiler, Python headers and venv"; \
	  apt-get update -qq && $(APT_INSTALL) g++ python3-dev python3-venv; \
	fi

$(VENV)/.ready: pyproject.toml $(LOCK) | system
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed"; exit 1; }
	@echo "==> setting up $(VENV) with $(PYTHON), $(TORCH) ($(if $(HAS_GPU),a GPU is here,no GPU here))"
	$(PYTHON) -m venv $(VENV)
	sed 's/^torch==.*/$(TORCH)/' $(LOCK) > $(VENV)/constraints.txt
	@# Without --no-compile pip takes a minute to compile what is mostly never imported.
	$(PY) -m pip install -q --no-compile -c $(VENV)/constraints.txt "$(TORCH)" -e '.[dev]'
	@$(if $(HAS_GPU),true,echo "==> compiling DeepSpeed's CPU operators"; $(PY) -m hpcft.training.distributed.torch_extensions)
	@touch $@

demo: setup
	@echo "==> training: recipes/quickstart.yaml"
	$(HPCFT) submit recipes/quickstart.yaml --cluster local --watch $(DEMO_RANKS)
	@echo "==> results"
	$(HPCFT) collect quickstart

slurm-packages:
	@if ! command -v slurmctld slurmd munged slurmdbd mariadbd >/dev/null 2>&1 && \
	    ! PATH=$$PATH:/usr/sbin command -v slurmctld slurmdbd >/dev/null 2>&1; then \
	  if [ -n "$(AS_ROOT)" ]; then \
	    echo "==> installing Slurm"; apt-get update -qq && $(APT_INSTALL) $(SLURM_PACKAGES); \
	  else \
	    echo "no Slurm here, and only root can install it: apt-get install $(SLURM_PACKAGES)"; \
	  fi; \
	fi

# Tests wait for processes as much as they compute: three of them at a time on two cores. Those on
# Slurm share one cluster, and those of a file its trainings (tests/conftest.py groups them).
WORKERS ?= 3
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadgroup
PKG ?=
TESTS := $(if $(PKG),tests/$(PKG),tests)

test: setup slurm-packages
	$(PYTEST) -m 'not slow and not gpu' $(TESTS)

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q -n 2 --dist loadgroup -m 'not process and not slurm and not slow and not gpu' $(TESTS)

test-all: setup slurm-packages
	$(PYTEST) $(if $(HAS_GPU),,-m 'not gpu') tests

# The newest release of every dependency, beyond the upper bounds too; of torch the tested one.
NEWEST := .venv-newest
test-newest: setup slurm-packages
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q "$(TORCH)"
	$(PY) tests/newest.py | $(NEWEST)/bin/python -m pip install -q -r /dev/stdin
	$(NEWEST)/bin/python -m pip install -q --no-deps -e .
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not slow and not gpu'

# Renews the tested versions: the newest that pyproject.toml allows, in an environment of its own.
lock: system
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q "$(TORCH)" -e '.[dev]'
	{ sed -n '/^#/p' $(LOCK); .venv-lock/bin/python -m pip freeze --exclude-editable \
	  | sed -E 's/\+(cpu|cu[0-9]+)$$//; /^(nvidia-|cuda-|triton)/d' | LC_ALL=C sort -f; } > $(LOCK).new
	mv $(LOCK).new $(LOCK)
	rm -rf .venv-lock

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m vulture
	$(PY) -m mkdocs build --strict --quiet

house: setup
	@$(PY) tests/house.py

docs: setup
	$(HPCFT) schema recipe --markdown > docs/reference/recipe.md
	$(HPCFT) schema cluster --markdown > docs/reference/cluster.md
	$(PY) docs/tables.py
	$(PY) docs/structure.py

site: setup
	$(PY) -m mkdocs build --strict
	@echo "==> open build/site/index.html"

slurm: setup slurm-packages
	$(PY) slurm/testbed/testbed.py start

slurm-stop:
	$(PY) slurm/testbed/testbed.py stop

clean:
	rm -rf $(VENV) $(NEWEST) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
