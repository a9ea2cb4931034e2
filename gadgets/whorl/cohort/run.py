"""A cohort from its plan to its summary."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from distributed import CancelledError, Client, Future, wait

from whorl.cohort.plan import Job, fingerprint
from whorl.cohort.work import failed, work, write_record

Say = Callable[[str], None]
#: Without any worker this is said so often.
_REMINDER_S = 60.0
_LOST = ("cancelled", "lost")


class NoWorkersError(Exception):
    """No worker has come for too long, or the scheduler is gone; the text says which."""


def run(
    client: Client,
    jobs: Sequence[Job],
    properties: Mapping[str, object],
    *,
    recorded: bool,
    patience_s: float,
    say: Say,
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Reconstruct scans on the workers; each with its record as soon as it is ready.

    A scan whose worker dies is given to another one; if it takes that with it too it has failed.

    Parameters
    ----------
    client
        Of the workers, see `whorl.cohort.cluster.connect`.
    jobs
        What is to be done.
    properties
        Of the reconstruction, the same for all.
    recorded
        See `whorl.doors.replaying.replay`.
    patience_s
        So long there may be no worker at all.
    say
        Takes a sentence for the user.

    Raises
    ------
    NoWorkersError
        If there was none for so long. What was ready before has been returned.
    """
    futures: dict[Future[Any], Job] = {
        client.submit(work, job, dict(properties), recorded, key=_key_of(job), pure=False): job
        for job in jobs
    }
    seen = said = time.monotonic()
    while futures:
        try:
            done = wait(list(futures), timeout=1.0, return_when="FIRST_COMPLETED").done
        except (TimeoutError, CancelledError):
            done = {future for future in futures if future.status in _LOST}
        if client.status != "running":
            # What was not told yet is not lost for that: a record that was written counts.
            raise NoWorkersError(f"the connection to the scheduler is {client.status}")
        for future in done:
            job = futures.pop(future)
            yield job, _record_of(future, job)
        now = time.monotonic()
        if done or client.scheduler_info(n_workers=-1)["workers"]:
            seen = said = now
        elif now - seen > patience_s:
            raise NoWorkersError(f"no worker has come for {patience_s:.0f} s")
        elif now - said > _REMINDER_S:
            said = now
            say(f"no worker for {now - seen:.0f} s; on SLURM, squeue says what the jobs wait for")


def _key_of(job: Job) -> str:
    # Not the name itself, which need not be text, and may be that of a patient.
    return f"whorl-{hashlib.sha256(os.fsencode(job.name)).hexdigest()[:16]}-{job.key}"


def _record_of(future: Future[Any], job: Job) -> dict[str, Any]:
    if future.status == "finished":
        made: dict[str, Any] = future.result()
        return made
    if future.status in _LOST:
        text = "the scheduler has lost it"
    else:
        error = future.exception()
        text = f"{type(error).__name__}: {error}"
        if type(error).__name__ == "KilledWorker":
            text = "its workers died with it, the last one too: perhaps it needs more memory"
    record = failed(job, fingerprint(job.scan) if job.scan.is_file() else {}, [f"ERR {text}"])
    try:
        job.result.unlink(missing_ok=True)
        write_record(job.record, record)
    except OSError as problem:  # it shall not cost the others: the summary tells of it
        record["texts"].append(f"ERR its record cannot be written: {problem}")
    return record
