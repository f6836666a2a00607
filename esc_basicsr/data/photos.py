"""Real photographs that need no download: those embedded in scikit-image's wheel, which BasicSR requires."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from esc_basicsr.common.errors import UserError

__all__ = ["load_photograph", "photograph_names"]

# name -> file in skimage/data. The motorcycles are the two views of one stereo pair: never put one into
# training and the other into validation.
_FILES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "motorcycle_left": "motorcycle_left.png",
    "motorcycle_right": "motorcycle_right.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}


def photograph_names() -> tuple[str, ...]:
    """The photographs' names, in alphabetical order. brick, camera, grass and gravel are gray."""
    return tuple(_FILES)


def load_photograph(name: str) -> npt.NDArray[np.uint8]:
    """Read one photograph.

    Returns:
        (H, W, 3), RGB, sides from 300 to 1411 pixels. A gray photograph has three equal channels.

    Raises:
        UserError: There is no such photograph, or scikit-image is not installed or lacks it.
    """
    if name not in _FILES:
        raise UserError(f"no photograph is called {name!r}; there are: {', '.join(_FILES)}")
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UserError("the embedded photographs come from scikit-image: pip install scikit-image")
    # The file is read, not skimage.data called: that would download a file which it lacks.
    path = Path(spec.origin).parent / "data" / _FILES[name]
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(
            f"the installed scikit-image lacks {path}: pip install --force-reinstall scikit-image"
        )
    return np.ascontiguousarray(image[:, :, ::-1])
