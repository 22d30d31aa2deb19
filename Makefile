# Two commands: `make demo` and `make test`. Both create .venv, install the package and do everything else.
# `make test-all` adds the tests that are marked as slow.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# FAISS: the GPU build where an NVIDIA GPU answers, the CPU build elsewhere. They are exclusive.
FAISS ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo faiss-gpu || echo faiss-cpu)
# Without a GPU the CPU build of torch, where pip's index offers one, is a tenth of the download: set e.g.
# PIP_EXTRA_INDEX_URL before calling make.
PIP = $(BIN)/python -m pip --disable-pip-version-check
# One process per core, at most four; `make test JOBS=1` for one after the other in a single process.
JOBS ?= logical
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all test-slow test-oldest lint docs install install-dev results benchmarks clean

demo: install
	$(BIN)/traj-ood bench fashion --quick --out demo
	$(BIN)/traj-ood report demo
	@echo "Per-image scores, the JSON and the plots are in demo/fashion--fashion-mae--seed0, the report is demo/report.html"

# mypy has one thread: beside the tests, it takes half of its time.
test: install-dev
	@$(MAKE) --no-print-directory lint & lint=$$!; $(PYTEST) --quick; tests=$$?; wait $$lint && exit $$tests

test-all: lint
	$(PYTEST)

# What test-all adds to test.
test-slow: install-dev
	$(PYTEST) -m slow

# With the lowest versions that pyproject.toml admits, and the lowest Python, which has to be there.
test-oldest: VENV = .venv-oldest
test-oldest: PYTHON = python3.10
test-oldest:
	PIP_CONSTRAINT=tests/oldest.txt $(MAKE) --no-print-directory install-dev VENV=$(VENV) PYTHON=$(PYTHON)
	$(PYTEST) --quick

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --progress-bar off -e '.[$(FAISS)]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --progress-bar off -e '.[$(FAISS),dev]'
	@touch $@ $(VENV)/.installed

# The documentation as a site in site/, without a network.
docs: install-dev
	$(PIP) install --progress-bar off -e '.[docs]'
	$(BIN)/mkdocs build --strict

# The recorded protocol of results/: 2,000 attractors, whole test splits, three seeds of the attractor sample.
results: install
	for seed in 0 1 2; do $(BIN)/traj-ood bench fashion --seed $$seed --out results/paper --quiet --no-plots || exit 1; done
	$(BIN)/traj-ood leaderboard results/paper --diagnostics textures,photos,noise --csv results/paper/leaderboard.csv --readme docs/results.md

# Every figure of docs/performance.md beside the recorded one, on an idle machine; fails on a loss of more than 15 %.
benchmarks: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py

clean:
	rm -rf $(VENV) demo runs build site *.egg-info
