"""The rule of docs/architecture.md: imports between rooms point down."""

import pytest
import rooms


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
