"""The report of a result: what it says, and that a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from scan_edit import Scan
from whorl.cli import main
from whorl.doors.files import ResultFile, read_images
from whorl.maps.rois import RegionStatistics
from whorl.reporting.content import agreement, gather
from whorl.simulation.scan import simulate

QUICK = {"method": "inr", "iterations": 12, "correction_steps": 2}
ASKED = {"fit_frames": 5, "uncertainty": "true", "preview": "true"}


@pytest.fixture(scope="module")
def scan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "scan.h5"
    simulate(path, phantom="nist", timepoints=300, interleaves=32, coils=6, matrix=160, noise=5e-4)
    return path


@pytest.fixture(scope="module")
def result_path(scan_path: Path) -> Path:
    """With everything that can be in a result, and a protocol name that would break a page."""
    scan = Scan.load(scan_path)
    scan.header = scan.header.replace(b"whorl simulation nist t2", b"&lt;script&gt;alert(1)&lt;/script&gt;")
    result = scan.without(scan.imaging[[7, 90]]).run(**QUICK, **ASKED)
    path = scan_path.with_name("result.h5")
    with ResultFile(path, scan.header) as file:
        for image in result.images:
            file.append(image)
    return path


def report(result: Path, output: Path, *options: str) -> str:
    done = CliRunner().invoke(main, ["report", str(result), "-o", str(output), *options])
    assert done.exit_code == 0, done.output
    return output.read_text()


@pytest.fixture(scope="module")
def page(result_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(result_path, path)
    return path


class _Parser(HTMLParser):
    """Sections by their id, text, and what the page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if tag == "section":
            self.sections.append(given.get("id") or given.get("class") or "")
        self.loads.extend(str(given[name]) for name in ("src", "href") if given.get(name))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parsed(text: str) -> _Parser:
    parser = _Parser()
    parser.feed(text)
    return parser


def test_it_is_one_file_that_needs_nothing_else(page: Path) -> None:
    parser = parsed(page.read_text())
    assert parser.loads
    assert all(load.startswith("data:image/") for load in parser.loads)
    assert "script" not in parser.tags
    assert "<script>alert(1)</script>" in "".join(parser.words)  # as text


def test_it_has_each_part(page: Path) -> None:
    parser = parsed(page.read_text())
    assert parser.sections == [
        "warnings", "maps", "lowrank", "regions", "object", "fit", "timings", "resolved", "settings",
    ]  # fmt: skip
    words = " ".join(parser.words)
    for text in (
        "2 of 300 readouts are missing",
        "readouts_lost=2",
        "Standard deviation of T2",
        "train of 300 timepoints",
        "header reconSpace",
        "iterations=12",
        "torch",
        "Research use only. Not a medical device.",
        "degraded",
    ):
        assert text in words or text in page.read_text(), text
    assert sum(load.startswith("data:image/gif") for load in parser.loads) == 1


def test_a_fit_without_iterations_shows_its_features_alone(tiny_scan: Path, tmp_path: Path) -> None:
    result = Scan.load(tiny_scan).run(method="inr", iterations=0, fit_frames=4)
    path = tmp_path / "result.h5"
    with ResultFile(path, b"<ismrmrdHeader/>") as file:
        for image in result.images:
            file.append(image)
    text = report(path, tmp_path / "r.html")
    assert "fit" in parsed(text).sections
    assert "Joint features" in text
    # Neither a curve nor an animation of a single point.
    assert "Data term over the iterations" not in text
    assert "data:image/gif" not in text


def test_the_spheres_are_found_and_compared(page: Path) -> None:
    text = page.read_text()
    assert "NIST system phantom version 1, T2 plate, 20 °C, 3 T; spheres found in slice 0" in text
    rows = re.findall(r"<tr><td>(Mn-\d+)</td><td>([\d.]+)</td><td>([\d.]+)</td>", text)
    assert [name for name, *_ in rows] == [f"Mn-{n}" for n in range(1, 15)] * 2
    t1 = np.array([[float(v) for v in row[1:]] for row in rows[:14]])
    assert t1[0, 0] == 2480.0
    # Numbered rightly, or most values would be off by a quarter and more; the smallest spheres of this small
    # matrix are.
    assert np.median(np.abs(t1[:, 1] / t1[:, 0] - 1)) < 0.1
    assert np.corrcoef(np.log(t1.T))[0, 1] > 0.97


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--plate", "off"), None),
        (("--phantom-version", "2"), "were not compared"),
        (("--truth", "SCAN"), "simulated truth of scan.h5"),
    ],
)
def test_other_references(
    result_path: Path, scan_path: Path, tmp_path: Path, options: tuple[str, ...], text: str | None
) -> None:
    words = report(result_path, tmp_path / "r.html", *(str(scan_path) if o == "SCAN" else o for o in options))
    if text is None:
        assert "regions" not in parsed(words).sections
    else:
        assert text in words


