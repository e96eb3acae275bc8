# Everything that a fresh machine needs (Debian/Ubuntu, Python 3.10+ with venv, no GPU): `make pretrain` or `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Which torch and DALI are installed: cuda13, or cuda12 for a V100 or an older driver (docs/versions.md); both run without a GPU,
# too. Later calls keep what was chosen.
CUDA ?= $(or $(patsubst $(VENV)/installed-%,%,$(wildcard $(VENV)/installed-cuda1[23])),cuda13)

.PHONY: pretrain test test-long test-all coverage check docs bench-gpu install

pretrain: install  ## the quickstart: generates small images, pretrains on them, shows what was learned
	$(BIN)/python launch/pretrain.py --deepspeed_config ds_configs/quickstart.json

test: install  ## the tests, Triton kernels interpreted; where there is a GPU, then those that need one, with compiled kernels
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	test ! -e /dev/nvidiactl || $(BIN)/python -m pytest -m gpu

test-long: install  ## whole launches and other long tests, which run before a change lands; one trains for two minutes and must learn
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'long and not slow'

test-all: install  ## with every combination of ranks, backend, optimizer and model, runs killed twenty times, and all optional packages (more than an hour on two cores)
	$(BIN)/python -m pip install --quiet --editable '.[test-all]'
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ''

coverage: install  ## the tests, with a floor under the share of lines in engine/ and models/ that they run
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered

check: install  ## lint, format, types, import directions, and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --quiet

docs: install  ## the documentation, at http://127.0.0.1:8000
	$(BIN)/mkdocs serve

# `make bench-gpu PART=1 OUT=DIR VENV= PYTHON=python3` installs nothing and needs no network; PART=2 is the other half.
bench-gpu: $(if $(VENV),install)  ## on a machine with an NVIDIA GPU: its tests and every stage, in two parts of 9 minutes
	$(if $(VENV),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(if $(PART),--part $(PART)) $(if $(OUT),--out $(OUT))

install: $(VENV)/installed-$(CUDA)

# Libraries of two CUDAs are the same files (DALI's, cuDNN's, NCCL's), and those of the other CUDA go first: written over and still
# installed to pip, they would be what torch gets when it goes back.
OTHER = $(if $(filter %12,$@),13,12)
$(VENV)/installed-cuda12 $(VENV)/installed-cuda13: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	rm -f $(VENV)/installed-*
	$(BIN)/python -m pip freeze | grep -oE '^nvidia-.*-cu(da)?$(OTHER)0?' | xargs -r $(BIN)/python -m pip uninstall --quiet --yes
	$(BIN)/python -m pip install --quiet --editable '.[$(@:$(VENV)/installed-%=%),test,dev]'
	touch $@
