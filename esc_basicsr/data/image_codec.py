"""8-bit colour images as bytes, and back. Channel order is OpenCV's and BasicSR's: BGR."""

import cv2
import numpy as np
import numpy.typing as npt

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.stored_png import encode_stored_png, has_stored_form


def decode_image(data: bytes | memoryview, origin: str) -> npt.NDArray[np.uint8]:
    """Decode an image file's bytes to 8-bit colour.

    A gray image becomes three equal channels; alpha is dropped; 16 bits are reduced to 8.

    Args:
        data: The file's bytes, of any format that OpenCV reads.
        origin: Where the bytes come from, for the error message.

    Returns:
        (H, W, 3), BGR.

    Raises:
        UserError: The bytes are not an image.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if len(data) else None
    except cv2.error:  # a size beyond OpenCV's limits, for one
        image = None
    if image is None:
        raise UserError(f"{origin} cannot be decoded as an image ({len(data)} bytes): replace or remove it")
    return np.asarray(image, dtype=np.uint8)


def encode_png(image: npt.NDArray[np.uint8], compression: int) -> bytes:
    """Encode (H, W, 3) BGR as PNG.

    Args:
        image: (H, W, 3), BGR, contiguous.
        compression: 1 (fast) to 9 (slow, small), or 0: not compressed, and in the form that
            `crop_stored_png` crops if the size has it.
    """
    if compression == 0 and has_stored_form(*image.shape[:2]):
        return encode_stored_png(image)
    _, encoded = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, compression])
    return encoded.tobytes()
