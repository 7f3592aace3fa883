# `make help` lists the targets. Everything lands in .venv and .tox; `make clean` removes both.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# When one of these is newer than the installed package, `make demo` installs again.
SOURCES := $(shell find hypervisor agent plugins -type f -not -name '*.pyc') setup.cfg pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help test demo clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

test: $(VENV)/.tox-installed  ## run every check and test (tox)
	$(BIN)/tox run $(TOXARGS)

demo: $(VENV)/.reeve-installed  ## an AMQP instruction boots Debian's own kernel, step by step
	$(BIN)/python tools/demo.py $(DEMOARGS)

clean:  ## remove virtual environments and build results
	rm -rf $(VENV) .tox build dist reeve.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(wildcard hypervisor agent plugins tests tools bench) -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Reeve needs Python 3.11 or newer; $(PYTHON) is older: give one, make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tox-installed: $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check 'tox>=4.11,<5'
	@touch $@

$(VENV)/.reeve-installed: $(VENV)/bin/pip $(SOURCES)
	rm -rf build
	$(BIN)/pip install --quiet --disable-pip-version-check .
	@touch $@
