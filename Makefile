# Everything that a fresh machine needs (Debian/Ubuntu, Python 3.10+ with venv, no GPU): `make pretrain` or `make test`.
PYTHON ?= python3
CUDA ?= cuda13  # whose DALI is installed: cuda13 or cuda12; both run without a GPU, too
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: pretrain test test-all coverage check docs bench-gpu install

pretrain: install  ## the quickstart: generates small images, pretrains on them, shows what was learned
	$(BIN)/python launch/pretrain.py --deepspeed_config ds_configs/quickstart.json

test: install  ## the tests, Triton kernels interpreted; where there is a GPU, then those that need one, with compiled kernels
	$(BIN)/python -m pytest -n 2 --dist loadgroup
	test ! -e /dev/nvidiactl || $(BIN)/python -m pytest -m gpu

test-all: install  ## with every combination of ranks, backend, optimizer and model, and runs killed twenty times (more than an hour on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m ''

coverage: install  ## the tests, with a floor under the share of lines in engine/ and models/ that they run
	$(BIN)/python -m pytest -n 2 --dist loadgroup --cov --cov-report=term:skip-covered

check: install  ## lint, format, types, import directions, and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --quiet

docs: install  ## the documentation, at http://127.0.0.1:8000
	$(BIN)/mkdocs serve

# `make bench-gpu VENV= PYTHON=python3` installs nothing and needs no network: with the packages that PYTHON has.
bench-gpu: $(if $(VENV),install)  ## on a machine with an NVIDIA GPU: its tests, then every stage, in 8 minutes
	$(if $(VENV),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu

install: $(VENV)/installed

$(VENV)/installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(strip $(CUDA)),test,dev]'
	touch $@
