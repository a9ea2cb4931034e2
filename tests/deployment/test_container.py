"""The images of `docker/`, built and run by a real engine as on a recon server."""

from __future__ import annotations

import json
import socket
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from deployment.engine import BASE, HARDENED, ROOT, Engine, answers, output_of
from doors.gadgetron_parent import external, talk
from doors.processes import Client, wait_until
from scan_edit import Scan
from whorl.doors.client import ping
from whorl.doors.files import read_images
from whorl.doors.replaying import replay

pytestmark = pytest.mark.system

#: Between a container's packages and this Python's: other builds of NumPy, FINUFFT and BLAS round otherwise.
_TOLERANCE = 1e-3


def _maps(path: Path) -> dict[int, np.ndarray]:
    return {image.image_series_index: image.data.astype(float) for image in read_images(path)}


def test_image_runs_as_nobody_and_keeps_no_secrets(engine: Engine, image: str) -> None:
    config = json.loads(engine.state(image, "{{json .Config}}"))
    assert config["User"] == "10001:10001"
    assert list(config["Volumes"]) == ["/var/lib/whorl"]
    assert config["Healthcheck"]["Test"] == ["CMD", "whorl", "ping"]
    found = engine.docker(
        "run", "--rm", *HARDENED, "--entrypoint", "sh", image, "-c",
        "id -u; ls -A /src /root/.cache 2>/dev/null; cat /etc/pip.conf 2>/dev/null; "
        "touch /etc/written 2>/dev/null || echo refused; touch /var/lib/whorl/cache/written && echo kept; "
        "grep CapEff /proc/self/status",
    )  # fmt: skip
    assert found.split() == ["10001", "refused", "kept", "CapEff:", "0000000000000000"]
    # PyTorch without CUDA; with it there are 4 GB more.
    assert int(engine.state(image, "{{.Size}}")) < 2.5e9


def test_scan_streamed_from_outside_comes_back_right(
    engine: Engine, image: str, port: int, tiny_scan: Path, tmp_path: Path
) -> None:
    out, alone = tmp_path / "out.h5", tmp_path / "alone.h5"
    with engine.running(
        image, *HARDENED, "--health-interval=1s", "--env", f"WHORL_SERVE_PORT={port}",
        "--env", "WHORL_PROPERTY_METHOD=lowrank", "--env", "WHORL_PROPERTY_SPOOL=/var/lib/whorl/spool",
    ) as container:  # fmt: skip
        wait_until(lambda: answers(port))
        said = output_of(
            sys.executable, "-m", "whorl", "replay", tiny_scan, "-o", out, "--address", f"127.0.0.1:{port}",
            env={"PATH": "", "PYTHONPATH": str(ROOT / "gadgets")},
        )  # fmt: skip
        assert "ERR" not in said
        wait_until(lambda: engine.state(container, "{{.State.Health.Status}}") == "healthy")
        assert engine.docker("exec", container, "ls", "/var/lib/whorl/spool").strip()
        assert "ERR" not in engine.docker("logs", container)
    replay(tiny_scan, alone, {"method": "lowrank"}, lambda *_: None)
    theirs, ours = _maps(out), _maps(alone)
    assert theirs.keys() == ours.keys() == {1, 2, 3, 4}
    for series, expected in ours.items():
        assert np.linalg.norm(theirs[series] - expected) < _TOLERANCE * np.linalg.norm(expected)
    assert {image.meta["whorl_method"] for image in read_images(out)} == {"lowrank"}


def test_stopped_within_a_scan_it_tells_the_client_and_ends(
    engine: Engine, image: str, port: int, scan: Scan
) -> None:
    with engine.running(image, *HARDENED, command=("serve", "--port", str(port))) as container:
        wait_until(lambda: answers(port))
        with Client(port) as client:
            client.open(scan.header)
            client.send(islice(scan.readouts(), 60))
            wait_until(lambda: any("1 of 4" in text for text in [ping(port=port)]))
            began = time.monotonic()
            engine.docker("stop", container)
            took = time.monotonic() - began
            answer = client.answer()
        # The engine would kill it after ten: the limit is a promise to it, no benchmark.
        assert took < 5
        assert answer.texts[-1] == "ERR the server was stopped before the scan was ready: send it again"
        # A scan was given up; killed by the engine it would be 137.
        assert engine.state(container, "{{.State.ExitCode}}") == "1"


