# make demo   set everything up in .venv and run the main job on the embedded model
# make test   set everything up and pass every check and test
# PYTHON=...  choose the interpreter (3.11 to 3.13); by default the first of them that runs and can make a venv

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NAME ?= demo

# Spinning OpenMP threads on a busy machine were measured 90x slower; waiting must be passive.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# A caller's own paths must not decide what is imported in the environment made here.
unexport PYTHONPATH PYTHONHOME

usable = $(1) -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3 python,$(shell $(call usable,$(p)) && echo $(p))))

.PHONY: help setup demo reference test test-parity lint check gpu bench bench-kernels clean

help:
	@sed -n 's/^# //p' Makefile | head -3
	@echo "make lint   ruff; make check: lint, mypy, import rules; make gpu: tests on a CUDA device; make test-parity: rewards against their authors' packages; make bench, bench-kernels; make reference: pages of commands and settings; make clean"

setup: $(STAMP)
	@:

# Re-installed only when a requirement changes. The stamp is written last, so an interrupted set-up starts over.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
	  echo "error: no Python 3.11 to 3.13 with the venv module was found" >&2; \
	  echo "hint: install one (Debian, Ubuntu: python3.11-venv), or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.12" >&2; \
	  exit 4; \
	fi
	@if ! $(BIN)/python -c 'import pip' >/dev/null 2>&1; then \
	  $(call usable,$(PYTHON)) || { echo "error: $(PYTHON) is not a Python 3.11 to 3.13 with the venv module" >&2; exit 4; }; \
	  echo "Making $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "Installing pinned packages into $(VENV): some minutes the first time, PyTorch is large"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,tensorboard]'
	@touch $(STAMP)
	@echo "Ready: $(BIN)/craft-fast"

demo: setup
	@$(BIN)/craft-fast run --name $(NAME)

lint: setup
	@$(BIN)/ruff check .

check: lint
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache >$(VENV)/lint-imports.log 2>&1 || { cat $(VENV)/lint-imports.log; exit 1; }
	@tail -n 2 $(VENV)/lint-imports.log

# Two workers: most of the time goes into commands that the tests start. A file's tests stay together, for its fixtures.
test: check
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

# Against the packages of the reward models' authors, in environments of their own (about 6 GB each), and at full size.
# CRAFT_PARITY_TORCH=VERSION chooses their torch; CRAFT_PARITY_ENVS=DIR keeps them for the next time.
test-parity: setup
	@$(BIN)/python -m pytest -q -m parity tests/parity tests/unit/test_rewards_full_size.py

reference: setup
	@$(BIN)/python -m craft_cli.reference docs/reference

gpu: setup
	@$(BIN)/python -m pytest -q -m gpu

bench: setup
	@$(BIN)/python bench/method.py controls

bench-kernels: setup
	@$(BIN)/craft-fast bench kernels

clean:
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@echo "Removed builds and caches; $(VENV) and runs/ stay"
