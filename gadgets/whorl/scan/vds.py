"""STUB"""

from __future__ import annotations

from whorl.scan.trajectories import Trajectories


def trajectories_from_header(xml: bytes) -> Trajectories | None:
    return None
