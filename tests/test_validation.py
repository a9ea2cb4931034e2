"""Tables of docs/validation.md: each is made by a command that exists; remaking them can be broken off."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from validation import ROOT, filled, kept, remake, tables_of

PAGE = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", tables_of(PAGE), ids=lambda table: table.name)
def test_each_table_is_made_by_a_benchmark_that_takes_these_arguments(table) -> None:
    program, *arguments = table.arguments
    assert (ROOT / program).is_file()
    assert Path(program).parts[0] == "tests"
    assert program.startswith("tests/bench_")
    importlib.import_module(Path(program).stem).parser().parse_args(arguments)


def test_each_table_of_the_page_is_made_by_a_command() -> None:
    by_hand = filled(PAGE, {table.name: "" for table in tables_of(PAGE)})
    assert [line for line in by_hand.splitlines() if line.lstrip().startswith("|")] == []


# --- The making -------------------------------------------------------------------------------------------

_COUNTS = """
import sys
from pathlib import Path
counter = Path(sys.argv[1])
n = len(counter.read_text()) if counter.exists() else 0
counter.write_text("x" * (n + 1))
if "--fail" in sys.argv:
    sys.exit(2)
print(f"| run {n + 1} |\\n|---|")
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Three tables, of which the second fails; text before, between and behind."""
    program = tmp_path / "bench.py"
    program.write_text(_COUNTS)
    path = tmp_path / "page.md"

    def table(name: str, *more: str) -> str:
        command = " ".join(["python", str(program), str(tmp_path / f"{name}.count"), *more])
        return f"<!-- table: {name}: {command} -->\n| old {name} |\n<!-- end -->\n"

    path.write_text(f"before\n\n{table('a')}\nbetween\n{table('b', '--fail')}{table('c')}\nbehind\n")
    return path


def test_tables_are_filled_and_what_fails_stops_no_other(page: Path, tmp_path: Path) -> None:
    assert remake(page, tmp_path / "out") == ["b"]
    text = page.read_text()
    assert text.startswith("before\n\n<!-- table: a: ")
    assert text.endswith("<!-- end -->\n\nbehind\n")
    assert text.count("| run 1 |\n|---|") == 2
    assert "| old b |" in text
    assert "| old a |" not in text
    assert [table.name for table in tables_of(text)] == ["a", "b", "c"]


def test_what_is_made_is_kept_until_it_is_wanted_again(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    remake(page, out, ["a"])
    assert "| old c |" in page.read_text()
    assert not list(out.glob("c*"))
    # As if it had been broken off there: a is not made again, its output is that of before.
    assert remake(page, out, ["a", "c"]) == []
    assert "a: kept, of commit " in capsys.readouterr().out
    assert (tmp_path / "a.count").read_text() == "x"
    (table, *_) = tables_of(page.read_text())
    found = kept(table, out)
    assert found is not None
    assert found[0]
    assert "| run 1 |" in found[1]
    assert remake(page, out, ["a"], again=True) == []
    assert "| run 2 |" in page.read_text()
    # Another command is another table.
    page.write_text(page.read_text().replace("a.count -->", "a.count --more -->"))
    assert remake(page, out, ["a"]) == []
    assert "| run 3 |" in page.read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- table: a: python x.py -->\n|\n", "of 1 table markers and 0 ends"),
        (
            "<!-- table: a: python x.py -->\n<!-- table: b: python x.py -->\n<!-- end -->\n",
            "of 2 table markers",
        ),
        ("<!-- table: a: x.py -->\n<!-- end -->\n", "0 are pairs"),
        ("<!-- table: a: python x.py -->\n<!-- end -->\n" * 2, "the same name: a"),
    ],
)
def test_markers_that_are_wrong_are_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tables_of(text)


def test_a_name_that_is_none_is_refused(page: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no table d: expected some of a, b, c"):
        remake(page, tmp_path / "out", ["d"])
