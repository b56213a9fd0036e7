# A fresh machine needs Python >= 3.10, a C++ compiler and make; `make demo` and `make test` install the rest.
PYTHON ?= python3
DALI ?= nvidia-dali-cuda120
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
# Two workers with one thread each; a file stays on one worker, so its module fixtures are made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
SOURCES := $(wildcard kernels/stpp_kernels/csrc/*)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-camvid test test-slow test-gpu wheel gpu-wheels triton-3.6 readers bench fmt check clean

help:  ## this list
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed  ## make .venv and install everything into it

demo: setup  ## draw a synthetic data set and run ST++ on it (runs/demo)
	$(BIN)/stpp demo --out runs/demo --seed 0

demo-camvid: setup  ## ST++ and its control on real street scenes: make demo-camvid DATA=FOLDER (runs/camvid)
	$(BIN)/stpp train --recipe camvid_stpp --data.root "$(DATA)" --out runs/camvid --control

test: setup  ## the quick tests
	$(PYTEST) -m "not slow and not gpu"

test-slow: setup  ## the slow tests
	$(PYTEST) -m "slow and not gpu"

test-gpu: setup  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu -q

# For any x86-64 processor with AVX2, and faster on one with AVX-512; another machine runs the operators in plain PyTorch.
wheel: setup  ## a wheel for this version of Python and of torch (dist)
	rm -rf build/lib* build/bdist* build/temp*  # old modules would be packed too
	STPP_MARCH="$(or $(STPP_MARCH),x86-64-v3 x86-64-v4)" $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# tyro and its dependencies, for Python 3.12, which machines with PyTorch are likely to lack. docs/gpu.md.
gpu-wheels:  ## pure Python packages to carry to a GPU machine without a network (build/gpu-wheels)
	rm -rf build/gpu-wheels
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
	    --dest build/gpu-wheels $(shell grep -oE '^(tyro|braceexpand)==[0-9.]*' requirements.txt) docstring-parser==0.18.0 typeguard==4.6.1

triton-3.6: build/triton-3.6.0/triton  ## Triton of torch 2.11, for slow tests that compile the CUDA kernels
build/triton-3.6.0/triton: | setup
	$(BIN)/python -m pip install --quiet --no-deps --target build/triton-3.6.0 triton==3.6.0

# Datumaro needs older versions of packages that are installed here, so the readers have their own environment.
readers: build/readers/.installed  ## the annotation tools' own readers, for slow tests of exports
build/readers/.installed: | setup
	$(BIN)/python -m venv build/readers
	build/readers/bin/python -m pip install --quiet datumaro==1.13.12
	build/readers/bin/python -m pip install --quiet --no-deps label-studio-converter==0.0.59
	@touch $@

bench: setup  ## the quick benchmarks, about 20 minutes on two cores (benchmarks/results/last.jsonl)
	rm -f benchmarks/results/last/*.jsonl
	for bench in data loss "label --images 6" "step --rounds 5"; do set -- $$bench; name=$$1; shift; \
	    PYTHONPATH=benchmarks $(BIN)/python benchmarks/bench_$$name.py $$@ --out benchmarks/results/last/$$name.jsonl || exit 1; done
	cat benchmarks/results/last/*.jsonl > benchmarks/results/last.jsonl

fmt: setup  ## format and sort imports
	$(BIN)/ruff check --fix --quiet .

check: setup  ## lint
	$(BIN)/ruff check .

clean:  ## remove build outputs, keep runs
	rm -rf $(VENV) build *.egg-info engine/*.egg-info kernels/stpp_kernels/*.so

# torch is pinned and installed first: the C++ operators are compiled against it, and another torch brings its own
# CUDA.
$(VENV)/.torch-$(TORCH)-$(DALI): Makefile requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -m pip uninstall --quiet --yes nvidia-dali-cuda120 nvidia-dali-cuda130 2>/dev/null
	rm -f $(VENV)/.torch-*
	$(BIN)/python -m pip install --quiet torch==$(TORCH) -r requirements.txt $(if $(DALI),$(DALI)==2.4.0)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch-$(TORCH)-$(DALI) pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@
