# make demo: from a fresh machine to T1 and T2 maps.  make test: lint, types and all tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test peers clean

demo: .venv/installed
	$(BIN)/whorl demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

# Cross-checks with two independent programs. MRpro is installed without what it depends on: its torchvision
# would replace PyTorch, and is needed for nothing here.
peers: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		blochsim einops 'ptwt<1' pydicom pytorch-finufft torchnd
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps mrpro
	$(BIN)/pytest tests/physics/test_epg_peers.py

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv out
