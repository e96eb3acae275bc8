# Everything that a fresh machine needs (Debian/Ubuntu, Python 3.10+ with venv, no GPU): `make pretrain` or `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: pretrain test check install

pretrain: install  ## the quickstart: generates small images, pretrains on them, shows what was learned
	$(BIN)/python launch/pretrain.py --deepspeed_config ds_configs/quickstart.json

test: install  ## the tests
	$(BIN)/python -m pytest

check: install  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

install: .venv/installed

.venv/installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	touch $@
