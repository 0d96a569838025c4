# Everyday commands. `make demo` and `make test` build .venv themselves on first use.
#
#   make test PYTHON=python3.12     the interpreter that a missing .venv is made with
#   make test-gpu PY=python3        no venv: use an interpreter that already has torch (also: VENV=)

PYTHON ?= python3
VENV ?= .venv

ifeq ($(strip $(VENV)),)
PY ?= $(PYTHON)
endif
ifdef PY
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo test test-slow test-gpu bench bench-paper bench-gpu lint venv clean

demo: $(READY)
	$(PY) -m cli demo -o demo-out
	@echo "The demo's video, contact sheet and report lie in demo-out/:"
	@ls -1 demo-out

test: lint
	$(PY) -m pytest

test-slow: $(READY)
	$(PY) -m pytest -m slow

test-gpu: $(READY)
	$(PY) -m pytest -m gpu

bench: $(READY)
	$(PY) -m tests.bench

# The paper's geometry, size and window on a CPU, two layers of it: some ten minutes on its own.
bench-paper: $(READY)
	$(PY) -m tests.bench --only longlive-1.3b

bench-gpu: $(READY)
	$(PY) -m tests.bench --suite gpu

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --quiet .
	$(PY) -m mypy

venv: $(READY)

# torch goes first, alone: an unpinned torch that another package asks for would be gigabytes in vain.
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(VENV)/bin/pip || $(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "ispa-deploy needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt torch
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf demo-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
