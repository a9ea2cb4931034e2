"""Scans that several tests share: small, but complete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scan_edit import Result, Scan
from whorl.simulation.scan import simulate


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Dictionaries are kept in a folder of this run, by this process and by those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One slice of the NIST plate, 64², 120 timepoints: seconds for a whole reconstruction."""
    path = tmp_path_factory.mktemp("scan") / "tiny.h5"
    simulate(path, phantom="nist", timepoints=120, interleaves=24, coils=4, matrix=64)
    return path


@pytest.fixture(scope="session")
def loaded_scan(tiny_scan: Path) -> Scan:
    return Scan.load(tiny_scan)


@pytest.fixture
def scan(loaded_scan: Scan) -> Scan:
    """The tiny scan in memory, to be changed at will."""
    return loaded_scan.copy()


@pytest.fixture(scope="session")
def untouched(loaded_scan: Scan) -> Result:
    """The low-rank maps of the tiny scan as it is."""
    result = loaded_scan.copy().run()
    assert result.outcome.exit_code == 0
    return result
