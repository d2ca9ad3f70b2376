# make serve   a newcomer's first command; make help lists the others.
#
# VENV, PYTHON and TORCH_INDEX: see .ci/python. ARGS are passed on, as in: make serve ARGS="--port 9000".

VENV ?= .venv
MODEL ?= demo
MINUTES ?= 30
JOBS ?= 2
ARGS ?=
BIN := $(VENV)/bin
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
DEMO := $(VENV)/.fetched-demo
# Python without a .py for ruff to find it by.
SCRIPTS := .ci/audit .ci/chroot .ci/docs .ci/health .ci/lock .ci/sbom .ci/smoke .ci/wheel
export VENV

# The tests find promtool, and whatever else was put beside the interpreter.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install serve test lint format bench soak kills clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

$(RUN): pyproject.toml .ci/python .ci/lib.sh
	.ci/python run

$(DEV): pyproject.toml requirements-dev.lock .ci/python .ci/lib.sh
	.ci/python dev

# Only for its progress to be seen: serving `demo` fetches the model too, should the cache be gone.
$(DEMO): runtime/checkpoints/demo.py | $(RUN)
	$(BIN)/python -m runtime.checkpoints.demo
	@touch $@

install: $(RUN)  ## make the virtual environment and install Eft into it

serve: $(RUN) $(if $(filter demo,$(MODEL)),$(DEMO))  ## serve MODEL (default: demo) on 127.0.0.1:8000
	@$(BIN)/eft serve $(MODEL) $(ARGS)

test: $(DEV)  ## install what the tests need and run them, JOBS at once (ARGS="-k name" for some)
	@.ci/debian || true
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(DEV)  ## check style, types and the Dockerfile
	$(BIN)/ruff check . $(SCRIPTS)
	$(BIN)/ruff format --check . $(SCRIPTS)
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/hadolint Dockerfile

format: $(DEV)  ## rewrite the code in its style
	$(BIN)/ruff check --fix . $(SCRIPTS)
	$(BIN)/ruff format . $(SCRIPTS)

bench: $(DEV) $(DEMO)  ## compare with Hugging Face generate on this machine (ARGS="--repeats 1" is quick)
	$(BIN)/python -m benchmarks.compare $(ARGS)

soak: $(DEV)  ## load, abuse and train on one server for MINUTES, and look for what it leaks
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) $(ARGS)

kills: $(DEV)  ## kill servers at random, and check what they acknowledged (ARGS="--kills 200")
	$(BIN)/python -m tests.kills $(ARGS)

clean:  ## remove the virtual environment and the caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
