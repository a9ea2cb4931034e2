"""Scans in files: MRD files (HDF5) and recorded streams; and the images of a result.

HDF5 files are read with h5py by field name: those of some programs have acquisition headers with gaps
for alignment (352 bytes), or complex samples as a compound, which the ismrmrd package cannot read.
A block of rows at a time is also several times faster than one.

Letters: C coils, S samples, D trajectory columns.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import ismrmrd
import numpy as np
from numpy.typing import NDArray

from whorl.doors.opening import read_opening
from whorl.doors.sources import FileSource, Source, StreamSource
from whorl.doors.transport import Channel, Pipes, StreamTimeout
from whorl.doors.wire import ProtocolError
from whorl.scan.failure import EndOfStream, ScanError
from whorl.scan.readout import HEAD_DTYPE, Readout

logger = logging.getLogger("whorl")

#: Without these fields nobody can tell what a readout is; others may be missing and are 0 then.
_NEEDED = ("flags", "number_of_samples", "active_channels", "trajectory_dimensions", "idx")
_BLOCK_BYTES = 16 << 20


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise ScanError(f"{path} is not a file: expected a scan, an MRD file (HDF5) or a recorded stream")
    try:
        # By a descriptor of its own: what two threads open by name HDF5 takes for one file, and crashes when
        # one of them closes it while the other reads (h5py issue 2920).
        with path.open("rb") as bare, h5py.File(bare, "r") as file:
            yield file
    except OSError as error:
        raise ScanError(f"{path} cannot be read as an MRD file (HDF5): {error}") from error


def _group(file: h5py.File, path: Path) -> h5py.Group:
    groups = {name: item for name, item in file.items() if isinstance(item, h5py.Group)}
    candidates = [name for name, group in groups.items() if "xml" in group and "data" in group]
    if "dataset" in groups:
        found: h5py.Group = groups["dataset"]
        if "xml" not in found:
            raise ScanError(f'{path} has no MRD header: expected "xml" in the group "dataset"')
        if "data" not in found or not found["data"].size:
            raise ScanError(f'{path} has no acquisitions: expected "data" in the group "dataset"')
        return found
    if len(candidates) != 1:
        names = ", ".join(candidates or groups) or "none"
        raise ScanError(
            f"{path} is not an MRD file with one scan: "
            f'expected a group "dataset" with "xml" and "data", got groups {names}'
        )
    return groups[candidates[0]]


def _is_stream(path: Path) -> bool:
    """Whether a file holds the messages of a stream, one after the other, rather than HDF5."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.read(2)
    # The ids of a configuration or a header; a stream of MRD version 2.
    return first in (b"\1\0", b"\2\0", b"\3\0", b"ya")


@contextmanager
def open_scan(path: str | os.PathLike[str]) -> Iterator[Source]:
    """A scan in a file; of a stream that broke off all whole messages.

    Raises
    ------
    ScanError
        If there is no such file, or no scan in it.
    """
    path = Path(path)
    if not _is_stream(path):
        yield FileSource(_header(path), _readouts(path))
        return
    with path.open("rb") as file:
        channel = Channel(Pipes(file.fileno()))
        try:
            opening = read_opening(channel)
        except (EndOfStream, StreamTimeout, ProtocolError) as error:
            raise ScanError(f"{path} cannot be read as a recorded stream: {error}") from error
        yield StreamSource(channel, opening)


def read_header(path: str | os.PathLike[str]) -> bytes:
    """The MRD header (XML) of a scan in a file; errors as `open_scan`."""
    with open_scan(path) as source:
        return source.opening.header.rstrip(b"\0")


def read_readouts(path: str | os.PathLike[str]) -> Iterator[Readout]:
    """All readouts of a scan in a file, in its order, read block by block while they are taken.

    Raises
    ------
    ScanError
        At once if there is no scan in the file; later if a row of it is broken.
    EndOfStream
        Later, if the file is a stream that broke off.
    """
    with open_scan(path):
        pass

    def readouts() -> Iterator[Readout]:
        with open_scan(path) as source:
            yield from source.readouts()

    return readouts()


def _header(path: Path) -> bytes:
    with _open(path) as file:
        value = np.asarray(_group(file, path)["xml"][()]).reshape(-1)[0]
    return value.encode() if isinstance(value, str) else bytes(value)


def _readouts(path: Path) -> Iterator[Readout]:
    with _open(path) as file:
        acquisitions = _group(file, path)["data"]
        names = acquisitions.dtype.names or ()
        head = acquisitions.dtype["head"].names or () if "head" in names else ()
        lacking = [name for name in ("head", "traj", "data") if name not in names]
        lacking += [f"head.{name}" for name in _NEEDED if name not in head]
        if lacking:
            raise ScanError(f"the acquisitions of {path} are not MRD version 1: {', '.join(lacking)} missing")
    return _rows(path)


def count_readouts(path: str | os.PathLike[str]) -> int:
    """The number of readouts of a file, as far as it goes; errors as `open_scan`."""
    path = Path(path)
    if _is_stream(path):
        n_readouts = 0
        with open_scan(path) as source, suppress(EndOfStream):
            for _ in source.readouts():
                n_readouts += 1
        return n_readouts
    with _open(path) as file:
        return int(_group(file, path)["data"].size)


