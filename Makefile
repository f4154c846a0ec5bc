# make demo   set everything up and show what fusecache does
# make test   set everything up and pass the tests
# make bench  measure it on this machine, beside its peers and over a far origin; bench-compare,
#             bench-far, bench-read, bench-writes, bench-misses, bench-cold, bench-lane and
#             bench-scale are its parts
# make bench-quick   the first two of these in under two minutes
# make bench-replay TRACES="a.fct.xz b.csv"   block traces through the core
# See README.md for the rest.

PYTHON ?= python3
VENV ?= .venv
# Tests at a time: they wait for disks, daemons and clocks more than they compute.
WORKERS ?= 3
BIN := $(VENV)/bin
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: demo test test-slow lint clean system peers guests
.PHONY: bench bench-quick bench-compare bench-far bench-read bench-writes bench-misses bench-scale
.PHONY: bench-cold bench-lane bench-replay

# What a fresh Debian 12 lacks; only what is missing is installed.
system:
	@sh .ci/install-packages

$(VENV)/.installed: pyproject.toml .ci/install-packages $(wildcard fusecache/lane/*.[ch]) | system
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# What the benchmarks need besides.
peers:
	@sh benchmarks/install-packages

$(VENV)/.bench-installed: $(VENV)/.installed benchmarks/install-packages | peers
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,bench]'
	@touch $@

# What the tests with guests need besides.
guests:
	@sh .ci/install-guests

demo: $(VENV)/.installed
	@$(BIN)/python docs/demo.py

test: $(VENV)/.installed guests
	$(BIN)/pytest -n $(WORKERS) --dist worksteal
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --lane off tests/mount
	@if test -w /sys/module/fuse/parameters/enable_uring; then \
		$(BIN)/pytest -n $(WORKERS) --dist worksteal --queues tests/mount; \
	else echo "not run: the mount tests over FUSE's io_uring queues, which this kernel lacks"; fi

test-slow: $(VENV)/.installed guests
	@sh .ci/install-packages prometheus mmdebstrap libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients
	$(BIN)/pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	gcc -std=gnu11 -O2 -Wall -Wextra -Werror -fsyntax-only fusecache/lane/*.c \
		-I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')"

bench: bench-compare bench-far bench-read bench-writes bench-misses bench-cold bench-scale bench-lane

bench-quick: $(VENV)/.bench-installed
	@$(BIN)/python benchmarks/compare.py --quick
	@$(BIN)/python benchmarks/far.py --quick

bench-compare: $(VENV)/.bench-installed
	@$(BIN)/python benchmarks/compare.py

bench-far: $(VENV)/.bench-installed
	@$(BIN)/python benchmarks/far.py

bench-read: $(VENV)/.installed
	@$(BIN)/python benchmarks/reads.py

bench-writes: $(VENV)/.installed
	@$(BIN)/python benchmarks/writes.py

bench-misses: $(VENV)/.installed
	@$(BIN)/python benchmarks/misses.py

bench-cold: $(VENV)/.installed
	@$(BIN)/python benchmarks/cold.py

bench-lane: $(VENV)/.bench-installed
	@$(BIN)/python benchmarks/lane.py

bench-scale: $(VENV)/.bench-installed
	@$(BIN)/python benchmarks/scale.py

bench-replay: $(VENV)/.installed
	@test -n "$(TRACES)" || { echo "say which: make bench-replay TRACES='a.fct.xz b.csv'" >&2; exit 2; }
	@$(BIN)/python benchmarks/replay.py $(TRACES) --check

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
