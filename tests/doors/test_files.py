"""MRD files: those of ismrmrd, those of others, and those that are none."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest

from doors.messages import HEADER, make_image, make_readout
from whorl.doors import files
from whorl.scan.failure import ScanError
from whorl.scan.readout import HEAD_DTYPE, Readout

READOUTS = [
    make_readout(*sizes, seed=n) for n, sizes in enumerate([(2, 9, 2), (2, 9, 2), (3, 8, 3), (1, 7, 0)])
]


def aligned(dtype: np.dtype[np.void]) -> np.dtype[np.void]:
    """The same fields as a C compiler lays them out without packing."""
    fields = [
        (name, aligned(dtype[name]) if dtype[name].names else dtype[name].base, dtype[name].shape)
        for name in dtype.names or ()
    ]
    return np.dtype(fields, align=True)


def write_file(
    path: Path,
    readouts: list[Readout],
    group: str = "dataset",
    head: np.dtype[np.void] = HEAD_DTYPE,
    sample: np.dtype[np.generic] = np.dtype(np.float32),  # noqa: B008
) -> Path:
    row = np.dtype(
        [("head", head), ("traj", h5py.vlen_dtype(np.dtype(np.float32))), ("data", h5py.vlen_dtype(sample))]
    )
    rows = np.empty(len(readouts), row)
    for target, readout in zip(rows, readouts, strict=True):
        for name in HEAD_DTYPE.names or ():
            if name == "idx":
                for counter in HEAD_DTYPE["idx"].names or ():
                    target["head"]["idx"][counter] = readout.head["idx"][counter]
            else:
                target["head"][name] = readout.head[name]
        target["traj"] = readout.trajectory.ravel()
        values = readout.data.ravel()
        if sample.names:
            compound = np.zeros(values.size, sample)
            compound["real"], compound["imag"] = values.real, values.imag
            target["data"] = compound
        else:
            target["data"] = values.view(np.float32)
    with h5py.File(path, "w") as file:
        file.create_group(group).create_dataset("xml", data=[HEADER], dtype=h5py.special_dtype(vlen=bytes))
        file[group].create_dataset("data", data=rows, maxshape=(None,))
    return path


def assert_same(got: list[Readout], expected: list[Readout]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.head.dtype == HEAD_DTYPE
        assert one.head.tobytes() == other.head.tobytes()
        assert one.data.dtype == np.complex64
        assert one.data.shape == other.data.shape
        np.testing.assert_array_equal(one.data, other.data)
        assert one.trajectory.shape == other.trajectory.shape
        np.testing.assert_array_equal(one.trajectory, other.trajectory)


def test_a_file_of_the_ismrmrd_package(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    with ismrmrd.Dataset(str(path), "dataset", True) as dataset:
        dataset.write_xml_header(HEADER)
        for readout in READOUTS:
            acquisition = ismrmrd.Acquisition(readout.head.tobytes())
            acquisition.data[:], acquisition.traj[:] = readout.data, readout.trajectory
            dataset.append_acquisition(acquisition)
    assert files.read_header(path) == HEADER
    assert files.count_readouts(path) == 4
    assert_same(list(files.read_readouts(path)), READOUTS)


def test_heads_with_gaps_are_read_by_name(tmp_path: Path) -> None:
    head = aligned(HEAD_DTYPE)
    assert head.itemsize == 352
    path = write_file(tmp_path / "scan.h5", READOUTS, head=head)
    assert_same(list(files.read_readouts(path)), READOUTS)


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_complex_samples_as_a_compound(tmp_path: Path, precision: type) -> None:
    sample = np.dtype([("real", precision), ("imag", precision)])
    path = write_file(tmp_path / "scan.h5", READOUTS, sample=sample)
    assert_same(list(files.read_readouts(path)), READOUTS)


def test_more_readouts_than_a_block(tmp_path: Path) -> None:
    readouts = [make_readout(1, 5, 2, seed=n) for n in range(1203)]
    assert_same(list(files.read_readouts(write_file(tmp_path / "scan.h5", readouts))), readouts)


def test_a_group_of_another_name(tmp_path: Path) -> None:
    path = write_file(tmp_path / "scan.h5", READOUTS, group="measurement")
    with h5py.File(path, "r+") as file:
        file.create_group("truth")
    assert files.read_header(path) == HEADER
    assert_same(list(files.read_readouts(path)), READOUTS)


def test_fields_that_others_do_not_write_are_zero(tmp_path: Path) -> None:
    kept = [name for name in HEAD_DTYPE.names or () if name not in ("user_float", "patient_table_position")]
    path = write_file(tmp_path / "scan.h5", READOUTS)
    with h5py.File(path, "r+") as file:
        rows = file["dataset/data"][()]
        head = np.dtype([(name, HEAD_DTYPE[name]) for name in kept])
        fewer = np.empty(
            len(rows), np.dtype([("head", head), ("traj", rows.dtype["traj"]), ("data", rows.dtype["data"])])
        )
        for name in kept:
            fewer["head"][name] = rows["head"][name]
        fewer["traj"], fewer["data"] = rows["traj"], rows["data"]
        del file["dataset/data"]
        file["dataset"].create_dataset("data", data=fewer)
    assert_same(list(files.read_readouts(path)), READOUTS)


def wrong_files(folder: Path) -> dict[str, tuple[Path, str]]:
    missing = folder / "nothing.h5"
    text = folder / "text.h5"
    text.write_text("no HDF5")
    empty = folder / "empty.h5"
    h5py.File(empty, "w").close()
    no_xml, no_data, no_rows, two = (folder / f"{n}.h5" for n in range(4))
    for path, removed in ((no_xml, "dataset/xml"), (no_data, "dataset/data")):
        with h5py.File(write_file(path, READOUTS), "r+") as file:
            del file[removed]
    with h5py.File(write_file(no_rows, READOUTS), "r+") as file:
        file["dataset/data"].resize((0,))
    with h5py.File(write_file(two, READOUTS, group="a"), "r+") as file:
        file.copy("a", "b")
    return {
        "missing": (missing, "nothing.h5 is not a file: expected a scan, an MRD file"),
        "a folder": (folder, "is not a file"),
        "no HDF5": (text, "text.h5 cannot be read as an MRD file"),
        "empty": (empty, 'expected a group "dataset"'),
        "no header": (no_xml, "has no MRD header"),
        "no data": (no_data, "has no acquisitions"),
        "no rows": (no_rows, "has no acquisitions"),
        "two scans": (two, "not an MRD file with one scan: .* got groups a, b"),
    }


@pytest.mark.parametrize(
    "kind", ["missing", "a folder", "no HDF5", "empty", "no header", "no data", "no rows", "two scans"]
)
def test_a_wrong_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path, text = wrong_files(tmp_path)[kind]
    for read in (files.read_header, files.read_readouts, files.count_readouts):
        with pytest.raises(ScanError, match=text):
            read(path)


def test_data_that_are_no_acquisitions_are_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "scan.h5", READOUTS)
    with h5py.File(path, "r+") as file:
        del file["dataset/data"]
        file["dataset"].create_dataset("data", data=np.zeros(4))
    with pytest.raises(ScanError, match="not MRD version 1: head, traj, data"):
        files.read_readouts(path)


def test_a_row_that_contradicts_its_head_costs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = make_readout()
    readouts = [READOUTS[0], Readout(broken.head, broken.trajectory, broken.data[:, :5]), READOUTS[0]]
    first, damaged, last = (
        (r.head["number_of_samples"], r.data.shape, r.trajectory.shape)
        for r in files.read_readouts(write_file(tmp_path / "scan.h5", readouts))
    )
    assert first == last
    assert damaged == (0, (2, 0), (0, 2))
    (text,) = (record.getMessage() for record in caplog.records)
    assert re.search(r"readout 1 of .*2 coils × 9 samples .* got 10 complex samples", text)


def test_results_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"
    sent = [
        make_image(np.uint16, 7, 8, slice="0"),
        make_image(np.uint16, 7, 8, slice="1"),
        make_image(np.float32, 4, 4),
    ]
    sent[2].image_series_index = 1
    with files.ResultFile(path, HEADER) as result:
        for image in sent:
            result.append(image)
        assert not path.exists()
    got = files.read_images(path)
    assert [image.image_series_index for image in got] == [1, 2, 2]
    for one, other in zip(got, [sent[2], sent[0], sent[1]], strict=True):
        assert one.data.dtype == other.data.dtype
        np.testing.assert_array_equal(one.data, other.data)
        assert dict(one.meta) == dict(other.meta)
    with ismrmrd.Dataset(str(path), "dataset", False) as dataset:
        assert dataset.read_xml_header() == HEADER
        assert dataset.number_of_images("image_2") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["maps.h5"]


def test_a_result_without_images_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"
    path.write_bytes(b"older")
    with files.ResultFile(path, HEADER):
        pass
    with pytest.raises(KeyError), files.ResultFile(path, HEADER) as result:  # noqa: PT012
        result.append(make_image())
        raise KeyError
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["maps.h5"]


def test_a_result_that_cannot_be_written_says_so_before_the_scan(tmp_path: Path) -> None:
    with (
        pytest.raises(ScanError, match="cannot be written"),
        files.ResultFile(tmp_path / "no" / "maps.h5", HEADER),
    ):
        pass


def test_a_scan_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="has no images"):
        files.read_images(write_file(tmp_path / "scan.h5", READOUTS))
