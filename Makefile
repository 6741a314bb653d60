# make demo    honest forecasts of AAPL, MSFT and GOOGL from built-in prices
# make lab     the lab's tasks and ablations, small, and what they show of the published claims
# make test    the whole test suite
# make lint    ruff, mypy, and the layers of the house
# make bench   ours beside the peers, with the floor that this machine sets
# make docs    the documentation, in site/: runs every chapter of the guide (minutes; later only those that changed)
#
# Each sets up .venv when it has to: a Python of 3.11 or newer is all that is needed, a C++ compiler makes it fast.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard native/*)
SAY := @printf '\033[1m==> %s\033[0m\n'

LAB_WORKERS ?= 2
.PHONY: demo lab test lint bench docs docs-serve clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(SAY) "Training on the built-in prices of AAPL, MSFT and GOOGL (a few minutes on two cores)"
	$(RUN)/mambakit forecast train --test --out models
	$(SAY) "Predicting AAPL from the saved model"
	$(RUN)/mambakit forecast predict AAPL --models models

lab: $(VENV)/.installed
	$(SAY) "Training every mini preset of the lab (under fifteen minutes on two cores)"
	$(RUN)/mambakit lab sweep src/mambakit/lab/mini.toml --out lab-mini --device cpu --workers $(LAB_WORKERS)
	$(SAY) "Tables, figures, and the published claims"
	$(RUN)/mambakit lab report lab-mini --claims

test: $(VENV)/.installed-dev
	$(SAY) "Running the tests, one process for each processor"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(SAY) "Checking style, types and layers"
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/lint-imports

bench: $(VENV)/.installed-bench
	$(SAY) "Measuring ours beside the peers"
	$(RUN)/python -m benchmarks
	$(RUN)/python -m benchmarks.lm

# The notice that is silenced advertises another site generator.
docs: $(VENV)/.installed-docs
	$(SAY) "Running the guide's chapters and building the documentation"
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs build --strict
	$(RUN)/python -m tools.guide.links site
	$(SAY) "Open site/index.html, or make docs-serve to search and to read other languages"

docs-serve: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs serve

clean:
	rm -rf $(VENV) build dist models lab-mini site

# torch comes first and alone, so that nothing else pulls in another build of it.
$(VENV)/.torch:
	$(SAY) "Making $(VENV) with $(PYTHON) and installing $(TORCH)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "mambakit needs Python 3.11 or newer; name one with make PYTHON=...")'
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(SAY) "Installing mambakit (compiling its kernels)"
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(SAY) "Installing what '$*' needs"
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@
