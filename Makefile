# make train   train on the built-in motion capture and print the scores (ARGS="train.epochs=50" passes on)
# make test    run the tests, except the exhaustive ones, which take minutes each
# make test-all   run every test
# make bench   time everything beside the published formulation, print the tables, store and draw them
# make compiled   print what the Triton kernels compile to for GPUs that need not be there
#                 (TRITON="3.6.0 3.9.0" for other releases than the installed one)
# make gpu     check and time everything on a GPU, within nine minutes; needs torch, triton, numpy and einops only
#                 (ARGS="--help" says more)
# make clean   remove the virtual environment and everything that was built (runs/ stays)
#
# PYTHON chooses the interpreter that the virtual environment is made with: make PYTHON=python3.12 test

PYTHON ?= python3
ARGS ?=
TRITON ?=
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := train
.PHONY: train test test-all bench compiled gpu clean

train: $(VENV)/installed
	$(BIN)/trgnet train $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "not exhaustive" $(ARGS)

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/installed-test
	$(BIN)/python -m bench $(ARGS)

compiled: $(VENV)/installed
	@set -e; for release in $(TRITON); do \
	    $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/triton-$$release triton==$$release; \
	done
	@set -e; for release in $(or $(TRITON),installed); do \
	    PYTHONPATH=$(VENV)/triton-$$release $(BIN)/python -m bench.compiled $(ARGS); \
	done

# Without an installation: machines that are lent by the minute have torch already.
gpu:
	$(if $(wildcard $(VENV)/installed),$(BIN)/python,$(PYTHON)) -m bench.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "trgnet needs Python 3.10 or newer; this is " + sys.version.split()[0] + ". Choose another with: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "Could not create $(VENV) with '$(PYTHON) -m venv' (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }

# The stamps make installing a matter of changed metadata only: the package itself is installed in place.
$(VENV)/installed: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-test: $(SOURCES) | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@
