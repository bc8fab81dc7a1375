# Everything fusedopt does from a fresh clone; `make help` lists it. Needs Python >= 3.10, g++ and make.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# The torch to install where PYTHON has none. For a smaller download on a machine without a GPU:
#   make test TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0
# GPU architectures that a checkout is built for; `pip install .` builds for all.
export FUSEDOPT_CUDA_ARCHS ?= $(if $(filter gpu gpu-%,$(MAKECMDGOALS)),native,few)
# Folders for what a run leaves: tables, JSON, pictures.
OUT ?= $(if $(filter gpu gpu-%,$(MAKECMDGOALS)),gpu-out,out)
# Processes of the test run.
WORKERS ?= 2
PYTEST_ARGS ?=
# Such as: --only adam, --list.
MUTATE_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# The environment is made anew exactly when what defines it changes.
KEY := $(shell cat pyproject.toml build_support/environment.py <(echo '$(TORCH)') | sha256sum | cut -c1-12)
READY := $(VENV)/.ready-$(KEY)

.PHONY: help env build lint test bench gate gpu gpu-build gpu-first gpu-tests gpu-bench gpu-phase gpu-sanitizer conformance sanitize soak mutate test-stacks test-install format clean distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "  make %-13s %s\n", $$1, $$2}'
	@echo "  variables: PYTHON=$(PYTHON) TORCH='$(TORCH)' OUT=$(OUT) WORKERS=$(WORKERS) PYTEST_ARGS='$(PYTEST_ARGS)' MUTATE_ARGS='$(MUTATE_ARGS)'"
	@echo "  build variables: FUSEDOPT_CUDA=auto|0|1 FUSEDOPT_CUDA_ARCHS='80;90+ptx'|few|native FUSEDOPT_EXTENSION=auto|0|1 FUSEDOPT_QUICK=0|1 MAX_JOBS CXX CUDA_HOME"

$(READY):
	@$(PYTHON) build_support/environment.py $(VENV) "$(TORCH)"
	@rm -f $(VENV)/.ready-*
	@touch $@

env: $(READY) ## the virtual environment .venv, with torch, tools and fusedopt

build: $(READY) ## compile what changed, into the checkout
	@$(PY) -m build_support

lint: $(READY) ## ruff, clang-format, mypy, import direction
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | sort | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(READY) ## rewrite sources as `make lint` wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | sort | xargs $(VENV)/bin/clang-format -i

test: build lint ## environment, build, lint, types, tests
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow" --ignore tests/stacks $(PYTEST_ARGS)

bench: build ## environment, build, benchmark against torch.optim, char-LM training, pictures in OUT
	@mkdir -p $(OUT)
	$(PY) -m bench --out $(OUT)
	$(PY) examples/train_charlm.py --out $(OUT)/charlm

gate: build ## about a minute: is fusedopt still as much faster than torch fused as it should be?
	$(PY) -m bench gate

# What needs a GPU, offline: nothing is installed. PYTHON must have torch, triton, numpy; ninja and pybind11 to build; pytest
# and hypothesis to test (torch's own optimizer cases need expecttest, and are skipped without it); rich, matplotlib and
# jinja2 to measure. The parts go on when one before fails, and each is a target: `make gpu-first gpu-bench`. Each
# command stays under 10 minutes: what takes longer is interrupted as by Ctrl-C, on which pytest writes its summary and
# XML, and the benchmark keeps the cases it has. So all may take 40 minutes; it has not been timed on a GPU. With
# pytest-xdist the tests run in GPU_WORKERS processes; measurements have the GPU to themselves.
#   make gpu GPU_PARTS="build first"
#   make gpu-tests PYTEST_ARGS=tests/test_norm.py
#   make gpu-bench BENCH_ARGS="--suite models --peer torch-fused fusedopt-cuda"
GPU_PARTS ?= build first tests bench phase sanitizer
GPU_WORKERS ?= 8
BENCH_ARGS ?=
PHASE_ARGS ?= --workload gpt2-124m
UNTIL := timeout -s INT -k 20
GPU_TESTS = $(PYTHON) -m pytest -m "gpu and not slow" --junitxml=$(OUT)/$@.xml
GPU_SPREAD = $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && printf -- '-n %s --dist worksteal' $(GPU_WORKERS))

