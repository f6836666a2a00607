"""Sample images that need no download: those in scikit-image's wheel, which BasicSR requires."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from esc_basicsr.common.errors import UserError

# name -> file in skimage/data. The motorcycles are the two views of one stereo pair: never put one into
# training and the other into validation.
_FILES = {
    file.split(".")[0]: file
    for file in (
        *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png"),
        *("hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg"),
        "rocket.jpg",
    )
}


def sample_image_names() -> tuple[str, ...]:
    """Return the images' names, in alphabetical order. brick, camera, grass and gravel are gray."""
    return tuple(_FILES)


def load_sample_image(name: str) -> npt.NDArray[np.uint8]:
    """Read one sample image.

    Returns:
        (H, W, 3), RGB, sides from 300 to 1411 pixels. A gray image has three equal channels.

    Raises:
        UserError: There is no such image, or scikit-image is not installed or lacks it.
    """
    if name not in _FILES:
        raise UserError(f"no sample image is called {name!r}; there are: {', '.join(_FILES)}")
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UserError("the sample images come from scikit-image: pip install scikit-image")
    # The file is read, not skimage.data called: that would download a file which it lacks.
    path = Path(spec.origin).parent / "data" / _FILES[name]
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(
            f"the installed scikit-image lacks {path}: pip install --force-reinstall scikit-image"
        )
    return np.ascontiguousarray(image[:, :, ::-1])
