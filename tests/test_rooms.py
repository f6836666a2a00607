"""The rule of docs/architecture.md: imports between rooms point down."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import rooms

# the commands that compare networks and look into them
OF_LAB = {"bench", "compare", "complexity", "gpu_report"}


def imports() -> Iterator[tuple[Path, str]]:
    """Every import of one module of the package by another, those within functions too."""
    for file in rooms.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name.startswith("esc_basicsr."):
                    yield file.relative_to(rooms.PACKAGE), name


def test_every_import_between_rooms_points_down() -> None:
    upward = {
        edge: sorted(modules)
        for edge, modules in rooms.imports_between_rooms().items()
        if not rooms.points_down(*edge)
    }
    assert not upward


def test_every_folder_of_the_package_is_a_room_and_the_root_is_small() -> None:
    folders = {path.parent.relative_to(rooms.PACKAGE).parts for path in rooms.PACKAGE.rglob("*.py")}
    assert {rooms.room_of((*parts, "module.py")) for parts in folders} == set(rooms.FLOOR)
    assert len(list(rooms.PACKAGE.glob("*.py"))) <= 8


def test_only_its_own_commands_need_the_lab():
    for file, name in imports():
        if name.split(".")[1] == "lab" and rooms.room_of(file.parts) != "lab":
            is_analysis = file.stem.startswith("analyze")
            assert rooms.room_of(file.parts) == "commands" and (is_analysis or file.stem in OF_LAB), (
                f"{file}: {name}"
            )


def test_modules_of_a_room_do_not_import_in_a_circle():
    edges: dict[str, set[str]] = {}
    for file, name in imports():
        parts = name.split(".")[1:]
        while parts and not (rooms.PACKAGE.joinpath(*parts).with_suffix(".py").is_file()):
            parts = parts[:-1]
        if parts:
            edges.setdefault(".".join(file.with_suffix("").parts), set()).add(".".join(parts))
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in edges.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from esc_basicsr.data.building.publish import publish", ["data/building"]),
        ("import esc_basicsr.fast.kernels as kernels", ["fast"]),
        ("def f():\n    from esc_basicsr import fast, train", ["fast", "root"]),
        (
            "if TYPE_CHECKING:\n    from esc_basicsr.lab import measure\nelse:\n    import esc_basicsr.data",
            ["data"],
        ),
        ("import torch\nfrom esc_basicsr_other import x", []),
    ],
)
def test_imports_are_found_wherever_they_are(source: str, expected: list[str]) -> None:
    assert sorted(rooms.imported_rooms(source)) == expected
