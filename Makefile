# make quickstart   from nothing to a distilled student, two to five minutes after installation
# make test         set-up, style, types, import contract, tests
# make test-cluster the slow ones: several nodes, object stores, minutes
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# on all cores where pip takes one, and without what hardly anybody imports; files for another Python are errors
COMPILE := $(BIN)/python -m compileall -q -j 0 -x '/(tests|testing/_internal|_inductor|transformers|rllib|serve|tune|llm|pip|mypy|pygments)/' .venv/lib > /dev/null || true
# hundreds of programs are started, each of which would compile the package anew
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test style ordinary test-cluster clean

quickstart: .venv/installed
	@$(BIN)/raydfkd run jobs/quickstart.yaml

test: .venv/installed-dev
	@$(MAKE) --no-print-directory --jobs 2 style ordinary
	$(BIN)/pytest -m "ray and not cluster" tests/distributed

style ordinary: .venv/installed-dev

style:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

ordinary:
	$(BIN)/pytest -m "not ray and not cluster" -n 3 --dist loadfile

test-cluster: .venv/installed-cluster
	$(BIN)/pytest -m "ray or cluster"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "raydfkd needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	@$(PIP) --upgrade pip  # that of Python 3.11 takes a minute or two more to find out what to install

# each at once: a second call of pip, and the search for what is not compiled, would take half a minute more
.venv/installed-dev: EXTRAS := [s3,dev]
.venv/installed-cluster: EXTRAS := [s3,dev,cluster-tests]
.venv/installed .venv/installed-dev .venv/installed-cluster: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing into .venv, once; two to five minutes"
	@$(PIP) -e '.$(EXTRAS)'
	@$(COMPILE)
	@$(BIN)/python -c 'from importlib.metadata import version; print(".venv ready (torch", version("torch") + ", ray", version("ray") + ")")'
	@touch .venv/installed $@

clean:
	rm -rf .venv runs build dist *.egg-info
