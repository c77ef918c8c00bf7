# hbmgym: `make` lists the targets. The environment in $(VENV) is made, and brought up to date, by the targets themselves.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=

PIP_INSTALL = "$(VENV)/bin/python" -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e
RUN = "$(VENV)/bin/python"

.PHONY: help train test lint bench soak gpu-check
.DEFAULT_GOAL := help

help:
	@echo 'make train   train a controller     ARGS="..." goes to train/ppo.py (ARGS=--help lists its flags)'
	@echo 'make test    run the tests          ARGS="..." goes to pytest'
	@echo 'make lint    ruff and mypy'
	@echo 'make bench   measure the speed      ARGS="..." goes to eval/bench.py'
	@echo 'make soak    a million random operations on the allocator      ARGS="..." goes to tests/soak.py'
	@echo 'make gpu-check   what the GPU does and what moving memory costs   ARGS="..." goes to eval/gpu_check.py'
	@echo 'Settings: PYTHON ($(PYTHON), >= 3.11), VENV ($(VENV)), PIP_ARGS (for pip install, e.g. an index of CPU wheels)'

train: $(VENV)/.installed
	$(RUN) train/ppo.py $(ARGS)

bench: $(VENV)/.installed
	$(RUN) eval/bench.py $(ARGS)

soak: $(VENV)/.installed
	$(RUN) tests/soak.py $(ARGS)

gpu-check: $(VENV)/.dev
	$(RUN) eval/gpu_check.py $(ARGS)

test: $(VENV)/.dev
	$(RUN) -m pytest -n 2 $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy -p hbmgym

$(VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'hbmgym needs Python >= 3.11 and $(PYTHON) is not: set PYTHON=/path/to/python3.11' >&2; exit 2; }
	"$(PYTHON)" -m venv "$(VENV)"
	$(PIP_INSTALL) .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP_INSTALL) '.[dev]'
	@touch $@
