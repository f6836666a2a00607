"""The pictures of README.md and docs/architecture.md are drawn from what ships and from the code."""

from pathlib import Path

import numpy as np
import readme_picture
import rooms
from PIL import Image

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_picture_of_the_readme_is_of_the_shipped_network_and_small() -> None:
    file = DOCS / "readme.png"
    assert file.stat().st_size < 300_000
    with Image.open(file) as committed:
        shown = np.asarray(committed).astype(int)
    drawn = np.asarray(readme_picture.draw()).astype(int)
    below_captions = slice(readme_picture.CAPTION, None)
    assert np.abs(shown - drawn)[below_captions].max() <= 1  # rounding


def test_rooms_are_drawn_without_arrows_that_others_imply(tmp_path: Path) -> None:
    rooms.draw(tmp_path / "rooms.svg")
    assert (tmp_path / "rooms.svg").read_text("utf-8").startswith("<?xml")
    assert rooms.without_shortcuts({("c", "b"), ("b", "a"), ("c", "a")}) == {("c", "b"), ("b", "a")}
