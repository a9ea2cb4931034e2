"""The main job, end to end, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import whorl

WAIT_S = 300.0


def test_the_demo_ends_with_maps(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "whorl", "demo", "-o", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(whorl.__file__).parents[1])},
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Mn-1" in done.stdout
    assert json.loads((tmp_path / "demo.json").read_text())
    assert (tmp_path / "maps.png").stat().st_size > 10_000
    assert "simulated truth of scan.h5" in (tmp_path / "report.html").read_text()
