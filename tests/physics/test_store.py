"""Dictionaries on disk: what was kept comes back, and what is not right is never taken for it."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from whorl.physics import store as store_module
from whorl.physics.dictionary import Dictionary, DictionaryParameters, build_dictionary
from whorl.physics.store import Store, StoreError, file_name, find_or_build
from whorl.scan.train import Train


def parameters_of(n: int, phase_deg: float = 0.0) -> DictionaryParameters:
    t = np.arange(n)
    train = Train(
        10 + 40 * np.sin(np.pi * t / n) ** 2,
        np.full(n, 10.0),
        np.full(n, 2.0),
        phase_deg * t * (t + 1) / 2,
        20.0,
        "test",
    )
    return DictionaryParameters(
        train, t1_range_ms=(200.0, 2000.0), t2_range_ms=(30.0, 300.0), step=0.2, b1_range=(0.9, 1.1)
    )


PARAMETERS = parameters_of(30)


@pytest.fixture(scope="module")
def built() -> Dictionary:
    return build_dictionary(PARAMETERS)


def assert_same(one: Dictionary, other: Dictionary) -> None:
    assert torch.equal(one.coefficients, other.coefficients)
    assert torch.equal(one.basis, other.basis)
    assert one.kept == other.kept
    for a, b in zip(one.grid.axes, other.grid.axes, strict=True):
        np.testing.assert_array_equal(a, b)


def never(_: object) -> Dictionary:
    raise AssertionError("built although it was kept")


@pytest.mark.parametrize("phase_deg", [0.0, 50.0], ids=["real", "complex"])
def test_what_was_kept_comes_back(tmp_path: Path, phase_deg: float) -> None:
    parameters = parameters_of(30, phase_deg)
    dictionary = build_dictionary(parameters)
    store = Store(tmp_path / "a" / "b", 1 << 20)
    assert store.load(parameters) is None
    store.save(parameters, dictionary)
    found = store.load(parameters)
    assert found is not None
    assert_same(found, dictionary)
    assert store.load(parameters_of(31, phase_deg)) is None
    (entry,) = store.entries()
    assert (entry.about["timepoints"], entry.about["atoms"]) == (30, len(dictionary.grid))
    assert [path.name for path in store.folder.iterdir()] == [file_name(parameters)]


def test_it_is_built_once(tmp_path: Path, built: Dictionary) -> None:
    warnings: list[str] = []
    store = Store(tmp_path, 1 << 20)
    calls = []

    def build(wanted: DictionaryParameters) -> Dictionary:
        calls.append(wanted)
        return built

    assert find_or_build(PARAMETERS, store, build, warnings.append) is built
    assert_same(find_or_build(PARAMETERS, store, never, warnings.append), built)
    assert (len(calls), warnings) == (1, [])


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("sprung",))


def _flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    place = raw.index(b"coefficients.npy") + 400
    raw[place] ^= 1
    path.write_bytes(bytes(raw))


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap()))


def _object_array(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, about=np.array(Trap(), dtype=object))


def _other_values(path: Path) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["coefficients"] = arrays["coefficients"] * 2
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _foreign(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, weights=np.ones(3))


def _other_dictionary(path: Path) -> None:
    other = parameters_of(31)
    Store(path.parent / "other", 1 << 20).save(other, build_dictionary(other))
    (path.parent / "other" / file_name(other)).replace(path)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-700]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no dictionary"),
    "one bit": _flip_a_byte,
    "other values": _other_values,
    "pickle": _pickled,
    "object array": _object_array,
    "foreign": _foreign,
    "another dictionary": _other_dictionary,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_said_and_replaced(
    damage: str, tmp_path: Path, built: Dictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path, 1 << 20)
    store.save(PARAMETERS, built)
    path = tmp_path / file_name(PARAMETERS)
    DAMAGE[damage](path)
    with pytest.raises(StoreError, match=f"{path.name} cannot be used"):
        store.load(PARAMETERS)
    warnings: list[str] = []
    assert find_or_build(PARAMETERS, store, lambda _: built, warnings.append) is built
    assert len(warnings) == 1
    assert "It is built anew" in warnings[0]
    assert_same(find_or_build(PARAMETERS, store, never, warnings.append), built)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, built: Dictionary) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    warnings: list[str] = []
    store = Store(in_the_way / "cache", 1 << 20)
    assert find_or_build(PARAMETERS, store, lambda _: built, warnings.append) is built
    assert len(warnings) == 2
    assert "cannot be read" in warnings[0]
    assert "cannot be kept" in warnings[1]
    assert "goes on without the cache" in warnings[1]


def test_a_full_disk_costs_the_cache_and_nothing_else(tmp_path: Path) -> None:
    # The kernel refuses to write more than this to a file, as a full disk does.
    code = f"""
