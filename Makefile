# Everything that a fresh machine needs (Debian/Ubuntu, Python 3.10+ with venv, no GPU): `make pretrain` or `make test`.
PYTHON ?= python3
CUDA ?= cuda13  # whose DALI is installed: cuda13 or cuda12; both run without a GPU, too
BIN := .venv/bin

.PHONY: pretrain test test-all check bench-gpu install

pretrain: install  ## the quickstart: generates small images, pretrains on them, shows what was learned
	$(BIN)/python launch/pretrain.py --deepspeed_config ds_configs/quickstart.json

test: install  ## the tests
	$(BIN)/python -m pytest

test-all: install  ## with every combination of ranks, backend, optimizer and model (half an hour on two cores)
	$(BIN)/python -m pytest -m ''

check: install  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench-gpu: install  ## on a machine with an NVIDIA GPU: its tests, then its benchmarks into benchmarks/results
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks decode augment data transfer batchformer heads optimizer step --out benchmarks/results

install: .venv/installed

.venv/installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(strip $(CUDA)),test,dev]'
	touch $@