def _rows(path: Path) -> Iterator[Readout]:
    with _open(path) as file:
        acquisitions = _group(file, path)["data"]
        at, n_rows = 0, 1
        while at < acquisitions.size:
            try:
                block = acquisitions[at : at + n_rows]
            except OSError as error:
                raise ScanError(
                    f"readouts {at} to {at + n_rows - 1} of {path} cannot be read: {error}"
                ) from error
            heads = np.zeros(block.size, HEAD_DTYPE)
            _copy_fields(block["head"], heads)
            size = 1
            for number, (head, trajectory, data) in enumerate(
                zip(heads, block["traj"], block["data"], strict=True), start=at
            ):
                readout = _readout(head, trajectory, data, f"readout {number} of {path}")
                size = max(size, readout.trajectory.nbytes + readout.data.nbytes)
                yield readout
            at += block.size
            n_rows = min(max(_BLOCK_BYTES // size, 1), 512)


def _copy_fields(source: NDArray[Any], target: NDArray[Any]) -> None:
    # NumPy assigns structures by position; here names count, whatever their order, gaps and widths.
    for name in target.dtype.names or ():
        if name not in (source.dtype.names or ()):
            continue
        if target.dtype[name].names:
            _copy_fields(source[name], target[name])
        else:
            target[name] = source[name]


def _readout(head: np.void, trajectory: NDArray[Any], data: NDArray[Any], what: str) -> Readout:
    n_coils, n_samples, n_columns = (
        int(head[name]) for name in ("active_channels", "number_of_samples", "trajectory_dimensions")
    )
    if data.dtype.names:
        real, imaginary = data.dtype.names
        data = data[real] + 1j * data[imaginary]
    samples = np.ascontiguousarray(data)
    samples = (samples if samples.dtype.kind == "c" else samples.astype(np.float32, copy=False)).ravel()
    if samples.dtype.kind == "f" and samples.size % 2 == 0:
        samples = samples.view(np.complex64)
    places = np.ascontiguousarray(trajectory, np.float32).ravel()
    if samples.size != n_coils * n_samples or places.size != n_samples * n_columns:
        # Each row stands by itself: without samples this one is dropped and counted, and costs no other.
        logger.warning(
            "%s: its header says %d coils × %d samples and %d trajectory columns, got %d complex samples "
            "and %d trajectory values",
            *(what, n_coils, n_samples, n_columns, samples.size, places.size),
        )
        head, n_samples = head.copy(), 0
        head["number_of_samples"] = 0
        samples, places = samples[:0], places[:0]
    return Readout(
        head=head,
        trajectory=places.reshape(n_samples, n_columns),  # (S, D)
        data=samples.astype(np.complex64, copy=False).reshape(n_coils, n_samples),  # (C, S)
    )


class ResultFile:
    """Images of a result on their way into an MRD file, each series in a variable `image_<series>`.

    The file gets its name only when everything is in it, at the end of the `with` block; without any
    image, or if the block is left by an exception, nothing is written and an older file stays.

    Parameters
    ----------
    path
        The file to make.
    header_xml
        MRD header of the scan.
    """

    def __init__(self, path: str | os.PathLike[str], header_xml: bytes) -> None:
        self.path = Path(path)
        self.n_images = 0
        self._header_xml = header_xml
        # In the same folder: a file is renamed in one step only within its file system.
        self._part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        self._lock = threading.Lock()
        self._dataset: ismrmrd.Dataset | None = None

    def __enter__(self) -> ResultFile:
        try:
            self._dataset = ismrmrd.Dataset(str(self._part), "dataset", True)
        except OSError as error:
            raise ScanError(f"{self.path} cannot be written: {error}") from error
        self._dataset.write_xml_header(self._header_xml)
        return self

    def append(self, image: ismrmrd.Image) -> None:
        """Add one image; from any thread, within the `with` block."""
        with self._lock:
            if self._dataset is None:
                raise ValueError("append outside the with block of a ResultFile")
            self._dataset.append_image(f"image_{image.image_series_index}", image)
            self.n_images += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._dataset is not None:
                self._dataset.close()
            self._dataset = None
            if kind is None and self.n_images:
                self._part.replace(self.path)
            else:
                self._part.unlink(missing_ok=True)


def is_result(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds images and no acquisitions, and so is no scan."""
    try:
        with Path(path).open("rb") as bare, h5py.File(bare, "r") as file:
            groups = [item for item in file.values() if isinstance(item, h5py.Group)]
            return not any("data" in group for group in groups) and any(
                name.startswith("image_") for group in groups for name in group
            )
    except OSError:
        return False


def read_result_header(path: str | os.PathLike[str]) -> bytes:
    """The MRD header of the scan that a result is of; empty if the file has none. Errors as `read_images`."""
    with _open(Path(path)) as file:
        for group in (item for item in file.values() if isinstance(item, h5py.Group)):
            if isinstance(group.get("xml"), h5py.Dataset):
                value = np.asarray(group["xml"][()]).reshape(-1)[0]
                return value.encode() if isinstance(value, str) else bytes(value)
    return b""


def read_images(path: str | os.PathLike[str]) -> list[ismrmrd.Image]:
    """All images of a result file with their meta attributes, ordered by series, then as they were added.

    Raises
    ------
    ScanError
        If there is no such file, or it has no images.
    """
    path = Path(path)
    images: list[ismrmrd.Image] = []
    with _open(path) as file:
        for group in (item for item in file.values() if isinstance(item, h5py.Group)):
            for variable in group.values():
                if not isinstance(variable, h5py.Group) or not {"header", "attributes", "data"} <= set(
                    variable
                ):
                    continue
                rows = zip(variable["header"][()], variable["attributes"][()], variable["data"], strict=True)
                for header, attributes, pixels in rows:
                    image = ismrmrd.Image(header, attributes)
                    if pixels.dtype.names:  # complex numbers are pairs in HDF5
                        kind = np.complex64 if pixels.dtype.itemsize == 8 else np.complex128
                        pixels = np.ascontiguousarray(pixels).view(kind)
                    image.data[...] = pixels
                    images.append(image)
    if not images:
        raise ScanError(f"{path} has no images: expected a result with image_<series> in a group")
    return sorted(images, key=lambda image: int(image.image_series_index))
