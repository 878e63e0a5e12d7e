# Set up, train, test. 'make' alone lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
TORCH  := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)

PYTEST := $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal
ROUNDS ?= 20

.DEFAULT_GOAL := help
.PHONY: help install setup train test slow fuzz lint types imports format check clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## */  make \1\t/p' Makefile | expand -t 18

install: $(STAMP)  ## .venv with everything, at the versions of constraints.txt

# torch and numpy come first: a package that asks for "any torch" must find this one.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) numpy
	$(PIP) -e '.[recipes,text,dev]'
	touch $@

setup: $(STAMP)  ## for developers: install, and the checks that git runs before each commit
	$(BIN)/pre-commit install

train: $(STAMP)  ## distil a small network on the digits over two devices, to see it work
	$(BIN)/pipestill train soft-target --devices 2

test: $(STAMP)  ## the tests, on all cores; those marked slow are left out
	$(PYTEST) -m 'not slow'

slow: $(STAMP)  ## the tests marked slow
	$(PYTEST) -m slow

fuzz: $(STAMP)  ## the property tests on new random examples, ROUNDS times over (20)
	for round in $$(seq $(ROUNDS)); do $(BIN)/pytest -q -m hypothesis --hypothesis-profile fuzz || exit; done

lint: $(STAMP)  ## ruff: likely bugs, style, layout
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)  ## mypy, strict, of the package and the benchmarks
	$(BIN)/mypy

imports: $(STAMP)  ## import-linter: the arrows between modules
	$(BIN)/lint-imports --no-logo

check: lint types imports test slow  ## all five; what CI runs

format: $(STAMP)  ## mend what ruff can mend, and lay the code out
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove caches and builds; keeps .venv and runs/
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
