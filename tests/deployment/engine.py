"""A Docker engine of the tests' own, with a base image made from Debian's packages: no registry is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from doors.processes import wait_until
from whorl.doors.client import ping
from whorl.scan.failure import ScanError

ROOT = Path(__file__).parents[2]
#: Debian's: another client that comes first on PATH may be too old for the engine.
DOCKER = "/usr/bin/docker"
BASE = "debian:bookworm-slim"
#: How a recon server runs it.
HARDENED = ("--network", "host", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
_BUILD_S = 900
#: Of a site that has an index of packages of its own; neither stays in the image.
_SECRETS = {"pipconf": Path("/etc/pip.conf"), "ca": Path("/etc/ssl/certs/ca-certificates.crt")}
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


def answers(port: int) -> bool:
    """Whether a server on this machine answers a ping."""
    try:
        ping(port=port, timeout_s=10)
    except ScanError:
        return False
    return True


def output_of(*command: object, timeout_s: float = 120, **options: object) -> str:
    """What a command prints; raises with all that it said if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}")
    return str(done.stdout)


@dataclass(frozen=True)
class Engine:
    """A running Docker engine."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        # Programs that call docker shall find the same client.
        path = os.pathsep.join((str(Path(DOCKER).parent), os.environ["PATH"]))
        return {
            **os.environ,
            "PATH": path,
            "DOCKER_HOST": f"unix://{self.folder}/sock",
            "DOCKER_BUILDKIT": "1",
        }

    def docker(self, *arguments: object, timeout_s: float = 120) -> str:
        return output_of(DOCKER, *arguments, timeout_s=timeout_s, env=self.environment)

    def build(self, dockerfile: str, tag: str, **arguments: str) -> str:
        """Build an image of this project as a site does; what the engine said."""
        secrets = [
            f"--secret=id={name},src={path}" for name, path in sorted(_SECRETS.items()) if path.is_file()
        ]
        proxies = [f"--build-arg={name}" for name in _PROXIES if name in os.environ]
        given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        return self.docker(
            "build", "--network=host", "--progress=plain", *secrets, *proxies, *given,
            "-t", tag, "-f", ROOT / "docker" / dockerfile, ROOT,
            timeout_s=_BUILD_S,
        )  # fmt: skip

    @contextmanager
    def running(self, image: str, *options: object, command: tuple[str, ...] = ()) -> Iterator[str]:
        """A container, removed with its volumes at the end; its id."""
        container = self.docker("run", "--detach", *options, image, *command).strip()
        try:
            yield container
        finally:
            self.docker("rm", "--force", "--volumes", container)

    def state(self, container: str, template: str = "{{.State.Status}}") -> str:
        return self.docker("inspect", "--format", template, container).strip()


@contextmanager
def own_engine() -> Iterator[Engine]:
    """Start an engine with the base image, and remove all that it kept in the end."""
    for program in (DOCKER, "/usr/sbin/dockerd", "/usr/sbin/debootstrap"):
        assert Path(program).exists(), f"{program} is missing: apt-get install docker.io debootstrap iptables"
    folder = Path(tempfile.mkdtemp(prefix="whorl-docker-"))
    engine = Engine(folder)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["/usr/sbin/dockerd", f"--data-root={folder}/data", f"--exec-root={folder}/exec",
             f"--pidfile={folder}/pid", f"--host=unix://{folder}/sock", "--storage-driver=overlay2",
             "--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false",
             "--ip-masq=false"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        output_of(
            "/usr/sbin/debootstrap", "--variant=minbase", "bookworm", folder / "base", timeout_s=_BUILD_S
        )

        def ready() -> bool:
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            with suppress(AssertionError):
                engine.docker("version")
                return True
            return False

        wait_until(ready)
        output_of(
            "sh", "-c",
            f"tar -C {folder}/base --exclude='./var/cache/apt/archives/*.deb' "
            f"--exclude='./var/lib/apt/lists/*' -c . | {DOCKER} import - {BASE}",
            timeout_s=_BUILD_S, env=engine.environment,
        )  # fmt: skip
        yield engine
    finally:
        process.terminate()
        process.wait(60)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for place in sorted((place for place in mounts if place.startswith(f"{folder}/")), reverse=True):
            output_of("umount", place)
        shutil.rmtree(folder)


@contextmanager
def torch_index() -> Iterator[str]:
    """Address of an index that has PyTorch as this Python's pip finds it, by variants as the original has."""
    with tempfile.TemporaryDirectory(prefix="whorl-index-") as name:
        pins = (ROOT / "docker/constraints/cpu.txt").read_text().splitlines()
        torch = next(line for line in pins if line.startswith("torch=="))
        output_of(
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
            "--dest", f"{name}/cpu/torch", torch,
            timeout_s=_BUILD_S,
        )  # fmt: skip
        with subprocess.Popen(
            [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", name],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ) as server:  # fmt: skip
            try:
                assert server.stdout is not None
                line = server.stdout.readline()  # Serving HTTP on 127.0.0.1 port 40000 (http://…) ...
                yield line.partition("(")[2].partition("/)")[0]
            finally:
                server.kill()
