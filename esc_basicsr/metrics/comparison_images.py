"""Sheets of pictures to judge by eye: bicubic, SR and GT side by side, as TensorBoard is given them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from torch import Tensor

from esc_basicsr.archs.resize import imresize

__all__ = ["WITHOUT_GT", "WITH_GT", "Panel", "Sheets", "cut"]

Picture = npt.NDArray[np.uint8]

# What may lie side by side: a sheet's tag is these, joined by "_", "/", its set, "/", its image.
WITH_GT, WITHOUT_GT = ("bicubic", "SR", "GT"), ("bicubic", "SR")

MOST = 3  # sheets of a validation set
SIDE = 256  # pixels that a panel measures at most: a training's hundreds of sheets stay below a few 100 MB
MARGIN = 4  # LR pixels beyond a panel's edge that bicubic interpolation looks at
GAP = 4  # pixels between panels
CAPTION = 40  # pixels above them


class Panel(NamedTuple):
    """A part of a sheet: ``what`` it is, and its picture, (H, W, 3), RGB."""

    what: str
    picture: Picture


class Sheets:
    """The first few images of one validation, for TensorBoard.

    Of a picture larger than 256×256 pixels the middle is shown.

    Args:
        scale: SR pixels per LR pixel.
    """

    def __init__(self, scale: int) -> None:
        self._scale = scale
        self._sheets: dict[tuple[str, str], Picture] = {}

    def add(
        self, image: str, lr: Tensor, sr: Picture, gt: Picture | None, metrics: Mapping[str, float]
    ) -> None:
        """Draw an image's sheet, unless there are enough or SR is not ``scale`` times LR.

        Args:
            image: Its name.
            lr: (C, H, W) in [0, 1], RGB or gray.
            sr: 8 bit, (H, W, 3) in OpenCV's order, or (H, W).
            gt: As ``sr``; None, or of another size, is left out.
            metrics: By name.
        """
        height, width = sr.shape[:2]
        if len(self._sheets) == MOST or (height, width) != tuple(self._scale * n for n in lr.shape[-2:]):
            return
        rows, columns = (_middle(size, self._scale) for size in lr.shape[-2:])
        window = tuple(slice(part.start * self._scale, part.stop * self._scale) for part in (rows, columns))
        panels = [_enlarge(lr, rows, columns, self._scale), _rgb(sr[window])]
        if gt is not None and gt.shape == sr.shape:
            panels.append(_rgb(gt[window]))
        whats = WITH_GT if len(panels) == len(WITH_GT) else WITHOUT_GT
        shown = panels[1].shape[:2]
        part = "" if shown == (height, width) else f", middle {shown[1]}x{shown[0]} of {width}x{height}"
        caption = "   ".join([f"{image}{part}", *(f"{name} {value:#.4g}" for name, value in metrics.items())])
        self._sheets.setdefault(("_".join(whats), image), _draw(caption, whats, panels))

    def write(self, tb_logger: Any, name: str, iteration: int) -> None:
        """Give the sheets of the set ``name`` to TensorBoard's writer."""
        for (whats, image), sheet in self._sheets.items():
            tag = f"{whats}/{name}/{image}".encode("utf-8", "backslashreplace").decode()
            tb_logger.add_image(tag, sheet, iteration, dataformats="HWC")


def cut(sheet: Picture, whats: str) -> list[Panel]:
    """A sheet's panels, without the caption.

    Args:
        sheet: (H, W, 3), RGB.
        whats: What its tag begins with.
    """
    names = whats.split("_")
    width = (sheet.shape[1] + GAP) // len(names)
    return [
        Panel(what, sheet[CAPTION:, number * width : (number + 1) * width - GAP])
        for number, what in enumerate(names)
    ]


def _middle(size: int, scale: int) -> slice:
    """LR pixels of a line of ``size`` of them that are shown."""
    shown = min(size, max(1, SIDE // scale))
    first = (size - shown) // 2
    return slice(first, first + shown)


def _enlarge(lr: Tensor, rows: slice, columns: slice, scale: int) -> Picture:
    """A part of LR upscaled bicubically, as the whole would be; 8 bit RGB."""
    top, left = min(rows.start, MARGIN), min(columns.start, MARGIN)
    around = lr[:, rows.start - top : rows.stop + MARGIN, columns.start - left : columns.stop + MARGIN]
    large = imresize(around.float().cpu(), scale)
    height, width = ((part.stop - part.start) * scale for part in (rows, columns))
    large = large[:, top * scale :, left * scale :][:, :height, :width]
    return large.clamp(0, 1).mul(255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()


def _rgb(picture: Picture) -> Picture:
    code = cv2.COLOR_GRAY2RGB if picture.ndim == 2 else cv2.COLOR_BGR2RGB
    return np.asarray(cv2.cvtColor(picture, code), np.uint8)


def _draw(caption: str, whats: tuple[str, ...], panels: list[Picture]) -> Picture:
    """A sheet, RGB: one line over all panels, and over each what it is."""
    height, width = panels[0].shape[:2]
    sheet = np.full((CAPTION + height, len(panels) * (width + GAP) - GAP, 3), 32, np.uint8)

    def say(text: str, at: tuple[int, int]) -> None:
        cv2.putText(
            sheet,
            text.encode("ascii", "replace").decode(),
            *(at, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA),
        )

    say(caption, (4, 15))
    for number, (what, panel) in enumerate(zip(whats, panels, strict=True)):
        left = number * (width + GAP)
        say(what, (left + 4, 33))
        sheet[CAPTION:, left : left + width] = panel
    return sheet
