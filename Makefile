PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIECES := src/cif src/plora src/kd_losses src/adapters
STAMP := $(VENV)/.installed

# torch goes first and by itself: resolved together with the rest, pip may pick a CUDA build.
$(STAMP): pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(PIECES))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev \
		$(addprefix --editable ./,$(PIECES)) --editable .
	touch $(STAMP)

.PHONY: install train test lint format bench test-real test-gpu test-slow clean
install: $(STAMP)

train: install
	$(BIN)/blspkd train

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest -n 2 -m "not real and not gpu and not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

test-real: install
	$(BIN)/python -m pytest -m real

test-gpu: install
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
