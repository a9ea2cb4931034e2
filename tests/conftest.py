"""Scans that several tests share: small, but complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from whorl.simulation.scan import simulate


@pytest.fixture(scope="session")
def tiny_scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One slice of the NIST plate, 64², 120 timepoints: seconds for a whole reconstruction."""
    path = tmp_path_factory.mktemp("scan") / "tiny.h5"
    simulate(path, phantom="nist", timepoints=120, interleaves=24, coils=4, matrix=64)
    return path
