# Every target sets up what it needs in .venv, once; `make serve` and `make test` are all you need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

POOL := models/pools/default

.PHONY: bench-routing pool-router setup serve test test-ops test-fast check bench pool-cascade clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(STAMP)

serve: $(STAMP)
	$(BIN)/shoal serve

test: $(STAMP)
	$(BIN)/python -m pytest

# Operations against the real thing: Prometheus, Chromium, Helm. What is not installed is skipped.
test-ops: $(STAMP)
	$(BIN)/python -m pytest $(wildcard tests/ops tests/helm tests/router/dashboard)

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow and not ray'

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m tests.bench

# Tables and plots of the routers; ENCODER=neural:FOLDER measures a sentence encoder instead.
bench-routing: $(STAMP)
	$(BIN)/python -m tests.bench.routing_tables --encoder $(or $(ENCODER),ngrams)

# Retrains the default pool's router on its outcomes, and measures it on the held-out ones.
pool-router: $(STAMP)
	$(BIN)/shoal train router $(POOL)/outcomes.jsonl --split router --bits 15 --out $(POOL)/router.npz
	$(BIN)/shoal evaluate router $(POOL)/router.npz $(POOL)/outcomes.jsonl --split test

# Relearns the default pool's cascade and fusion weights, measures every policy, writes both.
pool-cascade: $(STAMP)
	$(BIN)/python -m tests.bench.frontier --pool $(POOL) --install

clean:
	rm -rf $(VENV) build *.egg-info
