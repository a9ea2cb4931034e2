"""The summary of a cohort: a table for programs (CSV) and a page for people (HTML)."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

from whorl import __version__
from whorl.cohort.plan import SUMMARY, Job

_COLUMNS = (
    "name",
    "state",
    "exit_code",
    "method",
    "slices",
    "images",
    "t1_median_ms",
    "t2_median_ms",
    "quality_median",
    "seconds",
    "worker",
    "scan",
    "result",
    "texts",
)
_TEMPLATE = Path(__file__).with_name("summary.html.jinja")
NOT_FINISHED = "not finished"


def rows(jobs: Sequence[Job], records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each scan, in the order of their names; those without a record are not finished."""
    found = []
    for job in jobs:
        record = records.get(job.name)
        row: dict[str, Any] = dict(record) if record is not None else {"state": NOT_FINISHED}
        row |= {"name": job.name, "scan": str(job.scan), "link": quote(os.fsencode(f"{job.name}.h5"))}
        row |= {f"{q}_median_ms": row.get(f"{q}_median") for q in ("t1", "t2")}
        row["result"] = f"{job.name}.h5" if row["state"] not in ("failed", NOT_FINISHED) else ""
        row["texts"] = list(row.get("texts", ()))
        found.append(row)
    return found


def write(table: Sequence[Mapping[str, Any]], folder: Path, settings: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write both files, each in one step.

    Parameters
    ----------
    table
        See `rows`.
    folder
        Of the results.
    settings
        Properties that differ from their defaults.

    Returns
    -------
    tuple
        Paths of the CSV and of the HTML.
    """
    import jinja2

    paths = folder / SUMMARY[0], folder / SUMMARY[1]
    parts = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in paths]
    # Names of files need not be text.
    with parts[0].open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in table:
            writer.writerow({**row, "texts": " | ".join(row["texts"])})
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        rows=table,
        states=Counter(row["state"] for row in table),
        settings=settings,
        version=__version__,
        moment=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    parts[1].write_text(page, encoding="utf-8", errors="backslashreplace")
    for part, path in zip(parts, paths, strict=True):
        part.replace(path)
    return paths
