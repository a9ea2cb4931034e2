"""Arrays in files that others have made: NumPy's and HDF5's, without pickle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from whorl.scan.failure import ScanError

_LARGEST_BYTES = 1 << 31
#: How an HDF5 file begins.
HDF5 = b"\x89HDF\r\n\x1a\n"

T = TypeVar("T")


def read_arrays(path: str, what: str, names: Sequence[str]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Arrays of a file by name, and the names of all that it has.

    `.npy`: its only array has the first of the names. `.npz`: as there; a single array of another name counts
    as the first. HDF5: datasets, else attributes of the root.

    Parameters
    ----------
    what
        What the file is to be, for the operator: "the B1 map".
    names
        Of the arrays that are wanted.

    Raises
    ------
    ScanError
        If the file is none, is larger than 2 GiB, or cannot be read.
    """

    def arrays(file: Any) -> tuple[dict[str, NDArray[Any]], list[str]]:
        if file.read(len(HDF5)) == HDF5:
            with h5py.File(file, "r") as hdf5:
                found = {name: np.asarray(hdf5.attrs[name]) for name in names if name in hdf5.attrs}
                found |= {name: np.asarray(hdf5[name][()]) for name in names if name in hdf5}
                return found, list(hdf5)
        file.seek(0)
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            return {names[0]: loaded}, [names[0]]
        with loaded:
            found = {name: loaded[name] for name in names if name in loaded.files}
            if not found and len(loaded.files) == 1:
                found = {names[0]: loaded[loaded.files[0]]}
            return found, loaded.files

    return with_file(path, what, arrays)


def with_file(path: str, what: str, read: Callable[[Any], T]) -> T:
    """What a function reads from an open file, with any failure in one sentence.

    A descriptor of its own: what two threads open by name HDF5 takes for one file, and crashes when one of
    them closes it while the other reads (h5py issue 2920).

    Raises
    ------
    ScanError
        See `read_arrays`.
    """
    try:
        size = Path(path).stat().st_size
        if not Path(path).is_file() or size > _LARGEST_BYTES:
            raise ValueError(f"it is no file of at most {_LARGEST_BYTES >> 20} MiB")
        with Path(path).open("rb") as file:
            return read(file)
    except ScanError:
        raise
    except Exception as error:  # a foreign file may raise whatever its reader comes across
        # numpy takes what it does not know for a pickle, and advises to load it all the same.
        why = "it holds no arrays of numbers" if "pickle" in str(error) else str(error)
        raise ScanError(f"{what} {path} cannot be read as .npy, .npz or HDF5: {why}") from error
