"""The package without its image; with it: tests/deployment."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pypdf

import whorl
from whorl.openrecon import manual
from whorl.openrecon.metadata import LABEL
from whorl.openrecon.package import classic


def _package(*options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "whorl", "openrecon", "package", *map(str, options)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PYTHONPATH": str(Path(whorl.__file__).parents[1]), **environment},
    )


def test_metadata_label_and_documentation_need_no_docker(tmp_path: Path) -> None:
    out = tmp_path / "new/out"
    done = _package("--vendor", "Uni", "-o", out, "--no-image", "-p", "method=llr", PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    stem = f"OpenRecon_Uni_whorl_V{whorl.__version__}"
    assert {path.name for path in out.iterdir()} == {f"{stem}{end}" for end in (".json", ".label", ".pdf")}
    made = json.loads((out / f"{stem}.json").read_text())
    text = "\n".join(page.extract_text() for page in pypdf.PdfReader(out / f"{stem}.pdf").pages)
    words = " ".join(text.split())
    for parameter in made["parameters"]:
        assert parameter["label"]["en"] in words
    assert "Research use only. Not a medical device" in words
    assert "method = llr" in words


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    without = _package("--vendor", "Uni", "-o", tmp_path, PATH="/nonexistent")
    assert without.returncode == 1
    assert "docker was not found" in without.stderr
    assert "--no-image" in without.stderr
    wrong = _package("--vendor", "Uni_X", "-o", tmp_path / "wrong", "--no-image")
    assert wrong.returncode == 1
    assert "general.vendor" in wrong.stderr
    assert not (tmp_path / "wrong").exists()
    assert _package("--vendor", "Uni", "-o", tmp_path, "-p", "metod=llr", "--no-image").returncode == 2
    assert _package("-o", tmp_path, "--no-image").returncode == 2
    gone = _package("--vendor", "Uni", "-o", tmp_path, "--no-image", "-p", "sequence=nonexistent.csv")
    assert gone.returncode == 1
    assert "there is no file nonexistent.csv" in gone.stderr


def test_packed_layers_are_unpacked(tmp_path: Path) -> None:
    """`docker save` of some engines packs them; the former layout has them plain."""
    layer, config = b"layer " * 999, b'{"rootfs": {}}'
    manifest = [{"Config": "blobs/sha256/c", "RepoTags": ["w:1"], "Layers": ["blobs/sha256/l"]}]
    contents = {
        "blobs/sha256/c": config,
        "blobs/sha256/l": gzip.compress(layer),
        "manifest.json": json.dumps(manifest).encode(),
        "oci-layout": b"{}",
    }
    with tarfile.open(tmp_path / "saved.tar", "w") as saved:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            saved.addfile(entry, io.BytesIO(content))
    with tarfile.open(classic(tmp_path / "saved.tar", tmp_path / "classic.tar")) as made:
        assert sorted(made.getnames()) == ["c.json", "l/layer.tar", "manifest.json", "repositories"]
        file = made.extractfile("l/layer.tar")
        assert file is not None
        assert file.read() == layer


def test_the_documentation_quotes_what_whorl_says() -> None:
    """Each message in its table is one of the program's own, apart from what stands for numbers."""
    folder = Path(whorl.__file__).parent
    template = Path(manual.__file__).with_name("manual.md.jinja").read_text()
    table = template.partition("| What it says |")[2].partition("\n\n")[0]
    quoted = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)
    assert len(quoted) >= 4
    source = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # texts over several lines
    for text in quoted:
        for part in text.split("..."):
            assert part.strip() in source, text


def test_label_is_the_published_one() -> None:
    assert LABEL == "com.siemens-healthineers.magneticresonance.openrecon.metadata:1.1.0"
