"""A recorded scan, from one file into another, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from whorl.doors import session
from whorl.doors.files import ResultFile, open_scan
from whorl.doors.receivers import File
from whorl.pipeline.scan import reconstruct_scan


def replay(
    scan: Path,
    output: Path,
    properties: Mapping[str, object],
    say: Callable[[str, str], None],
    *,
    recorded: bool = True,
) -> tuple[int, int]:
    """Reconstruct a recorded scan.

    Parameters
    ----------
    scan
        An MRD file (HDF5) or a recorded stream.
    output
        For the images (MRD); it gets its name when all are in it.
    properties
        Of the operator.
    say
        Takes what a receiver would be told: its level (`DBG`, `WRN`, `ERR`) and the text.
    recorded
        Whether properties that were recorded with a stream count, where `properties` does not have them.

    Returns
    -------
    tuple
        Images written, and the exit code: 0, 1 nothing, 3 something is degraded or missing.

    Raises
    ------
    ScanError
        If the scan cannot be read, or the images cannot be written.
    """
    operator = session.Operator(properties, "recorded" if recorded else "replaced")
    with open_scan(scan) as source, ResultFile(output, source.opening.header.rstrip(b"\0")) as result:
        code = session.run_scan(source, File(result, say), operator, reconstruct_scan)
        return result.n_images, code
