"""`whorl batch`: plan, workers, progress, summary."""

from __future__ import annotations

import fcntl
import logging
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from whorl.cohort import summary
from whorl.cohort.cluster import Resources, connect, local_workers
from whorl.cohort.plan import Job, find_scans, key_of, plan, read_record, unfinished
from whorl.cohort.run import NoWorkersError
from whorl.cohort.run import run as run_jobs
from whorl.config import PATHS, Settings
from whorl.maps.images import colour_table
from whorl.scan.failure import ScanError

logger = logging.getLogger("whorl")


def run(
    inputs: Sequence[Path],
    output: Path,
    properties: Mapping[str, object],
    cluster: str,
    resources: Mapping[str, Any],
    *,
    recorded: bool,
    patience_s: float,
    dry_run: bool,
    say: Callable[[str], None],
    show: Callable[[str], None],
) -> int:
    """Reconstruct a cohort.

    Parameters
    ----------
    inputs
        Files and folders.
    output
        Folder of the results.
    properties
        Of the reconstruction.
    cluster, resources
        See `whorl.cohort.cluster.connect` and `Resources`.
    recorded, patience_s
        See `whorl.cohort.run.run`.
    dry_run
        Only show the plan.
    say, show
        Take a sentence for the user, on stderr and on stdout.

    Returns
    -------
    int
        0 all maps of all scans; 1 none; 3 something failed, is degraded or not finished.

    Raises
    ------
    ScanError
        If there are no scans, or the workers cannot be started.
    """
    colour_table("lipari")  # what is missing shall not wait for the first scan
    # A worker's current folder is another one.
    properties = {
        name: str(Path(str(value)).resolve()) if name in PATHS and value else value
        for name, value in properties.items()
    }
    settings = Settings.from_properties(properties)
    output = output.resolve()
    scans = find_scans([path.resolve() for path in inputs], output)
    key = key_of(settings, properties, recorded=recorded)
    if dry_run:
        return _show_plan(plan(scans, output, key), settings, _where(cluster, resources), show)
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        return _run(
            scans, output, key, properties, settings, cluster, resources,
            recorded=recorded, patience_s=patience_s, say=say, show=show,
        )  # fmt: skip


def _show_plan(jobs: Sequence[Job], settings: Settings, where: str, show: Callable[[str], None]) -> int:
    for job in jobs:
        show(f"{'run ' if job.why else 'skip'}  {job.name}  ({job.why or 'done'})")
    show(f"{len(unfinished(jobs))} of {len(jobs)} scans would be reconstructed, {where}")
    show("settings: " + (", ".join(f"{k}={v}" for k, v in settings.changed().items()) or "default"))
    return 0


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the folder of the results: two batches in it would take each other's work for leftovers."""
    with (output / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ScanError(
                f"another batch is at work in {output}: wait for its end, or give another folder"
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): do not start two batches in it", output, error)
        yield


def _run(
    scans: Mapping[str, Path],
    output: Path,
    key: str,
    properties: Mapping[str, object],
    settings: Settings,
    cluster: str,
    resources: Mapping[str, Any],
    *,
    recorded: bool,
    patience_s: float,
    say: Callable[[str], None],
    show: Callable[[str], None],
) -> int:
    jobs = plan(scans, output, key)
    waiting = unfinished(jobs)
    records = _done(jobs)
    if not waiting:
        show(f"all {len(jobs)} scans are done already: nothing to do")
        return _exit_code(jobs, records)
    told = Resources(**{**resources, "logs": output / ".logs"})
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with (
            tqdm(total=len(jobs), initial=len(records), unit="scan", disable=None, file=sys.stderr) as bar,
            connect(cluster, told) as client,
        ):
            for job, record in run_jobs(
                client,
                waiting,
                properties,
                recorded=recorded,
                patience_s=patience_s,
                say=lambda text: tqdm.write(f"whorl: {text}", file=sys.stderr),
            ):
                records[job.name] = record
                bar.update()
                tqdm.write(_line(len(records), len(jobs), job.name, record), file=sys.stderr)
    except KeyboardInterrupt:
        say("stopped; the same command goes on where it was")
    except NoWorkersError as error:
        say(f"{error}; the same command goes on where it was")
    finally:
        signal.signal(signal.SIGTERM, before)
        # What a worker had written when the stop came counts, told or not.
        records = _done(plan(scans, output, key)) | records
        table = summary.rows(jobs, records)
        paths = summary.write(table, output, settings.changed())
    states = Counter(row["state"] for row in table)
    show(", ".join(f"{n} {state}" for state, n in states.most_common()) + f"; {paths[1]}")
    return _exit_code(jobs, records)


def _done(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    return {job.name: record for job in jobs if not job.why and (record := read_record(job.record))}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _where(cluster: str, resources: Mapping[str, Any]) -> str:
    told = Resources(**resources)
    if cluster == "local":
        workers, cores, gpus = local_workers(told)
        return f"{workers} at a time on this machine, {cores} cores each, {len(gpus)} GPUs"
    if cluster == "slurm":
        each = f"{told.cores or 1} cores, {told.gpus} GPUs, {told.memory}"
        return f"{told.workers or 2} at a time on SLURM, {each} each"
    return f"by the workers of {cluster}"


def _line(n: int, total: int, name: str, record: Mapping[str, Any]) -> str:
    said = record["texts"][0] if record["texts"] else ""
    seconds = f"{record['seconds']:.1f} s" if "seconds" in record else ""
    return "  ".join(
        part for part in (f"[{n:>{len(str(total))}}/{total}]", record["state"], name, seconds, said) if part
    )


def _exit_code(jobs: Sequence[object], records: Mapping[str, Mapping[str, Any]]) -> int:
    codes = [record["exit_code"] for record in records.values()]
    if all(code == 1 for code in codes):
        return 1
    return 3 if any(codes) or len(codes) < len(jobs) else 0