gpu: ## on a machine with a GPU: build for it, GPU tests, GPU benchmark, results in OUT; in parts: gpu-build, gpu-tests, ...
	@status=0; \
	for part in $(GPU_PARTS); do \
	  $(MAKE) --no-print-directory gpu-$$part || status=1; \
	  if [ $$part = build ] && [ $$status = 1 ]; then break; fi; \
	done; \
	exit $$status

gpu-build:
	FUSEDOPT_EXTENSION=1 FUSEDOPT_CUDA=1 $(UNTIL) 560 $(PYTHON) -m build_support

# Large tensors, graphs, streams: in one process, so that each has the GPU's memory.
gpu-first:
	@mkdir -p $(OUT)
	$(UNTIL) 540 $(GPU_TESTS) tests/test_gpu.py -k "not compute_sanitizer" $(PYTEST_ARGS)

gpu-tests:
	@mkdir -p $(OUT)
	$(UNTIL) 540 $(GPU_TESTS) $(GPU_SPREAD) --ignore tests/stacks --ignore tests/test_gpu.py $(PYTEST_ARGS)

gpu-bench:
	$(UNTIL) 560 $(PYTHON) -m bench --device cuda --out $(OUT) $(BENCH_ARGS)

gpu-phase:
	$(UNTIL) 270 $(PYTHON) -m bench.phase --device cuda --out $(OUT)/phase.jsonl $(PHASE_ARGS)
	$(UNTIL) 270 $(PYTHON) -m bench.phase --device cuda --out $(OUT)/phase.jsonl $(PHASE_ARGS) --keep-gradients

# Where compute-sanitizer is; skipped where it is not.
gpu-sanitizer:
	@mkdir -p $(OUT)
	$(UNTIL) 570 $(GPU_TESTS) tests/test_gpu.py -k compute_sanitizer $(PYTEST_ARGS)

# A copy of the tree, so that the sanitized extension does not replace the ordinary one.
SANITIZED := build/sanitized
SANITIZE_TESTS ?= tests
sanitize: $(READY) ## the tests under address and undefined-behaviour sanitizers
	@mkdir -p $(SANITIZED)
	@find $(SANITIZED) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	@tar -c --exclude='./.*' --exclude=./build --exclude=./out --exclude='_C*.so' . | tar -x -C $(SANITIZED)
	cd $(SANITIZED) && FUSEDOPT_SANITIZE=address,undefined FUSEDOPT_QUICK=1 FUSEDOPT_EXTENSION=1 FUSEDOPT_CUDA=0 ../../$(PY) -m build_support
	cd $(SANITIZED) && LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  ../../$(PY) -m pytest -m "not slow and not gpu" --ignore tests/stacks $(SANITIZE_TESTS) $(PYTEST_ARGS)

conformance: build ## write docs/conformance.md from what runs here
	TRITON_INTERPRET=1 $(PY) -m tests.contract.page

soak: build ## the long tests, and 100,000 steps whose drift goes to docs/soak.md
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m slow $(PYTEST_ARGS)
	$(PY) -m tests.soak

mutate: build ## plant faults in the kernels; every one must be caught
	$(PY) -m tests.mutate $(MUTATE_ARGS)

test-stacks: build ## the training stacks people use, with fusedopt in them
	$(PY) -m pip install --quiet --no-build-isolation --constraint <($(PY) -m pip freeze | grep '^torch==') --editable '.[stacks]'
	$(PY) -m pytest tests/stacks $(PYTEST_ARGS)

test-install: unexport FUSEDOPT_CUDA_ARCHS
test-install: $(READY) ## the install matrix: without nvcc, g++, headers; sdist, wheel, editable; every Python at hand
	$(PY) -m build_support.try_installs

clean: ## remove what builds and runs left, except the environment
	rm -rf build dist *.egg-info fusedopt/_C*.so fusedopt/_build_info.json fusedopt/triton_kernels
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache gpu-out out
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV)
