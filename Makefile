# hbmgym: `make` lists the targets. The environment in $(VENV) is made, and brought up to date, by the targets themselves.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=

LEAST = $(VENV)-minimums
PIP_INSTALL = "$(@D)/bin/python" -m pip install --disable-pip-version-check $(PIP_ARGS) -e
RUN = "$(VENV)/bin/python"

.PHONY: help train test test-install test-minimums lint bench soak gpu-check
.DEFAULT_GOAL := help

help:
	@echo 'make train   train a controller     ARGS="..." goes to train/ppo.py (ARGS=--help lists its flags)'
	@echo 'make test    run the tests          ARGS="..." goes to pytest'
	@echo 'make test-install    install the last commit in every way, and use it'
	@echo 'make test-minimums   run everything once with the least versions that pyproject.toml names (Python 3.11)'
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
	$(RUN) -m pytest -n 2 -m 'not install' $(ARGS)

test-install: $(VENV)/.dev
	$(RUN) -m pytest -n 2 -m install $(ARGS) tests/test_installs.py

test-minimums: $(LEAST)/.installed
	"$(LEAST)/bin/python" tests/smoke.py

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy -p hbmgym

$(VENV)/.installed: pyproject.toml constraints.txt
	$(NEW_VENV)
	$(PIP_INSTALL) . -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP_INSTALL) '.[dev]' -c constraints.txt
	@touch $@

$(LEAST)/.installed: pyproject.toml minimums.txt
	$(NEW_VENV)
	$(PIP_INSTALL) '.[tune,zst]' -c minimums.txt
	@touch $@

define NEW_VENV
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo 'hbmgym needs Python >= 3.11 and $(PYTHON) is not: set PYTHON=/path/to/python3.11' >&2; exit 2; }
"$(PYTHON)" -m venv "$(@D)"
endef
