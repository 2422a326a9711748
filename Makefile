# make demo    sets up .venv, fetches a published model, and answers a prompt
# make test    sets up .venv with the test extra and runs every check

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# where this exact version is the build without CUDA it is the small one; any torch from 2.11 on serves
TORCH ?= torch==2.13.0
MODEL ?= smollm2-135m-instruct
PROMPT ?= Explain in two sentences why the sky is blue.
BIN := .venv/bin

# installs quietly: one line for each file that is fetched, and every error
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-input
BRIEF = sed -unE 's/^ *(Downloading|Using cached|Processing) ([^ ]*\/)?([^ ]+\.whl)( .*)?/    \3\4/p; s/^Installing collected.*/    unpacking .../p; /^ERROR/p'

.PHONY: help demo test reliability bench gates lint clean

help:
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 20

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@echo "[1/3] a virtual environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@touch $@

.venv/.torch: .venv/.python
	@echo "[2/3] $(TORCH) (about 200 MB without CUDA)"
	@$(INSTALL) "$(TORCH)" 2>&1 | $(BRIEF) || { echo "    not to be had; any torch from 2.11 on"; $(INSTALL) "torch>=2.11" 2>&1 | $(BRIEF); }
	@touch $@

.venv/.demo: .venv/.torch pyproject.toml
	@echo "[3/3] transept"
	@$(INSTALL) -e . 2>&1 | $(BRIEF)
	@touch $@

.venv/.test: .venv/.torch pyproject.toml
	@echo "[3/3] transept and what its tests need"
	@$(INSTALL) -e '.[test,hub]' 2>&1 | $(BRIEF)
	@touch $@ .venv/.demo

# compiled once, and again when its sources change; where there is no compiler the models run in torch
.venv/.native: .venv/.torch $(wildcard src/transept/native/core/*) | .venv/.demo
	@echo "the native core (about half a minute, once)"
	@$(BIN)/python -m transept.native.build > .venv/native.log 2>&1 || echo "    not compiled: $$(tail -n 1 .venv/native.log); models run in torch"
	@touch $@

# a headless Chromium for the playground's tests, once; where none can be had they are skipped and say so
CHROMIUM := chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable chrome
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install chromium-headless-shell
.venv/.browser: | .venv/.test
	@command -v $(CHROMIUM) > /dev/null || { \
	  echo "a headless Chromium for the playground's tests (about 60 MB, once)"; \
	  { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && { $(APT) || { apt-get -qq update && $(APT); }; } \
	    || timeout 120 $(BIN)/python -m playwright install chromium-headless-shell; } > .venv/browser.log 2>&1 \
	  || echo "    not to be had, so those tests are skipped (.venv/browser.log)"; }
	@touch $@

demo: .venv/.demo .venv/.native  ## fetch SmolLM2-135M-Instruct and let it answer a prompt
	@$(BIN)/transept pull $(MODEL) < /dev/null
	@$(BIN)/transept generate $(MODEL) "$(PROMPT)" --chat --max-tokens 64 --stats < /dev/null

test: .venv/.test .venv/.native .venv/.browser  ## run every check, long counts reduced to a tenth
	@$(BIN)/python -m pytest -q -n 2 --dist loadgroup < /dev/null

reliability: .venv/.test .venv/.native .venv/.browser  ## run the long checks at their full counts and write docs/reliability.md
	@TRANSEPT_FULL=1 $(BIN)/python tools/reliability.py < /dev/null

# llama.cpp is compiled for this machine, about ten minutes on two cores
.venv/.bench: .venv/.test
	@echo "the libraries that are measured beside ours"
	@CMAKE_ARGS=-DGGML_NATIVE=ON $(INSTALL) -e '.[bench]' 2>&1 | $(BRIEF)
	@touch $@

bench: .venv/.bench .venv/.native  ## measure against the peers on this machine and write docs/results.md
	@$(BIN)/python benchmarks/run.py < /dev/null

gates: .venv/.test  ## measure the source against its limits
	@$(BIN)/python tools/gates.py < /dev/null

lint: .venv/.test  ## ruff, types and import floors only
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright --level error
	@$(BIN)/lint-imports --no-cache

clean:  ## remove what was built here; downloads in the cache stay
	@rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info src/transept/native/*.so
	@find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