def test_a_truth_that_is_another_ones_is_refused(result_path: Path, tiny_scan: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main, ["report", str(result_path), "-o", str(tmp_path / "r.html"), "--truth", str(tiny_scan)]
    )
    assert done.exit_code == 1
    assert "expected the scan that it is of" in done.output
    assert not (tmp_path / "r.html").exists()


def test_a_plain_result_of_several_slices(tiny_scan: Path, tmp_path: Path) -> None:
    scan = Scan.load(tiny_scan)
    result = scan.slices(3).run(method="lowrank")
    path = tmp_path / "result.h5"
    with ResultFile(path, b"<ismrmrdHeader/>") as file:
        for image in result.images:
            file.append(image)
    parser = parsed(report(path, tmp_path / "r.html"))
    assert parser.sections[:1] == ["maps"] or parser.sections[:2] == ["warnings", "maps"]
    assert "fit" not in parser.sections


def test_a_result_without_maps_says_why(result_path: Path, tmp_path: Path) -> None:
    image = read_images(result_path)[0]
    meta = image.meta
    meta["GADGETRON_DataRole"], meta["ImageComments"] = "STATUS", "no readouts arrived"
    image.meta = meta
    path = tmp_path / "status.h5"
    with ResultFile(path, b"<ismrmrdHeader/>") as file:
        file.append(image)
    done = CliRunner().invoke(main, ["report", str(path), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 1
    assert 'no T1 maps, but says: "no readouts arrived"' in done.output


def test_agreement_of_regions() -> None:
    def row(truth: float, mean: float, sd: float) -> RegionStatistics:
        return RegionStatistics("r", truth, mean, sd, 20)

    found = agreement([row(100, 110, 11), row(200, 190, 19), row(float("nan"), 5, 1)])
    assert found is not None
    assert len(found.rows) == 2
    differences = np.array([200 * 10 / 210, -200 * 10 / 390])
    assert found.bias_percent == pytest.approx(differences.mean())
    assert found.high_percent - found.bias_percent == pytest.approx(1.96 * differences.std(ddof=1))
    assert found.cov_percent == pytest.approx(10)
    assert found.r2 == pytest.approx(1 - 200 / 5000)
    assert agreement([row(float("nan"), 1, 1)]) is None


def test_what_is_gathered_is_what_was_sent(result_path: Path) -> None:
    content = gather(read_images(result_path))
    assert set(content.maps) == {"T1", "T2", "M0", "QUALITY", "T1_SD", "T2_SD"}
    assert set(content.lowrank) == {"T1", "T2", "M0", "QUALITY"}
    assert [frame.title for frame in content.frames][-1] == "sent"
    assert content.slices[0].n_iterations == 12
    assert content.settings["iterations"] == 12
    assert ("timepoints", "300", "header lists") in content.resolved


# --- In a browser ----------------------------------------------------------------------------------------


def test_a_browser_shows_it(page: Path, tmp_path: Path) -> None:
    browser = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), "")
    if not browser:
        pytest.skip("no Chromium is installed (Debian package chromium)")
    picture = tmp_path / "report.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"]
    subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,4000",
         f"--screenshot={picture}", page.as_uri()],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    pixels: Any = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (4000, 1280, 3)
    # The dark header with light letters, and below it maps in colour.
    assert (np.abs(pixels[:20].mean((0, 1)) - (0x14, 0x18, 0x1D)) < 4).all()
    assert pixels[:100].max() > 200
    colourful = np.ptp(pixels, axis=2) > 60
    assert colourful[100:900].mean() > 0.005
    # Pictures further down were decoded too: the plots' red.
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 60) & (pixels[..., 2] < 110)
    assert red[1500:].sum() > 200
