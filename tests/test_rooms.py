"""The rooms of the package: no module imports in a circle, and none a room that is not below its own."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import whorl

#: What each room may import, beside itself, `runtime` and the package's version; a name stands for all that
#: is in it. Modules of the package's root are rooms of their own.
MAY_IMPORT: dict[str, set[str]] = {
    "runtime": set(),
    "config": set(),
    "scan": set(),
    "simulation": {"scan.readout"},  # how a readout is stored, and nothing of its reconstruction
    "physics": {"scan"},
    "kspace": {"scan"},
    "recon": {"kspace"},
    "maps": {"scan"},
    "pipeline": {"config", "scan", "physics", "kspace", "recon", "maps"},
    "doors": {"config", "scan", "maps", "pipeline"},
    "reporting": {"scan", "maps", "simulation"},
    "exports": {"scan", "maps"},
    "openrecon": {"config", "scan"},
    "cohort": {"config", "scan", "maps", "doors"},
    "tools": {
        *("config", "scan", "physics", "kspace", "recon", "maps"),
        *("pipeline", "doors", "reporting", "simulation"),
    },
    "gadget": {"config", "pipeline", "doors"},
    "cli": {
        *("config", "scan", "physics", "maps", "pipeline", "doors", "simulation"),
        *("reporting", "exports", "openrecon", "cohort", "tools"),
    },
    "__main__": {"cli"},
}


def _imports() -> dict[str, set[str]]:
    """What each module imports of the package, wherever it does so, by names without `whorl.`."""
    folder = Path(whorl.__file__).parent
    files = {_name(path.relative_to(folder)): path for path in folder.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path} has a relative import, which hides the room"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        found[module] = {_module(name, files) for name in names if name.partition(".")[0] == "whorl"}
    return found


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module(name: str, files: dict[str, Path]) -> str:
    """The module that is meant by `whorl.room.module` or by `whorl.room.module.what_is_in_it`."""
    inside = name.partition(".")[2]
    return inside if inside in files else inside.rpartition(".")[0]


def test_no_circles() -> None:
    TopologicalSorter(_imports()).prepare()  # its error tells the circle


def test_each_room_imports_only_what_is_below_it() -> None:
    violations = set()
    for module, imported in _imports().items():
        room = module.partition(".")[0]
        allowed = {"", "runtime", room, *MAY_IMPORT[room]} if room else set()
        for other in imported:
            if not {other, other.partition(".")[0]} & allowed:
                violations.add((module, other))
    assert violations == set()


def test_the_root_is_a_shell() -> None:
    """What does the work lies in rooms."""
    modules = {path.name for path in Path(whorl.__file__).parent.glob("*.py")}
    assert modules == {"__init__.py", "__main__.py", "cli.py", "config.py", "gadget.py"}
