"""A SLURM cluster of two nodes on this machine."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from doors.processes import wait_until

_CONFIGURATION = """
ClusterName=whorl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=8000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def own_slurm() -> Iterator[dict[str, str]]:
    """Start it; the environment in which its commands find it."""
    programs = ("slurmctld", "slurmd", "munged", "sbatch")
    places = os.pathsep.join((os.environ["PATH"], "/usr/sbin"))
    found = {program: shutil.which(program, path=places) for program in programs}
    missing = [program for program, path in found.items() if path is None]
    assert not missing, f"{missing} missing: apt-get install slurmctld slurmd slurm-client munge"
    with (
        tempfile.TemporaryDirectory(prefix="whorl-slurm-", ignore_cleanup_errors=True) as name,
        ExitStack() as s,
    ):
        folder = Path(name)
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        configuration = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        configuration.write_text(_CONFIGURATION.format(host=host, folder=folder, ports=_free_ports(3)))
        environment = {**os.environ, "SLURM_CONF": str(configuration)}

        def start(program: str, *arguments: str) -> None:
            with (folder / f"{program}.out").open("ab") as log:
                process = subprocess.Popen(
                    [str(found[program]), *arguments], stdout=log, stderr=log, env=environment
                )
            s.callback(_end, process)

        start(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock",
            f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log",
            f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        wait_until((folder / "munge.sock").exists)
        start("slurmctld", "-D", "-c", "-f", str(configuration))
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-N", node, "-f", str(configuration))

        def ready() -> bool:
            said = subprocess.run(
                ["sinfo", "--noheader", "--format=%t %D"], capture_output=True, text=True, env=environment,
                timeout=60, check=False,
            )  # fmt: skip
            return said.stdout.split() == ["idle", "2"]

        wait_until(ready)
        s.callback(_no_jobs, environment)
        yield environment


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    process.kill()
    process.wait()


def _no_jobs(environment: dict[str, str]) -> None:
    subprocess.run(["scancel", "--user=root"], env=environment, timeout=60, check=False)

    def none_left() -> bool:
        said = subprocess.run(
            ["squeue", "--noheader"], capture_output=True, text=True, env=environment, timeout=60, check=False
        )
        return not said.stdout.strip()

    wait_until(none_left)


def _free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        return [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(n)
        ]
