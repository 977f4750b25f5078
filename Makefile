# make demo   installs into .venv and runs the two short guarded trainings
# make test   installs into .venv and runs the test suite
# make test-trl-oldest   the TRL tests on the oldest TRL that the extra allows, in an environment of its own
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO_ARGS ?=
TEST_ARGS ?=

TRL_OLDEST := $(shell sed -n 's/.*"trl>=\([0-9.]*\),.*/\1/p' pyproject.toml)
OLDEST     := .venv-trl-$(TRL_OLDEST)

# Two workers with one thread each: small networks are slower with more.
test test-slow test-trl-oldest bench: export OMP_NUM_THREADS := 1

.PHONY: demo test test-slow test-trl-oldest lint bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/guardrails demo $(DEMO_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TEST_ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow $(TEST_ARGS)

# TRL of that age imports requests without asking for it.
$(OLDEST)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v '^trl==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt \
		--editable '.[dev]' 'trl==$(TRL_OLDEST)' requests
	touch $@

test-trl-oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest tests/trl tests/transformers/test_transformers_trl.py -n 2 --dist worksteal $(TEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/overhead.py

clean:
	rm -rf $(VENV) .venv-trl-* build dist runs
