# make demo          train, convert and compile the digits network; print the result table and write the report
# make test          run every test that needs no GPU, but for the slow ones (those as well: PYTEST_ARGS='-m "not gpu"')
# make lint          ruff and mypy
# make benchmark     measure snncompile against its peers, quickly; BENCHMARK_ARGS chooses otherwise
# make frameworks    judge every class of the peers anew and write docs/frameworks.md
# make clean         remove the environment, builds and caches
#
# Everything is installed by pip into $(VENV), on the versions in constraints.txt. Needs Python >= 3.10 and a C++ compiler.
# The interpreter, pytest's selection and how many tests run beside each other can be chosen:
#   make test PYTHON=python3.12 PYTEST_ARGS='-m "not gpu"' WORKERS=4

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
BENCHMARK_ARGS ?= --quick
PYTEST_ARGS ?= -m "not gpu and not slow"
WORKERS ?= auto

VENV_PYTHON := $(VENV)/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check
# Where `lint` puts an ordinary install for mypy to read.
INSTALLED := $(abspath $(VENV))/typecheck

.PHONY: demo test lint benchmark frameworks clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(VENV_PYTHON) examples/ann2snn_digits.py $(DEMO_ARGS)

# Threads that wait must not keep the cores from the tests beside them.
test: $(VENV)/.installed-test
	OMP_WAIT_POLICY=passive $(VENV_PYTHON) -m pytest --numprocesses $(WORKERS) --dist worksteal $(PYTEST_ARGS)

benchmark: $(VENV)/.installed-peers $(VENV)/.installed-plot
	$(VENV_PYTHON) -m benchmarks $(BENCHMARK_ARGS)

frameworks: $(VENV)/.installed-test
	$(VENV_PYTHON) -m tests.frameworks

# mypy reads an ordinary install, from outside the checkout: it cannot follow an editable one into passes/ and would
# leave that folder out without a word. A stale build/ would bring deleted modules back, so it goes first.
lint: $(VENV)/.installed-lint
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	rm -rf build $(INSTALLED)
	$(PIP_INSTALL) --quiet --no-deps --no-build-isolation --target $(INSTALLED) .
	cp -r benchmarks $(INSTALLED)
	cd $(INSTALLED) && MYPYPATH=$(INSTALLED) $(abspath $(VENV_PYTHON)) -m mypy \
		--config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p snncompile -p benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra, so that a second run installs nothing; a changed requirement installs again.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP_INSTALL) --constraint constraints.txt --editable '.[$*]'
	touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "snncompile needs Python 3.10 or newer, got " + sys.version.split()[0] + "; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	touch $@
