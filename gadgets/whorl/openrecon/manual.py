"""The user documentation of a package, as PDF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from fpdf import FPDF, FontFace, TextStyle
from markdown_it import MarkdownIt

from whorl.openrecon.metadata import Application

_TEMPLATE = Path(__file__).with_name("manual.md.jinja")
_SERIES = (
    ("5", "B1 (if it is matched)", "0.001 of the planned one"),
    ("6, 7", "Standard deviation of T1 and T2 (if asked for)", "as T1, T2"),
    ("11 to 14", "Low-rank maps (if asked for)", "as 1 to 4"),
    ("21, 22", "T1 and T2 in colour (if asked for)", ""),
    ("99", "The reason, if there are no maps (if asked for)", ""),
)


def text(application: Application, made: Mapping[str, Any], changed: Mapping[str, Any]) -> str:
    """The documentation in Markdown.

    Parameters
    ----------
    application, made
        The package and its metadata.
    changed
        Properties that were set in it.
    """
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=application.name,
        version=application.version,
        address=application.address,
        more=_SERIES,
        parameters=[_described(parameter) for parameter in made["parameters"]],
        set=", ".join(f"{name} = {value}" for name, value in changed.items()),
    )


def write_pdf(markdown: str, path: Path) -> None:
    """Write a text as PDF (A4)."""
    fonts = Path(mpl.get_data_path()) / "fonts/ttf"
    page = FPDF(format="A4")
    for style, name in (("", "DejaVuSans"), ("B", "DejaVuSans-Bold"), ("I", "DejaVuSans-Oblique")):
        page.add_font("DejaVu", style, fonts / f"{name}.ttf")
    page.set_margins(18, 16)
    page.set_auto_page_break(auto=True, margin=16)
    page.set_title(markdown.partition("\n")[0].lstrip("# "))
    page.set_lang("en")
    page.add_page()
    page.set_font("DejaVu", size=9)
    html = MarkdownIt().enable("table").render(markdown)
    # Columns of words, not of numbers.
    html = html.replace("<table>", '<table cellpadding="1.2">').replace("<td>", '<td align="left">')
    html = html.replace("<th>", '<th align="left">')
    page.write_html(
        html,
        table_line_separators=True,
        tag_styles={
            "h1": TextStyle(font_family="DejaVu", font_style="B", font_size_pt=18, t_margin=0, b_margin=0.6),
            "h2": TextStyle(font_family="DejaVu", font_style="B", font_size_pt=12, t_margin=4, b_margin=0.3),
            "a": FontFace(color="#000"),
        },
    )
    page.output(str(path))


def _described(parameter: Mapping[str, Any]) -> dict[str, str]:
    if parameter["type"] == "boolean":
        choices = ["yes", "no"] if parameter["default"] else ["no", "yes"]
    else:
        values = sorted(parameter["values"], key=lambda value: value["id"] != parameter["default"])
        choices = [value["name"]["en"] for value in values]
    meaning = parameter["information"]["en"]
    return {
        "title": parameter["label"]["en"],
        "choices": "; ".join(choices),
        "meaning": meaning[:1].upper() + meaning[1:],
    }
