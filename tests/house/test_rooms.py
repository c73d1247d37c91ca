"""The rooms of the house: imports point one way, between the folders and between the files."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {
    "trainables": ("", "system", "data", "batches", "network", "probe", "training", "inference", "ray"),
    "search": ("cli", "spaces", "options", "runs", "cluster", "reporting", "exporting", "tuning"),
}
"""The rooms of each package, lowest first: a room imports itself and those before it. The first of `trainables` is the
recipe, which lies in the package's own folder; the commands there and in `search` stand above all rooms."""
COMMANDS = {
    "trainables": ("finetune", "interpret"),
    "search": ("check", "compare", "dashboard", "export", "lr_find", "predict", "report", "run"),
}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of all modules of both packages."""
    files = [file for package in ROOMS for file in (ROOT / package).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """The project's modules that a file imports anywhere, in its functions and in `TYPE_CHECKING`, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name in known and not (name.count(".") < 2 and known[name].stem == "__init__")}


def place(module: str) -> tuple[int, int]:
    """Where a module stands: its package, and its room in there."""
    package, *rest = module.split(".")
    rooms = ROOMS[package]
    top = not rest or rest[0] in (*COMMANDS[package], "__main__")
    return list(ROOMS).index(package), len(rooms) if top else rooms.index(rest[0] if len(rest) > 1 else "")


def test_imports_point_from_the_commands_down_through_the_rooms():
    known = modules()
    wrong = [
        f"{name} imports {other}"
        for name, file in known.items()
        if file.stem != "__init__"
        for other in imports(file, known)
        if place(other) > place(name) or (other.startswith("search.") and name.startswith("trainables."))
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    try:
        TopologicalSorter({name: imports(file, known) - {name} for name, file in known.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_every_folder_is_a_room_with_a_line_that_says_what_is_in_it():
    folders = {file.parent.relative_to(ROOT) for file in modules().values()}
    rooms = {Path(package, room) for package, names in ROOMS.items() for room in names}
    assert folders == rooms | {Path("search"), Path("search/spaces/builtin")}
    for folder in folders:
        assert ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))


def test_in_trainables_only_the_room_ray_imports_ray():
    ours = {name: file for name, file in modules().items() if name.startswith("trainables")}
    importing = {file.parent for file in ours.values() if re.search(r"^\s*(import|from) ray\b", file.read_text(), re.M)}
    assert importing == {ROOT / "trainables" / "ray"}


def test_commands_are_where_their_names_say():
    for package, names in COMMANDS.items():
        for name in names:
            assert '__name__ == "__main__"' in (ROOT / package / f"{name}.py").read_text()
