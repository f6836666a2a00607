"""Draw the rooms of the package and which imports which, as its source says.

    python docs/studies/rooms.py -o docs/rooms.svg
    python docs/studies/rooms.py --list

A room is a folder of the package; the modules in its root are one more. Imports must point down. The picture
leaves out an arrow where others lead the same way, and prints an import that points up or sideways in red.
"""

import argparse
import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "esc_basicsr"
# From the ground up.
FLOORS = (
    ("common",),
    ("archs",),
    ("fast", "weights"),
    ("data", "data/building"),
    ("options", "metrics"),
    ("training",),
    ("basicsr_host", "upscale", "export", "report"),
    ("lab", "web"),
    ("commands",),
    ("root",),
)
CONTENTS = {
    "common": "errors, files, log, memory, tables",
    "archs": "the paper's networks, PyTorch alone",
    "fast": "the same networks, run fast",
    "weights": "weight files, shipped networks",
    "data": "batches",
    "data/building": "sets from folders of images",
    "options": "option files: keys, check, recipes",
    "metrics": "quality, published figures",
    "training": "model, loss, states, validation",
    "basicsr_host": "patches and enters BasicSR",
    "upscale": "images of any size",
    "export": "ONNX, TorchScript",
    "report": "trainings as a page",
    "web": "pages: served, static",
    "lab": "baselines, measuring, analysis",
    "commands": "one file a command",
    "root": "__main__, train, test, spandrel_archs",
}
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(parts: tuple[str, ...]) -> str:
    """Return the room of a module, given the parts of its path below the package."""
    if "/".join(parts[:2]) in FLOOR:
        return "/".join(parts[:2])
    return parts[0] if (PACKAGE / parts[0]).is_dir() else "root"


def imported_rooms(source: str) -> Iterator[str]:
    """Yield the rooms that a module imports, inside functions too, but for type checking."""
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
        if id(node) in skipped:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            if package == PACKAGE.name and parts:
                yield room_of(tuple(parts))


def imports_between_rooms() -> dict[tuple[str, str], set[str]]:
    """Return (importing room, imported room) -> the modules that do it."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        for room in imported_rooms(path.read_text("utf-8")):
            if room != room_of(parts):
                found[room_of(parts), room].add("/".join(parts))
    return dict(found)


def points_down(importing: str, imported: str) -> bool:
    """Tell whether an import points down; a part of a room may import the room that it is in."""
    return FLOOR[importing] > FLOOR[imported] or importing.startswith(f"{imported}/")


def without_shortcuts(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Leave out edges from whose start another path leads to their end."""

    def reaches(start: str, end: str, but: tuple[str, str]) -> bool:
        following = [b for a, b in edges if a == start and (a, b) != but]
        return end in following or any(reaches(room, end, but) for room in following)

    return {edge for edge in edges if not reaches(*edge, edge)}


def draw(output: Path) -> None:
    """Draw the rooms, floor by floor, and the imports between them."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "rooms"  # the same file every time
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    figure, axes = pyplot.subplots(figsize=(13, 10))
    width, height = 2.9, 0.52
    positions = {}
    for floor, rooms in enumerate(FLOORS):
        step = 6.4 if len(rooms) == 2 else width + 0.3  # two rooms leave the middle to arrows
        for number, room in enumerate(rooms):
            x = (number - (len(rooms) - 1) / 2) * step + (0.6 if floor % 2 else -0.6)
            positions[room] = x, float(floor)
            box = {"boxstyle": "round,pad=0.02", "facecolor": "#eef3fa", "edgecolor": "#31598c"}
            axes.add_patch(FancyBboxPatch((x - width / 2, floor), width, height, zorder=2, **box))
            axes.text(x, floor + 0.35, room, ha="center", va="center", weight="bold", size=12)
            axes.text(x, floor + 0.13, CONTENTS[room], ha="center", va="center", size=8)
    edges = set(imports_between_rooms())
    down = {edge for edge in edges if points_down(*edge)}
    for edge in sorted(without_shortcuts(down) | (edges - down)):
        (x, y), (to_x, to_y) = (positions[room] for room in edge)
        start, end = (x, y) if edge in down else (x, y + height), (to_x, to_y + height)
        if y == to_y:
            start, end = (x - width / 2, y + height / 2), (to_x + width / 2, y + height / 2)
        arrow = {"arrowstyle": "-|>", "color": "#7a8ca3" if edge in down else "#c62828", "shrinkA": 1}
        axes.annotate("", end, start, arrowprops=arrow, zorder=1)
    axes.set_xlim(-7, 7)
    axes.set_ylim(-0.2, len(FLOORS) - 0.2)
    axes.axis("off")
    figure.savefig(output, bbox_inches="tight", metadata={"Date": None} if output.suffix == ".svg" else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/rooms.svg"))
    parser.add_argument("--list", action="store_true", help="print the imports instead")
    args = parser.parse_args()
    if args.list:
        for edge, modules in sorted(imports_between_rooms().items(), key=lambda item: points_down(*item[0])):
            print("down" if points_down(*edge) else "UP  ", *edge, *sorted(modules))
    else:
        draw(args.output)
