"""A report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections import Counter
from pathlib import Path

from whorl.maps.figures import check_installed
from whorl.reporting import figures
from whorl.reporting.content import Content

_TITLES = {
    "T1": "T1",
    "T2": "T2",
    "M0": "M0",
    "QUALITY": "Quality (correlation with the dictionary)",
    "B1": "Relative transmit field B1",
    "T1_SD": "Standard deviation of T1",
    "T2_SD": "Standard deviation of T2",
}
_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def _embedded(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def page(content: Content, source: str) -> str:
    """The report in HTML.

    Parameters
    ----------
    content
        What it says, see `whorl.reporting.content.gather`.
    source
        Name of the result.

    Raises
    ------
    ImportError
        If matplotlib, cmcrameri or Jinja2 is not installed.
    """
    import jinja2

    check_installed()
    import matplotlib as mpl

    mpl.use("Agg")
    box = figures.box(content.maps)
    tops = figures.limits(content.maps, content.regions)
    outlines = content.regions[0] if content.regions else None
    shown = [role for role in _TITLES if role in content.maps]
    maps = [
        (
            _TITLES[role],
            _embedded(
                figures.montage(
                    content.maps[role], box, tops[role], outlines if role in ("T1", "T2") else None
                )
            ),
        )
        for role in shown
    ]
    more = [
        (
            f"{_TITLES[volume.role]}, repetition {volume.repetition}",
            _embedded(figures.montage(volume, box, tops[volume.role])),
        )
        for volume in content.repeated
        if volume.values.shape[1:] == content.maps["T1"].values.shape[1:]
    ]
    lowrank = [
        (f"{_TITLES[role]}, low-rank", _embedded(figures.montage(content.lowrank[role], box, tops[role])))
        for role in ("T1", "T2")
        if role in content.lowrank
    ]
    found = bool((content.maps["T1"].values > 0).any())
    fitted = any(one.n_iterations for one in content.slices)
    tables = [
        (one, _embedded(figures.agreement_plot(one.agreements)) if one.agreements else "")
        for one in content.regions
    ]
    stages = list(dict.fromkeys(name for one in content.slices for name in one.seconds))
    # The title of the page and of the maps come from a scan: everything is escaped.
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        content=content,
        source=source,
        maps=maps,
        more=more,
        lowrank=lowrank,
        histograms=_embedded(figures.histograms(content.maps)) if found else "",
        tables=tables,
        fit=_embedded(figures.fit_curve(content.slices)) if fitted else "",
        animation=_embedded(figures.animation(content.frames, box, tops), "gif")
        if len(content.frames) > 1
        else "",
        features=_embedded(figures.features(content.frames, box)) if content.frames else "",
        stages=stages,
        statuses=Counter(one.status or "unknown" for one in content.slices),
        methods=Counter(one.method or "unknown" for one in content.slices),
    )
