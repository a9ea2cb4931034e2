"""Make the package: an image with the label, as an archive, and the documentation, in one zip."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from whorl.config import ENVIRONMENT, FILES, Settings
from whorl.openrecon import manual
from whorl.openrecon.metadata import LABEL, PORT, Application, label, metadata
from whorl.scan.failure import ScanError

_FILES = "/opt/whorl/site"
_BLOCK = 1 << 20


def make(
    application: Application,
    properties: Mapping[str, object],
    image: str,
    output: Path,
    say: Callable[[str], None],
) -> list[Path]:
    """Write a package.

    Parameters
    ----------
    application
        What it is called and needs.
    properties
        What holds in it unless it is chosen otherwise at the console; files that they name are put into it.
    image
        Name of whorl's image; empty: metadata, label and documentation alone are written.
    output
        Folder.
    say
        Takes a sentence about what is being done.

    Returns
    -------
    list of Path
        What was written; the package is the last one.

    Raises
    ------
    ScanError
        If the metadata are not as the platform wants them, or Docker does not do its part.
    """
    settings = Settings.from_properties(properties)
    _files_of(properties)
    made = metadata(application, settings)
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{application.stem}{suffix}" for suffix in (".json", ".label", ".pdf")]
    paths[0].write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    paths[1].write_text(label(made) + "\n", encoding="ascii")
    manual.write_pdf(manual.text(application, made, settings.changed()), paths[2])
    if not image:
        return paths
    tag = f"{application.stem.lower()}:{application.version}"
    with tempfile.TemporaryDirectory(dir=output, prefix=".package-") as name:
        folder = Path(name)
        say(f"docker build of {tag} on {image}")
        _build(folder / "context", image, tag, made, properties)
        _check(_docker("inspect", "--format", "{{.Architecture}}", tag))
        say("docker save")
        _docker("save", "--output", str(folder / "saved.tar"), tag)
        archive = classic(folder / "saved.tar", folder / f"{application.stem}.tar")
        package = output / f"{application.stem}.zip"
        say(f"writing {package.name}")
        part = folder / package.name
        # Deflate, or nothing: the platform's unpacking knows no other method.
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
            packed.write(archive, archive.name)
            packed.write(paths[2], paths[2].name)
        part.replace(package)
    return [*paths, package]


def dockerfile(image: str, made: Mapping[str, Any], settings: Mapping[str, object]) -> str:
    """The recipe of the package's image: whorl's, with the label, run as the platform runs it."""
    # In double quotes both Docker's and JSON's rules say the same about what is written here.
    lines = [
        f"FROM {image}",
        # The platform starts its containers as root.
        "USER 0:0",
        f"COPY files {_FILES}",
        *(f"ENV {ENVIRONMENT}{name.upper()}={_quoted(str(value))}" for name, value in settings.items()),
        f'LABEL "{LABEL}"="{label(made)}"',
        f"EXPOSE {PORT}",
        # The command alone serves, whatever entry point it is given.
        "ENTRYPOINT []",
        "CMD " + json.dumps(["tini", "--", "whorl", "serve", "--host", "0.0.0.0", "--port", str(PORT)]),
    ]
    return "\n".join(lines) + "\n"


def classic(saved: Path, target: Path) -> Path:
    """An archive in the layout of `docker save` before Docker 25, which alone the platform reads.

    Parameters
    ----------
    saved
        As Docker has written it: in that layout, or in that of OCI.
    target
        Where it shall lie; `saved` is gone then.
    """
    with tarfile.open(saved) as archive:
        if "oci-layout" not in archive.getnames():
            archive.close()
            return saved.replace(target)
        (manifest,) = json.loads(_content(archive, "manifest.json"))
        config = Path(manifest["Config"]).name
        layers = [Path(layer).name for layer in manifest["Layers"]]
        with tarfile.open(target, "w") as classical:
            _copy(archive, manifest["Config"], classical, f"{config}.json")
            for place, layer in zip(manifest["Layers"], layers, strict=True):
                if f"{layer}/layer.tar" not in classical.getnames():
                    _copy(archive, place, classical, f"{layer}/layer.tar")
            changed = {
                "Config": f"{config}.json",
                "RepoTags": manifest["RepoTags"],
                "Layers": [f"{layer}/layer.tar" for layer in layers],
            }
            _add(classical, "manifest.json", json.dumps([changed]).encode())
            tag, _, version = manifest["RepoTags"][0].rpartition(":")
            _add(classical, "repositories", json.dumps({tag: {version: layers[-1]}}).encode())
    saved.unlink()
    return target


def _build(
    context: Path, image: str, tag: str, made: Mapping[str, Any], properties: Mapping[str, object]
) -> None:
    files = context / "files"
    files.mkdir(parents=True)
    settings = dict(properties)
    for name, given in _files_of(properties).items():
        shutil.copy(given, files / f"{name}{given.suffix}")
        settings[name] = f"{_FILES}/{name}{given.suffix}"
    recipe = context / "Dockerfile"
    recipe.write_text(dockerfile(image, made, settings), encoding="utf-8")
    _docker("build", "--quiet", "--tag", tag, "--file", str(recipe), str(context))


def _files_of(properties: Mapping[str, object]) -> dict[str, Path]:
    """Files that properties name; folders are those of the container."""
    found = {}
    for name, value in properties.items():
        if name in FILES and value:
            found[name] = Path(str(value))
            if not found[name].is_file():
                raise ScanError(f'property "{name}": there is no file {value}, which the package shall hold')
    return found


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$") + '"'


def _docker(*arguments: str) -> str:
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ScanError(
            "docker was not found: expected it on PATH; --no-image writes metadata and documentation without"
        ) from error
    if done.returncode:
        raise ScanError(f"docker {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


def _check(architecture: str) -> None:
    if architecture != "amd64":
        raise ScanError(
            f"the image is for {architecture}, OpenRecon runs linux/amd64: "
            f"build whorl's image with --platform linux/amd64"
        )


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _copy(archive: tarfile.TarFile, name: str, target: tarfile.TarFile, new_name: str) -> None:
    """Copy a member, unpacked if it is packed: the former layout has plain layers."""
    file = archive.extractfile(name)
    assert file is not None
    entry = tarfile.TarInfo(new_name)
    magic = file.read(4)
    file.seek(0)
    if magic == b"\x28\xb5\x2f\xfd":
        raise ScanError(
            "docker has saved layers packed by zstd: build whorl's image without that compression"
        )
    if magic[:2] != b"\x1f\x8b":
        entry.size = archive.getmember(name).size
        target.addfile(entry, file)
        return
    with gzip.open(file) as packed, tempfile.TemporaryFile(dir=Path(str(target.name)).parent) as plain:
        shutil.copyfileobj(packed, plain, _BLOCK)
        entry.size = plain.tell()
        plain.seek(0)
        target.addfile(entry, plain)
