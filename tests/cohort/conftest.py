"""A small cohort."""

from __future__ import annotations

from pathlib import Path

import pytest

from whorl.simulation.scan import simulate


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three scans."""
    folder = tmp_path_factory.mktemp("cohort")
    for number in range(3):
        simulate(folder / f"scan{number}.h5", phantom="nist", matrix=64, timepoints=200, coils=4, seed=number)
    return folder
