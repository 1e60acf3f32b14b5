# Each target makes .venv itself where it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
# Processes that run tests. Most tests wait for processes of their own, so more than there are cores wins little.
AT_ONCE ?= 2

.PHONY: setup demo test test-slow bench check fix clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup
	PYTHON="$(PYTHON)" scripts/setup $(VENV)
	@touch $@

demo: $(STAMP)
	$(BIN)/tunewright demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(AT_ONCE) --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout=3600

bench: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -W ignore -m bench

check: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
