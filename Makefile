# The commands of CONTRIBUTING.md. PYTHON names the interpreter that a new .venv is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIECES := src/cif src/plora src/kd_losses src/adapters
STAMP := $(VENV)/.installed
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: install train test lint format bench test-real test-gpu test-slow test-decoders clean

# the embedded default: no network once installed, no GPU, a few minutes
train: install
	$(BIN)/blspkd train

# two workers of one thread each, so that two cores are full and none waits for the other
test: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m "not real and not gpu and not slow and not decoders"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks

test-real: install
	$(BIN)/python -m pytest -m real

test-gpu: install
	$(BIN)/python -m pytest -m gpu

test-slow: install
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow

# PLoRA in every class of transformers' causal-LM mapping: about two minutes on two cores
test-decoders: install
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m decoders tests/decoders

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

install: $(STAMP)

# torch goes first and by itself: resolved together with the rest, pip may pick a CUDA build.
$(STAMP): pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(PIECES))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev \
		$(addprefix --editable ./,$(PIECES)) --editable .
	touch $@
