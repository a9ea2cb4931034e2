"""What a cohort consists of, and which of its scans are still to be reconstructed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from whorl import __version__
from whorl.config import FILES, LOCAL, Settings
from whorl.doors.files import is_result
from whorl.scan.failure import ScanError

#: What is taken for a scan in a folder; a file that is named is one, whatever its name.
SUFFIXES = (".h5", ".hdf5", ".mrd")
#: Names of the cohort's own files in the folder of the results.
SUMMARY = ("summary.csv", "summary.html")


@dataclass(frozen=True, slots=True)
class Job:
    """One scan of a cohort.

    Parameters
    ----------
    name
        What it is called in the cohort: its path below the folder that was given, without suffix.
    scan
        Where it is.
    result, record
        Maps (MRD) and what is known about their making (JSON), both below the folder of the results.
    key
        Hash of the settings, of the files that they name, and of whorl's version.
    why
        Why it is to be reconstructed; empty if it is done.
    """

    name: str
    scan: Path
    result: Path
    record: Path
    key: str
    why: str


def find_scans(inputs: Iterable[Path], results: Path) -> dict[str, Path]:
    """Scans by their names in the cohort: the files, and those in folders; results are none.

    Raises
    ------
    ScanError
        If there are none, or two would have one name.
    """
    inputs, results = list(inputs), results.resolve()
    found: dict[str, Path] = {}
    for given in inputs:
        if given.is_dir():
            # Where the scans themselves lie below the folder of the results, that tells nothing.
            apart = results != given.resolve() and results.is_relative_to(given.resolve())
            paths = [
                path
                for path in sorted(given.rglob("*"))
                if path.suffix.lower() in SUFFIXES
                and path.is_file()
                and not any(part.startswith(".") for part in path.relative_to(given).parts)
                and not (apart and path.resolve().is_relative_to(results))
                and not is_result(path)
            ]
            named = [(path.relative_to(given), path) for path in paths]
        else:
            named = [(Path(given.name), given)]
        for relative, path in named:
            known = relative.suffix.lower() in SUFFIXES  # sub.01 and sub.02 are two
            name = (relative.with_suffix("") if known else relative).as_posix()
            other = found.setdefault(name, path)
            if other.resolve() != path.resolve():
                raise ScanError(
                    f"two scans would be called {name}: {other} and {path}. Give the folder that holds both, "
                    f"or rename one"
                )
    if not found:
        places = ", ".join(str(given) for given in inputs)
        raise ScanError(f"no scans in {places}: expected files ending in {', '.join(SUFFIXES)}")
    return dict(sorted(found.items()))


def key_of(settings: Settings, given: Iterable[str], *, recorded: bool) -> str:
    """Hash of all that decides on a result beside the scan: settings, the files they name, the version.

    Parameters
    ----------
    settings
        All of them.
    given
        Names of those that were set: they count more than what was recorded with a scan, defaults do not.
    recorded
        Whether what was recorded with a scan counts at all.
    """
    values: dict[str, Any] = asdict(settings)
    for name in LOCAL:
        if name not in FILES:
            del values[name]
        elif path := values[name]:
            try:
                values[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            except OSError as error:
                raise ScanError(f'property "{name}": {path} cannot be read: {error.strerror}') from error
    told = {"version": __version__, "given": sorted(set(given) & values.keys()), "recorded": recorded}
    text = json.dumps({**told, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(scan: Path) -> dict[str, int]:
    """What tells a changed scan from an unchanged one without reading it."""
    found = scan.stat()
    return {"size": found.st_size, "modified_ns": found.st_mtime_ns}


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a scan; ``None`` if there is none, or it cannot be read."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def plan(scans: Mapping[str, Path], results: Path, key: str) -> list[Job]:
    """The jobs of a cohort in the order of their names, those that are done included."""
    jobs = []
    for name, scan in scans.items():
        # Not with_suffix: a name may have points of its own.
        result, record = (results / f"{name}{suffix}" for suffix in (".h5", ".json"))
        if result.resolve() == scan.resolve():
            raise ScanError(f"{scan} lies where its own result would: give another folder for the results")
        jobs.append(Job(name, scan, result, record, key, _why(scan, result, read_record(record), key)))
    return jobs


def _why(scan: Path, result: Path, record: Mapping[str, Any] | None, key: str) -> str:
    if record is None:
        return "new"
    if record.get("state") == "failed":
        return "failed before"
    if not result.is_file():
        return "its result is gone"
    if result.stat().st_size != record.get("result_size"):
        return "its result has changed"
    if record.get("fingerprint") != fingerprint(scan):
        return "the scan has changed"
    if record.get("key") != key:
        return "made with other settings"
    return ""


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are still to be done."""
    return [job for job in jobs if job.why]
