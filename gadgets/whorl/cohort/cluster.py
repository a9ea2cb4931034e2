"""Workers on this machine, on a SLURM cluster, or behind a Dask scheduler that runs already."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, Security, WorkerPlugin

from whorl.cohort.work import prepare
from whorl.scan.failure import ScanError

#: What Dask puts into the environment of its workers, and here does not: memory that goes back to the system
#: at once costs a reconstruction half its time again, and the threads are settled by `prepare`.
_ENVIRON = "distributed.nanny.pre-spawn-environ"
_UNSET = dict.fromkeys(
    ("MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
)
#: A scheduler listens for browsers in any case: here only, at a free port, and without pages.
_NO_PAGES = "127.0.0.1:0"
#: A scan that has taken so many workers with it is given up.
_KILLED_WORKERS = 2


@dataclass(frozen=True, slots=True)
class Resources:
    """What the workers are given.

    Parameters
    ----------
    workers
        Their number; 0: one for each GPU of this machine, else one for each two of its cores.
    cores
        Of each worker; 0: this machine's cores shared out, on SLURM one.
    memory
        Of each worker on SLURM, for instance ``8GB``.
    gpus
        Of each worker on SLURM.
    walltime, partition
        Of the SLURM jobs; empty: what Dask's configuration says.
    sbatch
        Further options of sbatch, for instance ``--account=mri``.
    interface
        Network interface by which scheduler and workers reach each other; empty: the default route's.
    logs
        Folder for the output of the SLURM jobs, on a file system that they share.
    """

    workers: int = 0
    cores: int = 0
    memory: str = "8GB"
    gpus: int = 0
    walltime: str = ""
    partition: str = ""
    sbatch: tuple[str, ...] = ()
    interface: str = ""
    logs: Path = Path()


def local_gpus() -> tuple[str, ...]:
    """Names by which CUDA knows the GPUs of this machine that may be used."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return tuple(name.strip() for name in allowed.split(",") if name.strip())
    folder = Path("/proc/driver/nvidia/gpus")
    return tuple(str(n) for n in range(len(list(folder.iterdir())))) if folder.is_dir() else ()


def local_workers(resources: Resources) -> tuple[int, int, tuple[str, ...]]:
    """Workers on this machine, cores of each, and the GPUs that they share out."""
    gpus = local_gpus()
    n_cores = len(os.sched_getaffinity(0))
    workers = resources.workers or len(gpus) or max(1, n_cores // 2)
    return workers, resources.cores or max(1, n_cores // workers), gpus


@contextmanager
def connect(cluster: str, resources: Resources) -> Iterator[Client]:
    """A client of the workers; those that were started for it end with it.

    What scheduler and workers send each other is executed by them: those that are started here speak TLS with
    keys that are made for this run alone.

    Parameters
    ----------
    cluster
        ``local``, ``slurm`` or the address of a scheduler.

    Raises
    ------
    ScanError
        If they cannot be started or reached.
    """
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    logging.getLogger("dask_jobqueue").setLevel(logging.ERROR)
    changed = {
        "distributed.scheduler.allowed-failures": _KILLED_WORKERS - 1,
        _ENVIRON: _UNSET,
        # A look at each worker's stack a hundred times a second, for a page that is not shown.
        "distributed.worker.profile.enabled": False,
        # Their pages are open to whoever reaches them, and name the scans.
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
    }
    with dask.config.set(changed):
        if cluster == "local":
            workers, cores, gpus = local_workers(resources)
            with (
                LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    dashboard_address=_NO_PAGES,
                    scheduler_kwargs={"dashboard": False},
                    security=Security.temporary(),
                    silence_logs=logging.CRITICAL,
                ) as started,
                Client(started) as client,
            ):
                client.register_plugin(_Prepare(cores, gpus))
                yield client
        elif cluster == "slurm":
            with _slurm(resources) as started, Client(started) as client:
                client.register_plugin(_Prepare(resources.cores or 1, ()))
                yield client
        else:
            try:
                client = Client(cluster, timeout=30)
            except (OSError, ValueError) as error:
                raise ScanError(
                    f"no Dask scheduler answers at {cluster} ({error}): expected local, slurm or an address "
                    f"such as tcp://host:8786"
                ) from error
            with client:
                client.register_plugin(_Prepare(resources.cores, ()))
                yield client


class _Prepare(WorkerPlugin):
    """Settles cores and GPU of each worker; also of one that takes the place of a dead one."""

    name = "whorl-prepare"

    def __init__(self, cores: int, gpus: tuple[str, ...]) -> None:
        self._cores = cores
        self._gpus = gpus

    def setup(self, worker: Any) -> None:
        prepare(self._cores, self._gpus, str(worker.name))


@contextmanager
def _slurm(resources: Resources) -> Iterator[Any]:
    from dask_jobqueue.slurm import SLURMCluster

    workers = resources.workers or 2
    directives = list(resources.sbatch)
    if resources.gpus:
        directives.append(f"--gres=gpu:{resources.gpus}")
    told: dict[str, Any] = {
        "queue": resources.partition,
        "walltime": resources.walltime,
        "interface": resources.interface,
    }
    # The files of the keys, which nobody else can read, are removed as this process ends.
    warnings.filterwarnings("ignore", r"unclosed file .*dask-jobqueue\.worker", ResourceWarning)
    resources.logs.mkdir(parents=True, exist_ok=True)
    try:
        with SLURMCluster(
            # One scan at a time, with all cores of its job.
            cores=1,
            processes=1,
            job_cpu=resources.cores or 1,
            memory=resources.memory,
            security=Security.temporary(),
            shared_temp_directory=str(resources.logs),
            log_directory=str(resources.logs),
            scheduler_options={"dashboard_address": _NO_PAGES, "dashboard": False},
            worker_extra_args=["--no-dashboard"],
            job_script_prologue=[
                f"export DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON={shlex.quote(repr(_UNSET))}",
                "export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False",
                "export DASK_DISTRIBUTED__WORKER__HTTP__ROUTES='[]'",
            ],
            job_extra_directives=directives,
            **{name: value for name, value in told.items() if value},
        ) as cluster:
            _check_submission(cluster.job_script())
            # A job that ends, by its time or by force, is submitted anew.
            cluster.adapt(minimum=workers, maximum=workers, interval="1s")
            yield cluster
    except FileNotFoundError as error:
        raise ScanError(f"{error.filename} was not found: expected SLURM's commands on PATH") from error


def _check_submission(script: str) -> None:
    """Raise if SLURM would not take the job; Dask itself logs that and waits for ever."""
    tried = subprocess.run(
        ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=120, check=False
    )
    if tried.returncode:
        raise ScanError(f"SLURM does not take the jobs: {tried.stderr.strip()}")
