# Everything a newcomer needs: `make search` runs the demonstration, `make test` the tests.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# One process more than cores, as many tests wait, five at most: each has a Postgres server of its own.
PYTEST := $(BIN)/pytest --numprocesses $(shell cores=$$(nproc); echo $$((cores < 4 ? cores + 1 : 5))) --dist worksteal

.PHONY: search test test-slow check format clean

search: $(INSTALLED)
	@$(BIN)/studies demo-data --config demo --in-use >/dev/null
	$(BIN)/launch-workers --config demo --cpus 2
	$(BIN)/promote --config demo
	$(BIN)/studies forecast --config demo

test: $(INSTALLED)
	$(PYTEST)

# What takes a compiler or more than ten seconds: most whole runs of several processes.
test-slow: $(INSTALLED)
	$(PYTEST) -m slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(PYTEST)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp comes last: an install that broke off is begun again.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "making a virtual environment in .venv"
	@$(PYTHON) -m venv .venv
	@echo "installing torch, which is most of the download"
	@$(PIP) torch
	@echo "installing the other packages and this one"
	@$(PIP) -e '.[dev]'
	@touch $@

# Ends the demonstration's server and removes what it left.
clean: $(INSTALLED)
	$(BIN)/studies stop --config demo
	rm -rf .demo
