# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or 3.12.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The first Python of a version that setup.py admits; `make PYTHON=/path/to/python test` chooses another.
PYTHON ?= $(shell for python in python3 python3.11 python3.12; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo "$$python" && break; \
	done)

# The launcher starts the Python that it finds on the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test evidence lint install torch-scatter clean

demo: install
	$(BIN)/deepspeed recipes/promoe_dit.py

test: install
	$(BIN)/pytest tests

# The longer runs behind the README's numbers.
evidence: install
	$(BIN)/pytest tests -m evidence

lint: install
	$(BIN)/ruff check .

install: $(INSTALLED)

# ccexam holds the digit classifier that judges what the demo draws. Without its dependencies, because torchvision would
# replace torch; only its weights are read.
$(INSTALLED): requirements.txt setup.py pyproject.toml Makefile $(wildcard kernels/csrc/*)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found: install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps ccexam==1.0.0
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	touch $@

# Optional, minutes of compilation. Not from pip's cache: a build fits the one torch that it was compiled beside.
torch-scatter: install
	$(BIN)/python -m pip install --no-build-isolation --no-cache-dir torch-scatter==2.1.2

# Leaves runs/ alone: those are results.
clean:
	rm -rf $(VENV) kernels/_native*.so build dist gatewright.egg-info .ruff_cache .hypothesis tests/.hypothesis tests/.pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
