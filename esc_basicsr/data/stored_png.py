"""PNGs whose pixels lie in the file as they are, so that a crop is read without decoding anything.

Any PNG reader reads them: 8-bit RGB, filter None, and deflate's stored blocks, which hold bytes uncompressed.
Each row of pixels has a block of its own here, so that all rows are equally far apart in the file.
"""

import functools
import struct
import zlib

import cv2
import numpy as np
import numpy.typing as npt

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ZLIB_HEADER = b"\x78\x01"
_ROW_HEAD = 6  # bytes before a row's pixels: the block's last-block flag, length, inverted length; the filter
_TAIL = 20  # bytes after the last row: Adler-32, the chunk's CRC, the chunk IEND
# Rows a power of two apart share few lines of the cache: transposing a crop would take three times as long.
_GAP = 64


def has_stored_form(height: int, width: int) -> bool:
    """Return whether an image of this size can be written so: a block holds 65,535 bytes, a chunk 2 GiB."""
    return 3 * width + 1 <= 0xFFFF and height * (_ROW_HEAD + 3 * width) < 2**31 - 64


def encode_stored_png(image: npt.NDArray[np.uint8]) -> bytes:
    """Encode (H, W, 3) BGR as a stored PNG; about H * (3 * W + 6) bytes, whatever the image shows.

    The size must have a stored form.
    """
    height, width = image.shape[:2]
    head, row_heads = _layout(height, width)
    rows = np.empty((height, _ROW_HEAD + 3 * width), np.uint8)
    rows[:, :_ROW_HEAD] = row_heads
    rows[:, _ROW_HEAD:] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).reshape(height, 3 * width)
    body = rows.tobytes() + struct.pack(">I", zlib.adler32(rows[:, _ROW_HEAD - 1 :].tobytes()))
    crc = struct.pack(">I", zlib.crc32(body, zlib.crc32(b"IDAT" + _ZLIB_HEADER)))
    return b"".join((head, body, crc, png_chunk(b"IEND", b"")))


def crop_stored_png(
    data: bytes | memoryview, size: tuple[int, int], top: int, left: int, height: int, width: int
) -> npt.NDArray[np.uint8] | None:
    """Copy a window out of a stored PNG. Of ``data`` only the window's rows are touched, and no checksums.

    The window must lie within the image, whose height and width are ``size``.

    Returns:
        (height, width, 3), BGR; None if ``data`` is no stored PNG of that size.
    """
    if not has_stored_form(*size):
        return None
    head, row_heads = _layout(*size)
    stride = _ROW_HEAD + 3 * size[1]
    if len(data) != len(head) + size[0] * stride + _TAIL or data[: len(head)] != head:
        return None
    start = len(head) + top * stride
    found: npt.NDArray[np.uint8] = np.ndarray((height, _ROW_HEAD), np.uint8, data, start, (stride, 1))
    if not np.array_equal(found, row_heads[top : top + height]):
        return None
    start += _ROW_HEAD + 3 * left
    pixels = np.empty((height, 3 * width + _GAP), np.uint8)[:, : 3 * width]
    pixels[:] = np.ndarray((height, 3 * width), np.uint8, data, start, (stride, 1))
    return pixels.reshape(height, width, 3)[:, :, ::-1]


@functools.lru_cache(maxsize=64)
def _layout(height: int, width: int) -> tuple[bytes, npt.NDArray[np.uint8]]:
    """Return the bytes before the first row, and those before each row's pixels, (height, 6)."""
    row = 3 * width + 1  # a row's filter, and its pixels
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = len(_ZLIB_HEADER) + height * (row + 5) + 4  # 4: Adler-32
    head = _SIGNATURE + png_chunk(b"IHDR", header) + struct.pack(">I4s", content, b"IDAT") + _ZLIB_HEADER
    row_heads = np.zeros((height, _ROW_HEAD), np.uint8)
    row_heads[:, 1:5] = np.frombuffer(struct.pack("<HH", row, row ^ 0xFFFF), np.uint8)
    row_heads[-1, 0] = 1
    return head, row_heads


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG, with its length and checksum."""
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))
