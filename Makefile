# The two commands of the README are `make demo` and `make test`; both set up .venv first, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
EXTRAS := dev,docs,train,diffusion,quantized,gguf,tensorboard,serve,cluster,multimodal,agents
CODE   := src tests tools

# Nothing here needs a network once .venv exists, and tiny models are fastest on one thread.
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test lint types tests soak wheel format clean

help:
	@echo "make demo    set up $(VENV), run the main job, report in out/demo/"
	@echo "make test    set up $(VENV), then lint, types, tests and the wheel"
	@echo "make docs    set up $(VENV), build the documentation into out/site/"
	@echo "make soak    set up $(VENV), 10,000 requests over 1,000 adapters against the server, minutes"
	@echo "make lint | types | tests | wheel | format | clean"

setup: $(READY)

# Torch first and alone: its wheel decides between CPU and accelerator builds, and the rest must not change it.
$(READY): pyproject.toml constraints.txt lorry-pocket/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lorry needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]" -e ./lorry-pocket
	@touch $(READY)

demo: setup
	$(BIN)/lorry demo --out out/demo

# The variable keeps the theme from advertising its successor in every build.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

test: lint types tests wheel

lint: setup
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/python tools/check_layers.py
	$(BIN)/python tools/check_style.py

types: setup
	$(BIN)/mypy

tests: setup
	$(BIN)/python -m pytest -n 2

# Bounded in time: half an hour is several times what it takes on two quiet cores.
soak: setup
	PYTHONPATH=tests timeout 1800 $(BIN)/python -m serving.api.soak --requests 10000 --adapters 1000

# Without isolation, so that it needs no network: the build backend is among the development tools.
wheel: setup
	rm -rf dist build lorry-pocket/build
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(BIN)/python -m build --no-isolation --wheel --outdir dist lorry-pocket > /dev/null
	$(BIN)/python tools/check_wheel.py dist

format: setup
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info lorry-pocket/build \
		lorry-pocket/src/*.egg-info
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
