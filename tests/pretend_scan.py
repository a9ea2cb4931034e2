"""A whole scan on the pretend device: from its readouts to its maps, with all transfers by line.

``PYTHONPATH=tests python tests/pretend_scan.py method=llr`` prints those of a small scan.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import pretend_nufft
import whorl.pipeline.scan
from pretend_device import PRETEND, Transfers, transfers
from scan_edit import Result, Scan
from whorl.simulation.scan import simulate


def run_on_pretend_device(scan: Scan, **properties: Any) -> tuple[Result, Transfers]:
    """As `Scan.run`: what comes out, and what was transferred."""
    with pytest.MonkeyPatch.context() as patch:
        pretend_nufft.install(patch, "cufinufft", "cupy")
        patch.setattr(whorl.pipeline.scan, "device_of", lambda settings: (PRETEND, ""))
        with transfers() as counted:
            result = scan.run(**properties)
    return result, counted


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.h5"
        simulate(path, phantom="nist", timepoints=120, interleaves=24, coils=4, matrix=64)
        result, counted = run_on_pretend_device(
            Scan.load(path), cache_mb=0, **dict(p.split("=", 1) for p in sys.argv[1:])
        )
    print(counted.report())
    print(f"{counted.kernels} kernels, {len(counted.waits)} waits; {result.outcome}")
