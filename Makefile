# Each target does all the set-up it needs on a fresh machine: a virtual environment and the install.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Small matrices: one thread per process is fastest, and two trials then share two cores without fighting.
export OMP_NUM_THREADS ?= 1

# Tests wait now and then, for a process or a clock: one more at a time than there are cores.
WORKERS ?= $(shell $(PYTHON) -c "import os; print((os.cpu_count() or 1) + 1)")

# A file of pip constraints for the environment: versions other than the newest that pyproject.toml admits.
CONSTRAINTS ?=

.PHONY: sweep gpu-check site test unit fuzz cluster slow chaos hosts lowest release compare bench check format clean

sweep: $(READY)  ## the main job: search InfLoRA's settings on digits, export the best config
	$(BIN)/python sweeps/digits.py
	$(BIN)/sweeps export digits -o results/digits.yaml

gpu-check: $(READY)  ## the first thing to do on a GPU machine: does all of it work there? under five minutes
	$(BIN)/sweeps gpu-check

test: check site unit fuzz cluster hosts  ## all that a change must pass; what .ci/run runs

site: $(VENV)/.ready-site  ## the documentation, every link checked: build/site/html/index.html; seconds
	$(BIN)/python -m docs.site.build

check: $(READY)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(READY)  ## the fast tests
	$(BIN)/python -m pytest -m "not fuzz and not cluster and not e2e and not hosts and not slow" -n $(WORKERS) --dist worksteal

fuzz: $(READY)  ## malformed inputs by the hundred, each a right answer or one line
	$(BIN)/python -m pytest -m fuzz -n auto --dist worksteal

cluster: $(READY)  ## real Ray clusters, a real MLflow server, the commands as a user runs them
	$(BIN)/python -m pytest -m "(cluster or e2e) and not hosts and not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=20

slow: $(READY)  ## what would make `test` longer than half an hour
	$(BIN)/python -m pytest -m slow --ignore tests/sweeps/test_chaos.py --ignore tests/sweeps/test_stops.py

SEEDS ?= $(shell seq 0 19)
CHAOS := tests/sweeps/test_chaos.py::test_whatever_a_sweep_lives_on_fails_and_it_ends_as_if_undisturbed
chaos: $(READY)  ## whatever a sweep lives on fails at random, twenty times (make chaos SEEDS="3 7": these)
	$(BIN)/python -m pytest -s $(SEEDS:%="$(CHAOS)[%]") tests/sweeps/test_stops.py

hosts: $(READY)  ## machines on this one: brought up with cluster/local.yaml, and as nodes of a real Slurm (needs root; skips say what else)
	$(BIN)/python -m pytest -m "hosts and not slow" -n 2 --dist loadfile

lowest:  ## unit tests and real clusters with the oldest libraries that pyproject.toml admits, in .venv-lowest
	$(MAKE) unit cluster VENV=.venv-lowest CONSTRAINTS=.ci/lowest.txt

release: $(READY)  ## dist/: the wheel and the sdist
	$(BIN)/python -m build

compare: $(READY)  ## every adapter with every classifier, tuned and tested alike: docs/results.md (hours)
	$(BIN)/python benchmarks/pairs.py
	$(BIN)/python benchmarks/controls.py
	$(BIN)/python benchmarks/fifty.py
	$(BIN)/python benchmarks/two_phase.py

bench: $(READY)  ## data path, engine, start of a trial and training step, each against its floor; under ten minutes
	$(BIN)/python benchmarks/data.py --seconds 2
	$(BIN)/python benchmarks/engine.py --trials 200
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/step.py

format: $(READY)  ## the code, and what docs/architecture.md says of it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m tests.pages

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) --editable ".[dev]"
	touch $@

$(VENV)/.ready-site: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest build dist results
