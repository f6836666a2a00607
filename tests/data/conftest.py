from pathlib import Path

import cv2
import numpy as np
import pytest

from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets
from esc_basicsr.data.photos import load_photograph


@pytest.fixture(scope="session")
def photographs() -> dict[str, np.ndarray]:
    """Small RGB windows of photographs, of odd and even sizes."""
    return {
        "astronaut": load_photograph("astronaut")[100:213, 150:275],
        "chelsea": load_photograph("chelsea")[60:156, 100:220],
        "coffee": load_photograph("coffee")[100:196, 200:296],
    }


@pytest.fixture
def photo_folder(tmp_path: Path, photographs) -> Path:
    """The photographs as PNG files in a folder of the test's own."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, image in photographs.items():
        cv2.imwrite(str(folder / f"{name}.png"), image[:, :, ::-1])
    return folder


@pytest.fixture
def hr_lmdb(tmp_path: Path, photographs) -> Path:
    """An LMDB of the three photographs, whole."""
    return build_lmdb_sets(photographs, tmp_path, "photos", crop_size=0)[1]