def test_settings_come_from_a_file_too(
    engine: Engine, image: str, port: int, tiny_scan: Path, tmp_path: Path
) -> None:
    config = tmp_path / "site.xml"
    config.write_text(
        '<configuration><property name="method" value="lowrank"/>'
        '<property name="output_dtype" value="float32"/></configuration>'
    )
    config.chmod(0o644)
    out = tmp_path / "out.h5"
    with engine.running(
        image, *HARDENED, "--volume", f"{config}:/etc/whorl.xml:ro",
        "--env", "WHORL_SERVE_CONFIG=/etc/whorl.xml", "--env", f"WHORL_SERVE_PORT={port}",
    ):  # fmt: skip
        wait_until(lambda: answers(port))
        output_of(
            sys.executable, "-m", "whorl", "replay", tiny_scan, "-o", out, "--address", f"127.0.0.1:{port}",
            env={"PATH": "", "PYTHONPATH": str(ROOT / "gadgets")},
        )  # fmt: skip
    images = read_images(out)
    assert {image.meta["whorl_method"] for image in images} == {"lowrank"}
    assert {image.data.dtype for image in images} == {np.dtype(np.float32)}


def test_wrong_setting_stops_the_container_with_its_reason(engine: Engine, image: str) -> None:
    with engine.running(image, *HARDENED, "--env", "WHORL_PROPERTY_METOD=llr") as container:
        wait_until(lambda: engine.state(container) == "exited")
        assert engine.state(container, "{{.State.ExitCode}}") == "2"
        assert 'did you mean "method"' in engine.docker("logs", container)


def test_gadgetron_image_starts_the_external(engine: Engine, index: str, scan: Scan) -> None:
    """Its install steps, in the plain base; Gadgetron's part is played from outside."""
    engine.build(
        "Dockerfile.gadgetron",
        "whorl-gadgetron",
        BASE=BASE,
        TORCH_INDEX=index,
        GADGETRON_HOME="/opt/gadgetron",
    )
    listed = engine.docker(
        "run",
        "--rm",
        "--network",
        "host",
        "whorl-gadgetron",
        "ls",
        "-L",
        "/opt/gadgetron/share/gadgetron/config",
    )
    assert set(listed.split()) == {path.name for path in (ROOT / "config_xml").glob("*.xml")}
    # Its entry point activates an environment, whose Python would come first.
    activated = engine.docker(
        "run", "--rm", "--network", "host", "whorl-gadgetron", "sh", "-c",
        "PATH=/opt/gadgetron/bin:/usr/bin:/bin; . /opt/gadgetron/etc/conda/activate.d/zz_whorl.sh; "
        "command -v python",
    )  # fmt: skip
    assert activated.strip() == "/opt/whorl/bin/python"
    node, configuration = external("whorl", {"method": "lowrank"})
    execute = node.find("execute")
    assert execute is not None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        port = str(listener.getsockname()[1])
        command = ("python", "-m", "gadgetron", port, execute.attrib["name"], execute.attrib["target"])
        with engine.running("whorl-gadgetron", "--network", "host", command=command) as container:
            connection, _ = listener.accept()
            with connection:
                said = talk(connection, configuration, scan.header, scan.readouts(), close=True, wait_s=60)
            assert (said.ended, said.errors, len(said.images)) == ("close", [], 4), engine.docker(
                "logs", container
            )


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gadgetron"])
def test_dockerfile_is_clean(name: str) -> None:
    output_of(Path(sys.executable).with_name("hadolint"), ROOT / "docker" / name)


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]])
def test_compose_files_hold_together(files: list[str]) -> None:
    compose = Path(sys.executable).with_name("docker-compose")
    chosen = [word for name in files for word in ("-f", ROOT / "docker" / name)]
    whole = json.loads(output_of(compose, *chosen, "config", "--format", "json"))
    service = whole["services"]["whorl"]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["restart"] == "unless-stopped"
    devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    assert [device["capabilities"] for device in devices] == [["gpu"]] * (len(files) - 1)


def test_compose_starts_the_server(engine: Engine, image: str, port: int, tmp_path: Path) -> None:
    """The service as it is, but in the host's network: here is no other."""
    override = tmp_path / "here.yaml"
    override.write_text(
        "services:\n  whorl:\n    network_mode: !override host\n"
        f"    environment: {{WHORL_SERVE_PORT: '{port}'}}\n  gadgetron: !reset null\n"
    )
    compose = [
        Path(sys.executable).with_name("docker-compose"), "--project-name", "whorltest",
        "-f", ROOT / "docker/compose.yaml", "-f", override,
    ]  # fmt: skip
    try:
        output_of(*compose, "up", "--detach", "--no-build", env=engine.environment)
        wait_until(lambda: answers(port))
    finally:
        output_of(*compose, "down", "--volumes", env=engine.environment)


def test_kubernetes_manifest_is_valid() -> None:
    said = output_of(
        Path(sys.executable).with_name("kubernetes-validate"), "--strict", ROOT / "docker/kubernetes.yaml"
    )
    assert said.count("passed for resource") == 3, said
