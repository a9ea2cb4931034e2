"""Dictionaries on disk: built once for a protocol, then read in milliseconds.

A file is named by the hash of everything that a dictionary depends on, the code that computes it included,
so what is found is right, and what is outdated is not found. Several processes may share a folder: files
are written beside their place and moved there, and two that build the same write the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from whorl.physics.dictionary import Dictionary, DictionaryParameters, Grid

_PREFIX, _SUFFIX, _UNFINISHED = "whorl-dictionary-", ".npz", ".part"
#: Whoever takes longer to write a file has died.
_ABANDONED_S = 3600.0
_LARGEST_BYTES = 4 << 30
_AXES = ("t1_axis_ms", "t2_axis_ms", "b1_axis")
_ARRAYS = (*_AXES, "coefficients", "basis", "kept")


class StoreError(Exception):
    """A file of the store that cannot be read or written; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the store: its size, when it was last used (s since 1970), and what it says about itself."""

    path: Path
    n_bytes: int
    used: float
    about: dict[str, Any]


@cache
def _code() -> bytes:
    """Hash of the code that computes a dictionary."""
    folder = Path(__file__).parent
    sources = (folder / name for name in ("epg.py", "dictionary.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).digest()


def file_name(parameters: DictionaryParameters) -> str:
    """Name of the file that holds the dictionary of some parameters."""
    name = hashlib.sha256(_code() + parameters.digest().encode()).hexdigest()[:32]
    return f"{_PREFIX}{name}{_SUFFIX}"


def _checksum(name: str, about: str, arrays: dict[str, NDArray[Any]]) -> str:
    total = hashlib.sha256(f"{name}\n{about}".encode())
    for key in _ARRAYS:
        array = np.ascontiguousarray(arrays[key])
        total.update(f"{key} {array.dtype.str} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


class Store:
    """A folder with dictionaries.

    Parameters
    ----------
    folder
        Made when the first dictionary is written.
    limit_bytes
        Size of all files together; those that were not used for the longest time go first.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self._limit = folder, limit_bytes

    def load(self, parameters: DictionaryParameters) -> Dictionary | None:
        """The dictionary of some parameters, or ``None`` if it is not here.

        Raises
        ------
        StoreError
            If the file is damaged, or not one of ours.
        """
        path = self.folder / file_name(parameters)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # the latter for names that no path can have
            raise StoreError(f"the cached dictionary {path} cannot be read: {error}") from error
        if size > _LARGEST_BYTES:
            raise StoreError(
                f"the cached dictionary {path} has {size} bytes: expected at most {_LARGEST_BYTES}"
            )
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                about, told = str(file["about"]), str(file["checksum"])
                arrays = {key: file[key] for key in _ARRAYS}
            if told != _checksum(path.name, about, arrays):
                raise ValueError("its checksum is wrong")
            grid = Grid(*(arrays[key] for key in _AXES))
        except Exception as error:  # a foreign file may raise whatever its reader comes across
            raise StoreError(
                f"the cached dictionary {path} cannot be used: {str(error) or type(error).__name__}"
            ) from error
        with suppress(OSError):  # a folder that is read only serves as well
            os.utime(path)
        return Dictionary(
            grid,
            torch.from_numpy(arrays["coefficients"]),
            torch.from_numpy(arrays["basis"]),
            tuple(arrays["kept"].tolist()),
        )

    def save(self, parameters: DictionaryParameters, dictionary: Dictionary) -> None:
        """Write a dictionary, and remove the oldest ones beyond the limit.

        Raises
        ------
        StoreError
            If it cannot be written. Nothing is left behind.
        """
        train = parameters.train
        about = json.dumps(
            {
                "timepoints": train.n_timepoints,
                "train": train.source,
                "inversion_time_ms": train.inversion_time_ms,
                "atoms": len(dictionary.grid),
                "t1_range_ms": parameters.t1_range_ms,
                "t2_range_ms": parameters.t2_range_ms,
                "b1_values": len(dictionary.grid.b1_axis),
                "coefficients": dictionary.basis.shape[1],
                "energy": dictionary.energy,
            }
        )
        arrays: dict[str, NDArray[Any]] = {
            **dict(zip(_AXES, dictionary.grid.axes, strict=True)),
            "coefficients": dictionary.coefficients.cpu().numpy(),
            "basis": dictionary.basis.cpu().numpy(),
            "kept": np.array(dictionary.kept),
        }
        path = self.folder / file_name(parameters)
        if sum(array.nbytes for array in arrays.values()) > self._limit:
            raise StoreError(
                f"the dictionary is larger than the cache may be ({self._limit >> 20} MiB): it was not kept. "
                f"Set property cache_mb"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _beside(path) as temporary:
                with temporary.open("wb") as file:
                    np.savez(
                        file,
                        allow_pickle=False,
                        about=np.array(about),
                        checksum=np.array(_checksum(path.name, about, arrays)),
                        **arrays,
                    )
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            self._tidy(path)
        except (OSError, ValueError) as error:
            raise StoreError(f"the dictionary cannot be kept in {self.folder}: {error}") from error

    def entries(self) -> list[Entry]:
        """All dictionaries of the folder, the latest used first; unreadable ones say so in `about`."""
        result = []
        for path in self._files():
            with suppress(FileNotFoundError):  # another process has just removed it
                stat = path.stat()
                try:
                    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                        about = dict(json.loads(str(file["about"])))
                except Exception as error:  # as in `load`
                    about = {"error": str(error) or type(error).__name__}
                result.append(Entry(path, stat.st_size, stat.st_mtime, about))
        return sorted(result, key=lambda entry: -entry.used)

    def clear(self) -> tuple[int, int]:
        """Remove all dictionaries; how many there were, and their bytes. Other files stay."""
        count = n_bytes = 0
        for path in [*self._files(), *self._abandoned()]:
            with suppress(FileNotFoundError):  # another process was faster
                size = path.stat().st_size
                path.unlink()
                count, n_bytes = count + path.name.endswith(_SUFFIX), n_bytes + size
        return count, n_bytes

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"{_PREFIX}*{_SUFFIX}") if path.is_file())

    def _abandoned(self) -> list[Path]:
        """Files that a process has not finished, and will not."""
        abandoned = []
        for path in self.folder.glob(f".{_PREFIX}*{_UNFINISHED}"):
            with suppress(FileNotFoundError):  # finished meanwhile
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    abandoned.append(path)
        return abandoned

    def _tidy(self, latest: Path) -> None:
        stats = {}
        for path in self._files():
            with suppress(FileNotFoundError):  # removed by another process
                stats[path] = path.stat()
        total = sum(stat.st_size for stat in stats.values())
        for path in self._abandoned():
            with suppress(OSError):  # somebody else's
                path.unlink()
        for path in sorted(stats, key=lambda path: (path == latest, stats[path].st_mtime)):
            if total <= self._limit:
                break
            with suppress(OSError):
                path.unlink()
            total -= stats[path].st_size


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which is gone at the end unless it was moved."""
    # Not by `tempfile`, whose files nobody else may read: the folder may be shared.
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}{_UNFINISHED}")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def find_or_build(
    parameters: DictionaryParameters,
    store: Store | None,
    build: Callable[[DictionaryParameters], Dictionary],
    warn: Callable[[str], None],
) -> Dictionary:
    """The dictionary of some parameters from the store, else a new one, which is kept there.

    The store is a convenience: what is wrong with it goes to `warn`, and the dictionary is built.
    """
    if store is None:
        return build(parameters)
    try:
        found = store.load(parameters)
    except StoreError as error:
        warn(f"{error}. It is built anew")
        found = None
    if found is not None:
        return found
    dictionary = build(parameters)
    try:
        store.save(parameters, dictionary)
    except StoreError as error:
        warn(f"{error}. The scan goes on without the cache")
    return dictionary
