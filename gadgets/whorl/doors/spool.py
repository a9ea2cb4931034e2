"""The raw stream of each scan on disk, so that no measurement is lost with a reconstruction.

Bytes are appended as they came and while they come: after a crash the file holds all that arrived, and
`whorl replay` reads it up to the last whole message.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

#: After so many bytes it is looked whether older files must go.
_CHECK_BYTES = 64 << 20


class Spool:
    """The file of one scan, in a folder that is kept within limits.

    It never raises: a disk that is full or away ends the spool, not the scan.

    Parameters
    ----------
    folder
        Made if it does not exist, for its owner alone: streams carry patient data.
    name
        Of the scan, for the name of the file.
    max_scans, max_bytes
        Limits of the folder; the oldest files go first, never those that are being written, by whomever.
    warn
        Takes the reason if the spool cannot be written or goes on no longer.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        name: str,
        max_scans: int,
        max_bytes: int,
        warn: Callable[[str], None],
    ) -> None:
        self._folder = Path(folder)
        self._max_scans, self._max_bytes = max_scans, max_bytes
        self._warn = warn
        self._lock = threading.Lock()
        self._file: int | None = None
        self._n_bytes = 0
        self._next_check = min(_CHECK_BYTES, max_bytes)
        self.path = self._folder / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%fZ}-{name}.mrd"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            # Held while the scan lasts: who makes room leaves this file alone.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._make_room()
        except OSError as error:
            self._give_up(str(error))

    def __call__(self, data: memoryview) -> None:
        """Append what has come."""
        with self._lock:
            if self._file is None:
                return
            try:
                while data:
                    n = os.write(self._file, data)
                    self._n_bytes += n
                    data = data[n:]
                if self._n_bytes >= self._next_check:
                    self._next_check = self._n_bytes + _CHECK_BYTES
                    self._make_room()
            except OSError as error:
                self._give_up(str(error))

    def close(self) -> None:
        """End the file; one in which nothing is goes away."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
                if not self._n_bytes:
                    with suppress(OSError):
                        self.path.unlink()

    def _give_up(self, reason: str) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._warn(f"the raw stream is not kept any further in {self._folder}: {reason}; the scan goes on")

    def _make_room(self) -> None:
        files: list[tuple[Path, int]] = []
        for path in sorted(self._folder.glob("*.mrd"), reverse=True):
            if path != self.path:
                with suppress(OSError):  # another process was faster
                    files.append((path, path.stat().st_size))
        n_scans, n_bytes = len(files) + 1, sum(size for _, size in files) + self._n_bytes
        while files and (n_scans > self._max_scans or n_bytes > self._max_bytes):
            path, size = files.pop()
            if _removed(path):
                n_scans, n_bytes = n_scans - 1, n_bytes - size
        if self._n_bytes > self._max_bytes:
            raise OSError(f"this scan alone has more than spool_mb={self._max_bytes >> 20}")


def _removed(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:  # being written
        return False
    finally:
        os.close(descriptor)
    return True
