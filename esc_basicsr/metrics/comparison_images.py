"""Comparison images to judge by eye: bicubic, SR and GT side by side, for TensorBoard."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from torch import Tensor

from esc_basicsr.archs.resize import imresize

Image = npt.NDArray[np.uint8]

# Panels side by side: a comparison's tag is these, joined by "_", "/", its set, "/", its image.
WITH_GT, WITHOUT_GT = ("bicubic", "SR", "GT"), ("bicubic", "SR")

MOST = 3  # comparisons of a validation set
SIDE = 256  # pixels of a panel at most: a training's hundreds of comparisons stay below a few 100 MB
MARGIN = 4  # LR pixels beyond a panel's edge that bicubic interpolation looks at
GAP = 4  # pixels between panels
CAPTION = 40  # pixels above them


class Panel(NamedTuple):
    """A part of a comparison: its kind, and its image, (H, W, 3), RGB."""

    kind: str
    image: Image


class ComparisonImages:
    """The first few images of one validation, for TensorBoard.

    Of an image larger than 256×256 pixels the middle is shown.

    Args:
        scale: SR pixels per LR pixel.
    """

    def __init__(self, scale: int) -> None:
        self._scale = scale
        self._drawn: dict[tuple[str, str], Image] = {}

    def add(self, image: str, lr: Tensor, sr: Image, gt: Image | None, metrics: Mapping[str, float]) -> None:
        """Draw an image's comparison, unless there are enough or SR is not ``scale`` times LR.

        Args:
            image: Its name.
            lr: (C, H, W) in [0, 1], RGB or gray.
            sr: 8 bit, (H, W, 3) in OpenCV's order, or (H, W).
            gt: As ``sr``; None, or of another size, is skipped.
            metrics: By name.
        """
        height, width = sr.shape[:2]
        if len(self._drawn) == MOST or (height, width) != tuple(self._scale * n for n in lr.shape[-2:]):
            return
        rows, columns = (_middle(size, self._scale) for size in lr.shape[-2:])
        window = tuple(slice(part.start * self._scale, part.stop * self._scale) for part in (rows, columns))
        panels = [_enlarge(lr, rows, columns, self._scale), _rgb(sr[window])]
        if gt is not None and gt.shape == sr.shape:
            panels.append(_rgb(gt[window]))
        kinds = WITH_GT if len(panels) == len(WITH_GT) else WITHOUT_GT
        shown = panels[1].shape[:2]
        part = "" if shown == (height, width) else f", middle {shown[1]}x{shown[0]} of {width}x{height}"
        caption = "   ".join([f"{image}{part}", *(f"{name} {value:#.4g}" for name, value in metrics.items())])
        self._drawn.setdefault(("_".join(kinds), image), _draw(caption, kinds, panels))

    def write(self, tb_logger: Any, name: str, iteration: int) -> None:
        """Write the comparisons of the set ``name`` to TensorBoard's writer."""
        for (kinds, image), comparison in self._drawn.items():
            tag = f"{kinds}/{name}/{image}".encode("utf-8", "backslashreplace").decode()
            tb_logger.add_image(tag, comparison, iteration, dataformats="HWC")


def cut(comparison: Image, kinds: str) -> list[Panel]:
    """Cut a comparison into its panels, without the caption.

    Args:
        comparison: (H, W, 3), RGB.
        kinds: The beginning of its tag, such as ``bicubic_SR_GT``.
    """
    names = kinds.split("_")
    width = (comparison.shape[1] + GAP) // len(names)
    return [
        Panel(kind, comparison[CAPTION:, number * width : (number + 1) * width - GAP])
        for number, kind in enumerate(names)
    ]


def _middle(size: int, scale: int) -> slice:
    """Return the LR pixels that are shown, of a line of ``size`` of them."""
    shown = min(size, max(1, SIDE // scale))
    first = (size - shown) // 2
    return slice(first, first + shown)


def _enlarge(lr: Tensor, rows: slice, columns: slice, scale: int) -> Image:
    """Upscale a part of LR bicubically, as the whole would be; 8 bit RGB."""
    top, left = min(rows.start, MARGIN), min(columns.start, MARGIN)
    around = lr[:, rows.start - top : rows.stop + MARGIN, columns.start - left : columns.stop + MARGIN]
    large = imresize(around.float().cpu(), scale)
    height, width = ((part.stop - part.start) * scale for part in (rows, columns))
    large = large[:, top * scale :, left * scale :][:, :height, :width]
    return large.clamp(0, 1).mul(255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()


def _rgb(image: Image) -> Image:
    code = cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB
    return np.asarray(cv2.cvtColor(image, code), np.uint8)


def _draw(caption: str, kinds: tuple[str, ...], panels: list[Image]) -> Image:
    """Draw a comparison, RGB: one line over all panels, and over each its kind."""
    height, width = panels[0].shape[:2]
    comparison = np.full((CAPTION + height, len(panels) * (width + GAP) - GAP, 3), 32, np.uint8)

    def write(text: str, at: tuple[int, int]) -> None:
        cv2.putText(
            comparison,
            text.encode("ascii", "replace").decode(),
            *(at, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA),
        )

    write(caption, (4, 15))
    for number, (kind, panel) in enumerate(zip(kinds, panels, strict=True)):
        left = number * (width + GAP)
        write(kind, (left + 4, 33))
        comparison[CAPTION:, left : left + width] = panel
    return comparison
