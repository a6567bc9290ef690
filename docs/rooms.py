"""Writes the map of rooms into `CONTRIBUTING.md`, from the first lines of their docstrings: `python docs/rooms.py`.

The groups are those of `tests/test_rooms.py`, which says what each may import. A test compares the page with the tree.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- map: python docs/rooms.py -->\n", "<!-- end of the map -->\n"
INSIDE = ("eval",)
"""Folders whose own folders are rooms too."""
TITLES = {
    "ground": "**Ground**: knows no other group",
    "models": "**Models**: what differs between them, where a word stands, and how an erasure lives in them",
    "library": "**Library**: makes an erasure a file, and attaches it",
    "workshops": "**Workshops**: make an erasure, or a concept that can be erased",
    "users": "**Users** of the library",
}
"""Titles of the groups, in the order of the map."""


def rules() -> ModuleType:
    """The test that says which room may import which."""
    spec = spec_from_file_location("rooms_of_the_package", ROOT / "tests/test_rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def groups(known: ModuleType) -> dict[str, set[str]]:
    """Rooms by group. What is in none of the groups that the rules name is of the models, or uses the library."""
    users = set(known.USERS) | {"locking", "cli"}
    found = {
        "ground": set(known.GROUND), "library": set(known.LIBRARY), "workshops": set(known.WORKSHOPS), "users": users,
    }  # fmt: skip
    others = set(known.NEVER) - set().union(*found.values())
    return {group: found.get(group, others) for group in TITLES}


def place(room: str) -> Path:
    """The folder or the module of a room."""
    for path in (ROOT / "erasure" / room, ROOT / "erasure" / f"{room}.py", ROOT / room):
        if path.exists():
            return path
    raise FileNotFoundError(f"there is no room {room!r}: take it out of tests/test_rooms.py")


def about(path: Path) -> str:
    """First line of the docstring of a module, or of a folder's."""
    file = path if path.suffix else path / "__init__.py"
    if not file.is_file():
        (file,) = sorted(path.glob("*/__init__.py"))
    said = ast.get_docstring(ast.parse(file.read_text()))
    assert said, f"{file} says nothing of itself: begin it with a docstring"
    return said.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def rows(rooms: Mapping[str, set[str]]) -> Iterator[str]:
    """Lines of the table."""
    yield "| room | what it is |"
    yield "|---|---|"
    for group, title in TITLES.items():
        yield f"| | {title} |"
        paths = sorted(place(room) for room in rooms[group])
        inside = [each for path in paths if path.name in INSIDE for each in path.iterdir()]
        paths += [path for path in inside if (path / "__init__.py").is_file()]
        for path in sorted(paths):
            yield f"| `{path.relative_to(ROOT).as_posix()}` | {about(path)} |"


def page(text: str) -> str:
    """A page with the map of the tree in the place of its own."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    assert found
    assert ended, f"{PAGE.name} has no place for the map, which lies between {BEGIN!r} and {END!r}"
    table = "".join(f"{line}\n" for line in rows(groups(rules())))
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
