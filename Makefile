# Two commands on a fresh machine: `make quickstart` trains and uses a small GMem, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := quickstart

.PHONY: quickstart test lint clean

# torch first: the other packages then take the pinned build instead of the newest
$(VENV)/%.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --constraint constraints.txt torch
	$(BIN)/python -m pip install -q --constraint constraints.txt --editable '.[$*]'
	@touch $@

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) $(QUICKSTART) build dist *.egg-info src/*.egg-info
