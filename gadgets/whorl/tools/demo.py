"""The main job, end to end, on a simulated scan: what a site does, with a truth to compare with."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import ismrmrd
import numpy as np
from numpy.typing import NDArray

from whorl import __version__
from whorl.doors.client import Received, send_file
from whorl.doors.files import ResultFile, read_header, read_images
from whorl.maps.rois import (
    QUANTITIES,
    SHORTEST_T2_MS,
    RegionStatistics,
    largest_bias_percent,
    mean_cov_percent,
    r_squared,
    region_statistics,
    well_seen,
)
from whorl.reporting.content import gather
from whorl.reporting.page import page
from whorl.scan.failure import ScanError
from whorl.simulation.scan import simulate
from whorl.simulation.truth import Truth, read_truth

_METHODS = ("inr", "lowrank")
_TITLES = {"inr": "INR", "lowrank": "low-rank"}

Maps = dict[str, NDArray[np.float32]]


@contextmanager
def _server() -> Iterator[int]:
    """A server in a process of its own; gives its port."""
    command = [sys.executable, "-m", "whorl", "--log-format", "json", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = ""
            for line in process.stderr:
                said += line
                found = re.search(r'"event": "listening", "address": "[^,"]*:(\d+)[,"]', line)
                if found:
                    break
            else:
                raise ScanError(f"the server did not start: {said.strip() or 'it said nothing'}")
            # Whoever does not read a full pipe stops its writer.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield int(found.group(1))
        finally:
            process.terminate()


def _stream(scan: Path, port: int, method: str) -> tuple[Received, dict[str, float]]:
    """Send the scan to the server; what came back, and the times in seconds."""
    last_readout = last_map = started = time.monotonic()

    def on_image(image: ismrmrd.Image) -> None:
        nonlocal last_map
        last_map = time.monotonic()

    def on_progress(sent: int, total: int) -> None:
        nonlocal last_readout
        last_readout = time.monotonic()

    received = send_file(
        scan,
        port=port,
        properties={"method": method},
        on_image=on_image,
        on_text=lambda text: click.echo(f"    {text}", err=True),
        progress=on_progress,
    )
    if not received.images:
        raise ScanError(f"no maps came back: {'; '.join([*received.texts, *received.problems])}")
    pairs = [part.split("=") for part in str(received.images[-1].meta["whorl_seconds"]).split()]
    return received, {
        **{name: float(value) for name, value in pairs},
        "streaming": last_readout - started,
        "last_readout_to_last_map": last_map - last_readout,
    }


def _maps(images: list[ismrmrd.Image]) -> Maps:
    """Physical values of each quantity, `(slices, Y, X)`."""
    stacks: dict[str, dict[int, NDArray[np.float32]]] = {}
    for image in images:
        values = image.data[0, 0] * float(image.meta["RescaleSlope"]) + float(image.meta["RescaleIntercept"])
        stacks.setdefault(str(image.meta["GADGETRON_DataRole"]), {})[image.slice] = values.astype(np.float32)
    return {role: np.stack([by_slice[n] for n in sorted(by_slice)]) for role, by_slice in stacks.items()}


def _statistics(maps: Maps, truth: Truth) -> dict[str, list[RegionStatistics]]:
    return {
        quantity: region_statistics(
            maps[quantity], truth.labels, truth.roi_names, getattr(truth, f"roi_{name}")
        )
        for quantity, name in QUANTITIES
    }


def _summary(rows: dict[str, list[RegionStatistics]]) -> dict[str, float]:
    kept = well_seen(rows)
    summary = {}
    for quantity, regions in rows.items():
        summary[f"{quantity} mean CoV %"] = mean_cov_percent(regions)
        summary[f"{quantity} R2 (T2 >= {SHORTEST_T2_MS:g} ms)"] = r_squared(kept[quantity])
        summary[f"{quantity} largest bias % (T2 >= {SHORTEST_T2_MS:g} ms)"] = largest_bias_percent(
            kept[quantity]
        )
        summary[f"{quantity} largest bias %"] = largest_bias_percent(regions)
    return summary


def _print_table(
    rows: dict[str, dict[str, list[RegionStatistics]]], summaries: dict[str, dict[str, float]]
) -> None:
    for quantity, _ in QUANTITIES:
        click.echo(
            f"\n{quantity} in ms     truth    low-rank: mean ± SD  bias %         INR: mean ± SD  bias %"
        )
        for low, inr in zip(rows["lowrank"][quantity], rows["inr"][quantity], strict=True):
            click.echo(
                f"{low.name:8s} {low.truth:8.1f}    {low.mean:9.1f} ± {low.sd:7.1f}  {low.bias_percent:+6.1f}"
                f"    {inr.mean:9.1f} ± {inr.sd:7.1f}  {inr.bias_percent:+6.1f}"
            )
    click.echo(f"\n{'':34s} low-rank       INR")
    for name in summaries["inr"]:
        click.echo(f"{name:34s} {summaries['lowrank'][name]:8.4g}  {summaries['inr'][name]:8.4g}")


def _draw(maps: dict[str, Maps], truth: Truth, path: Path) -> None:
    """Truth, maps and errors of the middle slice."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from cmcrameri import cm

    z = len(truth.mask) // 2
    inside = np.nonzero(truth.mask[z])
    box = tuple(slice(max(0, int(i.min()) - 6), int(i.max()) + 7) for i in inside)
    figure, axes = plt.subplots(2, 5, figsize=(16, 6.6), layout="constrained")
    for row, (quantity, name) in enumerate(QUANTITIES):
        known = getattr(truth, name)[z][box]
        in_regions = getattr(truth, f"roi_{name}")
        top = (
            1.1 * float(in_regions.max()) if len(in_regions) > 5 else float(np.percentile(in_regions, 60)) * 2
        )
        colours = (cm.lipari if quantity == "T1" else cm.navia).with_extremes(bad="black", under="black")
        shown = {"truth": known, **{_TITLES[m]: maps[m][quantity][z][box] for m in ("lowrank", "inr")}}
        for axis, (title, image) in zip(axes[row], shown.items(), strict=False):
            drawn = axis.imshow(
                np.ma.masked_equal(image, 0), cmap=colours, vmin=0, vmax=top, interpolation="nearest"
            )
            axis.set_title(f"{quantity} {title}")
        figure.colorbar(drawn, ax=axes[row, :3], label="ms", shrink=0.9)
        for axis, method in zip(axes[row, 3:], ("lowrank", "inr"), strict=True):
            image = maps[method][quantity][z][box]
            both = (known > 0) & (image > 0)
            error = np.ma.masked_where(~both, 100 * (image / np.where(known > 0, known, 1) - 1))
            drawn = axis.imshow(error, cmap=cm.vik, vmin=-30, vmax=30, interpolation="nearest")
            axis.set_title(f"{quantity} error, {_TITLES[method]}")
        figure.colorbar(drawn, ax=axes[row, 3:], label="%", shrink=0.9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(output: Path, **options: Any) -> int:
    """Simulate a scan, stream it to a server twice (INR and low-rank), compare with the truth.

    Parameters
    ----------
    output
        Folder for the scan, the results (MRD), `demo.json`, `maps.png` and `report.html`.
    options
        Of `whorl.simulation.scan.simulate`.

    Returns
    -------
    int
        The worse exit code of the two runs.
    """
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    scan = output / "scan.h5"
    click.echo(
        f"simulating a scan: {', '.join(f'{name} {value}' for name, value in options.items())}", err=True
    )
    simulate(scan, **options, progress=lambda text: click.echo(f"    {text}", err=True))
    truth = read_truth(scan)
    simulated = time.monotonic()

    maps: dict[str, Maps] = {}
    rows: dict[str, dict[str, list[RegionStatistics]]] = {}
    times: dict[str, dict[str, float]] = {}
    code = 0
    click.echo("starting the server", err=True)
    with _server() as port:
        for method in _METHODS:
            click.echo(f"streaming to 127.0.0.1:{port}, method {method}", err=True)
            received, times[method] = _stream(scan, port, method)
            code = max(code, received.exit_code)
            with ResultFile(output / f"{method}.h5", read_header(scan)) as result:
                for image in received.images:
                    result.append(image)
            maps[method] = _maps(received.images)
            rows[method] = _statistics(maps[method], truth)
    summaries = {method: _summary(rows[method]) for method in _METHODS}
    _print_table(rows, summaries)
    inr = times["inr"]
    click.echo(
        f"\nINR, seconds: dictionary {inr['dictionary']:.2f}, fit {inr.get('fit', 0):.2f}, "
        f"slice {inr['slice']:.2f}, "
        f"last readout to last map {inr['last_readout_to_last_map']:.2f}"
    )
    click.echo(f"low-rank: last readout to last map {times['lowrank']['last_readout_to_last_map']:.2f}")
    _draw(maps, truth, output / "maps.png")
    seconds = {"simulation": simulated - began, "all": time.monotonic() - began}
    click.echo(f"simulation {seconds['simulation']:.1f} s, everything {seconds['all']:.1f} s")
    figures = {
        "whorl": __version__,
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        "options": options,
        "regions": {m: {q: [asdict(r) for r in rs] for q, rs in rows[m].items()} for m in _METHODS},
        "summary": summaries,
        "seconds": {**times, **seconds},
        "exit_code": code,
    }
    content = gather(read_images(output / "inr.h5"), truth=scan)
    (output / "report.html").write_text(page(content, "inr.h5"), encoding="utf-8")
    (output / "demo.json").write_text(json.dumps(figures, indent=2))
    click.echo(
        f"maps in {output}/inr.h5 and {output}/lowrank.h5, "
        f"picture in {output}/maps.png, report in {output}/report.html, figures in {output}/demo.json"
    )
    return code
