# make demo   set everything up and show what fusecache does
# make test   set everything up and pass the tests
# make bench  measure it on this machine; bench-read, bench-writes, bench-misses and bench-scale
#             are its parts
# See README.md for the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: demo test test-slow lint bench bench-read bench-writes bench-misses bench-scale clean system

# What a fresh Debian 12 lacks; only what is missing is installed.
system:
	@sh .ci/install-packages

$(VENV)/.installed: pyproject.toml .ci/install-packages | system
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/python docs/demo.py

test: $(VENV)/.installed
	$(BIN)/pytest

test-slow: $(VENV)/.installed
	$(BIN)/pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: bench-read bench-writes bench-misses bench-scale

bench-read: $(VENV)/.installed
	@$(BIN)/python benchmarks/reads.py

bench-writes: $(VENV)/.installed
	@$(BIN)/python benchmarks/writes.py

bench-misses: $(VENV)/.installed
	@$(BIN)/python benchmarks/misses.py

bench-scale: $(VENV)/.installed
	@$(BIN)/python benchmarks/scale.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