import resource, signal
from pathlib import Path
from test_store import PARAMETERS, build_dictionary, find_or_build, Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
found = find_or_build(PARAMETERS, Store(Path({str(tmp_path)!r}), 1 << 20), build_dictionary, print)
print(len(found.grid))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
    )
    warning, atoms = done.stdout.splitlines()
    assert "cannot be kept" in warning
    assert "File too large" in warning
    assert int(atoms) == len(PARAMETERS.grid())
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_the_size_is_limited_and_the_oldest_go(tmp_path: Path) -> None:
    wanted = [parameters_of(n) for n in (30, 31, 32)]
    dictionaries = [build_dictionary(parameters) for parameters in wanted]
    Store(tmp_path, 1 << 20).save(wanted[0], dictionaries[0])
    one = (tmp_path / file_name(wanted[0])).stat().st_size
    store = Store(tmp_path, int(2.5 * one))
    store.save(wanted[1], dictionaries[1])
    for age, parameters in ((100, wanted[0]), (50, wanted[1])):
        os.utime(tmp_path / file_name(parameters), (time.time() - age,) * 2)
    assert store.load(wanted[0]) is not None  # now the latest used
    store.save(wanted[2], dictionaries[2])
    assert {path.name for path in tmp_path.iterdir()} == {file_name(wanted[0]), file_name(wanted[2])}
    with pytest.raises(StoreError, match="larger than the cache may be"):
        Store(tmp_path, one // 2).save(wanted[1], dictionaries[1])


def test_clear_removes_dictionaries_and_nothing_else(tmp_path: Path, built: Dictionary) -> None:
    store = Store(tmp_path, 1 << 20)
    store.save(PARAMETERS, built)
    (tmp_path / "notes.npz").write_text("mine")
    size = (tmp_path / file_name(PARAMETERS)).stat().st_size
    assert store.clear() == (1, size)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.npz"]
    assert store.clear() == (0, 0)
    assert Store(tmp_path / "nowhere", 1).clear() == (0, 0)


_SAVE = """
import sys
from pathlib import Path
from test_store import PARAMETERS, Store, build_dictionary
built = build_dictionary(PARAMETERS)
store = Store(Path(sys.argv[1]), 1 << 20)
print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    store.save(PARAMETERS, built)
    assert store.load(PARAMETERS) is not None
"""


def _saver(folder: Path, times: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _SAVE, str(folder), str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)


def test_processes_share_a_folder(tmp_path: Path, built: Dictionary) -> None:
    processes = [_saver(tmp_path, 60) for _ in range(3)]
    store = Store(tmp_path, 1 << 20)
    while any(process.poll() is None for process in processes):
        found = store.load(PARAMETERS)  # raises if it sees half a file
        if found is not None:
            assert_same(found, built)
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [file_name(PARAMETERS)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()


def test_a_killed_process_leaves_nothing_that_matters(tmp_path: Path, built: Dictionary) -> None:
    process = _saver(tmp_path, 100_000)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)
    process.kill()
    process.wait()
    process.stdout.close()
    store = Store(tmp_path, 1 << 20)
    found = store.load(PARAMETERS)
    assert found is None or torch.equal(found.basis, built.basis)
    # What it had begun to write goes when it is old.
    orphan = tmp_path / f".{file_name(PARAMETERS)[:-4]}-x.part"
    orphan.write_bytes(b"half")
    store.save(PARAMETERS, built)
    assert orphan.exists()
    os.utime(orphan, (time.time() - 7200,) * 2)
    store.save(PARAMETERS, built)
    assert not orphan.exists()


def test_what_was_just_written_is_kept(tmp_path: Path) -> None:
    wanted = [parameters_of(n) for n in (30, 31)]
    dictionaries = [build_dictionary(parameters) for parameters in wanted]
    Store(tmp_path, 1 << 20).save(wanted[0], dictionaries[0])
    first = tmp_path / file_name(wanted[0])
    os.utime(first, (time.time() + 100,) * 2)  # by another machine's clock
    Store(tmp_path, int(1.5 * first.stat().st_size)).save(wanted[1], dictionaries[1])
    assert [path.name for path in tmp_path.iterdir()] == [file_name(wanted[1])]


def test_a_shared_folder_can_be_read_by_others(tmp_path: Path, built: Dictionary) -> None:
    before = os.umask(0o022)
    try:
        Store(tmp_path, 1 << 20).save(PARAMETERS, built)
    finally:
        os.umask(before)
    assert (tmp_path / file_name(PARAMETERS)).stat().st_mode & 0o777 == 0o644


def test_other_code_makes_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    before = file_name(PARAMETERS)
    monkeypatch.setattr(store_module, "_code", lambda: b"an older version")
    assert file_name(PARAMETERS) != before


def test_names_that_no_path_can_have(built: Dictionary) -> None:
    warnings: list[str] = []
    assert find_or_build(PARAMETERS, Store(Path("a\0b"), 1 << 20), lambda _: built, warnings.append) is built
    assert len(warnings) == 2


def test_an_entry_that_says_nothing_of_itself(tmp_path: Path, built: Dictionary) -> None:
    store = Store(tmp_path, 1 << 20)
    store.save(PARAMETERS, built)
    with (tmp_path / file_name(PARAMETERS)).open("wb") as file:
        np.savez(file, about=np.array("[1]"))
    (entry,) = store.entries()
    assert "error" in entry.about
