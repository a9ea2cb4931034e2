"""The package as the platform takes it: unpacked, its archive loaded, its container asked."""

from __future__ import annotations

import base64
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import whorl
from deployment.engine import ROOT, Engine, answers, output_of
from doors.processes import send_scan, wait_until
from scan_edit import Scan
from whorl.openrecon.metadata import LABEL, PORT
from whorl.openrecon.package import classic

pytestmark = pytest.mark.system

_STEM = f"OpenRecon_Uni-Ulm_whorl_V{whorl.__version__}"


@pytest.fixture(scope="module")
def package(engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made with a train of the site's own, and a value that shells and Dockerfiles would mistake."""
    folder = tmp_path_factory.mktemp("package")
    train = folder / "our train.csv"
    train.write_text("flip_deg,tr_ms,te_ms\n" + "10,12,3\n" * 50)
    output_of(
        sys.executable, "-m", "whorl", "openrecon", "package", "--vendor", "Uni-Ulm", "--image", image,
        "-o", folder, "-p", f"sequence={train}", "-p", "slice_profile=1 0.9 0.5", "-p", "method=lowrank",
        timeout_s=600, env=engine.environment | {"PYTHONPATH": str(ROOT / "gadgets")},
    )  # fmt: skip
    return folder / f"{_STEM}.zip"


@pytest.fixture(scope="module")
def unpacked(package: Path) -> Path:
    folder = package.parent / "unpacked"
    with zipfile.ZipFile(package) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_DEFLATED}
        archive.extractall(folder)
    return folder


def test_names_are_those_that_the_platform_checks(package: Path, unpacked: Path) -> None:
    assert {path.name for path in unpacked.iterdir()} == {f"{_STEM}.tar", f"{_STEM}.pdf"}
    assert (unpacked / f"{_STEM}.pdf").read_bytes().startswith(b"%PDF-")
    left = {path.name for path in package.parent.iterdir()} - {"unpacked", "our train.csv"}
    assert left == {f"{_STEM}{end}" for end in (".json", ".label", ".pdf", ".zip")}


def test_label_of_the_archive_is_the_metadata_and_holds_to_the_schema(package: Path, unpacked: Path) -> None:
    with tarfile.open(unpacked / f"{_STEM}.tar") as archive:
        assert "oci-layout" not in archive.getnames()
        (manifest,) = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        config = json.load(archive.extractfile(manifest["Config"]))  # type: ignore[arg-type]
    assert (config["os"], config["architecture"]) == ("linux", "amd64")
    made = json.loads(base64.b64decode(config["config"]["Labels"][LABEL], validate=True))
    assert made == json.loads((package.parent / f"{_STEM}.json").read_text())
    jsonschema.validate(made, json.loads((ROOT / "gadgets/whorl/openrecon/schema.json").read_text()))
    assert made["reconstruction"]["port"] == PORT
    assert not config["config"].get("Entrypoint")
    assert config["config"]["Cmd"][-2:] == ["--port", str(PORT)]
    assert config["config"]["User"] == "0:0"
    environment = dict(entry.partition("=")[::2] for entry in config["config"]["Env"])
    assert environment["WHORL_PROPERTY_SLICE_PROFILE"] == "1 0.9 0.5"
    assert environment["WHORL_PROPERTY_SEQUENCE"] == "/opt/whorl/site/sequence.csv"


@pytest.mark.parametrize("layout", ["docker", "oci"])
def test_loaded_archive_serves_the_scanner(
    engine: Engine, unpacked: Path, scan: Scan, tmp_path: Path, layout: str
) -> None:
    archive = unpacked / f"{_STEM}.tar"
    if layout == "oci":
        archive = classic(_as_of_docker_25(archive, tmp_path / "saved.tar"), tmp_path / "classic.tar")
    for name in engine.docker("images", "--format", "{{.Repository}}:{{.Tag}}", _STEM.lower()).split():
        engine.docker("rmi", name)
    loaded = engine.docker("load", "--input", archive).split()[-1]
    assert loaded == f"{_STEM.lower()}:{whorl.__version__}"
    with engine.running(loaded, "--network", "host") as container:
        wait_until(lambda: answers(PORT))
        # As the card sends it: all that stands on it. The train of the scan and that of the package differ.
        card = {"method": "lowrank", "scandeadlines": "20", "preview": "False", "outputdtype": "uint16"}
        refused = send_scan(PORT, scan.header, scan.readouts(), card)
        assert any(text.startswith("ERR") and "sequence" in text for text in refused.texts), refused.texts
        log = engine.docker("logs", container)
        assert 'dialect="MRD client"' in log or "FIRE" in log
    with engine.running(loaded, "--network", "host", "--env", "WHORL_PROPERTY_SEQUENCE="):
        wait_until(lambda: answers(PORT))
        answer = send_scan(PORT, scan.header, scan.readouts(), card)
        assert len(answer.images) == 4, answer.texts
        assert {image.meta["whorl_method"] for image in answer.images} == {"lowrank"}
        assert all(np.any(image.data) for image in answer.images)
    engine.docker("rmi", loaded)


def _as_of_docker_25(archive: Path, target: Path) -> Path:
    """The same archive in the layout that `docker save` writes since Docker 25 (OCI image layout)."""
    with tarfile.open(archive) as old, tarfile.open(target, "w") as new:
        (manifest,) = json.load(old.extractfile("manifest.json"))  # type: ignore[arg-type]
        config = old.extractfile(manifest["Config"]).read()  # type: ignore[union-attr]
        layers = [digest.partition(":")[2] for digest in json.loads(config)["rootfs"]["diff_ids"]]
        places = {manifest["Config"]: f"blobs/sha256/{Path(manifest['Config']).stem}"}
        places |= dict(zip(manifest["Layers"], (f"blobs/sha256/{layer}" for layer in layers), strict=True))
        for name, place in places.items():
            entry = old.getmember(name)
            if entry.islnk() or entry.issym():
                entry = old._find_link_target(entry)  # type: ignore[attr-defined]
            content = old.extractfile(entry)
            moved = tarfile.TarInfo(place)
            moved.size = entry.size
            new.addfile(moved, content)
        changed = {
            "Config": places[manifest["Config"]],
            "RepoTags": manifest["RepoTags"],
            "Layers": [places[layer] for layer in manifest["Layers"]],
        }
        for name, value in (
            ("manifest.json", [changed]),
            ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
            ("index.json", {"schemaVersion": 2, "manifests": []}),
        ):
            path = target.with_name(name)
            path.write_text(json.dumps(value))
            new.add(path, name)
    return target
