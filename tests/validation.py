"""Remake the tables of docs/validation.md, whose text is written by hand: `make validation`.

    python tests/validation.py [NAME ...] [--again]

A table stands between ``<!-- table: NAME: python tests/bench_NAME.py ... -->`` and ``<!-- end -->``: there is
what the command prints. It is kept in out/validation/NAME.md with the commit that it was made of, and what is
there is not made again unless it is asked for: hours of work can be broken off at any time. What fails is
said, its old table stays, and the others are made all the same.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_TABLE = re.compile(
    r"(?P<start><!-- table: (?P<name>[\w-]+): (?P<command>python [^\n]+?) -->\n)(?P<body>.*?)<!-- end -->",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Table:
    """What stands between two markers of a page."""

    name: str
    command: str

    @property
    def arguments(self) -> list[str]:
        """Of the command: the program, and what it is told."""
        return shlex.split(self.command)[1:]


def tables_of(page: str) -> list[Table]:
    """Those of a page, in their order.

    Raises
    ------
    ValueError
        If a marker has no end, or a name comes twice.
    """
    found = [Table(match["name"], match["command"]) for match in _TABLE.finditer(page)]
    starts, ends = page.count("<!-- table: "), page.count("<!-- end -->")
    inside = sum("<!-- table: " in match["body"] for match in _TABLE.finditer(page))
    if not len(found) == starts == ends or inside:
        raise ValueError(
            f"of {starts} table markers and {ends} ends, {len(found)} are pairs: expected "
            f"<!-- table: NAME: python tests/bench_NAME.py --> and <!-- end --> around each table"
        )
    names = [table.name for table in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"tables have the same name: {', '.join(sorted(twice))}")
    return found


def filled(page: str, outputs: Mapping[str, str]) -> str:
    """The page with these outputs by name of the table; other tables stay."""

    def fill(match: re.Match[str]) -> str:
        body = f"\n{outputs[match['name']].strip()}\n\n" if match["name"] in outputs else match["body"]
        return f"{match['start']}{body}<!-- end -->"

    return _TABLE.sub(fill, page)


def kept(table: Table, folder: Path) -> tuple[str, str] | None:
    """Commit and output of a table that was made before by the same command."""
    path = folder / f"{table.name}.md"
    if not path.exists():
        return None
    first, _, output = path.read_text(encoding="utf-8").partition("\n")
    found = re.fullmatch(r"<!-- (.*), commit (\S+) -->", first)
    return (found[2], output) if found and found[1] == table.command else None


def make(table: Table, folder: Path) -> str:
    """Run the command and keep what it prints.

    Raises
    ------
    subprocess.CalledProcessError
        If it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("gadgets", "tests")),
    }
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    done = subprocess.run(
        [sys.executable, *table.arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    part = folder / f".{table.name}.part"
    part.write_text(f"<!-- {table.command}, commit {commit} -->\n{done.stdout}", encoding="utf-8")
    part.replace(folder / f"{table.name}.md")
    return done.stdout


def remake(page: Path, folder: Path, names: Sequence[str] = (), *, again: bool = False) -> list[str]:
    """Fill the tables of a page, one after the other; the names of those that failed.

    Parameters
    ----------
    page
        The file, which is written after each table.
    folder
        Where outputs are kept.
    names
        Of tables; empty: all.
    again
        Whether to make those that are there.

    Raises
    ------
    ValueError
        If the page or a name is wrong.
    """
    tables = tables_of(page.read_text(encoding="utf-8"))
    if unknown := set(names) - {table.name for table in tables}:
        known = ", ".join(table.name for table in tables)
        raise ValueError(f"there is no table {', '.join(sorted(unknown))}: expected some of {known}")
    failed = []
    for table in tables:
        if names and table.name not in names:
            continue
        before = None if again else kept(table, folder)
        if before is not None:
            print(f"{table.name}: kept, of commit {before[0]}", flush=True)
            output = before[1]
        else:
            print(f"{table.name}: {table.command}", flush=True)
            began = time.monotonic()
            try:
                output = make(table, folder)
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"{table.name}: FAILED: {error}", flush=True)
                failed.append(table.name)
                continue
            print(f"{table.name}: {time.monotonic() - began:.0f} s", flush=True)
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text, {table.name: output}), encoding="utf-8")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of tables; all")
    parser.add_argument("--again", action="store_true", help="make those too that are there")
    told = parser.parse_args()
    page, folder = ROOT / "docs" / "validation.md", ROOT / "out" / "validation"
    try:
        failed = remake(page, folder, told.names, again=told.again)
    except ValueError as error:
        raise SystemExit(f"validation: {error}") from error
    if failed:
        raise SystemExit(f"validation: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
