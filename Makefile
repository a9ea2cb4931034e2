# make demo: from a fresh machine to T1 and T2 maps.  make test: lint, types and all tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test system-test peers peers-installed validation gpu-check clean

demo: .venv/installed
	$(BIN)/whorl demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

# The image in a Docker engine, a cohort on SLURM: both started by the tests, as root on Debian, with its packages
# docker.io, debootstrap, iptables, slurmctld, slurmd, slurm-client and munge.
system-test: .venv/installed
	$(BIN)/pytest -m system tests/deployment

# Cross-checks with two independent programs. MRpro is installed without what it depends on: its torchvision
# would replace PyTorch, and is needed for nothing here.
peers: peers-installed
	$(BIN)/pytest tests/physics/test_epg_peers.py

peers-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		blochsim einops 'ptwt<1' pydicom pytorch-finufft torchnd
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps mrpro

# Every table of docs/validation.md anew: hours. What is made is kept in out/validation, until it is wanted again:
# make validation AGAIN=--again
validation: peers-installed
	$(BIN)/python tests/validation.py $(AGAIN)

# On a machine with an NVIDIA GPU, from a bare checkout and offline: with the Python that is there (or
# PYTHON=...), which needs PyTorch, CuPy and what pyproject.toml lists; wheels in WHEELS are installed first.
gpu-check:
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps $(WHEELS)/*.whl)
	PYTHONPATH=gadgets:tests $(PYTHON) -m pytest -m cuda -rs tests
	PYTHONPATH=gadgets:tests $(PYTHON) tests/bench_methods.py --device cuda
	PYTHONPATH=gadgets:tests $(PYTHON) tests/bench_stages.py

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv out
